//! Calls through a real Asterisk, and what they cost while they last.

use std::{
    fs, process, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use relay_tests::{
    asterisk::{CALLER, USER},
    namespace::cpu_time,
    phone::Phone,
    program::{self, Kind},
    relay::{Relay, ami_arguments},
    scenario::{Stage, is_fast},
    softphone::{Features, Softphone},
    transit::Transit,
};

use super::echo::echo;

/// How long a change of all calls may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// From a change until it is measured.
const SETTLING: Duration = Duration::from_secs(1);
/// For how long all calls must have been offloaded first: an Asterisk that was busier than it could be still sends what
/// waits in it, and the relay takes that for talk-back.
const STEADY: Duration = Duration::from_secs(2);
/// From the end of a measurement until its last packet has arrived, and the phones have read it.
const ARRIVING: Duration = Duration::from_secs(1);
/// Between two looks at a state that nobody announces.
const LOOK: Duration = Duration::from_millis(50);
/// Calls are set up by so many at once.
const TEAMS: usize = 4;
/// The first number that calls are placed to.
const NUMBER: usize = 5000;
/// The part of the packets that the kernel must carry: not those by which Asterisk hears that a phone is there.
pub(super) const OFFLOADED: f64 = 0.95;
/// The part that may be lost on the way through Asterisk: with more the machine is too busy to tell anything.
const LOST: f64 = 0.01;

/// How often a measurement is made in which the machine was too busy, until that is an error.
pub(super) const ATTEMPTS: u32 = 3;

/// Who carries the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carrier {
    /// Asterisk, the relay not being there.
    Asterisk,
    /// The relay.
    Relay,
    /// A program that sends each packet back to its phone.
    Echo,
}

/// What some time cost, in percent of one core.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    pub(super) asterisk: f64,
    pub(super) relay: f64,
    /// Their process, in which the kernel also receives what they send, and runs the relay's program on it.
    pub(super) phones: f64,
    /// All processors together.
    pub(super) machine: f64,
}

impl Cost {
    /// What the calls' relaying takes.
    pub(super) fn relaying(&self) -> f64 {
        self.asterisk + self.relay
    }
}

/// What came of some time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    pub(super) cost: Cost,
    /// Of all calls.
    pub(super) transit: Transit,
}

/// A real Asterisk and the calls through it.
pub(super) struct Calls {
    stage: Stage,
    phones: Vec<[Softphone; 2]>,
}

impl Calls {
    pub(super) fn none() -> Result<Self> {
        Ok(Self {
            stage: Stage::open()?,
            phones: vec![],
        })
    }

    /// Places calls until there are so many, all of which Asterisk forwards natively.
    pub(super) fn grow(&mut self, calls: usize) -> Result<()> {
        let stage = &self.stage;
        let connect = |call: usize| {
            let number = (NUMBER + call).to_string();
            stage.connect(CALLER, &number, [Features::default(); 2])
        };
        let first = self.phones.len();
        let added = thread::scope(|scope| {
            let teams: Vec<_> = (0..TEAMS)
                .map(|team| {
                    let calls = (first + team..calls).step_by(TEAMS);
                    scope.spawn(move || calls.map(connect).collect::<Result<Vec<_>>>())
                })
                .collect();
            let teams = teams.into_iter().map(|team| {
                let ended = team.join();
                ended.map_err(|panic| anyhow!("placing calls panicked: {panic:?}"))?
            });
            teams.collect::<Result<Vec<_>>>()
        })?;
        self.phones.extend(added.into_iter().flatten());
        stage.lab.wait_technology(calls, "native_rtp", PATIENCE)
    }

    /// Lets them be carried so for a while.
    pub(super) fn measure(&self, carrier: Carrier, length: Duration) -> Result<Measured> {
        let lab = &self.stage.lab;
        let net = &lab.net;
        // All three alike: veth takes another way where its other end has no program.
        let _peer = net.phones_interface.pass_program()?;
        let measured = match carrier {
            Carrier::Asterisk => self.observe_well(carrier, None, length)?,
            Carrier::Relay => {
                let ami = ami_arguments(lab.ami(), USER, lab.secret_file());
                let mode = ["--mode", "native"].map(str::to_owned);
                let interface = &net.pbx_interface.name;
                let relay = Relay::attach(&net.pbx, interface, ami.into_iter().chain(mode))?;
                let measured = self
                    .observe_well(carrier, Some(&relay), length)
                    .with_context(|| format!("packets by reason: {:?}", relay.reasons()))?;
                relay.stop()?;
                measured
            }
            Carrier::Echo => {
                let program = program::load(Kind::Xdp, &echo())?;
                let _attached = net.pbx_interface.attach_xdp(&program)?;
                self.observe_well(carrier, None, length)?
            }
        };
        let ended = self.phones.iter().flatten().filter(|phone| phone.is_over());
        ensure!(ended.count() == 0, "calls have ended by themselves");
        Ok(measured)
    }

    fn observe_well(
        &self,
        carrier: Carrier,
        relay: Option<&Relay>,
        length: Duration,
    ) -> Result<Measured> {
        let mut attempt = 1;
        loop {
            if let Some(relay) = relay {
                self.await_offloaded(relay)?;
            }
            let (measured, by_kernel) = self.observe(carrier, relay, length)?;
            match judge(carrier, &measured.transit, by_kernel) {
                Ok(()) => return Ok(measured),
                Err(error) if attempt == ATTEMPTS => return Err(error),
                Err(error) => eprintln!("measured again: {error:#}"),
            }
            attempt += 1;
        }
    }

    /// What came of some time, and how many packets came from the kernel.
    fn observe(
        &self,
        carrier: Carrier,
        relay: Option<&Relay>,
        length: Duration,
    ) -> Result<(Measured, u64)> {
        thread::sleep(SETTLING);
        for phone in self.phones.iter().flatten() {
            phone.phone().forget();
        }
        let sent = || -> Vec<_> {
            let phones = self.phones.iter().flatten();
            phones.map(|phone| phone.phone().sent()).collect()
        };
        let times = || -> Result<_> {
            let relay = relay.map_or(Ok(Duration::ZERO), Relay::cpu_time)?;
            let phones = cpu_time(process::id())?;
            Ok([self.stage.lab.cpu_time()?, relay, phones, busy()?])
        };
        let first = sent();
        let (before, begin) = (times()?, Instant::now());
        thread::sleep(length);
        let (after, took) = (times()?, begin.elapsed());
        let last = sent();
        thread::sleep(ARRIVING);
        let [asterisk, relay, phones, machine] = [0, 1, 2, 3].map(|which| {
            let used: Duration = after[which].saturating_sub(before[which]);
            used.div_duration_f64(took) * 100.0
        });
        let (transit, by_kernel) = self.transit(carrier, &first, &last)?;
        let cost = Cost {
            asterisk,
            relay,
            phones,
            machine,
        };
        Ok((Measured { cost, transit }, by_kernel))
    }

    /// The way of what each phone sent between these numbers, and how much of it came from the kernel.
    fn transit(&self, carrier: Carrier, first: &[u64], last: &[u64]) -> Result<(Transit, u64)> {
        let (mut sendings, mut arrivals) = (vec![], vec![]);
        let mut by_kernel = 0;
        let ends = self
            .phones
            .iter()
            .flat_map(|[one, other]| [(one, other), (other, one)]);
        for (((from, to), first), last) in ends.zip(first).zip(last) {
            let (from, to): (&Phone, _) = (from.phone(), to.phone());
            let listener = if carrier == Carrier::Echo { from } else { to };
            let base = sendings.len();
            let range = usize::try_from(*first)?..usize::try_from(*last)?;
            sendings.extend_from_slice(&from.sendings()[range.clone()]);
            for (number, arrival) in listener.received_from(from) {
                let number = usize::try_from(number)?;
                if range.contains(&number) {
                    by_kernel += u64::from(is_fast(&arrival));
                    arrivals.push((base + number - range.start, arrival.at));
                }
            }
        }
        Ok((Transit::of(&sendings, arrivals), by_kernel))
    }

    /// Waits until all calls are offloaded and stay so.
    fn await_offloaded(&self, relay: &Relay) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut since = Instant::now();
        loop {
            let status = relay.json(["status"])?;
            let offloaded = status["offloaded"].as_u64().context("`status`")?;
            if offloaded != self.phones.len() as u64 {
                since = Instant::now();
            } else if since.elapsed() >= STEADY {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!(
                    "{offloaded} of {} calls are offloaded:\n{}",
                    self.phones.len(),
                    relay.log()
                );
            }
            thread::sleep(LOOK);
        }
    }
}

/// Whether the packets went the way that is measured.
fn judge(carrier: Carrier, transit: &Transit, by_kernel: u64) -> Result<()> {
    let sent = transit.sent as f64;
    let (tolerated, expected) = match carrier {
        Carrier::Asterisk => (sent * LOST, 0.0),
        Carrier::Relay => (0.0, sent * OFFLOADED),
        Carrier::Echo => (0.0, 0.0),
    };
    ensure!(
        transit.lost as f64 <= tolerated,
        "{} of {sent} packets were lost on the way through {carrier:?}: the machine is too busy",
        transit.lost
    );
    ensure!(
        by_kernel as f64 >= expected,
        "the kernel relayed no more than {by_kernel} of {sent} packets: the machine is too busy"
    );
    Ok(())
}

/// CPU time of all processors, of whatever kind but idle (`cpu` in /proc/stat, proc(5)).
fn busy() -> Result<Duration> {
    let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    busy_of(&stat).context("/proc/stat has no times")
}

fn busy_of(stat: &str) -> Option<Duration> {
    let fields = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Option<Vec<u64>> = fields
        .split_whitespace()
        .map(|field| field.parse().ok())
        .collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks?[..] else {
        return None;
    };
    // USER_HZ is 100 on every architecture that Rust supports.
    Some(Duration::from_millis(
        (user + nice + system + irq + softirq) * 10,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_asterisk_may_lose_a_packet_and_only_the_relay_must_carry_them() {
        let judged = |carrier, lost, by_kernel| {
            let transit = Transit {
                sent: 1000,
                lost,
                ..Transit::default()
            };
            judge(carrier, &transit, by_kernel).is_ok()
        };
        assert!(judged(Carrier::Asterisk, 10, 0) && !judged(Carrier::Asterisk, 11, 0));
        assert!(judged(Carrier::Relay, 0, 950) && !judged(Carrier::Relay, 0, 949));
        assert!(!judged(Carrier::Relay, 1, 999) && !judged(Carrier::Echo, 1, 0));
    }

    #[test]
    fn idle_processors_are_not_busy() {
        let stat = "cpu  100 20 30 9999 8888 4 50 7 0 0\ncpu0 1 2 3\n";
        assert_eq!(busy_of(stat), Some(Duration::from_millis(2040)));
        assert_eq!(busy_of("intr 1"), None);
    }
}
