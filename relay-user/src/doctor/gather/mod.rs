//! Finds the facts out: asks the kernel, the daemon and Asterisk, and changes nothing.

mod asterisk;
mod host;
mod interface;
mod network;
mod programs;

use std::path::Path;

use super::{
    Examination,
    checks::cause,
    facts::{CallFacts, Facts},
    self_test,
};
use crate::{
    control::{
        client::Client,
        model::{PairList, PairState, StatusReport},
        socket,
    },
    next_hop::{Interface, Interfaces},
};

/// All facts.
pub(super) async fn all(examination: Examination) -> Facts {
    let Examination {
        interface: named,
        socket,
        ami,
        self_test: wanted,
    } = examination;
    let mut daemon = daemon(socket.as_deref(), named.as_deref()).await;
    let name = named
        .or_else(|| {
            daemon
                .as_ref()
                .map(|daemon| daemon.status.interface.clone())
        })
        .or_else(network::default_interface);
    let interfaces = Interfaces::read().ok();
    let found = name.as_deref().and_then(|name| {
        let interfaces = interfaces.as_ref()?;
        interfaces.named(name).ok()
    });
    // A daemon of another interface, at a socket that was named, or of another network namespace.
    daemon =
        daemon.filter(|daemon| found.is_some_and(|found| found.index == daemon.status.ifindex));
    let own_addresses = found.map(Interface::addresses).unwrap_or_default();
    let (asterisk, fit) = asterisk::facts(ami, own_addresses, daemon.is_none()).await;
    let mut interface_facts = name.map(|name| match (&interfaces, found) {
        (Some(interfaces), Some(found)) => interface::facts(found, interfaces),
        (interfaces, _) => interface::absent(name, interfaces.as_ref()),
    });
    let network = found.map(network::facts);
    if let (true, Some(facts), Some(found), Some(network)) =
        (wanted, &mut interface_facts, found, &network)
    {
        facts.self_test = Some(self_test::run(found, network, daemon.is_some()));
    }
    let calls = daemon.as_ref().map(|daemon| counted(&daemon.pairs)).or(fit);
    Facts {
        host: host::facts(),
        interface: interface_facts,
        network,
        daemon: daemon.map(|daemon| daemon.status),
        asterisk,
        calls,
    }
}

/// What a daemon tells of itself.
struct Daemon {
    status: StatusReport,
    pairs: PairList,
}

async fn daemon(named: Option<&Path>, interface: Option<&str>) -> Option<Daemon> {
    let client = Client::new(socket::find(named, interface).ok()?);
    Some(Daemon {
        status: client.status().await.ok()?,
        pairs: client.list().await.ok()?,
    })
}

fn counted(list: &PairList) -> CallFacts {
    let mut calls = CallFacts {
        told_by: "daemon".to_owned(),
        ..CallFacts::default()
    };
    for pair in &list.pairs {
        calls.total += 1;
        match pair.state {
            PairState::Offloaded => calls.relayed += 1,
            PairState::Waiting => calls.waiting += 1,
            PairState::Refused => {
                let why = pair.why.as_deref().unwrap_or("no cause is told");
                *calls.kept.entry(cause(why)).or_default() += 1;
            }
        }
    }
    calls
}
