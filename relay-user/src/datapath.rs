//! The datapath as the controller sees it: load, attach, pin, and the maps.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{HashMap, Map, MapData, MapError, MapInfo, PerCpuArray},
    programs::{Program, ProgramError, ProgramInfo, SchedClassifier, Xdp, XdpMode},
};
use memmap2::{MmapOptions, MmapRaw};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::MsFlags,
    sys::statfs::{FsType, statfs},
};
use relay_common::{
    reason::Reason,
    stream::{
        ABI_VERSION, Counter, Lease, OutLeg, PAYLOAD_TYPES, PayloadType, State, Stream, StreamKey,
        StreamSpec,
    },
};
use serde::{Deserialize, Serialize};

/// The compiled datapath. All entry points are in it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/relay"));

/// Names of what the object defines; nothing else in userspace spells them.
pub mod names {
    /// XDP entry point.
    pub const XDP: &str = "relay_xdp";
    /// TC entry point.
    pub const TC: &str = "relay_tc";
    /// Observer of what leaves, at the TC egress.
    pub const OBSERVE: &str = "relay_observe";
    /// Streams by local address.
    pub const STREAMS: &str = "STREAMS";
    /// What may leave, by the address that the PBX sends from.
    pub const OUT_LEGS: &str = "OUT_LEGS";
    /// What happened to each stream.
    pub const STATE: &str = "STATE";
    /// Packets and bytes by reason.
    pub const COUNTERS: &str = "COUNTERS";
    /// Until when anything is relayed.
    pub const LEASE: &str = "LEASE";
    /// Rare facts for the controller.
    pub const EVENTS: &str = "EVENTS";
    /// Load-time constant: 1 in generic XDP.
    pub const GENERIC: &str = "GENERIC";
}

/// Where BPF objects get names.
const BPFFS: &str = "/sys/fs/bpf";

/// From include/uapi/linux/magic.h.
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);

const KEY: usize = size_of::<StreamKey>();
const VALUE: usize = size_of::<Stream>();
const OUT_LEG: usize = size_of::<OutLeg>();
const COUNTER: usize = size_of::<Counter>();

/// How XDP runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachMode {
    /// In the driver, before a socket buffer exists.
    Native,
    /// In the stack's receive path, on every interface.
    Generic,
}

impl AttachMode {
    /// As in `--mode`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }
}

/// Why the datapath could not be set up or changed. The text names the thing and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// bpffs is absent and could not be mounted.
    #[error(
        "{BPFFS} is no BPF file system and could not be mounted ({0}): run `mount -t bpf bpf {BPFFS}`"
    )]
    Bpffs(#[source] io::Error),
    /// A pin of an earlier run that this version cannot own.
    #[error(
        "{path} is left over from a version with another layout ({found}; this one needs {expected}): run `relay-user detach {interface}` to remove it"
    )]
    StalePin {
        /// The pinned map.
        path: PathBuf,
        /// Its type and sizes.
        found: String,
        /// The type and sizes of this version.
        expected: String,
        /// The interface it belongs to.
        interface: String,
    },
    /// A pin that is no map, or cannot be opened.
    #[error(
        "{path} cannot be opened as a BPF map ({source}): run `relay-user detach {interface}` to remove it"
    )]
    UnreadablePin {
        /// What stands at the path.
        path: PathBuf,
        /// The interface it belongs to.
        interface: String,
        /// The kernel's answer.
        #[source]
        source: Box<MapError>,
    },
    /// A daemon of this interface runs.
    #[error(
        "a relay daemon already serves {interface} (it holds {}): see `relay-user status`, or end it with `relay-user detach {interface}` (and the --socket that it was started with, if any)", directory.display()
    )]
    Running {
        /// The interface.
        interface: String,
        /// Its pins.
        directory: PathBuf,
    },
    /// The pin directory cannot be created or cleared.
    #[error("{path}: {source}")]
    Pins {
        /// The directory or file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Another XDP program has the interface.
    #[error(
        "{interface} already has an XDP program ({program}): detach it first (`ip link set dev {interface} xdp off`, or the tool that attached it)"
    )]
    OtherProgram {
        /// The interface.
        interface: String,
        /// Name and id, where the kernel tells.
        program: String,
    },
    /// The driver has no native XDP, or refuses it in its present configuration.
    #[error(
        "{interface} refuses native XDP ({source}): use `--mode generic`; native needs a driver with XDP support, an MTU that fits a page, and LRO off"
    )]
    NativeRefused {
        /// The interface.
        interface: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel refuses generic XDP too.
    #[error(
        "{interface} refuses XDP ({source}): this kernel or interface type cannot run it; Linux 5.15 or newer is needed"
    )]
    XdpRefused {
        /// The interface.
        interface: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel refuses a map or the program.
    #[error("the kernel refuses {what} ({source}): {remedy}")]
    Refused {
        /// The map or program.
        what: &'static str,
        /// What may help.
        remedy: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The verifier refuses the program: a fault of ours on this kernel.
    #[error(
        "the kernel's verifier refuses the program: please report this with the kernel's version and the log:\n{0}"
    )]
    Verifier(String),
    /// The object in this binary does not fit this library: a fault of the build.
    #[error("the embedded object is unusable: {0}")]
    Object(String),
    /// Loading failed otherwise.
    #[error("the BPF object could not be loaded: {0}")]
    Load(#[source] Box<EbpfError>),
    /// `STREAMS` has no room.
    #[error("the map of streams is full ({max_streams}): raise `--max-streams`")]
    Full {
        /// Its size.
        max_streams: u32,
    },
    /// A map operation failed that cannot fail in a sane kernel.
    #[error("map {map}: {source}")]
    Map {
        /// The map.
        map: &'static str,
        /// The kernel's answer.
        #[source]
        source: Box<MapError>,
    },
    /// A map cannot be mapped into memory.
    #[error("map {map} cannot be mapped ({source}): Linux 5.5 or newer is needed")]
    Mmap {
        /// The map.
        map: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// A loaded and attached datapath. Dropping it detaches the program and removes every pin.
pub struct Datapath {
    mode: AttachMode,
    max_streams: u32,
    streams: HashMap<MapData, [u8; KEY], [u8; VALUE]>,
    out_legs: HashMap<MapData, [u8; KEY], [u8; OUT_LEG]>,
    state: StateMap,
    lease: LeaseMap,
    events: tokio::io::unix::AsyncFd<aya::maps::RingBuf<MapData>>,
    counters: PerCpuArray<MapData, [u8; COUNTER]>,
    // Holds the program and its link. The link is not pinned: should this process die, the kernel
    // detaches the program at once and every packet is Asterisk's again.
    _ebpf: Ebpf,
    // Last: its lock says that a daemon runs, so it goes when the program is detached.
    pins: Pins,
}

/// Loads the object with its maps sized for `max_streams`, for any hook.
///
/// # Errors
/// [`DatapathError::Refused`] and the like, with the kernel's reason.
pub fn load(mode: AttachMode, max_streams: u32) -> Result<Ebpf, DatapathError> {
    let generic = u8::from(mode == AttachMode::Generic);
    EbpfLoader::new()
        .override_global(names::GENERIC, &generic, true)
        .map_max_entries(names::STREAMS, max_streams)
        .map_max_entries(names::OUT_LEGS, max_streams)
        .map_max_entries(names::STATE, max_streams)
        .load(OBJECT)
        .map_err(|error| match error {
            EbpfError::MapError(MapError::CreateError { io_error, .. }) => {
                let remedy = match io_error.raw_os_error() {
                    Some(nix::libc::ENOMEM) => "lower `--max-streams`",
                    Some(nix::libc::EPERM) => "CAP_BPF is needed",
                    _ => "Linux 5.15 or newer is needed",
                };
                DatapathError::Refused {
                    what: "the maps",
                    remedy,
                    source: io_error,
                }
            }
            error => DatapathError::Load(Box::new(error)),
        })
}

/// The XDP program of a loaded object, itself loaded.
///
/// # Errors
/// [`DatapathError::Verifier`] with the kernel's log, [`DatapathError::Refused`] for want of a
/// capability.
pub fn load_xdp(ebpf: &mut Ebpf) -> Result<&mut Xdp, DatapathError> {
    let program: &mut Xdp = program(ebpf, names::XDP)?;
    program.load().map_err(load_error)?;
    Ok(program)
}

/// The TC program of a loaded object, itself loaded.
///
/// # Errors
/// As [`load_xdp`].
pub fn load_tc(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, DatapathError> {
    let program: &mut SchedClassifier = program(ebpf, names::TC)?;
    program.load().map_err(load_error)?;
    Ok(program)
}

/// The observer of a loaded object, itself loaded.
///
/// # Errors
/// As [`load_xdp`].
pub fn load_observer(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, DatapathError> {
    let program: &mut SchedClassifier = program(ebpf, names::OBSERVE)?;
    program.load().map_err(load_error)?;
    Ok(program)
}

/// A program of the object, typed.
fn program<'a, T>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut T, DatapathError>
where
    &'a mut T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    ebpf.program_mut(name)
        .ok_or_else(|| DatapathError::Object(format!("no program {name}")))?
        .try_into()
        .map_err(|error: ProgramError| DatapathError::Object(error.to_string()))
}

fn load_error(error: ProgramError) -> DatapathError {
    match error {
        ProgramError::LoadError { io_error, .. }
            if io_error.raw_os_error() == Some(nix::libc::EPERM) =>
        {
            DatapathError::Refused {
                what: "the program",
                remedy: "CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN are needed",
                source: io_error,
            }
        }
        ProgramError::LoadError { verifier_log, .. } => {
            DatapathError::Verifier(verifier_log.to_string())
        }
        error => DatapathError::Object(error.to_string()),
    }
}

impl Datapath {
    /// Loads the datapath and attaches it to an interface.
    ///
    /// # Errors
    /// Every [`DatapathError`] about loading, attaching and pinning. Nothing is left behind then.
    pub fn attach(
        interface: &str,
        index: u32,
        mode: AttachMode,
        max_streams: u32,
    ) -> Result<Self, DatapathError> {
        let mut ebpf = load(mode, max_streams)?;
        let mut pins = Pins::claim(interface, &ebpf)?;
        let program = load_observer(&mut ebpf)?;
        program
            .attach_with_options(interface, aya::programs::TcAttachType::Egress, aya::programs::tc::TcAttachOptions::TcxOrder(aya::programs::LinkOrder::first()))
            .map_err(|error| attach_error(interface, mode, error))?;
        let program = load_xdp(&mut ebpf)?;
        let flags = match mode {
            AttachMode::Native => XdpMode::Driver,
            AttachMode::Generic => XdpMode::Skb,
        };
        program
            .attach_to_if_index(index, flags)
            .map_err(|error| attach_error(interface, mode, error))?;

        for name in [names::STREAMS, names::OUT_LEGS, names::STATE, names::COUNTERS, names::LEASE, names::EVENTS] {
            pins.pin(name, map(&ebpf, name)?)?;
        }
        let state = StateMap::new(map(&ebpf, names::STATE)?, max_streams)?;
        let lease = LeaseMap::new(map(&ebpf, names::LEASE)?)?;
        Ok(Self {
            mode,
            max_streams,
            streams: take(&mut ebpf, names::STREAMS)?,
            out_legs: take(&mut ebpf, names::OUT_LEGS)?,
            state,
            lease,
            events: tokio::io::unix::AsyncFd::new(take(&mut ebpf, names::EVENTS)?).expect("epoll"),
            counters: take(&mut ebpf, names::COUNTERS)?,
            _ebpf: ebpf,
            pins,
        })
    }

    /// Leaves everything as it is, to the lease.
    pub fn leave(self) {}

    /// The datapath's next event. It may be dropped and asked for again.
    pub async fn next_event(&mut self) -> relay_common::stream::Event {
        loop {
            if let Some(item) = self.events.get_mut().next()
                && let Ok(event) = zerocopy::FromBytes::read_from_bytes(&*item)
            {
                return event;
            }
            if let Ok(mut guard) = self.events.readable_mut().await {
                guard.clear_ready();
            }
        }
    }

    /// How the program runs.
    #[must_use]
    pub const fn mode(&self) -> AttachMode {
        self.mode
    }

    /// Directory of the pinned maps.
    #[must_use]
    pub fn pins(&self) -> &Path {
        &self.pins.directory
    }

    /// Installs a stream, or replaces it while packets flow; a packet sees the old one or the new
    /// one. Whether it is relayed is left as it is.
    ///
    /// # Errors
    /// [`DatapathError::Full`].
    pub fn install(&mut self, spec: &StreamSpec) -> Result<(), DatapathError> {
        // The observer first: it must know the echo of the first packet that is noted.
        if spec.proof != 0 {
            let (key, out_leg) = spec.out_leg();
            let (key, out_leg): ([u8; KEY], [u8; OUT_LEG]) =
                (zerocopy::transmute!(key), zerocopy::transmute!(out_leg));
            let inserted = self.out_legs.insert(key, out_leg, 0);
            inserted.map_err(|source| self.insert_error(names::OUT_LEGS, source))?;
        }
        let (key, stream) = (spec.key(), spec.compile());
        let (key, stream): ([u8; KEY], [u8; VALUE]) =
            (zerocopy::transmute!(key), zerocopy::transmute!(stream));
        let inserted = self.streams.insert(key, stream, 0);
        inserted.map_err(|source| self.insert_error(names::STREAMS, source))
    }

    fn insert_error(&self, map: &'static str, source: MapError) -> DatapathError {
        match &source {
            MapError::SyscallError(error)
                if error.io_error.raw_os_error() == Some(nix::libc::E2BIG) =>
            {
                DatapathError::Full {
                    max_streams: self.max_streams,
                }
            }
            _ => DatapathError::Map {
                map,
                source: Box::new(source),
            },
        }
    }

    /// Takes a stream back on the spot, then removes it.
    ///
    /// # Errors
    /// [`DatapathError::Map`]; a stream that is not there is none.
    pub fn remove(&mut self, spec: &StreamSpec) -> Result<(), DatapathError> {
        self.take_back(spec.slot);
        self.withdraw(spec)
    }

    /// Removes a stream's entries; its state is left as it is.
    ///
    /// # Errors
    /// As [`Self::remove`].
    pub fn withdraw(&mut self, spec: &StreamSpec) -> Result<(), DatapathError> {
        removed(
            names::STREAMS,
            self.streams.remove(&zerocopy::transmute!(spec.key())),
        )?;
        let (key, _) = spec.out_leg();
        removed(
            names::OUT_LEGS,
            self.out_legs.remove(&zerocopy::transmute!(key)),
        )
    }

    /// Forgets what happened to the slot's earlier stream, and leaves the new one to the PBX.
    pub fn reset(&self, slot: u32) {
        self.state.reset(slot);
    }

    /// Takes a stream back; effective on the next packet, without a system call.
    pub fn take_back(&self, slot: u32) {
        self.state.set_epoch(slot, 0);
    }

    /// Begins a round of proof, at the end of which the datapath offloads the stream by itself.
    /// `epoch` must be another than in any round of this slot before, and not 0.
    pub fn watch(&self, slot: u32, epoch: u32) {
        self.state.set_epoch(slot, epoch);
    }

    /// Offloads a stream without proof. `epoch` as in [`Self::watch`].
    pub fn offload(&self, slot: u32, epoch: u32, payload_types: [PayloadType; PAYLOAD_TYPES]) {
        self.state.offload(slot, epoch, payload_types);
    }

    /// Until when anything is relayed: `CLOCK_MONOTONIC`, ns.
    #[must_use]
    pub fn lease(&self) -> u64 {
        self.lease.deadline()
    }

    /// Sets until when anything is relayed.
    pub fn renew_lease(&self, deadline: u64) {
        self.lease.renew(deadline);
    }

    /// What happened to a stream so far.
    #[must_use]
    pub fn state(&self, slot: u32) -> State {
        self.state.read(slot)
    }

    /// Packets and bytes by reason, all CPUs together.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn counters(&self) -> Result<Vec<(Reason, Counter)>, DatapathError> {
        Reason::ALL
            .iter()
            .map(|&reason| {
                let values = self.counters.get(&(reason as u32), 0).map_err(|source| {
                    DatapathError::Map {
                        map: names::COUNTERS,
                        source: Box::new(source),
                    }
                })?;
                let total = values.iter().fold(Counter::default(), |total, bytes| {
                    let one: Counter = zerocopy::transmute!(*bytes);
                    Counter {
                        packets: total.packets.wrapping_add(one.packets),
                        bytes: total.bytes.wrapping_add(one.bytes),
                    }
                });
                Ok((reason, total))
            })
            .collect()
    }
}

/// A map of the object.
fn map<'a>(ebpf: &'a Ebpf, name: &'static str) -> Result<&'a MapData, DatapathError> {
    match ebpf.map(name) {
        Some(Map::HashMap(data) | Map::Array(data) | Map::PerCpuArray(data) | Map::RingBuf(data)) => Ok(data),
        _ => Err(DatapathError::Object(format!("no map {name}"))),
    }
}

/// A map of the object, typed; its key and value sizes are checked by aya.
fn take<T>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, DatapathError>
where
    T: TryFrom<Map, Error = MapError>,
{
    let map = ebpf
        .take_map(name)
        .ok_or_else(|| DatapathError::Object(format!("no map {name}")))?;
    T::try_from(map).map_err(|source| DatapathError::Map {
        map: name,
        source: Box::new(source),
    })
}

/// What a removal came to: a key that is not there is no error.
fn removed(map: &'static str, outcome: Result<(), MapError>) -> Result<(), DatapathError> {
    match outcome {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(nix::libc::ENOENT) =>
        {
            Ok(())
        }
        Err(source) => Err(DatapathError::Map {
            map,
            source: Box::new(source),
        }),
    }
}

fn attach_error(interface: &str, mode: AttachMode, error: ProgramError) -> DatapathError {
    let source = match error {
        ProgramError::SyscallError(error) => error.io_error,
        error => io::Error::other(error.to_string()),
    };
    let interface = interface.to_owned();
    match (source.raw_os_error(), mode) {
        // EEXIST: there is one in the other mode.
        (Some(nix::libc::EBUSY | nix::libc::EEXIST), _) => {
            let program = "id unknown".to_owned();
            DatapathError::OtherProgram { interface, program }
        }
        (_, AttachMode::Native) => DatapathError::NativeRefused { interface, source },
        (_, AttachMode::Generic) => DatapathError::XdpRefused { interface, source },
    }
}

/// Name and id of a loaded program, for a message.
#[must_use]
pub fn describe_program(id: u32) -> String {
    let name = aya::programs::loaded_programs()
        .filter_map(Result::ok)
        .find(|program: &ProgramInfo| program.id() == id)
        .and_then(|program| program.name_as_str().map(str::to_owned));
    match name {
        Some(name) => format!("`{name}`, id {id}"),
        None => format!("id {id}"),
    }
}

/// Mounts the BPF file system where it is missing, which needs CAP_SYS_ADMIN.
///
/// # Errors
/// [`DatapathError::Bpffs`].
pub fn ensure_bpffs() -> Result<(), DatapathError> {
    let is_bpffs = |path: &Path| statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC);
    if is_bpffs(Path::new(BPFFS)) {
        return Ok(());
    }
    nix::mount::mount(
        Some("bpf"),
        BPFFS,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=0700"),
    )
    .map_err(|errno| DatapathError::Bpffs(errno.into()))
}

/// `/sys/fs/bpf/relay`.
fn pin_root() -> PathBuf {
    Path::new(BPFFS).join("relay")
}

/// The name of an interface's pins: bpffs refuses dots (bpf_lookup() in kernel/bpf/inode.c), which
/// VLAN devices have in their names; no interface may have a colon in its.
fn pin_name(interface: &str) -> String {
    interface.replace('.', ":")
}

/// Pinned maps of one interface, removed on drop.
///
/// The directory is locked as long as they are in use: whoever can lock it knows that no daemon
/// runs.
struct Pins {
    directory: PathBuf,
    _lock: Flock<File>,
}

impl Pins {
    /// Takes over the interface's directory. What a killed daemon left there is removed, unless it
    /// has another layout: that may be the work of another version, and an operator decides.
    fn claim(interface: &str, ebpf: &Ebpf) -> Result<Self, DatapathError> {
        let version = pin_root().join(format!("v{ABI_VERSION}"));
        let directory = version.join(pin_name(interface));
        let error = |path: &Path| {
            let path = path.to_owned();
            move |source| DatapathError::Pins { path, source }
        };
        let lock = loop {
            fs::create_dir_all(&directory).map_err(error(&directory))?;
            // A daemon that ends removes the directory: then the lock is on nothing.
            if let Some(lock) = lock(&directory, interface)? {
                break lock;
            }
        };
        let pins = Self {
            directory,
            _lock: lock,
        };
        for entry in fs::read_dir(&pins.directory).map_err(error(&pins.directory))? {
            let path = entry.map_err(error(&pins.directory))?.path();
            if let Err(error) = check_layout(&path, interface, ebpf) {
                pins.abandon();
                return Err(error);
            }
            fs::remove_file(&path).map_err(error(&path))?;
            tracing::warn!(pin = %path.display(), "removed what a killed daemon left");
        }
        Ok(pins)
    }

    fn pin(&mut self, name: &'static str, map: &MapData) -> Result<(), DatapathError> {
        let path = self.directory.join(name);
        map.pin(&path).map_err(|error| DatapathError::Pins {
            path,
            source: io::Error::other(error.to_string()),
        })
    }

    /// Leaves what is there as it is.
    fn abandon(self) {
        std::mem::forget(self);
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        if let Err(error) = remove_pins(&self.directory) {
            tracing::error!(path = %self.directory.display(), %error, "pins not removed");
        }
    }
}

/// Locks a directory of pins; none when it is gone meanwhile.
fn lock(directory: &Path, interface: &str) -> Result<Option<Flock<File>>, DatapathError> {
    let error = |source| DatapathError::Pins {
        path: directory.to_owned(),
        source,
    };
    let file = match File::open(directory) {
        Ok(file) => file,
        Err(gone) if gone.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(error(source)),
    };
    let opened = file.metadata().map_err(error)?.ino();
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        if errno == Errno::EWOULDBLOCK {
            DatapathError::Running {
                interface: interface.to_owned(),
                directory: directory.to_owned(),
            }
        } else {
            error(errno.into())
        }
    })?;
    let current = fs::metadata(directory).is_ok_and(|current| current.ino() == opened);
    Ok(current.then_some(lock))
}

/// Removes a directory of pins, and the directories above it once nothing else is in them.
fn remove_pins(directory: &Path) -> io::Result<()> {
    fs::remove_dir_all(directory)?;
    let root = pin_root();
    for parent in directory
        .ancestors()
        .skip(1)
        .take_while(|parent| parent.starts_with(&root))
    {
        // Another interface's daemon may use it.
        if fs::remove_dir(parent).is_err() {
            break;
        }
    }
    Ok(())
}

/// Refuses a pinned map that this version did not create: what another program or version left here
/// may still be wanted, and an operator decides.
fn check_layout(path: &Path, interface: &str, ebpf: &Ebpf) -> Result<(), DatapathError> {
    let layout = |info: &MapInfo| {
        let kind = info
            .map_type()
            .map_or_else(|_| "?".to_owned(), |kind| format!("{kind:?}"));
        format!(
            "{kind}, key {} bytes, value {} bytes",
            info.key_size(),
            info.value_size()
        )
    };
    let unreadable = |source| DatapathError::UnreadablePin {
        path: path.to_owned(),
        interface: interface.to_owned(),
        source: Box::new(source),
    };
    let found = layout(&MapInfo::from_pin(path).map_err(unreadable)?);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let expected = match ebpf.maps().find(|(map, _)| *map == name) {
        Some((_, Map::HashMap(data) | Map::Array(data) | Map::PerCpuArray(data))) => {
            layout(&data.info().map_err(unreadable)?)
        }
        _ => "no such map".to_owned(),
    };
    if found == expected {
        Ok(())
    } else {
        Err(DatapathError::StalePin {
            path: path.to_owned(),
            found,
            expected,
            interface: interface.to_owned(),
        })
    }
}

/// Refuses an interface that a running daemon serves, of whatever ABI version.
///
/// # Errors
/// [`DatapathError::Running`], [`DatapathError::Pins`].
pub fn check_unserved(interface: &str) -> Result<(), DatapathError> {
    for version in fs::read_dir(pin_root()).into_iter().flatten().flatten() {
        lock(&version.path().join(pin_name(interface)), interface)?;
    }
    Ok(())
}

/// Removes what daemons that no longer run left pinned for an interface, of every ABI version.
/// Says what it removed.
///
/// # Errors
/// [`DatapathError::Pins`].
pub fn remove_leftovers(interface: &str) -> Result<Vec<PathBuf>, DatapathError> {
    let root = pin_root();
    let Ok(versions) = fs::read_dir(&root) else {
        return Ok(Vec::new());
    };
    let mut removed = Vec::new();
    for version in versions.flatten() {
        let path = version.path().join(pin_name(interface));
        if let Some(_lock) = lock(&path, interface)? {
            remove_pins(&path).map_err(|source| DatapathError::Pins {
                path: path.clone(),
                source,
            })?;
            removed.push(path);
        }
    }
    Ok(removed)
}

/// `LEASE`, mapped into memory.
struct LeaseMap(MmapRaw);

impl LeaseMap {
    fn new(map: &MapData) -> Result<Self, DatapathError> {
        mapped(names::LEASE, map, size_of::<Lease>()).map(Self)
    }

    fn word(&self) -> &AtomicU64 {
        let lease: *mut Lease = self.0.as_mut_ptr().cast();
        // SAFETY: an aligned word inside the mapping, which lives as long as `self`.
        unsafe { AtomicU64::from_ptr(&raw mut (*lease).deadline) }
    }

    fn deadline(&self) -> u64 {
        self.word().load(Ordering::Relaxed)
    }

    fn renew(&self, deadline: u64) {
        self.word().store(deadline, Ordering::Release);
    }
}

/// Maps a map's elements into memory.
fn mapped(name: &'static str, map: &MapData, length: usize) -> Result<MmapRaw, DatapathError> {
    MmapOptions::new()
        .len(length)
        .map_raw(&map.fd().as_fd())
        .map_err(|source| DatapathError::Mmap { map: name, source })
}

/// `STATE`, mapped into memory: reading 100,000 streams costs no system call.
struct StateMap {
    memory: MmapRaw,
    entries: u32,
}

impl StateMap {
    fn new(map: &MapData, entries: u32) -> Result<Self, DatapathError> {
        let length = entries as usize * size_of::<State>();
        let memory = mapped(names::STATE, map, length)?;
        Ok(Self { memory, entries })
    }

    fn slot(&self, slot: u32) -> *mut State {
        assert!(slot < self.entries, "slot {slot} of {}", self.entries);
        // SAFETY: within the mapping, as just checked.
        unsafe { self.memory.as_mut_ptr().cast::<State>().add(slot as usize) }
    }

    fn epoch(&self, slot: u32) -> &AtomicU32 {
        let state = self.slot(slot);
        // SAFETY: an aligned word inside the mapping, which lives as long as `self`. The datapath
        // reads it on other CPUs.
        unsafe { AtomicU32::from_ptr(&raw mut (*state).epoch) }
    }

    fn set_epoch(&self, slot: u32, epoch: u32) {
        self.epoch(slot).store(epoch, Ordering::Release);
    }

    fn offload(&self, slot: u32, epoch: u32, payload_types: [PayloadType; PAYLOAD_TYPES]) {
        let state = self.slot(slot);
        // SAFETY: inside the mapping. Without proof these fields are the controller's alone, and
        // nothing reads them before the epoch is set.
        unsafe {
            (&raw mut (*state).payload_types).write_volatile(payload_types);
            (&raw mut (*state).proven).write_volatile(epoch);
        }
        self.set_epoch(slot, epoch);
    }

    fn reset(&self, slot: u32) {
        self.set_epoch(slot, 0);
        // SAFETY: inside the mapping. No entry of a map names the slot yet, so that the datapath
        // does not touch it.
        unsafe { self.slot(slot).write_volatile(State::default()) };
    }

    fn read(&self, slot: u32) -> State {
        // SAFETY: inside the mapping. The datapath writes meanwhile: each word is what it was at
        // some time, which is all that is claimed, and any bits are valid.
        unsafe { self.slot(slot).read_volatile() }
    }
}
