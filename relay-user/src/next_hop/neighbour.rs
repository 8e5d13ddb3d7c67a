//! Neighbour entries: the question, and what an answer means.

use std::net::IpAddr;

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
    },
};

/// Names one neighbour entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    /// Interface index.
    pub(super) interface: u32,
    /// The gateway, or the remote itself.
    pub(super) address: IpAddr,
}

/// What the kernel holds for a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// No address that packets may be sent to.
    Unresolved,
    /// Packets are sent to `mac`.
    Resolved {
        /// In the order of the wire; `None` where the interface has other addresses than Ethernet.
        mac: Option<[u8; 6]>,
        /// Whether anything keeps watch over it.
        freshness: Freshness,
    },
}

/// How far the kernel vouches for a resolved neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Freshness {
    /// Set by hand or by the kind of interface; never verified, never expires.
    Fixed,
    /// Confirmed lately, or being verified now.
    Verified,
    /// Confirmed long ago; verified only when used.
    Stale,
}

/// `RTM_GETNEIGH` for one entry (Linux 5.0 and later).
pub(super) fn question(key: Key) -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetNeighbour(message(key))
}

/// `RTM_NEWNEIGH` with `NTF_USE`: tells the kernel that a packet is about to be sent there.
///
/// It does what sending would (`neigh_event_send`): an entry without an address is resolved, a
/// stale one verified; one that is fresh is left alone.
pub(super) fn usage(key: Key) -> RouteNetlinkMessage {
    let mut message = message(key);
    message.header.flags = NeighbourFlags::Use;
    RouteNetlinkMessage::NewNeighbour(message)
}

fn message(key: Key) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = match key.address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.ifindex = key.interface;
    message
        .attributes
        .push(NeighbourAttribute::Destination(key.address.into()));
    message
}

/// Which entry a message is about; `None` for bridge forwarding entries and the like.
pub(super) fn key(message: &NeighbourMessage) -> Option<Key> {
    Some(Key {
        interface: message.header.ifindex,
        address: address(message)?,
    })
}

/// Whose entry it is.
pub(crate) fn address(message: &NeighbourMessage) -> Option<IpAddr> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                Some((*address).into())
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                Some((*address).into())
            }
            _ => None,
        })
}

/// Reads an entry.
pub(super) fn entry(message: &NeighbourMessage) -> Entry {
    let freshness = match message.header.state {
        NeighbourState::Permanent | NeighbourState::Noarp => Freshness::Fixed,
        NeighbourState::Reachable | NeighbourState::Delay | NeighbourState::Probe => {
            Freshness::Verified
        }
        NeighbourState::Stale => Freshness::Stale,
        _ => return Entry::Unresolved,
    };
    let mac = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(address) => address.as_slice().try_into().ok(),
            _ => None,
        });
    Entry::Resolved { mac, freshness }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_usable_as_the_kernel_uses_them() {
        let read = |state| {
            let mut message = message(Key {
                interface: 2,
                address: IpAddr::from([192, 0, 2, 9]),
            });
            message.header.state = state;
            message
                .attributes
                .push(NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, 9]));
            entry(&message)
        };
        let resolved = |freshness| Entry::Resolved {
            mac: Some([2, 0, 0, 0, 0, 9]),
            freshness,
        };
        for (state, entry) in [
            (NeighbourState::Reachable, resolved(Freshness::Verified)),
            (NeighbourState::Delay, resolved(Freshness::Verified)),
            (NeighbourState::Probe, resolved(Freshness::Verified)),
            (NeighbourState::Stale, resolved(Freshness::Stale)),
            (NeighbourState::Permanent, resolved(Freshness::Fixed)),
            (NeighbourState::Noarp, resolved(Freshness::Fixed)),
            (NeighbourState::Incomplete, Entry::Unresolved),
            (NeighbourState::Failed, Entry::Unresolved),
            (NeighbourState::None, Entry::Unresolved),
        ] {
            assert_eq!(read(state), entry, "{state}");
        }
    }

    #[test]
    fn a_bridge_entry_is_no_neighbour() {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, 9]));
        assert_eq!(key(&message), None);
    }
}
