//! The clock that the datapath shares.

use nix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC` in nanoseconds, which neither a change of the time of day nor a suspended host
/// moves.
///
/// The datapath reads `CLOCK_MONOTONIC_COARSE`, which is the same behind by one timer tick at most.
#[must_use]
pub fn monotonic() -> u64 {
    // It fails for clocks that do not exist only.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(u64::MAX, |now| {
        now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
    })
}
