//! Calls between the harness's own phones through the Asterisk under test, and what each phone hears of the other:
//! with a relay beside Asterisk and without.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use relay_common::stream::ticks;
use relay_user::config::KEEPALIVE;
use serde_json::Value;

use crate::{
    ami::{Client, Message},
    asterisk::Lab,
    capture::{Flow, Quality},
    phone::{Arrival, Bank, PACKET_TIME},
    relay::Relay,
    softphone::{Desk, Features, Softphone},
    topology::{Direct, PBX_V4},
};

/// How long Asterisk, or the relay, may take for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Packets of a phone before and after each action.
const STEADY: u64 = 50;
/// A list of calls older than this is asked for again.
const FRESH: Duration = Duration::from_millis(100);
/// DSCP of expedited forwarding (RFC 3246): the relay's packets have it, Asterisk's in the lab have not.
const EF: u8 = 46;
const SIP_PORT: u16 = 5060;
/// After such a pause of a phone, the relay leaves a packet to Asterisk: reason `after_pause`.
const PAUSE: Duration = Duration::from_millis(250);

/// An Asterisk with the harness's own phones, and perhaps a relay.
#[derive(Debug)]
pub struct Stage {
    /// Where it all runs.
    pub lab: Lab,
    callers: Desk,
    callees: Desk,
    relay: Option<Relay>,
    list: Mutex<Option<(Instant, Arc<Vec<Value>>)>>,
    manager: Mutex<Client>,
    _bank: Arc<Bank>,
}

/// A call between two phones.
#[derive(Debug)]
pub struct Call {
    /// Who called.
    pub caller: Softphone,
    /// Who was called.
    pub callee: Softphone,
    /// Asterisk's channels of both, in this order.
    pub channels: [String; 2],
}

/// What one phone heard of those that it should hear, one after the other.
#[derive(Clone, Debug, Default)]
pub struct Hearing {
    /// Packets of the right phones that came, each counted once.
    pub heard: u64,
    /// Packets of a phone that never came, between the first and the last of it that did.
    pub lost: u64,
    /// Packets that came again.
    pub duplicates: u64,
    /// Packets that came after a later one of the same phone, or of a later phone.
    pub reordered: u64,
    /// Of these, packets of which one of the two went through the kernel: Asterisk changes the order by itself when it
    /// turns a bridge native.
    pub overtaken: u64,
    /// Packets of a phone that this one should not hear.
    pub wrong: u64,
    /// Sound that Asterisk made itself.
    pub others: u64,
    /// Sequence numbers that came again, or late, by their SSRC.
    pub sequence: [u64; 2],
    /// Packets that the relay sent.
    pub expedited: u64,
    /// Packets that Asterisk forwarded, and would not have if the kernel had the stream.
    pub undue: u64,
    /// Longest time between two arrivals of anything, less what the sender itself paused.
    pub largest_gap: Duration,
    /// How often sound that Asterisk made itself, digits too, followed a phone's voice or the other way round; of
    /// voice, only what the relay sent, once it sent anything.
    pub turns: u64,
    /// Digits of which both beginning and end were heard.
    pub digits: String,
    /// Packets of telephone events.
    pub events: u64,
    /// Packets by payload type.
    pub types: BTreeMap<u8, u64>,
    /// SSRCs in the order of their first packet.
    pub sources: Vec<u32>,
}

impl Hearing {
    /// What `listener` heard; `speakers` in the order in which it should hear them.
    pub fn of(listener: &Softphone, speakers: &[&Softphone]) -> Self {
        Self::since(Duration::ZERO, listener, speakers)
    }

    /// The same from a moment on, since the Unix epoch.
    pub fn since(start: Duration, listener: &Softphone, speakers: &[&Softphone]) -> Self {
        let mut arrivals = listener.phone().arrivals();
        let sendings: Vec<_> = speakers
            .iter()
            .map(|speaker| speaker.phone().sendings())
            .collect();
        let place = |sender| {
            let mut phones = speakers.iter().map(|speaker| speaker.phone().sender());
            phones.position(|known| known == sender)
        };
        let mut hearing = Self::default();
        let mut detours = vec![Detours::default(); speakers.len()];
        for arrival in arrivals.iter().filter(|arrival| !is_fast(arrival)) {
            if let Some(stamp) = arrival.stamp
                && let Some(at) = place(stamp.sender)
                && !detours[at].is_due(&sendings[at], stamp.number as usize, arrival.at)
                && arrival.at >= start
            {
                hearing.undue += 1;
            }
        }
        arrivals.retain(|arrival| arrival.at >= start);
        // Numbers of all speakers in one row.
        let starts: Vec<u64> = (0..speakers.len() as u64).map(|at| at << 32).collect();
        let mut numbers = vec![Vec::new(); speakers.len()];
        let mut row = Vec::new();
        // The highest number until now, and whether the kernel sent it.
        let mut highest = (0, false);
        let mut flows = BTreeMap::<u32, Flow>::new();
        let mut digits = Digits::default();
        let mut last = None::<Duration>;
        let mut voice = None;
        for arrival in &arrivals {
            let Some(rtp) = arrival.rtp else { continue };
            *hearing.types.entry(rtp.payload_type).or_default() += 1;
            hearing.expedited += u64::from(is_fast(arrival));
            if !hearing.sources.contains(&rtp.ssrc) {
                hearing.sources.push(rtp.ssrc);
            }
            let flow = flows.entry(rtp.ssrc).or_default();
            flow.push(rtp.sequence, arrival.at);
            // What Asterisk forwards beside the kernel is its own affair: in a conference, for a moment, one may
            // speak alone.
            let is_voice = arrival.stamp.is_some();
            if !is_voice || is_fast(arrival) || hearing.expedited == 0 {
                let turned = voice
                    .replace(is_voice)
                    .is_some_and(|before| before != is_voice);
                hearing.turns += u64::from(turned);
            }
            let mut pause = Duration::ZERO;
            if let Some(stamp) = arrival.stamp {
                if let Some(at) = place(stamp.sender) {
                    numbers[at].push((stamp.number, arrival.at));
                    let (number, fast) = (starts[at] + stamp.number, is_fast(arrival));
                    row.push((number, arrival.at));
                    if number > highest.0 {
                        highest = (number, fast);
                    } else if number < highest.0 {
                        hearing.overtaken += u64::from(fast || highest.1);
                    }
                    let number = stamp.number as usize;
                    if number > 0 {
                        let sent = &sendings[at];
                        let between = sent[number].saturating_sub(sent[number - 1]);
                        pause = between.saturating_sub(PACKET_TIME);
                    }
                } else {
                    hearing.wrong += 1;
                }
            } else if arrival.event.is_some() {
                hearing.events += 1;
                digits.hear(arrival);
            } else {
                hearing.others += 1;
            }
            if let Some(last) = last.replace(arrival.at) {
                let gap = arrival.at.saturating_sub(last).saturating_sub(pause);
                hearing.largest_gap = hearing.largest_gap.max(gap);
            }
        }
        let all = Quality::of(row);
        (hearing.heard, hearing.duplicates) = (all.distinct, all.duplicates);
        hearing.reordered = all.reordered;
        hearing.lost = numbers
            .into_iter()
            .map(|numbers| Quality::of(numbers).missing)
            .sum();
        for quality in flows.values().map(Flow::quality) {
            hearing.sequence[0] += quality.duplicates;
            hearing.sequence[1] += quality.reordered;
        }
        hearing.digits = digits.heard;
        hearing
    }
}

/// Whether the relay sent this packet.
pub fn is_fast(arrival: &Arrival) -> bool {
    arrival.tos >> 2 == EF
}

/// What Asterisk forwards of a stream that the kernel has: a keepalive, the first packet after a pause of its sender, and
/// those that come before one of these has come out again.
#[derive(Clone, Copy, Debug, Default)]
struct Detours {
    /// Number of the last packet that Asterisk forwarded, whatever for.
    last: Option<usize>,
    /// When the last of those that it should forward came to the listener.
    over: Duration,
}

impl Detours {
    /// Whether a packet of this number that came through Asterisk, at `came`, is one of these; its sender's packets
    /// were `sent` at these times.
    ///
    /// The relay sees a packet between these two times, whatever holds up the machine, so that it may have seen any
    /// time between two packets that is not longer than from the sending of the one to the coming of the other.
    fn is_due(&mut self, sent: &[Duration], number: usize, came: Duration) -> bool {
        let in_ticks = |time: Duration| ticks(time.as_nanos() as u64);
        // A tick of the relay's may begin behind the one packet and before the other.
        let is_later =
            |before: usize, time| in_ticks(came.saturating_sub(sent[before])) + 1 >= in_ticks(time);
        let is_after_pause = number == 0 || is_later(number - 1, PAUSE);
        let is_keepalive = self.last.is_some_and(|last| is_later(last, KEEPALIVE));
        let is_due = is_after_pause || is_keepalive || sent[number] < self.over;
        self.last = Some(number);
        if is_due {
            self.over = self.over.max(came);
        }
        is_due
    }
}

/// Puts telephone events together.
#[derive(Debug, Default)]
struct Digits {
    /// SSRC, timestamp and code of the one that is being heard, and whether its end was.
    current: Option<(u32, u32, u8, bool)>,
    heard: String,
}

impl Digits {
    fn hear(&mut self, arrival: &Arrival) {
        let (Some(rtp), Some(event)) = (arrival.rtp, arrival.event) else {
            return;
        };
        match &mut self.current {
            Some((ssrc, timestamp, code, ended))
                if (*ssrc, *timestamp, *code) == (rtp.ssrc, rtp.timestamp, event.code) =>
            {
                if event.end && !*ended {
                    *ended = true;
                    let digit = b"0123456789*#".get(usize::from(event.code));
                    self.heard
                        .push(digit.map_or('?', |digit| char::from(*digit)));
                }
            }
            // One whose beginning is not heard is no digit.
            current => {
                *current = (!event.end).then_some((rtp.ssrc, rtp.timestamp, event.code, false));
            }
        }
    }
}

impl Stage {
    /// Starts Asterisk, and opens the phones' desks.
    ///
    /// # Errors
    /// As [`Lab::up`].
    pub fn open() -> Result<Self> {
        let lab = Lab::up()?;
        let bank = Arc::new(Bank::new(&lab.net.phones)?);
        let pbx = SocketAddr::new(PBX_V4, SIP_PORT);
        let open = |phone: u8, port| {
            let local = SocketAddr::new(Direct::phone_v4(phone), port);
            Desk::open(&lab.net.phones, &bank, local, pbx)
        };
        let (callers, callees) = (open(0, 5080)?, open(1, 5070)?);
        let manager = deaf_manager(&lab)?;
        Ok(Self {
            lab,
            callers,
            callees,
            relay: None,
            list: Mutex::default(),
            manager: Mutex::new(manager),
            _bank: bank,
        })
    }

    /// Kills Asterisk, as a crash does.
    ///
    /// # Errors
    /// It does not end.
    pub fn crash(&mut self) -> Result<()> {
        self.lab.crash()
    }

    /// Starts Asterisk again after [`Stage::crash`].
    ///
    /// # Errors
    /// It does not boot.
    pub fn restart(&mut self) -> Result<()> {
        self.lab.restart()?;
        self.manager = Mutex::new(deaf_manager(&self.lab)?);
        Ok(())
    }

    /// From now on calls are expected to be this relay's.
    pub fn relayed_by(&mut self, relay: Relay) {
        self.relay = Some(relay);
    }

    /// The relay, no more expected to take calls.
    pub fn without_relay(&mut self) -> Option<Relay> {
        self.relay.take()
    }

    /// The relay.
    pub fn relay(&self) -> Option<&Relay> {
        self.relay.as_ref()
    }

    /// A call from `user`, an endpoint of `asterisk/pbx/pjsip.conf`, to `number`, which no other phone waits for.
    ///
    /// # Errors
    /// Asterisk does not connect it.
    pub fn call(&self, user: &str, number: &str, features: [Features; 2]) -> Result<Call> {
        let [caller, callee] = self.connect(user, number, features)?;
        let channels = self.channels(number)?;
        Ok(Call {
            caller,
            callee,
            channels,
        })
    }

    /// The same without a look at Asterisk's channels: who calls and who is called.
    ///
    /// # Errors
    /// Asterisk does not connect it.
    pub fn connect(
        &self,
        user: &str,
        number: &str,
        features: [Features; 2],
    ) -> Result<[Softphone; 2]> {
        let callee = self.callees.answer(number, features[1])?;
        let caller = self.callers.call(user, number, features[0])?;
        callee.wait_up()?;
        Ok([caller, callee])
    }

    /// A phone that answers `number`.
    ///
    /// # Errors
    /// No port is left.
    pub fn answer(&self, number: &str) -> Result<Softphone> {
        self.callees.answer(number, Features::default())
    }

    /// A phone that has called a number at which Asterisk itself answers.
    ///
    /// # Errors
    /// Asterisk does not answer.
    pub fn dial(&self, user: &str, number: &str) -> Result<Softphone> {
        self.callers.call(user, number, Features::default())
    }

    /// Asterisk's channels of the call to this number: the caller's, the callee's. Empty where there is none.
    ///
    /// # Errors
    /// Asterisk is gone.
    pub fn channels(&self, number: &str) -> Result<[String; 2]> {
        let items = self.ask("CoreShowChannels", &[])?;
        let channel = |key: &str| {
            let of_call = |item: &&Message| item.get(key) == Some(number);
            let name = items
                .iter()
                .find(of_call)
                .and_then(|item| item.get("Channel"));
            name.unwrap_or_default().to_owned()
        };
        Ok([channel("CallerIDName"), channel("ConnectedLineName")])
    }

    /// The channel that shares a bridge with this one.
    ///
    /// # Errors
    /// None does in time.
    pub fn peer(&self, channel: &str) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let items = self.ask("CoreShowChannels", &[])?;
            let bridge = |item: &Message| {
                item.get("BridgeId")
                    .filter(|id| !id.is_empty())
                    .map(str::to_owned)
            };
            let own = items
                .iter()
                .find(|item| item.get("Channel") == Some(channel));
            let own = own.and_then(bridge);
            let is_peer = |item: &&Message| {
                own.is_some() && bridge(item) == own && item.get("Channel") != Some(channel)
            };
            if let Some(peer) = items
                .iter()
                .find(is_peer)
                .and_then(|item| item.get("Channel"))
            {
                return Ok(peer.to_owned());
            }
            thread::sleep(FRESH);
        }
        bail!("{channel} is alone after {PATIENCE:?}")
    }

    /// An AMI action of a user who may do everything.
    ///
    /// # Errors
    /// Asterisk refuses it, or is gone.
    pub fn ask(&self, action: &str, fields: &[(&str, &str)]) -> Result<Vec<Message>> {
        let mut manager = self.manager.lock().expect("no holder of this lock panics");
        manager.action(action, fields)
    }

    /// What the relay lists, not much older than now; nothing without a relay.
    ///
    /// # Errors
    /// The relay does not answer.
    pub fn list(&self) -> Result<Arc<Vec<Value>>> {
        let Some(relay) = &self.relay else {
            return Ok(Arc::default());
        };
        let mut kept = self.list.lock().expect("no holder of this lock panics");
        if let Some((at, list)) = &*kept
            && at.elapsed() < FRESH
        {
            return Ok(Arc::clone(list));
        }
        let list = relay.json(["list"])?;
        let list = Arc::new(list["pairs"].as_array().context("pairs")?.clone());
        *kept = Some((Instant::now(), Arc::clone(&list)));
        Ok(list)
    }

    /// What the relay says of the call between these channels.
    ///
    /// # Errors
    /// The relay does not answer.
    pub fn pair(&self, channels: [&str; 2]) -> Result<Option<Value>> {
        let has = |pair: &&Value, channel: &str| {
            let known = pair["channels"].as_array().into_iter().flatten();
            known.into_iter().any(|known| known == channel)
        };
        let list = self.list()?;
        let pair = list
            .iter()
            .find(|pair| channels.iter().all(|channel| has(pair, channel)));
        Ok(pair.cloned())
    }

    /// Waits until the relay has this call's state; at once without a relay. Returns how long it took.
    ///
    /// # Errors
    /// It has not in time: the text holds what it says instead.
    pub fn wait_state(&self, channels: [&str; 2], state: &str) -> Result<Duration> {
        let start = Instant::now();
        let Some(relay) = &self.relay else {
            return Ok(Duration::ZERO);
        };
        loop {
            let pair = self.pair(channels)?;
            if pair.as_ref().is_some_and(|pair| pair["state"] == state) {
                return Ok(start.elapsed());
            }
            if start.elapsed() > PATIENCE {
                let said = pair.unwrap_or_default();
                bail!(
                    "not {state} after {PATIENCE:?}: {channels:?}: {said}\n{}",
                    relay.log()
                );
            }
            thread::sleep(FRESH);
        }
    }

    /// Waits until the relay has taken the call over, if there is one, and both phones have talked on for a second.
    ///
    /// # Errors
    /// It has not in time: the text holds what it says instead.
    pub fn settle(&self, phones: [&Softphone; 2], channels: [&str; 2]) -> Result<()> {
        talk_on(&phones, STEADY)?;
        self.wait_state(channels, "offloaded")?;
        talk_on(&phones, STEADY)
    }
}

/// A connection that gets no events: Asterisk closes one whose events nobody reads.
fn deaf_manager(lab: &Lab) -> Result<Client> {
    let mut manager = lab.manager()?;
    manager.action("Events", &[("EventMask", "off")])?;
    Ok(manager)
}

impl Call {
    /// Both phones.
    pub fn phones(&self) -> [&Softphone; 2] {
        [&self.caller, &self.callee]
    }

    /// Both channels.
    pub fn channels(&self) -> [&str; 2] {
        [&self.channels[0], &self.channels[1]]
    }

    /// Both phones fall silent, what is on its way arrives, and each has heard the other; then the call ends.
    ///
    /// # Errors
    /// It had ended before.
    pub fn finish(&self) -> Result<[Hearing; 2]> {
        let [first, second] = self.phones();
        finish(&[first, second], &[(first, &[second]), (second, &[first])])
            .map(|hearings| hearings.try_into().expect("two"))
    }
}

/// All phones fall silent, what is on its way arrives, each listener has heard its speakers, and all hang up.
///
/// # Errors
/// A call had ended before.
pub fn finish(
    phones: &[&Softphone],
    streams: &[(&Softphone, &[&Softphone])],
) -> Result<Vec<Hearing>> {
    for phone in phones {
        if phone.is_over() {
            bail!("a call has ended by itself");
        }
        phone.phone().hush();
    }
    // Asterisk may still make sound of its own, so that no number of packets tells the end.
    thread::sleep(Duration::from_millis(200));
    let hearings = streams
        .iter()
        .map(|(listener, speakers)| Hearing::of(listener, speakers))
        .collect();
    phones.iter().try_for_each(|phone| phone.hang_up())?;
    Ok(hearings)
}

/// Waits until each of these has sent so many packets more.
///
/// # Errors
/// One does not.
pub fn talk_on(phones: &[&Softphone], packets: u64) -> Result<()> {
    let goals: Vec<_> = phones
        .iter()
        .map(|phone| phone.phone().sent() + packets)
        .collect();
    for (phone, goal) in phones.iter().zip(goals) {
        let timeout = PATIENCE + 2 * PACKET_TIME * packets as u32;
        phone.phone().wait_sent(goal, timeout)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_asterisk_may_forward_while_the_kernel_has_the_stream() {
        let ms = Duration::from_millis;
        let sent: Vec<_> = [0, 100, 300, 300, 302, 400]
            .into_iter()
            .chain((500..4000).step_by(100))
            .map(ms)
            .collect();
        let mut detours = Detours::default();
        let mut is_due = |number, came| detours.is_due(&sent, number, ms(came));
        assert!(!is_due(1, 101));
        assert!(!is_due(2, 301));
        // Held up on its way to the relay, for which the pause was longer than for the phone.
        assert!(is_due(2, 351));
        assert!(is_due(3, 352));
        assert!(is_due(4, 353));
        assert!(!is_due(5, 401));
        // Packet 35 is sent three seconds after packet 5.
        assert!(!is_due(34, 3301));
        assert!(!is_due(35, 3401));
        let mut detours = Detours {
            last: Some(5),
            ..Detours::default()
        };
        let mut is_due = |number, came| detours.is_due(&sent, number, ms(came));
        assert!(is_due(35, 3400));
        assert!(!is_due(36, 3501));
    }
}
