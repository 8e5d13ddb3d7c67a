//! The classifier in the kernel: attached to what leaves an interface, and pinned under
//! `/sys/fs/bpf/relay-qos/v<ABI>/<interface>/`, so that it stays until someone detaches it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, Map, MapData, MapError},
    programs::SchedClassifier,
    util::KernelVersion,
};
use nix::libc;
use relay_common::{
    classify::{NAME, Names, QOS_ABI, RuleTable, VOICE, class_counter},
    stream::Counter,
};
use serde::Serialize;

use super::{
    policy::Policy,
    table::{self, Task},
};
use crate::{
    datapath::{
        DatapathError, ensure_bpffs,
        links::{Link, Pinned},
        load,
        maps::{open_counters, total},
        names,
        pins::{BPFFS, error, pin_name, remove_folder, remove_folders},
        tc::{Direction, Filter, Order, TcAttachment, TcHook},
    },
    next_hop::{Interfaces, LinkLayer, NetlinkError},
};

/// The compiled classifier.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/qos"));

/// The classifier's program. It sits after all others, so that it sees what they leave of a packet,
/// and last of all the relay's observer, which must see what it was before.
pub const CLASSIFY: &str = "relay_classify";
/// The program that sends what comes in to an IFB device: after all others too, one of which may be
/// the relay, whose packets then are not the stack's to wait for.
pub const DOWNLINK: &str = "relay_downlink";
/// The rules.
pub const POLICY: &str = "POLICY";
/// What rules and classes are called.
pub const NAMES: &str = "NAMES";
/// Packets and bytes by rule and class.
pub use crate::datapath::names::COUNTERS;
/// Flows that are known for video.
pub const FLOWS: &str = "FLOWS";
/// Load-time constant: index of the IFB device.
const IFB: &str = "IFB";

/// All maps that are pinned.
const MAPS: [&str; 4] = [POLICY, NAMES, COUNTERS, FLOWS];

const CLASSIFY_HOOK: TcHook = TcHook {
    program: CLASSIFY,
    direction: Direction::Egress,
    order: Order::Last,
};
const DOWNLINK_HOOK: TcHook = TcHook {
    program: DOWNLINK,
    direction: Direction::Ingress,
    order: Order::Last,
};

/// Folder of what is being prepared.
const NEXT: &str = "next";

const TABLE: usize = size_of::<RuleTable>();

/// Why the classifier cannot be attached, read or detached.
#[derive(Debug, thiserror::Error)]
pub enum ClassifierError {
    /// The object cannot be loaded or pinned.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// The interfaces cannot be read.
    #[error(transparent)]
    Interfaces(#[from] NetlinkError),
    /// It was removed meanwhile.
    #[error("{0} is gone: `ip link` lists the interfaces that there are")]
    Gone(String),
    /// Its packets begin with something unknown.
    #[error(
        "{0} has neither Ethernet headers nor bare IP packets, which is all that can be classified"
    )]
    LinkLayer(String),
    /// IFB takes Ethernet frames only.
    #[error(
        "what comes in on {0} has no Ethernet header, which an IFB device needs: shape the uplink only"
    )]
    Downlink(String),
    /// The kernel would drop all that a program sends to an IFB device.
    #[error(
        "this kernel loses what BPF sends to an IFB device: Linux 6.5 or newer is needed to shape the downlink; shape the uplink only"
    )]
    OldKernel,
    /// The kernel refuses the program there.
    #[error(
        "{interface} refuses the program `{program}` ({source}): the kernel needs CONFIG_NET_CLS_ACT and, before Linux 6.6, CONFIG_NET_CLS_BPF"
    )]
    Attach {
        /// The interface.
        interface: String,
        /// The program.
        program: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What was counted since the policy was applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Counted {
    /// By rule, in their order; a packet may have fitted several.
    pub rules: Vec<NamedCounter>,
    /// By class, in their order.
    pub classes: Vec<NamedCounter>,
    /// RTP audio, whatever the rules make of it.
    pub voice: NamedCounter,
}

/// Packets of a rule or a class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NamedCounter {
    /// Of the rule or the class.
    pub name: String,
    /// Packets, as they will be on the wire.
    pub packets: u64,
    /// Bytes, as queueing disciplines count them.
    pub bytes: u64,
}

/// The classifiers of interfaces, which are the kernel's: whoever is root may attach, read and detach
/// them, one at a time for each interface.
#[derive(Debug)]
pub struct Classifier;

impl Classifier {
    /// Sees to it that there is a place for pins, before anything is changed that a classifier is for.
    ///
    /// # Errors
    /// [`DatapathError::Bpffs`].
    pub fn prepare() -> Result<(), ClassifierError> {
        Ok(ensure_bpffs()?)
    }

    /// Attaches the classifier to an interface, or replaces the one that is there: a packet meets the
    /// old rules or the new ones. Counters begin anew.
    ///
    /// # Errors
    /// Every [`ClassifierError`]; what was there before then still is.
    pub fn attach(
        interface: &str,
        index: u32,
        policy: &Policy,
        task: Task,
    ) -> Result<(), ClassifierError> {
        let mut ebpf = loaded(layer(interface, index)?, policy, task)?;
        put(interface, index, CLASSIFY_HOOK, &mut ebpf, &MAPS)
    }

    /// Has all that comes in on an interface go through an IFB device, or through another one than
    /// before. The device's classifier is to be attached first, and this is to be detached before the
    /// device is set down, which would lose all that comes in; one that is deleted loses nothing.
    ///
    /// What the relay takes before, by XDP or by traffic control, does not go there. Generic XDP sees
    /// everything else twice: the stack runs it again on what the device hands back (ifb_ri_tasklet()
    /// in drivers/net/ifb.c).
    ///
    /// # Errors
    /// As [`Classifier::attach`].
    pub fn attach_downlink(
        interface: &str,
        index: u32,
        ifb_index: u32,
    ) -> Result<(), ClassifierError> {
        // ifb_xmit() in drivers/net/ifb.c drops what is not marked as redirected, which
        // __bpf_tx_skb() in net/core/filter.c does from there on.
        if KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(6, 5, 0)) {
            return Err(ClassifierError::OldKernel);
        }
        let layer = layer(interface, index)?;
        if layer != LinkLayer::Ethernet {
            return Err(ClassifierError::Downlink(interface.to_owned()));
        }
        let mut ebpf = create(layer, ifb_index)?;
        load::load_classifier(&mut ebpf, DOWNLINK)?;
        put(interface, index, DOWNLINK_HOOK, &mut ebpf, &[])
    }

    /// Whether the classifier is attached to this very interface, and not to one of the same name
    /// that was there before.
    ///
    /// # Errors
    /// [`ClassifierError::Attach`] when the kernel does not tell.
    pub fn is_attached(interface: &str, index: u32) -> Result<bool, ClassifierError> {
        attached(interface, index, CLASSIFY_HOOK).map(|found| found.is_some())
    }

    /// Whether what comes in on this very interface is sent to an IFB device.
    ///
    /// # Errors
    /// [`ClassifierError::Attach`] when the kernel does not tell.
    pub fn is_redirected(interface: &str, index: u32) -> Result<bool, ClassifierError> {
        attached(interface, index, DOWNLINK_HOOK).map(|found| found.is_some())
    }

    /// Detaches all of an interface, which may be gone, and removes its pins, of whatever version.
    /// Says whether there was something.
    ///
    /// # Errors
    /// [`DatapathError::ForeignPin`], [`DatapathError::Pins`], [`ClassifierError::Attach`].
    pub fn detach(interface: &str) -> Result<bool, ClassifierError> {
        let mut was_there = false;
        for directory in directories(interface) {
            take_down(&directory)?;
            was_there = true;
        }
        if let Ok(found) = Interfaces::read()?.named(interface) {
            // What comes in first, lest it wait for a queue that nobody minds any more.
            for hook in [DOWNLINK_HOOK, CLASSIFY_HOOK] {
                for filter in filters(interface, found.index, hook)? {
                    filter.delete().map_err(refused(interface, hook))?;
                    was_there = true;
                }
            }
        }
        Ok(was_there)
    }

    /// What was counted; none where no classifier is pinned.
    ///
    /// # Errors
    /// [`ClassifierError::Datapath`].
    pub fn read(interface: &str) -> Result<Option<Counted>, ClassifierError> {
        let directory = own_directory(interface);
        if !directory.join(COUNTERS).exists() {
            return Ok(None);
        }
        let open = |map| MapData::from_pin(directory.join(map)).map_err(map_error(map));
        let names: Array<_, [u8; size_of::<Names>()]> =
            Array::try_from(Map::Array(open(NAMES)?)).map_err(map_error(NAMES))?;
        let names: Names = zerocopy::transmute!(names.get(&0, 0).map_err(map_error(NAMES))?);
        let counters = open_counters(&directory.join(COUNTERS))?;
        let counter = |name: String, element: u32| {
            let Counter { packets, bytes } = total(&counters, element)?;
            Ok(NamedCounter {
                name,
                packets,
                bytes,
            })
        };
        let all = |names: &[[u8; NAME]], element: fn(u32) -> u32| {
            (0..)
                .zip(names)
                .map_while(|(number, name)| Some((number, text(name)?)))
                .map(|(number, name)| counter(name, element(number)))
                .collect::<Result<Vec<_>, ClassifierError>>()
        };
        Ok(Some(Counted {
            rules: all(&names.rules, |rule| rule)?,
            classes: all(&names.classes, class_counter)?,
            voice: counter("voice".to_owned(), VOICE)?,
        }))
    }

    /// Packets of RTP audio that were seen; none where no classifier is pinned.
    ///
    /// # Errors
    /// [`ClassifierError::Datapath`].
    pub fn voice(interface: &str) -> Result<Option<u64>, ClassifierError> {
        let directory = own_directory(interface);
        if !directory.join(COUNTERS).exists() {
            return Ok(None);
        }
        Ok(Some(
            total(&open_counters(&directory.join(COUNTERS))?, VOICE)?.packets,
        ))
    }
}

/// A name of [`Names`]; none for an empty one.
fn text(name: &[u8]) -> Option<String> {
    let length = name
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(name.len());
    let text = String::from_utf8_lossy(name.get(..length)?).into_owned();
    (!text.is_empty()).then_some(text)
}

fn layer(interface: &str, index: u32) -> Result<LinkLayer, ClassifierError> {
    let interfaces = Interfaces::read()?;
    match interfaces.indexed(index).map(|found| found.layer) {
        None => Err(ClassifierError::Gone(interface.to_owned())),
        Some(LinkLayer::Other) => Err(ClassifierError::LinkLayer(interface.to_owned())),
        Some(layer) => Ok(layer),
    }
}

/// Loads the object's maps.
fn create(layer: LinkLayer, ifb: u32) -> Result<Ebpf, DatapathError> {
    let ethernet = u8::from(layer == LinkLayer::Ethernet);
    let mut loader = EbpfLoader::new();
    loader.override_global(names::ETHERNET, &ethernet, true);
    loader.override_global(IFB, &ifb, true);
    load::create(&mut loader, OBJECT, "two megabytes are needed")
}

/// The classifier in the kernel with a policy, attached to nothing yet.
///
/// # Errors
/// [`ClassifierError::Datapath`].
pub fn loaded(layer: LinkLayer, policy: &Policy, task: Task) -> Result<Ebpf, ClassifierError> {
    let mut ebpf = create(layer, 0)?;
    let table = table::compile(policy, task);
    let table: &[u8; TABLE] = zerocopy::transmute_ref!(&*table);
    let names: [u8; size_of::<Names>()] = zerocopy::transmute!(table::names(policy));
    set(&mut ebpf, POLICY, table)?;
    set(&mut ebpf, NAMES, &names)?;
    load::load_classifier(&mut ebpf, CLASSIFY)?;
    Ok(ebpf)
}

/// Writes the only element of a map.
fn set<const SIZE: usize>(
    ebpf: &mut Ebpf,
    map: &'static str,
    value: &[u8; SIZE],
) -> Result<(), DatapathError> {
    let data = ebpf
        .map_mut(map)
        .ok_or_else(|| DatapathError::Object(format!("no map {map}")))?;
    Array::<_, [u8; SIZE]>::try_from(data)
        .and_then(|mut array| array.set(0, value, 0))
        .map_err(map_error(map))
}

/// Attaches a program that is loaded, or replaces the one that is there, and pins it with its maps.
fn put(
    interface: &str,
    index: u32,
    hook: TcHook,
    ebpf: &mut Ebpf,
    maps: &[&'static str],
) -> Result<(), ClassifierError> {
    ensure_bpffs()?;
    let directory = own_directory(interface);
    let next = directory.join(NEXT);
    if next.exists() {
        take_down(&next)?;
    }
    fs::create_dir_all(&next).map_err(error(&next))?;
    let placed = pin_maps(ebpf, &next, maps).and_then(|()| {
        let program: &mut SchedClassifier = load::program(ebpf, hook.program)?;
        let refused = || refused(interface, hook);
        if let Some(attachment) = attached(interface, index, hook)? {
            return attachment.update(program, interface).map_err(refused());
        }
        let attachment = TcAttachment::attach(hook, program, interface, index).map_err(refused())?;
        if let TcAttachment::Link(link) = &attachment {
            let path = next.join(link_name(hook));
            link.pin(&path).map_err(error(&path))?;
        }
        Ok(())
    });
    if let Err(error) = placed {
        take_down(&next)?;
        return Err(error);
    }
    for entry in fs::read_dir(&next).map_err(error(&next))? {
        let entry = entry.map_err(error(&next))?;
        let to = directory.join(entry.file_name());
        fs::rename(entry.path(), &to).map_err(error(&to))?;
    }
    remove_folder(&next).map_err(error(&next))?;
    for other in directories(interface) {
        if other != directory {
            take_down(&other)?;
        }
    }
    Ok(())
}

fn pin_maps(ebpf: &Ebpf, next: &Path, maps: &[&'static str]) -> Result<(), ClassifierError> {
    for &name in maps {
        let path = next.join(name);
        let pinned = match ebpf.map(name) {
            Some(Map::Array(map) | Map::PerCpuArray(map) | Map::LruHashMap(map)) => map.pin(&path),
            _ => return Err(DatapathError::Object(format!("no map {name}")).into()),
        };
        pinned.map_err(|pin| error(&path)(io::Error::other(pin.to_string())))?;
    }
    Ok(())
}

/// The program of a hook that is attached to this very interface.
fn attached(
    interface: &str,
    index: u32,
    hook: TcHook,
) -> Result<Option<TcAttachment>, ClassifierError> {
    if let Ok(Pinned::Link(link, info)) =
        Pinned::open(&own_directory(interface).join(link_name(hook)))
        && info.interface == index
    {
        return Ok(Some(TcAttachment::Link(link)));
    }
    let filter = filters(interface, index, hook)?.into_iter().next();
    Ok(filter.map(TcAttachment::Filter))
}

fn filters(interface: &str, index: u32, hook: TcHook) -> Result<Vec<Filter>, ClassifierError> {
    Filter::all(hook, index).map_err(refused(interface, hook))
}

fn refused(interface: &str, hook: TcHook) -> impl FnOnce(io::Error) -> ClassifierError {
    let interface = interface.to_owned();
    move |source| match source.raw_os_error() {
        Some(libc::ENODEV) => ClassifierError::Gone(interface),
        _ => ClassifierError::Attach {
            interface,
            program: hook.program,
            source,
        },
    }
}

fn map_error(map: &'static str) -> impl FnOnce(MapError) -> DatapathError {
    move |source| DatapathError::Map {
        map,
        source: Box::new(source),
    }
}

/// Pin of a program's link.
fn link_name(hook: TcHook) -> String {
    format!("{}{}", hook.program, names::LINK_SUFFIX)
}

fn pin_root() -> PathBuf {
    Path::new(BPFFS).join("relay-qos")
}

/// Where this version pins.
fn own_directory(interface: &str) -> PathBuf {
    pin_root()
        .join(format!("v{QOS_ABI}"))
        .join(pin_name(interface))
}

/// Those of all versions that an interface has.
fn directories(interface: &str) -> Vec<PathBuf> {
    let versions = fs::read_dir(pin_root()).into_iter().flatten().flatten();
    versions
        .map(|version| version.path().join(pin_name(interface)))
        .filter(|path| path.is_dir())
        .collect()
}

/// Detaches and removes all in a directory, which must be ours, then itself and what is empty above.
fn take_down(directory: &Path) -> Result<(), DatapathError> {
    let next = directory.join(NEXT);
    if next.is_dir() {
        empty(&next)?;
    }
    empty(directory)?;
    remove_folders(directory, &pin_root()).map_err(error(directory))
}

/// Detaches and removes all in a directory, which must be ours, and itself.
fn empty(directory: &Path) -> Result<(), DatapathError> {
    let mut links: Vec<Link> = Vec::new();
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(error(directory))? {
        let entry = entry.map_err(error(directory))?;
        let (path, name) = (entry.path(), entry.file_name());
        match Pinned::open(&path) {
            Ok(pinned) if pinned.is_ours(&name.to_string_lossy()) => {
                if let Pinned::Link(link, _) = pinned {
                    links.push(link);
                }
                paths.push(path);
            }
            outcome => {
                let what = outcome.map_or_else(
                    |error| error.to_string(),
                    |_| "an object of another name".to_owned(),
                );
                return Err(DatapathError::ForeignPin { path, what });
            }
        }
    }
    for link in links {
        link.detach().map_err(error(directory))?;
    }
    for path in paths {
        fs::remove_file(&path).map_err(error(&path))?;
    }
    remove_folder(directory).map_err(error(directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_gone_is_not_the_kernels_fault() {
        let said = |errno| refused("eth0", CLASSIFY_HOOK)(io::Error::from_raw_os_error(errno));
        assert!(matches!(said(libc::ENODEV), ClassifierError::Gone(name) if name == "eth0"));
        assert!(matches!(said(libc::ENOENT), ClassifierError::Attach { .. }));
    }
}
