//! The daemon behind `relay-user attach`: everything is opened in an order that leaves nothing
//! behind when a step fails, and closed in the reverse order.

use anyhow::{Context as _, bail};
use sd_notify::NotifyState;
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

use crate::{
    ami::{self, FeedEvent},
    config::{AttachSettings, Mode},
    control::{
        Command, Reply,
        model::{Detached, Found},
        server,
        socket::ControlSocket,
    },
    controller::{Controller, Handled},
    datapath::{self, AttachMode, Datapath, DatapathError},
    next_hop::{self, Changes, Interface},
    privileges,
};

/// Commands of clients that wait for the controller.
const COMMANDS: usize = 64;

/// AMI events that wait for the controller; beyond, Asterisk waits.
const FEED: usize = 1024;

/// Attaches the relay to an interface and serves until SIGTERM, SIGINT or `relay-user detach`.
///
/// # Errors
/// Whatever keeps the relay from starting or from going on, with its remedy. Nothing is left behind
/// in the kernel.
pub fn run(settings: AttachSettings) -> anyhow::Result<()> {
    runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?
        .block_on(attach(settings))
}

async fn attach(settings: AttachSettings) -> anyhow::Result<()> {
    // Before anything else, so that a signal during start-up ends the daemon cleanly too.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let signalled = async {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    tokio::pin!(signalled);

    privileges::check()?;
    let interface = next_hop::interface(&settings.interface)?;
    let socket = ControlSocket::claim(&settings.socket)?;
    let session = match &settings.ami {
        Some(ami) => Some(tokio::select! {
            session = ami::connect(ami) => session?,
            signal = &mut signalled => bail!("{signal} while connecting to AMI"),
        }),
        None => None,
    };
    let (datapath, mode_reason) = attach_datapath(&settings, &interface)?;
    privileges::drop_others()?;
    let (next_hops, resolver, changes) = next_hop::open(interface.index)?;
    tracing::info!(
        interface = interface.name,
        mode = datapath.mode().name(),
        reason = mode_reason,
        "attached"
    );

    let stop = CancellationToken::new();
    let (commands_in, commands) = mpsc::channel(COMMANDS);
    let server = tokio::spawn(server::serve(
        socket,
        commands_in,
        stop.clone().cancelled_owned(),
    ));
    let resolver = tokio::spawn(resolver.run());
    let (events_in, events) = mpsc::channel(FEED);
    let feed = session
        .zip(settings.ami.clone())
        .map(|(session, ami)| tokio::spawn(ami::run(session, ami, events_in, stop.clone())));

    let controller = Controller::new(settings, interface.index, mode_reason, datapath, next_hops);
    notify(&[NotifyState::Ready]);
    let served = serve(controller, commands, events, changes, signalled).await;

    notify(&[NotifyState::Stopping]);
    // The datapath is gone by now: answering the client that asked for it is all that is left.
    let outcome = served.map(|detach| {
        if let Some((reply, detached)) = detach {
            // The client may have gone; the daemon ends either way.
            let _ = reply.send(Ok(detached));
        }
    });
    stop.cancel();
    if let Some(feed) = feed {
        feed.await.context("the AMI feed failed")?;
    }
    server.await.context("the control server failed")??;
    resolver.await.context("the next hop resolver failed")??;
    outcome
}

/// The main loop. Dropping the controller at its end detaches the datapath.
async fn serve(
    mut controller: Controller,
    mut commands: mpsc::Receiver<Command>,
    mut events: mpsc::Receiver<FeedEvent>,
    mut changes: Changes,
    signalled: impl Future<Output = &'static str>,
) -> anyhow::Result<Option<(Reply<Detached>, Detached)>> {
    tokio::pin!(signalled);
    loop {
        tokio::select! {
            // What takes calls back comes before what may wait.
            biased;
            signal = &mut signalled => {
                tracing::info!(signal, pairs = controller.pairs(), "taking everything back and detaching");
                return Ok(None);
            }
            Some(event) = events.recv() => controller.feed(event).await?,
            change = changes.recv() => match change {
                Some((path, resolution)) => controller.resolved(path, &resolution).await?,
                // Its own error follows when its task is awaited.
                None => return Ok(None),
            },
            Some(command) = commands.recv() => {
                if let Handled::Detach(reply) = controller.command(command).await? {
                    tracing::info!(pairs = controller.pairs(), "detaching, as a client asked");
                    let detached = Detached {
                        interface: controller.interface().to_owned(),
                        found: Found::Running,
                        pairs: controller.pairs(),
                    };
                    return Ok(Some((reply, detached)));
                }
            }
        }
    }
}

/// Attaches in the mode asked for, or in the one that works here; says why that one.
fn attach_datapath(
    settings: &AttachSettings,
    interface: &Interface,
) -> anyhow::Result<(Datapath, String)> {
    if let Some(other) = interface.xdp.first() {
        // Detaching our own program by hand, as that error advises, would take calls from under a
        // daemon.
        datapath::check_unserved(&interface.name)?;
        return Err(DatapathError::OtherProgram {
            interface: interface.name.clone(),
            program: datapath::describe_program(other.id),
        }
        .into());
    }
    let attach =
        |mode| Datapath::attach(&interface.name, interface.index, mode, settings.max_streams);
    match settings.mode {
        Mode::Native => Ok((attach(AttachMode::Native)?, "asked for".to_owned())),
        Mode::Generic => Ok((attach(AttachMode::Generic)?, "asked for".to_owned())),
        // veth_xdp_flush() in drivers/net/veth.c: frames sent by XDP_TX are delivered only when the
        // peer runs an XDP program too, and lost without one.
        Mode::Auto if interface.kind.as_deref() == Some("veth") => Ok((
            attach(AttachMode::Generic)?,
            "native XDP on veth loses packets unless the peer runs an XDP program too".to_owned(),
        )),
        Mode::Auto => match attach(AttachMode::Native) {
            Ok(datapath) => Ok((datapath, "the driver supports native XDP".to_owned())),
            Err(DatapathError::NativeRefused { source, .. }) => {
                let reason = format!("the driver refuses native XDP ({source})");
                Ok((attach(AttachMode::Generic)?, reason))
            }
            Err(error) => Err(error.into()),
        },
    }
}

/// Tells systemd, where it listens (sd_notify(3)).
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager was not told");
    }
}

/// Removes the pins that a daemon which was killed left for an interface; returns whether there were
/// any. Its program and maps went with it. Refuses while a daemon serves that interface, on whatever
/// socket.
///
/// # Errors
/// What kept a thing from being removed.
pub fn remove_leftovers(interface: &str) -> anyhow::Result<bool> {
    Ok(!datapath::remove_leftovers(interface)?.is_empty())
}
