//! What outlives the daemon: maps and links, pinned under `/sys/fs/bpf/relay/v<ABI>/<interface>/`.
//!
//! An instance is prepared in the folder `next` of its directory and then moved up, the relay's link
//! last: a directory with that link is a whole instance, whenever a daemon was killed. Below Linux
//! 6.6 there is no link in TC mode; the directory is whole then with all maps and one filter each.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya::Ebpf;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::MsFlags,
    sys::statfs::{FsType, statfs},
};
use relay_common::{reason::Reason, stream::ABI_VERSION};

use super::{
    AttachMode, DatapathError,
    attachment::RelayAttachment,
    links::{Hook, Link, LinkInfo, Pinned},
    maps::{self, Layout, open_counters, total},
    names,
    tc::{Direction, Filter, TcAttachment, TcHook},
};
use crate::next_hop::{Interfaces, XdpHook};

/// Where BPF objects get names.
pub(crate) const BPFFS: &str = "/sys/fs/bpf";

/// From include/uapi/linux/magic.h.
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);

/// Folder of what is being prepared.
const NEXT: &str = "next";

/// Whether a BPF file system is mounted where pins go.
#[must_use]
pub fn has_bpffs() -> bool {
    statfs(BPFFS).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
}

/// Mounts the BPF file system where it is missing, which needs CAP_SYS_ADMIN.
///
/// # Errors
/// [`DatapathError::Bpffs`].
pub fn ensure_bpffs() -> Result<(), DatapathError> {
    if has_bpffs() {
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
pub(super) fn pin_root() -> PathBuf {
    Path::new(BPFFS).join("relay")
}

/// The name of an interface's pins: bpffs refuses dots (bpf_lookup() in kernel/bpf/inode.c), which
/// VLAN devices have in their names; no interface may have a colon in its.
pub(crate) fn pin_name(interface: &str) -> String {
    interface.replace('.', ":")
}

/// Where this version pins.
pub(super) fn own_directory(interface: &str) -> PathBuf {
    pin_root()
        .join(format!("v{ABI_VERSION}"))
        .join(pin_name(interface))
}

/// Where a map of an instance of this version is pinned.
pub(super) fn map_pin(interface: &str, map: &str) -> PathBuf {
    own_directory(interface).join(map)
}

/// The interfaces that have an instance of this version.
pub(super) fn interfaces() -> Vec<String> {
    let directory = pin_root().join(format!("v{ABI_VERSION}"));
    let mut interfaces: Vec<_> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path().join(names::CONTROL).exists())
        .map(|entry| interface_of(&entry.file_name().to_string_lossy()))
        .collect();
    interfaces.sort_unstable();
    interfaces
}

/// The interface that has a directory of this name.
fn interface_of(pin_name: &str) -> String {
    pin_name.replace(':', ".")
}

/// What goes wrong with a path.
pub(crate) fn error(path: &Path) -> impl FnOnce(io::Error) -> DatapathError {
    let path = path.to_owned();
    move |source| DatapathError::Pins { path, source }
}

/// A directory of pins, locked: whoever can lock it knows that no daemon uses it.
pub(super) struct Directory {
    path: PathBuf,
    _lock: Flock<File>,
}

/// A pin.
struct Entry {
    path: PathBuf,
    pinned: Pinned,
}

/// What is in a directory of pins.
#[derive(Default)]
struct Contents {
    entries: Vec<Entry>,
    /// Why something in it is none of ours.
    foreign: Option<DatapathError>,
}

impl Contents {
    /// Of a folder and, unless it is that, the folder `next` in it.
    fn read(folder: &Path) -> Result<Self, DatapathError> {
        let mut contents = Self::default();
        contents.add(folder)?;
        Ok(contents)
    }

    fn add(&mut self, folder: &Path) -> Result<(), DatapathError> {
        for entry in fs::read_dir(folder).map_err(error(folder))? {
            let entry = entry.map_err(error(folder))?;
            let (path, name) = (entry.path(), entry.file_name());
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_folder && name == NEXT {
                self.add(&path)?;
                continue;
            }
            let what = match Pinned::open(&path) {
                Ok(pinned) if pinned.is_ours(&name.to_string_lossy()) => {
                    self.entries.push(Entry { path, pinned });
                    continue;
                }
                Ok(Pinned::Map(_)) => "a map of another name".to_owned(),
                Ok(Pinned::Program(name)) => format!("the program `{name}`"),
                Ok(Pinned::Link(..)) => "a link of another kind".to_owned(),
                Err(error) => error.to_string(),
            };
            self.foreign
                .get_or_insert(DatapathError::ForeignPin { path, what });
        }
        Ok(())
    }

    fn links(&self) -> impl Iterator<Item = (&Entry, &Link, &LinkInfo)> {
        self.entries.iter().filter_map(|entry| match &entry.pinned {
            Pinned::Link(link, info) => Some((entry, link, info)),
            _ => None,
        })
    }

    /// Detaches all links but the spared one, and removes all pins.
    fn take_down(&self, spared: Option<u32>) -> Result<(), DatapathError> {
        let mut links: Vec<_> = self
            .links()
            .filter(|(.., info)| Some(info.id) != spared)
            .collect();
        links.sort_by_key(|(.., info)| info.hook);
        for (entry, link, _) in links {
            link.detach().map_err(error(&entry.path))?;
        }
        for entry in &self.entries {
            fs::remove_file(&entry.path).map_err(error(&entry.path))?;
        }
        Ok(())
    }

    /// In words.
    fn describe(&self) -> String {
        let at = |hook| self.links().any(|(.., info)| info.hook == Some(hook));
        let maps = self
            .entries
            .iter()
            .filter(|entry| matches!(entry.pinned, Pinned::Map(_)))
            .count();
        let mut words = Vec::new();
        for (hook, what) in [
            (Hook::Xdp, "XDP program"),
            (Hook::TcxIngress, "TC program"),
            (Hook::TcxEgress, "observer"),
        ] {
            if at(hook) {
                words.push(what.to_owned());
            }
        }
        if maps > 0 {
            words.push(format!("{maps} maps"));
        }
        if words.is_empty() {
            words.push("empty".to_owned());
        }
        words.join(", ")
    }
}

impl Directory {
    /// Locks a directory; none when it is gone meanwhile.
    fn lock(path: PathBuf, interface: &str) -> Result<Option<Self>, DatapathError> {
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(gone) if gone.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(error(&path)(source)),
        };
        let opened = file.metadata().map_err(error(&path))?.ino();
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
            if errno == Errno::EWOULDBLOCK {
                DatapathError::Running {
                    interface: interface.to_owned(),
                    directory: path.clone(),
                }
            } else {
                error(&path)(errno.into())
            }
        })?;
        let current = fs::metadata(&path).is_ok_and(|current| current.ino() == opened);
        Ok(current.then_some(Self { path, _lock: lock }))
    }

    fn contents(&self) -> Result<Contents, DatapathError> {
        Contents::read(&self.path)
    }

    /// Contents that are all ours.
    fn own_contents(&self) -> Result<Contents, DatapathError> {
        let contents = self.contents()?;
        contents.foreign.map_or(
            Ok(Contents {
                foreign: None,
                ..contents
            }),
            Err,
        )
    }

    /// Removes the directory, which is empty, and those above it once nothing else is in them.
    fn remove_folders(&self) -> io::Result<()> {
        remove_folder(&self.path.join(NEXT))?;
        remove_folders(&self.path, &pin_root())
    }

    /// Removes it with all that is in it, and detaches all links but the spared one.
    pub(super) fn remove(&self, spared: Option<u32>) -> Result<(), DatapathError> {
        let contents = self.contents()?;
        contents.take_down(spared)?;
        self.remove_folders().map_err(error(&self.path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// Removes a folder that is there.
pub(crate) fn remove_folder(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(gone) if gone.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

/// Removes a folder, which is empty or gone, and those above it, up to `root`, once nothing else is in them.
pub(crate) fn remove_folders(path: &Path, root: &Path) -> io::Result<()> {
    remove_folder(path)?;
    for parent in path
        .ancestors()
        .skip(1)
        .take_while(|parent| parent.starts_with(root))
    {
        // Another interface may have pins there.
        if fs::remove_dir(parent).is_err() {
            break;
        }
    }
    Ok(())
}

/// Locks the directories of all versions that an interface has.
fn directories(interface: &str) -> Result<Vec<Directory>, DatapathError> {
    let versions = fs::read_dir(pin_root()).into_iter().flatten().flatten();
    versions
        .filter_map(|version| {
            Directory::lock(version.path().join(pin_name(interface)), interface).transpose()
        })
        .collect()
}

/// Locks what other versions pinned for an interface.
pub(super) fn others(interface: &str) -> Result<Vec<Directory>, DatapathError> {
    let own = own_directory(interface);
    let versions = fs::read_dir(pin_root()).into_iter().flatten().flatten();
    let others = versions
        .map(|version| version.path().join(pin_name(interface)))
        .filter(|path| *path != own)
        .filter_map(|path| Directory::lock(path, interface).transpose());
    let others: Vec<_> = others.collect::<Result<_, _>>()?;
    for other in &others {
        other.own_contents()?;
    }
    Ok(others)
}

/// A relay of ours that is attached.
pub(super) struct Earlier {
    pub(super) relay: RelayAttachment,
    pub(super) mode: AttachMode,
    /// Number of its link, which a filter does not have.
    pub(super) link: Option<u32>,
    /// Number of its XDP program.
    xdp: Option<u32>,
}

/// The relay that is attached to an interface: by a pinned link, or by a filter.
pub(super) fn attached<'a>(
    directories: impl IntoIterator<Item = &'a Path>,
    interface: &str,
    index: u32,
) -> Result<Option<Earlier>, DatapathError> {
    let interfaces = Interfaces::read()?;
    let programs = interfaces
        .indexed(index)
        .map_or(&[][..], |found| &found.xdp);
    let tcx = Link::tcx_links(index, Direction::Ingress);
    let tcx = tcx.map_err(filters_error(names::RELAY, interface))?;
    for directory in directories {
        for entry in Contents::read(directory)?.entries {
            let Pinned::Link(link, info) = entry.pinned else {
                continue;
            };
            // Another network namespace may have the same index, but not the same program or link.
            if info.interface != index {
                continue;
            }
            if info.hook == Some(Hook::TcxIngress) && tcx.contains(&info.id) {
                return Ok(Some(Earlier {
                    relay: RelayAttachment::Tc(TcAttachment::Link(link)),
                    mode: AttachMode::Tc,
                    link: Some(info.id),
                    xdp: None,
                }));
            }
            let program = programs
                .iter()
                .find(|program| info.hook == Some(Hook::Xdp) && info.program == program.id);
            let mode = match program.map(|program| program.hook) {
                Some(XdpHook::Native) => AttachMode::Native,
                Some(XdpHook::Generic) => AttachMode::Generic,
                Some(XdpHook::Hardware) | None => continue,
            };
            return Ok(Some(Earlier {
                relay: RelayAttachment::Xdp(link),
                mode,
                link: Some(info.id),
                xdp: Some(info.program),
            }));
        }
    }
    let filter = filters(names::RELAY, interface, index)?.pop();
    Ok(filter.map(|filter| Earlier {
        relay: RelayAttachment::Tc(TcAttachment::Filter(filter)),
        mode: AttachMode::Tc,
        link: None,
        xdp: None,
    }))
}

/// How an instance that an earlier daemon left attached to an interface runs, if there is one.
///
/// # Errors
/// [`DatapathError::Interfaces`], [`DatapathError::Pins`].
pub fn attached_mode(interface: &str, index: u32) -> Result<Option<AttachMode>, DatapathError> {
    Ok(unlocked(interface, index)?.map(|attached| attached.mode))
}

/// Packets that an instance in XDP has relayed since it was attached, past everything that leaves by the
/// queueing disciplines; none where there is no such instance of this version.
///
/// # Errors
/// As [`attached_mode`]; [`DatapathError::Map`].
pub fn relayed_past_queues(interface: &str, index: u32) -> Result<u64, DatapathError> {
    match attached_mode(interface, index)? {
        Some(AttachMode::Native | AttachMode::Generic) => {}
        Some(AttachMode::Tc) | None => return Ok(0),
    }
    let pin = own_directory(interface).join(names::COUNTERS);
    if !pin.exists() {
        return Ok(0);
    }
    Ok(total(&open_counters(&pin)?, Reason::Relayed as u32)?.packets)
}

/// Whether an XDP program on an interface is the relay's, left attached there by an earlier daemon.
///
/// # Errors
/// As [`attached_mode`].
pub fn owns(interface: &str, index: u32, program: u32) -> Result<bool, DatapathError> {
    Ok(unlocked(interface, index)?.is_some_and(|attached| attached.xdp == Some(program)))
}

fn unlocked(interface: &str, index: u32) -> Result<Option<Earlier>, DatapathError> {
    let versions = fs::read_dir(pin_root()).into_iter().flatten().flatten();
    let directories: Vec<_> = versions
        .map(|version| version.path().join(pin_name(interface)))
        .filter(|path| path.is_dir())
        .collect();
    match attached(directories.iter().map(PathBuf::as_path), interface, index) {
        // A daemon ends meanwhile, and removes its directory.
        Err(DatapathError::Pins { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        outcome => outcome,
    }
}

/// What becomes of the pins when [`Pins`] is dropped.
enum AtEnd {
    /// Nothing goes that is there.
    Untouched,
    /// Only what is being prepared goes, and is detached, but for this link of an earlier instance.
    Unstage(Option<u32>),
    /// All go, and what they hold is detached.
    Remove,
    /// All stay.
    Leave,
}

/// The pins of one interface, claimed by this process.
pub(super) struct Pins {
    directory: Directory,
    at_end: AtEnd,
}

impl Pins {
    /// Takes over the interface's directory, and leaves what is in it.
    pub(super) fn claim(interface: &str) -> Result<Self, DatapathError> {
        let path = own_directory(interface);
        let directory = loop {
            fs::create_dir_all(&path).map_err(error(&path))?;
            // A daemon that ends removes the directory: then the lock is on nothing.
            if let Some(directory) = Directory::lock(path.clone(), interface)? {
                break directory;
            }
        };
        let pins = Self {
            directory,
            at_end: AtEnd::Untouched,
        };
        pins.directory.own_contents()?;
        Ok(pins)
    }

    pub(super) fn path(&self) -> &Path {
        &self.directory.path
    }

    fn next(&self) -> PathBuf {
        self.directory.path.join(NEXT)
    }

    /// The observer of an instance that can be carried on: complete, with this relay, of these
    /// layouts.
    pub(super) fn adoptable(
        &self,
        earlier: &Earlier,
        interface: &str,
        index: u32,
        layouts: &[Layout],
    ) -> Result<Option<TcAttachment>, DatapathError> {
        let open = |name| Pinned::open(&self.directory.path.join(name));
        let same = layouts.iter().all(|layout| {
            matches!(open(layout.name), Ok(Pinned::Map(info)) if *layout == maps::layout(layout.name, &info))
        });
        let single = match earlier.link {
            Some(id) => {
                let name = earlier.mode.link_name();
                matches!(open(name), Ok(Pinned::Link(_, info)) if info.id == id)
            }
            None => filters(names::RELAY, interface, index)?.len() == 1,
        };
        if !(same && single) {
            return Ok(None);
        }
        match open(names::OBSERVER_LINK) {
            Ok(Pinned::Link(link, info))
                if info.hook == Some(Hook::TcxEgress) && info.interface == index =>
            {
                return Ok(Some(TcAttachment::Link(link)));
            }
            Ok(_) => return Ok(None),
            Err(_) => {}
        }
        // With two, a daemon was killed while it replaced one: they have different maps.
        Ok(match filters(names::OBSERVER, interface, index)?[..] {
            [one] => Some(TcAttachment::Filter(one)),
            _ => None,
        })
    }

    /// Begins to prepare a new instance, besides the earlier one that has the spared link.
    pub(super) fn begin(&mut self, spared: Option<u32>) -> Result<(), DatapathError> {
        self.at_end = AtEnd::Unstage(spared);
        self.unstage(spared)
    }

    /// Removes what a daemon that was killed had prepared.
    pub(super) fn unstage(&self, spared: Option<u32>) -> Result<(), DatapathError> {
        let next = self.next();
        if next.exists() {
            Contents::read(&next)?.take_down(spared)?;
            remove_folder(&next).map_err(error(&next))?;
        }
        Ok(())
    }

    /// Pins the maps of a new instance.
    pub(super) fn stage(&self, ebpf: &Ebpf) -> Result<(), DatapathError> {
        let next = self.next();
        fs::create_dir(&next).map_err(error(&next))?;
        for name in names::MAPS {
            let path = next.join(name);
            let pinned = maps::map(ebpf, name)?.pin(&path);
            pinned.map_err(|pin| error(&path)(io::Error::other(pin.to_string())))?;
        }
        Ok(())
    }

    /// Pins a link of a new instance.
    pub(super) fn stage_link(&self, name: &str, link: &Link) -> Result<(), DatapathError> {
        let path = self.next().join(name);
        link.pin(&path).map_err(error(&path))
    }

    /// Pins the link of a new instance's relay, if it has one, which may be that of the earlier
    /// instance. From now on, that is no whole one any more.
    pub(super) fn replace_relay(
        &mut self,
        mode: AttachMode,
        link: Option<&Link>,
    ) -> Result<(), DatapathError> {
        self.at_end = AtEnd::Remove;
        if let Some(link) = link {
            self.stage_link(mode.link_name(), link)?;
        }
        for name in names::RELAY_LINKS {
            let earlier = self.directory.path.join(name);
            match fs::remove_file(&earlier) {
                Err(gone) if gone.kind() == io::ErrorKind::NotFound => {}
                outcome => outcome.map_err(error(&earlier))?,
            }
        }
        Ok(())
    }

    /// Puts the new instance, with this link of its relay, in the place of the earlier one, which
    /// goes.
    pub(super) fn settle(&self, relay: Option<u32>) -> Result<(), DatapathError> {
        let next = self.next();
        let mut earlier = self.directory.contents()?;
        earlier
            .entries
            .retain(|entry| !entry.path.starts_with(&next));
        earlier.take_down(relay)?;
        let mut entries = Contents::read(&next)?.entries;
        entries.sort_by_key(|entry| {
            names::RELAY_LINKS
                .iter()
                .any(|name| entry.path.ends_with(name))
        });
        for entry in entries {
            let name = entry.path.file_name().unwrap_or_default();
            let to = self.directory.path.join(name);
            fs::rename(&entry.path, to).map_err(error(&entry.path))?;
        }
        remove_folder(&next).map_err(error(&next))
    }

    /// Everything goes with this process.
    pub(super) fn hold(&mut self) {
        self.at_end = AtEnd::Remove;
    }

    /// Everything stays, whatever becomes of this process.
    pub(super) fn leave(&mut self) {
        self.at_end = AtEnd::Leave;
    }

    pub(super) fn stays(&self) -> bool {
        matches!(self.at_end, AtEnd::Leave)
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let outcome = match self.at_end {
            // Not empty where an earlier instance stays.
            AtEnd::Untouched => {
                let _ = self.directory.remove_folders();
                Ok(())
            }
            AtEnd::Unstage(spared) => self.unstage(spared).map(|()| {
                let _ = self.directory.remove_folders();
            }),
            AtEnd::Remove => self.directory.remove(None),
            AtEnd::Leave => Ok(()),
        };
        if let Err(error) = outcome {
            tracing::error!(%error, "pins not removed");
        }
    }
}

/// What goes wrong with the filters of a hook.
fn filters_error(hook: TcHook, interface: &str) -> impl Fn(io::Error) -> DatapathError {
    move |source| DatapathError::Filters {
        interface: interface.to_owned(),
        direction: hook.direction,
        source,
    }
}

fn filters(hook: TcHook, interface: &str, index: u32) -> Result<Vec<Filter>, DatapathError> {
    Filter::all(hook, index).map_err(filters_error(hook, interface))
}

/// Deletes the filters of a hook on an interface, but for this one; returns how many.
pub(super) fn delete_filters(
    hook: TcHook,
    interface: &str,
    index: u32,
    spared: Option<Filter>,
) -> Result<usize, DatapathError> {
    let mut filters = filters(hook, interface, index)?;
    filters.retain(|filter| Some(*filter) != spared);
    for filter in &filters {
        filter.delete().map_err(filters_error(hook, interface))?;
    }
    Ok(filters.len())
}

/// Refuses an interface that a running daemon serves, of whatever ABI version.
///
/// # Errors
/// [`DatapathError::Running`], [`DatapathError::Pins`].
pub fn check_unserved(interface: &str) -> Result<(), DatapathError> {
    directories(interface).map(drop)
}

/// Removes what daemons that no longer run left attached to an interface, or pinned for it, of every
/// ABI version; also when that interface is gone. Says what it removed.
///
/// # Errors
/// [`DatapathError::Running`], and what kept a thing from being removed.
pub fn remove_leftovers(interface: &str) -> Result<Vec<String>, DatapathError> {
    let directories = directories(interface)?;
    let mut indices = Vec::new();
    if let Ok(found) = Interfaces::read()?.named(interface) {
        indices.push(found.index);
    }
    let (mut removed, mut foreign) = (Vec::new(), None);
    for directory in &directories {
        let contents = directory.contents()?;
        // The interface may have been renamed.
        indices.extend(contents.links().map(|(.., info)| info.interface));
        contents.take_down(None)?;
        removed.push(format!(
            "{} ({})",
            directory.path.display(),
            contents.describe()
        ));
        match contents.foreign {
            None => directory.remove_folders().map_err(error(&directory.path))?,
            some => foreign = foreign.or(some),
        }
    }
    indices.sort_unstable();
    indices.dedup();
    // After all links, and the relay first: nothing may be relayed unobserved.
    for index in indices.into_iter().filter(|index| *index != 0) {
        for hook in [names::RELAY, names::OBSERVER] {
            if delete_filters(hook, interface, index, None)? > 0 {
                let (program, side) = (hook.program, hook.direction.name());
                removed.push(format!("filter {program} at the TC {side}"));
            }
        }
    }
    foreign.map_or(Ok(removed), Err)
}
