//! One question to the kernel by netlink, and all that it answers.

use std::{fmt, io};

use netlink_packet_core::{
    ErrorMessage, NLM_F_REQUEST, NetlinkDeserializable, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable, NlasIterator,
};
use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_GENERIC, NETLINK_ROUTE},
};
use nix::errno::Errno;

/// The kernel's no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Its error number.
    pub errno: Errno,
    /// What it says besides (extended acknowledgement, include/linux/netlink.h), if anything.
    pub message: Option<String>,
}

impl Refusal {
    fn from_answer(error: &ErrorMessage) -> Self {
        /// Of `struct nlmsghdr`: the question's, which the kernel repeats before its attributes.
        const HEADER: usize = 16;
        /// `enum nlmsgerr_attrs` in include/uapi/linux/netlink.h.
        const NLMSGERR_ATTR_MSG: u16 = 1;
        let attributes = error.header.get(HEADER..).unwrap_or_default();
        let message = NlasIterator::new(attributes)
            .map_while(Result::ok)
            .find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG)
            .map(|attribute| String::from_utf8_lossy(attribute.value()).into_owned());
        Self {
            errno: Errno::from_raw(-error.raw_code()),
            message: message.map(|text| text.trim_end_matches('\0').to_owned()),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.message {
            Some(message) => write!(f, "{}: {message}", self.errno.desc()),
            None => f.write_str(self.errno.desc()),
        }
    }
}

impl std::error::Error for Refusal {}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self {
            errno,
            message: None,
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        error
            .raw_os_error()
            .map_or(Errno::EIO, Errno::from_raw)
            .into()
    }
}

impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> Self {
        refusal.errno.into()
    }
}

/// Asks the kernel about routing, links and queues in the network namespace of the calling thread, and
/// hears all it answers.
///
/// # Errors
/// What the kernel answers instead.
pub(crate) fn exchange<M: NetlinkSerializable + NetlinkDeserializable>(
    request: M,
    flags: u16,
    each: impl FnMut(M),
) -> Result<(), Refusal> {
    exchange_by(NETLINK_ROUTE, request, flags, each)
}

/// The same by generic netlink, which carries the families that have no protocol of their own.
///
/// # Errors
/// What the kernel answers instead.
pub(crate) fn exchange_generic<M: NetlinkSerializable + NetlinkDeserializable>(
    request: M,
    flags: u16,
    each: impl FnMut(M),
) -> Result<(), Refusal> {
    exchange_by(NETLINK_GENERIC, request, flags, each)
}

fn exchange_by<M: NetlinkSerializable + NetlinkDeserializable>(
    protocol: isize,
    request: M,
    flags: u16,
    mut each: impl FnMut(M),
) -> Result<(), Refusal> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.set_cap_ack(true)?;
    socket.set_ext_ack(true)?;
    let mut message =
        NetlinkMessage::new(Default::default(), NetlinkPayload::InnerMessage(request));
    message.header.flags = NLM_F_REQUEST | flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    loop {
        // One read of a dump or an answer holds several messages, each aligned to 4 bytes.
        let (received, _) = socket.recv_from_full()?;
        let mut rest = &received[..];
        while !rest.is_empty() {
            let message = NetlinkMessage::<M>::deserialize(rest).map_err(io::Error::other)?;
            let length = (message.header.length as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
            match message.payload {
                NetlinkPayload::InnerMessage(message) => each(message),
                NetlinkPayload::Done(done) if done.code == 0 => return Ok(()),
                NetlinkPayload::Done(done) => return Err(Errno::from_raw(-done.code).into()),
                NetlinkPayload::Error(error) if error.raw_code() == 0 => return Ok(()),
                NetlinkPayload::Error(error) => return Err(Refusal::from_answer(&error)),
                _ => {}
            }
        }
    }
}
