//! Shaping an interface, and putting back what was there.
//!
//! Either all of it happens or nothing: trees are built in a namespace of their own first, where that
//! is permitted, and what fails all the same is undone. Traffic flows meanwhile. In a new tree no packet
//! is queued before its class exists (HTB sends it straight on), and a tree of ours is changed in its
//! place, without loss. Packets are classified once the classes exist, and classes deleted once no
//! packet is.

use std::{path::PathBuf, time::Duration};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::{
    classifier::{Classifier, ClassifierError},
    htb,
    kernel::Kernel,
    leaf::{Leaf, Leaves},
    policy::{Policy, PolicyError},
    rate::Rate,
    rehearsal::{self, RehearsalError},
    shape::{LONGEST, Shape},
    state::{Line, NOT_YET, State, StateError, Store},
    table::Task,
    tree::{Change, Plan, Step, StepError, Tree, run},
};
use crate::{
    datapath::{AttachMode, attached_mode},
    netlink::Refusal,
    next_hop::{Interface, InterfaceError, Interfaces, NetlinkError},
};

/// What an interface is shaped to.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Name of the interface.
    pub interface: &'a str,
    /// What the line carries away from this host.
    pub uplink: Rate,
    /// What it brings, to be queued here as well.
    pub downlink: Option<Rate>,
    /// Classes and rules.
    pub policy: &'a Policy,
    /// Whether a queueing discipline of the administrator's makes way.
    pub replace: bool,
}

/// What was done: the JSON of `relay-user qos apply --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// Name of the interface.
    pub interface: String,
    /// What the line carries away from this host, in bit/s.
    pub uplink: Rate,
    /// What it brings, where that is queued too, in bit/s.
    pub downlink: Option<Rate>,
    /// How many classes there are.
    pub classes: usize,
    /// The queueing discipline in each class.
    pub leaf: Leaf,
    /// What was there before, in words.
    pub before: String,
    /// What the user should know, a sentence each.
    pub notes: Vec<String>,
}

/// What was done without shaping: the JSON of `relay-user qos mark --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marked {
    /// Name of the interface.
    pub interface: String,
    /// Where the policy was read; `null` for the built-in one.
    pub policy: Option<PathBuf>,
    /// How many of its rules mark.
    pub rules: usize,
}

/// What was undone: the JSON of `relay-user qos clear --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Cleared {
    /// Nothing of ours was there.
    Nothing,
    /// What was there before is back.
    Restored {
        /// It, in words.
        before: String,
        /// What the user should know, a sentence each.
        notes: Vec<String>,
    },
    /// Somebody has put another queueing discipline in the place of ours, which stays; nothing of ours
    /// is left.
    Left {
        /// It, in words.
        present: String,
    },
    /// Packets are not marked any longer, which was all.
    Unmarked,
    /// The interface was removed, and our trees with it; the rest is removed now.
    Gone,
}

/// Why nothing was done. The text names the remedy.
#[derive(Debug, thiserror::Error)]
pub enum QosError {
    /// No such interface.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// The interfaces cannot be listed.
    #[error(transparent)]
    Interfaces(#[from] NetlinkError),
    /// The policy does not fit the rate.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The state cannot be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// The administrator has a queueing discipline of his own there.
    #[error(
        "{interface} has a queueing discipline that is not relay-user's ({what}): with `--replace`, or `replace = true` under [qos.auto], it makes way, and `relay-user qos clear {interface}` {restored}"
    )]
    Foreign {
        /// The interface.
        interface: String,
        /// What is there.
        what: String,
        /// How well it would be put back.
        restored: &'static str,
    },
    /// Not root.
    #[error("changing queueing disciplines needs CAP_NET_ADMIN: run as root")]
    Permission,
    /// It has more than marks.
    #[error(
        "{0} is shaped, or was by `relay-user qos auto`: `relay-user qos apply` changes the policy of that, `relay-user qos clear {0}` ends it"
    )]
    Shaped(String),
    /// Removed meanwhile.
    #[error("{0} is gone: shape it again when it is back")]
    InterfaceGone(String),
    /// Neither there nor known.
    #[error(
        "no interface `{0}`, and none of that name was shaped: `ip link` lists those that there are"
    )]
    Unknown(String),
    /// It has another name than when it was shaped.
    #[error(
        "{was} was shaped, and is {now} now: `relay-user qos clear {now}` puts back what was there; then do this again"
    )]
    Renamed {
        /// Its name then.
        was: String,
        /// Its name now.
        now: String,
    },
    /// The stack would show the relay everything twice.
    #[error(
        "the relay on {0} runs in generic XDP, which sees all that an IFB device hands back a second time, and could prove no call: attach it with `--mode tc`, or leave out --downlink"
    )]
    GenericDownlink(String),
    /// No HTB.
    #[error(
        "this kernel has no HTB: load the module sch_htb (`modprobe sch_htb`), or use a kernel with CONFIG_NET_SCH_HTB"
    )]
    NoHtb,
    /// No IFB.
    #[error(
        "this kernel has no IFB devices, which --downlink needs: load the module ifb (`modprobe ifb`), or use a kernel with CONFIG_IFB"
    )]
    NoIfb,
    /// The name of the IFB device is taken.
    #[error(
        "a device {0} is there, which relay-user has not made: remove it (`ip link delete {0}`), or rename it"
    )]
    IfbTaken(String),
    /// The IFB device cannot be made or removed.
    #[error("the IFB device {name}: {refusal}")]
    Ifb {
        /// Its name.
        name: String,
        /// The kernel's answer.
        #[source]
        refusal: Refusal,
    },
    /// The kernel refuses a part of a tree.
    #[error("{device}: {source}")]
    Step {
        /// On which device.
        device: String,
        /// What it refuses.
        #[source]
        source: StepError,
    },
    /// The kernel cannot be asked.
    #[error("the queueing disciplines of {device} cannot be read: {refusal}")]
    Read {
        /// Of which device.
        device: String,
        /// The kernel's answer.
        #[source]
        refusal: Refusal,
    },
    /// Packets cannot be classified.
    #[error(transparent)]
    Classifier(#[from] ClassifierError),
    /// It failed, and so did putting everything back.
    #[error(
        "{first}; and undoing what was done failed: {undo}; `relay-user qos clear {interface}` tries again"
    )]
    NotUndone {
        /// The interface.
        interface: String,
        /// What failed first.
        #[source]
        first: Box<QosError>,
        /// What failed then.
        undo: Box<QosError>,
    },
}

/// Shapes an interface and classifies what leaves it.
///
/// # Errors
/// [`QosError`]; then everything is as it was.
pub fn apply(kernel: &mut dyn Kernel, request: &Request<'_>) -> Result<Applied, QosError> {
    establish(kernel, request, Sorting::Attach)
}

/// Classifies and marks what leaves an interface, and leaves its queueing disciplines alone.
///
/// # Errors
/// [`QosError`]; then everything is as it was.
pub fn mark(kernel: &mut dyn Kernel, interface: &str, policy: &Policy) -> Result<Marked, QosError> {
    // An unknown one leaves no lock behind.
    refuse_renamed(kernel, &Interfaces::read()?, interface)?;
    Classifier::prepare()?;
    let store = Store::new(interface);
    let _lock = store.lock()?;
    let device = Device::from(Interfaces::read()?.named(interface)?);
    let known = match store.read()? {
        Some(state) if state.is_current() && state.uplink.index == device.index => Some(state),
        Some(stale) => {
            remove(kernel, &store, &stale, Sorting::Attach)?;
            None
        }
        None => None,
    };
    if known
        .as_ref()
        .is_some_and(|state| state.uplink.rate.is_some())
    {
        return Err(QosError::Shaped(interface.to_owned()));
    }
    let line = Line {
        device: device.name.clone(),
        index: device.index,
        rate: None,
        tree: Tree::default(),
        before: device.read(kernel)?,
    };
    let mut state = State::new(line, None, Leaves::BEST, device.mtu)?;
    state.shaped = false;
    state.classified = true;
    state.policy.clone_from(&policy.file);
    state.classes = policy.names();
    store.write(&state)?;
    if let Err(error) = Classifier::attach(interface, device.index, policy, Task::Mark) {
        match &known {
            Some(state) => store.write(state)?,
            None => store.remove()?,
        }
        return Err(error.into());
    }
    let rules = policy.rules.iter();
    Ok(Marked {
        interface: interface.to_owned(),
        policy: policy.file.as_ref().map(|file| file.path.clone()),
        rules: rules.filter(|rule| rule.set_dscp.is_some()).count(),
    })
}

/// Shapes an interface whose classifier is attached already, or will be by somebody else.
///
/// # Errors
/// [`QosError`]; then everything is as it was.
pub fn shape(kernel: &mut dyn Kernel, request: &Request<'_>) -> Result<Applied, QosError> {
    establish(kernel, request, Sorting::Leave)
}

/// Puts the queueing disciplines back that were there. The classifier stays, and with it the IFB device
/// that it redirects to, for [`shape`] to go on with.
///
/// # Errors
/// [`QosError`]; then everything is as it was.
pub fn unshape(kernel: &mut dyn Kernel, interface: &str) -> Result<Cleared, QosError> {
    let store = Store::new(interface);
    let _lock = store.lock()?;
    match store.read()? {
        Some(state) if state.shaped => remove(kernel, &store, &state, Sorting::Leave),
        _ => Ok(Cleared::Nothing),
    }
}

/// Undoes all that was done to an interface, also to one that is gone.
///
/// # Errors
/// [`QosError`]; then everything is as it was.
pub fn clear(kernel: &mut dyn Kernel, interface: &str) -> Result<Cleared, QosError> {
    let interfaces = Interfaces::read()?;
    let store = store_of(kernel, &interfaces, interface)?;
    // An unknown one leaves no lock behind.
    if store.read()?.is_none() && interfaces.named(interface).is_err() {
        return Err(QosError::Unknown(interface.to_owned()));
    }
    let _lock = store.lock()?;
    match store.read()? {
        Some(state) => remove(kernel, &store, &state, Sorting::Attach),
        None => Ok(Cleared::Nothing),
    }
}

/// The interface of a state, if it has another name now.
///
/// # Errors
/// The kernel cannot be asked.
pub(super) fn renamed<'a>(
    kernel: &mut dyn Kernel,
    interfaces: &'a Interfaces,
    state: &State,
) -> Result<Option<&'a Interface>, QosError> {
    let line = &state.uplink;
    let found = interfaces
        .indexed(line.index)
        .filter(|found| found.name != line.device && state.is_current());
    let Some(found) = found else {
        return Ok(None);
    };
    // Other network namespaces have the same numbers.
    let is_ours = if state.shaped {
        state.is_at(&Device::from(found).read(kernel)?)
    } else {
        Classifier::is_attached(&line.device, found.index)?
    };
    Ok(is_ours.then_some(found))
}

/// The files of an interface, also where it had another name when it was shaped.
///
/// # Errors
/// The kernel cannot be asked.
pub(super) fn store_of(
    kernel: &mut dyn Kernel,
    interfaces: &Interfaces,
    interface: &str,
) -> Result<Store, QosError> {
    if let Ok(found) = interfaces.named(interface) {
        for name in Store::interfaces() {
            let store = Store::new(&name);
            // One that cannot be read is complained of under its own name.
            if let Ok(Some(state)) = store.read()
                && state.uplink.index == found.index
                && renamed(kernel, interfaces, &state)?.is_some()
            {
                return Ok(store);
            }
        }
    }
    Ok(Store::new(interface))
}

/// Refuses an interface that is not there, or whose name or number is that of another which is shaped.
fn refuse_renamed(
    kernel: &mut dyn Kernel,
    interfaces: &Interfaces,
    interface: &str,
) -> Result<(), QosError> {
    interfaces.named(interface)?;
    let stores = [
        store_of(kernel, interfaces, interface)?,
        Store::new(interface),
    ];
    for store in stores {
        if let Some(state) = store.read()?
            && let Some(now) = renamed(kernel, interfaces, &state)?
        {
            return Err(QosError::Renamed {
                was: state.uplink.device,
                now: now.name.clone(),
            });
        }
    }
    Ok(())
}

/// Whether the classifier takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sorting {
    Attach,
    Leave,
}

/// All that is needed to put everything back.
struct Undo<'a> {
    store: &'a Store,
    interface: &'a str,
    state: Option<State>,
    /// Devices and what they had.
    trees: Vec<(Device, Tree, Change)>,
    /// An IFB device that was not there.
    ifb: Option<Device>,
    /// What the classifier was to be attached for, once it was touched.
    sorting: Option<State>,
}

/// What comes in may be as long as this, in bytes, where the MTU is less: that is only for what leaves,
/// and drivers take whole Ethernet frames.
const USUAL_MTU: u32 = 1_500;

#[derive(Clone, Debug)]
struct Device {
    name: String,
    index: u32,
    mtu: u32,
}

impl From<&Interface> for Device {
    fn from(interface: &Interface) -> Self {
        Self {
            name: interface.name.clone(),
            index: interface.index,
            mtu: interface.mtu,
        }
    }
}

impl Device {
    fn read(&self, kernel: &mut dyn Kernel) -> Result<Tree, QosError> {
        Tree::read(kernel, self.index).map_err(|refusal| match refusal.errno {
            Errno::ENODEV => QosError::InterfaceGone(self.name.clone()),
            _ => QosError::Read {
                device: self.name.clone(),
                refusal,
            },
        })
    }

    fn failed(&self, source: StepError) -> QosError {
        match source.refusal.errno {
            Errno::EPERM => QosError::Permission,
            Errno::ENODEV => QosError::InterfaceGone(self.name.clone()),
            Errno::ENOENT if source.kind == htb::KIND => QosError::NoHtb,
            _ => QosError::Step {
                device: self.name.clone(),
                source,
            },
        }
    }

    /// Makes the tree that it has into another one.
    fn make(&self, kernel: &mut dyn Kernel, wanted: &Tree, change: Change) -> Result<(), QosError> {
        let Plan { first, last } = self.read(kernel)?.plan(self.index, wanted, change);
        run(kernel, &first)
            .and_then(|()| run(kernel, &last))
            .map_err(|error| self.failed(error))
    }

    /// Gives it another tree as far as the kernel lets it. Returns what is missing, a sentence each.
    fn approach(&self, kernel: &mut dyn Kernel, wanted: &Tree) -> Result<Vec<String>, QosError> {
        let Plan { first, last } = self.read(kernel)?.plan(self.index, wanted, Change::Whole);
        let mut missing = Vec::new();
        for step in first.iter().chain(&last) {
            match step.run(kernel) {
                Err(error) if !matches!(error.refusal.errno, Errno::EPERM | Errno::ENODEV) => {
                    missing.push(format!("not put back: {error}"));
                }
                outcome => outcome.map_err(|error| self.failed(error))?,
            }
        }
        Ok(missing)
    }
}

fn establish(
    kernel: &mut dyn Kernel,
    request: &Request<'_>,
    sorting: Sorting,
) -> Result<Applied, QosError> {
    // An unknown one leaves no lock behind.
    refuse_renamed(kernel, &Interfaces::read()?, request.interface)?;
    if sorting == Sorting::Attach {
        Classifier::prepare()?;
    }
    let store = Store::new(request.interface);
    let _lock = store.lock()?;
    let known = store.read()?;
    let interfaces = Interfaces::read()?;
    let device = Device::from(interfaces.named(request.interface)?);
    let mut notes = Vec::new();
    if request.downlink.is_some()
        && attached_mode(&device.name, device.index)
            .map_err(ClassifierError::from)?
            .is_some_and(|mode| mode == AttachMode::Generic)
    {
        return Err(QosError::GenericDownlink(device.name));
    }

    let present = device.read(kernel)?;
    let current = known
        .as_ref()
        .filter(|state| state.is_current() && state.uplink.index == device.index);
    let (before, faithful, change) = match current {
        // Where nothing is, somebody deleted ours, or it was just about to come.
        Some(state) if state.shaped && (present.root().is_none() || state.is_at(&present)) => {
            (state.uplink.before.clone(), state.faithful, Change::InPlace)
        }
        _ => {
            let note = make_way(request, &present, device.mtu)?;
            let faithful = note.is_none();
            notes.extend(note);
            (present.clone(), faithful, Change::Whole)
        }
    };
    let earlier = (change == Change::InPlace).then(|| present.clone());

    let shape = |rate, mtu| Shape::new(rate, request.policy, mtu);
    let uplink = shape(request.uplink, device.mtu)?;
    let longest = device.mtu.max(USUAL_MTU);
    let downlink = request
        .downlink
        .map(|rate| shape(rate, longest))
        .transpose()?;
    let lines: Vec<_> = [Some(&uplink), downlink.as_ref()]
        .into_iter()
        .flatten()
        .collect();
    let leaves = match rehearsal::best_leaves(&lines, longest) {
        Ok(leaves) => leaves,
        // What is there needs no trial, in which what waits in it would be lost.
        Err(RehearsalError::NotPermitted(_)) => match current.filter(|state| state.shaped) {
            Some(state) => state.leaves,
            None => Leaves::BEST,
        },
        Err(RehearsalError::Step(error)) => return Err(device.failed(error)),
        Err(RehearsalError::Kernel(refusal)) => {
            return Err(QosError::Read {
                device: device.name,
                refusal,
            });
        }
    };

    let mut undo = Undo {
        store: &store,
        interface: request.interface,
        state: current.cloned(),
        trees: vec![(device.clone(), present, change)],
        ifb: None,
        sorting: None,
    };
    let work = Work {
        request,
        device: &device,
        interfaces: &interfaces,
        uplink: &uplink,
        downlink: downlink.as_ref(),
        leaves,
        before: before.clone(),
        faithful,
        change,
        earlier,
        sorting,
        // Of an interface that is gone, the device that it redirected to is left.
        stale: known.as_ref().filter(|_| current.is_none()),
        current,
    };
    match work.run(kernel, &mut undo) {
        Ok(leaves) => {
            notes.extend(lines.iter().find_map(|line| unsplit(line, leaves)));
            notes.extend(serialisation(&uplink, &device));
            notes.extend(bypass(request.interface, device.index));
            Ok(Applied {
                interface: device.name.clone(),
                uplink: request.uplink,
                downlink: request.downlink,
                classes: request.policy.classes.len(),
                leaf: leaves.fair,
                before: before.describe(),
                notes,
            })
        }
        Err(first) => Err(undo.run(kernel, first)),
    }
}

/// Whether a tree that is not ours may be replaced; what is to be said if it may not come back whole.
fn make_way(request: &Request<'_>, present: &Tree, mtu: u32) -> Result<Option<String>, QosError> {
    const FAITHFUL: &str = "puts it back";
    const UNFAITHFUL: &str = "cannot put it back wholly";
    const UNKNOWN: &str = "tries to put it back";
    if present.root().is_none() {
        return Ok(None);
    }
    let restored = match rehearsal::restorable(present.clone(), mtu) {
        Ok(true) => FAITHFUL,
        Ok(false) => UNFAITHFUL,
        Err(_) => UNKNOWN,
    };
    if !request.replace {
        return Err(QosError::Foreign {
            interface: request.interface.to_owned(),
            what: present.describe(),
            restored,
        });
    }
    Ok((restored != FAITHFUL).then(|| {
        format!(
            "replaced {}: `relay-user qos clear {}` {restored}",
            present.describe(),
            request.interface
        )
    }))
}

/// What it means that the kernel cannot cut what is sent as one.
fn unsplit(line: &Shape<'_>, leaves: Leaves) -> Option<String> {
    (line.is_slow() && !leaves.split).then(|| {
        format!(
            "this kernel has no TBF, which cuts what TCP hands over as one packet of up to 64 kB (GSO), and each of these holds a line of {} for up to {} ms: load the module sch_tbf (`modprobe sch_tbf`), then apply this again",
            line.rate,
            line.time(LONGEST).as_millis()
        )
    })
}

/// What the longest packet means for voice that comes just after it: no queueing discipline can take it
/// back.
fn serialisation(line: &Shape<'_>, device: &Device) -> Option<String> {
    /// Packets of which 12 ms, at 1 Mbit/s, become 8.
    const SMALLER: u32 = 1_000;
    /// What is worth a word: 1500 bytes at less than 2 Mbit/s.
    const LONG: Duration = Duration::from_millis(6);
    let time = line.time(device.mtu);
    (time > LONG && device.mtu > SMALLER).then(|| {
        format!(
            "a packet of {} bytes takes {:.0} ms at {}, and voice that comes just after it waits so long, which no queue can mend: for less jitter, have smaller ones sent (`ip route change default via GATEWAY dev {} mtu {SMALLER}`; not the MTU of the interface, which below 1280 loses its IPv6 addresses)",
            device.mtu,
            time.as_secs_f64() * 1e3,
            line.rate,
            device.name
        )
    })
}

/// What a relay on the interface means for the queues.
fn bypass(interface: &str, index: u32) -> Option<String> {
    let mode = attached_mode(interface, index).ok()??;
    matches!(mode, AttachMode::Native | AttachMode::Generic).then(|| {
        format!(
            "the relay on {interface} runs in {} XDP, and packets that it relays bypass these queues: attach it with `--mode tc`",
            mode.name()
        )
    })
}

/// All that [`establish`] has found out.
struct Work<'a> {
    request: &'a Request<'a>,
    device: &'a Device,
    interfaces: &'a Interfaces,
    uplink: &'a Shape<'a>,
    downlink: Option<&'a Shape<'a>>,
    /// To be tried first.
    leaves: Leaves,
    before: Tree,
    faithful: bool,
    change: Change,
    /// What is on the interface, if that is ours.
    earlier: Option<Tree>,
    sorting: Sorting,
    current: Option<&'a State>,
    stale: Option<&'a State>,
}

impl Work<'_> {
    fn run(&self, kernel: &mut dyn Kernel, undo: &mut Undo<'_>) -> Result<Leaves, QosError> {
        let Self {
            request, device, ..
        } = self;
        if let Some(stale) = self.stale {
            unsort(stale)?;
            remove_ifb(kernel, self.interfaces, stale)?;
        }
        let mut ifb = match self.downlink {
            Some(shape) => Some((self.ifb(kernel, undo)?, shape)),
            None => None,
        };
        // Before anything else: whatever happens from here on, `clear` knows what was there, and what
        // is to go.
        let line = |device: &Device, shape: &Shape<'_>, before| Line {
            device: device.name.clone(),
            index: device.index,
            rate: Some(shape.rate),
            tree: shape.tree(self.leaves),
            before,
        };
        let uplink = line(device, self.uplink, self.before.clone());
        let downlink = ifb
            .as_ref()
            .map(|(ifb, shape)| line(ifb, shape, Tree::default()));
        let mut state = State::new(uplink, downlink, self.leaves, device.mtu)?;
        state.classified =
            self.sorting == Sorting::Attach || self.current.is_some_and(|state| state.classified);
        state.faithful = self.faithful;
        state.policy.clone_from(&request.policy.file);
        state.classes = request.policy.names();
        state.earlier.clone_from(&self.earlier);
        self.write(undo, &state)?;
        if let (Some((ifb, _)), Some(line)) = (&mut ifb, &mut state.downlink)
            && ifb.index == NOT_YET
        {
            *ifb = create_ifb(kernel, &ifb.name, undo)?;
            line.index = ifb.index;
            self.write(undo, &state)?;
        }

        let mut leaves = self.leaves;
        let (tree, last) = build(kernel, device, self.uplink, &mut leaves, self.change)?;
        let mut rest = vec![((*device).clone(), last)];
        state.uplink.tree = tree;
        if let (Some((ifb, shape)), Some(line)) = (&ifb, &mut state.downlink) {
            let (tree, last) = build(kernel, ifb, shape, &mut leaves, Change::InPlace)?;
            line.tree = tree;
            rest.push((ifb.clone(), last));
        }
        state.leaves = leaves;
        self.write(undo, &state)?;
        if self.sorting == Sorting::Attach {
            undo.sorting = Some(state.clone());
            if state.downlink.is_none()
                && let Some(redirected) = self.current.filter(|it| it.downlink.is_some())
            {
                // For a moment no packet is classified: the classifier goes with the redirection.
                unsort(redirected)?;
            }
            sort(&state, request.policy)?;
        }
        for (device, last) in rest {
            run(kernel, &last).map_err(|error| device.failed(error))?;
        }
        // Redirected to no longer.
        if request.downlink.is_none()
            && let Some(state) = self.current
        {
            remove_ifb(kernel, self.interfaces, state)?;
        }
        state.earlier = None;
        undo.store.write(&state)?;
        Ok(leaves)
    }

    /// Writes the state as it is while all this goes on: with the IFB device that was there until it is
    /// removed.
    fn write(&self, undo: &Undo<'_>, state: &State) -> Result<(), StateError> {
        let mut written = state.clone();
        let earlier = self.current.and_then(|state| state.downlink.clone());
        written.downlink = written.downlink.or(earlier);
        undo.store.write(&written)
    }

    /// The IFB device; numbered [`NOT_YET`] if it is not there.
    fn ifb(&self, kernel: &mut dyn Kernel, undo: &mut Undo<'_>) -> Result<Device, QosError> {
        // At most 15 characters, and another one for every interface of less than 10 million.
        let name = format!("relayifb{}", self.device.index % 10_000_000);
        if let Ok(found) = self.interfaces.named(&name) {
            let line = self.current.and_then(|state| state.downlink.as_ref());
            if line.is_none_or(|line| ![NOT_YET, found.index].contains(&line.index)) {
                return Err(QosError::IfbTaken(name));
            }
            let ifb = Device::from(found);
            let tree = ifb.read(kernel)?;
            undo.trees.push((ifb.clone(), tree, Change::InPlace));
            return Ok(ifb);
        }
        Ok(Device {
            name,
            index: NOT_YET,
            mtu: USUAL_MTU,
        })
    }
}

fn create_ifb(
    kernel: &mut dyn Kernel,
    name: &str,
    undo: &mut Undo<'_>,
) -> Result<Device, QosError> {
    kernel
        .create_ifb(name)
        .map_err(|refusal| match refusal.errno {
            Errno::EPERM => QosError::Permission,
            Errno::EOPNOTSUPP => QosError::NoIfb,
            Errno::EEXIST => QosError::IfbTaken(name.to_owned()),
            _ => QosError::Ifb {
                name: name.to_owned(),
                refusal,
            },
        })?;
    let ifb = Device::from(Interfaces::read()?.named(name)?);
    undo.ifb = Some(ifb.clone());
    Ok(ifb)
}

/// Builds a device's tree with the best leaves that the kernel has, which are known afterwards. Returns
/// it, and what remains to be done when no packet goes to the old classes any longer.
fn build(
    kernel: &mut dyn Kernel,
    device: &Device,
    shape: &Shape<'_>,
    leaves: &mut Leaves,
    change: Change,
) -> Result<(Tree, Vec<Step>), QosError> {
    loop {
        let wanted = shape.tree(*leaves);
        let plan = device.read(kernel)?.plan(device.index, &wanted, change);
        match run(kernel, &plan.first) {
            Ok(()) => return Ok((wanted, plan.last)),
            Err(error) => {
                *leaves = error
                    .lesser(*leaves)
                    .map_err(|error| device.failed(error))?;
            }
        }
    }
}

/// Has packets classified on both lines.
fn sort(state: &State, policy: &Policy) -> Result<(), QosError> {
    let uplink = &state.uplink;
    let task = match uplink.rate {
        Some(_) => Task::Classify,
        None => Task::Mark,
    };
    if let Some(ifb) = &state.downlink {
        Classifier::attach(&ifb.device, ifb.index, policy, task)?;
        Classifier::attach_downlink(&uplink.device, uplink.index, ifb.index)?;
    }
    Ok(Classifier::attach(
        &uplink.device,
        uplink.index,
        policy,
        task,
    )?)
}

/// Has packets classified no longer, and what comes in redirected no longer.
fn unsort(state: &State) -> Result<(), QosError> {
    if state.classified {
        let lines = [Some(&state.uplink), state.downlink.as_ref()];
        for line in lines.into_iter().flatten() {
            Classifier::detach(&line.device)?;
        }
    }
    Ok(())
}

/// Removes the IFB device of a state, if it is still there.
fn remove_ifb(
    kernel: &mut dyn Kernel,
    interfaces: &Interfaces,
    state: &State,
) -> Result<(), QosError> {
    let Some(line) = &state.downlink else {
        return Ok(());
    };
    let found = match line.index {
        NOT_YET => interfaces.named(&line.device).ok(),
        index => interfaces.indexed(index),
    };
    if let Some(found) = found.filter(|found| found.name == line.device && state.is_current()) {
        kernel
            .delete_link(found.index)
            .map_err(|refusal| QosError::Ifb {
                name: line.device.clone(),
                refusal,
            })?;
    }
    Ok(())
}

impl Undo<'_> {
    /// Puts everything back, and returns the error that it was for.
    fn run(self, kernel: &mut dyn Kernel, first: QosError) -> QosError {
        let interface = self.interface.to_owned();
        match self.put_back(kernel) {
            // With the interface went all that was on it.
            Ok(()) | Err(QosError::InterfaceGone(_)) => first,
            Err(undo) => QosError::NotUndone {
                interface,
                first: Box::new(first),
                undo: Box::new(undo),
            },
        }
    }

    /// All that can be put back, whatever else cannot. Returns the first of what failed.
    fn put_back(self, kernel: &mut dyn Kernel) -> Result<(), QosError> {
        let mut outcome = match &self.sorting {
            Some(sorted) => self.sort_as_before(sorted),
            None => Ok(()),
        };
        for (device, tree, change) in &self.trees {
            outcome = outcome.and(device.make(kernel, tree, *change));
        }
        if let Some(ifb) = &self.ifb {
            let deleted = kernel.delete_link(ifb.index);
            outcome = outcome.and(deleted.map_err(|refusal| QosError::Ifb {
                name: ifb.name.clone(),
                refusal,
            }));
        }
        let kept = match &self.state {
            Some(state) => self.store.write(state),
            None => self.store.remove(),
        };
        outcome.and(kept.map_err(QosError::from))
    }

    fn sort_as_before(&self, sorted: &State) -> Result<(), QosError> {
        let known = self.state.as_ref();
        // Whatever it redirects to that was not redirected to before.
        if known.is_none_or(|state| !state.classified || state.downlink != sorted.downlink) {
            unsort(sorted)?;
        }
        match known.filter(|state| state.classified) {
            Some(state) => sort(state, &policy_in_force(state)?),
            None => Ok(()),
        }
    }
}

/// The policy that a state was made with.
fn policy_in_force(state: &State) -> Result<Policy, PolicyError> {
    match &state.policy {
        Some(policy) => Policy::parse(&policy.path, &policy.text),
        None => Ok(Policy::built_in()),
    }
}

fn remove(
    kernel: &mut dyn Kernel,
    store: &Store,
    state: &State,
    sorting: Sorting,
) -> Result<Cleared, QosError> {
    let interfaces = Interfaces::read()?;
    let line = &state.uplink;
    let found = match renamed(kernel, &interfaces, state)? {
        None => interfaces
            .indexed(line.index)
            .filter(|found| found.name == line.device && state.is_current()),
        renamed => renamed,
    };
    let Some(found) = found else {
        unsort(state)?;
        remove_ifb(kernel, &interfaces, state)?;
        store.remove()?;
        return Ok(Cleared::Gone);
    };
    let device = Device::from(found);
    let present = device.read(kernel)?;
    let undo = Undo {
        store,
        interface: &line.device,
        state: Some(state.clone()),
        trees: vec![(device.clone(), present.clone(), Change::Whole)],
        ifb: None,
        sorting: (sorting == Sorting::Attach).then(|| state.clone()),
    };
    // Where nothing is, somebody deleted ours, or it was just about to come.
    let is_ours = present.root().is_none() || state.is_at(&present);
    let mut notes = Vec::new();
    if device.name != line.device {
        notes.push(format!("{} is {} now", line.device, device.name));
    }
    let work = |kernel: &mut dyn Kernel, notes: &mut Vec<String>| {
        // First, or packets would be sent to classes of what is put back.
        if sorting == Sorting::Attach {
            unsort(state)?;
            if device.name != line.device {
                // Filters go by the name of the interface, and pins by the one that it had.
                Classifier::detach(&device.name)?;
            }
        }
        if state.shaped && is_ours {
            if state.faithful {
                device.make(kernel, &line.before, Change::Whole)?;
            } else {
                notes.extend(device.approach(kernel, &line.before)?);
            }
        }
        match (sorting, &state.downlink) {
            (Sorting::Attach, _) => {
                remove_ifb(kernel, &interfaces, state)?;
                store.remove()?;
            }
            (Sorting::Leave, downlink) => {
                if let Some(ifb) = downlink
                    .as_ref()
                    .and_then(|it| interfaces.indexed(it.index))
                {
                    Device::from(ifb).make(kernel, &Tree::default(), Change::Whole)?;
                }
                let mut unshaped = state.clone();
                unshaped.shaped = false;
                unshaped.earlier = None;
                store.write(&unshaped)?;
            }
        }
        Ok(())
    };
    match work(kernel, &mut notes) {
        Ok(()) if !state.shaped => Ok(Cleared::Unmarked),
        Ok(()) if !is_ours && present != line.before => Ok(Cleared::Left {
            present: present.describe(),
        }),
        Ok(()) => Ok(Cleared::Restored {
            before: line.before.describe(),
            notes,
        }),
        Err(first) => Err(undo.run(kernel, first)),
    }
}
