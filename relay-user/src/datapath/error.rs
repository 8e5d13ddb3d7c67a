//! Why the datapath could not be set up or changed.

use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError};

use super::{pins::BPFFS, tc::Direction};
use crate::next_hop::NetlinkError;

/// Why the datapath could not be set up or changed. The text names the thing and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// bpffs is absent and could not be mounted.
    #[error(
        "{BPFFS} is no BPF file system and could not be mounted ({0}): run `mount -t bpf bpf {BPFFS}`"
    )]
    Bpffs(#[source] io::Error),
    /// Something in the relay's directory that no version of the relay pins there.
    #[error(
        "{path} is nothing that the relay made ({what}), which is not touched: move it away, or remove it (`rm {path}`)"
    )]
    ForeignPin {
        /// Where it is.
        path: PathBuf,
        /// What it is, or why it cannot be told.
        what: String,
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
    /// No instance of this version is pinned for an interface.
    #[error("{} has no maps of this version of relay-user for {interface}", root.display())]
    NotPinned {
        /// The interface.
        interface: String,
        /// Where all pins are.
        root: PathBuf,
    },
    /// A pinned map is not as this version makes it.
    #[error("{} has another layout than this version of relay-user reads: use the version that pinned it", path.display())]
    Layout {
        /// The pin.
        path: PathBuf,
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
        "{interface} already has an XDP program ({program}): use `--mode tc`, or detach it first (`ip link set dev {interface} xdp off`, or the tool that attached it)"
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
    /// The program of an earlier daemon cannot be replaced in its place.
    #[error(
        "the program on {interface} cannot be replaced ({source}): run `relay-user detach {interface}`, then attach again"
    )]
    NotReplaced {
        /// The interface.
        interface: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Removed meanwhile.
    #[error("{0} is gone: attach again when it is back")]
    InterfaceGone(String),
    /// A program in traffic control cannot be attached: the relay, or the observer without which
    /// nothing may be relayed.
    #[error(
        "{interface} refuses a program at its TC {} ({source}): the kernel needs CONFIG_NET_CLS_ACT and, before Linux 6.6, CONFIG_NET_CLS_BPF", .direction.name()
    )]
    TcRefused {
        /// The interface.
        interface: String,
        /// Which side of it.
        direction: Direction,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The traffic control filters of an interface cannot be listed, or one cannot be deleted.
    #[error("the filters at the TC {} of {interface}: {source}", .direction.name())]
    Filters {
        /// The interface.
        interface: String,
        /// Which side of it.
        direction: Direction,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The interfaces cannot be read.
    #[error(transparent)]
    Interfaces(#[from] NetlinkError),
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
