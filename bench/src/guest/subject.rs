//! What is measured.

use std::{
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use relay_tests::{
    link::{Interface, NativeXdp},
    namespace::Process,
    program::swap_macs,
    relay::Relay,
};
use relay_user::{
    control::client::Client,
    pair::{Leg as PairLeg, Pair, Proof},
};
use serde::{Deserialize, Serialize};

use crate::rtpengine::Control;

use super::{
    cost::Payer,
    debian::Bookworm,
    pbx::Pbx,
    traffic::{Call, Leg, Way},
};

/// The relay's address, and those of the phones.
pub(super) const RELAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub(super) const PHONES: [Ipv4Addr; 2] =
    [Ipv4Addr::new(192, 0, 2, 11), Ipv4Addr::new(192, 0, 2, 12)];

/// Where rtpengine is controlled.
const CONTROL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 2223);

/// The kernel module's table that rtpengine uses.
const TABLE: u32 = 0;

/// How long a pair may take to be relayed, once its phones talk.
const PATIENCE: Duration = Duration::from_secs(5);

/// Something that brings packets back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Subject {
    /// XDP that swaps the MAC addresses
    Floor,
    /// Ours, with everything on
    Relay,
    /// rtpengine with its kernel module
    RtpengineKernel,
    /// rtpengine in userspace
    RtpengineUserspace,
}

/// One that runs, and the calls that it relays.
pub(super) struct Running {
    pub(super) calls: Vec<Call>,
    pub(super) way: Way,
    /// Its own threads, besides those that poll the interface.
    pub(super) payers: Vec<Payer>,
    kind: Kind,
}

enum Kind {
    Floor { _program: NativeXdp },
    Relay { relay: Relay, _pbx: Pbx },
    Rtpengine { process: Process, in_kernel: bool },
}

impl Subject {
    /// As a table shows it.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Floor => "swap MACs, XDP_TX (the floor)",
            Self::Relay => "ours, everything on",
            Self::RtpengineKernel => "rtpengine, kernel module",
            Self::RtpengineUserspace => "rtpengine, userspace",
        }
    }

    /// Starts it on an interface of this machine.
    pub(super) fn start(
        self,
        interface: &Interface,
        debian: &Bookworm,
        calls: usize,
    ) -> Result<Running> {
        match self {
            Self::Floor => floor(interface, calls),
            Self::Relay => relay(interface, calls),
            Self::RtpengineKernel => rtpengine(interface, debian, calls, true),
            Self::RtpengineUserspace => rtpengine(interface, debian, calls, false),
        }
    }
}

/// Calls with the addresses of the relay that they would have.
fn calls(count: usize) -> Vec<Call> {
    (0..count as u16)
        .map(|number| {
            [0, 1].map(|side| {
                let port = 10_000 + 4 * number + 2 * side;
                Leg {
                    local: SocketAddrV4::new(RELAY, port),
                    remote: SocketAddrV4::new(PHONES[usize::from(side)], port),
                }
            })
        })
        .collect()
}

fn floor(interface: &Interface, count: usize) -> Result<Running> {
    Ok(Running {
        calls: calls(count),
        way: Way::Back,
        payers: vec![],
        kind: Kind::Floor {
            _program: interface.attach(&swap_macs())?,
        },
    })
}

fn relay(interface: &Interface, count: usize) -> Result<Running> {
    let calls = calls(count);
    let relay = Relay::attach(&interface.host, &interface.name, ["--mode", "native"])?;
    let client = Client::new(relay.socket());
    runtime()?.block_on(async {
        for call in &calls {
            let legs = call.map(|Leg { local, remote }| format!("{local}={remote}"));
            let [first, second] = legs.map(|leg| leg.parse::<PairLeg>());
            let pair = Pair::new([first?, second?], vec![], Proof::Wire)?;
            client.add(&pair).await?;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    let pbx = Pbx::start(&calls)?;
    Ok(Running {
        calls,
        way: Way::Across,
        payers: vec![Payer::Process(relay.id()), Payer::Thread(pbx.task())],
        kind: Kind::Relay { relay, _pbx: pbx },
    })
}

fn rtpengine(
    interface: &Interface,
    debian: &Bookworm,
    count: usize,
    in_kernel: bool,
) -> Result<Running> {
    let log = File::create("/run/rtpengine.log")?;
    let mut command = debian.command("rtpengine");
    let table = if in_kernel {
        TABLE.to_string()
    } else {
        "-1".to_owned()
    };
    command
        .args([
            "--foreground",
            "--log-stderr",
            "--log-level=4",
            "--no-fallback",
        ])
        .arg(format!("--table={table}"))
        .arg(format!("--interface={RELAY}"))
        .arg(format!("--listen-ng={CONTROL}"))
        // By default also at ::1, and there is no IPv6.
        .arg("--listen-cli=127.0.0.1:2224")
        // It would wait for three seconds of packets before it trusts where they come from.
        .arg("--endpoint-learning=immediate")
        .args(["--port-min=20000", "--port-max=29999"])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let process = interface.host.spawn(command)?;
    let set_up = || -> Result<_> {
        let mut control = Control::connect(CONTROL)?;
        let mut calls = calls(count);
        for (number, call) in calls.iter_mut().enumerate() {
            let locals = control.call(number, call.map(|leg| leg.remote))?;
            for (leg, local) in call.iter_mut().zip(locals) {
                leg.local = local;
            }
        }
        Ok(calls)
    };
    let calls = set_up().with_context(|| {
        fs::read_to_string("/run/rtpengine.log").unwrap_or_else(|error| error.to_string())
    })?;
    Ok(Running {
        calls,
        way: Way::Across,
        payers: vec![Payer::Process(process.id())],
        kind: Kind::Rtpengine { process, in_kernel },
    })
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

impl Running {
    /// Waits until every call is relayed by what is measured, once its phones have talked.
    pub(super) fn wait_relayed(&self) -> Result<()> {
        let Kind::Relay { relay, .. } = &self.kind else {
            return Ok(());
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = relay.json(["list"])?;
            let pairs = status["pairs"].as_array().context("a list without pairs")?;
            let offloaded = pairs
                .iter()
                .filter(|pair| pair["state"] == "offloaded")
                .count();
            if offloaded == self.calls.len() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!(
                    "{offloaded} of {} calls are offloaded: {status:#}",
                    self.calls.len()
                );
            }
        }
    }

    /// Packets that it says it has relayed until now; none where it does not count them.
    pub(super) fn relayed(&self) -> Result<Option<u64>> {
        match &self.kind {
            Kind::Floor { .. } => Ok(None),
            Kind::Relay { relay, .. } => Ok(relay.reasons()?.get("relayed").copied()),
            Kind::Rtpengine { in_kernel, .. } => in_kernel.then(kernel_packets).transpose(),
        }
    }

    /// Ends it.
    pub(super) fn stop(self) -> Result<()> {
        match self.kind {
            Kind::Floor { .. } => Ok(()),
            Kind::Rtpengine { process, in_kernel } => {
                drop(process);
                if in_kernel {
                    // It leaves its calls in the module, which would go on relaying them.
                    fs::write("/proc/rtpengine/control", format!("del {TABLE}\n"))
                        .context("remove rtpengine's table")?;
                }
                Ok(())
            }
            Kind::Relay { relay, .. } => relay.stop(),
        }
    }
}

/// Packets that rtpengine's kernel module has relayed, by its own list.
fn kernel_packets() -> Result<u64> {
    let path = format!("/proc/rtpengine/{TABLE}/list");
    let list = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    Ok(packets_in(&list))
}

/// The sum of all lines such as `stats: 22188 bytes, 129 packets, 0 errors`.
fn packets_in(list: &str) -> u64 {
    let packets = |line: &str| {
        let counts = line.trim().strip_prefix("stats:")?;
        let packets = counts.split(',').nth(1)?.trim().strip_suffix(" packets")?;
        packets.parse::<u64>().ok()
    };
    list.lines().filter_map(packets).sum()
}

#[cfg(test)]
mod tests {
    use super::packets_in;

    #[test]
    fn packets_of_the_module_are_those_of_all_its_streams() {
        let list = "local inet4 192.0.2.1:20104\n\
             \x20   stats:                22188 bytes,                  129 packets,                    0 errors\n\
             \x20       RTP payload type   0:                22188 bytes,                  129 packets\n\
             local inet4 192.0.2.1:20120\n\
             \x20   stats:                172 bytes,                  1 packets,                    0 errors\n";
        assert_eq!(packets_in(list), 130);
        assert_eq!(packets_in(""), 0);
    }
}
