//! A small office in calls with a relay beside its PBX: what pictures are taken of, and what the tests of the page and
//! of the metrics look at. One phone is on a bad line, one call is on hold, and one is transcoded.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    namespace::Host,
    pbx::{self, Pbx},
    phone::{Bank, Phone, Talk},
    relay::{Relay, ami_arguments},
    rtp::{PAYLOAD, Rtp},
    topology::{Direct, PBX_V4},
};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Who talks to whom: the callers are at the first phone's address, the others at the second's.
const CALLS: [[&str; 2]; 6] = [
    ["alice", "bob"],
    ["carol", "trunk-berlin"],
    [WEAK, "dave"],
    ["erin", "reception"],
    [HELD, "grace"],
    [TRANSCODED, "trunk-oslo"],
];
/// The phone on a bad line.
pub const WEAK: &str = "mobile-17";
/// Who holds the call.
pub const HELD: &str = "frank";
/// Who talks another codec than the other side.
pub const TRANSCODED: &str = "heidi";

/// The calls, and the relay.
#[derive(Debug)]
pub struct Scene {
    /// The daemon, with `--http 0` and `--metrics 0`.
    pub relay: Relay,
    /// The PBX.
    pub pbx: Pbx,
    calls: Vec<(pbx::Call, Vec<Phone>)>,
    _weak: Option<WeakLine>,
    bank: Bank,
    net: Direct,
}

impl Scene {
    /// Places the calls, attaches the relay, and waits until it has offloaded all that it can.
    ///
    /// # Errors
    /// Something does not start, or not all is offloaded in time.
    pub fn open() -> Result<Self> {
        let net = Direct::new(2)?;
        let pbx = Pbx::start(&net.pbx, PBX_V4)?;
        let bank = Bank::new(&net.phones)?;
        let arguments = ami_arguments(pbx.ami(), pbx::USER, pbx.secret_file());
        let more = [
            "--http",
            "0",
            "--metrics",
            "0",
            "--allowed-host",
            "pbx.test",
        ];
        let arguments = arguments.into_iter().chain(more.map(str::to_owned));
        let relay = Relay::attach(&net.pbx, "eth0", arguments)?;
        let mut scene = Self {
            relay,
            pbx,
            calls: Vec::new(),
            _weak: None,
            bank,
            net,
        };
        for endpoints in CALLS {
            scene.place(endpoints)?;
        }
        scene.until("offloaded", 4)?;
        Ok(scene)
    }

    /// Places one more call.
    ///
    /// # Errors
    /// The PBX has no port left, or a phone's is taken.
    pub fn place(&mut self, endpoints: [&str; 2]) -> Result<()> {
        let number = self.calls.len() as u16;
        let port = 30_000 + 2 * number;
        let phone = |which| {
            self.bank
                .phone(SocketAddr::new(Direct::phone_v4(which), port))
        };
        let phones = [phone(0)?, phone(1)?];
        let call = self
            .pbx
            .call_named(endpoints, phones.each_ref().map(Phone::local))?;
        if endpoints.contains(&TRANSCODED) {
            self.pbx.transcode(call)?;
        }
        let mut talking = Vec::new();
        for (side, phone) in phones.into_iter().enumerate() {
            let talk = Talk::to(
                call.local[side],
                0x5eed_0000 | u32::from(2 * number) | side as u32,
            );
            if endpoints[side] == WEAK {
                self._weak = Some(WeakLine::start(phone, talk)?);
            } else {
                phone.talk(talk);
                talking.push(phone);
            }
        }
        if endpoints.contains(&HELD) {
            self.pbx.hold(call)?;
        }
        self.calls.push((call, talking));
        Ok(())
    }

    /// Hangs the latest call up.
    ///
    /// # Errors
    /// The PBX does not.
    pub fn hang_up(&mut self) -> Result<()> {
        let (call, _) = self.calls.pop().context("no call is left")?;
        self.pbx.hang_up(call)
    }

    /// Waits until `status` counts so many pairs of a state.
    ///
    /// # Errors
    /// It does not in time: the text holds the list of pairs.
    pub fn until(&self, state: &str, count: u64) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.relay.json(["status"])?[state] != count {
            if Instant::now() > deadline {
                bail!(
                    "not {count} pairs are {state} after {PATIENCE:?}: {:#}",
                    self.relay.json(["list"])?
                );
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// The machine that the PBX and the relay run in.
    pub fn host(&self) -> &Host {
        &self.net.pbx
    }

    /// Where the daemon serves `http` or `metrics`.
    ///
    /// # Errors
    /// It does not.
    pub fn address(&self, what: &str) -> Result<SocketAddr> {
        let status = self.relay.json(["status"])?;
        let address = status[what].as_str().context("not served")?;
        Ok(address.parse()?)
    }
}

/// A phone whose packets come unevenly, and not all of them. Dropping it ends its talk.
#[derive(Debug)]
struct WeakLine {
    over: Arc<AtomicBool>,
}

impl WeakLine {
    /// One packet of so many is lost.
    const LOST: u16 = 60;
    /// How late packets are, in turn, in milliseconds.
    const LATE: [u64; 7] = [0, 6, 1, 11, 3, 8, 2];

    fn start(phone: Phone, talk: Talk) -> Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        let body = move || {
            let start = Instant::now();
            for number in 0_u16.. {
                let due = talk.interval * u32::from(number)
                    + Duration::from_millis(Self::LATE[usize::from(number) % Self::LATE.len()]);
                thread::sleep(due.saturating_sub(start.elapsed()));
                if told.load(Ordering::Relaxed) {
                    break;
                }
                let packet = Rtp {
                    marker: false,
                    payload_type: talk.payload_type,
                    sequence: number,
                    timestamp: u32::from(number) * PAYLOAD as u32,
                    ssrc: talk.ssrc,
                };
                if number % Self::LOST != Self::LOST - 1 {
                    // A PBX that has ended is no concern of a phone's.
                    let _ = phone.send(&packet.packet(&[0xd5; PAYLOAD]), talk.to);
                }
            }
        };
        thread::Builder::new()
            .name("weak line".to_owned())
            .spawn(body)?;
        Ok(Self { over })
    }
}

impl Drop for WeakLine {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
