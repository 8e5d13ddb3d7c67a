//! The harness of the integration tests and of the demo: simulated machines, phones, captures, a fake PBX,
//! a real Asterisk, and `relay-user` itself as a child process.
//!
//! Everything here needs root. Nothing here outlives the process: machines are anonymous namespaces, children die
//! with the process that started them, and so a killed test leaves nothing behind.

pub mod ami;
pub mod asterisk;
pub mod browser;
pub mod bulk;
pub mod capture;
pub mod crowd;
pub mod debian;
pub mod demo;
pub mod draft;
pub mod fixture;
pub mod generator;
pub mod kernel;
pub mod line;
pub mod link;
pub mod namespace;
pub mod pair;
pub mod pbx;
pub mod pcapng;
pub mod phone;
pub mod picture;
pub mod program;
pub mod promtool;
pub mod proof;
pub mod relay;
pub mod rtp;
pub mod scenario;
pub mod scene;
pub mod sip;
pub mod softphone;
pub mod tables;
pub mod terminal;
pub mod topology;
pub mod transit;
pub mod tun;
pub mod uplink;

mod datagram;
