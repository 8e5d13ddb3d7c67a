//! What is measured.

use std::{
    fs,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use relay_tests::{
    link::Interface,
    program::{self, Kind},
    relay::Relay,
};
use relay_user::{
    control::client::Client,
    pair::{Leg, Pair, Proof},
};
use serde::{Deserialize, Serialize};

use super::{cost::Workers, debian::Bookworm};
use crate::{
    peer::{
        batched::Batched,
        rtpengine::{Rtpengine, WITHOUT_MODULE},
        swap::swap_macs,
    },
    wire::call::{Call, Way, between_phones},
};

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
    pub(super) workers: Workers,
    work: Work,
}

/// What it is made of. Dropping it ends it.
enum Work {
    Floor { _link: OwnedFd },
    Relay { relay: Relay, _pbx: Batched },
    Rtpengine { daemon: Rtpengine, in_kernel: bool },
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
        calls: u16,
    ) -> Result<Running> {
        let calls = between_phones(calls);
        match self {
            Self::Floor => floor(interface, calls),
            Self::Relay => relay(interface, calls),
            Self::RtpengineKernel => rtpengine(interface, debian, &calls, true),
            Self::RtpengineUserspace => rtpengine(interface, debian, &calls, false),
        }
    }
}

fn floor(interface: &Interface, calls: Vec<Call>) -> Result<Running> {
    let program = program::load(Kind::Xdp, &swap_macs())?;
    Ok(Running {
        calls,
        way: Way::Mirrored,
        workers: Workers::default(),
        work: Work::Floor {
            _link: interface.attach_xdp(&program)?,
        },
    })
}

fn relay(interface: &Interface, calls: Vec<Call>) -> Result<Running> {
    let relay = Relay::attach(&interface.host, &interface.name, ["--mode", "native"])?;
    let client = Client::new(relay.socket());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        for call in &calls {
            let [first, second] =
                call.map(|leg| format!("{}={}", leg.local, leg.remote).parse::<Leg>());
            let pair = Pair::new([first?, second?], vec![], Proof::Wire)?;
            client.add(&pair).await?;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    // The guest has one CPU.
    let pbx = Batched::start(&interface.host, &calls, 0)?;
    Ok(Running {
        calls,
        way: Way::Relayed,
        workers: Workers {
            processes: vec![relay.id()],
            threads: vec![pbx.thread()],
        },
        work: Work::Relay { relay, _pbx: pbx },
    })
}

fn rtpengine(
    interface: &Interface,
    debian: &Bookworm,
    calls: &[Call],
    in_kernel: bool,
) -> Result<Running> {
    let table = format!("--table={TABLE}");
    let settings = [
        if in_kernel { &*table } else { WITHOUT_MODULE },
        "--no-fallback",
        // It would wait for three seconds of packets before it trusts where they come from.
        "--endpoint-learning=immediate",
        // By default it listens at ::1 as well, and there is no IPv6.
        "--listen-cli=127.0.0.1:2224",
    ];
    let mut daemon = Rtpengine::start_from(debian.root(), &interface.host, &settings)?;
    let calls = calls.iter().enumerate();
    let calls = calls.map(|(number, call)| daemon.call(number, call.map(|leg| leg.remote)));
    Ok(Running {
        calls: calls.collect::<Result<_>>()?,
        way: Way::Relayed,
        workers: Workers {
            processes: vec![daemon.id()],
            threads: vec![],
        },
        work: Work::Rtpengine { daemon, in_kernel },
    })
}

impl Running {
    /// Waits until every call is relayed by what is measured, once its phones have talked.
    pub(super) fn wait_relayed(&self) -> Result<()> {
        let Work::Relay { relay, .. } = &self.work else {
            return Ok(());
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let list = relay.json(["list"])?;
            let pairs = list["pairs"].as_array().context("a list without pairs")?;
            let offloaded = pairs.iter().filter(|pair| pair["state"] == "offloaded");
            let offloaded = offloaded.count();
            if offloaded == self.calls.len() {
                return Ok(());
            }
            if Instant::now() > deadline {
                let all = self.calls.len();
                bail!("{offloaded} of {all} calls are offloaded: {list:#}");
            }
        }
    }

    /// Packets that it says it has relayed in the kernel until now; none where it does not count them.
    pub(super) fn relayed(&self) -> Result<Option<u64>> {
        match &self.work {
            Work::Floor { .. } => Ok(None),
            Work::Relay { relay, .. } => Ok(relay.reasons()?.get("relayed").copied()),
            Work::Rtpengine { in_kernel, .. } => in_kernel.then(kernel_packets).transpose(),
        }
    }

    /// Ends it.
    pub(super) fn stop(self) -> Result<()> {
        match self.work {
            Work::Floor { .. } => Ok(()),
            Work::Relay { relay, .. } => relay.stop(),
            Work::Rtpengine { daemon, in_kernel } => {
                drop(daemon);
                if in_kernel {
                    // It leaves its calls in the module, which would go on relaying them.
                    fs::write("/proc/rtpengine/control", format!("del {TABLE}\n"))
                        .context("remove rtpengine's table")?;
                }
                Ok(())
            }
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
