//! The demo: the same calls without the relay, with it, and after `flush`, and a table that compares the three.

mod hearing;
mod screen;
mod site;

use std::{
    io,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, value_parser};

use crate::relay::{Relay, ami_arguments, binary};
use hearing::{Hearing, Part};
use screen::{Screen, grouped};
use site::{Laboratory, Office, Site};

/// How long a change of all calls may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks at the relay's state, which no event announces to clients.
const LOOK: Duration = Duration::from_millis(50);
/// A gap that an idle machine does not have.
const BUSY: Duration = Duration::from_millis(100);
/// DSCP of relayed packets: EF, RFC 3246.
const EF: u8 = 46;

/// Places calls through a PBX, first without and then with the relay, and compares.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask demo",
    max_term_width = 100,
    after_help = "Everything happens in network namespaces that are made for it and go with it."
)]
pub struct Options {
    /// Use a real Asterisk 22 instead of the small userspace PBX; installs it first if need be
    #[arg(long)]
    asterisk: bool,
    /// How many calls, 1 to 500 [default: 20, with --asterisk 100]
    #[arg(long, value_parser = value_parser!(u16).range(1..=500))]
    calls: Option<u16>,
    /// How long to measure each of the three times, 1 to 600 seconds [default: 7, with --asterisk 10]
    #[arg(long, value_parser = value_parser!(u16).range(1..=600))]
    seconds: Option<u16>,
    /// Stop while the calls are relayed, so that you can look around, until Enter is pressed
    #[arg(long)]
    hold: bool,
}

/// What a measurement cost, and whom.
#[derive(Clone, Copy, Debug)]
struct Load {
    /// RTP packets a second that the PBX received.
    pbx: f64,
    /// RTP packets a second that the kernel relayed.
    kernel: f64,
    /// CPU of the PBX, in percent of one core.
    pbx_cpu: f64,
    /// CPU of relay-user, in percent of one core.
    relay_cpu: Option<f64>,
}

/// A column of the table.
#[derive(Clone, Debug)]
struct Column {
    load: Load,
    hearing: Hearing,
}

/// Runs the demo. Fails, with every reason on standard error, when the relay did not do its job.
///
/// # Errors
/// Something the demo needs is missing, or one of its programs fails.
pub fn run(options: &Options) -> Result<ExitCode> {
    let screen = Screen::of_stdout();
    let calls = options
        .calls
        .unwrap_or(if options.asterisk { 100 } else { 20 });
    let seconds = options
        .seconds
        .unwrap_or(if options.asterisk { 10 } else { 7 });
    let length = Duration::from_secs(seconds.into());
    let program = binary("relay-user", "RELAY_USER_BIN")?;

    screen.title(&format!(
        "{calls} calls through {}, without relay-user and with it (about {} s)",
        if options.asterisk {
            "Asterisk"
        } else {
            "a PBX"
        },
        3 * seconds + if options.asterisk { 8 } else { 2 }
    ));
    screen.phase(
        "Build",
        "Two machines (network namespaces) on one cable: a PBX in one, all phones in the other.",
    );
    let mut site: Box<dyn Site> = if options.asterisk {
        screen.say("Two Asterisk 22 boot: the PBX, and one that plays the phones.");
        Box::new(Laboratory::open()?)
    } else {
        Box::new(Office::open()?)
    };
    screen.say("Look inside at any time, as root in another terminal:");
    screen.command(&format!("nsenter -t {} -n -m bash", site.pbx_id()));

    screen.phase("Calls", site.about());
    site.call(calls, &mut |up| {
        screen.progress(&format!("{up} of {calls} calls up"))
    })?;
    screen.result(&format!(
        "{calls} calls are up: {} RTP packets a second",
        grouped(f64::from(calls) * 100.0)
    ));

    screen.phase(
        "Without the relay",
        "The PBX is woken for every packet, to change nothing in it but addresses.",
    );
    site.mark(Part::Without)?;
    let without = measure(&*site, None, length, &screen)?;

    screen.phase(
        "With the relay, attached in mid-call",
        "It asks AMI which calls are merely forwarded, and the kernel takes these over.",
    );
    let arguments = ami_arguments(site.ami(), site.ami_user(), site.secret_file());
    screen.command(&format!(
        "relay-user attach eth0 {} \\\n    {}",
        arguments[..4].join(" "),
        arguments[4..].join(" ")
    ));
    site.mark(Part::TurningOn)?;
    let started = Instant::now();
    let relay = Relay::attach_plainly(site.pbx_machine(), "eth0", arguments)?;
    await_offloaded(&relay, calls.into(), &screen)?;
    screen.result(&format!(
        "{calls} of {calls} calls offloaded, {:.1} s after that command",
        started.elapsed().as_secs_f64()
    ));
    site.mark(Part::With)?;
    let with = measure(&*site, Some(&relay), length, &screen)?;
    screen.command("relay-user status");
    screen.output(&command(&relay, &["status"])?);
    if options.hold {
        screen.say("The calls go on. Look around in another terminal, then press Enter here.");
        screen.command(&format!(
            "nsenter -t {} -n -m {} list",
            site.pbx_id(),
            program.display()
        ));
        io::stdin().read_line(&mut String::new())?;
    }

    screen.phase(
        "After `flush`, in mid-call",
        "Every call goes back to the PBX, and stays there until its bridge changes.",
    );
    screen.command("relay-user flush");
    site.mark(Part::TurningOff)?;
    let flushed = command(&relay, &["flush"])?;
    screen.output(&format!(
        "…\n{}",
        flushed.lines().next_back().unwrap_or_default()
    ));
    site.mark(Part::After)?;
    let after = measure(&*site, Some(&relay), length, &screen)?;
    site.mark(Part::End)?;
    screen.command("relay-user detach eth0");
    screen.output(&command(&relay, &["detach", "eth0"])?);

    let note = site.note();
    let tolerated_loss = site.tolerated_loss();
    let streams = site.close()?;
    let column = |load, parts: &[Part]| Column {
        load,
        hearing: Hearing::of(&streams, parts),
    };
    let columns = [
        column(without, &[Part::Without]),
        column(with, &[Part::TurningOn, Part::With]),
        column(after, &[Part::TurningOff, Part::After]),
    ];
    screen.table(&columns);
    screen.say(note);
    screen.say("Loss, duplicates and gaps include the moments of attach and of flush.");
    if columns[0].hearing.largest_gap > BUSY {
        screen.say("This machine is busy: such gaps without the relay are its own doing.");
    }
    let faults = faults(&columns, tolerated_loss);
    if faults.is_empty() {
        screen.verdict(&format!(
            "The kernel carried {:.1}% of the packets; the PBX's CPU went from {:.1}% to {:.1}% \
             of a core.",
            share(&columns[1].load) * 100.0,
            columns[0].load.pbx_cpu,
            columns[1].load.pbx_cpu,
        ));
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("\nThe relay did not do its job:");
    for fault in faults {
        eprintln!("  - {fault}");
    }
    Ok(ExitCode::FAILURE)
}

/// Lets the calls go on for `length` and tells what it cost.
fn measure(
    site: &dyn Site,
    relay: Option<&Relay>,
    length: Duration,
    screen: &Screen,
) -> Result<Load> {
    let relay_cpu = || relay.map(Relay::cpu_time).transpose();
    let kernel = || relay.map_or(Ok(0), relayed);
    let count = || -> Result<_> {
        let (pbx, pbx_at) = (site.pbx_received()?, Instant::now());
        let (relayed, relayed_at) = (kernel()?, Instant::now());
        Ok([(pbx, pbx_at), (relayed, relayed_at)])
    };
    // The CPU is read innermost: the PBX's own counters cost the PBX a little.
    let before = count()?;
    let (started, cpu, own) = (Instant::now(), site.pbx_cpu()?, relay_cpu()?);
    loop {
        let passed = started.elapsed();
        let left = length.saturating_sub(passed);
        if left.is_zero() {
            break;
        }
        thread::sleep(left.min(Duration::from_secs(1)));
        screen.progress(&format!(
            "measuring {:.0} of {} s · CPU of the PBX {:.1}% · {} packets relayed",
            started.elapsed().as_secs_f64(),
            length.as_secs(),
            percent(site.pbx_cpu()? - cpu, started.elapsed()),
            if screen.is_live() {
                kernel()? - before[1].0
            } else {
                0
            },
        ));
    }
    let lasted = started.elapsed();
    let (cpu, own) = (
        percent(site.pbx_cpu()? - cpu, lasted),
        relay_cpu()?
            .zip(own)
            .map(|(now, then)| percent(now - then, lasted)),
    );
    let after = count()?;
    let [pbx, kernel] = [0, 1].map(|which| {
        let ((now, now_at), (then, then_at)) = (after[which], before[which]);
        (now - then) as f64 / (now_at - then_at).as_secs_f64()
    });
    let load = Load {
        pbx,
        kernel,
        pbx_cpu: cpu,
        relay_cpu: own,
    };
    screen.result(&format!(
        "packets/s: {} through the PBX, {} through the kernel; CPU of the PBX {:.1}%",
        grouped(load.pbx),
        grouped(load.kernel),
        load.pbx_cpu
    ));
    Ok(load)
}

fn percent(part: Duration, whole: Duration) -> f64 {
    part.as_secs_f64() / whole.as_secs_f64() * 100.0
}

/// Which part of the packets the kernel carried.
fn share(load: &Load) -> f64 {
    load.kernel / (load.kernel + load.pbx).max(1.0)
}

/// Packets that the kernel has relayed until now.
fn relayed(relay: &Relay) -> Result<u64> {
    let status = relay.json(["status"])?;
    let reasons = status["reasons"]
        .as_array()
        .context("`status` lists no reasons")?;
    let row = reasons.iter().find(|row| row["reason"] == "relayed");
    row.and_then(|row| row["packets"].as_u64())
        .context("`status` does not count relayed packets")
}

fn await_offloaded(relay: &Relay, calls: u64, screen: &Screen) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = relay.json(["status"])?;
        let offloaded = status["offloaded"].as_u64().unwrap_or(0);
        if offloaded == calls {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!(
                "only {offloaded} of {calls} calls are offloaded after {PATIENCE:?}:\n{}",
                command(relay, &["list"])?
            );
        }
        screen.progress(&format!("{offloaded} of {calls} calls offloaded"));
        thread::sleep(LOOK);
    }
}

/// What a command of relay-user prints.
fn command(relay: &Relay, arguments: &[&str]) -> Result<String> {
    let output = relay.run(arguments)?;
    if !output.status.success() {
        bail!(
            "relay-user {}: {}: {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What was not as promised, in words. `tolerated_loss` is a part of the packets sent.
fn faults([without, with, after]: &[Column; 3], tolerated_loss: f64) -> Vec<String> {
    let mut faults = Vec::new();
    let mut check = |right: bool, fault: String| {
        if !right {
            faults.push(fault);
        }
    };
    for (column, when) in [
        (
            without,
            "without the relay (this machine is too busy: close something, or take fewer --calls)",
        ),
        (with, "with the relay"),
        (after, "after flush"),
    ] {
        let Hearing {
            sent,
            lost,
            duplicates,
            ..
        } = column.hearing;
        check(sent > 0, format!("no phone sent anything {when}"));
        check(
            lost as f64 <= sent as f64 * tolerated_loss,
            format!("{lost} of {sent} packets were lost {when}"),
        );
        check(
            duplicates == 0,
            format!("{duplicates} packets came twice {when}"),
        );
    }
    let share_with = share(&with.load) * 100.0;
    check(
        // One packet of a phone without RTCP in 3 seconds, which is one of 50 where only a second is measured.
        share_with >= 97.0,
        format!(
            "only {share_with:.1}% of the packets went through the kernel with the relay; it should be all but a few"
        ),
    );
    check(
        with.hearing.dscp == [EF],
        format!(
            "packets arrived with DSCP {:?} with the relay; it should be {EF} (EF)",
            with.hearing.dscp
        ),
    );
    check(
        after.load.kernel == 0.0,
        format!(
            "after flush the kernel still relayed {:.1} packets a second",
            after.load.kernel
        ),
    );
    check(
        after.load.pbx >= without.load.pbx * 0.95,
        format!(
            "after flush {} packets a second went through the PBX; it should be {} again",
            grouped(after.load.pbx),
            grouped(without.load.pbx)
        ),
    );
    faults
}
