//! The datapath's end of a capture: whose it is, what is copied, and the copies.
//!
//! It needs no daemon: the maps are reached by their pins. As the daemon's lease does, a claim ends by
//! itself unless it is renewed, so that a process that is killed captures nothing any longer.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray, RingBuf};
use memmap2::MmapRaw;
use relay_common::{
    capture::{Capture, Captured, Kept},
    stream::{Control, Stream},
};
use zerocopy::FromBytes as _;

use super::{
    AttachMode, DatapathError,
    load::LOAD_BYTES_SINCE,
    maps::{Access, KEY, VALUE, mapped},
    names,
    pins::{self, attached_mode},
};
use crate::{
    clock::monotonic_now,
    next_hop::{Interface, Interfaces},
    privileges::is_kernel_before,
};

const KEPT: usize = size_of::<Kept>();

/// How long a claim holds unless it is renewed.
const CLAIM: Duration = Duration::from_secs(3);

/// Why nothing can be captured.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No instance of this version is pinned.
    #[error("the relay is attached to no interface: start it with `relay-user attach IFACE`")]
    NoInterface,
    /// More than one is.
    #[error("the relay is attached to {}: choose one with --interface", .0.join(" and "))]
    SeveralInterfaces(Vec<String>),
    /// No instance of this version is attached to the interface.
    #[error("no relay of this version is attached to {0}: start it with `relay-user attach {0}`")]
    NotAttached(String),
    /// The kernel has no way to copy a packet in XDP.
    #[error(
        "in mode {} packets can be captured from Linux {}.{} on: attach with `--mode tc`", .0.name(), LOAD_BYTES_SINCE.0, LOAD_BYTES_SINCE.1
    )]
    Kernel(AttachMode),
    /// Someone else captures.
    #[error("process {process} captures on {interface} already: there is one capture at a time")]
    Busy {
        /// The interface.
        interface: String,
        /// Its id.
        process: u32,
    },
    /// The claim was not renewed in time, and someone else captures now.
    #[error("this capture stood still for too long, and another has taken its place")]
    Lost,
    /// The maps cannot be opened.
    #[error("{pin}: {source}: capturing needs root", pin = .pin.display())]
    Open {
        /// The map.
        pin: PathBuf,
        /// The kernel's answer.
        #[source]
        source: Box<MapError>,
    },
    /// The interfaces or the pins cannot be read.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
}

/// What is to be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection {
    /// The only pair; none for all.
    pub pair: Option<u64>,
    /// Most bytes of each packet.
    pub snap: u32,
    /// One packet in so many, on average.
    pub sample: u32,
}

/// Access to the copies of packets of one interface.
pub struct Tap {
    interface: Interface,
    control: MmapRaw,
    kept: PerCpuArray<MapData, [u8; KEPT]>,
    captured: RingBuf<MapData>,
    /// Where the maps are pinned, and the number that the file system gave the pin.
    pin: (PathBuf, u64),
    /// The end of the claim as written last, ns; 0 before the first.
    until: u64,
    /// Copies from before are another capture's.
    since: u64,
    /// What had been missed before.
    missed_before: u64,
}

impl Tap {
    /// Opens the maps of an interface, or of the only one that has any.
    ///
    /// # Errors
    /// Every [`TapError`] but [`TapError::Busy`] and [`TapError::Lost`].
    pub fn open(interface: Option<&str>) -> Result<Self, TapError> {
        let interface = match interface {
            Some(interface) => interface.to_owned(),
            None => only(pins::interfaces())?,
        };
        let interfaces = Interfaces::read().map_err(DatapathError::from)?;
        let Ok(found) = interfaces.named(&interface) else {
            return Err(TapError::NotAttached(interface));
        };
        let found = found.clone();
        let pin = |map| pins::map_pin(&interface, map);
        let mode = attached_mode(&interface, found.index)?;
        let (Some(mode), Ok(number)) = (mode, inode(&pin(names::CONTROL))) else {
            return Err(TapError::NotAttached(interface));
        };
        if mode != AttachMode::Tc && is_kernel_before(LOAD_BYTES_SINCE) {
            return Err(TapError::Kernel(mode));
        }
        let open = |map| {
            let pin = pin(map);
            MapData::from_pin(&pin).map_err(|source| TapError::Open {
                pin,
                source: Box::new(source),
            })
        };
        let typed = |source| DatapathError::Map {
            map: names::CAPTURED,
            source: Box::new(source),
        };
        let control = mapped(
            names::CONTROL,
            &open(names::CONTROL)?,
            size_of::<Control>(),
            Access::Write,
        )?;
        let captured = Map::RingBuf(open(names::CAPTURED)?);
        let kept = Map::PerCpuArray(open(names::KEPT)?);
        Ok(Self {
            control,
            kept: PerCpuArray::try_from(kept).map_err(typed)?,
            captured: RingBuf::try_from(captured).map_err(typed)?,
            pin: (pin(names::CONTROL), number),
            interface: found,
            until: 0,
            since: 0,
            missed_before: 0,
        })
    }

    /// The interface.
    #[must_use]
    pub const fn interface(&self) -> &Interface {
        &self.interface
    }

    /// Begins to capture.
    ///
    /// # Errors
    /// [`TapError::Busy`]; the map of what was missed cannot be read.
    pub fn claim(&mut self, selection: &Selection) -> Result<(), TapError> {
        let now = monotonic_now();
        let until = self.word().load(Ordering::Acquire);
        if until > now || !self.exchange(until, end(now)) {
            return Err(TapError::Busy {
                interface: self.interface.name.clone(),
                process: self.read().process,
            });
        }
        self.missed_before = self.all_missed()?;
        let capture = self.capture();
        // SAFETY: inside the mapping, which lives as long as `self`. These fields are those of whoever
        // holds the claim. The datapath reads them on other CPUs: each is an aligned word.
        unsafe {
            (&raw mut (*capture).pair).write_volatile(selection.pair.unwrap_or(0));
            (&raw mut (*capture).snap).write_volatile(selection.snap);
            (&raw mut (*capture).sample).write_volatile(u32::MAX / selection.sample);
            (&raw mut (*capture).process).write_volatile(process::id());
        }
        self.since = monotonic_now();
        Ok(())
    }

    /// Keeps the claim for a while longer.
    ///
    /// # Errors
    /// [`TapError::Lost`].
    pub fn renew(&mut self) -> Result<(), TapError> {
        if self.exchange(self.until, end(monotonic_now())) {
            Ok(())
        } else {
            Err(TapError::Lost)
        }
    }

    /// Ends the capture. What was copied can still be read.
    pub fn release(&mut self) {
        // Another's claim, if this one is lost, is left alone.
        self.exchange(self.until, 0);
    }

    /// Whether the maps are still those of the instance on the interface.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        inode(&self.pin.0).is_ok_and(|number| number == self.pin.1)
    }

    /// Whether the datapath has a stream of a pair at this moment.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn knows(&self, pair: u64) -> Result<bool, TapError> {
        let failed = |source| DatapathError::Map {
            map: names::STREAMS,
            source: Box::new(source),
        };
        let pin = pins::map_pin(&self.interface.name, names::STREAMS);
        let streams = Map::HashMap(MapData::from_pin(pin).map_err(failed)?);
        let streams: HashMap<_, [u8; KEY], [u8; VALUE]> =
            HashMap::try_from(streams).map_err(failed)?;
        Ok(streams.iter().flatten().any(|(_, stream)| {
            let stream: Stream = zerocopy::transmute!(stream);
            u64::from(stream.pair) == pair
        }))
    }

    /// Puts the next copy into `bytes`, and returns what stands before it; none where there is none at this
    /// moment.
    ///
    /// # Errors
    /// [`TapError::Lost`].
    pub fn next(&mut self, bytes: &mut Vec<u8>) -> Result<Option<Captured>, TapError> {
        loop {
            // Of two readers, each would set the ring buffer back to where it was itself: hence also no
            // copy is held while it is written, which may take long.
            if self.word().load(Ordering::Acquire) != self.until {
                return match self.until {
                    0 => Ok(None),
                    _ => Err(TapError::Lost),
                };
            }
            let Some(record) = self.captured.next() else {
                return Ok(None);
            };
            if let Ok((header, copy)) = Captured::read_from_prefix(&record)
                && header.time >= self.since
            {
                bytes.clear();
                bytes.extend_from_slice(copy);
                return Ok(Some(header));
            }
        }
    }

    /// Copies for which there was no room, since the capture began.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn missed(&self) -> Result<u64, TapError> {
        Ok(self.all_missed()?.wrapping_sub(self.missed_before))
    }

    fn all_missed(&self) -> Result<u64, TapError> {
        let values = self.kept.get(&0, 0);
        let values = values.map_err(|source| DatapathError::Map {
            map: names::KEPT,
            source: Box::new(source),
        })?;
        Ok(values
            .iter()
            .map(|bytes| {
                let kept: Kept = zerocopy::transmute!(*bytes);
                kept.missed
            })
            .fold(0, u64::wrapping_add))
    }

    /// Its part of `CONTROL`.
    fn capture(&self) -> *mut Capture {
        let control: *mut Control = self.control.as_mut_ptr().cast();
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { &raw mut (*control).capture }
    }

    fn read(&self) -> Capture {
        let capture = self.capture();
        // SAFETY: inside the mapping. Any bits are valid.
        unsafe { capture.read_volatile() }
    }

    fn word(&self) -> &AtomicU64 {
        let capture = self.capture();
        // SAFETY: an aligned word inside the mapping, which lives as long as `self`.
        unsafe { AtomicU64::from_ptr(&raw mut (*capture).until) }
    }

    fn exchange(&mut self, old: u64, new: u64) -> bool {
        let exchanged = self
            .word()
            .compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed);
        if exchanged.is_ok() {
            self.until = new;
        }
        exchanged.is_ok()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if self.until != 0 {
            self.release();
        }
    }
}

fn end(now: u64) -> u64 {
    now + CLAIM.as_nanos() as u64
}

fn inode(path: &Path) -> io::Result<u64> {
    fs::metadata(path).map(|metadata| metadata.ino())
}

fn only(mut interfaces: Vec<String>) -> Result<String, TapError> {
    match (interfaces.pop(), interfaces.is_empty()) {
        (None, _) => Err(TapError::NoInterface),
        (Some(one), true) => Ok(one),
        (Some(last), false) => {
            interfaces.push(last);
            Err(TapError::SeveralInterfaces(interfaces))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_chosen_only_where_there_is_one() {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        assert_eq!(only(names(&["eth0"])).expect("one"), "eth0");
        let error = only(names(&[])).expect_err("none").to_string();
        assert!(error.contains("attach IFACE"), "{error}");
        let error = only(names(&["eth0", "eth1"])).expect_err("two").to_string();
        assert!(error.contains("eth0 and eth1"), "{error}");
    }
}
