//! The AMI feed: which pairs Asterisk has bridged, and which of them may be offloaded.
//!
//! [`codec`] turns bytes into [`message`]s, [`session`] logs in and correlates requests with
//! answers, [`tracker`] decides without any I/O, [`conditions`] are the rules it decides by, and
//! [`feed`] drives all of it for the daemon.

pub mod codec;
pub mod conditions;
pub mod feed;
pub mod message;
pub mod session;
pub mod tracker;

#[cfg(test)]
mod recording;
#[cfg(test)]
mod replay;
#[cfg(test)]
mod server;
#[cfg(test)]
mod simulation;

pub use feed::{CallId, FeedCommand, FeedEvent, FeedSettings, Proving, run};
pub use session::{AmiError, PRIVILEGES, Session, connect};
pub use tracker::BRIDGES;
