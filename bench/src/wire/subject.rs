//! A way to relay, and how it is measured.

use std::{
    any::Any,
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use nix::unistd::Pid;
use relay_tests::topology::Direct;

use super::{
    PHONES_CPU, RELAY_CPU,
    call::{self, Call, Way},
    cpu,
    own::Own,
    sample::{Cost, Sample},
    search::Search,
    traffic::{Load, Traffic},
};

/// How often the receiver looks whether something has come: as if it were a NIC, nobody who sends has to wake it up.
const POLL: Duration = Duration::from_micros(50);
/// How long a load lasts in the search for the highest rate.
const DURATION: Duration = Duration::from_millis(500);
/// How long the first search and each later one may take. What has passed until then is its result.
const FIRST_SEARCH: Duration = Duration::from_secs(20);
const SEARCH: Duration = Duration::from_secs(8);
/// How often a load is tried until nothing is lost.
const TRIES: u32 = 2;
/// How often a trial that loses is repeated because somebody stood still: another guest of the same machine may stop a
/// processor for longer than a ring lasts.
const REPEATS: u32 = 3;
/// Where a search begins, packets per second, and the first steps of one.
const GUESS: f64 = 100e3;
const FAR: f64 = 1.5;
const NEAR: f64 = 1.08;
/// No rate above is tried, packets per second.
const CEILING: f64 = 3e6;
/// With this load, calls are brought to be relayed, and seen to be.
const GENTLE: Load = Load::even(10e3);
/// How long it lasts.
const SHORT: Duration = Duration::from_millis(200);
/// How long it is repeated at first: addresses are resolved then, streams proven, connections known.
const BEGINNING: Duration = Duration::from_secs(20);
/// And after a load that was too much.
const RECOVERY: Duration = Duration::from_secs(4);

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
    /// Trials that were repeated because somebody stood still.
    pub(super) repeated: u32,
    /// What happened at the last load that failed: of a search that finds no rate, the lowest.
    pub(super) failed: Option<Sample>,
}

/// What runs besides the thread that receives.
pub(super) struct Work {
    pub(super) threads: Vec<Pid>,
    pub(super) processes: Vec<u32>,
    /// Where it is ours, among the processes too.
    pub(super) own: Option<Own>,
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
            own: None,
            _guard: Box::new(()),
        }
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
        let mut workers = work.threads.clone();
        for &process in &work.processes {
            workers.extend(cpu::threads_of(process)?);
        }
        for worker in workers {
            cpu::pin(worker, RELAY_CPU)?;
            cpu::take_most(worker)?;
        }
        let mut subject = Self {
            name,
            class,
            traffic,
            receiver,
            work,
            _net: net.clone(),
            repeated: 0,
            failed: None,
        };
        if let Some(failed) = subject.bring_back(BEGINNING)? {
            bail!("not all is relayed: {failed}");
        }
        Ok(subject)
    }

    /// What the relay takes at a load of some length; none where it loses something every time.
    ///
    /// # Errors
    /// The kernel does not run the generator.
    pub(super) fn cost(&mut self, load: Load, duration: Duration) -> Result<Option<Cost>> {
        let (mut tries, mut repeats) = (0, 0);
        loop {
            let sample = self.trial(load, duration)?;
            if sample.passes() {
                return Ok(Some(sample.cost));
            }
            // Else one failure would be the cause of the next: our relay leaves streams to the PBX whose packets come back
            // late or never.
            if let Some(own) = &self.work.own {
                own.begin_anew()?;
            }
            if let Some(failed) = self.bring_back(RECOVERY)? {
                self.failed = Some(failed);
                return Ok(None);
            }
            if sample.trial.has_silence() && repeats < REPEATS {
                repeats += 1;
                self.repeated += 1;
                continue;
            }
            tries += 1;
            if tries == TRIES {
                self.failed = Some(sample);
                return Ok(None);
            }
        }
    }

    /// The highest rate at which it loses nothing, and what it takes there; none where it always loses something. The
    /// search begins near a rate that is known, or far from any.
    ///
    /// # Errors
    /// The kernel does not run the generator.
    pub(super) fn loss_free(&mut self, known: Option<f64>) -> Result<Option<Cost>> {
        let (mut search, patience) = match known {
            Some(rate) => (Search::new(rate, NEAR, CEILING), SEARCH),
            None => (Search::new(GUESS, FAR, CEILING), FIRST_SEARCH),
        };
        let mut best: Option<Cost> = None;
        let deadline = Instant::now() + patience;
        while let Some(rate) = search.next().filter(|_| Instant::now() < deadline) {
            let cost = self.cost(Load::even(rate), DURATION)?;
            search.note(rate, cost.is_some());
            best = cost.filter(|_| search.found() == Some(rate)).or(best);
        }
        Ok(best)
    }

    /// Lets a load that nobody loses flow until all calls are relayed as they should. Returns what failed last, where
    /// patience ends.
    fn bring_back(&mut self, patience: Duration) -> Result<Option<Sample>> {
        let deadline = Instant::now() + patience;
        loop {
            let sample = self.trial(GENTLE, SHORT)?;
            if sample.trial.is_whole() && self.has_all_offloaded()? {
                return Ok(None);
            }
            if Instant::now() > deadline {
                return Ok(Some(sample));
            }
        }
    }

    /// Whether our relay has every stream offloaded. Other relays have nothing to offload.
    fn has_all_offloaded(&self) -> Result<bool> {
        let own = self.work.own.as_ref();
        own.map_or(Ok(true), Own::has_all_offloaded)
    }

    fn trial(&mut self, load: Load, duration: Duration) -> Result<Sample> {
        // Our relay leaves the first packet after a pause to the PBX.
        let lead = 2.0 * f64::from(self.traffic.streams()) / load.rate;
        self.traffic
            .run(load, Duration::from_secs_f64(lead), PHONES_CPU)?;
        let reasons_before = self.reasons()?;
        let before = self.cpu_time()?;
        let trial = self.traffic.run(load, duration, PHONES_CPU)?;
        let used = self.cpu_time()?.saturating_sub(before);
        let mut reasons = self.reasons()?;
        for (reason, before) in reasons_before {
            *reasons.entry(reason).or_default() -= before;
        }
        reasons.retain(|_, packets| *packets > 0);
        let relayed = reasons.get("relayed").copied().unwrap_or_default();
        let own = self.work.own.as_ref();
        Ok(Sample {
            load,
            trial,
            cost: Cost {
                rate: trial.rate(),
                per_packet: used.as_nanos() as f64 / trial.sent as f64,
                in_kernel: own.map(|_| relayed as f64 / trial.sent as f64),
            },
            reasons,
        })
    }

    /// Packets by reason until now, where the relay is ours.
    fn reasons(&self) -> Result<BTreeMap<String, u64>> {
        let own = self.work.own.as_ref();
        own.map_or_else(|| Ok(BTreeMap::new()), Own::reasons)
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
