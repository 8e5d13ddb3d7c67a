//! Queueing at the line: HTB with the classes of a policy, and a BPF classifier that sorts packets
//! into them.
//!
//! [`shaper`] builds and removes, [`report`] tells. What was there before is kept and put back.

pub mod auto;
pub mod classifier;
mod htb;
pub mod kernel;
pub mod leaf;
pub mod object;
pub mod policy;
pub mod rate;
mod ratespec;
mod rehearsal;
pub mod report;
mod shape;
pub mod shaper;
mod state;
pub mod table;
mod tbf;
pub mod tree;
pub mod trigger;

pub use self::state::StateError;
