//! The relay's controller: feeds, registry, datapath, next hops and control API.
//!
//! The binary of this crate only parses arguments and calls in here.

pub mod datapath;
pub mod next_hop;
pub mod ami;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod logging;
pub mod output;
pub mod pair;
pub mod registry;
pub mod secret;
