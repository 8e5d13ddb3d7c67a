//! What a stream needs to leave the host: route, neighbour and link of its remote, taken from the
//! kernel's own tables and kept current.
//!
//! [`open`] gives a [`Resolver`] to spawn and a [`NextHops`] handle to ask it. The kernel's change
//! notifications are only hints: what changed is read again, so neither their order nor the loss of
//! some can leave an old answer in place.

mod link;
mod neighbour;
mod netlink;
mod resolver;
mod route;
mod table;

use std::{fmt, net::IpAddr};

use nix::errno::Errno;

pub(crate) use self::neighbour::address as neighbour_address;
pub use self::{
    link::{
        Interface, InterfaceError, Interfaces, LinkLayer, VlanLink, VlanTag, XdpHook, XdpProgram,
    },
    netlink::NetlinkError,
    resolver::{Changes, NextHops, Resolver, Stopped, open},
};

/// VLAN tags that a relayed packet can carry: 802.1Q inside 802.1ad.
pub const MAX_VLAN_TAGS: usize = 2;

/// What a stream needs to leave, all taken from the kernel's own tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// What the Ethernet header holds; `None` on a link without one.
    pub macs: Option<Macs>,
    /// Tags to put on, outermost first, at most [`MAX_VLAN_TAGS`].
    pub vlan: Vec<VlanTag>,
    /// Largest IP packet that may leave, in bytes: the smaller of the route's and the output
    /// interface's. Larger ones are capped to what an IP header can say.
    pub mtu: u16,
}

/// The addresses of an Ethernet header, in the order of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Macs {
    /// Of the output interface.
    pub source: [u8; 6],
    /// Of the gateway, or of the remote itself.
    pub destination: [u8; 6],
}

/// A packet of the host's own, from `local` to `remote`.
///
/// Ports are no part of it: policy rules that look at ports, and layer-4 multipath hashing, may
/// send a packet of the PBX through another next hop than the one found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Path {
    /// Source address: an address of this host.
    pub local: IpAddr,
    /// Destination address, of the same family.
    pub remote: IpAddr,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.local, self.remote)
    }
}

/// What is known about a path now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// A stream can leave this way.
    Known(NextHop),
    /// The route is known, its neighbour does not answer yet. It is asked again until it does.
    Waiting {
        /// The gateway, or the remote itself.
        neighbour: IpAddr,
        /// Name of the interface on which it is asked.
        interface: String,
    },
    /// The relay cannot send there; the stream stays with the PBX until this changes.
    Unreachable(NextHopError),
}

/// What is known about a path, and by which watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The path.
    pub path: Path,
    /// Grows with each first watch of a path. A change that was on its way when the path's last
    /// watch ended arrives after the answer to a new one, and is older: its serial tells.
    pub serial: u64,
    /// What is known.
    pub resolution: Resolution,
}

/// Why the relay cannot send on a path. The text names the thing and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NextHopError {
    /// No route in any table that the policy rules name.
    #[error(
        "no route from {0}: add one, or correct the leg (`ip route get` takes the same addresses)"
    )]
    NoRoute(Path),
    /// A route of type `blackhole`.
    #[error("a blackhole route swallows packets from {0}: remove it, or correct the leg")]
    Blackhole(Path),
    /// A route of type `unreachable`.
    #[error("a route declares {} unreachable from {}: remove it, or correct the leg", .0.remote, .0.local)]
    RouteUnreachable(Path),
    /// A route of type `prohibit`.
    #[error("a route or rule prohibits packets from {0}: remove it, or correct the leg")]
    Prohibited(Path),
    /// The kernel would send the packet through another interface than the attached one.
    #[error(
        "packets to {remote} leave through {interface}, but the relay is attached to {attached}: another output interface is not supported yet; the call stays with the PBX"
    )]
    OtherInterface {
        /// Destination of the path.
        remote: IpAddr,
        /// Where the route leads.
        interface: String,
        /// Where the relay is.
        attached: String,
    },
    /// The remote is an address of this host.
    #[error(
        "{0} is an address of this host, so packets to it never leave: give the phone's address (is the leg LOCAL=REMOTE the right way round?)"
    )]
    RemoteIsLocal(IpAddr),
    /// The remote is broadcast, multicast or anycast by the kernel's tables.
    #[error("{remote} is {kind} by the routing table: a leg needs a unicast remote")]
    NotUnicast {
        /// Destination of the path.
        remote: IpAddr,
        /// "broadcast", "multicast" or "anycast".
        kind: &'static str,
    },
    /// An IPv6 link-local remote is ambiguous without its link (RFC 4007 section 6).
    #[error(
        "{0} is link-local, and a leg does not say on which link: use a global or unique local address; the call stays with the PBX"
    )]
    RemoteIsLinkLocal(IpAddr),
    /// The halves of the path are of different families.
    #[error("no packet goes from {0}: the addresses are of different families")]
    MixedFamilies(Path),
    /// `local` is no address of this host.
    #[error(
        "{local} is not an address of this host: did you swap LOCAL=REMOTE? (`ip address` lists this host's addresses; {remote} was given as the remote)"
    )]
    LocalNotOurs {
        /// Source of the path.
        local: IpAddr,
        /// Destination of the path.
        remote: IpAddr,
    },
    /// The interface is gone, is down or has no carrier.
    #[error(
        "interface {0} is gone, is down or has no carrier: check its cable or peer, or `ip link set {0} up`"
    )]
    LinkDown(String),
    /// The interface is of a kind that the relay does not know.
    #[error(
        "interface {0} is neither Ethernet nor a plain IP link such as tun or PPP: the relay cannot send there; the call stays with the PBX"
    )]
    NoLinkLayer(String),
    /// More tags than a relayed packet can carry.
    #[error(
        "packets to {remote} leave through {interface}, which puts on more than {MAX_VLAN_TAGS} VLAN tags: not supported; the call stays with the PBX"
    )]
    TooManyVlanTags {
        /// Destination of the path.
        remote: IpAddr,
        /// Output interface.
        interface: String,
    },
    /// The route puts a header of its own around the packet (MPLS, SRv6, IP tunnel).
    #[error(
        "the route to {0} encapsulates its packets, which the relay cannot: the call stays with the PBX"
    )]
    Encapsulated(IpAddr),
    /// The kernel refused the question, or its answer made no sense. It is asked again.
    #[error("the kernel did not answer the route lookup from {path}: {}; it is asked again", .errno.desc())]
    Kernel {
        /// The path asked for.
        path: Path,
        /// What the kernel said.
        errno: Errno,
    },
}
