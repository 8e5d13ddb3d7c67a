//! `relay-user capture`.

use std::{
    fs::File,
    io::{self, IsTerminal as _},
    os::{fd::AsFd as _, unix::fs::OpenOptionsExt as _},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use clap::{ArgGroup, Args, value_parser};
use relay_common::capture::{SNAP_MAX, SNAP_MIN};
use tokio::signal::unix::{SignalKind, signal};

use super::{reader_left, report, wait_for};
use crate::{
    capture::{self, Limits, Summary},
    config,
    datapath::{Selection, Tap},
    privileges,
};

/// Copy what the kernel relays into a capture file
///
/// tcpdump does not see what XDP relays. This copies every packet of a pair, or of all: as it was received,
/// with what became of it and why; as the kernel sent it; and what the PBX sends itself. The file is
/// pcapng, for Wireshark and tshark: each packet has its direction, and a comment such as `eth0 received:
/// relayed, pair 7, first leg`. RTCP, and whatever belongs to no pair, tcpdump shows.
///
/// Nothing is relayed differently. There is one capture at a time on an interface. It ends on Ctrl-C, when its
/// reader closes, or when the relay is detached, and then tells how many packets were captured, and how many
/// were not because they came faster than they were written.
///
/// Calls are private: the file is for its owner alone, and `--snap 54` leaves the voice out.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("pairs").required(true))]
#[command(after_long_help = "\
EXAMPLES
  Pair 7 of `relay-user list`, into a file:
    relay-user capture 7 -w call.pcapng
  What becomes of every packet, as it happens:
    relay-user capture --all -w - | tshark -l -r - -T fields -e frame.comment
  Loss and jitter of every stream, over ten seconds:
    relay-user capture --all --seconds 10 -w - | tshark -q -z rtp,streams -d udp.port==1-65535,rtp -r -
  One packet in a hundred, and of each the headers alone:
    relay-user capture --all --sample 100 --snap 54 -w sample.pcapng")]
pub(super) struct Capture {
    /// Number of the pair, as `relay-user list` shows it
    #[arg(value_name = "ID", value_parser = value_parser!(u64).range(1..), group = "pairs")]
    id: Option<u64>,
    /// Those of all pairs
    #[arg(long, group = "pairs")]
    all: bool,
    /// File to write, which must not exist yet; - is standard output, for a pipe
    #[arg(short, long, value_name = "FILE", value_parser = config::path)]
    write: PathBuf,
    /// Stop after so many packets
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Stop after so long
    #[arg(long, value_name = "SECONDS", value_parser = config::some_time)]
    seconds: Option<Duration>,
    /// Copy no more than the first BYTES of each packet, 28 to 2048
    #[arg(long, value_name = "BYTES", default_value_t = SNAP_MAX as u32, value_parser = value_parser!(u32).range(SNAP_MIN as i64..=SNAP_MAX as i64))]
    snap: u32,
    /// Copy one packet in N, at random
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..))]
    sample: u32,
    /// Interface of the relay; needed only where there are several
    #[arg(long, value_name = "IFACE", value_parser = config::interface)]
    interface: Option<String>,
}

impl Capture {
    /// Why the arguments do not go together.
    pub(super) fn fault(&self) -> Option<&'static str> {
        (self.is_piped() && io::stdout().is_terminal()).then_some(
            "a capture is nothing for a terminal: name a file, or pipe it, as in `relay-user capture --all -w - | tshark -r -`",
        )
    }

    fn is_piped(&self) -> bool {
        self.write.as_os_str() == "-"
    }
}

/// Captures, and tells what came of it.
pub(super) fn run(arguments: &Capture) -> anyhow::Result<()> {
    privileges::check_for_capturing()?;
    let mut tap = Tap::open(arguments.interface.as_deref())?;
    if let Some(id) = arguments.id
        && !tap.knows(id)?
    {
        report(&format!(
            "the kernel has no stream of pair {id} now: what comes later is captured"
        ));
    }
    tap.claim(&Selection {
        pair: arguments.id,
        snap: arguments.snap,
        sample: arguments.sample,
    })?;
    let out = output(arguments)?;
    privileges::keep_for_capturing()?;
    let limits = Limits {
        count: arguments.count,
        time: arguments.seconds,
    };
    let summary = wait_for(async {
        let mut signals = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
        ]
        .into_iter()
        .map(signal)
        .collect::<io::Result<Vec<_>>>()
        .context("cannot wait for signals")?;
        let stop = async {
            let [interrupt, terminate, hangup] = &mut signals[..] else {
                unreachable!("three signals")
            };
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
                () = reader_left(), if arguments.is_piped() => {}
            }
        };
        Ok(capture::run(&mut tap, out, arguments.snap, limits, stop).await?)
    })?;
    report(&words(&summary, &tap.interface().name));
    Ok(())
}

/// The file. One that exists may be read by others, or be a link to something else.
fn output(arguments: &Capture) -> anyhow::Result<File> {
    if arguments.is_piped() {
        let stdout = io::stdout().as_fd().try_clone_to_owned();
        return Ok(stdout.context("standard output is closed")?.into());
    }
    let path = &arguments.write;
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => anyhow!(
                "{} is there already, and nothing is written over: name another file",
                path.display()
            ),
            _ => anyhow!("cannot create {}: {error}", path.display()),
        })
}

fn words(summary: &Summary, interface: &str) -> String {
    let Summary {
        captured,
        missed,
        detached,
    } = summary;
    let packets = if *captured == 1 { "packet" } else { "packets" };
    let end = if *detached {
        format!("the relay was detached from {interface}: ")
    } else {
        String::new()
    };
    format!("{end}{captured} {packets} captured, {missed} missed")
}
