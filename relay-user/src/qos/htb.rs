//! The options of HTB as the kernel takes and tells them: `TCA_HTB_*` of
//! include/uapi/linux/pkt_sched.h, in host byte order.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{object::Attribute, ratespec::RateSpec};

/// Name of the queueing discipline.
pub(super) const KIND: &str = "htb";

const TCA_HTB_PARMS: u16 = 1;
const TCA_HTB_INIT: u16 = 2;
const TCA_HTB_RATE64: u16 = 6;
const TCA_HTB_CEIL64: u16 = 7;

/// Major number of `HTB_VER` in net/sched/sch_htb.c.
const VERSION: u32 = 3;
/// `PSCHED_SHIFT` of include/net/pkt_sched.h: bursts are told in ticks of 64 ns.
const NANOSECONDS_PER_TICK: u64 = 64;

/// What a soft interrupt that follows a high-resolution timer may be late, in ticks: 2 ms.
const LATENESS: u32 = (2_000_000 / NANOSECONDS_PER_TICK) as u32;

/// `struct tc_htb_opt`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Options {
    rate: RateSpec,
    ceil: RateSpec,
    buffer: u32,
    cbuffer: u32,
    quantum: u32,
    level: u32,
    prio: u32,
}

/// `struct tc_htb_glob`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Globals {
    version: u32,
    rate2quantum: u32,
    defcls: u32,
    debug: u32,
    direct_pkts: u32,
}

/// What we set of a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Class {
    /// Guaranteed, in byte/s.
    pub(super) rate: u64,
    /// With what others leave, in byte/s.
    pub(super) ceil: u64,
    /// What may go at once at `rate`, in ticks of 64 ns.
    pub(super) burst: u32,
    /// What may go at once at `ceil`, in ticks of 64 ns.
    pub(super) cburst: u32,
    /// Bytes that one of several classes of a priority may send in its turn.
    pub(super) quantum: u32,
    /// Who is asked first, 0 to 7, 0 before all others.
    pub(super) prio: u32,
    /// Whether others are under it, as far as the kernel has told.
    inner: bool,
}

impl Class {
    /// A class for packets of at most `frame` bytes.
    ///
    /// HTB sends a packet whenever the tokens are not below zero (htb_class_mode() in
    /// net/sched/sch_htb.c), so a burst of one packet would be two packets back to back, and voice would
    /// wait for both. With a burst of half a packet, one of full size leaves alone, and the small ones of
    /// some calls leave together. The rest of the burst is what the class earns while the timer is late
    /// that HTB waits by (qdisc_watchdog_init() in net/sched/sch_api.c).
    ///
    /// At its ceiling it may send a whole packet's worth at once, by what others leave: a class whose
    /// ceiling is low sends some small packets (TCP's ACKs) at the line's pace, and not at its own.
    ///
    /// Its quantum is one packet: classes of one priority take turns by packets, as none should wait
    /// for two of another's (a full-size packet takes 12 ms at 1 Mbit/s). A fast class has 10 ms of
    /// its rate, lest the kernel does nothing but take turns, and 60,000 bytes at most, because above
    /// 200,000 the kernel complains.
    pub(super) fn new(rate_bits: u64, ceil_bits: u64, prio: u8, frame: u32) -> Self {
        let (rate, ceil) = ((rate_bits / 8).max(1), (ceil_bits / 8).max(1));
        let quantum = (rate / 100).min(60_000) as u32;
        Self {
            rate,
            ceil,
            burst: ticks(frame / 2, rate).saturating_add(LATENESS),
            cburst: ticks(frame, ceil).saturating_add(LATENESS),
            quantum: quantum.max(frame),
            prio: prio.into(),
            inner: false,
        }
    }

    /// The class that all others borrow from, a packet at a time: its rate is its ceiling.
    pub(super) fn whole(bits: u64, frame: u32) -> Self {
        Self {
            burst: LATENESS,
            cburst: LATENESS,
            ..Self::new(bits, bits, 0, frame)
        }
    }

    /// Whether they do the same. A class with others under it has no turn of its own, and keeps the
    /// quantum and the priority that it had before (htb_change_class()).
    pub(super) fn agrees(&self, other: &Self) -> bool {
        let inner = self.inner || other.inner;
        let own = |class: &Self| Self {
            quantum: if inner { 0 } else { class.quantum },
            prio: if inner { 0 } else { class.prio },
            inner,
            ..*class
        };
        own(self) == own(other)
    }

    /// As the content of `TCA_OPTIONS`.
    pub(super) fn encode(&self) -> Vec<u8> {
        let options = Options {
            rate: RateSpec::new(self.rate),
            ceil: RateSpec::new(self.ceil),
            buffer: self.burst,
            cbuffer: self.cburst,
            quantum: self.quantum,
            level: 0,
            prio: self.prio,
        };
        let wide = |kind, rate: u64| {
            u32::try_from(rate)
                .is_err()
                .then(|| Attribute::new(kind, rate.to_ne_bytes()))
        };
        let attributes = [
            Some(Attribute::new(TCA_HTB_PARMS, options.as_bytes())),
            wide(TCA_HTB_RATE64, self.rate),
            wide(TCA_HTB_CEIL64, self.ceil),
        ];
        Attribute::nest(attributes.into_iter().flatten())
    }

    /// Reads the content of `TCA_OPTIONS`.
    pub(super) fn decode(options: &[u8]) -> Option<Self> {
        let attributes = Attribute::all(options);
        let find = |kind| attributes.iter().find(|attribute| attribute.kind() == kind);
        let (fixed, _) = Options::read_from_prefix(find(TCA_HTB_PARMS)?.value()).ok()?;
        let rate = |kind, narrow: u32| {
            find(kind)
                .and_then(|wide| wide.value().try_into().ok())
                .map_or(narrow.into(), u64::from_ne_bytes)
        };
        Some(Self {
            rate: rate(TCA_HTB_RATE64, fixed.rate.rate),
            ceil: rate(TCA_HTB_CEIL64, fixed.ceil.rate),
            burst: fixed.buffer,
            cburst: fixed.cbuffer,
            quantum: fixed.quantum,
            prio: fixed.prio,
            inner: fixed.level > 0,
        })
    }
}

/// How long it takes to send so many bytes.
fn ticks(bytes: u32, bytes_per_second: u64) -> u32 {
    let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(bytes_per_second);
    (nanoseconds / u128::from(NANOSECONDS_PER_TICK))
        .try_into()
        .unwrap_or(u32::MAX)
}

/// The queueing discipline's own options, as the content of `TCA_OPTIONS`: `default` is the minor
/// number of the class for packets that name none.
pub(super) fn encode_root(default: u16) -> Vec<u8> {
    let globals = Globals {
        version: VERSION,
        // Every class brings its own quantum.
        rate2quantum: 10,
        defcls: default.into(),
        debug: 0,
        direct_pkts: 0,
    };
    Attribute::nest([Attribute::new(TCA_HTB_INIT, globals.as_bytes())])
}

/// The minor number of the default class.
pub(super) fn decode_root(options: &[u8]) -> Option<u32> {
    let attributes = Attribute::all(options);
    let init = attributes.iter().find(|it| it.kind() == TCA_HTB_INIT)?;
    let (globals, _) = Globals::read_from_prefix(init.value()).ok()?;
    Some(globals.defcls)
}

/// The options of the queueing discipline as it was created: without its counter of packets, and with
/// the version as the kernel wants and not as it tells it.
pub(super) fn as_created(options: &[u8]) -> Vec<u8> {
    Attribute::nest(Attribute::all(options).into_iter().map(|attribute| {
        match Globals::read_from_prefix(attribute.value()) {
            Ok((globals, _)) if attribute.kind() == TCA_HTB_INIT => {
                let created = Globals {
                    version: VERSION,
                    direct_pkts: 0,
                    ..globals
                };
                Attribute::new(TCA_HTB_INIT, created.as_bytes())
            }
            _ => attribute,
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        for bits in [
            64_000,
            950_000,
            34_359_738_360,
            34_359_738_368,
            95_000_000_000,
        ] {
            let class = Class::new(bits / 20, bits, 3, 1518);
            assert_eq!(Class::decode(&class.encode()), Some(class), "{bits}");
        }
        assert_eq!(decode_root(&encode_root(0x40)), Some(0x40));
    }

    #[test]
    fn slow_classes_send_single_packets() {
        let class = Class::new(190_000, 950_000, 3, 1518);
        assert_eq!(class.quantum, 1518);
        let bytes =
            |burst: u32, rate: u64| u64::from(burst) * NANOSECONDS_PER_TICK * rate / 1_000_000_000;
        assert_eq!(bytes(class.burst, class.rate), 759 + 47);
        assert_eq!(bytes(class.cburst, class.ceil), 1518 + 237);
        let whole = Class::whole(950_000, 1518);
        assert_eq!(bytes(whole.burst, whole.rate), 237);
        assert_eq!(bytes(whole.cburst, whole.ceil), 237);
    }
}
