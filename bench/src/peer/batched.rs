//! A relay in userspace made to be fast: one thread waits for all sockets with epoll(7), and takes and passes on what
//! each has with one recvmmsg(2) and one sendmmsg(2).

use std::{
    io::IoSlice,
    io::IoSliceMut,
    net::{SocketAddrV4, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::EventFd,
        socket::{MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg},
    },
    unistd::{Pid, gettid},
};
use relay_tests::namespace::Host;

use crate::wire::{call::Call, cpu::pin_here};

/// Packets that are taken from a socket at once.
const BATCH: usize = 32;
/// Bytes of a packet at most.
const PACKET: usize = 2048;
/// Sockets that are looked at after one wait.
const EVENTS: usize = 64;
/// What epoll says of [`Batched::end`].
const END: u64 = u64::MAX;

/// The relay. Dropping it ends its thread.
pub(crate) struct Batched {
    end: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    id: Pid,
}

/// Where packets of a socket go.
struct Way {
    from: UdpSocket,
    /// Index of the socket that sends.
    by: usize,
    to: SocketAddrV4,
}

impl Batched {
    /// Starts it on a CPU.
    ///
    /// # Errors
    /// An address is not the machine's, or taken.
    pub(crate) fn start(host: &Host, calls: &[Call], cpu: usize) -> Result<Self> {
        let mut ways = Vec::new();
        for (number, call) in calls.iter().enumerate() {
            for side in 0..2 {
                let local = call[side].local;
                let from = host
                    .run(|| UdpSocket::bind(local))
                    .with_context(|| format!("cannot bind {local}"))?;
                ways.push(Way {
                    from,
                    by: 2 * number + 1 - side,
                    to: call[1 - side].remote,
                });
            }
        }
        let end = Arc::new(EventFd::new()?);
        let epoll = Epoll::new(EpollCreateFlags::empty())?;
        epoll.add(end.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, END))?;
        for (number, way) in (0..).zip(&ways) {
            epoll.add(&way.from, EpollEvent::new(EpollFlags::EPOLLIN, number))?;
        }
        let (started, id) = mpsc::channel();
        let thread = thread::Builder::new().name("batched".to_owned());
        let thread = thread.spawn(move || {
            let ready = pin_here(cpu);
            // Whoever started the thread listens.
            let _ = started.send(ready.map(|()| gettid()));
            if let Err(error) = serve(&epoll, &ways) {
                eprintln!("a userspace relay ends: {error}");
            }
        })?;
        Ok(Self {
            end,
            thread: Some(thread),
            id: id.recv().context("the thread ended")??,
        })
    }

    /// Its thread.
    pub(crate) const fn thread(&self) -> Pid {
        self.id
    }
}

fn serve(epoll: &Epoll, ways: &[Way]) -> nix::Result<()> {
    let mut packets = vec![[0; PACKET]; BATCH];
    let mut events = [EpollEvent::empty(); EVENTS];
    let mut received = MultiHeaders::<SockaddrIn>::preallocate(BATCH, None);
    let mut sent = MultiHeaders::<SockaddrIn>::preallocate(BATCH, None);
    let mut lengths = Vec::with_capacity(BATCH);
    loop {
        let ready = epoll.wait(&mut events, EpollTimeout::NONE)?;
        for event in &events[..ready] {
            if event.data() == END {
                return Ok(());
            }
            let way = &ways[event.data() as usize];
            let mut slices: Vec<_> = packets
                .iter_mut()
                .map(|packet| [IoSliceMut::new(packet)])
                .collect();
            let from = way.from.as_raw_fd();
            let taken = recvmmsg(
                from,
                &mut received,
                slices.iter_mut(),
                MsgFlags::MSG_DONTWAIT,
                None,
            );
            lengths.clear();
            match taken {
                Ok(taken) => lengths.extend(taken.map(|packet| packet.bytes)),
                Err(Errno::EAGAIN) => continue,
                Err(error) => return Err(error),
            }
            let slices: Vec<_> = packets
                .iter()
                .zip(&lengths)
                .map(|(packet, &length)| [IoSlice::new(&packet[..length])])
                .collect();
            let to = vec![Some(SockaddrIn::from(way.to)); slices.len()];
            let by = ways[way.by].from.as_raw_fd();
            sendmmsg(by, &mut sent, &slices, &to, [], MsgFlags::empty())?;
        }
    }
}

impl Drop for Batched {
    fn drop(&mut self) {
        // The counter is far from full.
        let _ = self.end.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
