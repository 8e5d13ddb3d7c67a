//! How queueing disciplines are told rates, in host byte order.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `struct tc_ratespec` of include/uapi/linux/pkt_sched.h.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RateSpec {
    cell_log: u8,
    linklayer: u8,
    overhead: u16,
    cell_align: i16,
    mpu: u16,
    /// In byte/s.
    pub(super) rate: u32,
}

impl RateSpec {
    /// No rate at all.
    pub(super) const NONE: Self = Self {
        cell_log: 0,
        linklayer: 0,
        overhead: 0,
        cell_align: 0,
        mpu: 0,
        rate: 0,
    };

    /// A rate in byte/s. Where it does not fit, it is full: what counts then are the 64 bits in an
    /// attribute beside it (psched_ratecfg_precompute() in net/sched/sch_generic.c).
    pub(super) fn new(rate: u64) -> Self {
        /// `TC_LINKLAYER_ETHERNET`: the kernel computes times itself, and wants no table of them
        /// (htb_change_class() in net/sched/sch_htb.c).
        const LINK_LAYER_ETHERNET: u8 = 1;
        Self {
            linklayer: LINK_LAYER_ETHERNET,
            rate: rate.try_into().unwrap_or(u32::MAX),
            ..Self::NONE
        }
    }
}
