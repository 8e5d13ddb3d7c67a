//! As many streams as a map holds: written in batches, and their states mapped into memory.

use std::{
    fs, io, mem,
    os::fd::{AsFd as _, AsRawFd as _},
    ptr,
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Map, MapData};
use memmap2::{MmapOptions, MmapRaw};
use nix::libc;
use relay_common::stream::{State, Stream, StreamKey, StreamSpec};
use relay_user::datapath::names;
use zerocopy::{Immutable, IntoBytes};

use crate::kernel::Kernel;

/// Entries in one batch.
const BATCH: usize = 4096;

/// The states of all streams, by slot.
#[derive(Debug)]
pub struct States {
    memory: MmapRaw,
    slots: u32,
}

impl States {
    /// Sets what happened to the stream of a slot.
    ///
    /// # Panics
    /// There is no such slot.
    pub fn set(&self, slot: u32, state: State) {
        // SAFETY: inside the mapping and aligned; no program runs meanwhile.
        unsafe { self.slot(slot).write_volatile(state) };
    }

    /// What happened to the stream of a slot.
    ///
    /// # Panics
    /// There is no such slot.
    #[must_use]
    pub fn get(&self, slot: u32) -> State {
        // SAFETY: as above, and any bits are valid.
        unsafe { self.slot(slot).read_volatile() }
    }

    fn slot(&self, slot: u32) -> *mut State {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        // SAFETY: within the mapping, as just checked.
        unsafe { self.memory.as_mut_ptr().cast::<State>().add(slot as usize) }
    }
}

impl Kernel {
    /// Adds streams to those there are.
    ///
    /// # Errors
    /// There are more than fit.
    pub fn add(&mut self, streams: impl IntoIterator<Item = StreamSpec>) -> Result<()> {
        let mut streams = streams.into_iter();
        loop {
            let batch: Vec<_> = streams.by_ref().take(BATCH).collect();
            if batch.is_empty() {
                return Ok(());
            }
            let entries: Vec<(StreamKey, Stream)> =
                batch.iter().flat_map(StreamSpec::entries).collect();
            update(self.data(names::STREAMS)?, &entries).context(names::STREAMS)?;
        }
    }

    /// The states of all streams.
    ///
    /// # Errors
    /// The kernel does not map them.
    pub fn states(&self) -> Result<States> {
        let map = self.data(names::STATE)?;
        let slots = map.info()?.max_entries();
        let memory = MmapOptions::new()
            .len(slots as usize * size_of::<State>())
            .map_raw(&map.fd().as_fd())?;
        Ok(States { memory, slots })
    }

    /// What the kernel says that each map takes, bytes.
    ///
    /// # Errors
    /// It does not say.
    pub fn memory(&self) -> Result<Vec<(&'static str, u64)>> {
        let of_map = |name| {
            let descriptor = self.data(name)?.fd().as_fd().as_raw_fd();
            let text = fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}"))?;
            let bytes = text.lines().find_map(|line| line.strip_prefix("memlock:"));
            let bytes = bytes.context("no memlock in fdinfo")?.trim().parse()?;
            Ok((name, bytes))
        };
        names::MAPS.into_iter().map(of_map).collect()
    }

    fn data(&self, name: &str) -> Result<&MapData> {
        let (Map::HashMap(data) | Map::Array(data) | Map::PerCpuArray(data) | Map::RingBuf(data)) =
            self.map(name)?
        else {
            anyhow::bail!("map {name} is of another type");
        };
        Ok(data)
    }
}

/// Writes entries with one system call (`BPF_MAP_UPDATE_BATCH`, Linux 5.6).
fn update<K, V>(map: &MapData, entries: &[(K, V)]) -> Result<()>
where
    K: IntoBytes + Immutable,
    V: IntoBytes + Immutable,
{
    /// `struct { … } batch` of `union bpf_attr`.
    #[repr(C)]
    struct Batch {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: u32,
        element_flags: u64,
        flags: u64,
    }
    const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
    if entries.is_empty() {
        return Ok(());
    }
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for (key, value) in entries {
        keys.extend_from_slice(key.as_bytes());
        values.extend_from_slice(value.as_bytes());
    }
    let mut batch = Batch {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr().addr() as u64,
        values: values.as_ptr().addr() as u64,
        count: entries.len() as u32,
        map: map.fd().as_fd().as_raw_fd().cast_unsigned(),
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: the kernel reads and writes the size of `batch`, whose pointers describe live buffers of `count` keys
    // and values.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_MAP_UPDATE_BATCH,
            ptr::from_mut(&mut batch),
            mem::size_of::<Batch>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error().into());
    }
    let written = batch.count as usize;
    ensure!(written == entries.len(), "{written} of {}", entries.len());
    Ok(())
}
