//! The maps in memory: what the decision runs on outside the kernel.

use std::{
    array,
    cell::{Cell, RefCell, UnsafeCell},
    collections::HashMap,
};

use relay_common::{
    capture::{Capture, Captured, Kept},
    packet::Tables,
    reason::Reason,
    reception::Reception,
    stream::{Control, Counter, Event, State, Stream, StreamKey, StreamSpec},
};
use zerocopy::FromZeros as _;

/// A stream and how it fares.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The stream.
    pub stream: StreamSpec,
    /// Its state, at the time [`NOW`].
    pub state: State,
}

/// What the clock of [`MemoryTables`] shows first, ns: far from 0, and from where ticks wrap.
pub const NOW: u64 = 100_000_000_000_000;

/// What [`MemoryTables`] has for a random number.
pub const RANDOM: u32 = 1000;

/// What each DSCP is translated to, none to itself.
pub const TRANSLATED: [u8; 64] = {
    let mut table = [0; 64];
    let mut dscp = 0;
    while dscp < 64 {
        table[dscp] = ((dscp * 5 + 7) % 64) as u8;
        dscp += 1;
    }
    table
};

/// The fields of a state that hold a time.
const fn times(state: &mut State) -> [&mut u32; 6] {
    [
        &mut state.last_seen,
        &mut state.last_passed,
        &mut state.spoken,
        &mut state.last_rtcp,
        &mut state.reported,
        &mut state.sent_reported,
    ]
}

/// A state with all its times later by so many ticks. What has never happened still has not.
#[must_use]
pub fn later(mut state: State, ticks: u32) -> State {
    for time in times(&mut state) {
        if *time != 0 {
            *time = time.wrapping_add(ticks);
        }
    }
    if state.reception.arrival != 0 {
        state.reception.arrival += u64::from(ticks) << 20;
    }
    state
}

/// A state without its times, but for whether they are set: to compare states of different clocks.
#[must_use]
pub fn timeless(mut state: State) -> State {
    for time in times(&mut state) {
        *time = u32::from(*time != 0);
    }
    state.reception = Reception {
        arrival: u64::from(state.reception.arrival != 0),
        jitter: 0,
        jitter_max: 0,
        jitter_sum: 0,
        gap_max: 0,
        ..state.reception
    };
    state
}

/// The maps of one thread.
#[derive(Debug)]
pub struct MemoryTables {
    streams: HashMap<StreamKey, Stream>,
    states: Vec<UnsafeCell<State>>,
    counters: [Cell<Counter>; Reason::COUNT],
    now: Cell<u64>,
    events: RefCell<Vec<Event>>,
    control: Cell<Control>,
    kept: Cell<Kept>,
    captured: RefCell<Vec<(Captured, Vec<u8>)>>,
}

impl MemoryTables {
    /// Tables with these streams and `slots` states. A stream whose slot lies beyond has no state. The lease never
    /// ends.
    #[must_use]
    pub fn new(entries: &[Entry], slots: u32) -> Self {
        let mut states = vec![State::default(); slots as usize];
        for entry in entries {
            if let Some(state) = states.get_mut(entry.stream.slot as usize) {
                *state = entry.state;
            }
        }
        Self {
            streams: entries
                .iter()
                .flat_map(|entry| entry.stream.entries())
                .collect(),
            states: states.into_iter().map(UnsafeCell::new).collect(),
            counters: array::from_fn(|_| Cell::default()),
            now: Cell::new(NOW),
            events: RefCell::default(),
            control: Cell::new(Control {
                lease: u64::MAX,
                capture: Capture::default(),
            }),
            kept: Cell::new(Kept::new_zeroed()),
            captured: RefCell::default(),
        }
    }

    /// Sets the end of the lease, ns.
    pub fn set_lease(&self, deadline: u64) {
        let capture = self.control.get().capture;
        self.control.set(Control {
            lease: deadline,
            capture,
        });
    }

    /// Sets the clock, ns.
    pub fn set_now(&self, now: u64) {
        self.now.set(now);
    }

    /// A stream's state; none where the slot lies beyond the table.
    #[must_use]
    pub fn state_of(&self, slot: u32) -> Option<State> {
        // SAFETY: not `Sync`, and nothing keeps a reference: no one writes at this moment.
        self.states
            .get(slot as usize)
            .map(|state| unsafe { *state.get() })
    }

    /// Changes a stream's state, as the controller does.
    ///
    /// # Panics
    /// The slot lies beyond the table.
    pub fn change(&self, slot: u32, change: impl FnOnce(&mut State)) {
        // SAFETY: as for `state_of`; a change has no way to these tables' states but its own.
        change(unsafe { &mut *self.states[slot as usize].get() });
    }

    /// What was counted, by number of the reason.
    #[must_use]
    pub fn counters(&self) -> [Counter; Reason::COUNT] {
        self.counters.each_ref().map(Cell::get)
    }

    /// Sets what is captured.
    pub fn set_capture(&self, capture: Capture) {
        let lease = self.control.get().lease;
        self.control.set(Control { lease, capture });
    }

    /// What was captured since the last call: each header, and the bytes behind it.
    pub fn take_captured(&self) -> Vec<(Captured, Vec<u8>)> {
        self.captured.take()
    }

    /// What was reported since the last call.
    pub fn take_events(&self) -> Vec<Event> {
        self.events.take()
    }
}

impl Tables for MemoryTables {
    fn stream(&self, key: &StreamKey) -> Option<&Stream> {
        self.streams.get(key)
    }

    fn state(&self, slot: u32) -> Option<*mut State> {
        self.states.get(slot as usize).map(UnsafeCell::get)
    }

    fn translated(&self, dscp: u8) -> u8 {
        TRANSLATED[usize::from(dscp)]
    }

    fn now(&self) -> u64 {
        self.now.get()
    }

    fn now_precise(&self) -> u64 {
        self.now.get()
    }

    fn report(&self, event: &Event) {
        self.events.borrow_mut().push(*event);
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

    fn control(&self) -> Option<*const Control> {
        Some(self.control.as_ptr())
    }

    fn kept(&self) -> Option<*mut Kept> {
        Some(self.kept.as_ptr())
    }

    fn hand_over(&self, kept: &Kept) -> bool {
        let bytes = kept.bytes[..kept.length as usize].to_vec();
        self.captured.borrow_mut().push((kept.header, bytes));
        true
    }

    fn random(&self) -> u32 {
        RANDOM
    }
}
