//! Why a packet was relayed or passed: one numbered table.

/// Declares the reasons once: number, name and meaning cannot drift apart.
macro_rules! reasons {
    ($($(#[doc = $doc:literal])* $variant:ident = $number:literal $name:literal,)*) => {
        /// Why a packet was relayed or passed to the stack.
        ///
        /// Append only: the number indexes the `COUNTERS` map, the name is the metric label.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Reason {
            $($(#[doc = $doc])* $variant = $number,)*
        }

        impl Reason {
            /// Every reason, by number.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();

            /// The name in output, API and metrics.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What it means, for an operator.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc,)*).trim_ascii_start(),)* }
            }
        }
    };
}

reasons! {
    /// rewritten and sent by the kernel
    Relayed = 0 "relayed",
    /// the frame ends inside a header that it announces
    Truncated = 1 "truncated",
    /// neither IPv4 nor IPv6
    NotIp = 2 "not_ip",
    /// more than two VLAN tags
    VlanDepth = 3 "vlan_depth",
    /// lengths or version in the headers contradict each other
    Malformed = 4 "malformed",
    /// IPv4 options or IPv6 extension headers
    IpOptions = 5 "ip_options",
    /// a fragment of a larger packet
    Fragment = 6 "fragment",
    /// IP, but not UDP
    NotUdp = 7 "not_udp",
    /// no stream has this local address and port
    NoStream = 8 "no_stream",
    /// the frame is addressed to another machine's MAC
    OtherHost = 9 "other_host",
    /// the stream is not offloaded yet
    Watching = 10 "watching",
    /// the stream was taken back
    Suspended = 11 "suspended",
    /// not from the address and port that the stream expects
    UnexpectedSource = 12 "unexpected_source",
    /// not RTP version 2
    NotRtp = 13 "not_rtp",
    /// shorter than its RTP header
    RtpLength = 14 "rtp_length",
    /// the stream does not relay this payload type
    PayloadType = 15 "payload_type",
    /// TTL or hop limit used up
    HopLimit = 16 "hop_limit",
    /// larger than the MTU of the way out
    TooBig = 17 "too_big",
    /// no neighbour known for the way out
    NextHopUnknown = 18 "next_hop_unknown",
    /// tags other than the way out needs
    VlanMismatch = 19 "vlan_mismatch",
    /// UDP checksum missing on IPv6, or of unclear state
    UdpChecksum = 20 "udp_checksum",
    /// the stream's state is missing: a fault of the controller
    NoState = 21 "no_state",
    /// RTP with padding, which Asterisk takes off
    RtpPadding = 22 "rtp_padding",
    /// the controller has not renewed its lease
    LeaseOver = 23 "lease_over",
    /// RTCP, which never leaves Asterisk
    Rtcp = 24 "rtcp",
    /// passed up lest Asterisk miss the phone; its echo is compared
    Keepalive = 25 "keepalive",
    /// the first packet of a new synchronisation source, to be proven
    NewSsrc = 26 "new_ssrc",
    /// the first packet after a pause, to be proven
    AfterPause = 27 "after_pause",
    /// an earlier packet is still on its way through Asterisk
    AwaitingEcho = 28 "awaiting_echo",
    /// sent by Asterisk, equal to a packet that was passed up
    Echo = 29 "echo",
    /// sent by Asterisk on a stream that is watched, equal to no packet that was passed up
    Unequal = 30 "unequal",
    /// sent by Asterisk itself on a stream that was offloaded, which ends that
    TalkBack = 31 "talk_back",
    /// Asterisk's keepalive into a stream that flows: dropped, as it would not have been sent
    ComfortNoise = 32 "comfort_noise",
    /// several packets merged into one by the NIC or its driver
    Aggregate = 33 "aggregate",
    /// dropped: the kernel had no memory to change its VLAN tags
    RetagFailed = 34 "retag_failed",
}

/// What the hook does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send the rewritten packet to the stream's next hop.
    Send,
    /// Leave the untouched packet to the stack: to Asterisk on its way in, to the phone on its way
    /// out.
    Pass,
    /// Take the packet away.
    Drop,
}

impl Reason {
    /// The single place where a reason becomes an action.
    #[inline(always)]
    #[must_use]
    pub const fn verdict(self) -> Verdict {
        match self {
            Self::Relayed => Verdict::Send,
            Self::ComfortNoise | Self::RetagFailed => Verdict::Drop,
            _ => Verdict::Pass,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_index_and_names_are_labels() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert!(!reason.meaning().is_empty());
            assert!(
                reason
                    .name()
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
            );
            assert!(
                Reason::ALL[..index]
                    .iter()
                    .all(|other| other.name() != reason.name())
            );
        }
    }

    #[test]
    fn the_description_lists_every_reason() {
        extern crate std;
        use std::format;

        let description = include_str!("../../docs/datapath.md");
        for reason in Reason::ALL {
            let (name, meaning) = (reason.name(), reason.meaning());
            let row = format!("| {} | `{name}` | {meaning} |\n", *reason as u32);
            assert!(description.contains(&row), "docs/datapath.md misses {row}");
        }
    }

    #[test]
    fn whatever_is_in_doubt_passes() {
        for reason in Reason::ALL {
            let verdict = match reason {
                Reason::Relayed => Verdict::Send,
                Reason::ComfortNoise | Reason::RetagFailed => Verdict::Drop,
                _ => Verdict::Pass,
            };
            assert_eq!(reason.verdict(), verdict, "{reason:?}");
        }
    }
}
