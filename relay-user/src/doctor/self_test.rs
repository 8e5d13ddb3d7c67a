//! Whether native XDP really forwards here: some drivers take a program and lose what it sends.
//!
//! A neighbour is the witness. It is asked for its MAC address, by ARP; a program turns its answer into
//! another question, by XDP_TX; and if an answer to that comes, the question had left. Nothing stays: the
//! program is held by a link that nobody pins, which ends with this process at the latest.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use aya::{
    EbpfLoader,
    maps::{Array, MapError},
    programs::{ProgramError, Xdp},
};
use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, socket},
};
use relay_common::{
    arp::{Probe, Step},
    wire::ArpFrame,
};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::facts::{Neighbour, NetworkFacts, SelfTest};
use crate::{
    datapath::{
        self, DatapathError,
        links::Link,
        load::{create, program},
    },
    next_hop::{Interface, LinkLayer},
};

/// The compiled program.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/probe"));
const PROGRAM: &str = "relay_probe";
const MAP: &str = "PROBE";

/// Neighbours that may be witnesses.
const WITNESSES: usize = 4;
/// How long a neighbour may take to answer the stack.
const ANSWER: Duration = Duration::from_millis(300);
/// How often it is asked.
const ATTEMPTS: usize = 3;
/// How long the test may take: a card that resets its link for the program is back by then.
const PATIENCE: Duration = Duration::from_secs(8);
/// Between two questions.
const STEP: Duration = Duration::from_millis(100);
/// Questions of the program that nobody answers, after which it is plain that they are lost.
const LOST: u32 = 20;

/// Why the test came to nothing.
#[derive(Debug, thiserror::Error)]
enum TestError {
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("packet socket: {0}")]
    Socket(#[from] io::Error),
}

/// Makes the test, unless something is at work on the interface.
pub(super) fn run(interface: &Interface, network: &NetworkFacts, served: bool) -> SelfTest {
    let skipped = |cause: String| SelfTest::Skipped { cause };
    if let Some(cause) = unfit(interface, served) {
        return skipped(cause.to_owned());
    }
    let own = network.addresses.iter().find_map(|address| match address {
        IpAddr::V4(own) => Some(*own),
        IpAddr::V6(_) => None,
    });
    let (Some(mac), Some(own)) = (interface.mac, own) else {
        return skipped("it asks by ARP, and the interface has no IPv4 address".to_owned());
    };
    let test = || {
        let socket = ArpSocket::open(interface.index)?;
        for neighbour in witnesses(network) {
            let probe = Probe::new(mac, own.octets(), neighbour.octets());
            if socket.is_answered(&probe)? {
                return attached(interface, &socket, probe, neighbour.into());
            }
        }
        Ok(skipped("no IPv4 neighbour answers an ARP probe: send to a phone or a gateway first, such as by `ping`".to_owned()))
    };
    test().unwrap_or_else(|error: TestError| skipped(error.to_string()))
}

/// What is in the way of a test.
fn unfit(interface: &Interface, served: bool) -> Option<&'static str> {
    let left = datapath::attached_mode(&interface.name, interface.index);
    match () {
        () if served => Some("a daemon serves the interface, and would lose its calls"),
        () if !matches!(left, Ok(None)) => Some("an earlier daemon left its programs attached"),
        () if !interface.xdp.is_empty() => Some("another XDP program is attached"),
        () if interface.layer != LinkLayer::Ethernet => Some("the link has no Ethernet header"),
        () if !interface.usable() => Some("the interface is down or has no carrier"),
        () => None,
    }
}

/// Gateways first: they always answer.
fn witnesses(network: &NetworkFacts) -> impl Iterator<Item = Ipv4Addr> {
    let known = network
        .neighbours
        .iter()
        .filter(|(address, state)| {
            **state == Neighbour::Known && !network.gateways.contains(address)
        })
        .map(|(address, _)| address);
    network
        .gateways
        .iter()
        .chain(known)
        .filter_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        })
        .take(WITNESSES)
}

/// Attaches the program, and waits for what it hears.
fn attached(
    interface: &Interface,
    socket: &ArpSocket,
    probe: Probe,
    neighbour: IpAddr,
) -> Result<SelfTest, TestError> {
    let mut ebpf = create(&mut EbpfLoader::new(), OBJECT, "a page is needed")?;
    let descriptor = {
        let xdp: &mut Xdp = program(&mut ebpf, PROGRAM)?;
        xdp.load()?;
        xdp.fd()?.as_fd().try_clone_to_owned()?
    };
    let map = ebpf
        .map_mut(MAP)
        .ok_or_else(|| DatapathError::Object(format!("no map {MAP}")))?;
    let mut state: Array<_, [u8; size_of::<Probe>()]> = Array::try_from(map)?;
    let begun: [u8; size_of::<Probe>()] = zerocopy::transmute!(probe);
    state.set(0, begun, 0)?;
    let link = match Link::xdp(descriptor.as_fd(), interface.index, true) {
        Ok(link) => link,
        Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST)) => {
            return Ok(SelfTest::Skipped {
                cause: "another XDP program is attached".to_owned(),
            });
        }
        Err(error) => {
            return Ok(SelfTest::Refused {
                cause: error.to_string(),
            });
        }
    };
    let heard = listen(socket, &state, &probe);
    // Now, not when the last descriptor is closed.
    link.detach()?;
    Ok(match heard? {
        Heard::Answer => SelfTest::Forwards { neighbour },
        Heard::Silence => SelfTest::Loses { neighbour },
        Heard::Nothing => SelfTest::Skipped {
            cause: format!(
                "{neighbour} did not answer the host itself while the program was attached"
            ),
        },
    })
}

/// How the test went.
enum Heard {
    /// What the program sent was answered.
    Answer,
    /// It was not.
    Silence,
    /// The program had nothing to send.
    Nothing,
}

fn listen(
    socket: &ArpSocket,
    state: &Array<&mut aya::maps::MapData, [u8; size_of::<Probe>()]>,
    probe: &Probe,
) -> Result<Heard, TestError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        socket.send(&probe.question(false));
        thread::sleep(STEP);
        let now: Probe = zerocopy::transmute!(state.get(&0, 0)?);
        match (now.answered, now.sent) {
            (1.., _) => return Ok(Heard::Answer),
            (0, LOST..) => return Ok(Heard::Silence),
            (0, 1..) if Instant::now() > deadline => return Ok(Heard::Silence),
            (0, 0) if Instant::now() > deadline => return Ok(Heard::Nothing),
            _ => {}
        }
    }
}

/// Sends and hears ARP on one interface.
struct ArpSocket {
    socket: OwnedFd,
    address: libc::sockaddr_ll,
}

impl ArpSocket {
    fn open(index: u32) -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::EthAll,
        )?;
        // SAFETY: all-zero is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ARP as u16).to_be();
        address.sll_ifindex = index.cast_signed();
        // SAFETY: the kernel reads an address of this length, which lives across the call.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        if bound != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { socket, address })
    }

    /// A frame that cannot be sent just now is one that goes unanswered.
    fn send(&self, frame: &ArpFrame) {
        let bytes = frame.as_bytes();
        // SAFETY: the kernel reads the frame and the address, which live across the call.
        unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                bytes.as_ptr().cast(),
                bytes.len(),
                0,
                (&raw const self.address).cast(),
                size_of_val(&self.address) as libc::socklen_t,
            );
        }
    }

    /// Whether the neighbour answers the stack's own ARP probe.
    fn is_answered(&self, probe: &Probe) -> io::Result<bool> {
        for _ in 0..ATTEMPTS {
            self.send(&probe.question(true));
            let deadline = Instant::now() + ANSWER;
            while let Some(left) = deadline.checked_duration_since(Instant::now()) {
                let mut ready = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
                poll(
                    &mut ready,
                    PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO),
                )?;
                let mut bytes = [0; 64];
                let Ok(length) = recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::empty())
                else {
                    continue;
                };
                if let Ok((mut frame, _)) = ArpFrame::read_from_prefix(&bytes[..length])
                    && probe.step(&mut frame) == Step::Answered
                {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}
