//! The two text formats, and which of them a client wants.

/// A text format of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus' own, version 0.0.4, which every tool reads.
    Prometheus,
}

impl Format {
    /// What an `Accept` header asks for. Prometheus' own where it does not say, or only says that
    /// anything will do.
    #[must_use]
    pub fn accepted(accept: &str) -> Self {
        let weight = |wanted: &str| {
            accept
                .split(',')
                .filter_map(|range| {
                    let mut parts = range.split(';').map(str::trim);
                    parts.next()?.eq_ignore_ascii_case(wanted).then(|| {
                        parts
                            .find_map(|part| part.strip_prefix("q="))
                            .map_or(1.0, |weight| weight.parse().unwrap_or(0.0))
                    })
                })
                .fold(0.0, f64::max)
        };
        let open = weight("application/openmetrics-text");
        if open > 0.0 && open >= weight("text/plain") {
            Self::OpenMetrics
        } else {
            Self::Prometheus
        }
    }

    /// Its `Content-Type`.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// Metrics that are written as OpenMetrics, in this format.
    pub(super) fn of(self, openmetrics: String) -> String {
        match self {
            Self::OpenMetrics => openmetrics,
            Self::Prometheus => to_prometheus(&openmetrics),
        }
    }
}

/// OpenMetrics names a family of counters without the `_total` of its samples, and has lines that
/// Prometheus' own format takes for comments.
fn to_prometheus(openmetrics: &str) -> String {
    let mut written = String::with_capacity(openmetrics.len());
    let lines: Vec<_> = openmetrics.lines().collect();
    for (index, line) in lines.iter().enumerate() {
        if line.starts_with("# UNIT ") || *line == "# EOF" {
            continue;
        }
        let is_counter = |line: &str| line.starts_with("# TYPE ") && line.ends_with(" counter");
        let type_line = match line.starts_with("# HELP ") {
            true => lines.get(index + 1),
            false => Some(line),
        };
        if line.starts_with("# ")
            && type_line.is_some_and(|line| is_counter(line))
            && let Some((name, rest)) = line[7..].split_once(' ')
        {
            written.push_str(&format!("{}{name}_total {rest}", &line[..7]));
        } else {
            written.push_str(line);
        }
        written.push('\n');
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accept_header_chooses() {
        // What Prometheus 2.x and 3.x send, browsers, and curl.
        for (accept, format) in [
            (
                "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                Format::OpenMetrics,
            ),
            (
                "application/openmetrics-text;version=1.0.0;q=0.4, text/plain;version=0.0.4;q=0.5",
                Format::Prometheus,
            ),
            ("Application/OpenMetrics-Text", Format::OpenMetrics),
            ("application/openmetrics-text;q=0", Format::Prometheus),
            (
                "text/html,application/xml;q=0.9,*/*;q=0.8",
                Format::Prometheus,
            ),
            ("*/*", Format::Prometheus),
            ("", Format::Prometheus),
        ] {
            assert_eq!(Format::accepted(accept), format, "{accept}");
        }
    }

    #[test]
    fn counters_are_named_as_prometheus_names_them() {
        let open = "# HELP relay_packets Packets.\n# TYPE relay_packets counter\n\
                    relay_packets_total{reason=\"a # b\"} 1\n\
                    # HELP relay_uptime_seconds Time.\n# TYPE relay_uptime_seconds gauge\n\
                    # UNIT relay_uptime_seconds seconds\nrelay_uptime_seconds 2\n# EOF\n";
        let prometheus = "# HELP relay_packets_total Packets.\n# TYPE relay_packets_total counter\n\
                          relay_packets_total{reason=\"a # b\"} 1\n\
                          # HELP relay_uptime_seconds Time.\n# TYPE relay_uptime_seconds gauge\n\
                          relay_uptime_seconds 2\n";
        assert_eq!(Format::Prometheus.of(open.to_owned()), prometheus);
        assert_eq!(Format::OpenMetrics.of(open.to_owned()), open);
    }
}
