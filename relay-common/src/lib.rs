//! The relay's ABI and its whole per-packet decision: parse → look up → validate → rewrite →
//! account.
//!
//! Compiles for BPF and for the host, so that one body of code serves XDP, TC, the differential
//! test and the benchmark. It knows no aya types, allocates nothing and cannot panic.
#![no_std]
#![forbid(unsafe_op_in_unsafe_fn)]

mod abi;
pub mod arp;
pub mod capture;
pub mod checksum;
pub mod classify;
mod digest;
mod network;
pub mod packet;
mod parse;
pub mod proof;
pub mod reason;
pub mod reception;
pub mod relay;
mod rewrite;
mod state;
pub mod stream;
pub mod wire;
