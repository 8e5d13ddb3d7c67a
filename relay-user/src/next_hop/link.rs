//! Interfaces as the kernel describes them.

use std::net::IpAddr;

use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
    LinkXdp, XdpAttached,
};
use nix::ifaddrs::getifaddrs;

use super::netlink::{Kernel, NetlinkError};

/// An 802.1Q or 802.1ad tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VlanTag {
    /// Tag protocol identifier in host byte order: 0x8100 or 0x88a8.
    pub protocol: u16,
    /// VLAN identifier, 0–4095.
    pub id: u16,
}

/// What a VLAN device adds, and to which interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VlanLink {
    /// The tag that the device puts on.
    pub tag: VlanTag,
    /// Index of the interface below. `None` where that one is in another network namespace.
    pub lower: Option<u32>,
}

/// What stands before a packet's IP header on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// An Ethernet header.
    Ethernet,
    /// Nothing that the stack sees: tun, WireGuard, PPP.
    Ip,
    /// Something that the relay does not know: loopback, tunnels of the kernel's own.
    Other,
}

/// Where in the receive path an XDP program sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpHook {
    /// In the driver.
    Native,
    /// In the stack, after the socket buffer was made.
    Generic,
    /// On the card.
    Hardware,
}

/// An XDP program that is attached already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XdpProgram {
    /// Program id, as `bpftool prog` prints it.
    pub id: u32,
    /// Where it sits.
    pub hook: XdpHook,
}

/// One interface of the current network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Index, stable as long as the interface exists.
    pub index: u32,
    /// Name, which may change.
    pub name: String,
    /// What its packets begin with.
    pub layer: LinkLayer,
    /// Ethernet address; `None` where the link layer is not Ethernet.
    pub mac: Option<[u8; 6]>,
    /// Largest IP packet in bytes.
    pub mtu: u32,
    /// Driver kind of a virtual interface, such as `veth`; `None` for a real card.
    pub kind: Option<String>,
    /// Set up by the administrator (`IFF_UP`).
    pub up: bool,
    /// The link below is there (`IFF_LOWER_UP`).
    pub carrier: bool,
    /// For a VLAN device, its tag and the interface below.
    pub vlan: Option<VlanLink>,
    /// Attached XDP programs, at most one of each hook.
    pub xdp: Vec<XdpProgram>,
}

impl Interface {
    /// Whether packets can leave through it.
    pub fn usable(&self) -> bool {
        self.up && self.carrier
    }

    /// Its addresses, those that a host on another machine can send to first.
    ///
    /// An interface without any, or one that is gone, has none.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        let mut addresses: Vec<IpAddr> = getifaddrs()
            .into_iter()
            .flatten()
            .filter(|entry| entry.interface_name == self.name)
            .filter_map(|entry| {
                let address = entry.address?;
                match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
                    (Some(v4), _) => Some(v4.ip().into()),
                    (_, Some(v6)) => Some(v6.ip().into()),
                    _ => None,
                }
            })
            .collect();
        addresses.sort_by_key(|address| match address {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        });
        addresses
    }

    /// Reads a link message.
    pub(super) fn from_message(message: &LinkMessage) -> Self {
        let mut interface = Self {
            index: message.header.index,
            name: String::new(),
            // Those of dev_is_mac_header_xmit() in include/linux/if_arp.h that need no neighbour
            // and no outer header: bpf_redirect() sends there from the IP header on.
            layer: match message.header.link_layer_type {
                LinkLayerType::Ether => LinkLayer::Ethernet,
                LinkLayerType::None | LinkLayerType::Ppp | LinkLayerType::Rawip => LinkLayer::Ip,
                _ => LinkLayer::Other,
            },
            mac: None,
            mtu: 0,
            kind: None,
            up: message.header.flags.contains(LinkFlags::Up),
            carrier: message.header.flags.contains(LinkFlags::LowerUp),
            vlan: None,
            xdp: Vec::new(),
        };
        let mut lower = None;
        let mut lower_elsewhere = false;
        let mut tag = None;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => interface.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
                LinkAttribute::Address(address)
                    if message.header.link_layer_type == LinkLayerType::Ether =>
                {
                    interface.mac = address.as_slice().try_into().ok();
                }
                LinkAttribute::Link(index) => lower = Some(*index),
                // The index below then counts in the other namespace and may equal one of ours.
                LinkAttribute::LinkNetNsId(_) => lower_elsewhere = true,
                LinkAttribute::LinkInfo(infos) => {
                    for info in infos {
                        match info {
                            LinkInfo::Kind(kind) => interface.kind = Some(kind.to_string()),
                            LinkInfo::Data(InfoData::Vlan(vlan)) => tag = vlan_tag(vlan),
                            _ => {}
                        }
                    }
                }
                LinkAttribute::Xdp(xdp) => interface.xdp = xdp_programs(xdp),
                _ => {}
            }
        }
        if interface.kind.as_deref() == Some(&InfoKind::Vlan.to_string()) {
            interface.vlan = tag.map(|tag| VlanLink {
                tag,
                lower: lower.filter(|_| !lower_elsewhere),
            });
        }
        interface
    }
}

fn vlan_tag(attributes: &[InfoVlan]) -> Option<VlanTag> {
    let id = attributes.iter().find_map(|attribute| match attribute {
        InfoVlan::Id(id) => Some(*id),
        _ => None,
    })?;
    let protocol = attributes.iter().find_map(|attribute| match attribute {
        InfoVlan::Protocol(protocol) => Some(u16::from(*protocol)),
        _ => None,
    })?;
    Some(VlanTag { protocol, id })
}

fn xdp_programs(attributes: &[LinkXdp]) -> Vec<XdpProgram> {
    // Since Linux 4.19 (commit 4f91da26c811) each hook reports its program in an attribute of its
    // own, next to the older pair of IFLA_XDP_ATTACHED and IFLA_XDP_PROG_ID.
    let each: Vec<_> = attributes
        .iter()
        .filter_map(|attribute| match attribute {
            LinkXdp::DrvProgId(id) => Some(XdpProgram {
                id: *id,
                hook: XdpHook::Native,
            }),
            LinkXdp::SkbProgId(id) => Some(XdpProgram {
                id: *id,
                hook: XdpHook::Generic,
            }),
            LinkXdp::HwProgId(id) => Some(XdpProgram {
                id: *id,
                hook: XdpHook::Hardware,
            }),
            _ => None,
        })
        .collect();
    if !each.is_empty() {
        return each;
    }
    let hook = attributes.iter().find_map(|attribute| match attribute {
        LinkXdp::Attached(XdpAttached::Driver) => Some(XdpHook::Native),
        LinkXdp::Attached(XdpAttached::SocketBuffer) => Some(XdpHook::Generic),
        LinkXdp::Attached(XdpAttached::Hardware) => Some(XdpHook::Hardware),
        _ => None,
    });
    let id = attributes.iter().find_map(|attribute| match attribute {
        LinkXdp::ProgId(id) => Some(*id),
        _ => None,
    });
    id.zip(hook)
        .map(|(id, hook)| XdpProgram { id, hook })
        .into_iter()
        .collect()
}

/// Why an interface cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// No interface of that name in this network namespace.
    #[error("no interface `{name}`: this host has {}", .known.join(", "))]
    Unknown {
        /// The name asked for.
        name: String,
        /// Names of all interfaces.
        known: Vec<String>,
    },
}

/// All interfaces of one network namespace at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interfaces(Vec<Interface>);

impl Interfaces {
    /// Reads them from the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn read() -> Result<Self, NetlinkError> {
        Kernel::open()?.interfaces().map(Self)
    }

    /// Their names.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.0
            .iter()
            .map(|interface| interface.name.clone())
            .collect()
    }

    /// The interface of that name.
    ///
    /// # Errors
    /// [`InterfaceError::Unknown`], naming those that exist.
    pub fn named(&self, name: &str) -> Result<&Interface, InterfaceError> {
        self.0
            .iter()
            .find(|interface| interface.name == name)
            .ok_or_else(|| InterfaceError::Unknown {
                name: name.to_owned(),
                known: self.0.iter().map(|known| known.name.clone()).collect(),
            })
    }

    /// The interface of that index, if there is one.
    pub fn indexed(&self, index: u32) -> Option<&Interface> {
        self.0.iter().find(|interface| interface.index == index)
    }

    /// The VLAN devices directly on the interface of this index.
    pub fn vlans_on(&self, index: u32) -> impl Iterator<Item = &Interface> {
        self.0
            .iter()
            .filter(move |interface| interface.vlan.is_some_and(|vlan| vlan.lower == Some(index)))
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::VlanProtocol;

    use super::*;

    fn message(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.header.flags = LinkFlags::Up | LinkFlags::LowerUp;
        message.attributes = attributes;
        message
    }

    fn vlan(attributes: Vec<LinkAttribute>) -> Interface {
        let mut all = vec![
            LinkAttribute::IfName("eth0.5".to_owned()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Vlan),
                LinkInfo::Data(InfoData::Vlan(vec![
                    InfoVlan::Id(5),
                    InfoVlan::Protocol(VlanProtocol::Ieee8021Ad),
                ])),
            ]),
        ];
        all.extend(attributes);
        Interface::from_message(&message(9, all))
    }

    #[test]
    fn a_vlan_device_gives_its_tag_and_the_interface_below() {
        let tag = VlanTag {
            protocol: 0x88a8,
            id: 5,
        };
        let lower = Some(2);
        assert_eq!(
            vlan(vec![LinkAttribute::Link(2)]).vlan,
            Some(VlanLink { tag, lower })
        );
    }

    #[test]
    fn an_index_of_another_namespace_is_not_taken_for_one_of_ours() {
        let link = vlan(vec![LinkAttribute::Link(2), LinkAttribute::LinkNetNsId(0)]);
        assert_eq!(link.vlan.expect("still a VLAN device").lower, None);
    }

    #[test]
    fn the_peer_of_a_veth_is_not_an_interface_below() {
        let link = Interface::from_message(&message(
            3,
            vec![
                LinkAttribute::Link(2),
                LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)]),
            ],
        ));
        assert_eq!((link.vlan, link.kind.as_deref()), (None, Some("veth")));
    }

    #[test]
    fn only_ethernet_has_a_mac() {
        let mut message = message(1, vec![LinkAttribute::Address(vec![2, 0, 0, 0, 0, 1])]);
        assert_eq!(
            Interface::from_message(&message).mac,
            Some([2, 0, 0, 0, 0, 1])
        );
        for (kind, layer) in [
            (LinkLayerType::Loopback, LinkLayer::Other),
            (LinkLayerType::Ipgre, LinkLayer::Other),
            (LinkLayerType::None, LinkLayer::Ip),
            (LinkLayerType::Ppp, LinkLayer::Ip),
        ] {
            message.header.link_layer_type = kind;
            let link = Interface::from_message(&message);
            assert_eq!((link.mac, link.layer), (None, layer));
        }
    }

    #[test]
    fn every_attached_xdp_program_is_seen() {
        assert_eq!(
            xdp_programs(&[
                LinkXdp::Attached(XdpAttached::Multiple),
                LinkXdp::SkbProgId(7),
                LinkXdp::DrvProgId(8),
            ]),
            [
                XdpProgram {
                    id: 7,
                    hook: XdpHook::Generic
                },
                XdpProgram {
                    id: 8,
                    hook: XdpHook::Native
                },
            ]
        );
        assert_eq!(
            xdp_programs(&[LinkXdp::Attached(XdpAttached::Driver), LinkXdp::ProgId(9)]),
            [XdpProgram {
                id: 9,
                hook: XdpHook::Native
            }]
        );
        assert_eq!(xdp_programs(&[LinkXdp::Attached(XdpAttached::None)]), []);
    }
}
