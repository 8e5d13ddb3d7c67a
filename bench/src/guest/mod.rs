//! Suite `guest`: instructions for each packet, counted by a machine that executes one every nanosecond.

mod cost;
pub(crate) mod inside;
mod pbx;
mod subject;
mod traffic;
