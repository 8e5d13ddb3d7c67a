//! Pairs that a program registers through the API, and what it takes to list and to adopt them.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use relay_tests::{relay::Relay, topology::Direct};
use relay_user::{
    control::{client::Client, model::BATCH},
    pair::{Pair, Proof},
};
use tokio::runtime::{Builder, Runtime};

use super::population;

/// How long anything may take that is measured.
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon that knows pairs.
pub(super) struct Registered {
    pub(super) net: Direct,
    pub(super) relay: Relay,
    arguments: Vec<String>,
    client: Client,
    runtime: Runtime,
    pairs: u32,
}

impl Registered {
    /// A daemon with room for so many streams.
    pub(super) fn none(streams: u32) -> Result<Self> {
        let net = population::network(streams)?;
        // Their phones never send.
        let arguments = ["--persist", "--expire", "86400", "--max-streams"];
        let mut arguments: Vec<_> = arguments.map(str::to_owned).into();
        arguments.push(streams.to_string());
        let relay = Relay::attach(&net.pbx, "eth0", &arguments)?;
        Ok(Self {
            client: Client::new(relay.socket()),
            net,
            relay,
            arguments,
            runtime: Builder::new_current_thread().enable_all().build()?,
            pairs: 0,
        })
    }

    fn next(&mut self, count: u32) -> Result<Vec<Pair>> {
        let numbers = self.pairs..self.pairs + count;
        self.pairs += count;
        numbers
            .map(|number| population::pair(number, Proof::Wire))
            .collect()
    }

    /// Adds pairs, one with each request; returns how long it took.
    pub(super) fn add_singly(&mut self, count: u32) -> Result<Duration> {
        let pairs = self.next(count)?;
        let begin = Instant::now();
        self.net.pbx.run(|| {
            self.runtime.block_on(async {
                for pair in &pairs {
                    self.client.add(pair).await?;
                }
                anyhow::Ok(())
            })
        })?;
        Ok(begin.elapsed())
    }

    /// Adds pairs, as many with each request as it may hold; returns how long it took.
    pub(super) fn add(&mut self, count: u32) -> Result<Duration> {
        let pairs = self.next(count)?;
        let begin = Instant::now();
        self.net.pbx.run(|| {
            self.runtime.block_on(async {
                for batch in pairs.chunks(BATCH) {
                    for added in self.client.add_all(batch).await? {
                        added?;
                    }
                }
                anyhow::Ok(())
            })
        })?;
        Ok(begin.elapsed())
    }

    pub(super) const fn pairs(&self) -> u32 {
        self.pairs
    }

    /// Sees that every pair is in the maps.
    pub(super) fn check(&self) -> Result<()> {
        let status = self
            .net
            .pbx
            .run(|| self.runtime.block_on(self.client.status()))?;
        let expected = (u64::from(self.pairs), 2 * u64::from(self.pairs));
        let found = (status.pairs, status.streams);
        ensure!(
            found == expected,
            "{found:?} pairs and streams, not {expected:?}"
        );
        Ok(())
    }

    /// Time of a command from begin to end.
    pub(super) fn command(&self, arguments: &[&str]) -> Result<Duration> {
        let mut command = self.relay.command(arguments);
        command.stdout(Stdio::null());
        let begin = Instant::now();
        let status = self.net.pbx.spawn(command)?.wait(PATIENCE)?;
        ensure!(status.success(), "{arguments:?}: {status}");
        Ok(begin.elapsed())
    }

    /// Ends the daemon, which leaves its pairs to the next; returns the time from its start until it has taken
    /// them over.
    pub(super) fn restart(&mut self) -> Result<Duration> {
        self.relay.signal(Signal::SIGTERM);
        let status = self.relay.wait(PATIENCE)?;
        ensure!(status.success(), "the daemon ended with {status}");
        let begin = Instant::now();
        self.relay = Relay::attach(&self.net.pbx, "eth0", &self.arguments)?;
        let took = begin.elapsed();
        self.client = Client::new(self.relay.socket());
        self.check().context("after the restart")?;
        Ok(took)
    }
}
