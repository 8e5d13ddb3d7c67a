//! The maps in memory: what the decision runs on outside the kernel.

use std::{
    cell::{Cell, UnsafeCell},
    collections::HashMap,
};

use relay_common::{
    packet::Tables,
    reason::Reason,
    stream::{Counter, State, Stream, StreamKey, StreamSpec},
};

/// A stream and its mode (see [`relay_common::stream::mode`]).
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The stream.
    pub stream: StreamSpec,
    /// The mode its state says.
    pub mode: u32,
}

/// `STREAMS`, `STATE` and `COUNTERS` of one thread.
#[derive(Debug)]
pub struct MemoryTables {
    streams: HashMap<StreamKey, Stream>,
    states: Vec<UnsafeCell<State>>,
    counters: [Cell<Counter>; Reason::COUNT],
}

impl MemoryTables {
    /// Tables with these streams and `slots` states. A stream whose slot lies beyond has no state.
    #[must_use]
    pub fn new(entries: &[Entry], slots: u32) -> Self {
        let mut states: Vec<_> = (0..slots).map(|_| State::default()).collect();
        for entry in entries {
            if let Some(state) = states.get_mut(entry.stream.slot as usize) {
                state.mode = entry.mode;
            }
        }
        Self {
            streams: entries
                .iter()
                .map(|entry| (entry.stream.key(), entry.stream.compile()))
                .collect(),
            states: states.into_iter().map(UnsafeCell::new).collect(),
            counters: Default::default(),
        }
    }

    /// A stream's state; none where the slot lies beyond the table.
    #[must_use]
    pub fn state_of(&self, slot: u32) -> Option<State> {
        // SAFETY: not `Sync`, and nothing keeps a reference: no one writes at this moment.
        self.states
            .get(slot as usize)
            .map(|state| unsafe { *state.get() })
    }

    /// What was counted, by number of the reason.
    #[must_use]
    pub fn counters(&self) -> [Counter; Reason::COUNT] {
        self.counters.each_ref().map(Cell::get)
    }
}

impl Tables for MemoryTables {
    fn stream(&self, key: &StreamKey) -> Option<&Stream> {
        self.streams.get(key)
    }

    fn state(&self, slot: u32) -> Option<*mut State> {
        self.states.get(slot as usize).map(UnsafeCell::get)
    }

    fn count(&self, reason: Reason, bytes: usize) {
        let counter = &self.counters[reason as usize];
        let Counter {
            packets,
            bytes: sum,
        } = counter.get();
        counter.set(Counter {
            packets: packets + 1,
            bytes: sum + bytes as u64,
        });
    }
}
