//! The relay's controller: feeds, registry, datapath, next hops and control API.
//!
//! The binary of this crate only parses arguments and calls in here.

pub mod datapath;
pub mod next_hop;
pub mod ami;
pub mod pair;
