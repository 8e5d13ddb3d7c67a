//! Owns registry and maps: takes events from feeds, control API and next hops one at a time, and
//! carries out what the registry says.

use std::{collections::BTreeMap, process, time::Instant};

use relay_common::{
    reason,
    stream::{ABI_VERSION, State, mode},
};
use tokio::sync::mpsc;

use crate::{
    ami::{CallId, FeedCommand, FeedEvent},
    config::AttachSettings,
    control::{
        Command, Reply,
        model::{
            AmiReport, AmiState, ApiError, ErrorCode, PairReport, PairState, ReasonReport,
            RefusalReport, StatusReport, Verdict,
        },
    },
    datapath::{Datapath, DatapathError},
    next_hop::{NextHops, Notice, Stopped},
    pair::Pair,
    registry::{Change, Origin, Refusal, Registry},
};

/// Registry, maps and next hops of one attached interface.
pub struct Controller {
    settings: AttachSettings,
    interface_index: u32,
    mode_reason: String,
    started: Instant,
    datapath: Datapath,
    next_hops: NextHops,
    registry: Registry,
    ami: Option<AmiReport>,
    feed: Option<mpsc::Sender<FeedCommand>>,
    /// By the name of the rule or the error's code, which are few.
    refusals: BTreeMap<String, u64>,
}

/// A command that ends the daemon, with the answer it owes.
pub enum Handled {
    /// Served; go on.
    Done,
    /// `detach`: to be answered once everything is gone.
    Detach(Reply<crate::control::model::Detached>),
}

/// The controller cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// Next hops are no longer kept current, so nothing may be relayed any more.
    #[error(transparent)]
    NextHops(#[from] Stopped),
}

impl Controller {
    /// Takes over an attached datapath. `feed` takes questions to Asterisk, where there is one.
    #[must_use]
    pub fn new(
        settings: AttachSettings,
        interface_index: u32,
        mode_reason: String,
        datapath: Datapath,
        next_hops: NextHops,
        feed: Option<mpsc::Sender<FeedCommand>>,
    ) -> Self {
        let ami = settings.ami.as_ref().map(|ami| AmiReport {
            address: ami.address.clone(),
            user: ami.user.clone(),
            state: AmiState::Down,
            asterisk: None,
            cause: Some("not logged in yet".to_owned()),
        });
        Self {
            registry: Registry::new(settings.dscp, settings.max_streams),
            settings,
            interface_index,
            mode_reason,
            started: Instant::now(),
            datapath,
            next_hops,
            ami,
            feed,
            refusals: BTreeMap::new(),
        }
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
                let answer = match self.add(Origin::Api, pair).await? {
                    Ok(id) => self
                        .pair_report(id)
                        .ok_or_else(|| ApiError::unknown_pair(id)),
                    Err(refusal) => Err(refusal.into()),
                };
                send(reply, answer);
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
            Command::List { reply } => send(reply, Ok(self.reports())),
            Command::Show { id, reply } => {
                let report = self.pair_report(id);
                send(reply, report.ok_or_else(|| ApiError::unknown_pair(id)));
            }
            Command::Status { reply } => send(reply, self.status()),
            Command::Detach { reply } => return Ok(Handled::Detach(reply)),
        }
        Ok(Handled::Done)
    }

    /// Takes an operator's word: an API pair is forgotten; a call of Asterisk's stays known, and
    /// may be offered again when its bridge changes or AMI reconnects.
    async fn take_away(&mut self, id: u64, why: &str) -> Result<(), ControllerError> {
        let changes = match self.registry.call(id).cloned() {
            Some(call) if self.registry.held(&call).is_some() => {
                let why = format!("{why}, until its bridge changes or AMI reconnects");
                self.registry
                    .set_aside(&call, None, PairState::Refused, why)
            }
            // Asterisk has it already, and for its own reason.
            Some(_) => Vec::new(),
            None => self.registry.remove(id),
        };
        self.apply(changes).await
    }

    /// Has Asterisk asked at once whether a call may still be relayed. [`Controller::feed`] takes in
    /// the answer. `false`: there is no feed, or it is too busy to take the question.
    pub fn ask(&self, call: CallId) -> bool {
        let feed = self.feed.as_ref();
        // Never waits: the feed may itself be waiting for this controller to take its events.
        feed.is_some_and(|feed| feed.try_send(FeedCommand::Ask { call }).is_ok())
    }

    /// Takes in what Asterisk says.
    ///
    /// # Errors
    /// [`ControllerError`].
    pub async fn feed(&mut self, event: FeedEvent) -> Result<(), ControllerError> {
        match event {
            FeedEvent::Up { asterisk } => {
                tracing::info!(%asterisk, "AMI is up");
                if let Some(ami) = &mut self.ami {
                    ami.state = AmiState::Up;
                    ami.asterisk = Some(asterisk);
                    ami.cause = None;
                }
            }
            FeedEvent::Down { cause } => {
                tracing::warn!(%cause, "AMI is down: every call is Asterisk's");
                if let Some(ami) = &mut self.ami {
                    ami.state = AmiState::Down;
                    ami.cause = Some(cause);
                }
                for call in self.registry.calls() {
                    let changes = self.registry.gone(&call);
                    self.apply(changes).await?;
                }
            }
            // No call outlives `Down`.
            FeedEvent::Synced => {}
            FeedEvent::Offer {
                call,
                pair,
                channels,
                rtp_timeout: _,
            } => self.offer(call, pair, channels).await?,
            FeedEvent::Refused {
                call,
                channels,
                name,
                cause,
            } => {
                tracing::debug!(%call, %cause, "left with Asterisk");
                self.count_refusal(name.to_owned());
                let changes =
                    self.registry
                        .set_aside(&call, Some(channels), PairState::Refused, cause);
                self.apply(changes).await?;
            }
            FeedEvent::TakeBack { call, cause } => {
                tracing::debug!(%call, %cause, "taken back");
                let changes = self
                    .registry
                    .set_aside(&call, None, PairState::Waiting, cause);
                self.apply(changes).await?;
            }
            FeedEvent::Gone { call } => {
                let changes = self.registry.gone(&call);
                self.apply(changes).await?;
            }
        }
        Ok(())
    }

    async fn offer(
        &mut self,
        call: CallId,
        pair: Pair,
        channels: [String; 2],
    ) -> Result<(), ControllerError> {
        if self.registry.held(&call) == Some(&pair) {
            return Ok(());
        }
        for earlier in self.registry.calls_in_the_way(&pair) {
            let why = if earlier == call {
                "its addresses changed".to_owned()
            } else {
                tracing::info!(call = %earlier, by = %call, "its address went to another call");
                format!("its address belongs to call {call} now")
            };
            let changes = self
                .registry
                .set_aside(&earlier, None, PairState::Waiting, why);
            self.apply(changes).await?;
        }
        // Nothing of the earlier offer may stay, even where no address is shared.
        let why = "its addresses changed".to_owned();
        let changes = self
            .registry
            .set_aside(&call, None, PairState::Waiting, why);
        self.apply(changes).await?;

        let channels = channels.to_vec();
        let origin = Origin::Ami {
            call: call.clone(),
            channels: channels.clone(),
        };
        match self.add(origin, pair).await? {
            Ok(id) => tracing::debug!(%call, id, "offered by Asterisk"),
            Err(refusal) => {
                let cause = refusal.to_string();
                tracing::warn!(%call, %cause, "left with Asterisk");
                let changes =
                    self.registry
                        .set_aside(&call, Some(channels), PairState::Refused, cause);
                self.apply(changes).await?;
            }
        }
        Ok(())
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
    ) -> Result<Result<u64, Refusal>, ControllerError> {
        if let Err(refusal) = self.registry.check(&pair) {
            return Ok(Err(self.refused(refusal)));
        }
        let [first, second] = Registry::paths_of(&pair);
        let watched = [
            self.next_hops.watch(first).await?.into(),
            self.next_hops.watch(second).await?.into(),
        ];
        match self.registry.add(origin, pair, watched) {
            Ok((id, changes)) => {
                self.apply(changes).await?;
                Ok(Ok(id))
            }
            Err(refusal) => {
                self.apply(vec![Change::Unwatch(first), Change::Unwatch(second)])
                    .await?;
                Ok(Err(self.refused(refusal)))
            }
        }
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
                Change::Install { key, stream } => {
                    self.datapath.reset(stream.slot);
                    let installed = self.datapath.install(&key, &stream);
                    if installed.is_ok() {
                        self.datapath.set_mode(stream.slot, mode::OFFLOADED);
                    }
                    installed
                }
                Change::Update { key, stream } => {
                    let updated = self.datapath.install(&key, &stream);
                    if updated.is_err() {
                        self.datapath.set_mode(stream.slot, mode::SUSPENDED);
                    }
                    updated
                }
                Change::Remove { key, slot } => self.datapath.remove(&key, slot),
                Change::Unwatch(path) => {
                    self.next_hops.unwatch(path).await?;
                    Ok(())
                }
            };
            // The map is as large as the registry lets it become: this does not happen, and if it
            // does, the stream's packets are Asterisk's.
            if let Err(error) = done {
                tracing::error!(%error, "the datapath refused a change");
            }
        }
        Ok(())
    }

    fn state(&self) -> impl Fn(u32) -> State + '_ {
        |slot| self.datapath.state(slot)
    }

    fn pair_report(&self, id: u64) -> Option<PairReport> {
        self.registry.report(id, self.state())
    }

    fn reports(&self) -> Vec<PairReport> {
        self.registry
            .ids()
            .filter_map(|id| self.pair_report(id))
            .collect()
    }

    fn status(&self) -> Result<StatusReport, ApiError> {
        let counters = self
            .datapath
            .counters()
            .map_err(|error: DatapathError| ApiError::new(ErrorCode::Internal, error))?;
        let census = self.registry.census(self.state());
        Ok(StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            abi: ABI_VERSION,
            pid: process::id(),
            interface: self.settings.interface.clone(),
            ifindex: self.interface_index,
            mode: self.datapath.mode(),
            mode_reason: self.mode_reason.clone(),
            dscp: self.settings.dscp,
            pins: self.datapath.pins().to_owned(),
            uptime_seconds: self.started.elapsed().as_secs(),
            max_streams: self.settings.max_streams,
            pairs: census.pairs,
            streams: census.streams,
            offloaded: census.offloaded,
            waiting: census.waiting,
            refused: census.refused,
            ami: self.ami.clone(),
            reasons: counters
                .into_iter()
                .map(|(reason, counter)| ReasonReport {
                    reason: reason.name().to_owned(),
                    verdict: match reason.verdict() {
                        reason::Verdict::Send => Verdict::Relayed,
                        reason::Verdict::Pass => Verdict::Passed,
                    },
                    packets: counter.packets,
                    bytes: counter.bytes,
                })
                .collect(),
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

/// Answers a client, who may have gone.
fn send<T>(reply: Reply<T>, answer: Result<T, ApiError>) {
    if reply.send(answer).is_err() {
        tracing::debug!("a client left before its answer");
    }
}
