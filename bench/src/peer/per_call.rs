//! A relay in userspace as Asterisk's native bridge is one: a thread for each call waits for its two sockets with
//! poll(2), takes one packet with recvfrom(2), and passes it on with sendto(2).

use std::{
    io,
    net::{SocketAddrV4, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::mpsc,
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket,
    unistd::{Pid, gettid},
};
use relay_tests::namespace::Host;

use crate::wire::{
    call::{Call, Leg},
    cpu::pin_here,
};

/// Bytes that Asterisk has for a packet (`rtp_read()` in res/res_rtp_asterisk.c reads into 8,192).
const BUFFER: usize = 8192;

/// The relay. Dropping it ends its threads.
pub(crate) struct PerCall {
    sockets: Vec<UdpSocket>,
    threads: Vec<JoinHandle<()>>,
    ids: Vec<Pid>,
}

impl PerCall {
    /// Starts a thread for each call, on a CPU.
    ///
    /// # Errors
    /// An address is not the machine's, or taken.
    pub(crate) fn start(host: &Host, calls: &[Call], cpu: usize) -> Result<Self> {
        let (started, ids) = mpsc::channel();
        let mut relay = Self {
            sockets: Vec::new(),
            threads: Vec::new(),
            ids: Vec::new(),
        };
        for call in calls {
            let bind = |leg: &Leg| {
                let socket = host.run(|| UdpSocket::bind(leg.local));
                socket.with_context(|| format!("cannot bind {}", leg.local))
            };
            let sockets = [bind(&call[0])?, bind(&call[1])?];
            for socket in &sockets {
                relay.sockets.push(socket.try_clone()?);
            }
            let remotes = call.map(|leg| leg.remote);
            let started = started.clone();
            let body = move || {
                let ready = pin_here(cpu);
                // Whoever started the thread listens.
                let _ = started.send(ready.map(|()| gettid()));
                if let Err(error) = serve(&sockets, remotes) {
                    eprintln!("a userspace relay ends: {error}");
                }
            };
            let thread = thread::Builder::new().name("call".to_owned());
            relay.threads.push(thread.spawn(body)?);
            relay.ids.push(ids.recv().context("a thread ended")??);
        }
        Ok(relay)
    }

    /// Its threads.
    pub(crate) fn threads(&self) -> &[Pid] {
        &self.ids
    }
}

fn serve(sockets: &[UdpSocket; 2], remotes: [SocketAddrV4; 2]) -> io::Result<()> {
    let remotes = remotes.map(socket::SockaddrIn::from);
    let mut buffer = [0; BUFFER];
    loop {
        let mut waiting = [0, 1].map(|side| PollFd::new(sockets[side].as_fd(), PollFlags::POLLIN));
        poll(&mut waiting, PollTimeout::NONE)?;
        let events = waiting.map(|side| side.revents().unwrap_or(PollFlags::empty()));
        for side in 0..2 {
            if events[side].contains(PollFlags::POLLHUP) {
                return Ok(());
            }
            if events[side].contains(PollFlags::POLLIN) {
                let from = sockets[side].as_raw_fd();
                let (length, _) = socket::recvfrom::<socket::SockaddrIn>(from, &mut buffer)?;
                let to = sockets[1 - side].as_raw_fd();
                let flags = socket::MsgFlags::empty();
                socket::sendto(to, &buffer[..length], &remotes[1 - side], flags)?;
            }
        }
    }
}

impl Drop for PerCall {
    fn drop(&mut self) {
        for socket in &self.sockets {
            // Wakes the thread although it says that there is no connection (inet_shutdown() in net/ipv4/af_inet.c).
            let _ = socket::shutdown(socket.as_raw_fd(), socket::Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
