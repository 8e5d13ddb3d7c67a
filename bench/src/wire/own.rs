//! Our relay beside a userspace relay that stands for the PBX, and from which it takes every call once that has been
//! proven.

use std::collections::BTreeMap;

use anyhow::Result;
use relay_tests::{namespace::Host, relay::Relay, topology::Direct};
use relay_user::{
    control::client::Client,
    pair::{self, Pair, Proof},
};
use tokio::runtime::{Builder, Runtime};

use super::call::{Call, Leg};

/// The relay, which knows the calls.
pub(super) struct Own {
    relay: Relay,
    client: Client,
    runtime: Runtime,
    host: Host,
    pairs: Vec<Pair>,
}

impl Own {
    /// Attaches it in a mode of `--mode`, and tells it of the calls.
    ///
    /// # Errors
    /// It does not start, or refuses a call.
    pub(super) fn attach(net: &Direct, calls: &[Call], mode: &str) -> Result<Self> {
        // Nobody talks while others are measured.
        let arguments = ["--mode", mode, "--expire", "86400"];
        let relay = Relay::attach(&net.pbx, &net.pbx_interface.name, arguments)?;
        let leg = |leg: &Leg| -> Result<pair::Leg> { Ok(leg.to_string().parse()?) };
        let pairs = calls.iter().map(|[first, second]| {
            let legs = [leg(first)?, leg(second)?];
            Ok(Pair::new(legs, vec![], Proof::Wire)?)
        });
        let own = Self {
            client: Client::new(relay.socket()),
            runtime: Builder::new_current_thread().enable_all().build()?,
            host: net.pbx.clone(),
            pairs: pairs.collect::<Result<_>>()?,
            relay,
        };
        own.begin_anew()?;
        Ok(own)
    }

    /// The daemon's process id.
    pub(super) fn id(&self) -> u32 {
        self.relay.id()
    }

    /// Forgets the calls and is told of them again, as of new ones: a stream that was not what it seemed to be is proven
    /// again only after a while.
    ///
    /// # Errors
    /// It does not answer, or refuses a call.
    pub(super) fn begin_anew(&self) -> Result<()> {
        let work = async {
            self.client.flush().await?;
            self.client.add_all(&self.pairs).await
        };
        for added in self.host.run(|| self.runtime.block_on(work))? {
            added?;
        }
        Ok(())
    }

    /// Whether it has every stream offloaded.
    ///
    /// # Errors
    /// It does not answer.
    pub(super) fn has_all_offloaded(&self) -> Result<bool> {
        let status = self
            .host
            .run(|| self.runtime.block_on(self.client.status()))?;
        Ok(status.stream_states.offloaded == 2 * self.pairs.len() as u64)
    }

    /// Packets by reason until now.
    ///
    /// # Errors
    /// It does not answer.
    pub(super) fn reasons(&self) -> Result<BTreeMap<String, u64>> {
        self.relay.reasons()
    }
}
