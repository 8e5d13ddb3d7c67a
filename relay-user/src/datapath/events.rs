//! What the datapath reports: the ring buffer `EVENTS`.

use std::{future::pending, io};

use aya::maps::{MapData, RingBuf};
use relay_common::stream::Event;
use tokio::io::{Interest, unix::AsyncFd};
use zerocopy::FromBytes as _;

/// The datapath's events, in their order. Those that nobody read yet stay when the process ends, for
/// one that adopts the datapath.
pub struct Events(AsyncFd<RingBuf<MapData>>);

impl Events {
    pub(super) fn new(ring: RingBuf<MapData>) -> io::Result<Self> {
        // SAFETY: the map's descriptor is open as long as the ring buffer, which owns it and never
        // exchanges it.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) };
        Ok(Self(ring?))
    }

    /// The next event. An event is not lost when the future is dropped before it is ready.
    pub async fn next(&mut self) -> Event {
        loop {
            // The kernel wakes a reader only when the buffer was empty to it: read before waiting.
            while let Some(bytes) = self.0.get_mut().next() {
                match Event::read_from_bytes(&bytes) {
                    Ok(event) => return event,
                    // Only a datapath of another layout writes such, and this is none.
                    Err(_) => tracing::error!(length = bytes.len(), "an event of a wrong length"),
                }
            }
            match self.0.readable_mut().await {
                Ok(mut ready) => ready.clear_ready(),
                // The event loop ends, and this with it.
                Err(_) => return pending().await,
            }
        }
    }
}
