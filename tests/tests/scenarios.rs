//! Everything that happens to a call on a real Asterisk, as the phones hear it: without the relay and with it.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{self, Write as _},
    net::SocketAddr,
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use relay_tests::{
    ami::{Proxy, Trouble},
    asterisk::{CALLER, USER},
    phone::Arrival,
    relay::{Relay, ami_arguments},
    scenario::{Call, Hearing, PATIENCE, Stage, finish, is_fast, talk_on},
    sip::{ALAW, OPUS, Way},
    softphone::{Features, Softphone},
};
use serde_json::Value;

/// A variable of the environment: only scenarios with this in their names.
const CHOICE: &str = "RELAY_SCENARIO";
/// How often a scenario may sound worse than without the relay, which a busy machine makes it do now and then.
const ATTEMPTS: u32 = 3;
/// What the relay may add to the longest gap of a scenario.
const TOLERANCE: Duration = Duration::from_millis(40);
/// Packets by which an interruption of voice may begin or end earlier or later, as SIP and AMI take their time.
const LEEWAY: u64 = 5;
/// Packets of a phone while something lasts.
const WHILE: u64 = 75;

/// Who is to carry a scenario's calls when there is a relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carrier {
    /// The kernel, except while something happens.
    Kernel,
    /// Asterisk, always.
    Asterisk,
}

/// One thing that happens to a call.
struct Scenario {
    name: &'static str,
    carrier: Carrier,
    /// How often voice is interrupted, on each stream.
    interruptions: u64,
    /// What the listeners of the streams hear dialled.
    digits: &'static [&'static str],
    /// Returns what each listener heard.
    run: fn(&Stage) -> Result<Vec<Hearing>>,
}

const fn scenario(
    name: &'static str,
    carrier: Carrier,
    interruptions: u64,
    run: fn(&Stage) -> Result<Vec<Hearing>>,
) -> Scenario {
    Scenario {
        name,
        carrier,
        interruptions,
        digits: &[],
        run,
    }
}

static SCENARIOS: [Scenario; 24] = [
    scenario("plain", Carrier::Kernel, 0, plain),
    Scenario {
        digits: &["*073", "159#"],
        ..scenario("DTMF both ways, 96 and 101", Carrier::Kernel, 0, digits)
    },
    scenario("Opus", Carrier::Kernel, 0, opus),
    scenario("comfort noise", Carrier::Kernel, 0, noise),
    scenario("hold, sendonly", Carrier::Kernel, 1, |stage| {
        hold(stage, "3004", |phone| phone.hold(Way::SendOnly))
    }),
    scenario("hold, inactive", Carrier::Kernel, 1, |stage| {
        hold(stage, "3005", |phone| phone.hold(Way::Inactive))
    }),
    scenario("hold, 0.0.0.0", Carrier::Kernel, 1, |stage| {
        hold(stage, "3006", Softphone::hold_by_zeros)
    }),
    Scenario {
        digits: &["", "5"],
        ..scenario("PlayDTMF", Carrier::Kernel, 1, play_dtmf)
    },
    scenario("announcement", Carrier::Kernel, 1, announcement),
    scenario("MixMonitor", Carrier::Kernel, 0, mix_monitor),
    scenario("ChanSpy", Carrier::Kernel, 0, chan_spy),
    scenario("MuteAudio", Carrier::Kernel, 1, mute_audio),
    scenario("blind transfer", Carrier::Kernel, 1, blind_transfer),
    scenario("attended transfer", Carrier::Kernel, 1, attended_transfer),
    scenario("park", Carrier::Kernel, 1, park),
    scenario("conference", Carrier::Kernel, 1, conference),
    scenario("re-INVITE to a new port", Carrier::Kernel, 1, |stage| {
        moved(stage, CALLER, "3016", Softphone::move_media)
    }),
    scenario("the same, rtp_symmetric", Carrier::Kernel, 1, |stage| {
        moved(stage, "caller-sym", "3117", Softphone::move_media)
    }),
    scenario("new SSRC", Carrier::Kernel, 0, |stage| {
        moved(stage, CALLER, "3018", |phone| {
            phone.change_source();
            Ok(())
        })
    }),
    scenario("new port, no word", Carrier::Kernel, 1, |stage| {
        moved(stage, "caller-sym", "3119", Softphone::move_silently)
    }),
    scenario("transcoding", Carrier::Asterisk, 0, |stage| {
        let features = [Features::default(), with_codec(ALAW)];
        never(stage, CALLER, "4220", features)
    }),
    scenario("video", Carrier::Asterisk, 0, |stage| {
        let camera = Features {
            video: true,
            ..Features::default()
        };
        never(stage, "caller-video", "4121", [camera; 2])
    }),
    scenario("jitter buffer", Carrier::Asterisk, 0, |stage| {
        never(stage, CALLER, "4322", [Features::default(); 2])
    }),
    scenario("features tT", Carrier::Asterisk, 0, |stage| {
        never(stage, CALLER, "4523", [Features::default(); 2])
    }),
];

fn with_codec(codec: relay_tests::sip::Codec) -> Features {
    Features {
        codec,
        ..Features::default()
    }
}

/// A call that is up, and the relay's if there is one.
fn up(stage: &Stage, user: &str, number: &str) -> Result<Call> {
    let call = stage.call(user, number, [Features::default(); 2])?;
    settle(stage, &call)?;
    Ok(call)
}

fn settle(stage: &Stage, call: &Call) -> Result<()> {
    stage.settle(call.phones(), call.channels())
}

fn end(call: &Call) -> Result<Vec<Hearing>> {
    call.finish().map(Vec::from)
}

fn plain(stage: &Stage) -> Result<Vec<Hearing>> {
    let call = up(stage, CALLER, "3000")?;
    talk_on(&call.phones(), 2 * WHILE)?;
    end(&call)
}

fn digits(stage: &Stage) -> Result<Vec<Hearing>> {
    let caller = Features {
        events: 96,
        ..Features::default()
    };
    let call = stage.call(CALLER, "3001", [caller, Features::default()])?;
    ensure!(call.caller.events() == 96 && call.callee.events() == 101);
    settle(stage, &call)?;
    call.caller.phone().dial("159#", call.caller.events());
    call.callee.phone().dial("*073", call.callee.events());
    for phone in call.phones() {
        phone.phone().wait_dialled(PATIENCE)?;
    }
    settle(stage, &call)?;
    end(&call)
}

fn opus(stage: &Stage) -> Result<Vec<Hearing>> {
    let call = stage.call("caller-opus", "4002", [with_codec(OPUS); 2])?;
    settle(stage, &call)?;
    talk_on(&call.phones(), WHILE)?;
    end(&call)
}

fn noise(stage: &Stage) -> Result<Vec<Hearing>> {
    let call = up(stage, CALLER, "3003")?;
    for _ in 0..3 {
        call.caller.phone().noise();
        talk_on(&call.phones(), 10)?;
    }
    settle(stage, &call)?;
    end(&call)
}

fn hold(
    stage: &Stage,
    number: &str,
    hold: impl FnOnce(&Softphone) -> Result<()>,
) -> Result<Vec<Hearing>> {
    let call = up(stage, CALLER, number)?;
    hold(&call.caller)?;
    wait_heard(&call.callee, "music", |arrivals| {
        last(arrivals, 10).is_some_and(|last| last.iter().all(is_other))
    })?;
    talk_on(&[&call.callee], WHILE)?;
    call.caller.resume()?;
    settle(stage, &call)?;
    end(&call)
}

/// Asterisk sends the packets of a digit of its own whenever it receives one from the phone that hears it: a relay that
/// takes that phone's voice meanwhile makes holes in the digit.
fn play_dtmf(stage: &Stage) -> Result<Vec<Hearing>> {
    let call = up(stage, CALLER, "3007")?;
    let channel = ("Channel", call.channels[1].as_str());
    stage.ask("PlayDTMF", &[channel, ("Digit", "5"), ("Duration", "500")])?;
    wait_heard(&call.callee, "a digit", |arrivals| {
        let ended = |arrival: &Arrival| arrival.event.is_some_and(|event| event.end);
        arrivals.iter().any(ended)
    })?;
    settle(stage, &call)?;
    end(&call)
}

fn announcement(stage: &Stage) -> Result<Vec<Hearing>> {
    let call = up(stage, CALLER, "4408")?;
    for phone in call.phones() {
        wait_heard(phone, "an announcement", |arrivals| {
            last(arrivals, 10).is_some_and(|last| last.iter().all(is_other))
        })?;
    }
    for phone in call.phones() {
        wait_voice(phone)?;
    }
    settle(stage, &call)?;
    end(&call)
}

fn mix_monitor(stage: &Stage) -> Result<Vec<Hearing>> {
    let call = up(stage, CALLER, "3009")?;
    let channel = ("Channel", call.channels[1].as_str());
    let file = ("File", "/lab/spool/monitor/scenario.wav");
    stage.ask("MixMonitor", &[channel, file])?;
    talk_on(&call.phones(), WHILE)?;
    stage.ask("StopMixMonitor", &[channel])?;
    settle(stage, &call)?;
    end(&call)
}

fn chan_spy(stage: &Stage) -> Result<Vec<Hearing>> {
    let call = up(stage, CALLER, "3010")?;
    let spied = format!("{},q", call.channels[0]);
    let fields = [
        ("Channel", "Local/mw@lab"),
        ("Application", "ChanSpy"),
        ("Data", &spied),
        ("Async", "true"),
    ];
    stage.ask("Originate", &fields)?;
    talk_on(&call.phones(), WHILE)?;
    stage.ask("Hangup", &[("Channel", "/^Local\\/mw@lab/")])?;
    settle(stage, &call)?;
    end(&call)
}

fn mute_audio(stage: &Stage) -> Result<Vec<Hearing>> {
    let call = up(stage, CALLER, "3011")?;
    let mute = |state| {
        let channel = ("Channel", call.channels[0].as_str());
        stage.ask(
            "MuteAudio",
            &[channel, ("Direction", "in"), ("State", state)],
        )
    };
    mute("on")?;
    talk_on(&call.phones(), WHILE)?;
    mute("off")?;
    settle(stage, &call)?;
    end(&call)
}

fn blind_transfer(stage: &Stage) -> Result<Vec<Hearing>> {
    let call = up(stage, CALLER, "3012")?;
    let target = stage.answer("3032")?;
    call.caller.transfer("3032")?;
    target.wait_up()?;
    let other = stage.peer(&call.channels[1])?;
    stage.settle([&call.callee, &target], [&call.channels[1], &other])?;
    finish(
        &[&call.callee, &target],
        &[
            (&call.callee, &[&call.caller, &target]),
            (&target, &[&call.callee]),
        ],
    )
}

fn attended_transfer(stage: &Stage) -> Result<Vec<Hearing>> {
    let call = up(stage, CALLER, "3013")?;
    let consultation = up(stage, CALLER, "3033")?;
    call.caller.transfer_to(&consultation.caller, "3033")?;
    consultation.caller.hang_up()?;
    let (first, second) = (&call.callee, &consultation.callee);
    stage.settle(
        [first, second],
        [&call.channels[1], &consultation.channels[1]],
    )?;
    finish(
        &[first, second],
        &[
            (first, &[&call.caller, second]),
            (second, &[&consultation.caller, first]),
        ],
    )
}

fn park(stage: &Stage) -> Result<Vec<Hearing>> {
    let call = up(stage, CALLER, "3014")?;
    let channel = ("Channel", call.channels[1].as_str());
    stage.ask("Park", &[channel, ("Timeout", "45000")])?;
    call.caller.wait_over()?;
    talk_on(&[&call.callee], WHILE)?;
    let other = stage.dial(CALLER, "4600")?;
    let channel = stage.peer(&call.channels[1])?;
    stage.settle([&other, &call.callee], [&channel, &call.channels[1]])?;
    finish(
        &[&other, &call.callee],
        &[
            (&call.callee, &[&call.caller, &other]),
            (&other, &[&call.callee]),
        ],
    )
}

fn conference(stage: &Stage) -> Result<Vec<Hearing>> {
    let call = up(stage, CALLER, "3015")?;
    // Somebody else makes noise there: one voice alone goes through a conference as it is.
    let fields = [
        ("Channel", "Local/moh@lab"),
        ("Application", "ConfBridge"),
        ("Data", "room"),
        ("Async", "true"),
    ];
    stage.ask("Originate", &fields)?;
    let [caller, callee] = call.channels();
    let fields = [
        ("Channel", caller),
        ("ExtraChannel", callee),
        ("Context", "lab"),
        ("ExtraContext", "lab"),
        ("Exten", "2715"),
        ("ExtraExten", "2715"),
        ("Priority", "1"),
        ("ExtraPriority", "1"),
    ];
    stage.ask("Redirect", &fields)?;
    talk_on(&call.phones(), 3 * WHILE)?;
    let hearings = end(&call)?;
    stage.ask("Hangup", &[("Channel", "/^Local\\/moh@lab/")])?;
    Ok(hearings)
}

fn moved(
    stage: &Stage,
    user: &str,
    number: &str,
    change: impl FnOnce(&Softphone) -> Result<()>,
) -> Result<Vec<Hearing>> {
    let call = up(stage, user, number)?;
    change(&call.caller)?;
    talk_on(&call.phones(), WHILE)?;
    settle(stage, &call)?;
    end(&call)
}

fn never(stage: &Stage, user: &str, number: &str, features: [Features; 2]) -> Result<Vec<Hearing>> {
    let call = stage.call(user, number, features)?;
    talk_on(&call.phones(), WHILE)?;
    stage.wait_state(call.channels(), "refused")?;
    talk_on(&call.phones(), 3 * WHILE)?;
    end(&call)
}

fn last(arrivals: &[Arrival], count: usize) -> Option<&[Arrival]> {
    arrivals.get(arrivals.len().checked_sub(count)?..)
}

fn is_other(arrival: &Arrival) -> bool {
    arrival.stamp.is_none() && arrival.event.is_none()
}

fn wait_heard(phone: &Softphone, what: &str, is_so: impl Fn(&[Arrival]) -> bool) -> Result<()> {
    phone
        .phone()
        .wait(PATIENCE, is_so)
        .with_context(|| format!("waiting for {what}"))
}

/// Waits until the phone hears nothing but phones.
fn wait_voice(phone: &Softphone) -> Result<()> {
    wait_heard(phone, "voice", |arrivals| {
        last(arrivals, 10).is_some_and(|last| last.iter().all(|arrival| arrival.stamp.is_some()))
    })
}

/// What the listeners of a scenario heard.
type Heard<'a> = (&'a Scenario, Result<Vec<Hearing>>);

/// Runs scenarios at the same time.
fn run<'a>(stage: &Stage, scenarios: &[&'a Scenario]) -> Vec<Heard<'a>> {
    thread::scope(|scope| {
        let start = |scenario: &&'a Scenario| {
            let scenario = *scenario;
            (scenario, scope.spawn(move || (scenario.run)(stage)))
        };
        let running: Vec<_> = scenarios.iter().map(start).collect();
        let join = |(scenario, thread): (_, thread::ScopedJoinHandle<_>)| {
            (
                scenario,
                thread.join().expect("a scenario returns its faults"),
            )
        };
        running.into_iter().map(join).collect()
    })
}

/// What a scenario showed with the relay that it may not show.
#[derive(Debug, Default)]
struct Faults {
    /// Ours.
    wrong: Vec<String>,
    /// Ours, or those of a busy machine, which do not come again.
    late: Vec<String>,
}

impl Faults {
    fn is_empty(&self) -> bool {
        self.wrong.is_empty() && self.late.is_empty()
    }

    fn of(scenario: &Scenario, without: &[Hearing], with: &[Hearing]) -> Self {
        let mut faults = Self::default();
        for (at, (without, with)) in without.iter().zip(with).enumerate() {
            let tell = |what: &str| {
                let name = scenario.name;
                format!("{name}, stream {at}: {what}: {without:?}, with the relay {with:?}")
            };
            let mut check = |fine: bool, what: &str| {
                if !fine {
                    faults.wrong.push(tell(what));
                }
            };
            check(without.expedited == 0, "marked by Asterisk");
            check(with.duplicates <= without.duplicates, "duplicates");
            check(with.wrong == 0, "somebody else");
            check(with.digits == without.digits, "digits");
            if let Some(digits) = scenario.digits.get(at) {
                check(with.digits == *digits, "digits");
            }
            check(with.types.keys().eq(without.types.keys()), "payload types");
            if scenario.carrier == Carrier::Asterisk {
                check(with.expedited == 0, "in the kernel");
                continue;
            }
            check(with.expedited > 0, "not in the kernel");
            check(with.overtaken == 0, "order");
            // Asterisk's own sound and a phone's voice are never mixed.
            check(with.turns <= without.turns, "voice in between");
            check(with.events + LEEWAY > without.events, "a digit with holes");
            if scenario.interruptions == 0 {
                check(with.lost <= without.lost, "lost");
            } else if with.lost > without.lost + LEEWAY * scenario.interruptions {
                faults.late.push(tell("lost"));
            }
            if with.largest_gap > without.largest_gap + TOLERANCE {
                faults.late.push(tell("a gap"));
            }
        }
        faults
    }
}

/// The relay beside the Asterisk under test, in this mode and with these arguments more.
fn attach(stage: &Stage, ami: SocketAddr, mode: &str, more: &[&str]) -> Relay {
    let ami = ami_arguments(ami, USER, stage.lab.secret_file());
    let more = ["--mode", mode].into_iter().chain(more.iter().copied());
    let args = ami.into_iter().chain(more.map(str::to_owned));
    let net = &stage.lab.net;
    Relay::attach(&net.pbx, &net.pbx_interface.name, args).expect("relay-user attach")
}

/// One line of the table, past the test's own capture of its output.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

fn largest_gap(hearings: &[Hearing]) -> Duration {
    let gaps = hearings.iter().map(|hearing| hearing.largest_gap);
    gaps.max().unwrap_or_default()
}

#[test]
fn whatever_happens_to_a_call_sounds_as_without_the_relay() {
    let mut stage = Stage::open().expect("Asterisk");
    let chosen = env::var(CHOICE).unwrap_or_default();
    let chosen = |scenario: &&Scenario| scenario.name.contains(&chosen);
    let scenarios: Vec<_> = SCENARIOS.iter().filter(chosen).collect();
    let without: BTreeMap<_, _> = run(&stage, &scenarios)
        .into_iter()
        .map(|(scenario, heard)| {
            let name = scenario.name;
            (
                name,
                heard.unwrap_or_else(|fault| panic!("{name}: {fault:#}")),
            )
        })
        .collect();
    let _pass = stage.lab.net.phones_interface.pass_program().expect("XDP");
    for (mode, while_compared) in [("native", nobody_is_hung_up as fn(&Stage)), ("tc", |_| ())] {
        let relay = attach(&stage, stage.lab.ami(), mode, &[]);
        stage.relayed_by(relay);
        say(&format!(
            "{:28} {:>10} {mode:>10}",
            "largest gap", "without"
        ));
        thread::scope(|scope| {
            let meanwhile = scope.spawn(|| while_compared(&stage));
            compare(&stage, &without, scenarios.clone());
            meanwhile.join().expect("the long calls went well");
        });
        let relay = stage.without_relay().expect("attached");
        relay.stop().expect("a clean end");
    }
}

/// Runs scenarios until each has sounded once as without the relay.
fn compare(stage: &Stage, without: &BTreeMap<&str, Vec<Hearing>>, mut left: Vec<&Scenario>) {
    for attempts in (0..ATTEMPTS).rev() {
        let mut all = Faults::default();
        for (scenario, with) in run(stage, &left) {
            let name = scenario.name;
            let without = &without[name];
            let with = match with {
                Ok(with) => with,
                Err(fault) => {
                    all.wrong.push(format!("{name}: {fault:#}"));
                    continue;
                }
            };
            let faults = Faults::of(scenario, without, &with);
            say(&format!(
                "{name:28} {:>7} ms {:>7} ms{}",
                largest_gap(without).as_millis(),
                largest_gap(&with).as_millis(),
                if faults.is_empty() { "" } else { ", not well" }
            ));
            if faults.is_empty() {
                left.retain(|other| other.name != name);
            }
            all.wrong.extend(faults.wrong);
            all.late.extend(faults.late);
        }
        let log = || stage.relay().map(Relay::log).unwrap_or_default();
        assert!(all.wrong.is_empty(), "{:#?}\n{}", all.wrong, log());
        if left.is_empty() {
            break;
        }
        assert!(attempts > 0, "{:#?}\n{}", all.late, log());
    }
}

/// Packets of a phone in a minute.
const MINUTE: u64 = 3000;

/// Calls whose legs both have `rtp_timeout=10`, for a minute, with phones that send RTCP and phones that send none.
fn nobody_is_hung_up(stage: &Stage) {
    let [with, without] = [true, false].map(|rtcp| Features {
        rtcp,
        ..Features::default()
    });
    let calls = [
        ("3240", [with, with]),
        ("3241", [without, without]),
        ("3242", [with, without]),
    ];
    let calls = calls.map(|(number, features)| {
        let call = stage.call("caller-to", number, features).expect("a call");
        settle(stage, &call).expect("offloaded");
        call
    });
    let phones: Vec<_> = calls.iter().flat_map(Call::phones).collect();
    talk_on(&phones, MINUTE).expect("talking");
    for call in calls {
        let rtcp = call.channels()[0].to_owned();
        for hearing in call.finish().expect("nobody hung up") {
            let faults = (
                hearing.lost,
                hearing.duplicates,
                hearing.overtaken,
                hearing.wrong,
            );
            assert_eq!(faults, (0, 0, 0, 0), "{rtcp}: {hearing:?}");
            assert!(hearing.expedited > MINUTE * 9 / 10, "{rtcp}: {hearing:?}");
            say(&format!(
                "rtp_timeout=10, a minute {:>20} ms",
                hearing.largest_gap.as_millis()
            ));
        }
    }
}

/// Calls that are up while the relay or AMI has its troubles.
const CROWD: u32 = 200;
/// Time between two packets of their phones: more is too much for a small machine to carry without the relay.
const CROWD_INTERVAL: Duration = Duration::from_millis(100);

/// Many calls, few of which have phones with packets as often as any phone.
struct Crowd<'a> {
    stage: &'a Stage,
    crowd: Vec<[Softphone; 2]>,
    calls: Vec<[Softphone; 2]>,
    /// A call that is always Asterisk's: how busy the machine is.
    control: [Softphone; 2],
}

/// What all phones of a [`Crowd`] heard in some time.
struct Window {
    /// Packets that came through Asterisk, of all that the relay may have.
    slow: u64,
    /// Packets that came through the kernel.
    fast: u64,
    /// Phones of which packets came through Asterisk that the kernel should have carried, and how many.
    undue: Vec<(SocketAddr, u64)>,
    /// Of the ordinary phones.
    largest_gap: Duration,
    /// Of the call that is always Asterisk's.
    control_gap: Duration,
}

/// Pairs that are shown when something is wrong.
const SHOWN: usize = 4;

impl Window {
    /// Makes sure that the kernel had every call all the time, and Asterisk only what the relay leaves to it then: more
    /// than a keepalive on a busy machine, where the phones pause.
    fn stayed(&self, relay: &Relay) {
        if self.undue.is_empty() && self.slow < self.fast {
            return;
        }
        let list = relay.json(["list"]).expect("list");
        let is_of = |pair: &Value, speaker: &SocketAddr| {
            let legs = pair["legs"].as_array().into_iter().flatten();
            legs.into_iter()
                .any(|leg| leg["remote"] == speaker.to_string())
        };
        let pairs = list["pairs"].as_array().into_iter().flatten();
        let pairs = pairs.filter(|pair| self.undue.iter().any(|(speaker, _)| is_of(pair, speaker)));
        let pairs: Vec<_> = pairs.take(SHOWN).collect();
        panic!(
            "{} packets by Asterisk, of which not due: {:?}\n{:?}\n{pairs:#?}\n{}",
            self.slow,
            self.undue,
            relay.reasons().expect("status"),
            relay.log()
        );
    }
}

fn now() -> Duration {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("a clock after 1970")
}

impl<'a> Crowd<'a> {
    fn gather(stage: &'a Stage) -> Self {
        let rare = Features {
            interval: CROWD_INTERVAL,
            ..Features::default()
        };
        let number = |number: u32| (5000 + number).to_string();
        let connect = |range: std::ops::Range<u32>, features| {
            let connect = |at| stage.connect(CALLER, &number(at), [features; 2]);
            range.map(connect).collect::<Result<Vec<_>>>()
        };
        const TEAMS: u32 = 4;
        let crowd = thread::scope(|scope| {
            let team = |team| {
                let size = CROWD / TEAMS;
                let range = team * size..(team + 1) * size;
                scope.spawn(move || connect(range, rare).expect("calls"))
            };
            let teams: Vec<_> = (0..TEAMS).map(team).collect();
            let teams = teams.into_iter();
            teams.flat_map(|team| team.join().expect("calls")).collect()
        });
        let calls = connect(CROWD..CROWD + 4, Features::default()).expect("calls");
        let control = stage.connect(CALLER, "4500", [Features::default(); 2]);
        Self {
            stage,
            crowd,
            calls,
            control: control.expect("a call"),
        }
    }

    /// All phones whose calls the relay may have.
    fn phones(&self) -> impl Iterator<Item = &Softphone> {
        self.calls.iter().chain(&self.crowd).flatten()
    }

    /// Waits until the ordinary phones have sent so many packets more.
    fn talk(&self, packets: u64) {
        let phones: Vec<_> = self.calls.iter().flatten().collect();
        talk_on(&phones, packets).expect("talking");
    }

    /// Waits until the last packets that each phone heard came from the kernel, or all from Asterisk.
    fn wait_carried(&self, by: Carrier, patience: Duration) -> Duration {
        let start = Instant::now();
        loop {
            let other = self.phones().filter(|phone| {
                let arrivals = phone.phone().arrivals();
                let last = last(&arrivals, 5).unwrap_or_default();
                let fast = last.iter().filter(|arrival| is_fast(arrival)).count();
                fast != if by == Carrier::Kernel { 5 } else { 0 }
            });
            let other = other.count();
            if other == 0 {
                return start.elapsed();
            }
            let log = self.stage.relay().map(Relay::log).unwrap_or_default();
            assert!(
                start.elapsed() < patience,
                "{other} phones do not hear the {by:?} after {patience:?}: {log}"
            );
            self.talk(5);
        }
    }

    /// Judges what was heard since then: all of it, once, in order, and with no longer gap than there was without the
    /// relay, or is now in the call that Asterisk carries.
    fn judge(&self, what: &str, since: Duration, without: Option<Duration>) -> Window {
        let mut window = Window {
            slow: 0,
            fast: 0,
            undue: Vec::new(),
            largest_gap: Duration::ZERO,
            control_gap: Duration::ZERO,
        };
        for (number, [caller, callee]) in self.calls.iter().chain(&self.crowd).enumerate() {
            for (listener, speaker) in [(caller, callee), (callee, caller)] {
                let hearing = Hearing::since(since, listener, &[speaker]);
                let faults = (
                    hearing.lost,
                    hearing.duplicates,
                    hearing.overtaken,
                    hearing.wrong,
                    hearing.others,
                );
                assert_eq!(
                    faults,
                    (0, 0, 0, 0, 0),
                    "{what}, call {number}: {hearing:?}"
                );
                window.fast += hearing.expedited;
                window.slow += hearing.heard - hearing.expedited;
                if hearing.undue > 0 {
                    window.undue.push((speaker.phone().local(), hearing.undue));
                }
                if number < self.calls.len() {
                    window.largest_gap = window.largest_gap.max(hearing.largest_gap);
                }
            }
        }
        let [caller, callee] = &self.control;
        for (listener, speaker) in [(caller, callee), (callee, caller)] {
            let hearing = Hearing::since(since, listener, &[speaker]);
            window.control_gap = window.control_gap.max(hearing.largest_gap);
        }
        let own = without.unwrap_or_default().max(window.control_gap);
        say(&format!(
            "{what:28} {:>7} ms {:>7} ms, {} packets by the kernel, {} by Asterisk",
            own.as_millis(),
            window.largest_gap.as_millis(),
            window.fast,
            window.slow
        ));
        let within = window.largest_gap <= own + TOLERANCE;
        assert!(
            within || without.is_none(),
            "{what}: {:?}, and {own:?} without the relay",
            window.largest_gap
        );
        window
    }
}

/// Resident memory of a process, in bytes.
fn memory(id: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{id}/status")).expect("a process");
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let word = line.and_then(|line| line.split_whitespace().nth(1));
    let kibibytes: u64 = word.expect("VmRSS").parse().expect("a number");
    kibibytes * 1024
}

#[test]
fn two_hundred_calls_outlive_the_controller_and_troubles_of_ami() {
    /// Packets of an ordinary phone in 30 s.
    const FROZEN: u64 = 1500;
    /// The lease, and as much again for a busy machine.
    const LEASE: Duration = Duration::from_secs(10);
    let mut stage = Stage::open().expect("Asterisk");
    let _pass = stage.lab.net.phones_interface.pass_program().expect("XDP");
    let proxy = Proxy::start(&stage.lab.net.pbx, stage.lab.ami()).expect("a proxy");
    {
        let crowd = Crowd::gather(&stage);
        let start = now();
        crowd.talk(150);
        let without = crowd.judge("no relay", start, None).largest_gap;
        let without = Some(without);

        let start = now();
        let mut relay = attach(&stage, proxy.address(), "native", &["--persist"]);
        crowd.wait_carried(Carrier::Kernel, PATIENCE);
        crowd.judge("attach", start, without);

        // An upgrade: whoever comes next adopts what it finds.
        let start = now();
        relay.signal(Signal::SIGKILL);
        relay = attach(&stage, proxy.address(), "native", &["--persist"]);
        crowd.talk(150);
        let window = crowd.judge("upgrade", start, without);
        window.stayed(&relay);

        let start = now();
        relay.signal(Signal::SIGKILL);
        crowd.wait_carried(Carrier::Asterisk, LEASE);
        relay = attach(&stage, proxy.address(), "native", &["--persist"]);
        crowd.wait_carried(Carrier::Kernel, PATIENCE);
        crowd.judge("SIGKILL", start, without);

        let start = now();
        relay.signal(Signal::SIGSTOP);
        crowd.wait_carried(Carrier::Asterisk, LEASE);
        crowd.talk(FROZEN - 300);
        relay.signal(Signal::SIGCONT);
        crowd.wait_carried(Carrier::Kernel, PATIENCE);
        crowd.judge("SIGSTOP", start, without);

        // Shorter than the grace period.
        let start = now();
        proxy.set(Trouble::Cut);
        crowd.talk(25);
        proxy.set(Trouble::None);
        crowd.talk(200);
        let window = crowd.judge("AMI cut for 0.5 s", start, without);
        window.stayed(&relay);

        let start = now();
        proxy.set(Trouble::Cut);
        crowd.wait_carried(Carrier::Asterisk, PATIENCE);
        proxy.set(Trouble::None);
        crowd.wait_carried(Carrier::Kernel, 2 * PATIENCE);
        crowd.judge("AMI cut", start, without);

        let start = now();
        proxy.set(Trouble::Slow(1));
        crowd.wait_carried(Carrier::Asterisk, 2 * PATIENCE);
        proxy.set(Trouble::None);
        crowd.wait_carried(Carrier::Kernel, 2 * PATIENCE);
        crowd.judge("AMI at 1 byte/s", start, without);

        let start = now();
        let (before, invented) = (memory(relay.id()), proxy.invented());
        let flooded = Instant::now();
        proxy.set(Trouble::Flood(10_000));
        crowd.talk(250);
        let rate = (proxy.invented() - invented) as f64 / flooded.elapsed().as_secs_f64();
        let grown = memory(relay.id()).saturating_sub(before);
        proxy.set(Trouble::None);
        crowd.wait_carried(Carrier::Kernel, PATIENCE);
        crowd.judge("AMI floods", start, without);
        assert!(rate > 5_000.0, "{rate} events a second");
        assert!(grown < 16 << 20, "{grown} bytes more");

        drop(crowd);
        stage.relayed_by(relay);
    }

    let call = stage
        .call(CALLER, "3050", [Features::default(); 2])
        .expect("a call");
    settle(&stage, &call).expect("offloaded");
    stage.crash().expect("killed");
    // The relay does not keep alive what its PBX has left.
    wait_silence(&call);
    drop(call);
    stage.restart().expect("Asterisk again");
    let call = up(&stage, CALLER, "3051").expect("a call");
    for hearing in end(&call).expect("a call") {
        let faults = (
            hearing.lost,
            hearing.duplicates,
            hearing.overtaken,
            hearing.wrong,
        );
        assert_eq!(faults, (0, 0, 0, 0), "{hearing:?}");
    }
    stage
        .without_relay()
        .expect("attached")
        .stop()
        .expect("a clean end");
}

/// Waits until phones that talk do not hear each other any more.
fn wait_silence(call: &Call) {
    let deadline = Instant::now() + PATIENCE;
    let heard = || call.callee.phone().arrivals().len();
    loop {
        let before = heard();
        talk_on(&call.phones(), 25).expect("talking");
        if heard() == before {
            return;
        }
        assert!(Instant::now() < deadline, "{before} packets, and more come");
    }
}
