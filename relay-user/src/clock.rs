//! The one clock that the controller and the datapath share.

use std::time::{Duration, SystemTime};

use nix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC` in nanoseconds: what the lease is written in, and what ticks are made of.
///
/// It does not jump when the time of day is set. It stands still while the machine is suspended, as
/// the datapath does.
///
/// # Panics
/// On a kernel without that clock, which there is not.
#[must_use]
pub fn monotonic_now() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock");
    let (seconds, nanoseconds) = (now.tv_sec().cast_unsigned(), now.tv_nsec().cast_unsigned());
    seconds * 1_000_000_000 + nanoseconds
}

/// What the time of day was, since the Unix epoch, when `CLOCK_MONOTONIC` showed 0. It changes when the
/// time of day is set, or the machine was suspended.
#[must_use]
pub fn monotonic_origin() -> Duration {
    let before = monotonic_now();
    let day = SystemTime::now();
    let now = u64::midpoint(before, monotonic_now());
    day.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .saturating_sub(Duration::from_nanos(now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_origin_and_the_clock_make_the_time_of_day() {
        let before = SystemTime::now();
        let now =
            SystemTime::UNIX_EPOCH + monotonic_origin() + Duration::from_nanos(monotonic_now());
        let slack = Duration::from_millis(1);
        assert!(before - slack <= now && now <= SystemTime::now() + slack);
    }

    #[test]
    fn it_is_the_clock_that_the_kernel_shows() {
        let uptime = || {
            let text = std::fs::read_to_string("/proc/timer_list").ok()?;
            let now = text.lines().find_map(|line| line.strip_prefix("now at "))?;
            now.split(' ').next()?.parse::<u64>().ok()
        };
        let before = monotonic_now();
        if let Some(kernel) = uptime() {
            assert!(before <= kernel && kernel <= monotonic_now(), "{kernel}");
        }
        assert!(before <= monotonic_now());
    }
}
