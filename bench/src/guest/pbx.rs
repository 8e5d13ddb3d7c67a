//! A PBX that forwards what it gets, which is what a proof is about.

use std::{
    io::ErrorKind,
    net::UdpSocket,
    os::fd::AsFd as _,
    sync::mpsc,
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result};
use nix::{
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::{EfdFlags, EventFd},
    },
    unistd::{Pid, gettid},
};

use super::traffic::Call;

/// Forwards until it is dropped, in one thread.
pub(super) struct Pbx {
    task: Pid,
    stop: EventFd,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Pbx {
    /// Binds to the calls' local addresses.
    pub(super) fn start(calls: &[Call]) -> Result<Self> {
        let legs: Vec<_> = calls.iter().flatten().copied().collect();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut sockets = Vec::new();
        for (number, leg) in legs.iter().enumerate() {
            let socket = UdpSocket::bind(leg.local).context("the PBX's socket")?;
            socket.set_nonblocking(true)?;
            epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, number as u64))?;
            sockets.push(socket);
        }
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        epoll.add(
            stop.as_fd(),
            EpollEvent::new(EpollFlags::EPOLLIN, sockets.len() as u64),
        )?;
        let (named, name) = mpsc::channel();
        let forward = move || -> Result<()> {
            named.send(gettid())?;
            let mut events = [EpollEvent::empty(); 16];
            let mut packet = [0; 2048];
            loop {
                let ready = epoll.wait(&mut events, EpollTimeout::NONE)?;
                for event in &events[..ready] {
                    let number = event.data() as usize;
                    let Some(socket) = sockets.get(number) else {
                        return Ok(());
                    };
                    let length = match socket.recv(&mut packet) {
                        Ok(length) => length,
                        Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                        Err(error) => return Err(error).context("receive"),
                    };
                    // The other leg of a call is the neighbour in the list.
                    let other = number ^ 1;
                    sockets[other].send_to(&packet[..length], legs[other].remote)?;
                }
            }
        };
        let thread = thread::Builder::new()
            .name("pbx".to_owned())
            .spawn(forward)?;
        Ok(Self {
            task: name.recv()?,
            stop,
            thread: Some(thread),
        })
    }

    /// The thread that forwards.
    pub(super) fn task(&self) -> Pid {
        self.task
    }
}

impl Drop for Pbx {
    fn drop(&mut self) {
        // Without it the thread goes on until the process ends: no more than that.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
