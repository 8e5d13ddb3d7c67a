//! Where the demo takes place: a PBX and phones in calls through it.

use std::{
    net::SocketAddr,
    path::Path,
    thread,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};

use super::hearing::{Arrival, Part, Sent, Stream};
use crate::{
    asterisk::{self, Lab, Leg},
    capture::{Capture, Direction, Recording},
    namespace::Host,
    pbx::{self, Pbx},
    phone::{Bank, PACKET_TIME, Phone, Talk},
    rtp::Rtp,
    topology::{Direct, PBX_V4},
};

/// How long calls may take to come up, and the last packet to arrive.
const PATIENCE: Duration = Duration::from_secs(60);

/// A PBX with calls through it.
pub(super) trait Site {
    /// One sentence about the calls.
    fn about(&self) -> &'static str;
    /// One sentence about what the table is made of.
    fn note(&self) -> &'static str;
    /// Which part of the packets may be lost although all is well.
    fn tolerated_loss(&self) -> f64;
    /// The machine that the PBX runs in.
    fn pbx_machine(&self) -> &Host;
    /// The PBX's process.
    fn pbx_id(&self) -> u32;
    /// Where its AMI listens.
    fn ami(&self) -> SocketAddr;
    /// Whom the relay logs in as.
    fn ami_user(&self) -> &'static str;
    /// The secret of that user, a path inside the PBX's machine.
    fn secret_file(&self) -> &Path;
    /// Places calls, tells how many are up, and returns when the PBX forwards all of them natively.
    fn call(&mut self, calls: u16, progress: &mut dyn FnMut(usize)) -> Result<()>;
    /// CPU time that the PBX has used until now.
    fn pbx_cpu(&self) -> Result<Duration>;
    /// RTP packets that the PBX has received until now, on all legs.
    fn pbx_received(&self) -> Result<u64>;
    /// What is sent from now on belongs to `part`.
    fn mark(&mut self, part: Part) -> Result<()>;
    /// Ends all calls and returns what the phones sent and heard.
    fn close(self: Box<Self>) -> Result<Vec<Stream>>;
}

/// The fake PBX, and phones that recognise every single packet.
#[derive(Debug)]
pub(super) struct Office {
    net: Direct,
    pbx: Pbx,
    bank: Bank,
    calls: Vec<[Phone; 2]>,
    /// When a part began: how many packets each phone had sent.
    marks: Vec<(Part, Vec<u64>)>,
}

impl Office {
    pub(super) fn open() -> Result<Self> {
        let net = Direct::new(2)?;
        let pbx = Pbx::start(&net.pbx, PBX_V4)?;
        let bank = Bank::new(&net.phones)?;
        Ok(Self {
            net,
            pbx,
            bank,
            calls: Vec::new(),
            marks: Vec::new(),
        })
    }

    fn phones(&self) -> impl Iterator<Item = &Phone> {
        self.calls.iter().flatten()
    }
}

impl Site for Office {
    fn about(&self) -> &'static str {
        "The PBX is a small program that forwards RTP in userspace, a thread to a call as Asterisk does, and speaks \
         AMI. Two phones in each call talk G.711."
    }

    fn note(&self) -> &'static str {
        "Every phone knows every packet that the other sent: the table is exact for all calls."
    }

    fn tolerated_loss(&self) -> f64 {
        0.0
    }

    fn pbx_machine(&self) -> &Host {
        &self.net.pbx
    }

    fn pbx_id(&self) -> u32 {
        self.pbx.id()
    }

    fn ami(&self) -> SocketAddr {
        self.pbx.ami()
    }

    fn ami_user(&self) -> &'static str {
        pbx::USER
    }

    fn secret_file(&self) -> &Path {
        self.pbx.secret_file()
    }

    fn call(&mut self, calls: u16, progress: &mut dyn FnMut(usize)) -> Result<()> {
        for number in 0..calls {
            let local = |phone| SocketAddr::new(Direct::phone_v4(phone), 30_000 + 2 * number);
            let phones = [self.bank.phone(local(0))?, self.bank.phone(local(1))?];
            let call = self.pbx.call(phones[0].local(), phones[1].local())?;
            for ((phone, local), ssrc) in phones.iter().zip(call.local).zip(1..) {
                phone.talk(Talk::to(local, u32::from(number) << 8 | ssrc));
            }
            self.calls.push(phones);
            progress(self.calls.len());
            // Spread over the 20 ms of a packet, as independent phones are.
            thread::sleep(PACKET_TIME / u32::from(calls));
        }
        // Native comes 10 ms after the call.
        for phone in self.phones() {
            phone.wait_received(5, PATIENCE)?;
        }
        Ok(())
    }

    fn pbx_cpu(&self) -> Result<Duration> {
        self.pbx.cpu_time()
    }

    fn pbx_received(&self) -> Result<u64> {
        let counters = self.pbx.counters()?;
        Ok(counters.values().flatten().map(|leg| leg.received).sum())
    }

    fn mark(&mut self, part: Part) -> Result<()> {
        let sent = self.phones().map(Phone::sent).collect();
        self.marks.push((part, sent));
        Ok(())
    }

    fn close(self: Box<Self>) -> Result<Vec<Stream>> {
        self.phones().for_each(Phone::hush);
        let mut streams = Vec::new();
        for (call, phones) in self.calls.iter().enumerate() {
            for (from, to) in [(0, 1), (1, 0)] {
                let sent = phones[from].sent();
                // What is lost never comes; the judgement tells.
                let _ = phones[to].wait_received(usize::try_from(sent)?, Duration::from_secs(1));
                let part_of = |number| {
                    let begun = self
                        .marks
                        .iter()
                        .rfind(|(_, sent)| sent[2 * call + from] <= number);
                    begun.map(|(part, _)| Sent {
                        number,
                        part: *part,
                        at: None,
                    })
                };
                let arrivals = phones[to].arrivals();
                let arrivals = arrivals.iter().filter_map(|arrival| {
                    Some(Arrival {
                        number: arrival.stamp?.number,
                        at: arrival.at,
                        dscp: arrival.tos >> 2,
                    })
                });
                streams.push(Stream {
                    sent: (0..sent).filter_map(part_of).collect(),
                    arrivals: arrivals.collect(),
                });
            }
        }
        Ok(streams)
    }
}

/// A real Asterisk, and a second one that plays the phones.
#[derive(Debug)]
pub(super) struct Laboratory {
    lab: Lab,
    /// The calls that are captured.
    sample: Vec<[Leg; 2]>,
    capture: Option<Capture>,
    marks: Vec<(Part, Duration)>,
}

/// Calls that are captured: two Asterisks and a capture of 100 calls are too much for two cores.
const SAMPLE: usize = 10;
/// Calls placed at a time: INVITEs take far more CPU than media.
const BATCH: u16 = 10;
/// Longer than any demo; the calls are hung up at its end.
const CALL_SECONDS: u32 = 7200;
/// An extension that Asterisk bridges natively.
const EXTENSION: &str = "2000";

impl Laboratory {
    pub(super) fn open() -> Result<Self> {
        Ok(Self {
            lab: Lab::up()?,
            sample: Vec::new(),
            capture: None,
            marks: Vec::new(),
        })
    }
}

impl Site for Laboratory {
    fn about(&self) -> &'static str {
        "Asterisk calls Asterisk: SIP, a Dial without options, G.711 on both legs, native_rtp bridges."
    }

    fn note(&self) -> &'static str {
        "Loss, duplicates, gaps and DSCP are of up to 10 of the calls, from a capture at the phones: one of all calls \
         would take more CPU than the calls."
    }

    fn tolerated_loss(&self) -> f64 {
        0.01
    }

    fn pbx_machine(&self) -> &Host {
        &self.lab.net.pbx
    }

    fn pbx_id(&self) -> u32 {
        self.lab.id()
    }

    fn ami(&self) -> SocketAddr {
        self.lab.ami()
    }

    fn ami_user(&self) -> &'static str {
        asterisk::USER
    }

    fn secret_file(&self) -> &Path {
        self.lab.secret_file()
    }

    fn call(&mut self, calls: u16, progress: &mut dyn FnMut(usize)) -> Result<()> {
        let mut up = 0;
        while up < calls {
            let batch = BATCH.min(calls - up);
            self.lab
                .call(batch.into(), CALL_SECONDS, EXTENSION, asterisk::CALLER)?;
            up += batch;
            self.lab
                .wait_technology(up.into(), "native_rtp", PATIENCE)?;
            progress(up.into());
        }
        let mut pairs = self.lab.wait_calls(calls.into(), PATIENCE)?;
        pairs.truncate(SAMPLE);
        let ports: Vec<_> = pairs
            .iter()
            .flatten()
            .map(|leg| leg.remote.port())
            .collect();
        self.capture = Some(Capture::start_on_ports(
            &self.lab.net.phones_interface,
            &ports,
        )?);
        self.sample = pairs;
        Ok(())
    }

    fn pbx_cpu(&self) -> Result<Duration> {
        self.lab.cpu_time()
    }

    fn pbx_received(&self) -> Result<u64> {
        self.lab.received()
    }

    fn mark(&mut self, part: Part) -> Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        self.marks.push((part, now));
        Ok(())
    }

    fn close(mut self: Box<Self>) -> Result<Vec<Stream>> {
        self.lab.hang_up_all()?;
        let capture = self.capture.take().context("there were no calls")?;
        let recording = capture.stop()?;
        let directions = self
            .sample
            .iter()
            .flat_map(|[one, other]| [(one, other), (other, one)]);
        Ok(directions
            .map(|(from, to)| stream(&recording, from, to, &self.marks))
            .collect())
    }
}

/// One direction of a call in a recording of the phones' interface. Under native_rtp the PBX keeps SSRC and sequence.
fn stream(recording: &Recording, from: &Leg, to: &Leg, marks: &[(Part, Duration)]) -> Stream {
    let mut stream = Stream::default();
    for (frame, datagram) in recording.datagrams() {
        let Some((rtp, _)) = Rtp::parse(datagram.payload) else {
            continue;
        };
        let number = u64::from(rtp.ssrc) << 16 | u64::from(rtp.sequence);
        let ends = (datagram.source, datagram.destination);
        match frame.direction {
            Direction::Out if ends == (from.remote, from.local) => {
                let begun = marks.iter().rfind(|(_, at)| *at <= frame.at);
                stream.sent.extend(begun.map(|(part, _)| Sent {
                    number,
                    part: *part,
                    at: Some(frame.at),
                }));
            }
            Direction::In if ends == (to.local, to.remote) => stream.arrivals.push(Arrival {
                number,
                at: frame.at,
                dscp: datagram.dscp,
            }),
            _ => {}
        }
    }
    stream
}
