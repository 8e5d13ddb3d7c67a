//! Calls that the daemon hears of from AMI: thousands at once, and some that come and go.

use std::{
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use relay_tests::{
    pbx::{self, Call, Pbx},
    relay::{Relay, ami_arguments},
    topology::{Direct, PBX_V4},
};
use relay_user::control::{client::Client, model::StatusReport};
use tokio::runtime::{Builder, Runtime};

use super::population;

/// How long the daemon may take until it has every call.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is asked whether it has.
const LOOK: Duration = Duration::from_millis(50);
/// First RTP port of the PBX.
const FIRST_PORT: u16 = 10_000;
/// Most calls: their ports, two for each leg, must fit.
pub(super) const MOST: u16 = (u16::MAX - FIRST_PORT) / 4;

/// A daemon with the calls of a PBX.
pub(super) struct Exchange {
    net: Direct,
    pbx: Pbx,
    relay: Relay,
    client: Client,
    runtime: Runtime,
    calls: Vec<Call>,
}

/// What the daemon took for something.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    pub(super) time: Duration,
    pub(super) cpu: Duration,
}

impl Cost {
    /// Share of one processor, percent.
    pub(super) fn share(&self) -> f64 {
        100.0 * self.cpu.as_secs_f64() / self.time.as_secs_f64()
    }
}

impl Exchange {
    /// Without calls yet.
    pub(super) fn new() -> Result<Self> {
        let net = population::network(0)?;
        let pbx = Pbx::start(&net.pbx, PBX_V4)?;
        let arguments = ami_arguments(pbx.ami(), pbx::USER, pbx.secret_file());
        let relay = Relay::attach(&net.pbx, "eth0", arguments)?;
        Ok(Self {
            client: Client::new(relay.socket()),
            net,
            pbx,
            relay,
            runtime: Builder::new_current_thread().enable_all().build()?,
            calls: Vec::new(),
        })
    }

    /// Begins calls, all at once; returns what it took until the daemon had every stream in its care.
    pub(super) fn announce(&mut self, calls: u16) -> Result<Cost> {
        let (begin, before) = (Instant::now(), self.relay.cpu_time()?);
        self.calls = self.pbx.silent_calls(calls, local(0), phone(0))?;
        self.await_all()?;
        Ok(Cost {
            time: begin.elapsed(),
            cpu: self.relay.cpu_time()?.saturating_sub(before),
        })
    }

    /// What the daemon takes in some time while so many calls a second, half each, end and begin anew.
    pub(super) fn go_on(&mut self, time: Duration, changes: u32) -> Result<Cost> {
        let (begin, before) = (Instant::now(), self.relay.cpu_time()?);
        if changes == 0 {
            thread::sleep(time);
        } else {
            let interval = Duration::from_secs(2) / changes;
            let mut at = begin;
            // Spread over all: a call that has just begun is not the next to end.
            for index in (0..self.calls.len()).cycle() {
                self.pbx.hang_up(self.calls[index])?;
                let number = index as u16;
                let begun = self.pbx.silent_calls(1, local(number), phone(number))?;
                self.calls[index] = begun[0];
                at += interval;
                if at > begin + time {
                    break;
                }
                thread::sleep(at.saturating_duration_since(Instant::now()));
            }
        }
        let cost = Cost {
            time: begin.elapsed(),
            cpu: self.relay.cpu_time()?.saturating_sub(before),
        };
        self.await_all()?;
        Ok(cost)
    }

    /// Waits until every call is in the daemon's care.
    fn await_all(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let expected = 2 * self.calls.len() as u64;
        loop {
            let status = self.status()?;
            if status.streams == expected && status.refused == 0 {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{} of {expected} streams after {PATIENCE:?}",
                status.streams
            );
            thread::sleep(LOOK);
        }
    }

    fn status(&self) -> Result<StatusReport> {
        let asked = || self.runtime.block_on(self.client.status());
        Ok(self.net.pbx.run(asked)?)
    }
}

/// Where the PBX receives the first leg of a call.
fn local(call: u16) -> SocketAddr {
    SocketAddr::new(PBX_V4, FIRST_PORT + 4 * call)
}

/// The first phone of a call.
fn phone(call: u16) -> SocketAddr {
    SocketAddr::V4(population::remote(2 * u32::from(call)))
}
