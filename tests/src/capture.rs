//! Captures on an interface, checked by code that shares nothing with the relay (`etherparse`), and injection of
//! raw frames.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::SocketAddr,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{
    datagram::{self, Facts},
    link::Interface,
    rtp::Rtp,
};
use anyhow::{Context as _, Result, bail};
use etherparse::{EtherType, LinkExtSlice, LinkSlice, NetSlice, SlicedPacket, TransportSlice};
use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        socket::{setsockopt, sockopt},
    },
};

/// Longest frame recorded; a longer one ends the capture with an error.
const FRAME: usize = 16 * 1024;
/// Receive buffer: more than a second of 50,000 small packets/s.
const BUFFER: usize = 64 << 20;

/// Which way a frame went, seen from the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Arrived.
    In,
    /// Sent by this machine's stack. What native XDP sends is not seen here, but at the other end of the cable.
    Out,
}

/// One recorded frame.
#[derive(Clone, Debug)]
pub struct Frame {
    /// When the kernel saw it, since the Unix epoch.
    pub at: Duration,
    /// Which way it went.
    pub direction: Direction,
    /// The frame from the destination MAC on, with its VLAN tags, without frame check sequence.
    pub bytes: Vec<u8>,
    /// The sender left the checksum to its device, so the UDP checksum in `bytes` is not the final one.
    pub checksum_pending: bool,
}

/// A UDP packet as decoded from a [`Frame`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// Source MAC.
    pub source_mac: [u8; 6],
    /// Destination MAC.
    pub destination_mac: [u8; 6],
    /// VLAN identifiers, outermost first.
    pub vlans: Vec<u16>,
    /// UDP source.
    pub source: SocketAddr,
    /// UDP destination.
    pub destination: SocketAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Differentiated services code point (0–63).
    pub dscp: u8,
    /// Explicit congestion notification (0–3).
    pub ecn: u8,
    /// UDP checksum as found.
    pub checksum: u16,
    /// UDP payload.
    pub payload: &'a [u8],
}

impl Frame {
    /// The UDP packet in it; `None` for anything else, fragments included.
    pub fn datagram(&self) -> Option<Datagram<'_>> {
        let packet = SlicedPacket::from_ethernet(&self.bytes).ok()?;
        let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link else {
            return None;
        };
        let Some(TransportSlice::Udp(udp)) = &packet.transport else {
            return None;
        };
        let (source, destination, ttl, class) = match packet.net.as_ref()? {
            NetSlice::Ipv4(ip) => {
                let header = ip.header();
                let class = header.dcp().value() << 2 | header.ecn().value();
                (
                    header.source_addr().into(),
                    header.destination_addr().into(),
                    header.ttl(),
                    class,
                )
            }
            NetSlice::Ipv6(ip) => {
                let header = ip.header();
                (
                    header.source_addr().into(),
                    header.destination_addr().into(),
                    header.hop_limit(),
                    header.traffic_class(),
                )
            }
            NetSlice::Arp(_) => return None,
        };
        Some(Datagram {
            source_mac: ethernet.source(),
            destination_mac: ethernet.destination(),
            vlans: packet
                .link_exts
                .iter()
                .filter_map(|extension| match extension {
                    LinkExtSlice::Vlan(tag) => Some(tag.vlan_identifier().value()),
                    LinkExtSlice::Macsec(_) => None,
                })
                .collect(),
            source: SocketAddr::new(source, udp.source_port()),
            destination: SocketAddr::new(destination, udp.destination_port()),
            ttl,
            dscp: class >> 2,
            ecn: class & 3,
            checksum: udp.checksum(),
            payload: udp.payload(),
        })
    }

    /// Recomputes the IPv4 header checksum and the UDP checksum from the bytes.
    fn verify(&self) -> Verdict {
        let packet = match SlicedPacket::from_ethernet(&self.bytes) {
            Ok(packet) => packet,
            Err(error) => return Verdict::Malformed(error.to_string()),
        };
        let addresses = match &packet.net {
            Some(NetSlice::Ipv4(ip)) => {
                let header = ip.header().to_header();
                let expected = header.calc_header_checksum();
                if header.header_checksum != expected {
                    return Verdict::Wrong {
                        of: "IPv4 header",
                        found: header.header_checksum,
                        expected,
                    };
                }
                Addresses::V4(header.source, header.destination)
            }
            Some(NetSlice::Ipv6(ip)) => {
                Addresses::V6(ip.header().source(), ip.header().destination())
            }
            Some(NetSlice::Arp(_)) => return Verdict::NotIp,
            None => {
                let last = packet.ether_payload().map(|payload| payload.ether_type);
                return match last {
                    Some(EtherType::IPV4 | EtherType::IPV6) => {
                        Verdict::Malformed("no IP header".to_owned())
                    }
                    _ => Verdict::NotIp,
                };
            }
        };
        let Some(TransportSlice::Udp(udp)) = &packet.transport else {
            return Verdict::Right;
        };
        let header = udp.to_header();
        let expected = match addresses {
            // RFC 768: no checksum. RFC 8200, section 8.1 forbids that over IPv6.
            Addresses::V4(..) if header.checksum == 0 => return Verdict::Right,
            Addresses::V4(source, destination) => {
                header.calc_checksum_ipv4_raw(source, destination, udp.payload())
            }
            Addresses::V6(source, destination) => {
                header.calc_checksum_ipv6_raw(source, destination, udp.payload())
            }
        };
        match expected {
            Ok(expected) if expected == header.checksum => Verdict::Right,
            Ok(expected) => Verdict::Wrong {
                of: "UDP",
                found: header.checksum,
                expected,
            },
            Err(error) => Verdict::Malformed(error.to_string()),
        }
    }
}

enum Addresses {
    V4([u8; 4], [u8; 4]),
    V6([u8; 16], [u8; 16]),
}

enum Verdict {
    Right,
    NotIp,
    Wrong {
        of: &'static str,
        found: u16,
        expected: u16,
    },
    Malformed(String),
}

/// What [`Recording::verify`] found.
#[derive(Debug, Default)]
pub struct Verification {
    /// IP packets whose checksums are all right.
    pub right: usize,
    /// Frames that are not IP.
    pub not_ip: usize,
    /// Everything wrong: a line for each frame.
    pub wrong: Vec<String>,
}

/// One RTP flow: a synchronization source between two UDP endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    /// UDP source.
    pub source: SocketAddr,
    /// UDP destination.
    pub destination: SocketAddr,
    /// Synchronization source.
    pub ssrc: u32,
}

/// The packets of one RTP flow, in the order seen. Sequence numbers are extended beyond 16 bits.
#[derive(Clone, Debug, Default)]
pub struct Flow {
    /// Extended sequence number and arrival of each packet, duplicates included.
    pub packets: Vec<(u64, Duration)>,
}

impl Flow {
    pub(crate) fn push(&mut self, sequence: u16, at: Duration) {
        // The number nearest to the last one that ends in these 16 bits. The first lies one cycle up, so that
        // reordering at the start does not go below zero.
        let extended = match self.packets.last() {
            None => 0x1_0000 + u64::from(sequence),
            Some(&(last, _)) => {
                let step = i64::from(sequence.wrapping_sub(last as u16).cast_signed());
                last.saturating_add_signed(step)
            }
        };
        self.packets.push((extended, at));
    }

    /// How well the packets came through.
    pub fn quality(&self) -> Quality {
        Quality::of(self.packets.iter().copied())
    }
}

/// How well a sequence of numbered packets came through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quality {
    /// Different packets seen.
    pub distinct: u64,
    /// Numbers between the lowest and the highest seen that never came.
    pub missing: u64,
    /// Packets that came again.
    pub duplicates: u64,
    /// Packets that came after one with a higher number.
    pub reordered: u64,
    /// Longest time between two arrivals.
    pub largest_gap: Duration,
}

impl Quality {
    /// Judges (number, arrival) in order of arrival.
    pub fn of(packets: impl IntoIterator<Item = (u64, Duration)>) -> Self {
        let mut quality = Self::default();
        let mut seen = std::collections::HashSet::new();
        let (mut lowest, mut highest, mut last) = (u64::MAX, 0, None);
        for (number, at) in packets {
            if let Some(last) = last {
                quality.largest_gap = quality.largest_gap.max(at.saturating_sub(last));
            }
            last = Some(at);
            if !seen.insert(number) {
                quality.duplicates += 1;
                continue;
            }
            if quality.distinct > 0 && number < highest {
                quality.reordered += 1;
            }
            quality.distinct += 1;
            lowest = lowest.min(number);
            highest = highest.max(number);
        }
        if quality.distinct > 0 {
            quality.missing = highest - lowest + 1 - quality.distinct;
        }
        quality
    }
}

/// Frames taken from a [`Capture`], in the order seen.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    /// The frames.
    pub frames: Vec<Frame>,
}

impl Recording {
    /// Only the frames that went this way.
    pub fn only(&self, direction: Direction) -> Self {
        Self {
            frames: self
                .frames
                .iter()
                .filter(|frame| frame.direction == direction)
                .cloned()
                .collect(),
        }
    }

    /// The UDP packets among the frames.
    pub fn datagrams(&self) -> impl Iterator<Item = (&Frame, Datagram<'_>)> {
        self.frames
            .iter()
            .filter_map(|frame| Some((frame, frame.datagram()?)))
    }

    /// Recomputes every IPv4 header and UDP checksum from scratch. A frame that is IP by its type but does not
    /// parse counts as wrong.
    pub fn verify(&self) -> Verification {
        let mut verification = Verification::default();
        for (number, frame) in self.frames.iter().enumerate() {
            let fault = match frame.verify() {
                Verdict::Right => {
                    verification.right += 1;
                    continue;
                }
                Verdict::NotIp => {
                    verification.not_ip += 1;
                    continue;
                }
                Verdict::Wrong {
                    of,
                    found,
                    expected,
                } => format!("{of} checksum {found:#06x}, expected {expected:#06x}"),
                Verdict::Malformed(fault) => fault,
            };
            let pending = if frame.checksum_pending {
                " (checksum left to the device)"
            } else {
                ""
            };
            verification.wrong.push(format!(
                "frame {number}{pending}: {fault}: {}",
                Hex(&frame.bytes)
            ));
        }
        verification
    }

    /// The RTP flows among the frames.
    pub fn flows(&self) -> BTreeMap<FlowKey, Flow> {
        let mut flows = BTreeMap::<_, Flow>::new();
        for (frame, datagram) in self.datagrams() {
            if let Some((rtp, _)) = Rtp::parse(datagram.payload) {
                let Datagram {
                    source,
                    destination,
                    ..
                } = datagram;
                let key = FlowKey {
                    source,
                    destination,
                    ssrc: rtp.ssrc,
                };
                flows.entry(key).or_default().push(rtp.sequence, frame.at);
            }
        }
        flows
    }
}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .take(80)
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A running capture on one interface. It holds every frame from the moment [`Capture::start`] returned.
#[derive(Debug)]
pub struct Capture {
    shared: Arc<Shared>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    frames: Mutex<Vec<Frame>>,
    grown: Condvar,
}

impl Shared {
    fn frames(&self) -> MutexGuard<'_, Vec<Frame>> {
        self.frames.lock().expect("no holder of this lock panics")
    }
}

impl Capture {
    /// Begins to record.
    ///
    /// # Errors
    /// No packet socket can be opened.
    pub fn start(interface: &Interface) -> Result<Self> {
        Self::begin(interface, |_| Ok(()))
    }

    /// As [`Capture::start`], but records only UDP over IPv4 from and to these ports: the kernel throws the rest away,
    /// so that a look at a few calls among many costs little.
    ///
    /// # Errors
    /// As [`Capture::start`]; more than 100 ports are refused.
    pub fn start_on_ports(interface: &Interface, ports: &[u16]) -> Result<Self> {
        let filter = port_filter(ports)?;
        Self::begin(interface, |socket| {
            attach_filter(socket, &filter).context("SO_ATTACH_FILTER")
        })
    }

    fn begin(
        interface: &Interface,
        prepare: impl FnOnce(&OwnedFd) -> Result<()> + Send,
    ) -> Result<Self> {
        let socket = interface.host.run(|| -> Result<OwnedFd> {
            let socket = packet_socket(interface.index)?;
            prepare(&socket)?;
            datagram::set_option(socket.as_fd(), libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
            setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
            setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
            Ok(socket)
        })?;
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let shared = Arc::new(Shared::default());
        let thread = {
            let (shared, stop) = (Arc::clone(&shared), Arc::clone(&stop));
            thread::Builder::new()
                .name("capture".to_owned())
                .spawn(move || record(&socket, &stop, &shared))?
        };
        Ok(Self {
            shared,
            stop,
            thread: Some(thread),
        })
    }

    /// Waits until the frames recorded so far satisfy `condition`.
    ///
    /// # Errors
    /// They do not within `timeout`.
    pub fn wait(
        &self,
        timeout: Duration,
        mut condition: impl FnMut(&[Frame]) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let mut frames = self.shared.frames();
        loop {
            if condition(&frames) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "not captured within {timeout:?}; {} frames so far",
                    frames.len()
                );
            }
            frames = self
                .shared
                .grown
                .wait_timeout(frames, left)
                .expect("no holder of this lock panics")
                .0;
        }
    }

    /// A copy of what is recorded so far; recording goes on.
    pub fn so_far(&self) -> Recording {
        Recording {
            frames: self.shared.frames().clone(),
        }
    }

    /// Ends the capture and returns all frames.
    ///
    /// # Errors
    /// The kernel had to drop frames, or the socket failed (interface gone).
    pub fn stop(mut self) -> Result<Recording> {
        self.end()?;
        Ok(Recording {
            frames: std::mem::take(&mut *self.shared.frames()),
        })
    }

    fn end(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        self.stop.write(1)?;
        thread.join().expect("the capture thread does not panic")
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // A test that has not asked for the frames does not mind a lossy capture.
        let _ = self.end();
    }
}

/// Records until `stop` is readable and the socket empty.
fn record(socket: &OwnedFd, stop: &EventFd, shared: &Shared) -> Result<()> {
    let mut buffer = vec![0; FRAME];
    loop {
        let mut set = [
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut set, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        let stopping = set[1].any().unwrap_or(true);
        loop {
            let facts = match datagram::receive(socket.as_fd(), &mut buffer) {
                Ok(facts) => facts,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("packet socket"),
            };
            let Some(seen) = buffer.get(..facts.len) else {
                bail!("a frame of {} bytes is too long", facts.len)
            };
            let mut bytes = Vec::with_capacity(seen.len() + 4);
            let (addresses, rest) = seen.split_at(seen.len().min(12));
            bytes.extend(addresses);
            if let Some((tpid, tci)) = facts.vlan {
                bytes.extend(tpid.to_be_bytes());
                bytes.extend(tci.to_be_bytes());
            }
            bytes.extend(rest);
            let direction = if facts.packet_type == libc::PACKET_OUTGOING {
                Direction::Out
            } else {
                Direction::In
            };
            let Facts {
                at,
                checksum_pending,
                ..
            } = facts;
            shared.frames().push(Frame {
                at,
                direction,
                bytes,
                checksum_pending,
            });
        }
        shared.grown.notify_all();
        if stopping {
            break;
        }
    }
    let drops = dropped(socket)?;
    if drops > 0 {
        bail!("the kernel dropped {drops} frames of this capture: its buffer was too small");
    }
    Ok(())
}

/// Frames that did not fit into the receive buffer (`PACKET_STATISTICS`).
fn dropped(socket: &OwnedFd) -> Result<u32> {
    let mut statistics = libc::tpacket_stats {
        tp_packets: 0,
        tp_drops: 0,
    };
    let mut len = size_of_val(&statistics) as libc::socklen_t;
    // SAFETY: the pointers describe `statistics` and its length, which live across the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error()).context("PACKET_STATISTICS");
    }
    Ok(statistics.tp_drops)
}

/// Most ports of a filter: its jumps are one byte long.
const FILTER_PORTS: usize = 100;

/// A classic BPF program that takes untagged UDP over IPv4 without options, from or to one of `ports`.
fn port_filter(ports: &[u16]) -> Result<Vec<libc::sock_filter>> {
    const LOAD_HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
    const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
    const JUMP_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    if ports.len() > FILTER_PORTS {
        bail!(
            "{} ports are too many for a filter: at most {FILTER_PORTS}",
            ports.len()
        );
    }
    let one = |code: u32, k: u32, jt: usize, jf: usize| libc::sock_filter {
        code: code as u16,
        jt: jt as u8,
        jf: jf as u8,
        k,
    };
    // Behind the four checks: two loads, two comparisons for each port, and the two ends.
    let tail = 2 * ports.len() + 2;
    let mut program = vec![
        one(LOAD_HALF, 12, 0, 0),
        one(JUMP_EQUAL, libc::ETH_P_IP as u32, 0, tail + 2),
        one(LOAD_BYTE, 23, 0, 0),
        one(JUMP_EQUAL, libc::IPPROTO_UDP as u32, 0, tail),
    ];
    let length = program.len() + tail + 2;
    for offset in [34, 36] {
        program.push(one(LOAD_HALF, offset, 0, 0));
        for port in ports {
            // To the last instruction, counted from the next one.
            let accept = length - 1 - (program.len() + 1);
            program.push(one(JUMP_EQUAL, u32::from(*port), accept, 0));
        }
    }
    program.push(one(RETURN, 0, 0, 0));
    program.push(one(RETURN, u32::MAX, 0, 0));
    Ok(program)
}

fn attach_filter(socket: &OwnedFd, program: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the pointers describe `program` and its instructions, which the kernel only reads.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of_val(&program) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A packet socket for all protocols that shows only what comes in, and sends past the queueing discipline. Runs inside
/// the machine.
///
/// # Errors
/// Not root, or no such interface.
pub fn bare_packet_socket(index: u32) -> Result<OwnedFd> {
    let socket = packet_socket(index)?;
    for option in [libc::PACKET_IGNORE_OUTGOING, libc::PACKET_QDISC_BYPASS] {
        datagram::set_option(socket.as_fd(), libc::SOL_PACKET, option, 1)?;
    }
    Ok(socket)
}

/// A packet socket (packet(7)) for all protocols, bound to an interface. Runs inside the machine.
fn packet_socket(index: u32) -> Result<OwnedFd> {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: no pointers.
    // Protocol 0 until bound: else frames of other interfaces queue up before `bind`.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error()).context("packet socket");
    }
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: all-zero is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index.cast_signed();
    // SAFETY: pointer and length describe `address`, which lives across the call.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error()).context("bind packet socket");
    }
    Ok(socket)
}

/// Sends raw frames out of an interface, past the stack: tags, fragments, options, truncated packets.
#[derive(Debug)]
pub struct Injector {
    socket: OwnedFd,
}

impl Injector {
    /// Opens the interface.
    ///
    /// # Errors
    /// No packet socket can be opened.
    pub fn open(interface: &Interface) -> Result<Self> {
        Ok(Self {
            socket: interface.host.run(|| packet_socket(interface.index))?,
        })
    }

    /// Sends one frame, from the destination MAC on.
    ///
    /// # Errors
    /// The interface is down, or the frame longer than its MTU.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        nix::sys::socket::send(
            self.socket.as_raw_fd(),
            frame,
            nix::sys::socket::MsgFlags::empty(),
        )
        .map(drop)
        .context("inject")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(sequences: &[u16]) -> Quality {
        let mut flow = Flow::default();
        for (at, &sequence) in sequences.iter().enumerate() {
            flow.push(sequence, Duration::from_millis(20 * at as u64));
        }
        flow.quality()
    }

    #[test]
    fn quality_counts_across_the_wrap_of_the_sequence_number() {
        let quality = flow(&[65_534, 65_535, 0, 1]);
        assert_eq!(
            (quality.distinct, quality.missing, quality.reordered),
            (4, 0, 0)
        );
        let quality = flow(&[65_534, 0, 65_535, 65_535, 3]);
        assert_eq!(quality.distinct, 4);
        assert_eq!(quality.missing, 2, "1 and 2");
        assert_eq!(quality.reordered, 1, "65535 after 0");
        assert_eq!(quality.duplicates, 1);
        assert_eq!(quality.largest_gap, Duration::from_millis(20));
    }

    #[test]
    fn reordering_before_the_first_packet_is_seen() {
        let quality = flow(&[1, 0, 65_535, 2]);
        assert_eq!(
            (quality.distinct, quality.missing, quality.reordered),
            (4, 0, 2)
        );
    }
}
