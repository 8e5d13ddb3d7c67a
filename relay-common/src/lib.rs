//! The relay's ABI and its whole per-packet decision: parse → look up → validate → rewrite →
//! account.
//!
//! Compiles for BPF and for the host, so that one body of code serves XDP, TC, the differential
//! test and the benchmark. It knows no aya types, allocates nothing and cannot panic.
#![no_std]

pub mod stream;
