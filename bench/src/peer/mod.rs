//! What the relay is compared with: other ways to relay the same calls.

pub(crate) mod asterisk;
pub(crate) mod batched;
pub(crate) mod nftables;
pub(crate) mod per_call;
pub(crate) mod rtpengine;
pub(crate) mod swap;
