//! What the commands print for people. Programs take `--json`.

pub mod doctor;
pub mod qos;

use std::{
    borrow::Cow,
    cmp::Reverse,
    fmt::Write as _,
    io::{self, IsTerminal as _},
};

use comfy_table::{
    Cell, CellAlignment, Color, ColumnConstraint, ContentArrangement, Table, Width, presets,
};

use crate::{
    control::model::{
        AmiReport, AmiState, Detached, Feed, Found, LegReport, MarkReport, NextHopReport,
        PairReport, PairState, ReasonReport, RefusalReport, StatusReport, StreamReport,
        StreamState, Verdict,
    },
    datapath::AttachMode,
    dscp,
    events::{Event, Lagged, TransitionKind},
    pair::Proof,
};

/// How the output looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Tables with lines, fitted to the width of the terminal; else plain aligned columns.
    pub lines: bool,
    /// States in colour.
    pub colour: bool,
}

impl Style {
    /// Aligned text, fit for a file or a pipe.
    pub const PLAIN: Self = Self {
        lines: false,
        colour: false,
    };

    /// What suits standard output: lines and colour on a terminal, and no colour where `NO_COLOR` is
    /// set and not empty (<https://no-color.org>).
    pub fn of_stdout() -> Self {
        let terminal = io::stdout().is_terminal();
        let refused = std::env::var_os("NO_COLOR").is_some_and(|set| !set.is_empty());
        Self {
            lines: terminal,
            colour: terminal && !refused,
        }
    }

    fn table(self, header: &[&str]) -> Table {
        let mut table = Table::new();
        table.set_header(header);
        if self.lines {
            table.load_style(presets::UTF8_FULL_CONDENSED);
            table.set_content_arrangement(ContentArrangement::Dynamic);
            if self.colour {
                table.enforce_styling();
            }
        } else {
            table.force_no_tty();
            table.load_style(presets::NOTHING);
            table.set_content_arrangement(ContentArrangement::Disabled);
            for column in table.column_iter_mut() {
                column.set_padding((0, 2));
            }
        }
        table
    }

    fn paint(self, cell: Cell, colour: Color) -> Cell {
        if self.colour { cell.fg(colour) } else { cell }
    }
}

/// Every pair, a line each.
pub fn pairs(pairs: &[PairReport], style: Style) -> String {
    if pairs.is_empty() {
        return "no pairs\n".to_owned();
    }
    let mut table = style.table(&[
        "ID",
        "FEED",
        "STATE",
        "FIRST LEG",
        "SECOND LEG",
        "PACKETS",
        "WHY",
    ]);
    for pair in pairs {
        let legs = pair.legs.iter().map(|report| {
            // Between the addresses, or a narrow terminal would break them in the middle.
            if style.lines {
                leg(report).replace('=', "=\n")
            } else {
                leg(report)
            }
        });
        // A call that was never offered has no addresses to be known by.
        let channels = pair.channels.iter().skip(pair.legs.len());
        let mut legs = legs.chain(channels.map(|channel| clean(channel).into_owned()));
        table.add_row([
            number(pair.id),
            Cell::new(feed(pair.feed)),
            pair_state(pair.state, style),
            Cell::new(legs.next().unwrap_or_else(|| "-".into())),
            Cell::new(legs.next().unwrap_or_else(|| "-".into())),
            number(packets(pair)),
            text(pair.why.as_deref().unwrap_or_default()),
        ]);
    }
    drawn(&table)
}

/// One pair, whole.
pub fn pair(pair: &PairReport, style: Style) -> String {
    let mut facts = Facts::default();
    facts.add("pair", pair.id);
    facts.add("state", pair_state_name(pair.state));
    if let Some(why) = &pair.why {
        facts.add("why", why);
    }
    facts.add("feed", feed(pair.feed));
    if let Some(call) = &pair.call {
        facts.add("call", call);
    }
    for (name, report) in ["first leg", "second leg"].into_iter().zip(&pair.legs) {
        match &report.channel {
            Some(channel) => facts.add(name, format_args!("{} ({channel})", leg(report))),
            None => facts.add(name, leg(report)),
        }
    }
    if pair.legs.is_empty() && !pair.channels.is_empty() {
        facts.add("channels", clean(&pair.channels.join(", ")));
    }
    let types: Vec<_> = pair.payload_types.iter().map(ToString::to_string).collect();
    facts.add("payload types", types.join(", "));
    if let Some(priority) = pair.priority {
        facts.add("priority", priority);
    }
    if pair.proof == Proof::None {
        facts.add("proof", "none: relayed on the word of whoever added it");
    }
    for (name, stream) in ["from first", "from second"].into_iter().zip(&pair.streams) {
        if let Some(why) = &stream.why {
            facts.add(name, why);
        }
    }
    if pair.streams.is_empty() {
        return facts.drawn();
    }
    let mut table = style.table(&[
        "FROM", "TO", "STATE", "PROOF", "PACKETS", "BYTES", "CAME AS", "NEXT HOP",
    ]);
    for stream in &pair.streams {
        table.add_row([
            Cell::new(stream.from),
            Cell::new(stream.to),
            stream_state(stream, style),
            text(&stream.proof.map_or_else(
                || "-".into(),
                |proof| format!("{}/{}", proof.equal, proof.of),
            )),
            number(stream.packets),
            number(stream.bytes),
            text(&marks(&stream.marks)),
            text(
                &stream
                    .next_hop
                    .as_ref()
                    .map_or_else(|| "not known yet".into(), next_hop),
            ),
        ]);
    }
    format!("{}\n{}", facts.drawn(), drawn(&table))
}

/// The shares of the DSCP that a phone's packets came with, in percent.
fn marks(marks: &[MarkReport]) -> String {
    let total: u64 = marks.iter().map(|mark| u64::from(mark.packets)).sum();
    if total == 0 {
        return "-".to_owned();
    }
    let shares: Vec<_> = marks
        .iter()
        .map(|mark| {
            let name = mark.dscp.map_or_else(|| "others".to_owned(), dscp::name);
            format!("{name} {}%", u64::from(mark.packets) * 100 / total)
        })
        .collect();
    shares.join(", ")
}

/// What became of a pair just added: one line.
pub fn added(pair: &PairReport) -> String {
    let state = pair_state_name(pair.state);
    match &pair.why {
        Some(why) => format!("pair {}: {state}: {}\n", pair.id, clean(why)),
        None => format!("pair {}: {state}\n", pair.id),
    }
}

/// The pairs that went, and how many.
pub fn removed(removed: &[PairReport], style: Style) -> String {
    let count = match removed.len() {
        0 => return "there was no pair to remove\n".to_owned(),
        1 => "1 pair".to_owned(),
        count => format!("{count} pairs"),
    };
    format!("{}{count} removed\n", pairs(removed, style))
}

/// What a detach ended: one line.
pub fn detached(detached: &Detached) -> String {
    let interface = clean(&detached.interface);
    match detached.found {
        Found::Running => {
            format!(
                "detached from {interface}; pairs given back to the PBX: {}\n",
                detached.pairs
            )
        }
        Found::LeftBehind => {
            format!("no relay daemon ran on {interface}; removed what it had left in the kernel\n")
        }
    }
}

/// A screen that everybody has.
const COLUMNS: usize = 80;
const LINES: usize = 24;

/// The daemon on one screen.
pub fn status(status: &StatusReport, style: Style) -> String {
    let mut facts = Facts::default();
    let mode = match status.mode {
        AttachMode::Native | AttachMode::Generic => format!("{} XDP", status.mode.name()),
        AttachMode::Tc => "TC".to_owned(),
    };
    facts.add(
        "interface",
        format_args!("{} (number {})", status.interface, status.ifindex),
    );
    facts.add("mode", format_args!("{mode}: {}", status.mode_reason));
    facts.add(
        "daemon",
        format_args!(
            "relay-user {}, ABI {}, process {}, up {}",
            status.version,
            status.abi,
            status.pid,
            duration(status.uptime_seconds)
        ),
    );
    facts.add("DSCP", status.dscp);
    if let Some(priority) = status.priority {
        facts.add("priority", priority);
    }
    facts.add("pins", status.pins.display());
    facts.add(
        "AMI",
        status.ami.as_ref().map_or_else(|| "not used".into(), ami),
    );
    if let Some(address) = status.metrics {
        facts.add("metrics", format_args!("http://{address}/metrics"));
    }
    if let Some(address) = status.http {
        facts.add("page", format_args!("http://{address}/"));
    }
    facts.add(
        "pairs",
        format_args!(
            "{}: {} offloaded, {} waiting, {} refused",
            status.pairs, status.offloaded, status.waiting, status.refused
        ),
    );
    let refused = refusals(&status.refusals);
    if !refused.is_empty() {
        facts.add("refused", refused);
    }
    facts.add(
        "streams",
        format_args!("{} of {}", status.streams, status.max_streams),
    );
    facts.add(
        "proof",
        match (status.proof, status.unproven) {
            (0, _) => "off: what AMI says is relayed unproven".to_owned(),
            (packets, 0) => format!("{packets} equal packets in a row"),
            (packets, unproven) => {
                format!("{packets} equal packets in a row; {unproven} pairs without")
            }
        },
    );
    facts.add(
        "lease",
        format_args!("{:.1} s", status.lease_ms as f64 / 1000.0),
    );
    let facts = facts.drawn();
    let taken: usize = facts
        .lines()
        .map(|line| line.chars().count().div_ceil(COLUMNS).max(1))
        .sum();
    // Besides, an empty line, the header, what is left out, and the prompt.
    let room = LINES.saturating_sub(taken + 4).max(1);
    format!("{facts}\n{}", reasons(&status.reasons, room, style))
}

/// Pairs and calls that were not taken: the causes that had most, so that a screen has room for the rest.
fn refusals(rows: &[RefusalReport]) -> String {
    const SHOWN: usize = 4;
    let mut rows: Vec<_> = rows.iter().filter(|row| row.count != 0).collect();
    rows.sort_by_key(|row| Reverse(row.count));
    let shown = rows.iter().take(SHOWN);
    let mut causes: Vec<_> = shown
        .map(|row| format!("{} {}", row.cause, row.count))
        .collect();
    if rows.len() > SHOWN {
        causes.push(format!("and {} causes more", rows.len() - SHOWN));
    }
    causes.join(", ")
}

/// What became of packets: the reasons that had most, in their order, so that a screen has room for them.
fn reasons(rows: &[ReasonReport], room: usize, style: Style) -> String {
    let mut most: Vec<_> = rows.iter().filter(|row| row.packets != 0).collect();
    if most.is_empty() {
        return "no packets yet\n".to_owned();
    }
    let all = most.len();
    most.sort_by_key(|row| Reverse(row.packets));
    most.truncate(room);
    // Lines around them would take the room of three.
    let plain = Style {
        lines: false,
        ..style
    };
    let mut table = plain.table(&["REASON", "VERDICT", "PACKETS", "BYTES"]);
    if style.colour {
        table.enforce_styling();
    }
    for row in rows {
        if !most.iter().any(|shown| shown.reason == row.reason) {
            continue;
        }
        let (verdict, colour) = match row.verdict {
            Verdict::Relayed => ("relayed", Color::Green),
            Verdict::Passed => ("passed", Color::Yellow),
            Verdict::Dropped => ("dropped", Color::Red),
        };
        table.add_row([
            text(&row.reason),
            style.paint(Cell::new(verdict), colour),
            number(row.packets),
            number(row.bytes),
        ]);
    }
    let mut lines = drawn(&table);
    if all > room {
        // Writing to a string cannot fail.
        let _ = writeln!(
            lines,
            "and {} reasons more: `relay-user status --json`",
            all - room
        );
    }
    lines
}

/// What stands above the lines of [`event`].
pub fn events_header() -> String {
    let [time, what, pair, leg, cause] = ["TIME", "WHAT", "PAIR", "LEG", "CAUSE"].map(Cell::new);
    event_line([time, what, pair, leg, cause], Style::PLAIN)
}

/// One event: one line, whatever its length, because those that follow are not known yet.
pub fn event(event: &Event, style: Style) -> String {
    let transition = match event {
        Event::Transition(transition) => transition,
        Event::Lagged(Lagged { missed }) => {
            let what = style.paint(Cell::new("missed"), Color::Red);
            let cause = Cell::new(format_args!("{missed} events: read too slowly"));
            let none = || Cell::new("-");
            return event_line([none(), what, none(), none(), cause], style);
        }
    };
    let (name, colour) = kind(transition.kind);
    let row = [
        text(&transition.time),
        style.paint(Cell::new(name), colour),
        transition.pair.map_or_else(|| Cell::new("-"), Cell::new),
        Cell::new(match transition.stream {
            None => "-",
            Some(0) => "first",
            Some(_) => "second",
        }),
        text(&transition.cause),
    ];
    event_line(row, style)
}

/// A table of one row, as wide as all that may follow.
fn event_line(row: [Cell; 5], style: Style) -> String {
    // Of a time, the longest kind, seven digits, and `second`.
    const WIDTHS: [u16; 4] = [24, 17, 7, 6];
    let mut table = Table::new();
    table.add_row(row);
    table.force_no_tty();
    if style.colour {
        table.enforce_styling();
    }
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
        if let Some(width) = WIDTHS.get(column.index) {
            column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(width + 2)));
        }
    }
    drawn(&table)
}

fn kind(kind: TransitionKind) -> (&'static str, Color) {
    match kind {
        TransitionKind::Watching => ("watching", Color::Yellow),
        TransitionKind::Proven => ("proven", Color::Green),
        TransitionKind::Offloaded => ("offloaded", Color::Green),
        TransitionKind::Suspended => ("suspended", Color::Red),
        TransitionKind::TakenBack => ("taken back", Color::Yellow),
        TransitionKind::Expired => ("expired", Color::Yellow),
        TransitionKind::Refused => ("refused", Color::Red),
        TransitionKind::Silent => ("silent", Color::Yellow),
        TransitionKind::UnexpectedSource => ("unexpected source", Color::Red),
        TransitionKind::Resumed => ("resumed", Color::Green),
        TransitionKind::Adopted => ("adopted", Color::Green),
        TransitionKind::AmiUp => ("AMI up", Color::Green),
        TransitionKind::AmiDown => ("AMI down", Color::Red),
        TransitionKind::LeaseLost => ("lease lost", Color::Red),
    }
}

/// Names and values in two columns.
#[derive(Default)]
struct Facts(Vec<(&'static str, String)>);

impl Facts {
    fn add(&mut self, name: &'static str, value: impl ToString) {
        self.0.push((name, clean(&value.to_string()).into_owned()));
    }

    fn drawn(&self) -> String {
        let width = self
            .0
            .iter()
            .map(|(name, _)| name.len())
            .max()
            .unwrap_or_default();
        let mut lines = String::new();
        for (name, value) in &self.0 {
            // Writing to a string cannot fail.
            let _ = writeln!(lines, "{name:width$}  {value}");
        }
        lines
    }
}

fn drawn(table: &Table) -> String {
    table.trim_fmt() + "\n"
}

fn packets(pair: &PairReport) -> u64 {
    pair.streams.iter().map(|stream| stream.packets).sum()
}

fn leg(leg: &LegReport) -> String {
    format!("{}={}", leg.local, leg.remote)
}

fn next_hop(hop: &NextHopReport) -> String {
    let mut line = match (&hop.source_mac, &hop.destination_mac) {
        (Some(source), Some(destination)) => format!("{source} > {destination}"),
        _ => "without Ethernet".to_owned(),
    };
    for vlan in &hop.vlan {
        let _ = write!(line, ", VLAN {vlan}");
    }
    let _ = write!(line, ", MTU {}", hop.mtu);
    line
}

fn ami(ami: &AmiReport) -> String {
    let mut line = match ami.state {
        AmiState::Up => "up".to_owned(),
        AmiState::Down => "down".to_owned(),
    };
    let _ = write!(line, ", {} at {}", ami.user, ami.address);
    for more in [&ami.asterisk, &ami.cause].into_iter().flatten() {
        let _ = write!(line, ", {more}");
    }
    line
}

fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

fn feed(feed: Feed) -> &'static str {
    match feed {
        Feed::Api => "api",
        Feed::Ami => "ami",
    }
}

fn pair_state_name(state: PairState) -> &'static str {
    match state {
        PairState::Offloaded => "offloaded",
        PairState::Waiting => "waiting",
        PairState::Refused => "refused",
    }
}

fn pair_state(state: PairState, style: Style) -> Cell {
    let colour = match state {
        PairState::Offloaded => Color::Green,
        PairState::Waiting => Color::Yellow,
        PairState::Refused => Color::Red,
    };
    style.paint(Cell::new(pair_state_name(state)), colour)
}

fn stream_state(stream: &StreamReport, style: Style) -> Cell {
    let (name, colour) = match stream.state {
        StreamState::Waiting => ("waiting", Color::Yellow),
        StreamState::Watching => ("watching", Color::Yellow),
        StreamState::Offloaded => ("offloaded", Color::Green),
        StreamState::Suspended => ("suspended", Color::Red),
    };
    style.paint(Cell::new(name), colour)
}

fn number(number: u64) -> Cell {
    Cell::new(number).set_alignment(CellAlignment::Right)
}

fn text(text: &str) -> Cell {
    Cell::new(clean(text))
}

/// Without control characters. Channel names and causes come from the network, and must neither
/// break a line nor drive the reader's terminal.
pub(crate) fn clean(text: &str) -> Cow<'_, str> {
    // U+202A–U+202E and U+2066–U+2069 reorder what stands around them.
    let unfit =
        |c: char| c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if text.contains(unfit) {
        Cow::Owned(text.replace(unfit, "\u{fffd}"))
    } else {
        Cow::Borrowed(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of docs/api.md, so that the two descriptions of one thing agree.
    fn example<T: serde::de::DeserializeOwned>(heading: &str) -> T {
        let description = include_str!("../../docs/api.md");
        let section = description
            .split("\n## ")
            .find(|section| section.starts_with(heading))
            .expect("section");
        let block = section.split("```json\n").nth(1).expect("block");
        serde_json::from_str(block.split("```").next().expect("end")).expect("example")
    }

    fn rows(text: &str) -> Vec<Vec<&str>> {
        text.lines()
            .map(|line| {
                line.split("  ")
                    .map(str::trim)
                    .filter(|cell| !cell.is_empty())
                    .collect()
            })
            .collect()
    }

    #[test]
    fn a_list_is_one_aligned_line_per_pair() {
        let mut waiting: PairReport = example("A pair");
        waiting.state = PairState::Waiting;
        waiting.why = Some("no neighbour".into());
        let mut refused = waiting.clone();
        refused.id = 1000;
        refused.state = PairState::Refused;
        refused.legs.clear();
        refused.streams.clear();
        let text = pairs(&[example("A pair"), waiting, refused], Style::PLAIN);
        let rows = rows(&text);
        assert_eq!(
            rows[0],
            [
                "ID",
                "FEED",
                "STATE",
                "FIRST LEG",
                "SECOND LEG",
                "PACKETS",
                "WHY"
            ]
        );
        assert_eq!(
            rows[1],
            [
                "7",
                "ami",
                "offloaded",
                "192.0.2.1:10000=192.0.2.11:30000",
                "192.0.2.1:10002=192.0.2.12:30002",
                "3003"
            ]
        );
        assert_eq!(rows[2][2], "waiting");
        assert_eq!(rows[2][6], "no neighbour");
        assert_eq!(
            rows[3],
            [
                "1000",
                "ami",
                "refused",
                "PJSIP/alice-00000001",
                "PJSIP/bob-00000002",
                "0",
                "no neighbour"
            ]
        );
        let column = |line: &str, what: &str| line.find(what).expect("column");
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(column(lines[0], "STATE"), column(lines[1], "offloaded"));
        assert_eq!(column(lines[0], "STATE"), column(lines[3], "refused"));
        assert!(
            lines.iter().all(|line| line.trim_end() == *line),
            "{text:?}"
        );
        assert_eq!(pairs(&[], Style::PLAIN), "no pairs\n");
    }

    #[test]
    fn a_pair_shows_all_it_has() {
        let text = pair(&example("A pair"), Style::PLAIN);
        for fragment in [
            "state          offloaded",
            "call           0e0f7c4e-6d5e-4b6e-9d3b-0b8f6d0a7c11",
            "first leg      192.0.2.1:10000=192.0.2.11:30000 (PJSIP/alice-00000001)",
            "payload types  0, 101:96",
            "02:00:00:00:00:01 > 02:00:00:00:00:0c, VLAN 100, MTU 1500",
            "321000",
            "8/8",
        ] {
            assert!(text.contains(fragment), "{fragment} in {text}");
        }
        let mut waiting: PairReport = example("A pair");
        waiting.proof = Proof::None;
        waiting.streams[1].why = Some("proof 3/8".into());
        let text = pair(&waiting, Style::PLAIN);
        for fragment in ["proof          none", "from second    proof 3/8"] {
            assert!(text.contains(fragment), "{fragment} in {text}");
        }
    }

    #[test]
    fn a_new_pair_tells_why_it_waits() {
        let mut report: PairReport = example("A pair");
        assert_eq!(added(&report), "pair 7: offloaded\n");
        report.state = PairState::Waiting;
        report.why = Some("192.0.2.12 does not answer ARP".into());
        assert_eq!(
            added(&report),
            "pair 7: waiting: 192.0.2.12 does not answer ARP\n"
        );
    }

    #[test]
    fn what_went_is_counted() {
        let report: PairReport = example("A pair");
        assert!(
            removed(std::slice::from_ref(&report), Style::PLAIN).ends_with("\n1 pair removed\n")
        );
        assert!(removed(&[report.clone(), report], Style::PLAIN).ends_with("\n2 pairs removed\n"));
        assert_eq!(removed(&[], Style::PLAIN), "there was no pair to remove\n");
    }

    #[test]
    fn a_status_fits_a_screen_and_shows_no_zeros() {
        let mut report: StatusReport = example("The status");
        let zero = |reason: &str| ReasonReport {
            reason: reason.into(),
            verdict: Verdict::Passed,
            packets: 0,
            bytes: 0,
        };
        report.reasons.push(zero("never_seen"));
        let text = status(&report, Style::PLAIN);
        for fragment in [
            "interface  eth0 (number 2)",
            "mode       native XDP: ",
            "up 3 d 4 h",
            "AMI        up, relay at 127.0.0.1:5038, Asterisk Call Manager/11.0.0",
            "pairs      3: 1 offloaded, 1 waiting, 1 refused",
            "streams    4 of 65536",
        ] {
            assert!(text.contains(fragment), "{fragment} in {text}");
        }
        assert!(
            rows(&text).contains(&vec!["no_stream", "passed", "51200", "10342400"]),
            "{text}"
        );
        assert!(text.contains("refused    on_hold 4"), "{text}");
        assert!(!text.contains("never_seen"));
        assert!(text.lines().count() <= 24, "{text}");

        report.reasons = vec![zero("never_seen")];
        report.refusals.clear();
        report.ami = None;
        let text = status(&report, Style::PLAIN);
        assert!(
            text.contains("no packets yet") && text.contains("AMI        not used"),
            "{text}"
        );
        assert!(!text.contains("on_hold"), "{text}");
    }

    #[test]
    fn the_status_of_a_busy_relay_fits_80_columns_and_24_lines() {
        let mut report: StatusReport = example("The status");
        report.mode_reason =
            "native XDP on veth loses packets unless the peer runs an XDP program too".into();
        report.priority = Some("1:10".parse().expect("a class"));
        report.reasons = (0..35)
            .map(|number| ReasonReport {
                reason: format!("reason_{number}"),
                verdict: Verdict::Passed,
                packets: 1_000_000_000 + number,
                bytes: u64::MAX >> 8,
            })
            .collect();
        report.refusals = (0..15)
            .map(|number| RefusalReport {
                cause: format!("no_static_payload_type_{number}"),
                count: 100_000 + number,
            })
            .collect();
        let text = status(&report, Style::PLAIN);
        let wrapped = text
            .lines()
            .map(|line| line.chars().count().div_ceil(80).max(1));
        // One is left to the prompt.
        assert!(wrapped.sum::<usize>() < 24, "{text}");
        assert!(
            text.contains("reason_34") && text.contains(" reasons more"),
            "{text}"
        );
        assert!(text.contains("and 11 causes more"), "{text}");
    }

    #[test]
    fn events_are_one_aligned_line_each() {
        let description = include_str!("../../docs/api.md");
        let section = description.split("\n## Events\n").nth(1).expect("section");
        let block = section.split("```json\n").nth(1).expect("block");
        let lines = block.split("```").next().expect("end").lines();
        let events: Vec<Event> = lines
            .map(|line| serde_json::from_str(line).expect(line))
            .collect();
        let mut text = events_header();
        text.extend(events.iter().map(|it| event(it, Style::PLAIN)));
        let rows = rows(&text);
        assert_eq!(rows[0], ["TIME", "WHAT", "PAIR", "LEG", "CAUSE"]);
        let cells = [
            "2026-01-31T09:30:00.120Z",
            "offloaded",
            "7",
            "first",
            "proven on the wire",
        ];
        assert_eq!(rows[1], cells);
        assert_eq!(rows[2][1..4], ["taken back", "7", "-"]);
        assert_eq!(rows[3][1..4], ["AMI down", "-", "-"]);
        assert_eq!(rows[4][1], "missed");
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), events.len() + 1);
        let cause = lines[0].find("CAUSE").expect("column");
        for (line, row) in lines.iter().zip(&rows) {
            assert_eq!(line.find(row[4]), Some(cause), "{text}");
        }

        for kind in TransitionKind::ALL {
            let Event::Transition(mut told) = events[0].clone() else {
                panic!("no transition")
            };
            (told.kind, told.cause) = (kind, "\u{1b}[2Jx\nTIME".into());
            let told = Event::Transition(told);
            let plain = event(&told, Style::PLAIN);
            assert_eq!(plain.find("7  "), lines[1].find("7  "), "{plain}");
            assert_eq!(plain.lines().count(), 1, "{plain}");
            assert!(!plain.contains('\u{1b}'), "{plain:?}");
            let style = Style {
                lines: true,
                colour: true,
            };
            let colour = event(&told, style);
            assert!(colour.contains('\u{1b}'), "{colour:?}");
            assert_eq!(colour.lines().count(), 1, "{colour}");
            assert!(!colour.contains("[2J") || !colour.contains("\u{1b}[2J"));
        }
    }

    #[test]
    fn only_a_terminal_gets_lines_and_only_with_colour_escapes() {
        let report = [example::<PairReport>("A pair")];
        let plain = pairs(&report, Style::PLAIN);
        assert!(!plain.contains(['\u{1b}', '─']), "{plain}");
        let lines = pairs(
            &report,
            Style {
                lines: true,
                colour: false,
            },
        );
        assert!(lines.contains('─') && !lines.contains('\u{1b}'), "{lines}");
        let colour = pairs(
            &report,
            Style {
                lines: true,
                colour: true,
            },
        );
        assert!(colour.contains('\u{1b}'), "{colour}");
    }

    #[test]
    fn text_from_the_network_cannot_drive_the_terminal() {
        let mut report: PairReport = example("A pair");
        let hostile = "\u{1b}[2Jx\nID  FEED\u{202e}";
        report.why = Some(hostile.into());
        report.call = Some(hostile.into());
        report.legs[0].channel = Some(hostile.into());
        for text in [
            pair(&report, Style::PLAIN),
            pairs(std::slice::from_ref(&report), Style::PLAIN),
            added(&report),
        ] {
            assert!(!text.contains(['\u{1b}', '\u{202e}']), "{text:?}");
            assert!(!text.contains("\nID  FEED"), "{text:?}");
        }
    }

    #[test]
    fn durations_read_well() {
        for (seconds, expected) in [
            (0, "0 s"),
            (59, "59 s"),
            (61, "1 min 1 s"),
            (3_600, "1 h 0 min"),
            (90_000, "1 d 1 h"),
        ] {
            assert_eq!(duration(seconds), expected);
        }
    }
}
