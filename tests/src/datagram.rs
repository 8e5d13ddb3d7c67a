//! One received message with the facts that the kernel hands over beside it (`recvmsg` control messages).

use std::{
    io, mem,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr,
    time::Duration,
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{MsgFlags, SockaddrStorage, recv, sendto},
};

/// What `recvmsg` says about a message.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Facts {
    /// Bytes of the message, which may be more than the buffer holds (`MSG_TRUNC`).
    pub(crate) len: usize,
    /// When the kernel received it, since the Unix epoch (`SO_TIMESTAMPNS`).
    pub(crate) at: Duration,
    /// UDP source.
    pub(crate) source: Option<SocketAddr>,
    /// TOS or traffic class.
    pub(crate) tos: u8,
    /// TTL or hop limit.
    pub(crate) ttl: u8,
    /// AF_PACKET: `sll_pkttype` of packet(7).
    pub(crate) packet_type: u8,
    /// AF_PACKET: the VLAN tag that the kernel took out of the frame, as TPID and TCI.
    pub(crate) vlan: Option<(u16, u16)>,
    /// AF_PACKET: the checksum is left to a device (`TP_STATUS_CSUMNOTREADY`).
    pub(crate) checksum_pending: bool,
}

/// Sets an integer socket option.
pub(crate) fn set_option(
    socket: BorrowedFd<'_>,
    level: i32,
    name: i32,
    value: i32,
) -> io::Result<()> {
    // SAFETY: the pointer and length describe `value`, which lives across the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            ptr::from_ref(&value).cast(),
            mem::size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sends a datagram out of the caller's memory (`MSG_ZEROCOPY`), which must stay as it is until the kernel has let go
/// of it. The socket has `SO_ZEROCOPY`.
pub(crate) fn lend(socket: BorrowedFd<'_>, datagram: &[u8], to: SocketAddr) -> io::Result<usize> {
    let (socket, to) = (socket.as_raw_fd(), SockaddrStorage::from(to));
    let flags = MsgFlags::from_bits_retain(libc::MSG_ZEROCOPY);
    Ok(sendto(socket, datagram, &to, flags)?)
}

/// Takes the notifications about what was lent from the socket, which is ready to be read for as long as it has any.
pub(crate) fn forget_notifications(socket: BorrowedFd<'_>) -> io::Result<()> {
    loop {
        match recv(socket.as_raw_fd(), &mut [], MsgFlags::MSG_ERRQUEUE) {
            Ok(_) => {}
            // It never waits.
            Err(Errno::EAGAIN) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives one message without waiting.
///
/// # Errors
/// `WouldBlock` when there is none; otherwise what the socket reports.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Facts> {
    // SAFETY: all-zero is a valid value of these plain C structures.
    let (mut name, mut message): (libc::sockaddr_storage, libc::msghdr) =
        unsafe { (mem::zeroed(), mem::zeroed()) };
    let mut vector = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // u64 elements give the alignment that cmsghdr needs.
    let mut control = [0_u64; 32];
    message.msg_name = ptr::from_mut(&mut name).cast();
    message.msg_namelen = mem::size_of_val(&name) as libc::socklen_t;
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = mem::size_of_val(&control);
    // SAFETY: every pointer in `message` describes a live local buffer of the stated length.
    let len = unsafe {
        libc::recvmsg(
            socket.as_raw_fd(),
            &raw mut message,
            libc::MSG_DONTWAIT | libc::MSG_TRUNC,
        )
    };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    let mut facts = Facts {
        len,
        ..Facts::default()
    };
    match i32::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that the kernel wrote a sockaddr_in, which is smaller than the storage.
            let address = unsafe { ptr::from_ref(&name).cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
            facts.source = Some(SocketAddrV4::new(ip, u16::from_be(address.sin_port)).into());
        }
        libc::AF_INET6 => {
            // SAFETY: as above, for sockaddr_in6.
            let address = unsafe { ptr::from_ref(&name).cast::<libc::sockaddr_in6>().read() };
            let ip = Ipv6Addr::from(address.sin6_addr.s6_addr);
            facts.source =
                Some(SocketAddrV6::new(ip, u16::from_be(address.sin6_port), 0, 0).into());
        }
        libc::AF_PACKET => {
            // SAFETY: as above, for sockaddr_ll.
            facts.packet_type =
                unsafe { ptr::from_ref(&name).cast::<libc::sockaddr_ll>().read() }.sll_pkttype;
        }
        _ => {}
    }
    // SAFETY: the CMSG functions walk within msg_controllen, which the kernel has just set.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return pointers to whole headers inside `control`, and the kernel
        // puts the type's data behind each.
        unsafe {
            let data = libc::CMSG_DATA(header);
            match ((*header).cmsg_level, (*header).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) => {
                    let time = data.cast::<libc::timespec>().read_unaligned();
                    facts.at = Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32);
                }
                // ip(7): TOS comes as one byte, TTL as an int; ipv6(7): both as int.
                (libc::IPPROTO_IP, libc::IP_TOS) => facts.tos = data.read(),
                (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => {
                    facts.ttl = data.cast::<i32>().read_unaligned() as u8;
                }
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    facts.tos = data.cast::<i32>().read_unaligned() as u8
                }
                (libc::SOL_PACKET, libc::PACKET_AUXDATA) => {
                    let aux = data.cast::<libc::tpacket_auxdata>().read_unaligned();
                    facts.checksum_pending = aux.tp_status & libc::TP_STATUS_CSUMNOTREADY != 0;
                    if aux.tp_status & libc::TP_STATUS_VLAN_VALID != 0 {
                        facts.vlan = Some((aux.tp_vlan_tpid, aux.tp_vlan_tci));
                    }
                }
                _ => {}
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok(facts)
}
