//! What is measured.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use relay_tests::{
    link::{Interface, NativeXdp},
    program::swap_macs,
    relay::Relay,
};
use relay_user::{
    control::client::Client,
    pair::{Leg as PairLeg, Pair, Proof},
};
use serde::{Deserialize, Serialize};

use super::{
    cost::Payer,
    pbx::Pbx,
    traffic::{Call, Leg, Way},
};

/// The relay's address, and those of the phones.
pub(super) const RELAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub(super) const PHONES: [Ipv4Addr; 2] =
    [Ipv4Addr::new(192, 0, 2, 11), Ipv4Addr::new(192, 0, 2, 12)];

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
}

impl Subject {
    /// Starts it on an interface of this machine.
    pub(super) fn start(self, interface: &Interface, calls: usize) -> Result<Running> {
        match self {
            Self::Floor => floor(interface, calls),
            Self::Relay => relay(interface, calls),
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
        }
    }

    /// Ends it.
    pub(super) fn stop(self) -> Result<()> {
        match self.kind {
            Kind::Floor { .. } => Ok(()),
            Kind::Relay { relay, .. } => relay.stop(),
        }
    }
}
