//! How much a log may grow: each place in the code has so many messages at once, and so many later. What
//! it says beyond is counted and told as one.

use std::{
    collections::HashMap,
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tracing::{
    Event, Level, Subscriber,
    callsite::Identifier,
    field::{Field, Visit},
};
use tracing_subscriber::layer::{Context, Layer};

/// Messages of one place that come at once.
pub(super) const BURST: u32 = 20;
/// After how long it may have one more. With a burst a day's flood is some 9,000 lines, or 2 MB.
const REFILL: Duration = Duration::from_secs(10);
/// How often suppressed messages of one place are told of, at most.
const TELLING: Duration = Duration::from_secs(60);

/// Lets through what each place in the code has left; every place of level INFO, WARN or ERROR. What is
/// told only on request (`-v`) is not limited.
#[derive(Debug, Default)]
pub(super) struct Limit(Mutex<HashMap<Identifier, Place>>);

/// Messages that were not logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Suppressed {
    /// How many.
    pub(super) count: u64,
    /// The words that all of them begin with.
    pub(super) like: String,
    /// Whether they were informational.
    pub(super) is_info: bool,
}

#[derive(Debug)]
struct Place {
    bucket: Bucket,
    /// The latest message that was suppressed.
    like: String,
    is_info: bool,
}

impl Limit {
    /// What was suppressed and is to be told now; `all` for what was told a moment ago too.
    pub(super) fn drain(&self, now: Instant, all: bool) -> Vec<Suppressed> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        places
            .values_mut()
            .filter_map(|place| {
                let count = place.bucket.drain(now, all)?;
                Some(Suppressed {
                    count,
                    like: place.like.clone(),
                    is_info: place.is_info,
                })
            })
            .collect()
    }
}

impl<S: Subscriber> Layer<S> for &'static Limit {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        // What tells of suppressed messages is limited by itself.
        if *metadata.level() > Level::INFO || metadata.target() == super::TARGET {
            return true;
        }
        let now = Instant::now();
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = places.entry(metadata.callsite()).or_insert_with(|| Place {
            bucket: Bucket::new(now),
            like: String::new(),
            is_info: *metadata.level() == Level::INFO,
        });
        let admitted = place.bucket.admit(now);
        if !admitted {
            place.like.clear();
            event.record(&mut Words(&mut place.like));
        }
        admitted
    }
}

/// What one place may say.
#[derive(Debug)]
struct Bucket {
    left: u32,
    refilled: Instant,
    suppressed: u64,
    told: Option<Instant>,
}

impl Bucket {
    fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            refilled: now,
            suppressed: 0,
            told: None,
        }
    }

    fn admit(&mut self, now: Instant) -> bool {
        let refills = now.saturating_duration_since(self.refilled).as_secs() / REFILL.as_secs();
        if refills > 0 {
            let refills = u32::try_from(refills).unwrap_or(u32::MAX);
            self.left = self.left.saturating_add(refills).min(BURST);
            self.refilled = now;
        }
        if self.left == 0 {
            self.suppressed += 1;
            return false;
        }
        self.left -= 1;
        true
    }

    fn drain(&mut self, now: Instant, all: bool) -> Option<u64> {
        let is_early = self.told.is_some_and(|told| now < told + TELLING);
        if self.suppressed == 0 || (is_early && !all) {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.suppressed))
    }
}

/// Takes the message of an event, and none of its fields.
struct Words<'a>(&'a mut String);

impl Visit for Words<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            *self.0 = format!("{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_to_a_burst_and_a_trickle() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        let flood = |bucket: &mut Bucket, now| (0..1000).filter(|_| bucket.admit(now)).count();
        assert_eq!(flood(&mut bucket, start), BURST as usize);
        assert_eq!(flood(&mut bucket, start + REFILL / 2), 0);
        assert_eq!(flood(&mut bucket, start + REFILL), 1);
        assert_eq!(flood(&mut bucket, start + 3 * REFILL), 2);
        assert_eq!(flood(&mut bucket, start + 1000 * REFILL), BURST as usize);
    }

    #[test]
    fn what_was_suppressed_is_told_once_and_not_too_often() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        assert_eq!(bucket.drain(start, false), None);
        let flood = |bucket: &mut Bucket, now| (0..100).filter(|_| bucket.admit(now)).count();
        flood(&mut bucket, start);
        assert_eq!(bucket.drain(start, false), Some(80));
        assert_eq!(bucket.drain(start, true), None);
        flood(&mut bucket, start);
        assert_eq!(bucket.drain(start + TELLING / 2, false), None);
        assert_eq!(bucket.drain(start + TELLING, false), Some(100));
        flood(&mut bucket, start);
        assert_eq!(bucket.drain(start + TELLING, true), Some(100));
    }
}
