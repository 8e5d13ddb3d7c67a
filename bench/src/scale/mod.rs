//! Suite `scale`: what a thousand streams cost, and what a million.

mod calls;
mod chase;
mod packets;
mod population;
mod registration;

use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use relay_user::control::model::BATCH;

use self::{calls::Exchange, packets::Ring, registration::Registered};
use crate::report::{
    Axis, Bound, Column, Line, Machine, Plot, PlotKind, Report, Row, Spread, Table, Target, grouped,
};

/// Arguments of the suite.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Rounds; each measures the cost of a packet at every number of streams
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(3..))]
    rounds: u32,
    /// The CPU that packets are shown on
    #[arg(long, default_value_t = 0)]
    cpu: usize,
    /// Calls of the PBX
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u16).range(1..=i64::from(calls::MOST)))]
    calls: u16,
    /// How long the controller is looked at while calls come and go, and while none does, seconds
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
}

/// Streams in the maps.
const STREAMS: [u32; 4] = [1_000, 10_000, 100_000, 1_000_000];
/// Of these, the number that list and adoption have their targets at.
const MANY: u32 = 100_000;
/// Times that a command or a restart is repeated.
const REPEATS: usize = 5;
/// Pairs whose registration is one sample, when each is a request of its own.
const SINGLY: u32 = 200;
/// The same, when a request holds as many as it may.
const TOGETHER: u32 = 10 * BATCH as u32;
/// Calls that end or begin in a second.
const CHANGES: u32 = 50;

/// Measures.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let packets = Packets::measure(options)?;
    let api = Api::measure()?;
    let ami = Ami::measure(options)?;
    let (few, most) = (packets.cost(0)?, packets.cost(STREAMS.len() - 1)?);
    let list = api.list_of(MANY)?;
    let largest = packets.rings.last().context("no ring")?;
    let memory = largest.memory;
    let line = packets.line;
    Ok(Report {
        suite: "scale".to_owned(),
        title: "From a thousand streams to a million".to_owned(),
        command: "cargo xtask bench scale".to_owned(),
        machine: Machine::here()?,
        method: method(),
        targets: vec![
            Target {
                what: "cost per packet, 1 M ÷ 1 k streams".to_owned(),
                bound: Bound::AtMost(1.6),
                measured: most.median / few.median,
                decimals: 2,
                obstacle: Some(obstacle(few, most, line, memory.stated)),
            },
            Target {
                what: "memory per stream, kernel side, all maps, bytes".to_owned(),
                bound: Bound::AtMost(512.0),
                measured: memory.a_stream(),
                decimals: 0,
                obstacle: Some(memory_obstacle(largest, memory)),
            },
            Target {
                what: "pairs registered per second through the API".to_owned(),
                bound: Bound::AtLeast(20_000.0),
                measured: api.together.median,
                decimals: 0,
                obstacle: Some(api.registration_obstacle()),
            },
            Target {
                what: "`list --json` of 100 k streams, seconds".to_owned(),
                bound: Bound::AtMost(0.5),
                measured: list.median,
                decimals: 2,
                obstacle: Some(api.list_obstacle(list)),
            },
        ],
        plots: vec![plot(&packets)?],
        tables: vec![
            by_streams(&packets, &api)?,
            by_map(&packets)?,
            controller(&api, &ami),
        ],
    })
}

fn method() -> Vec<String> {
    vec![
        "Cost of a packet: `BPF_PROG_TEST_RUN` of the XDP program, everything on, over maps with as many streams as the \
         row says. Each stream turns its packet into one of another stream, in a ring of all streams in random order, \
         so that every run looks up a stream that was not used for long. Counters and the last frame must show that \
         every run relayed its packet. All rows are measured in each round, on one processor."
            .to_owned(),
        "Memory is what the kernel's own account of each map says, and the growth of its allocations (slab, vmalloc and \
         per-CPU in `/proc/meminfo`) from before the maps were made until all streams were in them; the target takes \
         the larger. The maps have room for exactly the streams of the row."
            .to_owned(),
        format!(
            "API: a client registers pairs on the daemon's socket until all are in the maps, one with each request or \
             {BATCH} with each. Every phone has an address of its own, so each pair costs two route lookups too, and each \
             stream awaits proof. `list` is the command from begin to end, its output \
             to `/dev/null`. Adoption is from the start of a daemon until it is ready, the earlier one having left \
             its pairs (`--persist`)."
        ),
        format!(
            "AMI: a fake PBX on the same machine begins all calls at once, and the time runs until the daemon has every \
             stream in the maps; it includes the PBX's own work. Then {CHANGES} calls a second end or begin, half \
             each. Nobody sends, which is the most work for the daemon: it looks for each stream at other addresses."
        ),
    ]
}

/// What keeps the cost of a packet from staying as it is.
fn obstacle(few: Spread, most: Spread, line: f64, bytes: u64) -> String {
    format!(
        "A packet of {} streams, all of them in caches, takes {} ns. The maps of {} take {} MB, in which one \
         line that has to be waited for takes {} ns here: a packet that waited for one such line, and for nothing else, \
         would cost {:.1} times as much already. What is added, {} ns, is the time of {:.1} such lines.",
        grouped(STREAMS[0].into(), 0),
        grouped(few.median, 0),
        grouped(STREAMS[STREAMS.len() - 1].into(), 0),
        grouped(bytes as f64 / 1e6, 0),
        grouped(line, 0),
        (few.median + line) / few.median,
        grouped(most.median - few.median, 0),
        (most.median - few.median) / line,
    )
}

/// Where the memory of a stream is.
fn memory_obstacle(largest: &Measured, memory: Memory) -> String {
    let a_stream = |bytes: u64| grouped(bytes as f64 / f64::from(memory.streams), 0);
    let of_maps = largest
        .maps
        .iter()
        .filter(|(_, bytes)| 100 * bytes > memory.stated);
    let of_maps = of_maps.map(|(name, bytes)| format!("{} in `{name}`", a_stream(*bytes)));
    format!(
        "By the maps' own account a stream has {} bytes: {}. The kernel allocated {} for it.",
        a_stream(memory.stated),
        of_maps.collect::<Vec<_>>().join(", "),
        a_stream(memory.grown),
    )
}

/// Programs and maps, without a daemon.
struct Packets {
    rings: Vec<Measured>,
    /// Of a line of as much memory as the largest maps take, ns.
    line: f64,
}

/// What was measured with a number of streams.
struct Measured {
    streams: u32,
    cost: Option<Spread>,
    memory: Memory,
    maps: Vec<(&'static str, u64)>,
}

/// What the maps take.
#[derive(Clone, Copy)]
struct Memory {
    streams: u32,
    stated: u64,
    grown: u64,
}

impl Memory {
    /// Bytes of each stream, by the larger account.
    fn a_stream(self) -> f64 {
        self.stated.max(self.grown) as f64 / f64::from(self.streams)
    }
}

impl Packets {
    fn measure(options: &Options) -> Result<Self> {
        let everywhere = sched_getaffinity(Pid::from_raw(0))?;
        let mut cpus = CpuSet::new();
        cpus.set(options.cpu)?;
        sched_setaffinity(Pid::from_raw(0), &cpus)
            .with_context(|| format!("cannot run on CPU {} only", options.cpu))?;
        let mut rings = STREAMS
            .iter()
            .map(|streams| Ring::new(*streams))
            .collect::<Result<Vec<_>>>()?;
        for round in 0..=options.rounds {
            for ring in &mut rings {
                let cost = ring.measure()?;
                // The first warms caches up.
                if round > 0 {
                    ring.samples.push(cost);
                }
            }
        }
        let rings: Vec<_> = rings
            .into_iter()
            .map(|ring| Measured {
                streams: ring.streams(),
                cost: Spread::of(&ring.samples),
                memory: Memory {
                    streams: ring.streams(),
                    stated: ring.memory().iter().map(|(_, bytes)| bytes).sum(),
                    grown: ring.grown(),
                },
                maps: ring.memory().to_vec(),
            })
            .collect();
        let most = rings.iter().map(|ring| ring.memory.stated).max();
        let line = chase::time_of_a_line(most.context("no ring")?);
        // Children inherit it.
        sched_setaffinity(Pid::from_raw(0), &everywhere)?;
        Ok(Self { rings, line })
    }

    fn cost(&self, ring: usize) -> Result<Spread> {
        self.rings[ring].cost.context("not measured")
    }
}

/// A daemon and a client.
struct Api {
    /// Pairs per second.
    singly: Spread,
    together: Spread,
    /// Daemon's CPU time for a pair of many, µs.
    cpu: f64,
    /// By number of streams, seconds.
    list: Vec<(u32, Spread)>,
    /// Daemon's CPU time for a list of [`MANY`] streams, seconds.
    list_cpu: f64,
    /// Of [`MANY`] streams, seconds.
    adoption: Spread,
}

impl Api {
    fn measure() -> Result<Self> {
        let mut registered = Registered::none(STREAMS[STREAMS.len() - 1])?;
        let (mut singly, mut together) = (Vec::new(), Vec::new());
        let (mut list, mut adoption) = (Vec::new(), Vec::new());
        let (mut cpu, mut list_cpu) = (Duration::ZERO, Duration::ZERO);
        let mut added = 0;
        for streams in STREAMS {
            let pairs = streams / 2;
            while singly.len() < REPEATS && registered.pairs() + SINGLY <= pairs {
                let took = registered.add_singly(SINGLY)?;
                singly.push(f64::from(SINGLY) / took.as_secs_f64());
            }
            while registered.pairs() < pairs {
                let count = TOGETHER.min(pairs - registered.pairs());
                let before = registered.relay.cpu_time()?;
                let took = registered.add(count)?;
                // A short batch says nothing of long ones.
                if count == TOGETHER {
                    together.push(f64::from(count) / took.as_secs_f64());
                    cpu += registered.relay.cpu_time()?.saturating_sub(before);
                    added += count;
                }
            }
            registered.check()?;
            let before = registered.relay.cpu_time()?;
            let times = (0..REPEATS).map(|_| registered.command(&["list", "--json"]));
            let times = times.map(|time| time.map(|it| it.as_secs_f64()));
            let times = Spread::of(&times.collect::<Result<Vec<_>>>()?);
            list.push((streams, times.context("not measured")?));
            if streams == MANY {
                list_cpu = registered.relay.cpu_time()?.saturating_sub(before);
                for _ in 0..REPEATS {
                    adoption.push(registered.restart()?.as_secs_f64());
                }
            }
        }
        let spread = |samples: &[f64]| Spread::of(samples).context("not measured");
        Ok(Self {
            singly: spread(&singly)?,
            together: spread(&together)?,
            cpu: cpu.as_secs_f64() * 1e6 / f64::from(added),
            list,
            list_cpu: list_cpu.as_secs_f64() / REPEATS as f64,
            adoption: spread(&adoption)?,
        })
    }

    /// What a pair takes, and whose time that is.
    fn registration_obstacle(&self) -> String {
        let pair = 1e6 / self.together.median;
        format!(
            "A pair takes {} µs from begin to end, {} µs of which the daemon computes: two route lookups, two entries of \
             a map, two states, and the pair's place in its own tables, besides the look at all pairs that are there \
             already. It takes {} to {} µs in the fastest and in the slowest {} pairs.",
            grouped(pair, 1),
            grouped(self.cpu, 1),
            grouped(1e6 / self.together.highest, 1),
            grouped(1e6 / self.together.lowest, 1),
            grouped(TOGETHER.into(), 0),
        )
    }

    /// What a stream of a long list takes.
    fn list_obstacle(&self, list: Spread) -> String {
        format!(
            "The daemon computes {} s for a list, {} µs for each stream: it reads the states, makes the reports and \
             writes them as JSON, on two threads. The command passes on what it gets, and ends after {} to {} s.",
            grouped(self.list_cpu, 2),
            grouped(1e6 * self.list_cpu / f64::from(MANY), 1),
            grouped(list.lowest, 2),
            grouped(list.highest, 2),
        )
    }

    fn list_of(&self, streams: u32) -> Result<Spread> {
        let found = self.list.iter().find(|(of, _)| *of == streams);
        found.map(|(_, spread)| *spread).context("not measured")
    }
}

/// A daemon and a PBX.
struct Ami {
    calls: u16,
    /// Calls per second, and the daemon's CPU time for each, µs.
    announced: f64,
    cpu: f64,
    /// Shares of one processor, percent.
    idle: f64,
    changing: f64,
}

impl Ami {
    fn measure(options: &Options) -> Result<Self> {
        let mut exchange = Exchange::new()?;
        let calls = f64::from(options.calls);
        let announced = exchange.announce(options.calls)?;
        let time = Duration::from_secs(options.seconds);
        Ok(Self {
            calls: options.calls,
            announced: calls / announced.time.as_secs_f64(),
            cpu: announced.cpu.as_secs_f64() * 1e6 / calls,
            idle: exchange.go_on(time, 0)?.share(),
            changing: exchange.go_on(time, CHANGES)?.share(),
        })
    }
}

fn by_streams(packets: &Packets, api: &Api) -> Result<Table> {
    let rows = packets.rings.iter().map(|ring| {
        let cost = ring.cost.context("not measured")?;
        let a_stream = |bytes: u64| Some(bytes as f64 / f64::from(ring.streams));
        let list = api.list_of(ring.streams)?;
        Ok(Row {
            name: grouped(ring.streams.into(), 0),
            cells: vec![
                Some(cost.median),
                Some(cost.lowest),
                Some(cost.highest),
                a_stream(ring.memory.stated),
                a_stream(ring.memory.grown),
                Some(list.median),
                Some(list.lowest),
                Some(list.highest),
            ],
        })
    });
    Ok(Table {
        title: "By the number of streams".to_owned(),
        of: "streams".to_owned(),
        columns: vec![
            Column::new("ns a packet", 0),
            Column::new("lowest", 0),
            Column::new("highest", 0),
            Column::new("bytes a stream, by the maps' account", 0),
            Column::new("bytes a stream, by what the kernel allocated", 0),
            Column::new("s for `list --json`", 3),
            Column::new("lowest", 3),
            Column::new("highest", 3),
        ],
        rows: rows.collect::<Result<_>>()?,
    })
}

fn by_map(packets: &Packets) -> Result<Table> {
    let ring = packets.rings.last().context("no ring")?;
    let streams = f64::from(ring.streams);
    let rows = ring.maps.iter().map(|(name, bytes)| Row {
        name: format!("`{name}`"),
        cells: vec![Some(*bytes as f64 / 1e6), Some(*bytes as f64 / streams)],
    });
    Ok(Table {
        title: format!(
            "Memory of the maps with {} streams, by their own account",
            grouped(streams, 0)
        ),
        of: "map".to_owned(),
        columns: vec![Column::new("MB", 1), Column::new("bytes a stream", 1)],
        rows: rows.collect(),
    })
}

fn controller(api: &Api, ami: &Ami) -> Table {
    let spread = |name: &str, spread: Spread| Row {
        name: name.to_owned(),
        cells: vec![
            Some(spread.median),
            Some(spread.lowest),
            Some(spread.highest),
        ],
    };
    let once = |name: String, value: f64| Row {
        name,
        cells: vec![Some(value), None, None],
    };
    let calls = grouped(ami.calls.into(), 0);
    let idle = format!("CPU with {calls} calls, % of a processor");
    let changing = format!("CPU with {calls} calls, {CHANGES} changes a second, % of a processor");
    Table {
        title: "The controller".to_owned(),
        of: "what".to_owned(),
        columns: vec![
            Column::new("figure", 1),
            Column::new("lowest", 1),
            Column::new("highest", 1),
        ],
        rows: vec![
            spread("pairs a second, one with each request", api.singly),
            spread(
                &format!("pairs a second, {BATCH} with each request"),
                api.together,
            ),
            once("CPU time of the latter, µs a pair".to_owned(), api.cpu),
            spread(
                &format!(
                    "seconds to adopt {} streams after a restart",
                    grouped(MANY.into(), 0)
                ),
                api.adoption,
            ),
            once(
                format!("calls a second, {calls} announced by AMI at once"),
                ami.announced,
            ),
            once("CPU time of that, µs a call".to_owned(), ami.cpu),
            once(idle, ami.idle),
            once(changing, ami.changing),
        ],
    }
}

fn plot(packets: &Packets) -> Result<Plot> {
    let points = packets.rings.iter().map(|ring| {
        let cost = ring.cost.context("not measured")?;
        Ok([f64::from(ring.streams), cost.median])
    });
    let axis = |name: &str, is_logarithmic| Axis {
        name: name.to_owned(),
        is_logarithmic,
    };
    Ok(Plot {
        file: "scale-packet".to_owned(),
        title: "Cost of a packet by the number of streams".to_owned(),
        kind: PlotKind::Lines {
            x: axis("streams", true),
            y: axis("ns a packet", false),
            lines: vec![Line {
                name: "XDP, relayed, IPv4".to_owned(),
                points: points.collect::<Result<_>>()?,
            }],
        },
    })
}
