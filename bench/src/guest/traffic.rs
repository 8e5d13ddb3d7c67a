//! The calls' phones, all at one end of the wire: they send at a steady rate, and know every packet that they are owed.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    ops::Range,
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    sys::{
        prctl,
        socket::{MsgFlags, recv, send},
    },
    time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep},
};
use relay_tests::{
    capture::bare_packet_socket,
    draft::{Checksum, Draft, UDP},
    link::Interface,
    rtp::{Rtp, Stamp},
};

use crate::wire::call::{Call, Way};

/// Between two packets of one stream.
pub(super) const PACKET_TIME: Duration = Duration::from_millis(20);

/// Where an untagged frame with a plain IPv4 header has its addresses, its ports and its RTP, bytes.
const ADDRESSES: Range<usize> = 26..34;
const PORTS: Range<usize> = 34..38;
const RTP: usize = 42;

/// Packets sent between two looks at what has come: fewer than the socket holds.
const TURN: usize = 32;

/// How long the last packets may take.
const PATIENCE: Duration = Duration::from_millis(100);

/// The end of the wire where the phones are.
pub(super) struct Phones {
    socket: OwnedFd,
    mac: [u8; 6],
    /// MAC address of the other end.
    relay: [u8; 6],
}

/// Packets of all calls, in the order of their sending.
pub(super) struct Traffic {
    packets: Vec<Packet>,
    /// Packets between two of one stream.
    streams: usize,
    /// Number of the first packet in its stream.
    first: u64,
    /// Arrived so far.
    arrived: usize,
}

struct Packet {
    frame: Vec<u8>,
    /// Addresses and ports that it is to come with.
    expected: [u8; 12],
    has_come: bool,
}

impl Traffic {
    /// Packets `numbers` of every stream of the calls.
    pub(super) fn of(calls: &[Call], way: Way, numbers: Range<u64>, phones: &Phones) -> Self {
        let streams: Vec<_> = calls
            .iter()
            .flat_map(|[one, other]| [(one, other), (other, one)])
            .collect();
        let first = numbers.start;
        let mut packets = Vec::with_capacity(streams.len() * numbers.clone().count());
        for number in numbers {
            for (stream, (from, to)) in streams.iter().enumerate() {
                let rtp = Rtp {
                    marker: false,
                    payload_type: 0,
                    sequence: number as u16,
                    timestamp: (number as u32).wrapping_mul(160),
                    ssrc: stream as u32,
                };
                let sender = stream as u32;
                let draft = Draft {
                    destination_mac: phones.relay,
                    source_mac: phones.mac,
                    tags: vec![],
                    source: from.remote.into(),
                    destination: from.local.into(),
                    traffic_class: 46 << 2,
                    hop_limit: 64,
                    identification: 0,
                    fragment: 0x4000,
                    options: vec![],
                    protocol: UDP,
                    checksum: Checksum::Finished,
                    payload: rtp.packet(&Stamp { sender, number }.write()),
                    trailer: vec![],
                };
                let expected = match way {
                    Way::Relayed => ends(to.local, to.remote),
                    Way::Mirrored => ends(from.remote, from.local),
                };
                packets.push(Packet {
                    frame: draft.bytes(),
                    expected,
                    has_come: false,
                });
            }
        }
        Self {
            packets,
            streams: streams.len(),
            first,
            arrived: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.packets.len()
    }

    /// Notes a frame that has come. Others than RTP of the calls do not count.
    fn arrive(&mut self, frame: &[u8]) -> Result<()> {
        let Some((rtp, payload)) = frame.get(RTP..).and_then(Rtp::parse) else {
            return Ok(());
        };
        let stamp = Stamp::read(payload);
        let index = stamp.and_then(|stamp| {
            let ahead = usize::try_from(stamp.number.checked_sub(self.first)?).ok()?;
            Some(ahead * self.streams + stamp.sender as usize)
        });
        let packet = index.and_then(|index| self.packets.get_mut(index));
        let packet = packet.with_context(|| format!("nobody sent {rtp:?}"))?;
        ensure!(
            frame[RTP..] == packet.frame[RTP..],
            "changed on the way: {rtp:?}"
        );
        let ends = [&frame[ADDRESSES], &frame[PORTS]].concat();
        ensure!(
            ends == packet.expected,
            "{rtp:?} has come with the addresses and ports {ends:?}"
        );
        ensure!(!packet.has_come, "{rtp:?} has come twice");
        packet.has_come = true;
        self.arrived += 1;
        Ok(())
    }
}

/// Addresses and ports as they stand in a packet.
fn ends(source: SocketAddrV4, destination: SocketAddrV4) -> [u8; 12] {
    let mut ends = [0; 12];
    let octets = |address: &Ipv4Addr| address.octets();
    ends[..4].copy_from_slice(&octets(source.ip()));
    ends[4..8].copy_from_slice(&octets(destination.ip()));
    ends[8..10].copy_from_slice(&source.port().to_be_bytes());
    ends[10..].copy_from_slice(&destination.port().to_be_bytes());
    ends
}

impl Phones {
    /// Takes the interface, whose frames go to the relay's.
    pub(super) fn open(interface: &Interface, relay: &Interface) -> Result<Self> {
        // Else the kernel wakes a sender up to 50 µs late.
        prctl::set_timerslack(1)?;
        Ok(Self {
            socket: bare_packet_socket(interface.index)?,
            mac: interface.mac()?,
            relay: relay.mac()?,
        })
    }

    /// Sends some of the packets, in the time that their streams take for them.
    pub(super) fn play(&self, traffic: &mut Traffic, which: Range<usize>) -> Result<()> {
        let interval = PACKET_TIME / u32::try_from(traffic.streams)?;
        let mut due = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        for index in which {
            let flags = ClockNanosleepFlags::TIMER_ABSTIME;
            clock_nanosleep(ClockId::CLOCK_MONOTONIC, flags, &due.into())?;
            let frame = &traffic.packets[index].frame;
            send(self.socket.as_raw_fd(), frame, MsgFlags::empty()).context("send")?;
            due += interval;
            if index % TURN == 0 {
                self.take_arrivals(traffic)?;
            }
        }
        Ok(())
    }

    /// Waits until `count` packets have come in all.
    pub(super) fn wait(&self, traffic: &mut Traffic, count: usize) -> Result<()> {
        let start = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
        loop {
            self.take_arrivals(traffic)?;
            if traffic.arrived == count {
                return Ok(());
            }
            let waited = clock_gettime(ClockId::CLOCK_MONOTONIC)? - start;
            if Duration::from(waited) > PATIENCE {
                bail!("only {} of {count} packets have come", traffic.arrived);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn take_arrivals(&self, traffic: &mut Traffic) -> Result<()> {
        let mut frame = [0; 2048];
        loop {
            match recv(self.socket.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => traffic.arrive(&frame[..length])?,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(error) => return Err(error).context("receive"),
            }
        }
    }
}
