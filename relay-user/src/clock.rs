//! The one clock that the controller and the datapath share, and the time of day.

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

/// The time of day in UTC as RFC 3339 writes it, with milliseconds.
#[must_use]
pub fn utc_now() -> String {
    utc(SystemTime::now())
}

/// A time of day, written likewise.
#[must_use]
pub fn utc(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

/// One moment on two clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// [`monotonic_now`], ns.
    pub monotonic: u64,
    /// The time of day.
    pub wall: SystemTime,
}

impl Now {
    /// This moment.
    #[must_use]
    pub fn read() -> Self {
        Self {
            monotonic: monotonic_now(),
            wall: SystemTime::now(),
        }
    }

    /// The time of day of a moment on the monotonic clock, ns, as long as nobody set it in between.
    #[must_use]
    pub fn wall_time_of(&self, monotonic: u64) -> SystemTime {
        // A moment that a driver saw may be later than this one was read.
        let ago = Duration::from_nanos(self.monotonic.saturating_sub(monotonic));
        self.wall.checked_sub(ago).unwrap_or(self.wall)
    }

    /// What the time of day would have been, since the Unix epoch, when the monotonic clock showed 0.
    #[must_use]
    pub fn origin(&self) -> Duration {
        let since_epoch = self.wall.duration_since(SystemTime::UNIX_EPOCH);
        since_epoch
            .unwrap_or_default()
            .saturating_sub(Duration::from_nanos(self.monotonic))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_origin_and_the_clock_make_the_time_of_day() {
        let now = Now::read();
        let day = SystemTime::UNIX_EPOCH + now.origin() + Duration::from_nanos(now.monotonic);
        assert_eq!(day, now.wall);
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
