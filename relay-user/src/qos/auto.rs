//! Shaping while calls are up: on when voice begins, off when it ends.
//!
//! The classifier stays on the interface all the time, for it counts the voice; only the queueing
//! disciplines come and go. They stay as they are when this ends, and whoever starts it next goes on
//! from there: a restart in mid-call changes nothing.

use std::{
    collections::VecDeque,
    fs::{self, File},
    path::PathBuf,
    process,
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant, SystemTime},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
    net::if_::if_nametoindex,
};
use serde::{Deserialize, Serialize};

use super::{
    classifier::{Classifier, ClassifierError},
    kernel::Rtnetlink,
    policy::{Policy, PolicyError},
    rate::Rate,
    report::{self, ShapingState},
    shaper::{self, QosError, Request},
    state::{StateError, Store},
    trigger::{SAMPLING, Thresholds, Transition, Trigger},
};
use crate::{
    datapath::{self, DatapathError},
    next_hop::Interfaces,
};

/// Files of an interface, by what follows its name: what is told, and who tells it.
const REPORT: &str = ".auto";
const LOCK: &str = ".auto-lock";

/// Transitions that are remembered.
const KEPT: usize = 16;

/// Until what could not be done is tried again, and between two looks at what was.
const PAUSE: Duration = Duration::from_secs(3);

/// When to shape an interface, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AutoSettings {
    /// What the line carries away from this host.
    pub uplink: Rate,
    /// What it brings, to be queued here as well.
    pub downlink: Option<Rate>,
    /// Classes and rules, unless the built-in ones.
    pub policy: Option<PathBuf>,
    /// Whether a queueing discipline of the administrator's makes way.
    pub replace: bool,
    /// Voice packets per second.
    pub thresholds: Thresholds,
}

/// Why it cannot begin. The text names the remedy.
#[derive(Debug, thiserror::Error)]
pub enum AutoError {
    /// Another one is at it.
    #[error(
        "{interface} is shaped by `relay-user qos auto` already (process {process}): end that one first"
    )]
    Running {
        /// The interface.
        interface: String,
        /// Who.
        process: u32,
    },
    /// Shaping cannot be had.
    #[error(transparent)]
    Qos(#[from] QosError),
    /// The policy is none.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// What must be remembered cannot be.
    #[error(transparent)]
    State(#[from] StateError),
    /// Voice cannot be counted.
    #[error(transparent)]
    Classifier(#[from] ClassifierError),
    /// Voice that is relayed cannot be counted.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
}

/// What `qos auto` is at, as `qos show --json` tells it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AutoReport {
    /// Whether a process minds it now.
    pub running: bool,
    /// That process, or the last one.
    pub process: u32,
    /// Whether shaping is on for calls.
    pub on: bool,
    /// Voice packets per second, in the last second that was seen.
    pub voice_per_second: f64,
    /// Above it, for 3 consecutive seconds, shaping goes on.
    pub on_threshold: u32,
    /// Below it, for 3 consecutive seconds, shaping goes off.
    pub off_threshold: u32,
    /// Why the last change could not be made; `null` if it was.
    pub failure: Option<String>,
    /// The last 16, the oldest first.
    pub transitions: VecDeque<Switched>,
}

/// Shaping went on or off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Switched {
    /// When, in UTC as RFC 3339 writes it, with milliseconds.
    pub time: String,
    /// Whether it went on.
    pub on: bool,
    /// Voice packets per second in the last second before.
    pub voice_per_second: f64,
}

/// At work on an interface.
#[derive(Debug)]
pub struct Auto {
    /// Name of the interface.
    interface: String,
    settings: AutoSettings,
    policy: Policy,
    /// The interface's number; none while it is gone, or could not be prepared.
    index: Option<u32>,
    /// Until when what failed is not tried again.
    retry: Instant,
    /// When its queues were last looked at.
    kept: Instant,
    trigger: Trigger,
    report: AutoReport,
    claim: Claim,
}

impl Auto {
    /// Takes over an interface: what shaping needs is tried, packets are classified, and voice counted.
    /// Shaping that is on stays on until there is no voice for 3 seconds.
    ///
    /// # Errors
    /// Every [`AutoError`]; then the interface is as it was.
    pub fn establish(interface: String, settings: AutoSettings) -> Result<Self, AutoError> {
        let policy = match &settings.policy {
            Some(path) => Policy::read(path)?,
            None => Policy::built_in(),
        };
        // An unknown one leaves nothing behind.
        Interfaces::read()
            .map_err(QosError::from)?
            .named(&interface)
            .map_err(QosError::from)?;
        let claim = Claim::take(&interface)?;
        let thresholds = settings.thresholds;
        let mut auto = Self {
            policy,
            index: None,
            retry: Instant::now(),
            kept: Instant::now(),
            trigger: Trigger::new(thresholds, false),
            report: AutoReport {
                running: true,
                process: process::id(),
                on: false,
                voice_per_second: 0.0,
                on_threshold: thresholds.on(),
                off_threshold: thresholds.off(),
                failure: None,
                transitions: stored(&claim.store).map_or_else(VecDeque::new, |it| it.transitions),
            },
            interface,
            settings,
            claim,
        };
        auto.prepare()?;
        auto.tell();
        Ok(auto)
    }

    /// Shapes while there is voice, until told to stop or until nobody can tell any more. What is on
    /// then stays on.
    pub fn run(mut self, stop: &Receiver<()>) {
        let start = Instant::now();
        while let Err(RecvTimeoutError::Timeout) = stop.recv_timeout(SAMPLING) {
            self.look(start);
        }
        self.report.running = false;
        self.tell();
    }

    /// Has the interface classified, and shaped if it is so already.
    fn prepare(&mut self) -> Result<(), AutoError> {
        let interface = &self.interface;
        let on = is_shaped(interface)?;
        let applied = shaper::apply(&mut Rtnetlink, &self.request())?;
        for note in applied.notes {
            tracing::warn!(interface, "{note}");
        }
        if !on {
            shaper::unshape(&mut Rtnetlink, interface)?;
        }
        self.index = if_nametoindex(interface.as_str()).ok();
        self.report.on = on;
        self.trigger = Trigger::new(self.settings.thresholds, on);
        Ok(())
    }

    /// Counts, and changes what is to be changed.
    fn look(&mut self, start: Instant) {
        if Instant::now() < self.retry {
            return;
        }
        match self.step(start) {
            Ok(()) => self.report.failure = None,
            Err(error) => {
                let text = error.to_string();
                // Said once, and tried again and again.
                if self.report.failure.as_ref() != Some(&text) {
                    tracing::warn!(interface = self.interface, "{text}");
                }
                self.report.failure = Some(text);
                self.retry = Instant::now() + PAUSE;
            }
        }
        self.tell();
    }

    fn step(&mut self, start: Instant) -> Result<(), AutoError> {
        let index = if_nametoindex(self.interface.as_str()).ok();
        if index.is_none() || index != self.index {
            self.index = None;
            self.report.on = false;
            self.prepare()?;
            tracing::info!(interface = self.interface, "the interface is back");
        }
        let Some(index) = self.index else {
            return Ok(());
        };
        let Some(voice) = voice(&self.interface, index)? else {
            tracing::warn!(
                interface = self.interface,
                "the classifier was taken away: it is put back"
            );
            return self.prepare();
        };
        let transition = self.trigger.sample(start.elapsed(), voice);
        self.report.voice_per_second = self.trigger.rate();
        match transition {
            Some(transition) => self
                .switch(transition)
                .inspect_err(|_| self.trigger.take_back()),
            None => self.keep(),
        }
    }

    /// Shapes again what somebody else has given another queueing discipline.
    fn keep(&mut self) -> Result<(), AutoError> {
        if !self.report.on || self.kept.elapsed() < PAUSE {
            return Ok(());
        }
        if !is_shaped(&self.interface)? {
            tracing::warn!(
                interface = self.interface,
                "its queues were taken away: shaping again"
            );
            shaper::shape(&mut Rtnetlink, &self.request())?;
        }
        self.kept = Instant::now();
        Ok(())
    }

    fn switch(&mut self, Transition { on, rate }: Transition) -> Result<(), AutoError> {
        let interface = &self.interface;
        let state = if on {
            shaper::shape(&mut Rtnetlink, &self.request())?;
            "on"
        } else {
            shaper::unshape(&mut Rtnetlink, interface)?;
            "off"
        };
        tracing::info!(
            interface,
            voice_per_second = rate.round(),
            "shaping is {state}"
        );
        self.report.on = on;
        while self.report.transitions.len() >= KEPT {
            self.report.transitions.pop_front();
        }
        self.report.transitions.push_back(Switched {
            time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            on,
            voice_per_second: rate,
        });
        Ok(())
    }

    fn request(&self) -> Request<'_> {
        let settings = &self.settings;
        Request {
            interface: &self.interface,
            uplink: settings.uplink,
            downlink: settings.downlink,
            policy: &self.policy,
            replace: settings.replace,
        }
    }

    /// Shaping does not depend on what can be told of it.
    fn tell(&self) {
        if let Err(error) = self.claim.write(&self.report) {
            tracing::debug!(%error, "what `qos show` tells is not up to date");
        }
    }
}

/// An interface that one process minds, and what it tells of it.
#[derive(Debug)]
struct Claim {
    store: Store,
    /// Locked while it is open.
    _lock: File,
}

impl Claim {
    fn take(interface: &str) -> Result<Self, AutoError> {
        let store = Store::new(interface);
        let lock = store.open(LOCK)?;
        // Not flock(2): that one cannot be asked about without taking it.
        match fcntl(&lock, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_WRLCK))) {
            Ok(_) => Ok(Self { store, _lock: lock }),
            Err(Errno::EAGAIN | Errno::EACCES) => Err(AutoError::Running {
                process: stored(&store).map_or(0, |report| report.process),
                interface: interface.to_owned(),
            }),
            Err(errno) => Err(store.failed("lock", LOCK, errno).into()),
        }
    }

    fn write(&self, report: &AutoReport) -> Result<(), StateError> {
        self.store.write_as(REPORT, report)
    }
}

/// What the last process told.
fn stored(store: &Store) -> Option<AutoReport> {
    serde_json::from_slice(&fs::read(store.path(REPORT)).ok()?).ok()
}

/// `struct flock` of fcntl_locking(2).
fn whole_file(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Whether an interface is shaped by us.
fn is_shaped(interface: &str) -> Result<bool, QosError> {
    let report = report::show(&mut Rtnetlink, Some(interface))?;
    let shaped = [ShapingState::Shaped, ShapingState::Drifted];
    Ok(report
        .interfaces
        .iter()
        .any(|it| shaped.contains(&it.state)))
}

/// Packets of voice until now: what leaves through the queueing disciplines, and what the relay in XDP
/// sends past them. None where nothing counts.
fn voice(interface: &str, index: u32) -> Result<Option<u64>, AutoError> {
    let relayed = datapath::relayed_past_queues(interface, index)?;
    Ok(Classifier::voice(interface)?.map(|counted| counted + relayed))
}

/// What `qos auto` does or did on an interface; none where it never ran in this boot.
pub(super) fn read(interface: &str) -> Option<AutoReport> {
    let store = Store::new(interface);
    let report = stored(&store)?;
    let mut held = whole_file(libc::F_WRLCK);
    let running = File::open(store.path(LOCK)).is_ok_and(|lock| {
        fcntl(&lock, FcntlArg::F_OFD_GETLK(&mut held)).is_ok()
            && held.l_type != libc::F_UNLCK as libc::c_short
    });
    Some(AutoReport { running, ..report })
}

/// Forgets what it did; its lock's file stays.
///
/// # Errors
/// [`StateError`].
pub fn forget(interface: &str) -> Result<(), StateError> {
    Store::new(interface).remove_as(REPORT)
}

/// Refuses what would be undone at once.
///
/// # Errors
/// [`AutoError::Running`].
pub fn refuse_while_running(interface: &str) -> Result<(), AutoError> {
    match read(interface) {
        Some(report) if report.running => Err(AutoError::Running {
            interface: interface.to_owned(),
            process: report.process,
        }),
        _ => Ok(()),
    }
}
