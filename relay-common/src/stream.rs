//! s
/// Payload types a stream can relay.
pub const PAYLOAD_TYPES: usize = 8;
