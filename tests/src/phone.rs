//! RTP endpoints with real sockets. One thread serves all phones of a [`Bank`], so hundreds are cheap.

use std::{
    collections::{BTreeMap, VecDeque},
    io, mem,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsFd as _, BorrowedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use etherparse::UdpHeader;
use nix::{
    libc,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::{EfdFlags, EventFd},
        socket::{setsockopt, sockopt},
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};

use crate::{
    capture::Quality,
    datagram,
    namespace::Host,
    rtp::{Event, PAYLOAD, Rtp, Stamp},
};

/// Time between two packets of an ordinary phone.
pub const PACKET_TIME: Duration = Duration::from_millis(20);
/// First sequence number and timestamp: near the wrap, so that every test longer than a second crosses it.
const FIRST: (u16, u32) = (65_500, u32::MAX - 10_000);
/// Time between two RTCP reports of a phone that sends any: the least that RFC 3550, section 6.2, recommends.
const REPORT_TIME: Duration = Duration::from_secs(5);
/// Packets of one digit while its key is down, and after it: RFC 4733 sends the end three times.
const DIGIT_PACKETS: u16 = 5;
const DIGIT_ENDS: u16 = 3;
/// Packets of voice between two digits.
const DIGIT_PAUSE: u16 = 5;
/// Static payload type of comfort noise (RFC 3551), and a level.
const COMFORT_NOISE: u8 = 13;
const NOISE_LEVEL: u8 = 60;
/// epoll tokens that are no phone.
const KICK: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// What a phone sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Talk {
    /// Where to.
    pub to: SocketAddr,
    /// Payload type (0–127).
    pub payload_type: u8,
    /// Synchronization source. Sequence and timestamp go on while it stays the same, and start anew when it changes.
    pub ssrc: u32,
    /// Time between packets: [`PACKET_TIME`], or less for load.
    pub interval: Duration,
    /// How many packets; `None` for until told otherwise.
    pub count: Option<u64>,
}

impl Talk {
    /// G.711 µ-law (payload type 0) every 20 ms until told otherwise.
    pub fn to(to: SocketAddr, ssrc: u32) -> Self {
        Self {
            to,
            payload_type: 0,
            ssrc,
            interval: PACKET_TIME,
            count: None,
        }
    }
}

/// One packet that a phone received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// When the kernel received it, since the Unix epoch.
    pub at: Duration,
    /// UDP source.
    pub from: SocketAddr,
    /// TOS or traffic class: DSCP in the upper six bits, ECN in the lower two.
    pub tos: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// The RTP header, if it is RTP.
    pub rtp: Option<Rtp>,
    /// Who sent it, if the payload is exactly what a phone sent.
    pub stamp: Option<Stamp>,
    /// The telephone event, if the payload is as long as one.
    pub event: Option<Event>,
}

/// What one phone heard of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Packets that the other phone has sent until now.
    pub sent: u64,
    /// Different packets of it that arrived undamaged.
    pub received: u64,
    /// `sent` − `received`; those in flight count.
    pub lost: u64,
    /// Packets that came again.
    pub duplicates: u64,
    /// Packets that came after a later one.
    pub reordered: u64,
    /// Longest time between two arrivals.
    pub largest_gap: Duration,
    /// Packets that are not from the other phone, or are damaged.
    pub foreign: u64,
}

/// Phones served by one thread, in one machine.
#[derive(Debug)]
pub struct Bank {
    host: Host,
    exchange: Arc<Exchange>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Exchange {
    lines: Mutex<Lines>,
    changed: Condvar,
    kick: EventFd,
    epoll: Epoll,
    timer: TimerFd,
}

#[derive(Debug, Default)]
struct Lines {
    lines: BTreeMap<u64, Line>,
    next: u64,
    closing: bool,
    fault: Option<String>,
}

#[derive(Debug)]
struct Line {
    socket: UdpSocket,
    /// Sockets that only receive: of [`Phone::listen`], and of before [`Phone::switch`].
    others: Vec<UdpSocket>,
    sender: u32,
    sent: u64,
    /// When each of these was sent, since the Unix epoch.
    sendings: Vec<Duration>,
    voice: Option<Voice>,
    /// With [`Phone::lend_packets`], every packet of voice sent: each stays as it is until the kernel has let go of it.
    lent: Option<Vec<Vec<u8>>>,
    reports: Option<Reports>,
    arrivals: Vec<Arrival>,
}

/// RTCP of a phone.
#[derive(Debug)]
struct Reports {
    socket: UdpSocket,
    to: SocketAddr,
    due: Instant,
}

/// The state of a stream that a phone sends.
#[derive(Debug)]
struct Voice {
    talk: Talk,
    sequence: u16,
    timestamp: u32,
    marker: bool,
    left: Option<u64>,
    due: Option<Instant>,
    /// Packets to send in place of the next ones of voice.
    inserted: VecDeque<Inserted>,
    /// When nothing is inserted: talks and pauses in turn, and how many packet times it has done so.
    speech: Option<(Speech, u32)>,
    /// Timestamp of the digit whose packets are being sent.
    digit: u32,
}

/// A packet in place of one of voice.
#[derive(Clone, Copy, Debug)]
enum Inserted {
    /// A telephone event; the first of a digit has the marker.
    Event {
        event: Event,
        payload_type: u8,
        first: bool,
    },
    /// Comfort noise (RFC 3389).
    Noise,
    /// Voice all the same.
    Voice,
    /// Nothing, for the time of a packet.
    Silence,
}

/// Speech of a phone with voice activity detection, in packet times: talk spurts, of which the first packet has the
/// marker, and pauses (RFC 3551, section 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Speech {
    /// Length of a talk spurt, at least 1.
    pub spurt: u32,
    /// Length of a pause.
    pub pause: u32,
    /// Every so many of a pause there is a packet of comfort noise, its first one too (RFC 3389); 0 for never.
    pub noise: u32,
}

impl Speech {
    const fn turn(self) -> u32 {
        self.spurt + self.pause
    }

    /// Whether a talk spurt begins in the packet time of this number.
    const fn begins_at(self, number: u32) -> bool {
        number.is_multiple_of(self.turn())
    }

    /// What is sent in the packet time of this number.
    fn at(self, number: u32) -> Inserted {
        match (number % self.turn()).checked_sub(self.spurt) {
            None => Inserted::Voice,
            Some(silent) if self.noise > 0 && silent.is_multiple_of(self.noise) => Inserted::Noise,
            Some(_) => Inserted::Silence,
        }
    }
}

impl Exchange {
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().expect("no holder of this lock panics")
    }
}

impl Bank {
    /// Starts the thread; phones are added by [`Bank::phone`].
    ///
    /// # Errors
    /// Out of descriptors or threads.
    pub fn new(host: &Host) -> Result<Self> {
        let exchange = Arc::new(Exchange {
            lines: Mutex::default(),
            changed: Condvar::new(),
            kick: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            timer: TimerFd::new(
                ClockId::CLOCK_MONOTONIC,
                TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK,
            )?,
        });
        exchange.watch(exchange.kick.as_fd(), KICK)?;
        exchange.watch(exchange.timer.as_fd(), TIMER)?;
        let thread = {
            let exchange = Arc::clone(&exchange);
            thread::Builder::new()
                .name("phones".to_owned())
                .spawn(move || {
                    if let Err(error) = exchange.serve() {
                        exchange.lines().fault = Some(format!("{error:#}"));
                        exchange.changed.notify_all();
                    }
                })?
        };
        Ok(Self {
            host: host.clone(),
            exchange,
            thread: Some(thread),
        })
    }

    /// A phone that receives at `local`, an address of the machine; port 0 takes any free port.
    ///
    /// # Errors
    /// The address is not the machine's, or taken.
    pub fn phone(&self, local: SocketAddr) -> Result<Phone> {
        static SENDER: AtomicU32 = AtomicU32::new(1);
        let socket = media_socket(&self.host, local)?;
        let local = socket.local_addr()?;
        let sender = SENDER.fetch_add(1, Ordering::Relaxed);
        let mut lines = self.exchange.lines();
        let id = lines.next;
        lines.next += 1;
        self.exchange.watch(socket.as_fd(), id)?;
        lines.lines.insert(
            id,
            Line {
                socket,
                others: Vec::new(),
                sender,
                sent: 0,
                sendings: Vec::new(),
                voice: None,
                lent: None,
                reports: None,
                arrivals: Vec::new(),
            },
        );
        Ok(Phone {
            exchange: Arc::clone(&self.exchange),
            host: self.host.clone(),
            id,
            local,
            sender,
        })
    }
}

/// A socket that tells of each datagram when it came, and with what TOS and TTL.
fn media_socket(host: &Host, local: SocketAddr) -> Result<UdpSocket> {
    let socket = host
        .run(|| UdpSocket::bind(local))
        .with_context(|| format!("cannot bind a phone to {local}"))?;
    setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
    let (level, options) = match local {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, [libc::IP_RECVTOS, libc::IP_RECVTTL]),
        SocketAddr::V6(_) => (
            libc::IPPROTO_IPV6,
            [libc::IPV6_RECVTCLASS, libc::IPV6_RECVHOPLIMIT],
        ),
    };
    for option in options {
        datagram::set_option(socket.as_fd(), level, option, 1)?;
    }
    Ok(socket)
}

impl Drop for Bank {
    fn drop(&mut self) {
        self.exchange.lines().closing = true;
        self.exchange.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One phone of a [`Bank`]. Dropping it closes its socket.
#[derive(Debug)]
pub struct Phone {
    exchange: Arc<Exchange>,
    host: Host,
    id: u64,
    local: SocketAddr,
    sender: u32,
}

impl Drop for Phone {
    fn drop(&mut self) {
        self.exchange.lines().lines.remove(&self.id);
    }
}

impl Phone {
    /// Where it receives, and sends from, unless it has moved since.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// What marks its packets: [`Stamp::sender`].
    pub fn sender(&self) -> u32 {
        self.sender
    }

    /// Begins to send, at once. Replaces what it sent before.
    pub fn talk(&self, talk: Talk) {
        self.line(|line| {
            let due = (talk.count != Some(0)).then(Instant::now);
            match &mut line.voice {
                Some(voice) if voice.talk.ssrc == talk.ssrc => {
                    (voice.talk, voice.left, voice.due) = (talk, talk.count, due);
                }
                voice => {
                    let (sequence, timestamp) = FIRST;
                    *voice = Some(Voice {
                        talk,
                        sequence,
                        timestamp,
                        marker: true,
                        left: talk.count,
                        due,
                        inserted: VecDeque::new(),
                        speech: None,
                        digit: 0,
                    });
                }
            }
        });
        self.exchange.wake();
    }

    /// Stops sending. [`Phone::talk`] with the same SSRC goes on where this left off.
    pub fn hush(&self) {
        self.line(|line| {
            if let Some(voice) = &mut line.voice {
                voice.due = None;
            }
        });
    }

    /// Sends what it sends to another address from now on, in sequence.
    pub fn aim(&self, to: SocketAddr) {
        self.line(|line| {
            if let Some(voice) = &mut line.voice {
                voice.talk.to = to;
            }
            if let Some(reports) = &mut line.reports {
                reports.to = rtcp(to);
            }
        });
    }

    /// Receives at another address of its machine too.
    ///
    /// # Errors
    /// The address is not the machine's, or taken.
    pub fn listen(&self, local: SocketAddr) -> Result<()> {
        let socket = media_socket(&self.host, local)?;
        self.exchange.watch(socket.as_fd(), self.id)?;
        self.line(|line| line.others.push(socket));
        Ok(())
    }

    /// Sends from the address of the last [`Phone::listen`] from now on, in sequence. What still comes to the old one
    /// is received as before.
    pub fn switch(&self) {
        self.line(|line| {
            if let Some(newest) = line.others.last_mut() {
                mem::swap(&mut line.socket, newest);
            }
        });
    }

    /// Dials digits (`0`–`9`, `*`, `#`) by telephone events of this payload type (RFC 4733) in place of voice, each
    /// of 100 ms with as much voice between them.
    ///
    /// # Panics
    /// Another character.
    pub fn dial(&self, digits: &str, payload_type: u8) {
        let mut packets = Vec::new();
        for digit in digits.chars() {
            let code = "0123456789*#".find(digit).expect("a digit") as u8;
            for number in 1..=DIGIT_PACKETS + DIGIT_ENDS {
                let event = Event {
                    code,
                    end: number > DIGIT_PACKETS,
                    duration: number.min(DIGIT_PACKETS) * PAYLOAD as u16,
                };
                packets.push(Inserted::Event {
                    event,
                    payload_type,
                    first: number == 1,
                });
            }
            packets.extend([Inserted::Voice; DIGIT_PAUSE as usize]);
        }
        self.insert(packets);
    }

    /// Waits until everything dialled has been sent.
    ///
    /// # Errors
    /// It has not within `timeout`: the phone does not talk.
    pub fn wait_dialled(&self, timeout: Duration) -> Result<()> {
        self.wait_line(timeout, |line| {
            let voice = line.voice.as_ref();
            voice.is_none_or(|voice| voice.inserted.is_empty())
        })
    }

    /// Talks with pauses from now on, beginning with a talk spurt; `None` for without again.
    ///
    /// # Panics
    /// A talk spurt has no length.
    pub fn suppress_silence(&self, speech: Option<Speech>) {
        assert!(
            speech.is_none_or(|speech| speech.spurt > 0),
            "no talk spurt"
        );
        self.line(|line| {
            if let Some(voice) = &mut line.voice {
                voice.speech = speech.map(|speech| (speech, 0));
            }
        });
    }

    /// Sends one packet of comfort noise (payload type 13) in place of one of voice.
    pub fn noise(&self) {
        self.insert(vec![Inserted::Noise]);
    }

    fn insert(&self, packets: Vec<Inserted>) {
        self.line(|line| {
            if let Some(voice) = &mut line.voice {
                voice.inserted.extend(packets);
            }
        });
    }

    /// Sends RTCP from now on: a receiver report without content every five seconds, from the port above its own to
    /// the port above `to`.
    ///
    /// # Errors
    /// The port above its own is taken.
    pub fn report(&self, to: SocketAddr) -> Result<()> {
        let local = rtcp(self.local);
        let socket = self
            .host
            .run(|| UdpSocket::bind(local))
            .with_context(|| format!("cannot bind a phone's RTCP to {local}"))?;
        let (to, due) = (rtcp(to), Instant::now());
        self.line(|line| line.reports = Some(Reports { socket, to, due }));
        self.exchange.wake();
        Ok(())
    }

    /// When each packet of voice was sent, since the Unix epoch, by its [`Stamp::number`].
    pub fn sendings(&self) -> Vec<Duration> {
        self.line(|line| line.sendings.clone())
    }

    /// Goes on with what [`Phone::hush`] stopped.
    pub fn resume(&self) {
        self.line(|line| {
            if let Some(voice) = &mut line.voice {
                voice.due.get_or_insert_with(Instant::now);
            }
        });
        self.exchange.wake();
    }

    /// Sends with another SSRC, and sequence and timestamp from the beginning, without a pause.
    pub fn change_ssrc(&self, ssrc: u32) {
        self.line(|line| {
            if let Some(voice) = &mut line.voice {
                voice.talk.ssrc = ssrc;
                (voice.sequence, voice.timestamp) = FIRST;
                voice.marker = true;
            }
        });
    }

    /// Sends one datagram of any content from the phone's socket.
    ///
    /// # Errors
    /// What the socket reports.
    pub fn send(&self, datagram: &[u8], to: SocketAddr) -> Result<()> {
        self.line(|line| line.socket.send_to(datagram, to))
            .with_context(|| format!("send to {to}"))?;
        Ok(())
    }

    /// Sends what it talks out of its own memory from now on (`MSG_ZEROCOPY`). Where the device takes checksums
    /// ([`leave_checksums_to_device`]), such a packet has only its headers in the linear part of the socket buffer, as
    /// those that a driver receives into pages do.
    ///
    /// # Errors
    /// What the socket reports.
    ///
    /// [`leave_checksums_to_device`]: crate::link::Interface::leave_checksums_to_device
    pub fn lend_packets(&self) -> Result<()> {
        self.line(|line| {
            datagram::set_option(line.socket.as_fd(), libc::SOL_SOCKET, libc::SO_ZEROCOPY, 1)?;
            line.lent.get_or_insert_default();
            Ok(())
        })
    }

    /// Sets TOS or traffic class of what it sends from now on.
    ///
    /// # Errors
    /// What the socket reports.
    pub fn set_tos(&self, tos: u8) -> Result<()> {
        self.set(
            tos,
            (libc::IPPROTO_IP, libc::IP_TOS),
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
        )
    }

    /// Sets TTL or hop limit of what it sends from now on.
    ///
    /// # Errors
    /// What the socket reports; 0 is refused.
    pub fn set_ttl(&self, ttl: u8) -> Result<()> {
        self.set(
            ttl,
            (libc::IPPROTO_IP, libc::IP_TTL),
            (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
        )
    }

    fn set(&self, value: u8, v4: (i32, i32), v6: (i32, i32)) -> Result<()> {
        let (level, name) = if self.local.is_ipv4() { v4 } else { v6 };
        self.line(|line| datagram::set_option(line.socket.as_fd(), level, name, value.into()))
            .with_context(|| format!("socket option of the phone at {}", self.local))
    }

    /// Packets sent by [`Phone::talk`] until now.
    pub fn sent(&self) -> u64 {
        self.line(|line| line.sent)
    }

    /// Everything received until now, in order.
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.line(|line| line.arrivals.clone())
    }

    /// Forgets what was received, so that a later [`Phone::heard`] counts from here (all sent packets before it
    /// then count as lost).
    pub fn forget(&self) {
        self.line(|line| line.arrivals.clear());
    }

    /// Waits until what it received satisfies `condition`.
    ///
    /// # Errors
    /// It does not within `timeout`.
    pub fn wait(
        &self,
        timeout: Duration,
        mut condition: impl FnMut(&[Arrival]) -> bool,
    ) -> Result<()> {
        self.wait_line(timeout, |line| condition(&line.arrivals))
    }

    /// Waits until it has received `count` packets in all.
    ///
    /// # Errors
    /// It has not within `timeout`.
    pub fn wait_received(&self, count: usize, timeout: Duration) -> Result<()> {
        self.wait(timeout, |arrivals| arrivals.len() >= count)
    }

    /// Waits until it has sent `count` packets in all.
    ///
    /// # Errors
    /// It has not within `timeout`.
    pub fn wait_sent(&self, count: u64, timeout: Duration) -> Result<()> {
        self.wait_line(timeout, |line| line.sent >= count)
    }

    fn wait_line(&self, timeout: Duration, mut condition: impl FnMut(&Line) -> bool) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let mut lines = self.exchange.lines();
        loop {
            if let Some(fault) = &lines.fault {
                bail!("the phones' thread has failed: {fault}");
            }
            let line = lines
                .lines
                .get(&self.id)
                .expect("a phone's line lives as long as the phone");
            if condition(line) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let (sent, received) = (line.sent, line.arrivals.len());
                bail!(
                    "not within {timeout:?}: the phone at {} has sent {sent}, received {received}",
                    self.local
                );
            }
            lines = self
                .exchange
                .changed
                .wait_timeout(lines, left)
                .expect("no holder of this lock panics")
                .0;
        }
    }

    /// What this phone received from `other`, in order: which of its packets, counted from 0 as [`Phone::sent`] does,
    /// and how it arrived.
    pub fn received_from(&self, other: &Self) -> Vec<(u64, Arrival)> {
        let arrivals = self.arrivals().into_iter();
        let stamped = arrivals.filter_map(|arrival| Some((arrival.stamp?, arrival)));
        stamped
            .filter(|(stamp, _)| stamp.sender == other.sender)
            .map(|(stamp, arrival)| (stamp.number, arrival))
            .collect()
    }

    /// What this phone heard of `other`.
    pub fn heard(&self, other: &Self) -> Report {
        let sent = other.sent();
        let arrivals = self.arrivals();
        let of_other =
            |arrival: &Arrival| arrival.stamp.filter(|stamp| stamp.sender == other.sender);
        let quality = Quality::of(
            arrivals
                .iter()
                .filter_map(|arrival| Some((of_other(arrival)?.number, arrival.at))),
        );
        Report {
            sent,
            received: quality.distinct,
            lost: sent.saturating_sub(quality.distinct),
            duplicates: quality.duplicates,
            reordered: quality.reordered,
            largest_gap: quality.largest_gap,
            foreign: arrivals
                .iter()
                .filter(|arrival| of_other(arrival).is_none())
                .count() as u64,
        }
    }

    fn line<T>(&self, act: impl FnOnce(&mut Line) -> T) -> T {
        let mut lines = self.exchange.lines();
        act(lines
            .lines
            .get_mut(&self.id)
            .expect("a phone's line lives as long as the phone"))
    }
}

impl Exchange {
    fn watch(&self, descriptor: BorrowedFd<'_>, token: u64) -> Result<()> {
        self.epoll
            .add(descriptor, EpollEvent::new(EpollFlags::EPOLLIN, token))
            .context("epoll")
    }

    /// Makes the thread look at what is due.
    fn wake(&self) {
        // Only a full counter can fail, and then the thread is awake anyway.
        let _ = self.kick.write(1);
    }

    fn serve(&self) -> Result<()> {
        let mut events = [EpollEvent::empty(); 256];
        let mut buffer = [0; 2048];
        loop {
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(ready) => ready,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(error) => return Err(error).context("epoll"),
            };
            let mut lines = self.lines();
            if lines.closing {
                return Ok(());
            }
            for event in &events[..ready] {
                match event.data() {
                    KICK => drop(self.kick.read()),
                    // Read so that it is not ready any more; what is due is looked up below.
                    TIMER => drop(self.timer.wait()),
                    id => {
                        // A phone dropped since then is gone.
                        if let Some(line) = lines.lines.get_mut(&id) {
                            line.receive(&mut buffer)?;
                        }
                    }
                }
            }
            let now = Instant::now();
            let mut next = None::<Instant>;
            for line in lines.lines.values_mut() {
                if let Some(due) = line.speak(now)? {
                    next = Some(next.map_or(due, |next| next.min(due)));
                }
            }
            drop(lines);
            self.changed.notify_all();
            match next {
                // 1 ns at least: zero would disarm the timer.
                Some(due) => {
                    let left = due
                        .saturating_duration_since(Instant::now())
                        .max(Duration::from_nanos(1));
                    self.timer.set(
                        Expiration::OneShot(TimeSpec::from_duration(left)),
                        TimerSetTimeFlags::empty(),
                    )?;
                }
                None => self.timer.unset()?,
            }
        }
    }
}

impl Voice {
    /// What its speech has next, if it has pauses.
    fn speak(&mut self) -> Option<Inserted> {
        let (speech, number) = self.speech.as_mut()?;
        let next = speech.at(*number);
        self.marker |= speech.begins_at(*number);
        *number = number.wrapping_add(1);
        Some(next)
    }

    /// Goes on by the time of a packet.
    fn pass_time(&mut self) {
        self.timestamp = self.timestamp.wrapping_add(PAYLOAD as u32);
        let more = self.left != Some(0);
        self.due = self
            .due
            .filter(|_| more)
            .map(|due| due + self.talk.interval);
    }
}

impl Line {
    fn receive(&mut self, buffer: &mut [u8]) -> Result<()> {
        for socket in self.others.iter().chain([&self.socket]) {
            receive(socket, buffer, &mut self.arrivals)?;
        }
        if self.lent.is_some() {
            datagram::forget_notifications(self.socket.as_fd())?;
        }
        Ok(())
    }

    /// Sends what is due and returns when the next packet is.
    fn speak(&mut self, now: Instant) -> Result<Option<Instant>> {
        let reports = self.report(now)?;
        let Some(voice) = &mut self.voice else {
            return Ok(reports);
        };
        while voice.due.is_some_and(|due| due <= now) {
            let inserted = voice.inserted.pop_front().or_else(|| voice.speak());
            let mut rtp = Rtp {
                marker: voice.marker,
                payload_type: voice.talk.payload_type,
                sequence: voice.sequence,
                timestamp: voice.timestamp,
                ssrc: voice.talk.ssrc,
            };
            let payload = match inserted {
                Some(Inserted::Silence) => {
                    voice.pass_time();
                    continue;
                }
                Some(Inserted::Event {
                    event,
                    payload_type,
                    first,
                }) => {
                    if first {
                        voice.digit = voice.timestamp;
                    }
                    (rtp.marker, rtp.payload_type) = (first, payload_type);
                    rtp.timestamp = voice.digit;
                    event.write().to_vec()
                }
                Some(Inserted::Noise) => {
                    rtp.payload_type = COMFORT_NOISE;
                    vec![NOISE_LEVEL]
                }
                Some(Inserted::Voice) | None => {
                    let number = self.sent;
                    self.sent += 1;
                    self.sendings
                        .push(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?);
                    let sender = self.sender;
                    Stamp { sender, number }.write().to_vec()
                }
            };
            let mut packet = rtp.packet(&payload);
            if looks_unfinished(self.socket.local_addr()?, voice.talk.to, &packet) {
                let timestamp = rtp.timestamp.wrapping_add(1);
                packet = Rtp { timestamp, ..rtp }.packet(&payload);
            }
            match &mut self.lent {
                None => self.socket.send_to(&packet, voice.talk.to),
                Some(lent) => {
                    lent.push(packet);
                    datagram::lend(self.socket.as_fd(), &lent[lent.len() - 1], voice.talk.to)
                }
            }
            .with_context(|| format!("a phone cannot send to {}", voice.talk.to))?;
            voice.marker = false;
            voice.sequence = voice.sequence.wrapping_add(1);
            voice.left = voice.left.map(|left| left - 1);
            voice.pass_time();
        }
        Ok(voice.due.into_iter().chain(reports).min())
    }

    /// Sends the RTCP report that is due and returns when the next one is.
    fn report(&mut self, now: Instant) -> Result<Option<Instant>> {
        let Some(reports) = &mut self.reports else {
            return Ok(None);
        };
        if reports.due <= now {
            // A receiver report without blocks (RFC 3550, section 6.4.2).
            let mut report = vec![0x80, 201, 0, 1];
            report.extend(self.sender.to_be_bytes());
            reports
                .socket
                .send_to(&report, reports.to)
                .with_context(|| format!("a phone cannot send to {}", reports.to))?;
            reports.due = now + REPORT_TIME;
        }
        Ok(Some(reports.due))
    }
}

/// Where RTCP belongs to RTP at this address.
fn rtcp(rtp: SocketAddr) -> SocketAddr {
    SocketAddr::new(rtp.ip(), rtp.port() + 1)
}

/// Takes everything that has come to a socket.
fn receive(socket: &UdpSocket, buffer: &mut [u8], arrivals: &mut Vec<Arrival>) -> Result<()> {
    loop {
        let facts = match datagram::receive(socket.as_fd(), buffer) {
            Ok(facts) => facts,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error).context("a phone's socket"),
        };
        let Some(from) = facts.source else {
            bail!("a datagram without source")
        };
        let parsed = buffer.get(..facts.len).and_then(Rtp::parse);
        arrivals.push(Arrival {
            at: facts.at,
            from,
            tos: facts.tos,
            ttl: facts.ttl,
            rtp: parsed.map(|(rtp, _)| rtp),
            stamp: parsed.and_then(|(_, payload)| Stamp::read(payload)),
            event: parsed.and_then(|(_, payload)| Event::read(payload)),
        });
    }
}

/// Whether the datagram's UDP checksum equals the sum of its pseudo-header, as an unfinished one does. By chance one
/// in 65,536 does, and the relay leaves it to the PBX: a test that counts every packet must not meet one.
fn looks_unfinished(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> bool {
    let length = u16::try_from(8 + payload.len()).expect("a datagram");
    let header = UdpHeader {
        source_port: from.port(),
        destination_port: to.port(),
        length,
        checksum: 0,
    };
    let (checksum, addresses) = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (
            header.calc_checksum_ipv4_raw(from.octets(), to.octets(), payload),
            [from.octets(), to.octets()].concat(),
        ),
        (IpAddr::V6(from), IpAddr::V6(to)) => (
            header.calc_checksum_ipv6_raw(from.octets(), to.octets(), payload),
            [from.octets(), to.octets()].concat(),
        ),
        _ => return false,
    };
    const UDP: u32 = 17;
    let words = addresses
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let mut sum = words.sum::<u32>() + UDP + u32::from(length);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    checksum.is_ok_and(|checksum| u32::from(checksum) == sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_that_looks_unfinished_is_found() {
        let from = "192.0.2.11:30000".parse().expect("address");
        let to = "192.0.2.1:10000".parse().expect("address");
        // Every value of one word gives every checksum but one: that of its own pseudo-header too.
        let found = (0..=u16::MAX)
            .filter(|word| looks_unfinished(from, to, &word.to_be_bytes()))
            .count();
        assert!((1..=2).contains(&found), "{found}");
    }
}
