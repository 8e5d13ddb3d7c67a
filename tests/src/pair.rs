//! Both ends of a pair: its phones, and the sockets of a PBX that only listens, so that what the relay leaves to the
//! PBX is seen there.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    phone::{Bank, Phone, Talk},
    relay::Relay,
    topology::{Direct, PBX_V4, PBX_V6, Routed},
};

/// Payload types of every pair here: G.711, and events that the legs number differently.
const PAYLOAD_TYPES: &str = "0,101:96";
/// Between two packets of one phone: ten times as fast as a call, for short tests.
const FAST: Duration = Duration::from_millis(2);
/// How long packets may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// The addresses of a pair: where the PBX receives, and where the phones do.
#[derive(Clone, Copy, Debug)]
pub struct Legs {
    /// Ports 10000 and 10002 of the PBX.
    pub local: [SocketAddr; 2],
    /// Ports 30000 and 30002 of the phones.
    pub remote: [SocketAddr; 2],
}

impl Legs {
    fn new(pbx: IpAddr, phone: fn(u8) -> IpAddr) -> Self {
        Self {
            local: [10_000, 10_002].map(|port| SocketAddr::new(pbx, port)),
            remote: [(0, 30_000), (1, 30_002)]
                .map(|(number, port)| SocketAddr::new(phone(number), port)),
        }
    }

    /// Phones 0 and 1 of [`Direct`], over IPv4 and over IPv6.
    pub fn direct() -> [Self; 2] {
        [
            Self::new(PBX_V4, Direct::phone_v4),
            Self::new(PBX_V6, Direct::phone_v6),
        ]
    }

    /// Phones 0 and 1 of [`Routed`], over IPv4 and over IPv6.
    pub fn routed() -> [Self; 2] {
        [
            Self::new(PBX_V4, Routed::phone_v4),
            Self::new(PBX_V6, Routed::phone_v6),
        ]
    }

    /// Arguments of `relay-user add`: payload type 0, and 101 on the first leg, which is 96 on the second.
    pub fn arguments(&self) -> [String; 4] {
        let [first, second] = [0, 1].map(|leg| format!("{}={}", self.local[leg], self.remote[leg]));
        [
            first,
            second,
            "--payload-type".to_owned(),
            PAYLOAD_TYPES.to_owned(),
        ]
    }
}

/// The sockets of a pair.
#[derive(Debug)]
pub struct Sockets {
    /// Its addresses.
    pub legs: Legs,
    /// The phones, by leg.
    pub phones: [Phone; 2],
    /// The PBX's sockets, by leg.
    pub pbx: [Phone; 2],
}

impl Sockets {
    /// Opens them.
    ///
    /// # Errors
    /// An address is not of its machine, or taken.
    pub fn open(legs: Legs, phones: &Bank, pbx: &Bank) -> Result<Self> {
        let open = |bank: &Bank, [first, second]: [SocketAddr; 2]| -> Result<_> {
            Ok([bank.phone(first)?, bank.phone(second)?])
        };
        Ok(Self {
            legs,
            phones: open(phones, legs.remote)?,
            pbx: open(pbx, legs.local)?,
        })
    }

    /// Has the pair relayed; returns its number.
    ///
    /// # Errors
    /// See [`Relay::offload`].
    pub fn offload(&self, relay: &Relay) -> Result<u64> {
        relay.offload(self.legs.arguments())
    }

    /// The phone of a leg begins to send, ten times as fast as in a call.
    pub fn talk(&self, leg: usize, payload_type: u8, count: Option<u64>) {
        self.phones[leg].talk(Talk {
            payload_type,
            interval: FAST,
            count,
            ..Talk::to(self.legs.local[leg], 100 + leg as u32)
        });
    }

    /// Waits until the other phone has received `count` packets in all.
    ///
    /// # Errors
    /// It does not.
    pub fn relayed(&self, leg: usize, count: usize) -> Result<()> {
        let waited = self.phones[1 - leg].wait_received(count, PATIENCE);
        waited.context("relayed packets")
    }

    /// Waits until the PBX's socket of the leg has received `count` packets in all.
    ///
    /// # Errors
    /// It does not.
    pub fn passed(&self, leg: usize, count: usize) -> Result<()> {
        let waited = self.pbx[leg].wait_received(count, PATIENCE);
        waited.context("packets left to the PBX")
    }

    /// Packets that both of the PBX's sockets have received until now.
    pub fn at_pbx(&self) -> usize {
        self.pbx.iter().map(|socket| socket.arrivals().len()).sum()
    }

    /// Silences the phone of a leg and tells where its packets went: runs of packets that went the same way, true to
    /// the other phone, false to the PBX.
    ///
    /// # Errors
    /// A packet was lost, damaged, or came twice.
    pub fn fate(&self, leg: usize) -> Result<Vec<(bool, usize)>> {
        let from = &self.phones[leg];
        from.hush();
        let sent = from.sent() as usize;
        let ends = [(&self.phones[1 - leg], true), (&self.pbx[leg], false)];
        let deadline = Instant::now() + PATIENCE;
        loop {
            let there: usize = ends.iter().map(|(end, _)| end.arrivals().len()).sum();
            if there >= sent {
                break;
            }
            if Instant::now() > deadline {
                bail!(
                    "of {sent} packets of {} only {there} came anywhere",
                    from.local()
                );
            }
            thread::sleep(Duration::from_millis(1));
        }
        let mut fate = BTreeMap::new();
        for (end, relayed) in ends {
            for arrival in end.arrivals() {
                let stamp = arrival
                    .stamp
                    .with_context(|| format!("damaged: {arrival:?}"))?;
                if fate.insert(stamp.number, relayed).is_some() {
                    bail!("packet {} of {} came twice", stamp.number, from.local());
                }
            }
        }
        let mut runs = Vec::<(bool, usize)>::new();
        for relayed in fate.into_values() {
            match runs.last_mut() {
                Some((last, length)) if *last == relayed => *length += 1,
                _ => runs.push((relayed, 1)),
            }
        }
        Ok(runs)
    }
}
