//! Access to a [`State`](crate::stream::State) that other CPUs and the controller share.

/// Reads a field of the `State` behind a pointer.
macro_rules! load {
    ($state:expr, $($field:tt)+) => {{
        let state: *mut $crate::stream::State = $state;
        // SAFETY: `Tables::state` points into a map that outlives the packet. Others write the
        // field meanwhile, hence volatile; an aligned word cannot tear.
        unsafe { (&raw const (*state).$($field)+).read_volatile() }
    }};
}

/// Writes a field of the `State` behind a pointer.
macro_rules! store {
    ($state:expr, $value:expr, $($field:tt)+) => {{
        let state: *mut $crate::stream::State = $state;
        let value = $value;
        // SAFETY: as for `load`. See `State` for who may write which field.
        unsafe { (&raw mut (*state).$($field)+).write_volatile(value) }
    }};
}

pub(crate) use {load, store};
