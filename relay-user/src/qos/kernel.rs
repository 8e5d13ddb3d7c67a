//! What shaping asks of the kernel, and the kernel's answer.

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
};
use nix::{errno::Errno, libc};

use super::object::{INGRESS, Message, Object};
use crate::netlink::{Refusal, exchange};

/// What can be changed or asked for. The real one is [`Rtnetlink`]; tests put one before it that
/// fails where they want.
pub trait Kernel {
    /// Creates, changes or deletes what the message names. `flags` are netlink's, such as
    /// `NLM_F_CREATE`.
    ///
    /// # Errors
    /// The kernel's answer.
    fn change(&mut self, message: &Message, flags: u16) -> Result<(), Refusal>;

    /// All objects of an interface, of the kind that the message asks for (`RTM_GETQDISC`,
    /// `RTM_GETTCLASS`, `RTM_GETTFILTER`), with what the kernel counts of them.
    ///
    /// # Errors
    /// The kernel's answer.
    fn dump(&mut self, question: Message) -> Result<Vec<Object>, Refusal>;

    /// Creates an IFB device that is up.
    ///
    /// # Errors
    /// The kernel's answer.
    fn create_ifb(&mut self, name: &str) -> Result<(), Refusal>;

    /// Deletes a device. One that is gone is no error.
    ///
    /// # Errors
    /// The kernel's answer.
    fn delete_link(&mut self, index: u32) -> Result<(), Refusal>;
}

/// The kernel, in the network namespace of the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rtnetlink;

impl Kernel for Rtnetlink {
    fn change(&mut self, message: &Message, flags: u16) -> Result<(), Refusal> {
        exchange(message.clone(), NLM_F_ACK | flags, |_| {})
    }

    fn dump(&mut self, question: Message) -> Result<Vec<Object>, Refusal> {
        let index = question.index;
        let mut objects = Vec::new();
        exchange(question, NLM_F_DUMP, |answer| {
            // A dump of queueing disciplines is of all interfaces (tc_dump_qdisc()).
            if answer.index == index && answer.object.parent != INGRESS {
                objects.push(answer.object);
            }
        })?;
        Ok(objects)
    }

    fn create_ifb(&mut self, name: &str) -> Result<(), Refusal> {
        /// As Ethernet has it (DEFAULT_TX_QUEUE_LEN). Of itself, the device has 32 (TX_Q_LIMIT in
        /// drivers/net/ifb.c): too few for a burst while nothing is shaped.
        const QUEUE: u32 = 1_000;
        let mut link = LinkMessage::default();
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::TxQueueLen(QUEUE),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Ifb)]),
        ];
        exchange(
            RouteNetlinkMessage::NewLink(link),
            NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL,
            |_| {},
        )
    }

    fn delete_link(&mut self, index: u32) -> Result<(), Refusal> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        match exchange(RouteNetlinkMessage::DelLink(link), NLM_F_ACK, |_| {}) {
            Err(refusal) if refusal.errno == Errno::ENODEV => Ok(()),
            outcome => outcome,
        }
    }
}

/// A question for [`Kernel::dump`].
pub(super) fn question(kind: u16, index: u32, parent: u32) -> Message {
    Message {
        kind,
        index,
        object: Object {
            parent,
            ..Object::default()
        },
    }
}

/// `RTM_NEWQDISC` and its like: create or change.
pub(super) const NEW_QDISC: u16 = libc::RTM_NEWQDISC;
pub(super) const DELETE_QDISC: u16 = libc::RTM_DELQDISC;
pub(super) const GET_QDISC: u16 = libc::RTM_GETQDISC;
pub(super) const NEW_CLASS: u16 = libc::RTM_NEWTCLASS;
pub(super) const DELETE_CLASS: u16 = libc::RTM_DELTCLASS;
pub(super) const GET_CLASS: u16 = libc::RTM_GETTCLASS;
pub(super) const NEW_FILTER: u16 = libc::RTM_NEWTFILTER;
pub(super) const DELETE_FILTER: u16 = libc::RTM_DELTFILTER;
pub(super) const GET_FILTER: u16 = libc::RTM_GETTFILTER;
