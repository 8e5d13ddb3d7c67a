//! An access line, such as DSL, with a modem at either end: it sends one packet after the other, at its rate, and keeps
//! those that wait in a plain queue.
//!
//! A qdisc is no stand-in for one: a shaper with a burst lets a packet pass that a line would still be busy for, and one
//! without loses rate whenever its timer is late. Here departures follow from the model alone, and a late thread delays
//! a packet but takes nothing from the rate.

use std::{
    collections::VecDeque,
    io,
    os::fd::AsFd as _,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, ppoll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        time::TimeSpec,
    },
};

use crate::{namespace::Host, tun::Tun};

/// What each packet takes on the line beside itself: an Ethernet header, as a shaper at an Ethernet port counts it.
const OVERHEAD: usize = 14;
/// Longest packet.
const PACKET: usize = 2048;
/// Packets that wait in the modem before the fast direction, which none of the tests fills.
pub(crate) const DOWNLINK_QUEUE: usize = 1000;

/// What a line is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// From the first end, bit/s.
    pub uplink: u64,
    /// To the first end, bit/s.
    pub downlink: u64,
    /// Packets that wait at the first end; what comes then is dropped.
    pub queue: usize,
    /// Time on the way, each direction.
    pub delay: Duration,
}

impl Access {
    /// The slow DSL of a small office: 1 Mbit/s up with a modem that holds 64 packets, 8 Mbit/s down, 10 ms.
    pub const DSL: Self = Self {
        uplink: 1_000_000,
        downlink: 8_000_000,
        queue: 64,
        delay: Duration::from_millis(10),
    };
}

/// A line between two machines, at an interface `dsl0` of each. It goes with this.
#[derive(Debug)]
pub struct Line {
    close: Arc<EventFd>,
    directions: Vec<JoinHandle<()>>,
}

impl Line {
    /// Joins two machines; each end is a machine with its address and prefix length.
    ///
    /// # Errors
    /// See [`Tun::open`].
    pub fn connect(
        access: Access,
        (first, first_address): (&Host, &str),
        (second, second_address): (&Host, &str),
    ) -> Result<Self> {
        let first = Arc::new(Tun::open(first, "dsl0", first_address)?);
        let second = Arc::new(Tun::open(second, "dsl0", second_address)?);
        let close = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let mut line = Self {
            close: Arc::clone(&close),
            directions: Vec::new(),
        };
        for (from, to, rate, queue) in [
            (&first, &second, access.uplink, access.queue),
            (&second, &first, access.downlink, DOWNLINK_QUEUE),
        ] {
            let (from, to, close) = (Arc::clone(from), Arc::clone(to), Arc::clone(&close));
            let modem = Modem::new(rate, queue);
            let carry = move || carry(&from, &to, modem, access.delay, &close);
            let thread = thread::Builder::new().name("line".to_owned());
            line.directions.push(thread.spawn(carry)?);
        }
        Ok(line)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // Only a full counter can fail, and then the threads have been told.
        let _ = self.close.write(1);
        for direction in self.directions.drain(..) {
            let _ = direction.join();
        }
    }
}

/// Carries one direction until told to close.
///
/// # Panics
/// A tun device fails: whoever measures over the line must not take that for loss.
fn carry(from: &Tun, to: &Tun, mut modem: Modem, delay: Duration, close: &EventFd) {
    let mut underway = VecDeque::<(Instant, Vec<u8>)>::new();
    let mut buffer = [0; PACKET];
    loop {
        let now = Instant::now();
        while let Some((_, packet)) = underway.pop_front_if(|(arrival, _)| *arrival <= now) {
            to.send(&packet).expect("a packet of the other machine");
        }
        let next = underway
            .front()
            .map(|(arrival, _)| TimeSpec::from_duration(arrival.saturating_duration_since(now)));
        let mut ready = [from.as_fd(), close.as_fd()].map(|it| PollFd::new(it, PollFlags::POLLIN));
        match ppoll(&mut ready, next, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => panic!("ppoll: {error}"),
        }
        if ready[1].any() == Some(true) {
            return;
        }
        loop {
            match from.receive(&mut buffer) {
                Ok(length) => {
                    if let Some(sent) = modem.offer(Instant::now(), length + OVERHEAD) {
                        underway.push_back((sent + delay, buffer[..length].to_vec()));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => panic!("tun: {error}"),
            }
        }
    }
}

/// A transmitter with a queue before it.
#[derive(Debug)]
struct Modem {
    /// bit/s.
    rate: u64,
    limit: usize,
    /// When each packet that is not yet sent whole will be; the first is being sent.
    departures: VecDeque<Instant>,
}

impl Modem {
    const fn new(rate: u64, limit: usize) -> Self {
        Self {
            rate,
            limit,
            departures: VecDeque::new(),
        }
    }

    /// When a packet of so many bytes that comes now will have been sent; `None` if it is dropped.
    fn offer(&mut self, now: Instant, bytes: usize) -> Option<Instant> {
        while self.departures.pop_front_if(|sent| *sent <= now).is_some() {}
        if self.departures.len() > self.limit {
            return None;
        }
        let start = self.departures.back().map_or(now, |last| now.max(*last));
        let time = Duration::from_nanos(bytes as u64 * 8 * 1_000_000_000 / self.rate);
        self.departures.push_back(start + time);
        Some(start + time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_waits_for_those_before_it_or_is_dropped() {
        let now = Instant::now();
        let after = |milliseconds| now + Duration::from_millis(milliseconds);
        // 125 bytes take a millisecond; two wait while one is sent.
        let mut modem = Modem::new(1_000_000, 2);
        assert_eq!(modem.offer(now, 125), Some(after(1)));
        assert_eq!(modem.offer(now, 1250), Some(after(11)));
        assert_eq!(modem.offer(now, 125), Some(after(12)));
        assert_eq!(modem.offer(now, 125), None, "the queue is full");
        assert_eq!(modem.offer(after(1), 125), Some(after(13)), "one has left");
        assert_eq!(modem.offer(after(20), 125), Some(after(21)), "an idle line");
    }
}
