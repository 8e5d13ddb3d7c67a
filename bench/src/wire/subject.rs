//! A way to relay, and how it is measured.

use std::{
    any::Any,
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use nix::unistd::Pid;
use relay_tests::{relay::Relay, topology::Direct};

use super::{
    PHONES_CPU, RELAY_CPU,
    call::{self, Call, Way},
    cpu,
    search::Search,
    traffic::{Load, Traffic, Trial},
};

/// How often the receiver looks whether something has come: as if it were a NIC, nobody who sends has to wake it up.
const POLL: Duration = Duration::from_micros(50);
/// How long a load lasts.
const DURATION: Duration = Duration::from_millis(500);
/// How often a load is tried until nothing is lost: another guest of the same machine may stop a processor for longer
/// than a ring lasts.
const TRIES: u32 = 2;
/// The share of a rate that the generator must reach.
const REACHED: f64 = 0.99;
/// Where a search begins, packets per second, and the first steps of one.
const GUESS: f64 = 100e3;
const FAR: f64 = 1.5;
const NEAR: f64 = 1.04;
/// No rate above is tried, packets per second.
const CEILING: f64 = 3e6;

/// What a way to relay is, in comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Does nothing but send back.
    Floor,
    /// The relay of this project.
    Ours,
    /// Another one in the kernel.
    Kernel,
    /// Every packet goes through a process.
    Userspace,
}

/// A way to relay, ready to be measured.
pub(super) struct Subject {
    pub(super) name: &'static str,
    pub(super) class: Class,
    traffic: Traffic,
    /// The kernel's thread that receives for the relay.
    receiver: Pid,
    work: Work,
    /// Keeps the machines.
    _net: Direct,
    /// Where the relay is ours, packets by reason when it began to be measured.
    reasons: BTreeMap<String, u64>,
}

/// What runs besides the thread that receives.
pub(super) struct Work {
    pub(super) threads: Vec<Pid>,
    pub(super) processes: Vec<u32>,
    /// Where it is ours, among the processes too.
    pub(super) relay: Option<Relay>,
    /// Ends the rest when dropped.
    pub(super) _guard: Box<dyn Any>,
}

impl Work {
    /// Threads of this process, which end with the guard.
    pub(super) fn of_threads(threads: &[Pid], guard: impl Any) -> Self {
        Self {
            threads: threads.to_vec(),
            _guard: Box::new(guard),
            ..Self::default()
        }
    }

    /// A process, which ends with the guard.
    pub(super) fn of_process(process: u32, guard: impl Any) -> Self {
        Self {
            processes: vec![process],
            _guard: Box::new(guard),
            ..Self::default()
        }
    }
}

impl Default for Work {
    fn default() -> Self {
        Self {
            threads: Vec::new(),
            processes: Vec::new(),
            relay: None,
            _guard: Box::new(()),
        }
    }
}

/// What a relay takes at a load at which it loses nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    /// Packets per second.
    pub(super) rate: f64,
    /// CPU time for a packet, ns.
    pub(super) per_packet: f64,
}

impl Cost {
    /// The share of its CPU.
    pub(super) fn share(&self) -> f64 {
        self.rate * self.per_packet / 1e9
    }
}

impl Subject {
    /// Has both ends received by threads of their own, the relay run where it is to be measured, and all calls relayed.
    ///
    /// # Errors
    /// Not all packets come back as they should.
    pub(super) fn ready(
        name: &'static str,
        class: Class,
        net: &Direct,
        (calls, work): (Vec<Call>, Work),
    ) -> Result<Self> {
        let (pbx, phones) = (&net.pbx_interface, &net.phones_interface);
        let way = match class {
            Class::Floor => Way::Mirrored,
            _ => Way::Relayed,
        };
        let mut traffic = Traffic::new(phones)?;
        traffic.plan(&call::streams(&calls, way))?;
        let receiver = pbx.receive_by_thread()?;
        let of_phones = phones.receive_by_thread()?;
        for (thread, cpu) in [(receiver, RELAY_CPU), (of_phones, PHONES_CPU)] {
            cpu::pin(thread, cpu)?;
            cpu::put_first(thread)?;
        }
        phones.poll_every(POLL)?;
        for &process in &work.processes {
            cpu::pin_process(process, RELAY_CPU)?;
        }
        let mut subject = Self {
            name,
            class,
            traffic,
            receiver,
            work,
            _net: net.clone(),
            reasons: BTreeMap::new(),
        };
        // Addresses are resolved then, streams proven, connections known.
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let (trial, _) = subject.trial(Load::even(5e3))?;
            if trial.is_whole() {
                break;
            }
            if Instant::now() > deadline {
                bail!("not all is relayed: {trial:?}");
            }
        }
        if let Some(relay) = &subject.work.relay {
            subject.reasons = relay.reasons()?;
        }
        Ok(subject)
    }

    /// What the relay takes at a load; none where it loses something every time.
    ///
    /// # Errors
    /// The kernel does not run the generator.
    pub(super) fn cost(&mut self, load: Load) -> Result<Option<Cost>> {
        for _ in 0..TRIES {
            let (trial, cost) = self.trial(load)?;
            if trial.is_whole() && trial.rate() >= REACHED * load.rate {
                return Ok(Some(cost));
            }
        }
        Ok(None)
    }

    /// The highest rate at which it loses nothing, and what it takes there; none where it always loses something. The
    /// search begins near a rate that is known, or far from any.
    ///
    /// # Errors
    /// The kernel does not run the generator.
    pub(super) fn loss_free(&mut self, known: Option<f64>) -> Result<Option<Cost>> {
        let mut search = match known {
            Some(rate) => Search::new(rate, NEAR, CEILING),
            None => Search::new(GUESS, FAR, CEILING),
        };
        let mut best: Option<Cost> = None;
        while let Some(rate) = search.next() {
            let cost = self.cost(Load::even(rate))?;
            search.note(rate, cost.is_some());
            best = cost.filter(|_| search.found() == Some(rate)).or(best);
        }
        Ok(best)
    }

    /// The share of what came in that our relay's program has relayed, until now. The PBX behind it gets the first packet
    /// of a stream after a pause, one now and then as proof, and under overload all of streams whose proof gets lost. None
    /// of other relays.
    ///
    /// # Errors
    /// The program has relayed less than half.
    pub(super) fn share_in_kernel(&self) -> Result<Option<f64>> {
        let Some(relay) = &self.work.relay else {
            return Ok(None);
        };
        let mut reasons = relay.reasons()?;
        for (reason, before) in &self.reasons {
            *reasons.entry(reason.clone()).or_default() -= before;
        }
        // What the PBX sends is none of what came in.
        reasons.remove("echo");
        let came: u64 = reasons.values().sum();
        let relayed = reasons.get("relayed").copied().unwrap_or_default();
        let share = relayed as f64 / came as f64;
        reasons.retain(|_, packets| *packets > 0);
        ensure!(
            share > 0.5,
            "{}: not relayed in the kernel: {reasons:?}",
            self.name,
        );
        Ok(Some(share))
    }

    fn trial(&mut self, load: Load) -> Result<(Trial, Cost)> {
        // Our relay leaves the first packet after a pause to the PBX.
        let lead = 2.0 * f64::from(self.traffic.streams()) / load.rate;
        self.traffic
            .run(load, Duration::from_secs_f64(lead), PHONES_CPU)?;
        let before = self.cpu_time()?;
        let trial = self.traffic.run(load, DURATION, PHONES_CPU)?;
        let used = self.cpu_time()?.saturating_sub(before);
        let cost = Cost {
            rate: trial.rate(),
            per_packet: used.as_nanos() as f64 / trial.sent as f64,
        };
        Ok((trial, cost))
    }

    /// CPU time of the relay until now: what the kernel does to receive, and its threads and processes.
    fn cpu_time(&self) -> Result<Duration> {
        let mut sum = cpu::time_of(self.receiver)?;
        for &thread in &self.work.threads {
            sum += cpu::time_of(thread)?;
        }
        for &process in &self.work.processes {
            sum += cpu::time_of_process(process)?;
        }
        Ok(sum)
    }
}
