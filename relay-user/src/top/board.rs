//! What `top` knows and shows, apart from terminal, maps and daemon.

use std::collections::{HashMap, HashSet};

use relay_common::stream::{StreamSpec, leg_of};

use super::{
    daemon::Daemon,
    history::{History, Point},
};
use crate::{
    control::model::{Feed, StreamState},
    listing::{Filter, Order, Row, RowState},
    reception::Figures,
    registry::why_unproven,
    snapshot::{LEASE_OVER, Sample, Snapshot},
    stats::{self, StatsReport, Totals},
};

/// A stream, by its pair and leg; a pair without streams has no leg.
pub type Key = (u64, Option<u8>);

/// Everything that is on the screen, or could be.
#[derive(Debug)]
pub struct Board {
    /// What the daemon told last.
    pub daemon: Daemon,
    /// Why the maps cannot be read; none when they can.
    pub blind: Option<String>,
    /// The maps, as they were last.
    pub snapshot: Option<Snapshot>,
    /// Packets by verdict and reason.
    pub stats: Option<StatsReport>,
    totals: Option<Totals>,
    /// Packets relayed and passed in the intervals so far.
    pub relayed: Course,
    /// By what rows are sorted.
    pub order: Order,
    /// Which rows are shown.
    pub filter: Filter,
    rows: Vec<Row>,
    shown: Vec<usize>,
    histories: HashMap<Key, Past>,
    selected: Option<Key>,
}

/// A number over time.
pub type Course = std::collections::VecDeque<f64>;

#[derive(Debug, Default)]
struct Past {
    history: History,
    /// Index in the snapshot.
    sample: usize,
}

impl Board {
    /// An empty one.
    #[must_use]
    pub fn new(order: Order, filter: Filter) -> Self {
        Self {
            daemon: Daemon::Unasked,
            blind: None,
            snapshot: None,
            stats: None,
            totals: None,
            relayed: Course::new(),
            order,
            filter,
            rows: Vec::new(),
            shown: Vec::new(),
            histories: HashMap::new(),
            selected: None,
        }
    }

    /// Takes what the daemon told.
    pub fn tell(&mut self, daemon: Daemon) {
        self.daemon = daemon;
        self.compose();
    }

    /// Takes what the maps say.
    pub fn observe(&mut self, snapshot: Snapshot) {
        let at = snapshot.taken.monotonic;
        let mut there = HashSet::with_capacity(snapshot.streams.len());
        for (index, sample) in snapshot.streams.iter().enumerate() {
            let key = key_of(&sample.spec);
            there.insert(key);
            let past = self.histories.entry(key).or_default();
            past.sample = index;
            let reception = &sample.state.reception;
            let jitter = reception.clock_rate().is_some() && reception.packets != 0;
            let jitter = jitter.then(|| reception.jitter() as f64 / 1e6);
            past.history.observe(reception, jitter, at);
        }
        self.histories.retain(|key, _| there.contains(key));
        let totals = Totals {
            interface: snapshot.interface.clone(),
            at,
            reasons: stats::reasons(&snapshot.counters),
        };
        let stats = StatsReport::new(self.totals.as_ref(), &totals);
        if let Some(rate) = stats
            .verdicts
            .first()
            .and_then(|row| row.total.packets_per_second)
        {
            if self.relayed.len() == super::history::LENGTH {
                self.relayed.pop_front();
            }
            self.relayed.push_back(rate);
        }
        self.stats = Some(stats);
        self.totals = Some(totals);
        self.snapshot = Some(snapshot);
        self.blind = None;
        self.compose();
    }

    /// Takes that the maps cannot be read, and why.
    pub fn lose_sight(&mut self, why: String) {
        self.blind = Some(why);
        self.snapshot = None;
        self.stats = None;
        self.totals = None;
        self.histories.clear();
        self.compose();
    }

    /// Sorts by another column or the other way.
    pub fn sort(&mut self, order: Order) {
        self.order = order;
        self.arrange(self.position());
    }

    /// Shows other rows.
    pub fn filter(&mut self, filter: Filter) {
        self.filter = filter;
        self.arrange(self.position());
    }

    /// Rows in order, as far as the filter lets them through.
    #[must_use]
    pub fn shown(&self) -> Vec<&Row> {
        self.shown.iter().map(|index| &self.rows[*index]).collect()
    }

    /// How many rows are shown.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shown.len()
    }

    /// Whether no row is shown.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shown.is_empty()
    }

    /// All rows by state.
    #[must_use]
    pub fn census(&self) -> [(RowState, usize); 5] {
        let states = [
            RowState::Offloaded,
            RowState::Watching,
            RowState::Waiting,
            RowState::Suspended,
            RowState::Refused,
        ];
        states.map(|state| {
            let rows = self.rows.iter().filter(|row| row.state == state);
            (state, rows.count())
        })
    }

    /// The row that is chosen; none where none is shown.
    #[must_use]
    pub fn selected(&self) -> Option<&Row> {
        let key = self.selected?;
        self.rows.iter().find(|row| (row.pair, row.leg) == key)
    }

    /// Where the chosen row stands among those shown.
    #[must_use]
    pub fn position(&self) -> Option<usize> {
        let key = self.selected?;
        self.shown
            .iter()
            .position(|index| key_of_row(&self.rows[*index]) == key)
    }

    /// Chooses a row so many further down, or up.
    pub fn step(&mut self, rows: isize) {
        let last = self.shown.len().saturating_sub(1);
        let at = self.position().unwrap_or_default();
        self.choose(at.saturating_add_signed(rows).min(last));
    }

    /// Chooses the row at a position.
    pub fn choose(&mut self, position: usize) {
        let row = self.shown.get(position).map(|index| &self.rows[*index]);
        self.selected = row.map(key_of_row);
    }

    /// Chooses the opposite direction of the chosen stream.
    pub fn turn(&mut self) {
        if let Some((pair, Some(leg))) = self.selected {
            let opposite = (pair, Some(1 - leg.min(1)));
            if self.rows.iter().any(|row| key_of_row(row) == opposite) {
                self.selected = Some(opposite);
            }
        }
    }

    /// The latest points of a stream, at most so many.
    #[must_use]
    pub fn points(&self, row: &Row, count: usize) -> Vec<Point> {
        self.histories
            .get(&key_of_row(row))
            .map(|past| past.history.last(count).collect())
            .unwrap_or_default()
    }

    /// A stream as the maps have it.
    #[must_use]
    pub fn sample(&self, row: &Row) -> Option<&Sample> {
        let past = self.histories.get(&key_of_row(row))?;
        self.snapshot.as_ref()?.streams.get(past.sample)
    }

    /// Makes the rows of what is known.
    fn compose(&mut self) {
        let told = match &self.daemon {
            Daemon::Up(answer) => Some(&answer.pairs),
            Daemon::Unasked | Daemon::Away(_) => None,
        };
        let mut rows = Vec::with_capacity(self.rows.len());
        let mut pairs = HashSet::new();
        if let Some(snapshot) = &self.snapshot {
            let states: HashMap<Key, StreamState> = snapshot
                .streams
                .iter()
                .map(|sample| (key_of(&sample.spec), snapshot.stream_state(sample)))
                .collect();
            for sample in &snapshot.streams {
                let key = key_of(&sample.spec);
                pairs.insert(key.0);
                let past = self.histories.get(&key);
                let known = told.and_then(|told| {
                    let rows = told.get(&key.0)?;
                    rows.iter().find(|row| row.leg == key.1)
                });
                let mut row = measured(sample, states[&key], known);
                row.rate = past
                    .and_then(|past| past.history.latest())
                    .map(|point| f64::from(point.rate));
                row.silent_ms = (sample.state.reception.packets != 0).then(|| {
                    let arrival = sample.state.reception.arrival;
                    snapshot.taken.monotonic.saturating_sub(arrival) / 1_000_000
                });
                rows.push(row);
            }
        }
        for row in told.into_iter().flat_map(HashMap::values).flatten() {
            // Those in the maps are there already, and those that were are gone since.
            let outside = matches!(row.state, RowState::Waiting | RowState::Refused);
            if outside && !pairs.contains(&row.pair) {
                rows.push(row.clone());
            }
        }
        // Before they change: the indices are those of the rows as they were.
        let place = self.position();
        self.rows = rows;
        self.arrange(place);
    }

    /// Sorts and filters. Where the chosen row is gone, what is in its place is chosen.
    fn arrange(&mut self, place: Option<usize>) {
        let mut shown: Vec<usize> = (0..self.rows.len())
            .filter(|index| self.filter.matches(&self.rows[*index]))
            .collect();
        shown.sort_by(|one, other| self.order.compare(&self.rows[*one], &self.rows[*other]));
        self.shown = shown;
        if self.position().is_none() {
            let last = self.shown.len().saturating_sub(1);
            self.choose(place.unwrap_or_default().min(last));
        }
    }
}

fn key_of(spec: &StreamSpec) -> Key {
    (spec.pair.into(), Some(leg_of(spec.slot)))
}

fn key_of_row(row: &Row) -> Key {
    (row.pair, row.leg)
}

/// A stream of the maps as a row, with what the daemon knows besides.
fn measured(sample: &Sample, state: StreamState, known: Option<&Row>) -> Row {
    let Sample {
        spec,
        state: kernel,
    } = sample;
    let address = |end: relay_common::stream::Endpoint| {
        Some(std::net::SocketAddr::new(end.address.into(), end.port))
    };
    let figures = Figures::of(&kernel.reception);
    let told = || known.and_then(|row| row.why.clone());
    let why = match state {
        StreamState::Offloaded => None,
        StreamState::Watching => Some(why_unproven(kernel, spec.proof).into()),
        StreamState::Suspended if kernel.mode() == relay_common::stream::mode::OFFLOADED => {
            Some(LEASE_OVER.into())
        }
        StreamState::Suspended => told().or_else(|| Some("taken back".into())),
        StreamState::Waiting => told().or_else(|| Some("its next hop is not known".into())),
    };
    let feed = if spec.is_ami { Feed::Ami } else { Feed::Api };
    let (pair, leg) = key_of(spec);
    Row {
        pair,
        leg,
        state: state.into(),
        pair_state: state.into(),
        feed: Some(feed),
        from: address(spec.source),
        to: address(spec.new_destination),
        local: address(spec.local),
        channel: known.and_then(|row| row.channel.clone()),
        call: known.and_then(|row| row.call.clone()),
        codec: figures.codec.map(std::borrow::Cow::Borrowed),
        why,
        packets: kernel.packets,
        received: kernel.reception.packets.into(),
        loss: (kernel.reception.packets != 0).then_some(figures.lost_percent),
        jitter: figures.jitter_ms,
        mos: figures.mos,
        ..Row::default()
    }
}
