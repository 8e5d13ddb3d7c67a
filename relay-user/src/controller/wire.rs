//! What the wire tells: the datapath's events, the states in its map, and the questions that follow.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    ops::Bound,
    time::{Duration, Instant},
};

use relay_common::stream::{Address, Event, State, StreamSpec, event, mode, ticks};

use super::{Controller, ControllerError, TICK, kind_of};
use crate::{
    ami::FeedCommand,
    clock,
    control::model::{PairState, StreamState},
    datapath::Pulse,
    events::TransitionKind,
    pair::Pair,
    reception::Sample,
    registry::{Origin, Standing, Turn},
};

/// How often the states of all streams are looked at, for what no event told.
const LOOK: Duration = Duration::from_secs(1);

/// In so many parts, one with each tick: of hundreds of thousands, all at once would keep everything else waiting.
const PARTS: usize = (LOOK.as_millis() / TICK.as_millis()) as usize;

/// Longest time that a part takes, so that most of it is left for everything else. With more pairs than can be looked at
/// in it, each is looked at less often.
const LONGEST_PART: Duration = Duration::from_millis(50);

/// Pairs between two looks at the clock.
const STRIDE: usize = 64;

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
    /// Those that have something to ask, now or later, and some that had.
    asking: BTreeSet<u64>,
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
    scouts: [Option<Box<StreamSpec>>; 2],
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
                scouts: [None, None],
                samples: [None; 2],
            },
        );
    }

    /// The next so many pairs, one after the other, and the first again once [`LOOK`] is over; fewer, or none,
    /// before that.
    fn next_to_look_at(&mut self, now: Instant, count: usize) -> Vec<u64> {
        let ids = |from| {
            let pairs = self.pairs.range((from, Bound::Unbounded));
            pairs.map(|(id, _)| *id).take(count).collect::<Vec<_>>()
        };
        let mut next = self.looked.map(Bound::Excluded).map_or(Vec::new(), ids);
        if next.is_empty() && self.round.is_none_or(|began| now >= began + LOOK) {
            next = ids(Bound::Unbounded);
            self.round = next.first().map(|_| now).or(self.round);
        }
        self.looked = next.last().copied().or(self.looked);
        next
    }

    /// Changes when a pair asks.
    fn ask(&mut self, id: u64, change: impl FnOnce(&mut Vigil)) {
        if let Some(vigil) = self.pairs.get_mut(&id) {
            change(vigil);
            if vigil.ask_at.is_some() {
                self.asking.insert(id);
            }
        }
    }

    /// Pairs whose time to ask has come.
    fn due(&mut self, now: Instant) -> Vec<u64> {
        let pairs = &self.pairs;
        let ask_at = |id: &u64| pairs.get(id).and_then(|vigil| vigil.ask_at);
        self.asking.retain(|id| ask_at(id).is_some());
        let due = |id: &&u64| ask_at(id).is_some_and(|at| now >= at);
        self.asking.iter().filter(due).copied().collect()
    }

    /// A pair is no longer in its care. Returns what is left of it in the maps.
    pub(super) fn end(&mut self, id: u64) -> Vec<StreamSpec> {
        let vigil = self.pairs.remove(&id);
        vigil
            .into_iter()
            .flat_map(|vigil| vigil.scouts)
            .flatten()
            .map(|scout| *scout)
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

/// For how long nothing has come from a phone, of a pair that is watched for a time of `age`.
fn silence_of(last_seen: u32, ticks: u32, age: Duration) -> Duration {
    if last_seen == 0 {
        return age;
    }
    // The datapath's clock may be a tick ahead.
    let ticks = ticks.wrapping_sub(last_seen) as i32;
    Duration::from_nanos((ticks.max(0) as u64) << 20).min(age)
}

impl Vigil {
    /// Whether a look would lead to nothing: the streams are what they were, and heard as they were. `limits` are
    /// those of silence and of expiry.
    fn goes_on(
        &self,
        standing: &Standing,
        pulses: &[Pulse; 2],
        now: Instant,
        ticks: u32,
        limits: [Duration; 2],
    ) -> bool {
        let age = now.saturating_duration_since(self.since);
        let [silence, expire] = limits;
        let is_lost =
            age >= LOOK && (0..2).any(|leg| standing.provable[leg] && is_lost(&pulses[leg]));
        (0..2).all(|leg| {
            let (pulse, provable) = (&pulses[leg], standing.provable[leg]);
            let silence_limit = match standing.states[leg] {
                StreamState::Offloaded => silence.min(expire),
                // A call is Asterisk's to end, however silent.
                StreamState::Watching if provable => Duration::MAX,
                StreamState::Watching => expire,
                StreamState::Waiting | StreamState::Suspended => return false,
            };
            StreamState::of_mode(pulse.mode) == standing.states[leg]
                && silence_of(pulse.last_seen, ticks, age) < silence_limit
                && is_lost == self.scouts[leg].is_some()
                && !self.silent[leg]
                && self.samples[leg].is_none()
                && Sample::of(&pulse.reception).is_none()
        })
    }

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
                self.wire.ask(id, |vigil| {
                    vigil.stranger(now);
                    is_news = vigil.stranger_told.is_none_or(|told| now >= told + LOOK);
                    if is_news {
                        vigil.stranger_told = Some(now);
                    }
                });
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
        self.wire.ask(id, |vigil| vigil.relapse(now));
        self.ask_what_is_due(id, now).await
    }

    /// Publishes how the streams of a pair have changed since they were last looked at.
    pub(super) fn notice(&mut self, id: u64) {
        let datapath = &self.datapath;
        for turn in self.registry.turns(id, |slot| datapath.pulse(slot).mode) {
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
            self.tell(id, Some(leg), kind, cause);
        }
    }

    /// Looks at every stream once a second, part by part, and at what is due more often.
    pub(super) async fn look(&mut self, now: Instant) -> Result<(), ControllerError> {
        for id in self.wire.due(now) {
            self.ask_what_is_due(id, now).await?;
        }
        let begin = Instant::now();
        let mut left = self.wire.pairs.len().div_ceil(PARTS);
        while left > 0 && begin.elapsed() <= LONGEST_PART {
            let ids = self.wire.next_to_look_at(now, left.min(STRIDE));
            if ids.is_empty() {
                break;
            }
            left -= ids.len();
            let ticks = ticks(clock::monotonic_now());
            for id in ids {
                if !self.goes_on(id, now, ticks) {
                    self.look_at(id, now, ticks).await?;
                }
            }
        }
        Ok(())
    }

    /// Whether a look at a pair would lead to nothing, as with most pairs most of the time. It takes a few
    /// words of memory to tell.
    fn goes_on(&self, id: u64, now: Instant, ticks: u32) -> bool {
        let (Some(vigil), Some(standing)) = (self.wire.pairs.get(&id), self.registry.standing(id))
        else {
            return false;
        };
        let pulses = standing.slots.map(|slot| self.datapath.pulse(slot));
        let (silence, expire) = (self.settings.silence, self.settings.expire);
        vigil.goes_on(&standing, &pulses, now, ticks, [silence, expire])
    }

    async fn look_at(&mut self, id: u64, now: Instant, ticks: u32) -> Result<(), ControllerError> {
        let read = [0, 1].map(|leg| {
            let spec = self.registry.installed(id, leg)?;
            Some((spec, self.datapath.state(spec.slot)))
        });
        // Of events that are lost, or still to come.
        let state = |slot| {
            let read = read.iter().flatten().find(|(spec, _)| spec.slot == slot);
            read.map_or_else(State::default, |(_, state)| *state)
        };
        for turn in self.registry.turns(id, |slot| state(slot).mode()) {
            self.tell_turn(&turn);
        }
        let Some(vigil) = self.wire.pairs.get(&id) else {
            return Ok(());
        };
        let age = now.saturating_duration_since(vigil.since);
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
            } else {
                silence[leg] = silence_of(state.last_seen, ticks, age);
            }
        }
        // The event that would have led to a question is lost, or its answer came at a wrong moment.
        if suspended.contains(&true) {
            self.wire.ask(id, |vigil| {
                if vigil.ask_at.is_none()
                    && vigil.asked.is_none_or(|asked| now >= asked + UNANSWERED)
                {
                    vigil.relapse(now);
                }
            });
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
                .any(|(spec, state)| spec.proof != 0 && is_lost(&Pulse::of(state)));
        if !is_lost {
            let scouts = vigil.scouts.iter_mut().filter_map(Option::take);
            let scouts: Vec<_> = scouts.map(|scout| *scout).collect();
            self.withdraw(&scouts);
            return;
        }
        for (scout, (spec, _)) in vigil.scouts.iter_mut().zip(read.iter().flatten()) {
            if scout.is_none() {
                let mut anywhere = *spec;
                anywhere.local.address = Address::default();
                anywhere.sends_from = anywhere.local;
                match self.datapath.install(&anywhere) {
                    Ok(()) => *scout = Some(Box::new(anywhere)),
                    Err(error) => tracing::debug!(pair = id, %error, "no scout"),
                }
            }
        }
    }

    /// Gives the room that scouts take in the map to streams that need it; `false` where there are none.
    pub(super) fn dismiss_scouts(&mut self) -> bool {
        let vigils = self.wire.pairs.values_mut();
        let scouts = vigils.flat_map(|vigil| vigil.scouts.iter_mut().filter_map(Option::take));
        let scouts: Vec<_> = scouts.map(|scout| *scout).collect();
        self.withdraw(&scouts);
        !scouts.is_empty()
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
                self.tell(id, Some(leg), TransitionKind::Expired, why());
                self.apply(vec![change]).await?;
                self.notice(id);
                self.wire.ask(id, |vigil| vigil.ask(Instant::now()));
            }
        }
        Ok(())
    }

    /// Asks about a pair as soon as possible.
    pub(super) async fn ask_now(&mut self, id: u64, now: Instant) -> Result<(), ControllerError> {
        self.wire.ask(id, |vigil| vigil.ask(now));
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
const fn is_lost(pulse: &Pulse) -> bool {
    pulse.last_seen == 0 || !pulse.is_answered
}

#[cfg(test)]
mod tests {
    use relay_common::{
        reception::Reception,
        stream::{Stream, StreamKey},
    };
    use zerocopy::FromZeros as _;

    use super::*;

    #[test]
    fn pairs_are_looked_at_in_turn_and_none_too_soon() {
        let (start, mut watch) = (Instant::now(), Watch::default());
        assert!(watch.next_to_look_at(start, 1).is_empty());
        for id in [2, 5, 9] {
            watch.begin(id, start);
        }
        let round = start + LOOK;
        assert_eq!(watch.next_to_look_at(round, 2), [2, 5]);
        watch.end(5);
        watch.begin(7, start);
        assert_eq!(watch.next_to_look_at(round + TICK, 3), [7, 9]);
        assert!(watch.next_to_look_at(round + TICK, 1).is_empty());
        watch.begin(10, start);
        assert_eq!(watch.next_to_look_at(round + 2 * TICK, 2), [10]);
        assert!(watch.next_to_look_at(round + 2 * TICK, 1).is_empty());
        assert_eq!(watch.next_to_look_at(round + LOOK, 2), [2, 7]);
    }

    #[test]
    fn pairs_ask_when_their_time_has_come() {
        let (start, mut watch) = (Instant::now(), Watch::default());
        for id in [1, 2, 3] {
            watch.begin(id, start);
        }
        watch.ask(2, |vigil| vigil.ask(start + TICK));
        watch.ask(3, |vigil| vigil.ask(start));
        watch.ask(4, |vigil| vigil.ask(start));
        assert_eq!(watch.due(start), [3]);
        watch.ask(3, |vigil| vigil.ask_at = None);
        assert_eq!(watch.due(start + TICK), [2]);
        watch.end(2);
        assert!(watch.due(start + TICK).is_empty());
        assert!(watch.asking.is_empty());
    }

    /// Looks for any stream.
    fn scout() -> Box<StreamSpec> {
        let key = StreamKey::new(Address::default(), 0);
        Box::new(Stream::new_zeroed().spec(&key))
    }

    /// A pair that was seen a second ago, and whether a look at it would lead to nothing.
    fn goes_on(change: impl FnOnce(&mut Vigil, &mut Standing, &mut [Pulse; 2])) -> bool {
        let now = Instant::now();
        let mut watch = Watch::default();
        watch.begin(1, now);
        let mut vigil = watch.pairs.remove(&1).expect("begun");
        let mut standing = Standing {
            slots: [0, 1],
            states: [StreamState::Offloaded; 2],
            provable: [true; 2],
        };
        const TICKS: u32 = 1_000_000;
        let reception = Reception {
            packets: 100,
            payload_type: 0,
            ..Reception::default()
        };
        let mut pulses = [Pulse {
            mode: mode::OFFLOADED,
            last_seen: TICKS - 20,
            is_answered: true,
            reception,
        }; 2];
        change(&mut vigil, &mut standing, &mut pulses);
        let limits = [Duration::from_secs(10), Duration::from_secs(60)];
        let later = now + Duration::from_secs(100);
        vigil.goes_on(&standing, &pulses, later, TICKS, limits)
    }

    #[test]
    fn nothing_is_to_be_done_for_streams_that_go_on() {
        assert!(goes_on(|_, _, _| {}));
        // The PBX forwards one of them still.
        assert!(goes_on(|_, standing, pulses| {
            standing.states[1] = StreamState::Watching;
            pulses[1].mode = mode::WATCHING;
        }));
        // Heard never, and looked for at other addresses already.
        assert!(goes_on(|vigil, standing, pulses| {
            standing.states[0] = StreamState::Watching;
            (pulses[0].mode, pulses[0].last_seen) = (mode::WATCHING, 0);
            pulses[0].reception = Reception::default();
            vigil.scouts = [0, 1].map(|_| Some(scout()));
        }));
    }

    #[test]
    fn whatever_changes_is_looked_at() {
        // It was suspended, or is proven, or was told of as suspended.
        assert!(!goes_on(|_, _, pulses| pulses[0].mode = mode::SUSPENDED));
        assert!(!goes_on(|_, standing, _| {
            standing.states[1] = StreamState::Watching;
        }));
        assert!(!goes_on(|_, standing, pulses| {
            standing.states[1] = StreamState::Suspended;
            pulses[1].mode = mode::SUSPENDED;
        }));
        // It falls silent, or speaks again.
        assert!(!goes_on(|_, _, pulses| pulses[1].last_seen -= 20_000));
        assert!(!goes_on(|vigil, _, _| vigil.silent[1] = true));
        // Its clock is not known, or was not.
        assert!(!goes_on(|_, _, pulses| {
            pulses[0].reception.payload_type = 96;
        }));
        assert!(!goes_on(|vigil, _, pulses| {
            let mut earlier = pulses[0].reception;
            earlier.payload_type = 96;
            vigil.samples[0] = Sample::of(&earlier);
        }));
        // It is to be looked for elsewhere, or no longer.
        assert!(!goes_on(|_, _, pulses| pulses[0].is_answered = false));
        assert!(!goes_on(|vigil, _, _| vigil.scouts[0] = Some(scout())));
    }
}
