//! The relay's controller: feeds, registry, datapath, next hops and control API.
//!
//! The binary of this crate only parses arguments and calls in here.

pub mod ami;
pub mod capture;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod controller;
pub mod daemon;
pub mod datapath;
pub mod doctor;
pub mod document;
pub mod dscp;
pub mod events;
pub mod listing;
pub mod logging;
pub mod metrics;
pub mod netlink;
pub mod next_hop;
pub mod output;
pub mod pair;
pub mod priority;
pub mod privileges;
pub mod qos;
pub mod quality;
pub mod reception;
pub mod registry;
pub mod secret;
pub mod snapshot;
pub mod source;
pub mod stats;
pub mod top;
pub mod web;
