//! Metrics: what the daemon tells Prometheus. `docs/metrics.md` lists them.

mod format;
mod label;

use std::{fmt, iter};

use prometheus_client::{
    collector::Collector,
    encoding::{
        DescriptorEncoder, EncodeGaugeValue, EncodeLabelSet, EncodeMetric as _, NoLabelSet, text,
    },
    metrics::{MetricType, counter::ConstCounter},
    registry::{Registry, Unit},
};

use crate::{
    control::{
        MetricsReport,
        model::{AmiState, PairReport, StreamReport, StreamState, Verdict},
        selection,
    },
    controller::proof_time::{BOUNDS, ProofTimes},
};

pub use format::Format;
use label::Value;

/// The most streams that one scrape may ask for.
pub const MOST_STREAMS: usize = 1000;

/// What every name begins with.
const PREFIX: &str = "relay";

/// Writes all metrics. With `pairs`, so many of their streams have series of their own, the worst
/// first.
///
/// # Errors
/// None in practice: writing to a string does not fail.
pub fn expose(
    report: MetricsReport,
    pairs: &[PairReport],
    streams: usize,
    format: Format,
) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Daemon(report)));
    if streams > 0 {
        registry.register_collector(Box::new(Streams::worst(pairs, streams)));
    }
    let mut written = String::new();
    text::encode(&mut written, &registry)?;
    Ok(format.of(written))
}

/// The daemon as a whole.
#[derive(Debug)]
struct Daemon(MetricsReport);

impl Collector for Daemon {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Self(MetricsReport {
            status,
            events,
            proof_times,
        }) = self;
        let mut families = Families(&mut encoder);
        families.gauge(
            "build_info",
            "Version of relay-user, and of the layout that it shares with the kernel program; always 1",
            None,
            [(
                [
                    ("version", Value::from(&*status.version)),
                    ("abi", Value::from(status.abi.to_string())),
                ],
                1_u64,
            )],
        )?;
        families.gauge(
            "attached_info",
            "Interface that the relay is attached to, and how; always 1",
            None,
            [(
                [
                    ("interface", Value::from(&*status.interface)),
                    ("mode", Value::from(status.mode.name())),
                ],
                1_u64,
            )],
        )?;
        families.value(
            "uptime",
            "Time since the daemon attached",
            Some(Unit::Seconds),
            status.uptime_seconds,
        )?;
        let reasons = || {
            status.reasons.iter().map(|row| {
                let verdict = match row.verdict {
                    Verdict::Relayed => "relayed",
                    Verdict::Passed => "passed",
                    Verdict::Dropped => "dropped",
                };
                let labels = [
                    ("reason", Value::from(&*row.reason)),
                    ("verdict", verdict.into()),
                ];
                (labels, row)
            })
        };
        families.counter(
            "packets",
            "Packets that the datapath looked at, by what became of them",
            reasons().map(|(labels, row)| (labels, row.packets)),
        )?;
        families.counter(
            "bytes",
            "Their bytes, Ethernet header included",
            reasons().map(|(labels, row)| (labels, row.bytes)),
        )?;
        families.gauge(
            "pairs",
            "Pairs of streams, most often calls: offloaded to the kernel, waiting for something, or refused and left with the PBX",
            None,
            [
                ("offloaded", status.offloaded),
                ("waiting", status.waiting),
                ("refused", status.refused),
            ]
            .map(state),
        )?;
        families.value(
            "pairs_unproven",
            "Pairs that are relayed on the operator's word, without proof",
            None,
            status.unproven,
        )?;
        let states = status.stream_states;
        families.gauge(
            "streams",
            "Streams, one direction of a pair each: relayed by the kernel (offloaded), through the PBX while proof is collected (watching), stopped by the datapath (suspended), or without a next hop (waiting)",
            None,
            [
                ("offloaded", states.offloaded),
                ("watching", states.watching),
                ("suspended", states.suspended),
                ("waiting", states.waiting),
            ]
            .map(state),
        )?;
        families.counter(
            "refusals",
            "Pairs and calls that were not taken, and stay with the PBX, by cause",
            status
                .refusals
                .iter()
                .map(|row| ([("cause", Value::from(&*row.cause))], row.count)),
        )?;
        families.counter(
            "events",
            "Events, by kind, as `relay-user events` shows them",
            events
                .iter()
                .map(|(kind, count)| ([("kind", Value::from(kind.name()))], *count)),
        )?;
        families.proof_times(proof_times)?;
        if let Some(ami) = &status.ami {
            families.value("ami_up", "1 while logged in to Asterisk's manager interface, else 0; absent without that feed", None, u64::from(ami.state == AmiState::Up))?;
        }
        families.value(
            "lease_remaining",
            "Time that the datapath would go on relaying without the daemon",
            Some(Unit::Seconds),
            status.lease_ms as f64 / 1000.0,
        )?;
        families.value(
            "map_entries",
            "Streams in the datapath's table",
            None,
            status.streams,
        )?;
        families.value("map_entries_max", "Streams that the datapath's table has room for; when it is full, further calls stay with the PBX", None, u64::from(status.max_streams))
    }
}

/// One stream, and the pair that it is of.
#[derive(Debug)]
struct Series {
    pair: u64,
    /// The PBX's name of the leg that it comes in on; empty where it has none.
    channel: String,
    stream: StreamReport,
}

/// Streams with series of their own.
#[derive(Debug)]
struct Streams(Vec<Series>);

impl Streams {
    fn worst(pairs: &[PairReport], most: usize) -> Self {
        let mut all: Vec<_> = pairs
            .iter()
            .flat_map(|pair| pair.streams.iter().map(move |stream| (pair, stream)))
            .collect();
        all.sort_by(|(_, a), (_, b)| selection::worst_first(a, b));
        all.truncate(most.min(MOST_STREAMS));
        let series = |(pair, stream): (&PairReport, &StreamReport)| {
            let leg = pair.legs.get(usize::from(stream.leg));
            Series {
                pair: pair.id,
                channel: leg.and_then(|leg| leg.channel.clone()).unwrap_or_default(),
                stream: stream.clone(),
            }
        };
        Self(all.into_iter().map(series).collect())
    }

    fn rows<'a, V: 'a>(
        &'a self,
        value: impl Fn(&StreamReport) -> Option<V> + 'a,
    ) -> impl Iterator<Item = ([(&'static str, Value<'a>); 3], V)> + 'a {
        self.0.iter().filter_map(move |series| {
            let labels = [
                ("pair", Value::from(series.pair.to_string())),
                ("leg", Value::from(series.stream.leg.to_string())),
                ("channel", Value::from(&*series.channel)),
            ];
            Some((labels, value(&series.stream)?))
        })
    }
}

impl Collector for Streams {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut families = Families(&mut encoder);
        families.gauge(
            "stream_offloaded",
            "1 while the kernel relays the stream, else 0",
            None,
            self.rows(|stream| Some(u64::from(stream.state == StreamState::Offloaded))),
        )?;
        families.counter(
            "stream_packets",
            "Packets of the stream that the kernel relayed",
            self.rows(|stream| Some(stream.packets)),
        )?;
        families.counter(
            "stream_bytes",
            "Their bytes, Ethernet header included",
            self.rows(|stream| Some(stream.bytes)),
        )?;
        families.counter(
            "stream_received_packets",
            "RTP packets received of the stream's phone, whoever relayed them",
            self.rows(|stream| Some(stream.reception.packets)),
        )?;
        families.gauge(
            "stream_lost_packets",
            "RTP packets of the stream's phone that did not arrive (RFC 3550 appendix A.3); one that comes late makes it smaller",
            None,
            self.rows(|stream| Some(stream.reception.lost)),
        )?;
        families.gauge(
            "stream_jitter",
            "Interarrival jitter (RFC 3550 appendix A.8); absent where the codec's clock rate is not known",
            Some(Unit::Seconds),
            self.rows(|stream| stream.reception.jitter_ms.map(|jitter| jitter / 1000.0)),
        )?;
        families.gauge(
            "stream_mos",
            "Mean opinion score, 1 to 4.5, estimated by the E-model (ITU-T G.107); absent where the codec has no published figures",
            None,
            self.rows(|stream| stream.reception.mos),
        )
    }
}

fn state((state, count): (&'static str, u64)) -> ([(&'static str, Value<'static>); 1], u64) {
    ([("state", state.into())], count)
}

/// Writes one family after the other.
struct Families<'a, 'e>(&'a mut DescriptorEncoder<'e>);

impl Families<'_, '_> {
    /// Values that only grow while the daemon runs.
    fn counter<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in rows {
            ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn gauge<L: EncodeLabelSet, V>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        rows: impl IntoIterator<Item = (L, V)>,
    ) -> fmt::Result
    where
        V: EncodeGaugeValue,
    {
        let mut family = self
            .0
            .encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        for (labels, value) in rows {
            family.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    /// A gauge without labels.
    fn value(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        value: impl EncodeGaugeValue,
    ) -> fmt::Result {
        self.0
            .encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?
            .encode_gauge(&value)
    }

    fn proof_times(&mut self, times: &ProofTimes) -> fmt::Result {
        // The library's name for infinity is `f64::MAX`.
        let bounds = BOUNDS.into_iter().chain(iter::once(f64::MAX));
        let buckets: Vec<_> = bounds.zip(times.buckets).collect();
        self.0
            .encode_descriptor(
                "proof",
                "From the beginning of a round of proof, when the datapath begins to watch a stream, until it relays it; a phone that sends nothing makes it long",
                Some(&Unit::Seconds),
                MetricType::Histogram,
            )?
            .encode_histogram::<NoLabelSet>(
                times.sum,
                times.buckets.iter().sum(),
                &buckets,
                None,
            )
    }
}

#[cfg(test)]
mod tests {
    use std::slice;

    use super::*;

    fn example<T: serde::de::DeserializeOwned>(heading: &str) -> T {
        let description = include_str!("../../docs/api.md");
        let mut sections = description.split("\n## ");
        let section = sections.find(|section| section.starts_with(heading));
        let block = section.and_then(|section| section.split("```json\n").nth(1));
        let block = block.and_then(|block| block.split("```").next());
        serde_json::from_str(block.expect("example")).expect("example")
    }

    fn report() -> MetricsReport {
        MetricsReport {
            status: example("The status"),
            events: Vec::new(),
            proof_times: ProofTimes::default(),
        }
    }

    #[test]
    fn names_from_the_network_stay_within_their_quotes() {
        let mut pair: PairReport = example("A pair");
        pair.legs[0].channel = Some("x\"} 1\nforged{a=\"\\".to_owned());
        for format in [Format::OpenMetrics, Format::Prometheus] {
            let text = expose(report(), slice::from_ref(&pair), 9, format).expect("text");
            let series = "relay_stream_offloaded{pair=\"7\",leg=\"0\",channel=\"x\\\"} 1\u{fffd}forged{a=\\\"\\\\\"} 1\n";
            assert!(text.contains(series), "{text}");
            assert!(!text.lines().any(|line| line.starts_with("forged")));
        }
    }

    #[test]
    fn streams_are_as_many_as_asked_for() {
        let pairs = [example::<PairReport>("A pair"), example("A pair")];
        for (asked, served) in [(0, 0), (3, 3), (4, 4), (usize::MAX, 4)] {
            let text = expose(report(), &pairs, asked, Format::Prometheus).expect("text");
            assert_eq!(text.matches("\nrelay_stream_offloaded{").count(), served);
        }
    }

    #[test]
    fn what_there_is_not_is_absent() {
        let mut without = report();
        without.status.ami = None;
        let text = |report| expose(report, &[], 0, Format::Prometheus).expect("text");
        assert!(text(report()).contains("\nrelay_ami_up 1\n"));
        assert!(!text(without).contains("ami_up"));
    }
}
