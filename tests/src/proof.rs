//! A stream on its way from the phone through the relay, the PBX and the observer, with programs that run in memory or
//! in the kernel: what a proof is tried on. [`fuzz`] tries it on PBXs that do as they please.

pub mod fuzz;

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context as _, Result};
use relay_common::{
    checksum::PartialChecksum,
    packet::{Frame, Tables as _},
    proof::observe,
    reason::{Reason, Verdict},
    relay::relay,
    stream::{
        DSCP_EF, Endpoint, Event, NextHop, PAYLOAD_TYPES, PayloadType, State, StreamSpec, ticks,
    },
    wire::Mac,
};

use crate::{
    fixture::{Hook, SECOND},
    kernel::{self, Kernel, show, show_observer},
    tables::{Entry, MemoryTables, NOW, later},
};

/// Slot of the stream, and of the opposite one.
pub const SLOTS: [u32; 2] = [0, 1];

/// Where the phone sends from.
pub const PHONE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 11), 30_000);
/// Where the PBX receives.
pub const IN: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 10_000);
/// Where it sends from.
pub const OUT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 10_002);
/// Where the other phone is.
pub const FAR: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 12), 30_002);

/// Between two packets of voice, ns.
pub const PACKET_TIME: u64 = SECOND / 50;

/// The stream, watched, and the opposite one.
#[must_use]
pub fn streams(proof: u8) -> [Entry; 2] {
    let endpoint = |address: SocketAddrV4| Endpoint {
        address: (*address.ip()).into(),
        port: address.port(),
    };
    let stream = |leg: u8, [source, local, new_source, new_destination]: [SocketAddrV4; 4]| {
        let stream = StreamSpec {
            source: endpoint(source),
            local: endpoint(local),
            sends_from: endpoint(local),
            new_source: endpoint(new_source),
            new_destination: endpoint(new_destination),
            next_hop: NextHop {
                destination_mac: Mac { bytes: [6; 6] },
                source_mac: Mac { bytes: [2; 6] },
                mtu: 1500,
                ..NextHop::default()
            },
            dscp: DSCP_EF,
            slot: SLOTS[usize::from(leg)],
            keepalive: 0,
            pair: 1,
            is_ami: true,
            proof,
            priority: 0,
            own_priority: false,
        };
        let state = State {
            epoch: 1,
            payload_types: [PayloadType::UNUSED; PAYLOAD_TYPES],
            ..State::default()
        };
        Entry { stream, state }
    };
    [
        stream(0, [PHONE, IN, OUT, FAR]),
        stream(1, [FAR, OUT, IN, PHONE]),
    ]
}

/// A frame with a datagram, without a checksum. Written here in the plainest way, for there are millions.
#[must_use]
pub fn frame(source: SocketAddrV4, destination: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADERS + payload.len());
    frame.extend([2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 8, 0]);
    let length = payload.len() as u16;
    frame.extend([0x45, 0]);
    frame.extend((length + 28).to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    frame.extend(source.ip().octets());
    frame.extend(destination.ip().octets());
    frame.extend(source.port().to_be_bytes());
    frame.extend(destination.port().to_be_bytes());
    frame.extend((length + 8).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

/// Bytes before the payload in a [`frame`].
pub const HEADERS: usize = 14 + 20 + 8;

/// Where IP addresses, ports and lengths begin in a [`frame`].
pub const ADDRESSES: usize = 14 + 12;

/// Both programs and what they share.
pub trait Programs {
    /// Starts anew with these streams.
    ///
    /// # Errors
    /// They do not fit.
    fn begin(&mut self, entries: &[Entry]) -> Result<()>;

    /// Lets time pass, ns.
    fn wait(&mut self, time: u64);

    /// A frame comes in. Some when it is relayed: as what.
    ///
    /// # Errors
    /// The program does not run.
    fn receive(&mut self, frame: &[u8]) -> Result<Option<Vec<u8>>>;

    /// A frame leaves. Whether it is let out.
    ///
    /// # Errors
    /// The program does not run.
    fn leave(&mut self, frame: &[u8]) -> Result<bool>;

    /// How a stream fares.
    ///
    /// # Errors
    /// There is no such slot.
    fn state(&mut self, slot: u32) -> Result<State>;

    /// The controller sets a stream's epoch.
    ///
    /// # Errors
    /// There is no such slot.
    fn set_epoch(&mut self, slot: u32, epoch: u32) -> Result<()>;
}

/// The programs in memory.
#[derive(Debug)]
pub struct Host {
    /// Their maps.
    pub tables: MemoryTables,
    /// What was made of the last frame that came in, or left; none for one that no program cares for.
    pub reason: Option<Reason>,
}

impl Host {
    /// With these streams.
    #[must_use]
    pub fn new(entries: &[Entry]) -> Self {
        Self {
            tables: MemoryTables::new(entries, SLOTS.len() as u32),
            reason: None,
        }
    }

    /// What was reported since the last call.
    pub fn take_events(&self) -> Vec<Event> {
        self.tables.take_events()
    }
}

impl Programs for Host {
    fn begin(&mut self, entries: &[Entry]) -> Result<()> {
        *self = Self::new(entries);
        Ok(())
    }

    fn wait(&mut self, time: u64) {
        self.tables.set_now(self.tables.now() + time);
    }

    fn receive(&mut self, frame: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut after = frame.to_vec();
        let decision = relay(
            &mut Frame::new(&mut after, PartialChecksum::Lost),
            &self.tables,
        );
        self.reason = Some(decision.reason);
        Ok((decision.verdict == Verdict::Send).then_some(after))
    }

    fn leave(&mut self, frame: &[u8]) -> Result<bool> {
        let mut bytes = frame.to_vec();
        let mut packet = Frame::new(&mut bytes, PartialChecksum::Kept);
        self.reason = observe(&mut packet, &self.tables);
        Ok(self.reason.map(Reason::verdict) != Some(Verdict::Drop))
    }

    fn state(&mut self, slot: u32) -> Result<State> {
        self.tables.state_of(slot).context("no such slot")
    }

    fn set_epoch(&mut self, slot: u32, epoch: u32) -> Result<()> {
        self.tables.change(slot, |state| state.epoch = epoch);
        Ok(())
    }
}

/// The programs in the kernel. Time passes only as it does on the [`Host`]: the states are put on the real clock
/// whenever a program runs.
pub struct InKernel {
    kernel: Kernel,
    /// The time that it stands for, ns.
    time: u64,
    /// Ticks that the states are ahead of that time.
    ahead: u32,
}

impl InKernel {
    /// Loads them.
    ///
    /// # Errors
    /// The kernel refuses them.
    pub fn load() -> Result<Self> {
        Ok(Self {
            kernel: Kernel::load(Hook::NativeXdp, SLOTS.len() as u32)?,
            time: NOW,
            ahead: 0,
        })
    }

    /// What was reported since the last call.
    ///
    /// # Errors
    /// See [`Kernel::take_events`].
    pub fn take_events(&mut self) -> Result<Vec<Event>> {
        self.kernel.take_events()
    }

    fn catch_up(&mut self) -> Result<()> {
        let ahead = ticks(kernel::now()?).wrapping_sub(ticks(self.time));
        for slot in SLOTS {
            let state = self.kernel.state(slot)?.context("no such slot")?;
            let state = later(state, ahead.wrapping_sub(self.ahead));
            self.kernel.set_state(slot, state)?;
        }
        self.ahead = ahead;
        Ok(())
    }
}

impl Programs for InKernel {
    fn begin(&mut self, entries: &[Entry]) -> Result<()> {
        self.time = NOW;
        self.ahead = ticks(kernel::now()?).wrapping_sub(ticks(NOW));
        self.kernel.set(entries)
    }

    fn wait(&mut self, time: u64) {
        self.time += time;
    }

    fn receive(&mut self, frame: &[u8]) -> Result<Option<Vec<u8>>> {
        self.catch_up()?;
        let program = self.kernel.descriptor(Hook::NativeXdp)?;
        let (verdict, after) = show(program, Hook::NativeXdp, frame, 0)?.context("no frame")?;
        Ok((verdict == Verdict::Send).then_some(after))
    }

    fn leave(&mut self, frame: &[u8]) -> Result<bool> {
        self.catch_up()?;
        let verdict = show_observer(self.kernel.observer()?, frame)?.context("no frame")?;
        Ok(verdict == Verdict::Pass)
    }

    fn state(&mut self, slot: u32) -> Result<State> {
        let state = self.kernel.state(slot)?.context("no such slot")?;
        Ok(later(state, self.ahead.wrapping_neg()))
    }

    fn set_epoch(&mut self, slot: u32, epoch: u32) -> Result<()> {
        let state = self.kernel.state(slot)?.context("no such slot")?;
        self.kernel.set_state(slot, State { epoch, ..state })
    }
}
