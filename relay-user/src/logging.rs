//! The daemon's log: what is happening, on standard error, as text or as JSON lines.
//!
//! A flood of one message must not fill a disk: `limit` says how much each place in the code may log.

mod limit;

use std::{
    io::{self, IsTerminal as _},
    sync::LazyLock,
    time::Instant,
};

use tracing_subscriber::{EnvFilter, layer::SubscriberExt as _};

use self::limit::{Limit, Suppressed};

/// What the messages of this module are known by.
const TARGET: &str = module_path!();

/// A process has one log, and so one limit.
static LIMIT: LazyLock<Limit> = LazyLock::new(Limit::default);

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// One readable line per message.
    #[default]
    Text,
    /// One JSON object per line, for log collectors.
    Json,
}

/// Starts logging to standard error. `verbosity` is the number of `-v`: 0 tells what changes, 1 also
/// why, 2 everything this program does.
///
/// A second call changes nothing: a process has one log.
pub fn start(format: LogFormat, verbosity: u8) {
    let filter = match verbosity {
        0 => "warn,relay_user=info",
        1 => "info,relay_user=debug",
        _ => "debug,relay_user=trace",
    };
    let colour =
        io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
    let limited = tracing_subscriber::registry()
        .with(EnvFilter::new(filter))
        .with(&*LIMIT);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(colour)
        // A log that nobody reads must not end a daemon that relays calls: the report of a failed
        // write goes to standard error too, and panics there.
        .log_internal_errors(false);
    let started = match format {
        LogFormat::Text => tracing::subscriber::set_global_default(limited.with(lines)),
        LogFormat::Json => tracing::subscriber::set_global_default(limited.with(lines.json())),
    };
    if started.is_err() {
        tracing::debug!("the log was started before");
    }
}

/// Tells how many messages of each kind were suppressed, at most once a minute for each. To be called now
/// and then.
pub fn tell_suppressed() {
    LIMIT.drain(Instant::now(), false).iter().for_each(tell);
}

/// Tells of all that were suppressed and not told of. To be called at the end.
pub fn tell_rest() {
    LIMIT.drain(Instant::now(), true).iter().for_each(tell);
}

fn tell(
    Suppressed {
        count,
        like,
        is_info,
    }: &Suppressed,
) {
    if *is_info {
        tracing::info!(suppressed = count, like, "more messages like this one");
    } else {
        tracing::warn!(suppressed = count, like, "more messages like this one");
    }
}
