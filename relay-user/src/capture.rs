//! `relay-user capture`: copies of what the datapath sees, written as pcapng.

pub mod pcapng;

use std::{io, pin::pin, time::Duration};

use tokio::time::{MissedTickBehavior, interval, sleep};

use self::pcapng::Writer;
use crate::{
    clock::Now,
    datapath::{Tap, TapError},
};

/// How often copies are fetched: at 4,096 packets of G.711 in the ring buffer, 400,000 copies a second.
const FETCH: Duration = Duration::from_millis(10);

/// How often the claim is renewed, which holds for 3 s.
const RENEW: Duration = Duration::from_millis(500);

/// When to stop, unless asked to before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// After so many copies.
    pub count: Option<u64>,
    /// After so long.
    pub time: Option<Duration>,
}

/// What became of a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Copies written.
    pub captured: u64,
    /// Copies that the ring buffer had no room for.
    pub missed: u64,
    /// Whether it ended because the relay was detached.
    pub detached: bool,
}

/// Why a capture failed.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The datapath.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The file.
    #[error("cannot write the capture: {0}")]
    Write(#[source] io::Error),
}

/// Writes what a claimed tap copies, until a limit, until `stop` completes, until nobody reads `out` any
/// longer, or until the relay is detached.
///
/// # Errors
/// [`CaptureError`]; where the disk is full, the last packet may be cut short.
pub async fn run<W: io::Write>(
    tap: &mut Tap,
    out: W,
    snap: u32,
    limits: Limits,
    stop: impl Future<Output = ()>,
) -> Result<Summary, CaptureError> {
    let mut capture = Capture {
        captured: 0,
        limit: limits.count.unwrap_or(u64::MAX),
        bytes: Vec::new(),
    };
    let detached = match Writer::new(out, tap.interface(), snap, Now::read().origin()) {
        Ok(mut writer) => capture.follow(tap, &mut writer, limits.time, stop).await,
        Err(error) => Err(error.into()),
    };
    tap.release();
    let detached = match detached {
        Ok(detached) => detached,
        // The reader has seen enough.
        Err(Stop::Write(error)) if error.kind() == io::ErrorKind::BrokenPipe => false,
        Err(Stop::Write(error)) => return Err(CaptureError::Write(error)),
        Err(Stop::Tap(error)) => return Err(error.into()),
    };
    Ok(Summary {
        captured: capture.captured,
        missed: tap.missed()?,
        detached,
    })
}

/// What stops a capture.
enum Stop {
    Write(io::Error),
    Tap(TapError),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Write(error)
    }
}

struct Capture {
    captured: u64,
    limit: u64,
    /// The latest copy.
    bytes: Vec<u8>,
}

impl Capture {
    /// Returns whether the relay was detached.
    async fn follow<W: io::Write>(
        &mut self,
        tap: &mut Tap,
        writer: &mut Writer<W>,
        time: Option<Duration>,
        stop: impl Future<Output = ()>,
    ) -> Result<bool, Stop> {
        let mut stop = pin!(stop);
        let mut over = pin!(async {
            match time {
                Some(time) => sleep(time).await,
                None => std::future::pending().await,
            }
        });
        let (mut fetch, mut renew) = (interval(FETCH), interval(RENEW));
        for turns in [&mut fetch, &mut renew] {
            turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        loop {
            tokio::select! {
                biased;
                () = &mut stop => break,
                () = &mut over => break,
                _ = renew.tick() => {
                    tap.renew().map_err(Stop::Tap)?;
                    if !tap.is_attached() {
                        self.fetch(tap, writer)?;
                        return Ok(true);
                    }
                }
                _ = fetch.tick() => {
                    self.fetch(tap, writer)?;
                    if self.captured == self.limit {
                        return Ok(false);
                    }
                }
            }
        }
        tap.release();
        self.fetch(tap, writer)?;
        Ok(false)
    }

    /// Writes all copies that there are, up to the limit.
    fn fetch<W: io::Write>(&mut self, tap: &mut Tap, writer: &mut Writer<W>) -> Result<(), Stop> {
        let before = self.captured;
        while self.captured < self.limit {
            let copied = tap.next(&mut self.bytes).map_err(Stop::Tap)?;
            let Some(header) = copied else {
                break;
            };
            writer.packet(&header, &self.bytes)?;
            self.captured += 1;
        }
        if self.captured != before {
            writer.flush()?;
        }
        Ok(())
    }
}
