//! Suite `watching`: what it costs to look on, with thousands of streams in the table.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use relay_tests::{
    relay::Relay,
    terminal::Terminal,
    topology::{Direct, PBX_V4},
};
use relay_user::{
    control::client::Client,
    pair::{Leg, Pair, PayloadTypes, Proof},
};

use crate::report::{Column, Machine, Report, Row, Spread, Table};

/// Arguments of the suite.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Pairs in the table; each is two streams
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u16).range(1..10_000))]
    pairs: u16,
    /// How long each watcher is looked at, seconds
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
}

/// Where the metrics are served.
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9180);

/// Scrapes of each kind.
const SCRAPES: u32 = 20;

/// Runs of each command.
const RUNS: u32 = 5;

/// Measures.
pub(crate) fn run(options: &Options) -> Result<Report> {
    let net = Direct::new(2)?;
    let metrics = METRICS.to_string();
    // Their phones never send.
    let settings = ["--metrics", &metrics, "--expire", "86400"];
    let mut relay = Relay::attach(&net.pbx, "eth0", settings)?;
    net.pbx.run(|| add(&relay, options.pairs))?;

    let mut standing = Vec::new();
    for sort in ["id", "-loss"] {
        let [own, daemon] = top(&net, &relay, sort, options)?;
        standing.push(Row {
            name: format!("`top --sort {sort}`"),
            cells: vec![Some(own), Some(daemon)],
        });
    }
    let mut commands = Vec::new();
    for arguments in [&["list"][..], &["list", "--json"], &["stats"]] {
        let took = command(&net, &relay, arguments)?;
        commands.push(Row {
            name: format!("`{}`", arguments.join(" ")),
            cells: [took.median, took.lowest, took.highest].map(Some).to_vec(),
        });
    }
    let mut scrapes = Vec::new();
    for path in ["/metrics", "/metrics?streams=1000"] {
        let (bytes, cost) = scrape(&net, &relay, path)?;
        scrapes.push(Row {
            name: format!("`{path}`"),
            cells: vec![Some(cost.as_secs_f64() * 1000.0), Some(bytes as f64)],
        });
    }
    relay.signal(Signal::SIGKILL);
    relay.wait(Duration::from_secs(10))?;
    let mut screen = open(&net, &relay, "id")?;
    let [own, _] = share(&mut screen, None, options)?;
    standing.push(Row {
        name: "`top`, the daemon dead".to_owned(),
        cells: vec![Some(own), None],
    });

    let streams = 2 * u32::from(options.pairs);
    let table = |title: &str, of: &str, columns: &[(&str, usize)], rows| Table {
        title: title.to_owned(),
        of: of.to_owned(),
        columns: columns
            .iter()
            .map(|(name, decimals)| Column::new(name, *decimals))
            .collect(),
        rows,
    };
    Ok(Report {
        suite: "watching".to_owned(),
        title: format!("What looking on costs, with {streams} streams in the table"),
        command: "cargo xtask bench watching".to_owned(),
        machine: Machine::here()?,
        method: vec![format!(
            "`top` on a terminal of 24 lines, {} s each after its first look; its CPU, and what the daemon takes while it \
             asks. A command from its begin to its end, {RUNS} times. The daemon's CPU for a scrape is the mean of \
             {SCRAPES}, no two of which get the same answer.",
            options.seconds
        )],
        tables: vec![
            table(
                "CPU, in percent of one core",
                "what",
                &[("its own", 1), ("the daemon's", 1)],
                standing,
            ),
            table(
                "Time of a command",
                "command",
                &[("ms", 0), ("lowest", 0), ("highest", 0)],
                commands,
            ),
            table(
                "A scrape",
                "path",
                &[("the daemon's CPU, ms", 2), ("bytes", 0)],
                scrapes,
            ),
        ],
        plots: vec![],
        targets: vec![],
    })
}

fn add(relay: &Relay, pairs: u16) -> Result<()> {
    let client = Client::new(relay.socket());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        for number in 0..pairs {
            let leg = |leg: u8| -> Result<Leg> {
                let port = 10_000 + 4 * number + 2 * u16::from(leg);
                let phone = SocketAddr::new(Direct::phone_v4(leg), port);
                Ok(format!("{}={phone}", SocketAddr::new(PBX_V4, port)).parse()?)
            };
            let types = vec![PayloadTypes::same(0)];
            let pair = Pair::new([leg(0)?, leg(1)?], types, Proof::None)?;
            client.add(&pair).await?;
        }
        Ok(())
    })
}

fn open(net: &Direct, relay: &Relay, sort: &str) -> Result<Terminal> {
    let mut screen = Terminal::open(&net.pbx, relay.command(["top", "--sort", sort]), 24, 80)?;
    screen.wait_for("offloaded")?;
    // Its first look, which is at everything, is none of what it costs to go on.
    screen.watch(Duration::from_secs(5))?;
    Ok(screen)
}

fn top(net: &Direct, relay: &Relay, sort: &str, options: &Options) -> Result<[f64; 2]> {
    let mut screen = open(net, relay, sort)?;
    let shares = share(&mut screen, Some(relay), options)?;
    screen.press("q")?;
    ensure!(screen.end()?.success(), "`top` failed");
    Ok(shares)
}

/// CPU that a screen and the daemon take, in percent of one core.
fn share(screen: &mut Terminal, relay: Option<&Relay>, options: &Options) -> Result<[f64; 2]> {
    let daemon = || relay.map_or(Ok(Duration::ZERO), Relay::cpu_time);
    let before = [screen.process().cpu_time()?, daemon()?];
    let begin = Instant::now();
    screen.watch(Duration::from_secs(options.seconds))?;
    let took = begin.elapsed().as_secs_f64();
    let after = [screen.process().cpu_time()?, daemon()?];
    let share = |which: usize| {
        let used = after[which].saturating_sub(before[which]).as_secs_f64();
        100.0 * used / took
    };
    Ok([share(0), share(1)])
}

/// Time of a command, ms.
fn command(net: &Direct, relay: &Relay, arguments: &[&str]) -> Result<Spread> {
    let mut times = Vec::new();
    for _ in 0..RUNS {
        let begin = Instant::now();
        let mut command = relay.command(arguments);
        command.stdout(Stdio::null());
        let status = net.pbx.spawn(command)?.wait(Duration::from_secs(60))?;
        ensure!(status.success(), "{arguments:?}: {status}");
        times.push(begin.elapsed().as_secs_f64() * 1000.0);
    }
    Spread::of(&times).context("no run")
}

/// Bytes of an answer, and the daemon's CPU time for it.
fn scrape(net: &Direct, relay: &Relay, path: &str) -> Result<(usize, Duration)> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {METRICS}\r\nConnection: close\r\n\r\n");
    let before = relay.cpu_time()?;
    let mut bytes = 0;
    for _ in 0..SCRAPES {
        bytes = net.pbx.run(|| -> Result<usize> {
            let mut stream = TcpStream::connect(METRICS)?;
            stream.write_all(request.as_bytes())?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok(answer.len())
        })?;
        // Answers are kept for half a second.
        std::thread::sleep(Duration::from_millis(600));
    }
    let used = relay.cpu_time()?.checked_sub(before);
    Ok((bytes, used.context("CPU time went back")? / SCRAPES))
}
