//! What runs in the guest: every subject in turn on the same pair of interfaces.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use relay_tests::{
    link::Interface,
    namespace::{Host, Process},
    topology::{Direct, PBX_V4},
};
use serde::{Deserialize, Serialize};

use super::{
    cost::{self, Pollers},
    debian::Bookworm,
    subject::{Running, Subject},
    traffic::{PACKET_TIME, Phones, Traffic},
};

/// Arguments of what runs in the guest.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// What to measure
    #[arg(long, required = true)]
    pub(super) subject: Vec<Subject>,
    /// Packets per second
    #[arg(long, required = true)]
    pub(super) rate: Vec<u32>,
    /// Folder of the Debian that the kernel is of
    #[arg(long)]
    pub(super) debian: PathBuf,
    /// File for the samples
    #[arg(long)]
    pub(super) samples: PathBuf,
}

/// What a subject cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Sample {
    pub(super) subject: Subject,
    /// Packets per second.
    pub(super) rate: u32,
    /// Packets that were counted.
    pub(super) packets: u64,
    /// These, and those just before.
    pub(super) sent: u64,
    /// Of all that were sent, those that the subject says that it relayed; none where it does not count them.
    pub(super) relayed: Option<u64>,
    /// CPU time of the thread that polls what the interface receives, ns.
    pub(super) receiving: u64,
    /// CPU time of the thread that releases what it has sent, ns.
    pub(super) releasing: u64,
    /// CPU time of the subject's own threads, ns.
    pub(super) beside: u64,
}

/// Packets of each stream that tell a relay what it needs to know, and whose cost does not count.
const FIRST: u64 = 25;
/// Packets of each stream before the counted ones, without a pause.
const LEAD: u64 = 5;
/// Counted packets of each stream.
const COUNTED: u64 = 100;

/// How long an interface may take to come up.
const PATIENCE: Duration = Duration::from_secs(5);

/// Measures, and writes the samples.
pub(crate) fn run(options: &Options) -> Result<()> {
    let host = Host::this("guest")?;
    let debian = Bookworm::at(options.debian.clone());
    let busy = keep_busy(&host)?;
    prepare(&host, &debian)?;
    let [interface, far] = wire(&host)?;
    drop(busy);
    let mut samples = Vec::new();
    for rate in &options.rate {
        for subject in &options.subject {
            let sample = measure(*subject, *rate, &debian, &interface, &far);
            let sample = sample.with_context(|| format!("{subject:?} at {rate} packets/s"))?;
            samples.push(sample);
        }
    }
    fs::write(&options.samples, serde_json::to_vec(&samples)?)?;
    Ok(())
}

/// Gives the guest something to do whenever it has nothing to do, until the returned guard is dropped. While it waits
/// for a file its clock would leap from timer to timer, and whoever else waits would lose patience.
fn keep_busy(host: &Host) -> Result<Process> {
    let mut command = Command::new("chrt");
    command.args(["--idle", "0", "sh", "-c", "while :; do :; done"]);
    host.spawn(command)
}

/// Loads what the kernel has as modules, and has rtpengine's see all RTP.
fn prepare(host: &Host, debian: &Bookworm) -> Result<()> {
    debian.mount()?;
    for line in [
        "modprobe --all sch_ingress cls_bpf iptable_filter xt_RTPENGINE",
        "iptables-legacy -I INPUT -p udp -j RTPENGINE --id 0",
    ] {
        let mut words = line.split(' ');
        let mut command = debian.command(words.next().unwrap_or_default());
        command.args(words);
        host.output(command)?;
    }
    Ok(())
}

/// Sets both ends of the wire up: the relay's, and the phones', which has no address at all.
fn wire(host: &Host) -> Result<[Interface; 2]> {
    for scope in ["all", "default"] {
        host.sysctl(&format!("net/ipv6/conf/{scope}/disable_ipv6"), "1")?;
    }
    host.ip("link set lo up\nlink set eth0 up\nlink set eth1 up")?;
    host.ip(&format!("address add {PBX_V4}/24 dev eth0"))?;
    let [interface, far] = ["eth0", "eth1"].map(|name| Interface::of(host, name));
    let (interface, far) = (interface?, far?);
    let mac = far.mac()?.map(|byte| format!("{byte:02x}")).join(":");
    for phone in [0, 1].map(Direct::phone_v4) {
        host.ip(&format!(
            "neighbour add {phone} lladdr {mac} dev eth0 nud permanent"
        ))?;
    }
    for name in ["eth0", "eth1"] {
        let state = format!("/sys/class/net/{name}/operstate");
        let start = Instant::now();
        while fs::read_to_string(&state)?.trim() != "up" {
            ensure!(start.elapsed() < PATIENCE, "{name} does not come up");
            thread::sleep(Duration::from_millis(1));
        }
        fs::write(format!("/sys/class/net/{name}/threaded"), "1")?;
    }
    Ok([interface, far])
}

fn measure(
    subject: Subject,
    rate: u32,
    debian: &Bookworm,
    interface: &Interface,
    far: &Interface,
) -> Result<Sample> {
    let calls = (f64::from(rate) * PACKET_TIME.as_secs_f64() / 2.0) as u16;
    let busy = keep_busy(&interface.host)?;
    let running = subject.start(interface, debian, calls)?;
    let phones = Phones::open(far, interface)?;
    let mut first = Traffic::of(&running.calls, running.way, 0..FIRST, &phones);
    let count = first.len();
    phones.play(&mut first, 0..count)?;
    phones.wait(&mut first, count)?;
    running.wait_relayed()?;
    drop(busy);
    let sample = counted(subject, rate, interface, &phones, &running);
    let stopped = running.stop();
    let sample = sample?;
    stopped?;
    Ok(sample)
}

fn counted(
    subject: Subject,
    rate: u32,
    interface: &Interface,
    phones: &Phones,
    running: &Running,
) -> Result<Sample> {
    let pollers = Pollers::of(&interface.name)?;
    let costs = || -> Result<[u64; 3]> {
        let polling = [&pollers.receive, &pollers.release].map(|threads| cost::time_of(threads));
        let [receiving, releasing] = polling;
        Ok([receiving?, releasing?, running.workers.time()?])
    };
    let numbers = FIRST..FIRST + LEAD + COUNTED;
    let mut traffic = Traffic::of(&running.calls, running.way, numbers, phones);
    let lead = 2 * running.calls.len() * LEAD as usize;
    let all = traffic.len();
    let relayed = running.relayed()?;
    phones.play(&mut traffic, 0..lead)?;
    let before = costs()?;
    phones.play(&mut traffic, lead..all)?;
    phones.wait(&mut traffic, all)?;
    let after = costs()?;
    let [receiving, releasing, beside] = [0, 1, 2].map(|which| after[which] - before[which]);
    Ok(Sample {
        subject,
        rate,
        packets: (all - lead) as u64,
        sent: all as u64,
        relayed: running
            .relayed()?
            .zip(relayed)
            .map(|(after, before)| after - before),
        receiving,
        releasing,
        beside,
    })
}
