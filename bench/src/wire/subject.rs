//! What is measured: ways to relay, each with a network of its own.

use std::{
    any::Any,
    os::fd::OwnedFd,
    process,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::unistd::Pid;
use relay_tests::{
    link::Interface,
    program::{self, Kind},
    relay::Relay,
    topology::Direct,
};

use relay_user::{
    control::client::Client,
    pair::{self, Pair, Proof},
};

use super::{
    PHONES_CPU, RELAY_CPU,
    call::{self, Call, Way},
    cpu,
    traffic::Traffic,
};
use crate::peer::{
    batched::Batched, nftables, per_call::PerCall, rtpengine::Rtpengine, swap::swap_macs,
};

/// How often the receiver looks whether something has come: as if it were a NIC, nobody who sends has to wake it up.
const POLL: Duration = Duration::from_micros(50);

/// A way to relay, ready to be measured.
pub(crate) struct Subject {
    pub(crate) name: &'static str,
    pub(crate) traffic: Traffic,
    /// The kernel's thread that receives for the relay.
    receiver: Pid,
    work: Work,
    _net: Direct,
}

/// What runs besides the thread that receives.
struct Work {
    threads: Vec<Pid>,
    processes: Vec<u32>,
    /// Ends it when dropped.
    _guard: Box<dyn Any>,
}

impl Work {
    /// None that takes CPU time.
    fn none(guard: impl Any) -> Self {
        Self {
            threads: Vec::new(),
            processes: Vec::new(),
            _guard: Box::new(guard),
        }
    }
}

impl Subject {
    /// CPU time of the relay until now: what the kernel does to receive, and its threads and processes.
    pub(crate) fn cpu_time(&self) -> Result<Duration> {
        let mut sum = cpu::time_of(self.receiver)?;
        for &thread in &self.work.threads {
            sum += cpu::time_of(thread)?;
        }
        for &process in &self.work.processes {
            sum += cpu::time_of_process(process)?;
        }
        Ok(sum)
    }

    fn new(
        name: &'static str,
        calls: u16,
        way: Way,
        start: impl FnOnce(&Direct, &mut [Call]) -> Result<Work>,
    ) -> Result<Self> {
        let net = network()?;
        let mut calls = call::between_phones(calls);
        let work = start(&net, &mut calls).with_context(|| name)?;
        Self::ready(name, net, &calls, way, work).with_context(|| name)
    }

    /// Has both ends received by threads of their own, and the relay run where it is to be measured.
    fn ready(
        name: &'static str,
        net: Direct,
        calls: &[Call],
        way: Way,
        work: Work,
    ) -> Result<Self> {
        let mut traffic = Traffic::new(&net.phones_interface)?;
        traffic.plan(&call::streams(calls, way))?;
        let (pbx, phones) = (&net.pbx_interface, &net.phones_interface);
        let receiver = pbx.receive_by_thread()?;
        for (thread, cpu) in [
            (receiver, RELAY_CPU),
            (phones.receive_by_thread()?, PHONES_CPU),
        ] {
            cpu::pin(thread, cpu)?;
            cpu::put_first(thread)?;
        }
        phones.poll_every(POLL)?;
        for &process in &work.processes {
            cpu::pin_process(process, RELAY_CPU)?;
        }
        let mut subject = Self {
            name,
            traffic,
            receiver,
            work,
            _net: net,
        };
        // Addresses are resolved, streams proven, connections known.
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let trial = subject
                .traffic
                .run(5e3, Duration::from_millis(500), PHONES_CPU)?;
            if trial.is_whole() {
                return Ok(subject);
            }
            if Instant::now() > deadline {
                bail!("not all is relayed: {trial:?}");
            }
        }
    }
}

/// All of them, at work, each on a cable of its own.
pub(crate) fn all(calls: u16) -> Result<Vec<Subject>> {
    let ours = |name, mode: &'static str| {
        Subject::new(name, calls, Way::Relayed, move |net, calls| {
            let pbx = PerCall::start(&net.pbx, calls, RELAY_CPU)?;
            let relay = Relay::attach(
                &net.pbx,
                &net.pbx_interface.name,
                ["--mode", mode, "--expire", "86400"],
            )?;
            net.pbx.run(|| add(&relay, calls))?;
            Ok(Work {
                threads: pbx.threads().to_vec(),
                processes: vec![relay.id()],
                _guard: Box::new((relay, pbx)),
            })
        })
    };
    Ok(vec![
        Subject::new("swap", calls, Way::Mirrored, |net, _| {
            Ok(Work::none(swap(&net.pbx_interface)?))
        })?,
        ours("ours, native", "native")?,
        ours("ours, generic", "generic")?,
        ours("ours, TC", "tc")?,
        Subject::new("nftables", calls, Way::Relayed, |net, calls| {
            nftables::forward(&net.pbx, calls)?;
            Ok(Work::none(()))
        })?,
        Subject::new("per call", calls, Way::Relayed, |net, calls| {
            let relay = PerCall::start(&net.pbx, calls, RELAY_CPU)?;
            Ok(Work {
                threads: relay.threads().to_vec(),
                processes: vec![],
                _guard: Box::new(relay),
            })
        })?,
        Subject::new("batched", calls, Way::Relayed, |net, calls| {
            let relay = Batched::start(&net.pbx, calls, RELAY_CPU)?;
            Ok(Work {
                threads: vec![relay.thread()],
                processes: vec![],
                _guard: Box::new(relay),
            })
        })?,
        Subject::new("rtpengine", calls, Way::Relayed, |net, calls| {
            let mut rtpengine = Rtpengine::start(&net.pbx)?;
            for (number, call) in calls.iter_mut().enumerate() {
                *call = rtpengine.call(number, call.map(|leg| leg.remote))?;
            }
            Ok(Work {
                threads: vec![],
                processes: vec![rtpengine.id()],
                _guard: Box::new(rtpengine),
            })
        })?,
    ])
}

/// Tells the relay of the calls, which it then proves on the wire.
fn add(relay: &Relay, calls: &[Call]) -> Result<()> {
    let client = Client::new(relay.socket());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        for call in calls {
            let leg = |side: usize| -> Result<pair::Leg> { Ok(call[side].to_string().parse()?) };
            let pair = Pair::new([leg(0)?, leg(1)?], vec![], Proof::Wire)?;
            client.add(&pair).await?;
        }
        Ok(())
    })
}

/// Two machines on a cable whose ends have names that no other interface has.
fn network() -> Result<Direct> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let names = ["r", "p"].map(|end| format!("{end}{}x{number}", process::id()));
    Direct::named(2, names.each_ref().map(String::as_str))
}

/// Attaches the floor.
fn swap(interface: &Interface) -> Result<OwnedFd> {
    let program = program::load(Kind::Xdp, &swap_macs())?;
    interface.attach_xdp(&program)
}
