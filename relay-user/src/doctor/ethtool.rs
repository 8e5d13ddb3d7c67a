//! What ethtool(8) shows of an interface, by the same ioctl: include/uapi/linux/ethtool.h.
//!
//! Only questions, which need no privilege.

use std::{
    collections::{BTreeMap, BTreeSet},
    io, mem,
    os::fd::AsRawFd as _,
};

use nix::{
    libc,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};
use zerocopy::IntoBytes as _;

const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSTATS: u32 = 0x1d;
const ETHTOOL_GRXFH: u32 = 0x29;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETHTOOL_GCHANNELS: u32 = 0x3c;

/// `enum ethtool_stringset`.
const ETH_SS_STATS: u32 = 1;
const ETH_SS_FEATURES: u32 = 4;
/// Bytes of a name in a string set.
const ETH_GSTRING_LEN: usize = 32;
/// More names than any driver has: mlx5 with 64 queues has about 3,000 counters.
const MOST_STRINGS: u32 = 16_384;

/// Flow types of `struct ethtool_rxnfc`.
pub(super) const UDP_V4_FLOW: u32 = 0x02;
pub(super) const UDP_V6_FLOW: u32 = 0x06;
/// Bits of its `data`: source port, destination port.
const RXH_L4_B_0_1: u64 = 1 << 6;
const RXH_L4_B_2_3: u64 = 1 << 7;

/// Receive queues, as `ethtool -l` shows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Channels {
    /// Of receiving alone.
    pub(super) rx: u32,
    pub(super) most_rx: u32,
    /// Of receiving and sending.
    pub(super) combined: u32,
    pub(super) most_combined: u32,
}

/// Name of the driver.
pub(super) fn driver(interface: &str) -> io::Result<String> {
    /// Of `struct ethtool_drvinfo`, in 4-byte words, and of its `driver`, in bytes.
    const WORDS: usize = 49;
    const NAME: usize = 32;
    let answer = ask(interface, &[ETHTOOL_GDRVINFO], WORDS)?;
    Ok(text(&answer[1..].as_bytes()[..NAME]))
}

/// How many receive queues are in use, and may be.
pub(super) fn channels(interface: &str) -> io::Result<Channels> {
    /// Of `struct ethtool_channels`, in words.
    const WORDS: usize = 9;
    let answer = ask(interface, &[ETHTOOL_GCHANNELS], WORDS)?;
    Ok(Channels {
        most_rx: answer[1],
        most_combined: answer[4],
        rx: answer[5],
        combined: answer[8],
    })
}

/// Whether the ports of a flow type have a say in which receive queue a packet goes to.
pub(super) fn hashes_ports(interface: &str, flow: u32) -> io::Result<bool> {
    /// Of `struct ethtool_rxnfc`, generously, in words; `data` begins at the third.
    const WORDS: usize = 64;
    let answer = ask(interface, &[ETHTOOL_GRXFH, flow], WORDS)?;
    // All bits that matter are in the lower of the two words of `data`.
    let fields = u64::from(answer[2] | answer[3]);
    Ok(fields & (RXH_L4_B_0_1 | RXH_L4_B_2_3) == RXH_L4_B_0_1 | RXH_L4_B_2_3)
}

/// Names of the features that are switched on, as the kernel has them: `rx-lro`, `rx-gro-hw`.
pub(super) fn features(interface: &str) -> io::Result<BTreeSet<String>> {
    let names = strings(interface, ETH_SS_FEATURES)?;
    let blocks = names.len().div_ceil(32);
    // Of each block of 32 features: available, requested, active, never changed.
    let answer = ask(
        interface,
        &[ETHTOOL_GFEATURES, blocks as u32],
        2 + 4 * blocks,
    )?;
    let active = |feature: usize| {
        let word = answer.get(2 + feature / 32 * 4 + 2);
        word.is_some_and(|word| word >> (feature % 32) & 1 == 1)
    };
    Ok(names
        .into_iter()
        .enumerate()
        .filter(|(feature, _)| active(*feature))
        .map(|(_, name)| name)
        .collect())
}

/// The driver's counters.
pub(super) fn statistics(interface: &str) -> io::Result<BTreeMap<String, u64>> {
    let names = strings(interface, ETH_SS_STATS)?;
    let answer = ask(
        interface,
        &[ETHTOOL_GSTATS, names.len() as u32],
        2 + 2 * names.len(),
    )?;
    let values = answer[2..].chunks_exact(2).map(|words| {
        let mut value = [0; 8];
        value.copy_from_slice(words.as_bytes());
        u64::from_ne_bytes(value)
    });
    Ok(names.into_iter().zip(values).collect())
}

fn strings(interface: &str, set: u32) -> io::Result<Vec<String>> {
    // The mask of sets asked for has 64 bits, after a reserved word.
    let mask = 1_u64 << set;
    let mut question = vec![ETHTOOL_GSSET_INFO, 0];
    question.extend(words(&mask.to_ne_bytes()));
    let count = ask(interface, &question, 5)?[4];
    if count > MOST_STRINGS {
        return Err(io::Error::other("the driver names too many strings"));
    }
    let length = count as usize * ETH_GSTRING_LEN;
    let answer = ask(
        interface,
        &[ETHTOOL_GSTRINGS, set, count],
        3 + length.div_ceil(4),
    )?;
    Ok(answer[3..]
        .as_bytes()
        .chunks_exact(ETH_GSTRING_LEN)
        .map(text)
        .collect())
}

/// Puts a question whose first words are these, with room for an answer of `length` words.
fn ask(interface: &str, question: &[u32], length: usize) -> io::Result<Vec<u32>> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // Of 8-byte words, because some of the structures hold them.
    let mut buffer = vec![0_u64; length.max(question.len()).div_ceil(2)];
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    let bytes = buffer.as_mut_slice().as_mut_bytes();
    bytes[..4 * question.len()].copy_from_slice(question.as_bytes());
    request.ifr_ifru.ifru_data = buffer.as_mut_ptr().cast();
    // SAFETY: SIOCETHTOOL reads the name, and reads and writes behind ifru_data what the question's
    // structure holds, for which the callers leave room; both live across the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(words(buffer.as_bytes()).collect())
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(4).map(|chunk| {
        let mut word = [0; 4];
        word.copy_from_slice(chunk);
        u32::from_ne_bytes(word)
    })
}

/// Up to the first zero byte.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}
