//! The daemon behind `relay-user attach`: everything is opened in an order that leaves nothing
//! behind when a step fails, and closed in the reverse order.

use std::{
    io,
    thread::{self, JoinHandle},
    time::Instant,
};

use anyhow::{Context as _, anyhow, bail};
use sd_notify::NotifyState;
use tokio::{
    runtime::{self, Runtime},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    ami::{self, FeedEvent, FeedSettings, Proving},
    config::{AttachSettings, Mode},
    control::{
        Command, Reply,
        model::{Detached, Found},
        server,
        socket::ControlSocket,
    },
    controller::{self, Controller, Handled},
    datapath::{self, Adopted, AttachMode, Datapath, DatapathError, Events},
    dscp::Dscp,
    events::EventBus,
    logging,
    next_hop::{self, Changes, Interface, Interfaces, LinkLayer},
    priority::Priority,
    privileges,
    qos::{
        auto::{Auto, AutoSettings},
        classifier::Classifier,
    },
    web::{Hosts, Listeners},
};

/// Commands of clients that wait for the controller.
const COMMANDS: usize = 64;

/// AMI events that wait for the controller; beyond, Asterisk waits.
const FEED: usize = 1024;

/// Questions of the controller that wait for the AMI feed.
const QUESTIONS: usize = 1024;

/// Attaches the relay to an interface and serves until SIGTERM, SIGINT, SIGHUP or
/// `relay-user detach`.
///
/// # Errors
/// Whatever keeps the relay from starting or from going on, with its remedy. Nothing is left behind
/// in the kernel.
pub fn run(mut settings: AttachSettings) -> anyhow::Result<()> {
    privileges::check()?;
    let interfaces = Interfaces::read()?;
    let interface = interfaces.named(&settings.interface)?.clone();
    let choice = Choice::of(&settings, &interface)?;
    check_interface(&interface, choice.mode)?;
    for vlan in interfaces.vlans_on(interface.index) {
        if choice.mode == Mode::Tc {
            break;
        }
        // The tag is then beside the packet, where XDP does not see it.
        tracing::warn!(
            vlan = vlan.name,
            "calls on this VLAN are relayed only while the NIC leaves tags in the frame (`ethtool -K {} rxvlan off`), or in `--mode tc`",
            interface.name
        );
    }
    // A port below 1024 needs a capability that is given up next.
    let listeners = Listeners::bind(&mut settings)?;
    datapath::ensure_bpffs()?;
    // Capabilities belong to a thread: before the event loop starts any.
    privileges::keep_for_attaching()?;
    let runtime = event_loop()?;
    let outcome = runtime.block_on(attach(settings, listeners, &interface, choice));
    // A name lookup that hangs must not keep the process.
    runtime.shutdown_background();
    logging::tell_rest();
    outcome
}

/// Refuses an interface that cannot be attached to, before anything is touched.
fn check_interface(interface: &Interface, mode: Mode) -> anyhow::Result<()> {
    let name = &interface.name;
    match (interface.layer, mode) {
        (LinkLayer::Other, _) => bail!(
            "{name} is neither Ethernet nor a plain IP link such as tun or PPP: attach to the interface that the calls' RTP comes in on"
        ),
        (LinkLayer::Ip, Mode::Native | Mode::Generic) => {
            bail!("{name} has no Ethernet header, which XDP needs: use `--mode tc`, or auto")
        }
        _ => {}
    }
    // Traffic control gets whatever an XDP program passes.
    let programs = match mode {
        Mode::Tc => &[][..],
        _ => &interface.xdp,
    };
    for program in programs {
        // Detaching our own program by hand, as that error advises, would take calls from under a
        // daemon.
        datapath::check_unserved(name)?;
        if !datapath::owns(name, interface.index, program.id)? {
            return Err(DatapathError::OtherProgram {
                interface: name.clone(),
                program: datapath::describe_program(program.id),
            }
            .into());
        }
    }
    Ok(())
}

/// How to attach, as far as that can be told beforehand.
struct Choice {
    mode: Mode,
    /// Why.
    reason: String,
    /// The queueing discipline that XDP would go around, where it is there for a purpose.
    shaper: Option<String>,
}

impl Choice {
    fn of(settings: &AttachSettings, interface: &Interface) -> anyhow::Result<Self> {
        let qdisc = datapath::root_qdisc(interface.index).with_context(|| {
            format!("cannot read the queueing discipline of {}", interface.name)
        })?;
        let shaper = qdisc.filter(|kind| datapath::shapes(kind));
        let needs_tc = needs_tc(settings, interface.layer, shaper.as_deref());
        let (mode, reason) = match (settings.mode, needs_tc) {
            (Mode::Auto, Some(reason)) => (Mode::Tc, reason),
            (mode, _) => (mode, "asked for".to_owned()),
        };
        Ok(Self {
            mode,
            reason,
            shaper,
        })
    }
}

/// Why XDP would not do, if so.
fn needs_tc(settings: &AttachSettings, layer: LinkLayer, shaper: Option<&str>) -> Option<String> {
    if layer == LinkLayer::Ip {
        return Some("the link has no Ethernet header, which XDP needs".to_owned());
    }
    if let Some(priority) = settings.priority.and_then(Priority::effective) {
        return Some(format!(
            "the priority {priority} is nothing that XDP can set"
        ));
    }
    if settings.qos_auto.is_some() {
        return Some("[qos.auto] shapes what leaves, and XDP would go around that".to_owned());
    }
    shaper.map(|kind| format!("the queueing discipline is {kind}, which XDP would go around"))
}

async fn attach(
    mut settings: AttachSettings,
    listeners: Listeners,
    interface: &Interface,
    choice: Choice,
) -> anyhow::Result<()> {
    // Before anything else, so that a signal during start-up ends the daemon cleanly too.
    let signalled = signalled()?;
    tokio::pin!(signalled);

    let socket = ControlSocket::claim(&settings.socket)?;
    let session = match &settings.ami {
        Some(ami) => Some(tokio::select! {
            session = ami::connect(ami) => session?,
            signal = &mut signalled => {
                tracing::info!(signal, "ended while connecting to AMI");
                return Ok(());
            }
        }),
        None => None,
    };
    let Attached {
        mut datapath,
        adopted,
        mode_reason,
    } = attach_datapath(settings.max_streams, interface, choice)?;
    if let Dscp::Map(map) = &settings.dscp {
        datapath.set_dscp_map(map)?;
    }
    let auto = settings
        .qos_auto
        .take()
        .map(|auto| Auto::establish(interface.name.clone(), auto));
    let auto = auto.transpose()?;
    privileges::keep_for_serving()?;
    let (next_hops, resolver, changes) = next_hop::open(interface.index)?;
    tracing::info!(
        interface = interface.name,
        mode = datapath.mode().name(),
        reason = mode_reason,
        "attached"
    );

    let wire = datapath.events().context("cannot listen to the datapath")?;

    let stop = CancellationToken::new();
    let bus = EventBus::new();
    let (commands_in, commands) = mpsc::channel(COMMANDS);
    let hosts = Hosts::new(&settings.allowed_hosts)?;
    let web = listeners.serve(hosts, &commands_in, &bus, &stop)?;
    let server = tokio::spawn(server::serve(
        socket,
        commands_in,
        bus.clone(),
        stop.clone().cancelled_owned(),
    ));
    let resolver = tokio::spawn(resolver.run());
    let (feed, events, questions) = match session.zip(settings.ami.clone()) {
        Some((session, ami)) => {
            let (events_in, events) = mpsc::channel(FEED);
            let (questions_in, questions) = mpsc::channel(QUESTIONS);
            let proving = (settings.proof != 0).then(|| Proving {
                own_addresses: interface.addresses(),
            });
            // A call that is relayed takes two streams.
            let max_bridges = ami::BRIDGES.max(settings.max_streams as usize / 2);
            let settings = FeedSettings {
                ami,
                proving,
                max_bridges,
            };
            let feed = ami::run(session, settings, events_in, questions, stop.clone());
            (Some(tokio::spawn(feed)), Some(events), Some(questions_in))
        }
        None => (None, None, None),
    };

    let mut controller = Controller::new(
        settings,
        interface.index,
        mode_reason,
        datapath,
        next_hops,
        bus,
        questions,
    );
    if let Some(adopted) = adopted {
        controller.adopt(&adopted.streams).await?;
        tracing::info!(
            pairs = controller.pairs(),
            "carrying on what an earlier daemon left"
        );
    }
    // Nothing is relayed before the first: there is no lease yet, or an earlier daemon's.
    controller.tick(Instant::now()).await?;
    notify(&[NotifyState::Ready]);
    let sources = Sources {
        commands,
        feed: events,
        wire,
        next_hops: changes,
    };
    let shaping = auto.map(Shaping::start).transpose()?;
    let served = serve(controller, sources, signalled).await;

    notify(&[NotifyState::Stopping]);
    // The datapath is gone by now: answering the client that asked for it is all that is left.
    let outcome = served.map(|detach| {
        if let Some((reply, detached)) = detach {
            // The client may have gone; the daemon ends either way.
            let _ = reply.send(Ok(detached));
        }
    });
    stop.cancel();
    if let Some(shaping) = shaping {
        shaping.end()?;
    }
    if let Some(feed) = feed {
        feed.await.context("the AMI feed failed")?;
    }
    server.await.context("the control server failed")??;
    for server in web {
        server.await.context("a web server failed")?;
    }
    resolver.await.context("the next hop resolver failed")??;
    outcome
}

/// The signal that ends this process, one of those that come from now on.
fn signalled() -> io::Result<impl Future<Output = &'static str>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
            _ = hangup.recv() => "SIGHUP",
        }
    })
}

/// Shaping while calls are up, in a thread of its own: changing queueing disciplines may take its time.
struct Shaping {
    stop: std::sync::mpsc::Sender<()>,
    thread: JoinHandle<()>,
}

impl Shaping {
    fn start(auto: Auto) -> io::Result<Self> {
        let (stop, stopped) = std::sync::mpsc::channel();
        let thread = thread::Builder::new()
            .name("qos auto".to_owned())
            .spawn(move || auto.run(&stopped))?;
        Ok(Self { stop, thread })
    }

    /// Ends it, and leaves shaping as it is.
    fn end(self) -> anyhow::Result<()> {
        drop(self.stop);
        let ended = self.thread.join();
        ended.map_err(|_| anyhow!("the thread that shapes for calls has failed"))
    }
}

/// Shapes an interface while calls are up, until SIGTERM, SIGINT or SIGHUP.
///
/// # Errors
/// Whatever keeps it from starting, with its remedy; then the interface is as it was.
pub fn shape_for_calls(interface: String, settings: AutoSettings) -> anyhow::Result<()> {
    let auto = Auto::establish(interface, settings)?;
    // An interface that comes back is prepared anew.
    privileges::keep_for_attaching()?;
    let runtime = event_loop()?;
    runtime.block_on(async {
        let signalled = signalled()?;
        let shaping = Shaping::start(auto)?;
        notify(&[NotifyState::Ready]);
        let signal = signalled.await;
        notify(&[NotifyState::Stopping]);
        tracing::info!(signal, "leaving queues as they are");
        shaping.end()
    })
}

fn event_loop() -> anyhow::Result<Runtime> {
    runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")
}

/// Where the controller's events come from.
struct Sources {
    commands: mpsc::Receiver<Command>,
    feed: Option<mpsc::Receiver<FeedEvent>>,
    wire: Events,
    next_hops: Changes,
}

/// The main loop. Dropping the controller at its end detaches the datapath.
///
/// A task that ends on its own ends the loop too: a relay that nobody controls must not go on. That
/// task's own error follows when it is awaited.
async fn serve(
    mut controller: Controller,
    mut sources: Sources,
    signalled: impl Future<Output = &'static str>,
) -> anyhow::Result<Option<(Reply<Detached>, Detached)>> {
    tokio::pin!(signalled);
    let mut ticks = interval(controller::TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            // What takes calls back comes before what may wait.
            biased;
            _ = ticks.tick() => {
                logging::tell_suppressed();
                controller.tick(Instant::now()).await?;
            }
            signal = &mut signalled => {
                let pairs = controller.pairs();
                if controller.persists() {
                    tracing::info!(signal, pairs, "leaving the datapath to its lease");
                    controller.leave();
                    return Ok(None);
                }
                tracing::info!(signal, pairs, "taking everything back and detaching");
                controller.tell_end(&format!("the daemon ends on {signal}"));
                return Ok(None);
            }
            change = sources.next_hops.recv() => match change {
                Some(notice) => controller.resolved(&notice).await?,
                None => bail!("the next hop resolver ended"),
            },
            event = next(&mut sources.feed) => match event {
                Some(event) => controller.feed(event).await?,
                None => bail!("the AMI feed ended"),
            },
            event = sources.wire.next() => controller.wire(&event).await?,
            command = sources.commands.recv() => match command {
                Some(command) => if let Handled::Detach(reply) = controller.command(command).await? {
                    tracing::info!(pairs = controller.pairs(), "detaching, as a client asked");
                    controller.tell_end("detached by the operator");
                    let detached = Detached {
                        interface: controller.interface().to_owned(),
                        found: Found::Running,
                        pairs: controller.pairs(),
                    };
                    return Ok(Some((reply, detached)));
                },
                None => bail!("the control server ended"),
            },
        }
    }
}

/// The feed's next event; never, without a feed.
async fn next(events: &mut Option<mpsc::Receiver<FeedEvent>>) -> Option<FeedEvent> {
    match events {
        Some(events) => events.recv().await,
        None => std::future::pending().await,
    }
}

/// A datapath at work, what an earlier daemon left in it, and why it runs in its mode.
struct Attached {
    datapath: Datapath,
    adopted: Option<Adopted>,
    mode_reason: String,
}

/// Attaches in the mode asked for, or in the one that works here; says why that one.
fn attach_datapath(
    max_streams: u32,
    interface: &Interface,
    choice: Choice,
) -> anyhow::Result<Attached> {
    let attach = |mode| Datapath::attach(interface, mode, max_streams);
    let Choice {
        mode,
        reason,
        shaper,
    } = choice;
    if let (Mode::Native | Mode::Generic, Some(kind)) = (mode, shaper) {
        tracing::warn!(
            interface = interface.name,
            "relayed packets go around the queueing discipline {kind}, unless in `--mode tc`"
        );
    }
    // veth_xdp_flush() in drivers/net/veth.c: frames sent by XDP_TX are delivered only when the
    // peer runs an XDP program too, and lost without one.
    let veth = interface.kind.as_deref() == Some("veth");
    let redirected = Classifier::is_redirected(&interface.name, interface.index)?;
    if redirected && mode == Mode::Generic {
        tracing::warn!(
            interface = interface.name,
            "generic XDP sees all that comes in twice, because of `relay-user qos` with a downlink, and can prove no call: `--mode tc` does not"
        );
    }
    // Where the driver cannot.
    let in_the_stack = |reason: String| -> Result<_, DatapathError> {
        if redirected {
            let reason = format!("{reason}, and generic XDP would see all that comes in twice");
            return Ok((attach(AttachMode::Tc)?, reason));
        }
        Ok((attach(AttachMode::Generic)?, reason))
    };
    let (attached, mode_reason) = match mode {
        Mode::Tc => (attach(AttachMode::Tc)?, reason),
        Mode::Native => {
            let attached = attach(AttachMode::Native)?;
            if veth {
                let reason = "asked for; loses what it relays unless the veth's peer runs an XDP program too";
                tracing::warn!(interface = interface.name, "native XDP on veth {reason}");
                (attached, reason.to_owned())
            } else {
                (attached, reason)
            }
        }
        Mode::Generic => (attach(AttachMode::Generic)?, reason),
        Mode::Auto => match datapath::attached_mode(&interface.name, interface.index)? {
            // To try another mode, calls would have to be taken back.
            Some(mode) => (
                attach(mode)?,
                "carried on from the daemon before".to_owned(),
            ),
            None if veth => in_the_stack(
                "native XDP on veth loses packets unless the peer runs an XDP program too"
                    .to_owned(),
            )?,
            None => match attach(AttachMode::Native) {
                Ok(attached) => (attached, "the driver supports native XDP".to_owned()),
                Err(DatapathError::NativeRefused { source, .. }) => {
                    in_the_stack(format!("the driver refuses native XDP ({source})"))?
                }
                Err(error) => return Err(error.into()),
            },
        },
    };
    let (datapath, adopted) = attached;
    Ok(Attached {
        datapath,
        adopted,
        mode_reason,
    })
}

/// Tells systemd, where it listens (sd_notify(3)).
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager was not told");
    }
}

/// Removes what daemons that no longer run left for an interface, attached or pinned, of every version;
/// returns whether there was anything. Refuses while a daemon serves that interface, on whatever
/// socket.
///
/// # Errors
/// What kept a thing from being removed.
pub fn remove_leftovers(interface: &str) -> anyhow::Result<bool> {
    let removed = datapath::remove_leftovers(interface)?;
    for what in &removed {
        tracing::info!("removed {what}");
    }
    Ok(!removed.is_empty())
}
