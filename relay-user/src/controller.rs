//! Owns registry and maps: takes events from feeds, control API, next hops and the datapath one at a
//! time, and carries out what the registry says.

mod feed;
pub mod proof_time;
mod wire;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    process,
    time::{Duration, Instant},
};

use relay_common::stream::{ABI_VERSION, Address, State, Stream, StreamKey};
use tokio::sync::mpsc;

use crate::{
    ami::{CallId, FeedCommand},
    clock::{self, Now},
    config::AttachSettings,
    control::{
        Command, MetricsReport, Reply,
        model::{
            AmiReport, AmiState, ApiError, Detached, ErrorCode, Feed, PairReport, PairState,
            RefusalReport, StatusReport, StreamState,
        },
    },
    datapath::{AttachMode, Datapath, DatapathError},
    events::{EventBus, Subject, TransitionKind},
    next_hop::{NextHops, Notice, Stopped},
    pair::Pair,
    priority::Priority,
    registry::{Change, Origin, Policy, Refusal, Registry, Watched},
    stats,
};

/// How far ahead the lease is pushed: what passes at most, after the controller froze or died, until
/// every stream is the PBX's again.
pub const LEASE: Duration = Duration::from_secs(5);

/// How often [`Controller::tick`] wants to be called.
pub const TICK: Duration = Duration::from_millis(250);

/// How long AMI may take to confirm the calls that an earlier daemon left. As long as it confirms
/// some in such a time it may go on, up to [`LEASE`].
const CONFIRMATION: Duration = Duration::from_secs(1);

/// A daemon that was away for so long, ns, hears what Asterisk has said before it renews the lease.
const ABSENT: u64 = 1_000_000_000;

/// Registry, maps and next hops of one attached interface.
pub struct Controller {
    settings: AttachSettings,
    interface_index: u32,
    mode_reason: String,
    started: Instant,
    datapath: Datapath,
    next_hops: NextHops,
    registry: Registry,
    events: EventBus,
    ami: Option<AmiReport>,
    /// Questions to the AMI feed.
    questions: Option<mpsc::Sender<FeedCommand>>,
    /// Pairs of the AMI feed that Asterisk has not confirmed since it was last lost.
    unconfirmed: BTreeSet<u64>,
    /// When those are taken back.
    confirmation: Option<Confirmation>,
    /// When the lease was last renewed by this daemon, `CLOCK_MONOTONIC`, ns.
    renewed: Option<u64>,
    /// Calls that the operator took away, whatever Asterisk still answers about them.
    dismissed: HashSet<CallId>,
    /// What goes on with each pair on the wire.
    wire: wire::Watch,
    proofs: proof_time::Stopwatch,
    /// By the name of the rule or the error's code, which are few.
    refusals: BTreeMap<String, u64>,
}

/// How long calls may stay unconfirmed.
#[derive(Clone, Copy)]
struct Confirmation {
    by: Instant,
    /// Not even a busy Asterisk gets longer.
    at_last: Instant,
    /// How many there were when `by` was set.
    left: usize,
}

/// A command that ends the daemon, with the answer it owes.
pub enum Handled {
    /// Served; go on.
    Done,
    /// `detach`: to be answered once everything is gone.
    Detach(Reply<Detached>),
}

/// The controller cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// Next hops are no longer kept current, so nothing may be relayed any more.
    #[error(transparent)]
    NextHops(#[from] Stopped),
}

impl Controller {
    /// Takes over an attached datapath. `questions` leads to the AMI feed, if there is one.
    #[must_use]
    pub fn new(
        settings: AttachSettings,
        interface_index: u32,
        mode_reason: String,
        datapath: Datapath,
        next_hops: NextHops,
        events: EventBus,
        questions: Option<mpsc::Sender<FeedCommand>>,
    ) -> Self {
        let ami = settings.ami.as_ref().map(|ami| AmiReport {
            address: ami.address.clone(),
            user: ami.user.clone(),
            state: AmiState::Down,
            asterisk: None,
            cause: Some("not logged in yet".to_owned()),
        });
        Self {
            registry: Registry::new(Policy {
                dscp: settings.dscp,
                priority: (datapath.mode() == AttachMode::Tc)
                    .then(|| settings.priority.unwrap_or_default()),
                max_streams: settings.max_streams,
                proof: settings.proof,
                keepalive: settings.keepalive,
            }),
            settings,
            interface_index,
            mode_reason,
            started: Instant::now(),
            datapath,
            next_hops,
            events,
            ami,
            questions,
            unconfirmed: BTreeSet::new(),
            confirmation: None,
            renewed: None,
            dismissed: HashSet::new(),
            wire: wire::Watch::default(),
            proofs: proof_time::Stopwatch::default(),
            refusals: BTreeMap::new(),
        }
    }

    /// Takes over the streams that an earlier daemon left, which go on as they are. Those of the AMI
    /// feed must be confirmed by Asterisk within a second.
    ///
    /// # Errors
    /// [`ControllerError`].
    pub async fn adopt(&mut self, streams: &[(StreamKey, Stream)]) -> Result<(), ControllerError> {
        // Scouts have another stream's slot: a round that goes on must not end with them.
        let (streams, scouts): (Vec<_>, Vec<_>) = streams
            .iter()
            .partition(|(key, _)| key.local_address != Address::default());
        let scouts: Vec<_> = scouts
            .iter()
            .map(|(key, stream)| stream.spec(key))
            .collect();
        self.withdraw(&scouts);
        let (heirlooms, orphans) = self
            .registry
            .heirlooms(&streams, |slot| self.datapath.state(slot));
        for orphan in orphans {
            tracing::warn!(
                pair = orphan.pair,
                "a stream without its opposite is removed"
            );
            self.apply(vec![Change::Remove(orphan)]).await?;
        }
        let paths = heirlooms
            .iter()
            .flat_map(|heirloom| Registry::paths_of(&heirloom.pair));
        let mut notices = self.next_hops.watch_all(paths.collect()).await?.into_iter();
        for heirloom in heirlooms {
            let (id, leftovers) = (heirloom.id, heirloom.removal());
            let [first, second] = Registry::paths_of(&heirloom.pair);
            let watched = watched(&mut notices)?;
            match self.registry.adopt(heirloom, watched) {
                Ok(changes) => {
                    self.apply(changes).await?;
                    if self.registry.is_ami(id) {
                        self.unconfirmed.insert(id);
                    }
                    self.wire.begin(id, Instant::now());
                    self.tell(
                        id,
                        None,
                        TransitionKind::Adopted,
                        "left by an earlier daemon",
                    );
                    self.notice(id);
                }
                Err(refusal) => {
                    tracing::warn!(pair = id, %refusal, "not adopted");
                    self.apply(leftovers.into()).await?;
                    self.apply(vec![Change::Unwatch(first), Change::Unwatch(second)])
                        .await?;
                }
            }
        }
        self.registry.adopted();
        self.expect_confirmation(CONFIRMATION);
        Ok(())
    }

    /// Name of the interface.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.settings.interface
    }

    /// Pairs known.
    #[must_use]
    pub fn pairs(&self) -> u64 {
        self.registry.ids().count() as u64
    }

    /// Tells that every pair goes back to the PBX, as it does when this is dropped.
    pub fn tell_end(&self, cause: &str) {
        for id in self.registry.ids().filter(|&id| self.registry.is_held(id)) {
            self.tell(id, None, TransitionKind::TakenBack, cause);
        }
    }

    /// Whether the datapath is to stay when the daemon ends.
    #[must_use]
    pub const fn persists(&self) -> bool {
        self.settings.persist
    }

    /// Ends the controller, and leaves the datapath to the lease.
    pub fn leave(self) {
        self.datapath.leave();
    }

    /// Does what is due: the lease, what the maps tell, calls that are not confirmed.
    ///
    /// # Errors
    /// [`ControllerError`].
    pub async fn tick(&mut self, now: Instant) -> Result<(), ControllerError> {
        self.renew_lease().await?;
        self.judge_confirmation(now).await?;
        self.look(now).await
    }

    /// Gives Asterisk time to confirm what is unconfirmed. An earlier deadline stands: a connection
    /// that comes and goes gives no new time.
    fn expect_confirmation(&mut self, time: Duration) {
        let left = self.unconfirmed.len();
        if left == 0 {
            return;
        }
        let now = Instant::now();
        self.confirmation.get_or_insert(Confirmation {
            by: now + time,
            at_last: now + time + LEASE,
            left,
        });
    }

    /// Takes back what was not confirmed in time.
    async fn judge_confirmation(&mut self, now: Instant) -> Result<(), ControllerError> {
        let Some(Confirmation { by, at_last, left }) = self.confirmation else {
            return Ok(());
        };
        if now < by {
            return Ok(());
        }
        let down = self.ami.as_ref().filter(|ami| ami.state == AmiState::Down);
        let still = self.unconfirmed.len();
        if down.is_none() && still < left && now < at_last {
            self.confirmation = Some(Confirmation {
                by: now + CONFIRMATION,
                at_last,
                left: still,
            });
            return Ok(());
        }
        let why = match down.and_then(|ami| ami.cause.as_deref()) {
            Some(cause) => format!("AMI is down: {cause}"),
            None => "Asterisk did not confirm it in time".to_owned(),
        };
        self.drop_unconfirmed(&why).await
    }

    /// Pushes the lease forward. A controller that comes late first takes everything back: what it
    /// knows may be over, and the addresses another call's.
    async fn renew_lease(&mut self) -> Result<(), ControllerError> {
        // Before anything is looked at: should this process be stopped in between, the deadline
        // that it then sets has passed already.
        let now = clock::monotonic_now();
        let lease = self.datapath.lease();
        let late = lease != 0 && now >= lease;
        if !late && self.renewed.is_some_and(|renewed| now >= renewed + ABSENT) {
            // What Asterisk said meanwhile is read before the next tick.
            self.renewed = None;
            return Ok(());
        }
        self.renewed = Some(now);
        if late {
            let ids: Vec<_> = self.registry.ids().collect();
            tracing::warn!(
                late_ms = (now - lease) / 1_000_000,
                pairs = ids.len(),
                "the lease was over before it was renewed: every call must be proven again"
            );
            self.events.publish(
                Subject::DAEMON,
                TransitionKind::LeaseLost,
                "the daemon did not run in time to renew it",
            );
            for id in &ids {
                let changes = self.registry.stop(*id, "the lease was over");
                self.apply(changes).await?;
            }
        }
        self.datapath.renew_lease(now + LEASE.as_nanos() as u64);
        if late {
            for id in self.registry.ids().collect::<Vec<_>>() {
                self.notice(id);
                self.ask_now(id, Instant::now()).await?;
            }
        }
        Ok(())
    }

    /// Serves a client.
    ///
    /// # Errors
    /// [`ControllerError`].
    pub async fn command(&mut self, command: Command) -> Result<Handled, ControllerError> {
        // Its client was told that it failed.
        if command.is_abandoned() {
            return Ok(Handled::Done);
        }
        match command {
            Command::Add { pair, reply } => {
                let answer = match self.add(Origin::Api, pair, [None; 2]).await? {
                    Ok(id) => self
                        .pair_report(id)
                        .ok_or_else(|| ApiError::unknown_pair(id)),
                    Err(refusal) => {
                        self.tell_refusal(&refusal);
                        Err(refusal.into())
                    }
                };
                send(reply, answer);
            }
            Command::AddAll { pairs, reply } => {
                let added = self.add_all(pairs).await?.into_iter();
                let added = added.map(|outcome| outcome.map_err(ApiError::from));
                send(reply, Ok(added.collect()));
            }
            Command::Remove { id, reply } => {
                let answer = match self.pair_report(id) {
                    Some(report) => {
                        self.take_away(id, "removed by the operator").await?;
                        Ok(report)
                    }
                    None => Err(ApiError::unknown_pair(id)),
                };
                send(reply, answer);
            }
            Command::Flush { reply } => {
                let reports = self.reports();
                for report in &reports {
                    self.take_away(report.id, "flushed by the operator").await?;
                }
                send(reply, Ok(reports));
            }
            Command::List {
                after,
                limit,
                reply,
            } => {
                let now = Now::read();
                let ids = self.registry.ids_after(after).take(limit);
                let reports = ids.filter_map(|id| self.registry.report(id, self.state(), now));
                send(reply, Ok(reports.collect()));
            }
            Command::Show { id, reply } => {
                let report = self.pair_report(id);
                send(reply, report.ok_or_else(|| ApiError::unknown_pair(id)));
            }
            Command::Status { reply } => send(reply, self.status()),
            Command::Metrics { reply } => send(reply, self.metrics()),
            Command::Detach { reply } => return Ok(Handled::Detach(reply)),
        }
        Ok(Handled::Done)
    }

    /// Takes an operator's word: an API pair is forgotten; a call of Asterisk's stays known, and
    /// may be offered again when its bridge changes or AMI reconnects.
    async fn take_away(&mut self, id: u64, why: &str) -> Result<(), ControllerError> {
        match self.registry.call(id).cloned() {
            Some(call) if self.registry.is_held(id) => {
                self.dismissed.insert(call.clone());
                let why = format!("{why}, until its bridge changes or AMI reconnects");
                self.set_aside(&call, None, PairState::Refused, why).await
            }
            // Asterisk has it already, and for its own reason.
            Some(_) => Ok(()),
            None => self.forget(id, TransitionKind::TakenBack, why).await,
        }
    }

    /// Forgets a pair.
    async fn forget(
        &mut self,
        id: u64,
        kind: TransitionKind,
        why: &str,
    ) -> Result<(), ControllerError> {
        if self.registry.is_held(id) {
            self.tell(id, None, kind, why);
        }
        let changes = self.registry.remove(id);
        let leftovers = self.wire.end(id);
        self.proofs.end(id);
        self.withdraw(&leftovers);
        self.unconfirmed.remove(&id);
        self.apply(changes).await
    }

    /// Takes in that a path changed.
    ///
    /// # Errors
    /// [`ControllerError`].
    pub async fn resolved(&mut self, notice: &Notice) -> Result<(), ControllerError> {
        tracing::debug!(path = %notice.path, resolution = ?notice.resolution, "next hop changed");
        let changes = self.registry.resolved(notice);
        self.apply(changes).await
    }

    async fn add(
        &mut self,
        origin: Origin,
        pair: Pair,
        rtp_timeout: [Option<Duration>; 2],
    ) -> Result<Result<u64, Refusal>, ControllerError> {
        if let Err(refusal) = self.registry.check(&pair) {
            return Ok(Err(self.refused(refusal)));
        }
        let paths = Registry::paths_of(&pair).into();
        let mut notices = self.next_hops.watch_all(paths).await?.into_iter();
        let watched = watched(&mut notices)?;
        self.take(origin, pair, watched, rtp_timeout).await
    }

    /// Adds pairs of clients; each stands for itself.
    async fn add_all(
        &mut self,
        pairs: Vec<Pair>,
    ) -> Result<Vec<Result<u64, Refusal>>, ControllerError> {
        let paths = pairs.iter().flat_map(Registry::paths_of).collect();
        let mut notices = self.next_hops.watch_all(paths).await?.into_iter();
        let mut added = Vec::with_capacity(pairs.len());
        for pair in pairs {
            let watched = watched(&mut notices)?;
            let outcome = self.take(Origin::Api, pair, watched, [None; 2]).await?;
            if let Err(refusal) = &outcome {
                self.tell_refusal(refusal);
            }
            added.push(outcome);
        }
        Ok(added)
    }

    /// Takes a pair whose paths are being watched.
    async fn take(
        &mut self,
        origin: Origin,
        pair: Pair,
        watched: [Watched; 2],
        rtp_timeout: [Option<Duration>; 2],
    ) -> Result<Result<u64, Refusal>, ControllerError> {
        let [first, second] = Registry::paths_of(&pair);
        match self.registry.add(origin, pair, watched, rtp_timeout) {
            Ok((id, changes)) => {
                self.apply(changes).await?;
                self.wire.begin(id, Instant::now());
                self.notice(id);
                Ok(Ok(id))
            }
            Err(refusal) => {
                self.apply(vec![Change::Unwatch(first), Change::Unwatch(second)])
                    .await?;
                Ok(Err(self.refused(refusal)))
            }
        }
    }

    /// Publishes that a client's pair was refused.
    fn tell_refusal(&self, refusal: &Refusal) {
        let subject = Subject::feed(Feed::Api);
        let cause = refusal.to_string();
        self.events.publish(subject, TransitionKind::Refused, cause);
    }

    fn refused(&mut self, refusal: Refusal) -> Refusal {
        let code = serde_json::to_value(refusal.code());
        let code = code.ok().and_then(|code| code.as_str().map(str::to_owned));
        self.count_refusal(code.unwrap_or_default());
        refusal
    }

    fn count_refusal(&mut self, cause: String) {
        *self.refusals.entry(cause).or_default() += 1;
    }

    async fn apply(&mut self, changes: Vec<Change>) -> Result<(), ControllerError> {
        for change in changes {
            let done = match change {
                Change::Install(spec) => {
                    self.datapath.reset(spec.slot);
                    match self.datapath.install(&spec) {
                        Err(DatapathError::Full { .. }) if self.dismiss_scouts() => {
                            self.datapath.install(&spec)
                        }
                        done => done,
                    }
                }
                Change::Update(spec) => {
                    let updated = self.datapath.install(&spec);
                    if updated.is_err() {
                        self.datapath.take_back(spec.slot);
                    }
                    updated
                }
                Change::Watch { slot, epoch } => {
                    self.datapath.watch(slot, epoch);
                    Ok(())
                }
                Change::Offload {
                    slot,
                    epoch,
                    payload_types,
                } => {
                    self.datapath.offload(slot, epoch, payload_types);
                    Ok(())
                }
                Change::TakeBack { slot } => {
                    self.datapath.take_back(slot);
                    Ok(())
                }
                Change::Remove(spec) => self.datapath.remove(&spec),
                Change::Unwatch(path) => {
                    self.next_hops.unwatch(path).await?;
                    Ok(())
                }
            };
            // The map has room for whatever the registry lets in: this does not happen, and if it
            // does, the stream's packets are Asterisk's.
            if let Err(error) = done {
                tracing::error!(%error, "the datapath refused a change");
            }
        }
        Ok(())
    }

    /// Publishes what has become of a pair, or of one of its streams.
    fn tell(&self, id: u64, leg: Option<usize>, kind: TransitionKind, cause: impl Into<String>) {
        let cause = cause.into();
        tracing::debug!(pair = id, leg, ?kind, cause, "transition");
        let (feed, call) = match self.registry.origin(id) {
            Some(Origin::Ami { call, .. }) => (Feed::Ami, Some(call.to_string())),
            Some(Origin::Adopted) => (Feed::Ami, None),
            Some(Origin::Api) | None => (Feed::Api, None),
        };
        let subject = Subject {
            pair: Some(id),
            feed: Some(feed),
            call,
            stream: leg.map(|leg| leg as u8),
        };
        self.events.publish(subject, kind, cause);
    }

    fn state(&self) -> impl Fn(u32) -> State + '_ {
        |slot| self.datapath.state(slot)
    }

    fn pair_report(&self, id: u64) -> Option<PairReport> {
        self.registry.report(id, self.state(), Now::read())
    }

    fn reports(&self) -> Vec<PairReport> {
        self.registry
            .ids()
            .filter_map(|id| self.pair_report(id))
            .collect()
    }

    fn metrics(&self) -> Result<MetricsReport, ApiError> {
        Ok(MetricsReport {
            status: self.status()?,
            events: self.events.counts().collect(),
            proof_times: self.proofs.times(),
        })
    }

    fn status(&self) -> Result<StatusReport, ApiError> {
        let counters = self
            .datapath
            .counters()
            .map_err(|error: DatapathError| ApiError::new(ErrorCode::Internal, error))?;
        let census = self.registry.census(self.state());
        let lease = self.datapath.lease().saturating_sub(clock::monotonic_now());
        Ok(StatusReport {
            time: clock::utc_now(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            abi: ABI_VERSION,
            pid: process::id(),
            interface: self.settings.interface.clone(),
            ifindex: self.interface_index,
            mode: self.datapath.mode(),
            mode_reason: self.mode_reason.clone(),
            dscp: self.settings.dscp,
            priority: self.settings.priority.and_then(Priority::effective),
            proof: self.settings.proof,
            pins: self.datapath.pins().to_owned(),
            uptime_seconds: self.started.elapsed().as_secs(),
            max_streams: self.settings.max_streams,
            pairs: census.pairs,
            streams: census.streams,
            lease_ms: lease / 1_000_000,
            offloaded: census.offloaded,
            waiting: census.waiting,
            refused: census.refused,
            unproven: census.unproven,
            stream_states: census.stream_states,
            metrics: self.settings.metrics,
            http: self.settings.http,
            ami: self.ami.clone(),
            reasons: stats::reasons(&counters),
            refusals: self
                .refusals
                .iter()
                .map(|(cause, &count)| RefusalReport {
                    cause: cause.clone(),
                    count,
                })
                .collect(),
        })
    }
}

/// Of the answers to several watches, those of the next pair.
fn watched(notices: &mut impl Iterator<Item = Notice>) -> Result<[Watched; 2], Stopped> {
    match [notices.next(), notices.next()] {
        [Some(first), Some(second)] => Ok([first.into(), second.into()]),
        _ => Err(Stopped),
    }
}

/// The transition that a stream's new state is.
const fn kind_of(state: StreamState) -> Option<TransitionKind> {
    match state {
        StreamState::Waiting => None,
        StreamState::Watching => Some(TransitionKind::Watching),
        StreamState::Offloaded => Some(TransitionKind::Offloaded),
        StreamState::Suspended => Some(TransitionKind::Suspended),
    }
}

/// Answers a client, who may have gone.
fn send<T>(reply: Reply<T>, answer: Result<T, ApiError>) {
    if reply.send(answer).is_err() {
        tracing::debug!("a client left before its answer");
    }
}
