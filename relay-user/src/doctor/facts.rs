//! What the doctor found out, before anybody judges it. It is part of the JSON: fields are added, never
//! renamed or removed.
//!
//! A fact that the kernel, the driver or Asterisk does not tell is `null`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use serde::{Deserialize, Serialize};

use crate::control::model::StatusReport;

/// All facts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The machine.
    pub host: HostFacts,
    /// The interface; none where none was named and none suggests itself.
    pub interface: Option<InterfaceFacts>,
    /// The network around that interface.
    pub network: Option<NetworkFacts>,
    /// The daemon that serves the interface, in its own words; none where none runs.
    pub daemon: Option<StatusReport>,
    /// Asterisk; none where the doctor has no AMI user to ask as.
    pub asterisk: Option<AsteriskFacts>,
    /// The calls that are up; none where nobody tells.
    pub calls: Option<CallFacts>,
}

/// The machine and its kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Release of the kernel, as `uname -r` prints it.
    pub kernel: String,
    /// Why the kernel does not take the relay's programs and maps, which were loaded for a moment,
    /// attached to nothing; none where it does.
    pub refused: Option<String>,
    /// Whether the kernel turned the program into machine code.
    pub jit: Option<bool>,
    /// Whether it has TCX (Linux 6.6), which attaches programs in traffic control by links.
    pub tcx: Option<bool>,
    /// Whether it describes its own types (`/sys/kernel/btf/vmlinux`).
    pub btf: bool,
    /// Lockdown mode: `none`, `integrity` or `confidentiality`.
    pub lockdown: Option<String>,
    /// Capabilities that attaching needs and this process does not have.
    pub missing_capabilities: Vec<String>,
    /// Limit of locked memory, bytes; none for unlimited.
    pub memlock: Option<u64>,
    /// Whether a BPF file system is mounted at `/sys/fs/bpf`.
    pub bpffs: bool,
    /// Whether the kernel takes the time of every run of every program.
    pub bpf_statistics: Option<bool>,
}

/// The interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceFacts {
    /// Its name.
    pub name: String,
    /// Its number; 0 where there is no interface of that name.
    pub index: u32,
    /// Names of the interfaces there are.
    pub known: Vec<String>,
    /// What its packets begin with.
    pub layer: Layer,
    /// Kind of a virtual interface, such as `veth`; none for a card.
    pub kind: Option<String>,
    /// Name of the driver.
    pub driver: Option<String>,
    /// Set up by the administrator.
    pub up: bool,
    /// The link below is there.
    pub carrier: bool,
    /// Largest IP packet, bytes.
    pub mtu: u32,
    /// The same of a veth's other end, where that is in this network namespace.
    pub peer_mtu: Option<u32>,
    /// Largest MTU with which the driver takes an XDP program, bytes.
    pub xdp_mtu: u32,
    /// Whether the driver says that it has native XDP (Linux 6.3).
    pub native_xdp: Option<bool>,
    /// What became of the self-test; none where it was not asked for.
    pub self_test: Option<SelfTest>,
    /// Processors that could work on its receive queues.
    pub processors: u32,
    /// Receive queues.
    pub queues: Option<Queues>,
    /// Whether the first queue's packets are spread over processors by the stack (RPS).
    pub rps: Option<bool>,
    /// Whether the UDP ports have a say in which queue a packet goes to: over IPv4.
    pub hashes_udp4_ports: Option<bool>,
    /// The same over IPv6.
    pub hashes_udp6_ports: Option<bool>,
    /// Features that are switched on, by their names in the kernel (`ethtool -k` shortens some).
    pub features: Option<BTreeSet<String>>,
    /// VLAN devices on it.
    pub vlans: Vec<String>,
    /// Its queueing discipline, such as `htb`.
    pub qdisc: Option<String>,
    /// BPF programs and filters on it, the relay's own included.
    pub programs: Vec<Program>,
    /// The driver's counters of XDP that are not 0.
    pub xdp_statistics: BTreeMap<String, u64>,
    /// What kept parts of this from being read.
    pub unread: Vec<String>,
}

/// What a link's packets begin with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layer {
    /// An Ethernet header.
    #[default]
    Ethernet,
    /// The IP header.
    Ip,
    /// Something the relay does not know.
    Other,
}

/// Receive queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queues {
    /// In use.
    pub now: u32,
    /// As many as there may be.
    pub most: u32,
    /// What `ethtool -L` calls them: `combined`, or `rx`.
    pub combined: bool,
}

/// Where a program or a filter sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// XDP in the driver.
    XdpNative,
    /// XDP in the stack.
    XdpGeneric,
    /// XDP on the card.
    XdpHardware,
    /// Traffic control, what comes in.
    TcIngress,
    /// Traffic control, what leaves.
    TcEgress,
}

/// A BPF program, or a filter of traffic control.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Where it sits.
    pub place: Place,
    /// Number of the program; none for a filter that is not BPF.
    pub id: Option<u32>,
    /// Name of the program, or kind of the filter.
    pub name: String,
    /// Number of the link that holds it; none where it sits there without.
    pub link: Option<u32>,
    /// Preference of a filter; none for a program that is no filter.
    pub preference: Option<u16>,
    /// Whether it is the relay's or the shaper's.
    pub ours: bool,
}

/// What became of the self-test.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum SelfTest {
    /// A neighbour answered what the driver sent by XDP_TX.
    Forwards {
        /// Who.
        neighbour: IpAddr,
    },
    /// The driver took the program and what it sent by XDP_TX never arrived.
    Loses {
        /// Who did not answer, though it answers what the stack sends.
        neighbour: IpAddr,
    },
    /// The driver took no program.
    Refused {
        /// What it said.
        cause: String,
    },
    /// It was not made, or told nothing.
    Skipped {
        /// Why.
        cause: String,
    },
}

/// The network around the interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkFacts {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// `rp_filter` of all interfaces and of this one; the larger counts.
    pub rp_filter: Option<[u8; 2]>,
    /// Whether this host is a router: over IPv4.
    pub forwarding_ipv4: Option<bool>,
    /// The same over IPv6.
    pub forwarding_ipv6: Option<bool>,
    /// Gateways of routes that leave through it.
    pub gateways: BTreeSet<IpAddr>,
    /// Its neighbours, at most 4,096.
    pub neighbours: BTreeMap<IpAddr, Neighbour>,
}

/// How far the kernel knows a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Neighbour {
    /// Its MAC address is known.
    Known,
    /// It is being asked.
    Asked,
    /// It did not answer.
    Failed,
}

/// Asterisk, as its AMI shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AsteriskFacts {
    /// Where AMI is, as given.
    pub address: String,
    /// As whom the doctor logged in.
    pub user: String,
    /// What Asterisk says it is.
    pub asterisk: Option<String>,
    /// Why there is no session; none where there is.
    pub trouble: Option<Trouble>,
    /// Actions the user may run that the relay does not need and that give the host away.
    pub excess: Vec<String>,
    /// Endpoints that were looked at, at most 256.
    pub endpoints: Vec<Endpoint>,
    /// How the endpoints were found: `endpoints`, `device_states` or `channels`.
    pub endpoints_from: Option<String>,
}

/// Why there is no AMI session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// How far it went.
    pub stage: Stage,
    /// What went wrong, and the remedy.
    pub cause: String,
}

/// How far an attempt at a session went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// No settings that could be used.
    Settings,
    /// No AMI there.
    Reach,
    /// User or secret.
    Login,
    /// May not ask.
    Ask,
    /// Is not told.
    Hear,
}

/// An endpoint of pjsip.conf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its name.
    pub name: String,
    /// `direct_media`.
    pub direct_media: Option<bool>,
    /// `rtp_timeout`, seconds; 0 for never.
    pub rtp_timeout: Option<u32>,
}

/// The calls that are up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallFacts {
    /// Who told: `daemon` or `ami`.
    pub told_by: String,
    /// How many.
    pub total: u64,
    /// Relayed in the kernel, or found fit for it where no daemon runs.
    pub relayed: u64,
    /// Neither yet, and nothing is against it.
    pub waiting: u64,
    /// Calls that cannot be relayed, by why.
    pub kept: BTreeMap<String, u64>,
}
