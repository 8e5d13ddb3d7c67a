//! A call ends while the controller stands still, and the next one takes its ports at once. The kernel still has the
//! entries of the old call, and one phone is in both: not a packet of the new call may reach the old party.

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use aya::maps::{Array, Map, MapData};
use nix::sys::signal::Signal;
use relay_common::stream::Control;
use relay_tests::{
    kernel,
    pbx::{self, Pbx},
    phone::{Arrival, Bank, Phone, Talk},
    relay::{Relay, ami_arguments},
    topology::{Direct, PBX_V4},
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);
/// How long a packet may be on its way.
const SOON: Duration = Duration::from_secs(2);
/// Packets of a phone that are more than a quarter of a second, which is a pause to the datapath.
const PAUSE: u64 = 20;
/// Packets that a phone sends in each part of a test.
const WHILE: u64 = 50;
/// Packets of the new call before its new party says anything, where it hesitates.
const HESITATION: u64 = 5;
/// Calls of each manner.
const EACH: u16 = 3;

/// How the phone that is in both calls goes from one to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// It begins a new stream at once.
    NewStream,
    /// The same, and the old party has not noticed that the call is over.
    NewStreamOldPartyTalksOn,
    /// It goes on with the same stream after a pause.
    AfterPause,
    /// It goes on with the same stream as if nothing had happened: nothing tells the new call from the old one before
    /// the new party is heard.
    Unnoticed,
}

impl Manner {
    const ALL: [Self; 4] = [
        Self::NewStream,
        Self::NewStreamOldPartyTalksOn,
        Self::AfterPause,
        Self::Unnoticed,
    ];
}

/// The PBX's machine with a PBX in it, and the phones' machine.
struct Office {
    net: Direct,
    pbx: Pbx,
    bank: Bank,
}

impl Office {
    fn open() -> Self {
        let net = Direct::new(3).expect("network");
        let pbx = Pbx::start(&net.pbx, PBX_V4).expect("PBX");
        let bank = Bank::new(&net.phones).expect("phones");
        Self { net, pbx, bank }
    }

    fn attach(&self, more: &[&str]) -> Relay {
        let ami = ami_arguments(self.pbx.ami(), pbx::USER, self.pbx.secret_file());
        let more = ["-vv"].iter().chain(more).map(|arg| (*arg).to_owned());
        let args = ami.into_iter().chain(more);
        Relay::attach(&self.net.pbx, "eth0", args).expect("relay-user attach")
    }

    /// The phones of a manner in the first of their calls, talking.
    fn first_call(&self, manner: Manner, number: u16) -> Trio {
        let [changing, old, new] = [0, 1, 2].map(|phone| {
            let local = (Direct::phone_v4(phone), 30_000 + 2 * number).into();
            self.bank.phone(local).expect("phone")
        });
        let line = self.pbx.call(changing.local(), old.local()).expect("call");
        changing.talk(Talk::to(line.local[0], FIRST));
        old.talk(Talk::to(line.local[1], OLD));
        Trio {
            manner,
            changing,
            old,
            new,
            line,
            before: 0,
        }
    }

    /// The old call ends at the PBX, and the new one has its ports. The new party does not talk yet.
    fn next_call(&self, trio: &mut Trio) {
        if trio.manner != Manner::Unnoticed {
            trio.changing.hush();
        }
        if trio.manner != Manner::NewStreamOldPartyTalksOn {
            trio.old.hush();
        }
        self.pbx.hang_up(trio.line).expect("hang up");
        let phones = [trio.changing.local(), trio.new.local()];
        let line = self.pbx.call(phones[0], phones[1]).expect("call");
        assert_eq!(line.local, trio.line.local, "the same ports");
        trio.line = line;
        trio.before = trio.changing.sent();
        let ssrc = match trio.manner {
            Manner::NewStream | Manner::NewStreamOldPartyTalksOn => SECOND,
            Manner::AfterPause => FIRST,
            Manner::Unnoticed => return,
        };
        trio.changing.talk(Talk::to(line.local[0], ssrc));
    }
}

/// Synchronisation sources: of the phone in both calls, of the old and of the new party.
const FIRST: u32 = 0xa1;
const SECOND: u32 = 0xa2;
const OLD: u32 = 0xb0;
const NEW: u32 = 0xc0;

/// A phone that goes from one call to another.
struct Trio {
    manner: Manner,
    /// In both calls.
    changing: Phone,
    /// The other party of the first call.
    old: Phone,
    /// The other party of the next one.
    new: Phone,
    line: pbx::Call,
    /// Packets that the phone in both calls had sent when the new call was up.
    before: u64,
}

impl Trio {
    fn new_party_talks(&self) {
        self.new.talk(Talk::to(self.line.local[1], NEW));
    }

    /// Packets of the new call that the old party got: which, and how.
    fn misdelivered(&self) -> Vec<(u64, Arrival)> {
        let mut received = self.old.received_from(&self.changing);
        received.retain(|(number, _)| *number >= self.before);
        received
    }

    /// The call falls silent, and who got what is looked at. Returns how many packets of the new call the old party
    /// got; no packet is lost, doubled or swapped, wherever it went.
    fn judge(&self) -> usize {
        for phone in [&self.changing, &self.old, &self.new] {
            phone.hush();
        }
        let manner = self.manner;
        await_last(&self.changing, &[&self.new, &self.old]);
        let misdelivered = self.misdelivered();
        let mut to_new = self.new.received_from(&self.changing);
        assert_eq!(self.new.arrivals().len(), to_new.len(), "{manner:?}");
        // Some may have been sent before this test knew that the new call was up.
        to_new.retain(|(number, _)| *number >= self.before);
        let numbers = |received: &[(u64, Arrival)]| -> Vec<u64> {
            received.iter().map(|(number, _)| *number).collect()
        };
        let all = [numbers(&misdelivered), numbers(&to_new)].concat();
        let sent: Vec<_> = (self.before..self.changing.sent()).collect();
        assert_eq!(all, sent, "{manner:?}: first to the old, then to the new");

        let all = self.new.sent();
        await_last(&self.new, &[&self.changing]);
        let from_new = self.changing.received_from(&self.new);
        assert_eq!(numbers(&from_new), (0..all).collect::<Vec<_>>());
        assert_eq!(self.old.received_from(&self.new), [], "{manner:?}");
        misdelivered.len()
    }
}

/// Waits for the last packet of a phone, at whomever it arrives. What is lost never comes, and a comparison tells it
/// better.
fn await_last(from: &Phone, at: &[&Phone]) {
    let deadline = Instant::now() + SOON;
    let last = from.sent().checked_sub(1);
    let has_last = |phone: &&Phone| {
        let received = phone.received_from(from);
        received.last().map(|(number, _)| *number) == last
    };
    while !at.iter().any(has_last) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
}

fn phones(trios: &[Trio]) -> impl Iterator<Item = &Phone> {
    trios.iter().map(|trio| &trio.changing)
}

/// Waits until each phone that is in both calls has sent `packets` more.
fn talk_on(trios: &[Trio], packets: u64) {
    let goals: Vec<_> = phones(trios).map(|phone| phone.sent() + packets).collect();
    for (phone, goal) in phones(trios).zip(goals) {
        phone.wait_sent(goal, PATIENCE).expect("talking");
    }
}

/// Waits until the kernel relays so many calls, and nothing else is known.
fn await_offloaded(relay: &Relay, calls: usize) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = relay.json(["status"]).expect("status");
        if status["offloaded"] == calls && status["pairs"] == calls {
            return status;
        }
        let late = Instant::now() > deadline;
        assert!(!late, "not offloaded: {status:#}\n{}", relay.log());
        thread::sleep(Duration::from_millis(10));
    }
}

/// The lease in the kernel.
struct KernelsLease<'a> {
    office: &'a Office,
    path: PathBuf,
}

impl<'a> KernelsLease<'a> {
    fn of(office: &'a Office, status: &Value) -> Self {
        let path = Path::new(status["pins"].as_str().expect("a folder")).join("CONTROL");
        Self { office, path }
    }

    fn with<T: Send>(
        &self,
        work: impl FnOnce(&mut Array<MapData, [u8; size_of::<Control>()]>) -> T + Send,
    ) -> T {
        self.office.net.pbx.run(|| {
            let map = MapData::from_pin(&self.path).expect("a pinned map");
            work(&mut Array::try_from(Map::Array(map)).expect("the lease's map"))
        })
    }

    fn end(&self) -> u64 {
        let control = self.with(|map| map.get(&0, 0).expect("the lease"));
        let control: Control = zerocopy::transmute!(control);
        control.lease
    }

    fn await_end(&self) {
        await_clock(self.end());
    }

    /// Makes it last for ever, while nobody else writes it.
    fn disable(&self) {
        let control = Control {
            lease: u64::MAX,
            ..Control::default()
        };
        let control: [u8; size_of::<Control>()] = zerocopy::transmute!(control);
        self.with(|map| map.set(0, control, 0).expect("set"));
    }
}

/// Waits for a time of the clock that the datapath reads.
fn await_clock(end: u64) {
    while kernel::now().expect("the clock") < end {
        thread::sleep(Duration::from_millis(10));
    }
}

/// What becomes of the controller that stood still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It goes on within the lease.
    GoesOn,
    /// It goes on when the lease is over.
    GoesOnLate,
    /// It is killed.
    Killed,
    /// It is killed, and another takes its place within the lease.
    Replaced,
}

impl Fate {
    /// The relay's mode: half of these in each, as what one sends astray the other would.
    const fn arguments(self) -> [&'static str; 2] {
        let mode = match self {
            Self::GoesOn | Self::Replaced => "generic",
            Self::GoesOnLate | Self::Killed => "tc",
        };
        ["--mode", mode]
    }
}

/// Calls of every manner change hands while the controller stands still, and afterwards what must happen happens.
fn change_hands(fate: Fate) {
    let office = Office::open();
    let mut relay = office.attach(&fate.arguments());
    let mut trios: Vec<_> = Manner::ALL
        .into_iter()
        .flat_map(|manner| (0..EACH).map(move |_| manner))
        .zip(0..)
        .map(|(manner, number)| office.first_call(manner, number))
        .collect();
    let calls = trios.len();
    let status = await_offloaded(&relay, calls);
    let lease = KernelsLease::of(&office, &status);
    talk_on(&trios, 10);

    relay.freeze().expect("SIGSTOP");
    for trio in &trios {
        if trio.manner == Manner::AfterPause {
            trio.changing.hush();
        }
    }
    let clock = trios.last().expect("one that talks");
    let goal = clock.changing.sent() + PAUSE;
    clock.changing.wait_sent(goal, PATIENCE).expect("talking");
    for trio in &mut trios {
        office.next_call(trio);
        if trio.manner == Manner::Unnoticed {
            let goal = trio.before + HESITATION;
            trio.changing.wait_sent(goal, PATIENCE).expect("talking");
        }
        trio.new_party_talks();
    }
    talk_on(&trios, WHILE);

    match fate {
        Fate::GoesOn => relay.signal(Signal::SIGCONT),
        Fate::GoesOnLate => {
            lease.await_end();
            talk_on(&trios, WHILE);
            relay.signal(Signal::SIGCONT);
        }
        Fate::Killed => {
            drop(relay);
            talk_on(&trios, WHILE);
            lease.await_end();
            talk_on(&trios, WHILE);
            return judge(&trios, fate);
        }
        Fate::Replaced => {
            drop(relay);
            relay = office.attach(&fate.arguments());
        }
    }
    await_offloaded(&relay, calls);
    talk_on(&trios, WHILE);
    judge(&trios, fate);
    relay.stop().expect("a clean end");
}

/// The old parties got nothing, or, where nothing told the calls apart, nothing after the new party's first packet.
fn judge(trios: &[Trio], fate: Fate) {
    for trio in trios {
        let manner = trio.manner;
        let misdelivered = trio.judge();
        let heard = trio.changing.received_from(&trio.old);
        if manner == Manner::Unnoticed {
            let first = trio.changing.received_from(&trio.new)[0].1.at;
            let late = trio.misdelivered();
            let late = late.iter().filter(|(_, arrival)| arrival.at > first);
            // One may be on its way.
            assert!(late.count() <= 1, "{fate:?}, {manner:?}");
        } else {
            assert_eq!(misdelivered, 0, "{fate:?}, {manner:?}");
        }
        if manner == Manner::NewStreamOldPartyTalksOn {
            let first = trio.new.received_from(&trio.changing)[0].1.at;
            let late = heard.iter().filter(|(_, arrival)| arrival.at > first);
            assert!(late.count() <= 1, "{fate:?}: the old party is still heard");
        }
        println!("{fate:?}, {manner:?}: {misdelivered} packets of the new call to the old party");
    }
}

#[test]
fn nothing_goes_astray_when_the_controller_goes_on() {
    change_hands(Fate::GoesOn);
}

#[test]
fn nothing_goes_astray_when_the_controller_goes_on_after_its_lease() {
    change_hands(Fate::GoesOnLate);
}

#[test]
fn nothing_goes_astray_when_the_controller_is_killed() {
    change_hands(Fate::Killed);
}

#[test]
fn nothing_goes_astray_when_the_controller_is_replaced() {
    change_hands(Fate::Replaced);
}

/// A call whose phone does not notice the change, and whose new party never talks: an entry of the old call is all
/// that the datapath knows.
struct Unheard<'a> {
    trios: [Trio; 1],
    lease: KernelsLease<'a>,
    relay: Relay,
}

impl<'a> Unheard<'a> {
    /// The first call is relayed, and the controller stands still.
    fn begin(office: &'a Office, keepalive: &str) -> Self {
        let relay = office.attach(&["--keepalive", keepalive]);
        let trios = [office.first_call(Manner::Unnoticed, 0)];
        let status = await_offloaded(&relay, 1);
        relay.freeze().expect("SIGSTOP");
        Self {
            trios,
            lease: KernelsLease::of(office, &status),
            relay,
        }
    }

    /// The next call, as long as a few packets. Returns how many of them the old party got.
    fn next_call(&mut self, office: &Office) -> usize {
        office.next_call(&mut self.trios[0]);
        talk_on(&self.trios, WHILE);
        self.trios[0].misdelivered().len()
    }
}

#[test]
fn the_lease_ends_what_nothing_else_tells_apart() {
    let office = Office::open();
    let mut unheard = Unheard::begin(&office, "0");
    assert!(
        unheard.next_call(&office) > 0,
        "else this test sees nothing"
    );
    unheard.lease.await_end();
    let [trio] = &unheard.trios;
    let over = trio.changing.sent();
    talk_on(&unheard.trios, WHILE);
    let misdelivered = trio.misdelivered();
    assert!(misdelivered.iter().all(|(number, _)| *number < over));

    // And the controller that goes on does not bring it back.
    unheard.relay.signal(Signal::SIGCONT);
    trio.new_party_talks();
    await_offloaded(&unheard.relay, 1);
    talk_on(&unheard.trios, WHILE);
    assert_eq!(trio.judge(), misdelivered.len());
    println!("{} packets before the lease was over", misdelivered.len());
}

#[test]
fn ports_reused_after_the_lease_carry_nothing_astray() {
    let office = Office::open();
    let mut unheard = Unheard::begin(&office, "0");
    unheard.lease.await_end();
    assert_eq!(unheard.next_call(&office), 0);
    assert_eq!(unheard.trios[0].judge(), 0);
}

#[test]
fn without_the_lease_the_same_goes_astray() {
    let office = Office::open();
    let mut unheard = Unheard::begin(&office, "0");
    let end = unheard.lease.end();
    unheard.lease.disable();
    await_clock(end);
    unheard.next_call(&office);
    let misdelivered = unheard.trios[0].judge();
    assert!(misdelivered as u64 >= WHILE, "{misdelivered}");
    println!("{misdelivered} packets without a lease");
}

#[test]
fn a_packet_that_keeps_the_pbx_content_ends_it_too() {
    let office = Office::open();
    let mut unheard = Unheard::begin(&office, "3");
    unheard.lease.disable();
    let before = unheard.next_call(&office);
    let [trio] = &unheard.trios;
    let heard = trio.new.wait_received(WHILE as usize, PATIENCE);
    heard.expect("the new party hears the phone");
    let misdelivered = trio.judge();
    assert!(misdelivered >= before);
    println!("{misdelivered} packets before a keepalive");
}
