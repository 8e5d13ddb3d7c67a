//! The two sockets: one to ask the kernel, one to hear of changes.

use std::{future::poll_fn, io};

use bytes::BytesMut;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable,
    NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    RouteNetlinkMessage, link::LinkMessage, neighbour::NeighbourMessage, route::RouteMessage,
    route::RouteType,
};
use netlink_sys::{AsyncSocket as _, Socket, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE};
use nix::{
    errno::Errno,
    sys::socket::{setsockopt, sockopt},
};

use super::{
    NextHopError, Path,
    link::Interface,
    neighbour,
    route::{self, Prefix, Route},
};

/// The kernel's netlink sockets failed. Nothing in the host's set-up causes this.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket to be had.
    #[error("cannot open a netlink socket: {0}; check the limit of open files")]
    Open(#[source] io::Error),
    /// Notifications cannot be read any more.
    #[error("cannot read the kernel's change notifications: {0}")]
    Notifications(#[source] io::Error),
    /// The attached interface was removed, and the datapath with it.
    #[error("the interface {0} is gone: attach again when it is back")]
    InterfaceGone(String),
    /// The list of interfaces cannot be read.
    #[error("cannot list the interfaces: {}", .0.desc())]
    Interfaces(Errno),
}

/// The kernel writes at most 32 KiB into one datagram (`netlink_recvmsg`, since Linux 4.9).
const DATAGRAM: usize = 64 * 1024;

/// Questions in one datagram. Their answers all lie in the receive buffer before the first is
/// read: 32 of at most 4.5 KiB each fit into the default 208 KiB.
const BATCH: usize = 32;

/// Receive buffer for notifications, in bytes: room for some 4,000 route changes.
const NOTIFICATION_BUFFER: usize = 4 << 20;

/// Datagrams of notifications read in one go, so that a storm does not keep others waiting.
const DRAIN: usize = 512;

type Answer = Result<Option<RouteNetlinkMessage>, Errno>;

/// The socket to ask.
///
/// It is not asynchronous, because the kernel is not: `rtnetlink_rcv` works inside the sender's
/// `sendmsg`, and when that returns the answer lies in the receive buffer.
pub(super) struct Kernel {
    socket: Socket,
    sequence: u32,
    outgoing: Vec<u8>,
    incoming: BytesMut,
}

impl Kernel {
    /// Opens it in the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self, NetlinkError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.set_non_blocking(true)?;
            Ok(socket)
        };
        Ok(Self {
            socket: open().map_err(NetlinkError::Open)?,
            sequence: 0,
            outgoing: Vec::new(),
            incoming: BytesMut::with_capacity(DATAGRAM),
        })
    }

    /// All interfaces.
    pub(super) fn interfaces(&mut self) -> Result<Vec<Interface>, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let dump = RouteNetlinkMessage::GetLink(LinkMessage::default());
        self.outgoing.clear();
        write(
            &mut self.outgoing,
            dump,
            NLM_F_REQUEST | NLM_F_DUMP,
            self.sequence,
        );
        self.socket
            .send(&self.outgoing, 0)
            .map_err(|error| NetlinkError::Interfaces(errno(&error)))?;
        let mut interfaces = Vec::new();
        loop {
            receive(&self.socket, &mut self.incoming).map_err(NetlinkError::Interfaces)?;
            for message in Messages(&self.incoming) {
                if message.sequence_number() != self.sequence {
                    continue;
                }
                match parse(message).map_err(NetlinkError::Interfaces)?.payload {
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                        interfaces.push(Interface::from_message(&link));
                    }
                    NetlinkPayload::Done(done) if done.code == 0 => return Ok(interfaces),
                    NetlinkPayload::Done(done) => {
                        return Err(NetlinkError::Interfaces(Errno::from_raw(-done.code)));
                    }
                    NetlinkPayload::Error(error) => {
                        return Err(NetlinkError::Interfaces(Errno::from_raw(-error.raw_code())));
                    }
                    _ => {}
                }
            }
        }
    }

    /// The interface of this index, if there is one.
    pub(super) fn interface(&mut self, index: u32) -> Result<Option<Interface>, NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let answer = self
            .ask(vec![RouteNetlinkMessage::GetLink(message)], 0)
            .pop();
        match answer {
            Some(Ok(Some(RouteNetlinkMessage::NewLink(link)))) => {
                Ok(Some(Interface::from_message(&link)))
            }
            Some(Err(Errno::ENODEV)) => Ok(None),
            Some(Err(errno)) => Err(NetlinkError::Interfaces(errno)),
            _ => Err(NetlinkError::Interfaces(Errno::EBADMSG)),
        }
    }

    /// The route of each path, in the same order.
    pub(super) fn routes(&mut self, paths: &[Path]) -> Vec<Result<Route, NextHopError>> {
        // Few local addresses serve many paths.
        let mut locals: Vec<_> = paths.iter().map(|path| path.local).collect();
        locals.sort_unstable();
        locals.dedup();
        let questions = locals
            .iter()
            .map(|local| route::local_question(*local))
            .collect();
        let local_answers: Vec<_> = self
            .ask(questions, 0)
            .into_iter()
            .map(route_message)
            .collect();
        let mut routes: Vec<_> = paths
            .iter()
            .map(|path| {
                route::precheck(*path)?;
                let at = locals
                    .binary_search(&path.local)
                    .map_err(|_| NextHopError::Kernel {
                        path: *path,
                        errno: Errno::ENOMSG,
                    })?;
                route::local_answer(*path, &local_answers[at])?;
                Ok(*path)
            })
            .collect();
        let questions = routes
            .iter()
            .filter_map(|route| route.as_ref().ok())
            .map(|path| route::question(*path))
            .collect();
        let mut answers = self.ask(questions, 0).into_iter();
        routes
            .drain(..)
            .map(|path| {
                let path = path?;
                let answer = answers.next().unwrap_or(Err(Errno::ENOMSG));
                route::answer(path, route_message(answer))
            })
            .collect()
    }

    /// The entry of each neighbour, in the same order.
    pub(super) fn neighbours(&mut self, keys: &[neighbour::Key]) -> Vec<neighbour::Entry> {
        let questions = keys.iter().map(|key| neighbour::question(*key)).collect();
        self.ask(questions, 0)
            .into_iter()
            .zip(keys)
            .map(|(answer, key)| match answer {
                Ok(Some(RouteNetlinkMessage::NewNeighbour(message))) => neighbour::entry(&message),
                // No entry, or no interface any more.
                Err(Errno::ENOENT | Errno::ENODEV) => neighbour::Entry::Unresolved,
                other => {
                    tracing::warn!(neighbour = %key.address, ?other, "neighbour cannot be read");
                    neighbour::Entry::Unresolved
                }
            })
            .collect()
    }

    /// Tells the kernel that packets go to these neighbours. Needs `CAP_NET_ADMIN`.
    pub(super) fn use_neighbours(&mut self, keys: &[neighbour::Key]) {
        let requests = keys.iter().map(|key| neighbour::usage(*key)).collect();
        for (answer, key) in self
            .ask(requests, NLM_F_ACK | NLM_F_CREATE)
            .iter()
            .zip(keys)
        {
            if let Err(errno) = answer
                && *errno != Errno::ENODEV
            {
                tracing::warn!(
                    neighbour = %key.address,
                    error = errno.desc(),
                    "the kernel will not look for the neighbour"
                );
            }
        }
    }

    /// One answer for each request, in the same order.
    fn ask(&mut self, requests: Vec<RouteNetlinkMessage>, flags: u16) -> Vec<Answer> {
        let mut answers = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let first = self.sequence.wrapping_add(1);
            self.outgoing.clear();
            let mut pending = Vec::with_capacity(BATCH);
            for request in requests.by_ref().take(BATCH) {
                self.sequence = self.sequence.wrapping_add(1);
                write(
                    &mut self.outgoing,
                    request,
                    NLM_F_REQUEST | flags,
                    self.sequence,
                );
                pending.push(None);
            }
            let lost = self
                .exchange(first, &mut pending)
                .err()
                .unwrap_or(Errno::ENOMSG);
            answers.extend(
                pending
                    .into_iter()
                    .map(|answer| answer.unwrap_or(Err(lost))),
            );
        }
        answers
    }

    fn exchange(&mut self, first: u32, pending: &mut [Option<Answer>]) -> Result<(), Errno> {
        self.socket
            .send(&self.outgoing, 0)
            .map_err(|error| errno(&error))?;
        let mut missing = pending.len();
        while missing > 0 {
            receive(&self.socket, &mut self.incoming)?;
            for message in Messages(&self.incoming) {
                let number = message.sequence_number().wrapping_sub(first) as usize;
                // Others are late answers to a batch that was given up.
                if let Some(slot @ None) = pending.get_mut(number) {
                    *slot = Some(parse(message).and_then(answer));
                    missing -= 1;
                }
            }
        }
        Ok(())
    }
}

fn answer(message: NetlinkMessage<RouteNetlinkMessage>) -> Answer {
    match message.payload {
        NetlinkPayload::InnerMessage(message) => Ok(Some(message)),
        NetlinkPayload::Error(error) if error.code.is_none() => Ok(None),
        NetlinkPayload::Error(error) => Err(Errno::from_raw(-error.raw_code())),
        _ => Err(Errno::EBADMSG),
    }
}

fn route_message(answer: Answer) -> Result<RouteMessage, Errno> {
    match answer? {
        Some(RouteNetlinkMessage::NewRoute(message)) => Ok(message),
        _ => Err(Errno::EBADMSG),
    }
}

fn write(buffer: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16, sequence: u32) {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let at = buffer.len();
    buffer.resize(at + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut buffer[at..]);
}

fn receive(socket: &Socket, buffer: &mut BytesMut) -> Result<(), Errno> {
    buffer.clear();
    buffer.reserve(DATAGRAM);
    socket.recv(buffer, 0).map_err(|error| errno(&error))?;
    Ok(())
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn parse(message: NetlinkBuffer<&[u8]>) -> Result<NetlinkMessage<RouteNetlinkMessage>, Errno> {
    NetlinkMessage::deserialize(message.into_inner()).map_err(|error| {
        tracing::warn!(%error, "a netlink message cannot be read");
        Errno::EBADMSG
    })
}

/// The messages of one datagram.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = NetlinkBuffer<&'a [u8]>;

    fn next(&mut self) -> Option<Self::Item> {
        let header = NetlinkBuffer::new_checked(self.0).ok()?;
        let length = header.length() as usize;
        let (message, rest) = self.0.split_at(length);
        // Each message starts at a multiple of four (NLMSG_ALIGN).
        self.0 = rest
            .get(length.next_multiple_of(4) - length..)
            .unwrap_or(&[]);
        Some(NetlinkBuffer::new(message))
    }
}

/// Something changed and is to be read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Hint {
    /// The interface of this index.
    Link(u32),
    /// One neighbour.
    Neighbour(neighbour::Key),
    /// A route to this prefix.
    Route {
        /// What it covers.
        prefix: Prefix,
        /// Whether it declares addresses to be the host's own.
        local: bool,
    },
    /// Policy rules, addresses or next-hop objects: any route lookup may end differently.
    Routing,
    /// Notifications were lost: everything.
    Lost,
}

/// Multicast groups of `enum rtnetlink_groups`, which are bits in a bind up to 31.
const LINK: u32 = 1;
const NEIGHBOUR: u32 = 3;
const IPV4_ADDRESS: u32 = 5;
const IPV4_ROUTE: u32 = 7;
const IPV4_RULE: u32 = 8;
const IPV6_ADDRESS: u32 = 9;
const IPV6_ROUTE: u32 = 11;
const IPV6_RULE: u32 = 19;
const NEXT_HOP_OBJECT: u32 = 32;

/// Message types of `linux/rtnetlink.h`, each followed by its deletion.
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;

/// The socket that hears of changes.
pub(super) struct Notifications {
    socket: TokioSocket,
    incoming: BytesMut,
}

impl Notifications {
    /// Opens it in the network namespace of the calling thread, which is in a Tokio runtime.
    pub(super) fn open() -> Result<Self, NetlinkError> {
        let open = || {
            let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
            let groups = [
                LINK,
                NEIGHBOUR,
                IPV4_ADDRESS,
                IPV4_ROUTE,
                IPV4_RULE,
                IPV6_ADDRESS,
                IPV6_ROUTE,
                IPV6_RULE,
            ]
            .iter()
            .fold(0, |groups, group| groups | 1 << (group - 1));
            // Beyond rmem_max by CAP_NET_ADMIN. A smaller buffer only overruns earlier, and an
            // overrun is mended by reading all again.
            if let Err(error) = setsockopt(
                socket.socket_ref(),
                sockopt::RcvBufForce,
                &NOTIFICATION_BUFFER,
            ) {
                tracing::debug!(
                    error = error.desc(),
                    "small buffer for netlink notifications"
                );
            }
            socket.socket_mut().bind(&SocketAddr::new(0, groups))?;
            // Since Linux 5.3; before, there are no next-hop objects.
            if let Err(error) = socket.socket_mut().add_membership(NEXT_HOP_OBJECT) {
                tracing::debug!(%error, "no notifications of next-hop objects");
            }
            Ok(socket)
        };
        Ok(Self {
            socket: open().map_err(NetlinkError::Open)?,
            incoming: BytesMut::with_capacity(DATAGRAM),
        })
    }

    /// Waits for a notification, then takes what else is there. Loses nothing when cancelled.
    pub(super) async fn read(&mut self, hints: &mut Vec<Hint>) -> Result<(), NetlinkError> {
        self.incoming.clear();
        self.incoming.reserve(DATAGRAM);
        let first = poll_fn(|context| self.socket.poll_recv(context, &mut self.incoming)).await;
        match first {
            Ok(()) => hints.extend(Messages(&self.incoming).filter_map(|message| hint(&message))),
            Err(error) => overrun(&error, hints)?,
        }
        for _ in 1..DRAIN {
            self.incoming.clear();
            self.incoming.reserve(DATAGRAM);
            match self.socket.socket_ref().recv(&mut self.incoming, 0) {
                Ok(_) => {
                    hints.extend(Messages(&self.incoming).filter_map(|message| hint(&message)));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => overrun(&error, hints)?,
            }
        }
        Ok(())
    }
}

fn overrun(error: &io::Error, hints: &mut Vec<Hint>) -> Result<(), NetlinkError> {
    match errno(error) {
        Errno::ENOBUFS => hints.push(Hint::Lost),
        Errno::EINTR => {}
        errno => return Err(NetlinkError::Notifications(errno.into())),
    }
    Ok(())
}

fn hint(message: &NetlinkBuffer<&[u8]>) -> Option<Hint> {
    let kind = message.message_type();
    match kind {
        RTM_NEWADDR | RTM_DELADDR | RTM_NEWRULE | RTM_DELRULE | RTM_NEWNEXTHOP | RTM_DELNEXTHOP => {
            return Some(Hint::Routing);
        }
        RTM_NEWLINK | RTM_DELLINK | RTM_NEWROUTE | RTM_DELROUTE | RTM_NEWNEIGH | RTM_DELNEIGH => {}
        _ => return None,
    }
    let mut header = NetlinkHeader::default();
    header.message_type = kind;
    match RouteNetlinkMessage::deserialize(&header, message.payload()) {
        Ok(RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link)) => {
            Some(Hint::Link(link.header.index))
        }
        Ok(
            RouteNetlinkMessage::NewNeighbour(neighbour)
            | RouteNetlinkMessage::DelNeighbour(neighbour),
        ) => neighbour_hint(&neighbour),
        Ok(RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route)) => {
            let prefix = route::prefix(&route)?;
            Some(Hint::Route {
                prefix,
                local: route.header.kind == RouteType::Local,
            })
        }
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(%error, kind, "a netlink notification cannot be read");
            Some(Hint::Lost)
        }
    }
}

fn neighbour_hint(message: &NeighbourMessage) -> Option<Hint> {
    neighbour::key(message).map(Hint::Neighbour)
}
