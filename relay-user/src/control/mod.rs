//! The control API: how the other subcommands, and programs, talk to the daemon.
//!
//! HTTP/1.1 with JSON over a Unix socket; `docs/api.md` is its description. The server only turns
//! requests into [`Command`]s; whoever owns the registry and the maps answers them.

mod address;
pub mod client;
pub(crate) mod connection;
pub mod model;
pub mod selection;
pub mod server;
pub mod socket;

use tokio::sync::oneshot;

use crate::{controller::proof_time::ProofTimes, events::TransitionKind, pair::Pair};
use model::{ApiError, Detached, PairReport, StatusReport};

/// Where the answer to a [`Command`] goes.
///
/// It is closed when nobody waits any longer: a command found so is to be skipped, because its
/// caller was told that it failed.
pub type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// What metrics are made of.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricsReport {
    /// The daemon, its interface and its counters.
    pub status: StatusReport,
    /// How many events there were of each kind.
    pub events: Vec<(TransitionKind, u64)>,
    /// How long proofs took.
    pub proof_times: ProofTimes,
}

impl Command {
    /// Whether nobody waits for its answer any longer.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        match self {
            Self::Add { reply, .. } | Self::Remove { reply, .. } | Self::Show { reply, .. } => {
                reply.is_closed()
            }
            Self::AddAll { reply, .. } => reply.is_closed(),
            Self::Flush { reply } | Self::List { reply, .. } => reply.is_closed(),
            Self::Status { reply } => reply.is_closed(),
            Self::Metrics { reply } => reply.is_closed(),
            Self::Detach { reply } => reply.is_closed(),
        }
    }
}

/// What a client asks of the controller.
#[derive(Debug)]
pub enum Command {
    /// Take a pair into the registry. Its addresses were checked as far as [`Pair::new`] can.
    Add {
        /// The pair.
        pair: Pair,
        /// Gets the new pair as it stands.
        reply: Reply<PairReport>,
    },
    /// The same with several pairs, each of which is taken or refused by itself.
    AddAll {
        /// The pairs.
        pairs: Vec<Pair>,
        /// Gets their numbers, or why they were refused, in the same order.
        reply: Reply<Vec<Result<u64, ApiError>>>,
    },
    /// Take one pair back and forget it.
    Remove {
        /// The pair's number.
        id: u64,
        /// Gets the pair as it last was.
        reply: Reply<PairReport>,
    },
    /// Take back and forget every pair of every feed.
    Flush {
        /// Gets the pairs as they last were.
        reply: Reply<Vec<PairReport>>,
    },
    /// Report the pairs that follow on a number, so that between one part of a long list and the next
    /// other things are done.
    List {
        /// The number; 0 before the first.
        after: u64,
        /// At most so many.
        limit: usize,
        /// Gets them in the order of their numbers: fewer than asked for are the last.
        reply: Reply<Vec<PairReport>>,
    },
    /// Report one pair.
    Show {
        /// The pair's number.
        id: u64,
        /// Gets the pair.
        reply: Reply<PairReport>,
    },
    /// Report the daemon itself.
    Status {
        /// Gets the report.
        reply: Reply<StatusReport>,
    },
    /// Report what metrics are made of.
    Metrics {
        /// Gets the report.
        reply: Reply<MetricsReport>,
    },
    /// Take everything back and end. Answered when programs, links, maps and pins are gone, because
    /// the client tells its user so.
    Detach {
        /// Gets what was ended.
        reply: Reply<Detached>,
    },
}
