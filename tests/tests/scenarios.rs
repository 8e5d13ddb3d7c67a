//! Everything that happens to a call on a real Asterisk, as the phones hear it: without the relay and with it.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use relay_tests::{
    asterisk::{CALLER, Lab, USER},
    link::PassProgram,
    phone::Arrival,
    relay::Relay,
    scenario::{Call, Hearing, PATIENCE, Stage, finish, talk_on},
    sip::{ALAW, OPUS, Way},
    softphone::{Features, Softphone},
};

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

const SCENARIOS: [Scenario; 24] = [
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
    scenario("conference and back", Carrier::Kernel, 1, conference),
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
    scenario("new port, no word", Carrier::Asterisk, 1, |stage| {
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

fn play_dtmf(stage: &Stage) -> Result<Vec<Hearing>> {
    let call = up(stage, CALLER, "3007")?;
    let fields = [("Channel", call.channels[1].as_str()), ("Digit", "5")];
    stage.ask("PlayDTMF", &fields)?;
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
        stage.ask("MuteAudio", &[channel, ("Direction", "in"), ("State", state)])
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
    call.caller.wait_over()?;
    let [_, channel] = stage.channels("3012")?;
    let other = channel_of(stage, "3032")?;
    stage.settle([&call.callee, &target], [&call.channels[1], &other])
        .with_context(|| format!("{channel}"))?;
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
    call.caller.wait_over()?;
    consultation.caller.wait_over()?;
    let (first, second) = (&call.callee, &consultation.callee);
    stage.settle([first, second], [&call.channels[1], &consultation.channels[1]])?;
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
    let channel = channel_of(stage, "4600")?;
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
    talk_on(&call.phones(), 2 * WHILE)?;
    stage.ask("Bridge", &[("Channel1", caller), ("Channel2", callee)])?;
    settle(stage, &call)?;
    end(&call)
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

/// The channel whose caller, or whose peer's, has this number for a name.
fn channel_of(stage: &Stage, number: &str) -> Result<String> {
    let channels = stage.channels(number)?;
    let found = channels.into_iter().find(|channel| !channel.is_empty());
    found.with_context(|| format!("no channel of {number}"))
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

/// Runs scenarios at the same time.
fn run<'a>(stage: &Stage, scenarios: &[&'a Scenario]) -> Vec<(&'a Scenario, Vec<Hearing>)> {
    thread::scope(|scope| {
        let start = |scenario: &&'a Scenario| {
            let scenario = *scenario;
            (scenario, scope.spawn(move || (scenario.run)(stage)))
        };
        let running: Vec<_> = scenarios.iter().map(start).collect();
        let mut faults = String::new();
        let mut results = Vec::new();
        for (scenario, thread) in running {
            match thread.join().expect("a scenario returns its faults") {
                Ok(hearings) => results.push((scenario, hearings)),
                Err(fault) => writeln!(faults, "{}: {fault:#}", scenario.name).expect("a String"),
            }
        }
        assert!(faults.is_empty(), "{faults}");
        results
    })
}

#[test]
fn baseline() {
    let stage = Stage::open().expect("a stage");
    let only = std::env::var("ONLY").ok();
    let chosen: Vec<_> = SCENARIOS.iter().filter(|s| only.as_ref().is_none_or(|only| s.name.contains(only))).collect();
    for (scenario, hearings) in run(&stage, &chosen) {
        for hearing in hearings {
            let _ = writeln!(io::stderr(), "{:28} {hearing:?}", scenario.name);
        }
    }
}
