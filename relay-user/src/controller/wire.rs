//! What the wire tells: the datapath's events, the states in its map, and the questions that follow.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    ops::Bound,
    time::{Duration, Instant},
};

use relay_common::stream::{Address, Event, State, StreamSpec, event, mode, ticks};

use super::{Controller, ControllerError, TICK, kind_of};
use crate::{
    ami::FeedCommand,
    clock,
    control::model::PairState,
    events::TransitionKind,
    pair::Pair,
    reception::Sample,
    registry::{Origin, Turn},
};

/// How often the states of all streams are looked at, for what no event told.
const LOOK: Duration = Duration::from_secs(1);

/// In so many parts, one with each tick: of hundreds of thousands, all at once would keep everything else waiting.
const PARTS: usize = (LOOK.as_millis() / TICK.as_millis()) as usize;

/// Longest time that a part takes, so that most of it is left for everything else. With more pairs than can be looked at
/// in it, each is looked at less often.
const LONGEST_PART: Duration = Duration::from_millis(50);

/// The first wait before a pair is asked about again; doubled each time.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// After how long a question about a suspended pair has led to nothing.
const UNANSWERED: Duration = Duration::from_secs(5);

/// The longest such wait.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// A pair that stayed offloaded for so long has a clean record again.
const FORGIVEN: Duration = Duration::from_secs(60);

/// What goes on with each pair.
#[derive(Default)]
pub(super) struct Watch {
    pairs: BTreeMap<u64, Vigil>,
    /// The pair that was looked at last.
    looked: Option<u64>,
    /// When the first of all was.
    round: Option<Instant>,
}

/// What goes on with a pair.
struct Vigil {
    /// From when on its phones would have been noticed: before, the datapath may not have looked.
    since: Instant,
    /// When to ask whether it may be proven again, or whether its addresses changed.
    ask_at: Option<Instant>,
    asked: Option<Instant>,
    /// Suspensions, each within [`FORGIVEN`] of the one before.
    relapses: u32,
    suspended: Option<Instant>,
    /// Questions because of an unexpected source, which changed nothing.
    strangers: u32,
    /// When a stranger was last told of.
    stranger_told: Option<Instant>,
    /// Streams whose silence was told of, by leg.
    silent: [bool; 2],
    /// Entries of the maps that look for a stream at any local address, by leg.
    scouts: [Option<StreamSpec>; 2],
    /// The last look at a stream whose clock rate is not known, by leg.
    samples: [Option<Sample>; 2],
}

impl Watch {
    /// A pair is in the datapath's care from now on.
    pub(super) fn begin(&mut self, id: u64, now: Instant) {
        self.pairs.insert(
            id,
            Vigil {
                since: now,
                ask_at: None,
                asked: None,
                relapses: 0,
                suspended: None,
                strangers: 0,
                stranger_told: None,
                silent: [false; 2],
                scouts: [None; 2],
                samples: [None; 2],
            },
        );
    }

    /// One pair after the other, and the first again once [`LOOK`] is over.
    fn next_to_look_at(&mut self, now: Instant) -> Option<u64> {
        let later = |looked| (Bound::Excluded(looked), Bound::Unbounded);
        let next = self.looked.and_then(|looked| {
            let (id, _) = self.pairs.range(later(looked)).next()?;
            Some(*id)
        });
        if next.is_some() {
            self.looked = next;
            return next;
        }
        if self.round.is_some_and(|began| now < began + LOOK) {
            return None;
        }
        let (first, _) = self.pairs.first_key_value()?;
        (self.looked, self.round) = (Some(*first), Some(now));
        self.looked
    }

    /// A pair is no longer in its care. Returns what is left of it in the maps.
    pub(super) fn end(&mut self, id: u64) -> Vec<StreamSpec> {
        let vigil = self.pairs.remove(&id);
        vigil
            .into_iter()
            .flat_map(|vigil| vigil.scouts)
            .flatten()
            .collect()
    }
}

/// How long to wait before a question that was asked `times` times in vain.
fn wait(times: u32) -> Duration {
    match times {
        0 => Duration::ZERO,
        n => FIRST_WAIT
            .saturating_mul(2_u32.saturating_pow(n - 1))
            .min(LONGEST_WAIT),
    }
}

impl Vigil {
    fn ask(&mut self, at: Instant) {
        self.ask_at = Some(self.ask_at.map_or(at, |earlier| earlier.min(at)));
    }

    /// A stream of the pair was suspended: when to ask. At once the first time; a PBX that keeps
    /// talking back is asked ever more rarely.
    fn relapse(&mut self, now: Instant) {
        if self.suspended.is_none_or(|last| now >= last + FORGIVEN) {
            self.relapses = 0;
        }
        let wait = wait(self.relapses);
        self.relapses += 1;
        self.suspended = Some(now);
        self.ask(now + wait);
    }

    /// A phone of the pair, or somebody else, sends from elsewhere: when to ask. Asterisk may take a
    /// moment to follow it, and may have no reason to.
    fn stranger(&mut self, now: Instant) {
        if self.ask_at.is_none() {
            let earliest = self.asked.map_or(now, |asked| asked + wait(self.strangers));
            self.strangers = self.strangers.saturating_add(1);
            self.ask(earliest.max(now));
        }
    }
}

impl Controller {
    /// Takes in what the datapath tells.
    ///
    /// # Errors
    /// [`ControllerError`].
    pub async fn wire(&mut self, event: &Event) -> Result<(), ControllerError> {
        let now = Instant::now();
        let Some((id, leg)) = self.registry.owner(event.slot) else {
            return Ok(());
        };
        // Of a round that is over, or of a stream that had the slot before.
        if self.datapath.state(event.slot).epoch != event.epoch {
            return Ok(());
        }
        let address = SocketAddr::new(IpAddr::from(event.address), event.port);
        match event.kind {
            event::PROVEN => {
                let types = event.payload_type;
                let cause = if types.from == types.to {
                    format!(
                        "payload type {} came out of the PBX as it went in",
                        types.from
                    )
                } else {
                    format!(
                        "payload type {} came out of the PBX as it went in, renumbered {}",
                        types.from, types.to
                    )
                };
                self.tell(id, Some(leg), TransitionKind::Proven, &cause);
                self.notice(id);
            }
            event::TALK_BACK => {
                let cause = format!(
                    "talk-back: the PBX itself sent RTP to {address}, payload type {}",
                    event.payload_type.to
                );
                self.suspended(id, &cause, now).await?;
            }
            event::ECHO_MISSING => {
                let cause = "packets passed up did not come out of the PBX";
                self.suspended(id, cause, now).await?;
            }
            event::UNEXPECTED_SOURCE => {
                let mut is_news = false;
                if let Some(vigil) = self.wire.pairs.get_mut(&id) {
                    vigil.stranger(now);
                    is_news = vigil.stranger_told.is_none_or(|told| now >= told + LOOK);
                    if is_news {
                        vigil.stranger_told = Some(now);
                    }
                }
                if is_news {
                    let cause = format!("a packet came from {address}");
                    self.tell(id, Some(leg), TransitionKind::UnexpectedSource, &cause);
                }
                self.ask_what_is_due(id, now).await?;
            }
            event::RECEIVED_AT => {
                self.correct(id, |pair| pair.legs[leg].local.set_ip(address.ip()))
                    .await?;
            }
            event::SENT_FROM => {
                self.correct(id, |pair| {
                    pair.legs[1 - leg].sends_from.set_ip(address.ip())
                })
                .await?;
            }
            kind => tracing::debug!(kind, "the datapath told of something unknown"),
        }
        Ok(())
    }

    /// The datapath has suspended a stream of the pair.
    async fn suspended(
        &mut self,
        id: u64,
        cause: &str,
        now: Instant,
    ) -> Result<(), ControllerError> {
        tracing::info!(pair = id, cause, "suspended");
        self.registry.explain(id, cause);
        self.notice(id);
        if let Some(vigil) = self.wire.pairs.get_mut(&id) {
            vigil.relapse(now);
        }
        self.ask_what_is_due(id, now).await
    }

    /// Publishes how the streams of a pair have changed since they were last looked at.
    pub(super) fn notice(&mut self, id: u64) {
        let datapath = &self.datapath;
        for turn in self.registry.turns(id, |slot| datapath.state(slot)) {
            self.tell_turn(&turn);
        }
    }

    fn tell_turn(&mut self, turn: &Turn) {
        let (id, leg) = (turn.pair, turn.leg);
        self.proofs.turn(id, leg, turn.now, Instant::now());
        let why = self.registry.why_stopped(id, leg, self.state());
        let cause = why.unwrap_or_else(|| {
            let proven = self
                .registry
                .installed(id, leg)
                .is_some_and(|spec| spec.proof != 0);
            let cause = if proven {
                "proven on the wire"
            } else {
                "no proof is asked for"
            };
            cause.to_owned()
        });
        if let Some(kind) = kind_of(turn.now) {
            self.tell(id, Some(leg), kind, &cause);
        }
    }

    /// Looks at every stream once a second, part by part, and at what is due more often.
    pub(super) async fn look(&mut self, now: Instant) -> Result<(), ControllerError> {
        let due: Vec<_> = self
            .wire
            .pairs
            .iter()
            .filter(|(_, vigil)| vigil.ask_at.is_some_and(|at| now >= at))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            self.ask_what_is_due(id, now).await?;
        }
        let begin = Instant::now();
        for _ in 0..self.wire.pairs.len().div_ceil(PARTS) {
            let Some(id) = self.wire.next_to_look_at(now) else {
                break;
            };
            self.look_at(id, now).await?;
            if begin.elapsed() > LONGEST_PART {
                break;
            }
        }
        Ok(())
    }

    async fn look_at(&mut self, id: u64, now: Instant) -> Result<(), ControllerError> {
        let read = [0, 1].map(|leg| {
            let spec = self.registry.installed(id, leg)?;
            Some((spec, self.datapath.state(spec.slot)))
        });
        // Of events that are lost, or still to come.
        let state = |slot| {
            let read = read.iter().flatten().find(|(spec, _)| spec.slot == slot);
            read.map_or_else(State::default, |(_, state)| *state)
        };
        for turn in self.registry.turns(id, state) {
            self.tell_turn(&turn);
        }
        let Some(vigil) = self.wire.pairs.get(&id) else {
            return Ok(());
        };
        let age = now.saturating_duration_since(vigil.since);
        let now_ticks = ticks(clock::monotonic_now());
        let mut silence = [age; 2];
        let mut offloaded = [false; 2];
        let mut suspended = [false; 2];
        self.scout(id, &read, age);
        for (leg, read) in read.into_iter().enumerate() {
            let Some((spec, state)) = read else {
                continue;
            };
            self.learn_clock(id, leg, spec.slot, &state);
            offloaded[leg] = state.mode() == mode::OFFLOADED;
            if state.mode() == mode::SUSPENDED {
                // The datapath does not look at its packets.
                silence[leg] = Duration::ZERO;
                suspended[leg] = true;
            } else if state.last_seen != 0 {
                // The datapath's clock may be a tick ahead.
                let ticks = now_ticks.wrapping_sub(state.last_seen) as i32;
                silence[leg] = Duration::from_nanos((ticks.max(0) as u64) << 20).min(age);
            }
        }
        // The event that would have led to a question is lost, or its answer came at a wrong moment.
        if suspended.contains(&true)
            && let Some(vigil) = self.wire.pairs.get_mut(&id)
            && vigil.ask_at.is_none()
            && vigil.asked.is_none_or(|asked| now >= asked + UNANSWERED)
        {
            vigil.relapse(now);
        }
        for leg in (0..2).filter(|leg| !suspended[*leg]) {
            self.tell_of_silence(id, leg, silence[leg], offloaded[leg]);
        }
        self.expire(id, silence, offloaded).await
    }

    /// Looks for the streams of a pair at any local address of the host, where one is not seen at those
    /// that Asterisk names: bound to the wildcard address, it may not know better. What comes in on one
    /// leg may be lost on the other, where Asterisk sends it on.
    fn scout(&mut self, id: u64, read: &[Option<(StreamSpec, State)>; 2], age: Duration) {
        let Some(vigil) = self.wire.pairs.get_mut(&id) else {
            return;
        };
        let is_lost = self.registry.is_ami(id)
            && age >= LOOK
            && read
                .iter()
                .flatten()
                .any(|(spec, state)| spec.proof != 0 && is_lost(state));
        if !is_lost {
            let scouts: Vec<_> = vigil.scouts.iter_mut().filter_map(Option::take).collect();
            self.withdraw(&scouts);
            return;
        }
        for (scout, (spec, _)) in vigil.scouts.iter_mut().zip(read.iter().flatten()) {
            if scout.is_none() {
                let mut anywhere = *spec;
                anywhere.local.address = Address::default();
                anywhere.sends_from = anywhere.local;
                match self.datapath.install(&anywhere) {
                    Ok(()) => *scout = Some(anywhere),
                    Err(error) => tracing::debug!(pair = id, %error, "no scout"),
                }
            }
        }
    }

    /// Finds out the clock rate of a payload type that signalling gave its meaning, for the datapath
    /// to measure jitter by.
    fn learn_clock(&mut self, id: u64, leg: usize, slot: u32, state: &State) {
        let Some(vigil) = self.wire.pairs.get_mut(&id) else {
            return;
        };
        let sample = Sample::of(&state.reception);
        let earlier = std::mem::replace(&mut vigil.samples[leg], sample);
        if let Some((payload_type, clock)) = sample
            .zip(earlier)
            .and_then(|(sample, earlier)| sample.clock_since(&earlier))
        {
            self.datapath.set_clock(slot, payload_type, clock);
        }
    }

    /// Takes entries of the maps away whose state belongs to another.
    pub(super) fn withdraw(&mut self, specs: &[StreamSpec]) {
        for spec in specs {
            if let Err(error) = self.datapath.withdraw(spec) {
                tracing::error!(%error, "the datapath refused a change");
            }
        }
    }

    /// The wire shows another local address of a leg than Asterisk does.
    async fn correct(
        &mut self,
        id: u64,
        correction: impl FnOnce(&mut Pair),
    ) -> Result<(), ControllerError> {
        let (Some(call), Some((pair, claim))) =
            (self.registry.call(id).cloned(), self.registry.held(id))
        else {
            return Ok(());
        };
        let (mut corrected, claim) = (pair.clone(), claim.clone());
        correction(&mut corrected);
        if corrected == *pair {
            return Ok(());
        }
        let why = "its local address is another than Asterisk says".to_owned();
        tracing::info!(pair = id, legs = ?corrected.legs, why);
        let channels = self.registry.channels(id);
        self.set_aside(&call, None, PairState::Waiting, why).await?;
        let origin = Origin::Ami {
            call: call.clone(),
            channels,
        };
        match self.add(origin, corrected, claim.rtp_timeout).await? {
            Ok(id) => self.registry.claim(id, claim),
            Err(refusal) => {
                let why = refusal.to_string();
                self.set_aside(&call, None, PairState::Refused, why).await?;
            }
        }
        Ok(())
    }

    fn tell_of_silence(&mut self, id: u64, leg: usize, silence: Duration, offloaded: bool) {
        let Some(vigil) = self.wire.pairs.get_mut(&id) else {
            return;
        };
        let was_silent = vigil.silent[leg];
        let is_silent = (offloaded || was_silent) && silence >= self.settings.silence;
        vigil.silent[leg] = is_silent;
        if is_silent == was_silent {
            return;
        }
        if is_silent {
            let cause = format!("no packet for {} s", silence.as_secs());
            tracing::warn!(pair = id, leg, cause, "an offloaded phone is silent");
            self.tell(id, Some(leg), TransitionKind::Silent, &cause);
        } else {
            self.tell(id, Some(leg), TransitionKind::Resumed, "packets come again");
        }
    }

    /// What no phone has used for long is not trusted any longer: a stream must be proven again,
    /// where proof is asked for, and a pair that a client added is forgotten.
    async fn expire(
        &mut self,
        id: u64,
        silence: [Duration; 2],
        offloaded: [bool; 2],
    ) -> Result<(), ControllerError> {
        let limit = self.settings.expire;
        let why = || format!("no packet for {} s", limit.as_secs());
        if !self.registry.is_ami(id) && silence.iter().all(|silence| *silence >= limit) {
            tracing::info!(pair = id, "expired");
            return self.forget(id, TransitionKind::Expired, &why()).await;
        }
        for leg in 0..2 {
            let spec = self.registry.installed(id, leg);
            let provable = spec.is_some_and(|spec| spec.proof != 0);
            if silence[leg] < limit || !offloaded[leg] || !provable {
                continue;
            }
            if let Some(change) = self.registry.doubt(id, leg) {
                self.tell(id, Some(leg), TransitionKind::Expired, &why());
                self.apply(vec![change]).await?;
                self.notice(id);
                if let Some(vigil) = self.wire.pairs.get_mut(&id) {
                    vigil.ask(Instant::now());
                }
            }
        }
        Ok(())
    }

    /// Asks about a pair as soon as possible.
    pub(super) async fn ask_now(&mut self, id: u64, now: Instant) -> Result<(), ControllerError> {
        if let Some(vigil) = self.wire.pairs.get_mut(&id) {
            vigil.ask(now);
        }
        self.ask_what_is_due(id, now).await
    }

    /// Asks Asterisk about a call; a pair without a PBX to ask is proven again at once.
    async fn ask_what_is_due(&mut self, id: u64, now: Instant) -> Result<(), ControllerError> {
        let Some(vigil) = self.wire.pairs.get_mut(&id) else {
            return Ok(());
        };
        if vigil.ask_at.is_none_or(|at| now < at) {
            return Ok(());
        }
        if !self.registry.is_ami(id) {
            vigil.ask_at = None;
            vigil.asked = Some(now);
            return self.restart(id).await;
        }
        let (Some(call), Some(questions)) = (self.registry.call(id), &self.questions) else {
            return Ok(());
        };
        // A feed with so many questions open is asked again at the next tick.
        if questions
            .try_send(FeedCommand::Ask { call: call.clone() })
            .is_ok()
        {
            vigil.ask_at = None;
            vigil.asked = Some(now);
        }
        Ok(())
    }

    /// Lets the proof of a pair's suspended streams start again.
    pub(super) async fn restart(&mut self, id: u64) -> Result<(), ControllerError> {
        let datapath = &self.datapath;
        let changes = self.registry.restart(id, |slot| datapath.state(slot));
        if let Some(vigil) = self.wire.pairs.get_mut(&id)
            && !changes.is_empty()
        {
            vigil.since = Instant::now();
        }
        self.apply(changes).await?;
        self.notice(id);
        Ok(())
    }
}

/// Whether a stream is not seen where it should come in, or its echoes where they should leave.
const fn is_lost(state: &State) -> bool {
    let is_heard = state.last_seen != 0;
    let is_answered = state.echoed != 0 || state.unequal != 0;
    !is_heard || state.noted != 0 && !is_answered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_looked_at_in_turn_and_none_too_soon() {
        let (start, mut watch) = (Instant::now(), Watch::default());
        assert_eq!(watch.next_to_look_at(start), None);
        for id in [2, 5, 9] {
            watch.begin(id, start);
        }
        // As many as there are answers.
        fn look<const N: usize>(watch: &mut Watch, now: Instant) -> [Option<u64>; N] {
            [(); N].map(|()| watch.next_to_look_at(now))
        }
        let round = start + LOOK;
        assert_eq!(look(&mut watch, round), [Some(2), Some(5)]);
        watch.end(5);
        watch.begin(7, start);
        assert_eq!(look(&mut watch, round + TICK), [Some(7), Some(9), None]);
        watch.begin(10, start);
        assert_eq!(look(&mut watch, round + 2 * TICK), [Some(10), None]);
        assert_eq!(look(&mut watch, round + LOOK), [Some(2), Some(7)]);
    }
}
