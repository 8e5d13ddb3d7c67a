//! The command line: what is typed, what it means, and how it ends.

mod capture;
mod doctor;
mod qos;
mod watch;

use std::{
    env,
    ffi::OsString,
    fmt,
    io::{self, Write as _},
    net::SocketAddr,
    os::fd::AsFd as _,
    path::PathBuf,
    process::ExitCode,
    slice,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::{ArgAction, Args, CommandFactory as _, Parser, Subcommand, error::ErrorKind};
use serde::Serialize;
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::sleep,
};

use crate::{
    config::{self, Mode, Settings},
    control::{
        client::{Client, ClientError},
        model::{self, Detached, PairList, PairReport, PairState},
        socket,
    },
    daemon,
    dscp::Dscp,
    listing::{self, Column, Filter, Order},
    logging::{self, LogFormat},
    output::{self, Style},
    pair::{Leg, Pair, PayloadTypes, Proof},
    priority::Priority,
    secret::SecretError,
    source::{Found, Instead, Source},
    stats::StatsReport,
    top,
};

const ABOUT: &str = "Relays the RTP of bridged calls in the kernel, past the PBX";

const LONG_ABOUT: &str = "\
Relays the RTP of bridged calls in the kernel, past the PBX.

A PBX such as Asterisk forwards every packet of a bridged call through a process, though it changes \
nothing in it but addresses. relay-user attaches an XDP program to a network interface that does the \
same in the kernel. Signalling and RTCP stay with the PBX, and so does every packet in doubt: when \
relay-user ends or fails, calls go on as they did without it.

`relay-user attach IFACE` is the daemon: it runs in the foreground, learns from Asterisk's manager \
interface (AMI) which calls can be relayed, and serves a control socket. All other commands talk to \
that daemon, but for three that need none: `relay-user doctor` looks for what keeps the relay from \
working, `relay-user capture` copies packets from the kernel, and `relay-user qos` gives calls their \
share of a slow line.";

const AFTER_LONG_HELP: &str = "\
WORDS
  leg      One side of a call as the PBX sees it, written LOCAL=REMOTE: where the PBX receives
           RTP, and where the phone sends from and receives at. IPv6 addresses are in brackets:
             192.0.2.1:10000=192.0.2.11:30000
             [2001:db8::1]:10000=[2001:db8::11]:30000
  pair     Two legs bridged to each other.
  stream   One direction of a pair.
  offload  The kernel relays a stream; taken back, it goes through the PBX again.

EXAMPLES
  Relay what Asterisk bridges on eth0:
    relay-user attach eth0 --ami 127.0.0.1:5038 --ami-user relay \\
        --ami-secret-file /etc/relay-user/ami.secret
  See what would keep it from working:
    relay-user doctor eth0
  See how it fares:
    relay-user status
    relay-user list
    relay-user top
    relay-user stats
    relay-user events
  Relay a call by hand:
    relay-user add 192.0.2.1:10000=192.0.2.11:30000 192.0.2.1:10002=192.0.2.12:30002
  Keep calls clear on an uplink of 2 Mbit/s:
    relay-user qos apply eth0 --uplink 2mbit

FILES
  /run/relay-user/IFACE.sock       control socket of the daemon on IFACE, for root only
  /run/relay-user/qos/IFACE.json   what `qos clear` puts back

ENVIRONMENT
  RELAY_AMI_SECRET  the AMI secret, where no --ami-secret-file is given
  NO_COLOR          when set and not empty: no colour

EXIT STATUS
  0  done
  1  failed; standard error tells why, and what to do. `doctor`: there is a problem
  2  wrong usage";

/// A command line that was understood, and whose arguments are valid.
#[derive(Debug)]
pub struct Invocation(Task);

/// Why nothing is run: the arguments are wrong, or ask for help or the version alone.
#[derive(Debug)]
pub struct Stop(clap::Error);

/// The arguments, validated.
#[derive(Debug)]
enum Task {
    Attach(Box<Attach>),
    Detach(Detach),
    Ask {
        target: Target,
        form: Form,
        request: Request,
    },
    List(List),
    Show(Show),
    Stats(Stats),
    Top(Top, Filter),
    Follow(Events),
    Capture(capture::Capture),
    Doctor(doctor::Doctor),
    Qos(qos::Qos),
}

/// What the daemon is asked.
#[derive(Debug)]
enum Request {
    Add(Pair),
    Remove(u64),
    Flush,
    Status,
}

#[derive(Debug, Parser)]
#[command(
    name = "relay-user",
    version,
    about = ABOUT,
    long_about = LONG_ABOUT,
    after_help = "`relay-user --help` tells more, `relay-user COMMAND --help` all about a command.",
    after_long_help = AFTER_LONG_HELP,
    max_term_width = 100,
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Attach(Attach),
    Add(Add),
    List(List),
    Show(Show),
    Remove(Remove),
    Flush(Flush),
    Status(Status),
    Stats(Stats),
    Top(Top),
    Events(Events),
    Capture(capture::Capture),
    Detach(Detach),
    Doctor(doctor::Doctor),
    Qos(qos::Qos),
}

/// Attach the relay to an interface and run as its daemon
///
/// Runs in the foreground until SIGTERM or SIGINT, then gives every call back to the PBX and leaves
/// nothing in the kernel. It tells systemd when it is ready.
///
/// Every setting but the interface and the log's can stand in a configuration file as well. Flags win
/// over the environment, and the environment over the file.
#[derive(Debug, Args)]
#[command(after_long_help = "\
EXAMPLES
  With pairs from Asterisk:
    relay-user attach eth0 --ami 127.0.0.1:5038 --ami-user relay \\
        --ami-secret-file /etc/relay-user/ami.secret
  With pairs from `relay-user add` alone:
    relay-user attach eth0
  With a configuration file, and every packet keeping the DSCP of its phone:
    relay-user attach eth0 --config /etc/relay-user/eth0.toml --dscp keep")]
struct Attach {
    /// Network interface that the calls' RTP comes in on
    #[arg(value_name = "IFACE", value_parser = config::interface)]
    interface: String,
    /// How to attach: XDP in the driver, XDP in the kernel's generic path, traffic control (tc), which
    /// sends through the queueing discipline, or what fits [default: auto]
    #[arg(long)]
    mode: Option<Mode>,
    /// Asterisk's manager interface, such as 127.0.0.1:5038; without it pairs come from `add` alone
    #[arg(long, value_name = "HOST:PORT", value_parser = config::ami_address)]
    ami: Option<String>,
    /// User of manager.conf to log in as
    #[arg(long, value_name = "NAME", value_parser = config::ami_user)]
    ami_user: Option<String>,
    /// File with the user's secret, which only its owner may read; or set RELAY_AMI_SECRET
    #[arg(long, value_name = "FILE", value_parser = config::path)]
    ami_secret_file: Option<PathBuf>,
    /// Configuration file (TOML) for what no flag says
    #[arg(long, value_name = "FILE", value_parser = config::path)]
    config: Option<PathBuf>,
    /// Size of the stream table, 2 to 1048576; a pair takes two [default: 65536]
    #[arg(long, value_name = "N", value_parser = config::max_streams)]
    max_streams: Option<u32>,
    /// Equal packets in a row that prove that the PBX forwards a stream unchanged, 1 to 255; 0 relays
    /// what signalling says without proof [default: 8]
    #[arg(long, value_name = "N", value_parser = config::proof)]
    proof: Option<u8>,
    /// While a phone sends no RTCP, one of its packets goes through the PBX this often, lest it hang
    /// up; where the PBX's rtp_timeout is known, a third of that counts; 68 at most [default: 3]
    #[arg(long, value_name = "SECONDS", value_parser = config::time)]
    keepalive: Option<Duration>,
    /// How long calls go on in the kernel without AMI before they are taken back [default: 2]
    #[arg(long, value_name = "SECONDS", value_parser = config::time)]
    ami_grace: Option<Duration>,
    /// After how long without a packet of an offloaded phone to tell of it [default: 10]
    #[arg(long, value_name = "SECONDS", value_parser = config::some_time)]
    silence: Option<Duration>,
    /// After how long without a packet a stream expires: it must be proven again, and a pair of
    /// `add` is forgotten [default: 60]
    #[arg(long, value_name = "SECONDS", value_parser = config::some_time)]
    expire: Option<Duration>,
    /// When the daemon ends, leave the datapath as it is: it relays on until its lease is over, at
    /// most 5 seconds, unless another `attach` takes it over
    #[arg(long)]
    persist: bool,
    /// DSCP of relayed packets: ef, cs3, af41 or another name, or 0 to 63; keep, what the phone set;
    /// map:FROM=TO,..., what the phone set, translated, such as map:0=ef,cs5=ef [default: ef]
    #[arg(long, value_name = "DSCP")]
    dscp: Option<Dscp>,
    /// Priority of relayed packets at the interface's queueing discipline: a class such as 1:10, or 0 to
    /// 15. Needs --mode tc, which auto then chooses
    #[arg(long, value_name = "CLASS")]
    priority: Option<Priority>,
    /// Control socket [default: /run/relay-user/IFACE.sock]
    #[arg(long, value_name = "PATH", value_parser = config::path)]
    socket: Option<PathBuf>,
    /// Serve Prometheus metrics at http://ADDRESS:PORT/metrics; a PORT alone is loopback's
    #[arg(long, value_name = "[ADDRESS:]PORT", value_parser = config::listen_address)]
    metrics: Option<SocketAddr>,
    /// Serve a page of live calls to browsers, and nothing that changes them; a PORT alone is loopback's.
    /// Whoever reaches it sees who talks with whom
    #[arg(long, value_name = "[ADDRESS:]PORT", value_parser = config::listen_address)]
    http: Option<SocketAddr>,
    /// Name that --metrics and --http may be asked by, besides addresses, localhost and this host's own
    /// name; may be repeated
    #[arg(long = "allowed-host", value_name = "NAME", value_parser = config::host_name)]
    allowed_hosts: Vec<String>,
    /// Log more: why things are done (-v), or everything (-vv)
    #[arg(short, long, action = ArgAction::Count)]
    verbose: u8,
    /// Form of the log on standard error
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

/// Which daemon a client command talks to.
#[derive(Debug, Args)]
struct Target {
    /// Control socket of the daemon
    #[arg(long, value_name = "PATH", value_parser = config::path, conflicts_with = "interface")]
    socket: Option<PathBuf>,
    /// Interface of the daemon; needed only where several run
    #[arg(long, value_name = "IFACE", value_parser = config::interface)]
    interface: Option<String>,
}

#[derive(Clone, Copy, Debug, Args)]
struct Form {
    /// Print JSON, as docs/api.md describes it
    #[arg(long)]
    json: bool,
    /// Set by a command that prints several.
    #[arg(skip)]
    single_line: bool,
}

/// Relay a pair of legs
///
/// A LEG is one side of a call as the PBX sees it, written LOCAL=REMOTE: the address where the PBX
/// receives RTP for it, and the address where the phone sends from and receives at. IPv6 addresses
/// are in brackets. What comes from the first leg's REMOTE to its LOCAL is sent from the second leg's
/// LOCAL to its REMOTE, and the other way round.
///
/// Prints the number of the pair and its state: `offloaded`, or `waiting` and why. While it waits, its
/// packets go through the PBX.
#[derive(Debug, Args)]
#[command(after_long_help = "\
EXAMPLES
  A call that a PBX bridges:
    relay-user add 192.0.2.1:10000=192.0.2.11:30000 192.0.2.1:10002=192.0.2.12:30002
  Ports with no PBX behind them, over IPv6, with A-law and with events that the first leg numbers 101
  and the second 96:
    relay-user add --proof none --payload-type 8,101:96 \\
        '[2001:db8::1]:10000=[2001:db8::11]:30000' '[2001:db8::1]:10002=[2001:db8::12]:30002'")]
struct Add {
    /// First leg: LOCAL=REMOTE, such as 192.0.2.1:10000=192.0.2.11:30000
    #[arg(value_name = "LEG")]
    first: Leg,
    /// Second leg, written likewise
    #[arg(value_name = "LEG")]
    second: Leg,
    /// What the pair is offloaded on: `wire`, the PBX being seen to forward it unchanged, or `none`,
    /// as for ports with no PBX behind them
    #[arg(long, value_name = "PROOF", value_enum, default_value = "wire")]
    proof: Proof,
    /// Payload types to relay where there is no proof, separated by commas or spaces, or repeated; N:M
    /// is N on the first leg, M on the second. Packets of any other type go through the PBX. With
    /// proof, the wire tells
    #[arg(
        long = "payload-type",
        value_name = "N|N:M",
        value_delimiter = ',',
        default_value = "0"
    )]
    payload_types: Vec<PayloadTypes>,
    // Those after the first of `--payload-type 0 101`: were they values of the option, it would
    // swallow the legs of `--payload-type 0 LEG LEG`.
    #[arg(hide = true, requires = "payload_types", value_delimiter = ',')]
    more_payload_types: Vec<PayloadTypes>,
    /// Priority of its packets at the interface's queueing discipline, in mode tc: a class such as 1:10,
    /// or 0 to 15 [default: that of the daemon]
    #[arg(long, value_name = "CLASS")]
    priority: Option<Priority>,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    form: Form,
}

/// Whether a command goes on.
#[derive(Clone, Copy, Debug, Args)]
struct Watch {
    /// Go on, every so many seconds [default: 1]: in place on a terminal, else one after the other,
    /// until Ctrl-C or until the reader leaves; with --json, one document on each line
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        default_missing_value = "1",
        value_parser = watch::period,
    )]
    watch: Option<Duration>,
}

/// List the pairs
///
/// One line for each pair, or on a terminal one for each of its streams: the pair's number, its feed
/// (`api` for added ones, `ami` for those from Asterisk), its state, its legs, the packets relayed so
/// far, how the phones' packets arrive (loss, jitter, and an estimated mean opinion score, of the
/// first leg's phone and the second's), and why it is not offloaded, if so.
///
/// Where no daemon runs, reads the maps that one has left, and says so on standard error.
#[derive(Debug, Args)]
#[command(after_long_help = "\
FILTERS
  Words and conditions, separated by spaces, of which all must hold for one of a pair's streams.
    WORD           the pair's number, or part of an address, of a channel's, call's or codec's name,
                   of the state or of the reason
    KEY=TEXT       text that has this in it, or with != has not: feed, from, to, channel, call,
                   codec, why; and state, which is one of offloaded, watching, waiting, suspended,
                   refused
    KEY>NUMBER     or <, >=, <=, =, !=: id, packets (relayed), received, loss (percent),
                   jitter (ms), mos (1 to 4.5), silent (ms since the last packet). What is not
                   known fits none

EXAMPLES
    relay-user list
  Calls that sound bad, the worst first:
    relay-user list --filter 'mos<3.5' --sort mos
  What one phone does, as it goes on:
    relay-user list --filter 192.0.2.11 --watch
  The numbers of those that wait:
    relay-user list --filter state=waiting --json | jq '.pairs[].id'")]
struct List {
    /// Column to sort by: id, state, feed, from, to, channel, call, codec, why, packets, received,
    /// loss, jitter, mos or silent; with `-` before it the largest first
    #[arg(
        long,
        value_name = "COLUMN",
        default_value = "id",
        allow_hyphen_values = true
    )]
    sort: Order,
    /// The other way round
    #[arg(long)]
    reverse: bool,
    /// Only pairs that this fits, such as 'alice loss>1 state=offloaded'
    #[arg(
        long,
        value_name = "EXPR",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    filter: Filter,
    #[command(flatten)]
    watch: Watch,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    form: Form,
}

/// Show all about one pair
///
/// Its legs, channels and payload types, and for each of its streams the state, why it is not offloaded,
/// if so, the counters, how its packets arrive from the phone, and the next hop.
///
/// Where no daemon runs, reads the maps that one has left, and says so on standard error.
#[derive(Debug, Args)]
#[command(after_long_help = "EXAMPLE\n    relay-user show 7")]
struct Show {
    /// Number of the pair, as `relay-user list` shows it
    id: u64,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    form: Form,
}

/// Give one pair back to the PBX and forget it
///
/// Prints the pair as it last was. A call that Asterisk still bridges is relayed again when AMI offers
/// it anew.
#[derive(Debug, Args)]
#[command(after_long_help = "EXAMPLE\n    relay-user remove 7")]
struct Remove {
    /// Number of the pair, as `relay-user list` shows it
    id: u64,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    form: Form,
}

/// Give every pair back to the PBX and forget it
///
/// Those of every feed. Prints them as they last were. A call that Asterisk still bridges is relayed
/// again when AMI offers it anew.
#[derive(Debug, Args)]
#[command(after_long_help = "EXAMPLE\n    relay-user flush")]
struct Flush {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    form: Form,
}

/// Show how the daemon fares
///
/// Where and how it is attached, whether AMI is up, how many pairs there are, and the packets seen
/// by reason: what was relayed, and why the rest went through the PBX.
#[derive(Debug, Args)]
#[command(
    after_long_help = "EXAMPLES\n    relay-user status\n    relay-user status --interface eth1 --json"
)]
struct Status {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    form: Form,
}

/// Show what became of all packets
///
/// Packets and bytes by verdict (relayed by the kernel, passed to the PBX, dropped) and by reason, since
/// the daemon attached; with --watch also how many a second. docs/datapath.md explains each reason.
///
/// Where no daemon runs, reads the maps that one has left, and says so on standard error.
#[derive(Debug, Args)]
#[command(after_long_help = "\
EXAMPLES
    relay-user stats
  Packets a second, every second:
    relay-user stats --watch
  The same for a program, every 10 seconds:
    relay-user stats --watch 10 --json")]
struct Stats {
    #[command(flatten)]
    watch: Watch,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    form: Form,
}

/// Watch the streams on a full screen
///
/// Every stream with its packets a second, loss, jitter and mean opinion score, sorted and filtered as
/// you type; the history of one of them; and what became of all packets, by reason. `?` shows the keys.
///
/// The figures are read from the maps that the daemon has pinned, and go on when it ends; the PBX's names
/// and refused calls are asked of the daemon now and then. Nothing is changed.
#[derive(Debug, Args)]
#[command(after_long_help = "\
EXAMPLES
    relay-user top
  The worst calls first, twice a second:
    relay-user top --sort mos --every 0.5
  What one phone does; `relay-user list --help` tells what a filter can be:
    relay-user top --filter 192.0.2.11")]
struct Top {
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = watch::period)]
    every: Duration,
    /// Column to sort by, as in `list`, or rate; with `-` before it the largest first
    #[arg(
        long,
        value_name = "COLUMN",
        default_value = "id",
        allow_hyphen_values = true
    )]
    sort: Order,
    /// Only streams that this fits, such as 'alice loss>1'
    #[arg(
        long,
        value_name = "EXPR",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    filter: String,
    #[command(flatten)]
    target: Target,
}

/// Watch what happens to pairs, as it happens
///
/// One line per event: when, what, the number of the pair, the leg that the stream comes in on where it
/// is about one direction only, and the cause. `relay-user show` tells more about a pair of that number.
/// docs/api.md has a table of all that can happen; most often it is `watching` (proof is collected),
/// `offloaded` (the kernel relays), `taken back` (the PBX relays again) and `refused` (the PBX keeps the
/// call).
///
/// Goes on until Ctrl-C, until its reader closes, or until the daemon ends, which is no failure. A line
/// `missed` stands for events that were lost because this was read too slowly.
#[derive(Debug, Args)]
#[command(after_long_help = "\
EXAMPLES
    relay-user events
  With what led to it, as far as the daemon remembers (its latest 1024 events):
    relay-user events --since 0
  Calls that the PBX keeps, and why:
    relay-user events --json | jq -r 'select(.kind == \"refused\") | .call, .cause'
  Go on where a program stopped, after the event whose `serial` was 41:
    relay-user events --json --since 41")]
struct Events {
    /// Print JSON, one object per line, as docs/api.md describes it
    #[arg(long)]
    json: bool,
    /// Begin after the event of this number, 0 for all that the daemon remembers [default: now]
    #[arg(long, value_name = "SERIAL")]
    since: Option<u64>,
    #[command(flatten)]
    target: Target,
}

/// End the daemon of an interface
///
/// Every call goes back to the PBX, and nothing is left in the kernel. Where the daemon is gone
/// already, removes what it had left.
#[derive(Debug, Args)]
#[command(after_long_help = "EXAMPLE\n    relay-user detach eth0")]
struct Detach {
    /// Interface to detach from
    #[arg(value_name = "IFACE", value_parser = config::interface)]
    interface: String,
    /// Control socket of the daemon [default: /run/relay-user/IFACE.sock]
    #[arg(long, value_name = "PATH", value_parser = config::path)]
    socket: Option<PathBuf>,
    #[command(flatten)]
    form: Form,
}

/// Reads the arguments of the program, its own name first.
///
/// # Errors
/// [`Stop`], which also stands for `--help` and `--version`.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Invocation, Stop> {
    let ask = |target, form, request| Task::Ask {
        target,
        form,
        request,
    };
    let task = match Arguments::try_parse_from(arguments).map_err(Stop)?.verb {
        Verb::Attach(attach) => Task::Attach(attach.into()),
        Verb::Detach(detach) => Task::Detach(detach),
        Verb::Add(Add {
            first,
            second,
            proof,
            mut payload_types,
            more_payload_types,
            priority,
            target,
            form,
        }) => {
            payload_types.extend(more_payload_types);
            let pair = Pair::new([first, second], payload_types, proof)
                .map_err(|error| unfit("add", error))?
                .with_priority(priority);
            ask(target, form, Request::Add(pair))
        }
        Verb::List(list) => {
            list.check()?;
            Task::List(list)
        }
        Verb::Show(show) => Task::Show(show),
        Verb::Stats(stats) => Task::Stats(stats),
        Verb::Top(top) => {
            let filter = top.filter.parse().map_err(|error| unfit("top", error))?;
            Task::Top(top, filter)
        }
        Verb::Remove(Remove { id, target, form }) => ask(target, form, Request::Remove(id)),
        Verb::Flush(Flush { target, form }) => ask(target, form, Request::Flush),
        Verb::Status(Status { target, form }) => ask(target, form, Request::Status),
        Verb::Events(events) => Task::Follow(events),
        Verb::Capture(capture) => match capture.fault() {
            Some(fault) => return Err(unfit("capture", fault)),
            None => Task::Capture(capture),
        },
        Verb::Doctor(doctor) => Task::Doctor(doctor),
        Verb::Qos(qos) => Task::Qos(qos),
    };
    Ok(Invocation(task))
}

/// Arguments that are each valid, but not together.
fn unfit(verb: &str, error: impl fmt::Display) -> Stop {
    let mut command = Arguments::command();
    command.build();
    let command = command.find_subcommand(verb).cloned().unwrap_or(command);
    Stop(command.clone().error(ErrorKind::ValueValidation, error))
}

impl Stop {
    /// Prints the help, the version or the error, and returns the exit code.
    pub fn report(self) -> ExitCode {
        let text = self.0.render().to_string();
        if self.0.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
            let _ = io::stderr().write_all(text.as_bytes());
            ExitCode::from(2)
        } else if self.0.use_stderr() {
            report(text.strip_prefix("error: ").unwrap_or(&text).trim_end());
            ExitCode::from(2)
        } else {
            print(&text)
        }
    }
}

/// Does what was asked, tells of it, and returns the exit code.
pub fn run(invocation: Invocation) -> ExitCode {
    let outcome = match invocation.0 {
        Task::Attach(arguments) => attach(*arguments).map(|()| String::new()),
        Task::Detach(arguments) => detach(arguments),
        Task::List(arguments) => list(arguments),
        Task::Show(arguments) => show(&arguments),
        Task::Stats(arguments) => stats(&arguments),
        Task::Top(arguments, filter) => watch_streams(arguments, filter).map(|()| String::new()),
        Task::Follow(arguments) => follow(&arguments).map(|()| String::new()),
        Task::Capture(arguments) => capture::run(&arguments).map(|()| String::new()),
        // A problem that it finds is no failure of its own.
        Task::Doctor(arguments) => return doctor::run(arguments),
        Task::Qos(arguments) => qos::run(&arguments),
        Task::Ask {
            target,
            form,
            request,
        } => ask(&target, form, request),
    };
    match outcome {
        Ok(text) => print(&text),
        Err(error) => {
            report(&words(&error));
            ExitCode::FAILURE
        }
    }
}

fn attach(arguments: Attach) -> anyhow::Result<()> {
    logging::start(arguments.log_format, arguments.verbose);
    let flags = Settings {
        mode: arguments.mode,
        dscp: arguments.dscp,
        priority: arguments.priority,
        max_streams: arguments.max_streams,
        proof: arguments.proof,
        keepalive: arguments.keepalive,
        ami_grace: arguments.ami_grace,
        silence: arguments.silence,
        expire: arguments.expire,
        persist: arguments.persist.then_some(true),
        socket: arguments.socket,
        ami_address: arguments.ami,
        ami_user: arguments.ami_user,
        ami_secret_file: arguments.ami_secret_file,
        // A table of the file's alone.
        qos_auto: None,
        metrics: arguments.metrics,
        http: arguments.http,
        allowed_hosts: Some(arguments.allowed_hosts).filter(|names| !names.is_empty()),
    };
    daemon::run(config::load(
        arguments.interface,
        flags,
        secret_variable()?,
        arguments.config.as_deref(),
    )?)
}

/// The AMI secret of the environment.
fn secret_variable() -> Result<Option<String>, config::ConfigError> {
    match env::var(config::SECRET_VARIABLE) {
        Ok(text) => Ok(Some(text)),
        Err(env::VarError::NotPresent) => Ok(None),
        // Not with the error itself, which quotes the secret.
        Err(env::VarError::NotUnicode(_)) => {
            Err(config::ConfigError::SecretVariable(SecretError::NotText))
        }
    }
}

fn ask(target: &Target, form: Form, request: Request) -> anyhow::Result<String> {
    let client = Client::new(socket::find(
        target.socket.as_deref(),
        target.interface.as_deref(),
    )?);
    let style = Style::of_stdout();
    wait_for(async {
        match request {
            Request::Add(pair) => form.text(&add(&client, &pair).await?, output::added),
            Request::Remove(id) => form.text(&client.remove(id).await?, |pair| {
                output::removed(slice::from_ref(pair), style)
            }),
            Request::Flush => form.text(&client.flush().await?, |list| {
                output::removed(&list.pairs, style)
            }),
            Request::Status => form.text(&client.status().await?, |status| {
                output::status(status, style)
            }),
        }
    })
}

impl List {
    /// Refuses what only `top` knows.
    fn check(&self) -> Result<(), Stop> {
        if self.sort.column == Column::Rate || self.filter.asks_for(Column::Rate) {
            let error = "`rate` is known to `relay-user top` alone, which looks twice: use packets or received";
            return Err(unfit("list", error));
        }
        Ok(())
    }
}

fn list(arguments: List) -> anyhow::Result<String> {
    let List {
        sort,
        reverse,
        filter,
        watch,
        target,
        form,
    } = arguments;
    let order = if reverse { sort.reversed() } else { sort };
    let mut answers = Answers::of(&target);
    // Of a hundred thousand streams, reading and writing again would take longer than all the rest.
    if form.json
        && watch.watch.is_none()
        && filter == Filter::default()
        && order == Order::default()
    {
        let passed_on = wait_for(async {
            let Some(mut text) = answers.source.pairs_text().await? else {
                return Ok(false);
            };
            while let Some(part) = text.next().await? {
                if !printed(&part)? {
                    break;
                }
            }
            Ok(true)
        })?;
        if passed_on {
            return Ok(String::new());
        }
    }
    wait_for(watch.run(async |again| {
        let all = answers.told(answers.source.pairs().await?);
        let any = !all.is_empty();
        let list = PairList::from(listing::arranged(all, &filter, order));
        form.again(again).text(&list, |list| {
            if any && list.pairs.is_empty() {
                "no pair fits the filter\n".to_owned()
            } else {
                output::pairs(&list.pairs, Style::of_stdout())
            }
        })
    }))
}

fn show(arguments: &Show) -> anyhow::Result<String> {
    let mut answers = Answers::of(&arguments.target);
    wait_for(async {
        let pair = answers.told(answers.source.pair(arguments.id).await?);
        let style = Style::of_stdout();
        arguments.form.text(&pair, |pair| output::pair(pair, style))
    })
}

fn stats(arguments: &Stats) -> anyhow::Result<String> {
    let mut answers = Answers::of(&arguments.target);
    let mut before = None;
    wait_for(arguments.watch.run(async |again| {
        let now = answers.told(answers.source.totals().await?);
        let report = StatsReport::new(before.as_ref(), &now);
        before = Some(now);
        let style = Style::of_stdout();
        let form = arguments.form.again(again);
        form.text(&report, |report| output::stats(report, style))
    }))
}

fn watch_streams(arguments: Top, filter: Filter) -> anyhow::Result<()> {
    let Target { socket, interface } = &arguments.target;
    wait_for(top::run(top::Options {
        source: Source::new(socket.as_deref(), interface.as_deref()),
        period: arguments.every,
        order: arguments.sort,
        filter,
        filter_text: arguments.filter,
    }))
}

/// Answers of the daemon or, while it is away, of the maps that it has left.
struct Answers {
    source: Source,
    /// What was told last on standard error.
    instead: Option<Instead>,
}

impl Answers {
    fn of(target: &Target) -> Self {
        Self {
            source: Source::new(target.socket.as_deref(), target.interface.as_deref()),
            instead: None,
        }
    }

    /// The answer, of which is told, once, when it is not the daemon's.
    fn told<T>(&mut self, found: Found<T>) -> T {
        if let Some(instead) = &found.instead
            && self.instead.as_ref() != Some(instead)
        {
            report(&instead.to_string());
        }
        self.instead = found.instead;
        found.answer
    }
}

fn follow(arguments: &Events) -> anyhow::Result<()> {
    let Target { socket, interface } = &arguments.target;
    let client = Client::new(socket::find(socket.as_deref(), interface.as_deref())?);
    let style = Style::of_stdout();
    wait_for(async {
        let mut events = client.events(arguments.since).await?;
        let mut read = arguments.json || printed(output::events_header())?;
        let reader_left = reader_left();
        tokio::pin!(reader_left);
        while read {
            let event = tokio::select! {
                event = events.next() => event?,
                () = &mut reader_left => return Ok(()),
            };
            let Some(event) = event else {
                report("the daemon has ended");
                return Ok(());
            };
            read = printed(&if arguments.json {
                serde_json::to_string(&event)? + "\n"
            } else {
                output::event(&event, style)
            })?;
        }
        Ok(())
    })
}

/// Completes when nobody can read standard output any longer, as far as the kernel tells: for pipes
/// and sockets. Without it, `relay-user events | head -1` would stay until the next event.
async fn reader_left() {
    if let Ok(stdout) = io::stdout().as_fd().try_clone_to_owned() {
        // SAFETY: it owns the descriptor, which nobody else knows, until it is dropped.
        let watched = unsafe { AsyncFd::register_with_interest(stdout, Interest::ERROR) };
        // The kernel watches no plain file (EPERM, epoll_ctl(2)), which needs no reader either.
        if let Ok(stdout) = watched
            && stdout.ready(Interest::ERROR).await.is_ok()
        {
            return;
        }
    }
    std::future::pending().await
}

/// Adds a pair, and gives a neighbour that was never asked before the moment it takes to answer, so
/// that the report says what will last.
async fn add(client: &Client, pair: &Pair) -> anyhow::Result<PairReport> {
    const PATIENCE: Duration = Duration::from_millis(500);
    const STEP: Duration = Duration::from_millis(20);
    let mut report = client.add(pair).await?;
    let patience = Instant::now() + PATIENCE;
    while report.state == PairState::Waiting && Instant::now() < patience {
        sleep(STEP).await;
        report = client.show(report.id).await?;
    }
    Ok(report)
}

fn detach(arguments: Detach) -> anyhow::Result<String> {
    let Detach {
        interface,
        socket,
        form,
    } = arguments;
    let client = Client::new(socket.unwrap_or_else(|| socket::of_interface(&interface)));
    let ended = wait_for(async {
        let serves = client.status().await?.interface;
        anyhow::ensure!(
            serves == interface,
            "the daemon of {} is attached to {serves}, not to {interface}: leave out --socket, or detach {serves}",
            client.socket().display()
        );
        Ok(client.detach().await?)
    });
    let detached = match ended {
        Ok(detached) => detached,
        Err(error) => match error.downcast_ref() {
            Some(ClientError::NoDaemon(_) | ClientError::Gone(_)) => {
                let pins = daemon::remove_leftovers(&interface)?;
                // Left alone by a daemon that was killed before it attached.
                let socket = client.socket().exists();
                anyhow::ensure!(
                    pins || socket,
                    "no relay daemon runs on {interface}, and none has left anything there: nothing to detach"
                );
                Detached {
                    interface,
                    found: model::Found::LeftBehind,
                    pairs: 0,
                }
            }
            _ => return Err(error),
        },
    };
    socket::remove_leftover(client.socket())?;
    form.text(&detached, output::detached)
}

fn wait_for<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?
        .block_on(work)
}

impl Form {
    /// What it is for one of several answers: a line is all that a reader needs to tell them apart.
    const fn again(self, again: bool) -> Self {
        Self {
            single_line: again,
            ..self
        }
    }

    fn text<T: Serialize>(
        self,
        value: &T,
        human: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<String> {
        if self.json && self.single_line {
            Ok(serde_json::to_string(value)? + "\n")
        } else if self.json {
            Ok(serde_json::to_string_pretty(value)? + "\n")
        } else {
            Ok(human(value))
        }
    }
}

/// Prints to standard output, and returns the exit code.
fn print(text: &str) -> ExitCode {
    match printed(text) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            report(&words(&error));
            ExitCode::FAILURE
        }
    }
}

/// Prints to standard output; returns whether somebody still reads it.
fn printed(text: impl AsRef<[u8]>) -> anyhow::Result<bool> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_ref())
        .and_then(|()| stdout.flush())
    {
        Ok(()) => Ok(true),
        // The reader has seen enough, as in `relay-user list | head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot write to standard output"),
    }
}

fn report(message: &str) {
    // Nobody is left to be told when standard error is closed.
    let _ = writeln!(io::stderr(), "relay-user: {message}");
}

/// An error with its causes. Some errors quote their cause themselves, others leave it to be added.
fn words(error: &anyhow::Error) -> String {
    let mut words = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !words.contains(&cause) {
            words.push_str(": ");
            words.push_str(&cause);
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "192.0.2.1:10000=192.0.2.11:30000";
    const SECOND: &str = "192.0.2.1:10002=192.0.2.12:30002";

    fn parsed(arguments: &[&str]) -> Result<Task, String> {
        let arguments = ["relay-user"].iter().chain(arguments).map(OsString::from);
        parse(arguments)
            .map(|invocation| invocation.0)
            .map_err(|stop| stop.0.render().to_string())
    }

    fn pair(arguments: &[&str]) -> Pair {
        let mut all = vec!["add", FIRST, SECOND];
        all.extend(arguments);
        match parsed(&all) {
            Ok(Task::Ask {
                request: Request::Add(pair),
                ..
            }) => pair,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn payload_types_are_repeated_or_separated_by_commas_or_spaces() {
        let written = |pair: Pair| {
            pair.payload_types
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(written(pair(&[])), ["0"]);
        assert_eq!(
            written(pair(&["--payload-type", "8,101:96"])),
            ["8", "101:96"]
        );
        assert_eq!(
            written(pair(&["--payload-type", "8", "--payload-type=101:96"])),
            ["8", "101:96"]
        );
        assert_eq!(
            written(pair(&["--payload-type", "8", "101:96", "--json"])),
            ["8", "101:96"]
        );
        let before = parsed(&["add", "--payload-type", "8", FIRST, SECOND]).expect("legs last");
        assert!(
            matches!(before, Task::Ask { request: Request::Add(pair), .. }
            if pair.payload_types == [PayloadTypes::same(8)])
        );
        let error = parsed(&["add", FIRST, SECOND, "8"]).expect_err("no option");
        assert!(error.contains("--payload-type"), "{error}");
    }

    #[test]
    fn bad_arguments_are_refused_with_the_remedy() {
        for (arguments, fragment) in [
            (
                &["add", "192.0.2.1:10000", SECOND][..],
                "write LOCAL=REMOTE",
            ),
            (&["add", FIRST], "<LEG>"),
            (&["add", FIRST, FIRST], "a pair joins two different legs"),
            (
                &["add", FIRST, "[2001:db8::1]:1=[2001:db8::2]:2"],
                "different address families",
            ),
            (
                &["add", FIRST, SECOND, "--payload-type", "ulaw"],
                "write N, or N:M",
            ),
            (&["add", FIRST, SECOND, "--payload-type", "72"], "RFC 5761"),
            (&["show", "seven"], "seven"),
            (&["attach", "eth0", "--mode", "fast"], "native, generic"),
            (&["attach", "eth0", "--dscp", "64"], "0 to 63"),
            (
                &["attach", "eth0", "--max-streams", "1"],
                "from 2 to 1048576",
            ),
            (&["attach", "eth0", "--ami", "pbx"], "not HOST:PORT"),
            (
                &["attach", "eth0", "--http", "pbx"],
                "no address to listen on",
            ),
            (
                &["attach", "eth0", "--allowed-host", "http://x"],
                "no host name",
            ),
            (&["attach", "../etc"], "cannot be the name of an interface"),
            (
                &["attach", "eth0", "--ami-secret", "hunter2"],
                "--ami-secret-file",
            ),
            (
                &["list", "--socket", "/x", "--interface", "eth0"],
                "cannot be used with",
            ),
            (&["events", "--since", "now"], "--since"),
            (&["capture", "-w", "x"], "<ID|--all>"),
            (&["capture", "0", "-w", "x"], "0 is not in 1.."),
            (&["capture", "3", "--all", "-w", "x"], "cannot be used with"),
            (&["capture", "--all"], "--write <FILE>"),
            (
                &["capture", "--all", "-w", "x", "--snap", "20"],
                "28..=2048",
            ),
            (
                &["capture", "--all", "-w", "x", "--sample", "0"],
                "--sample",
            ),
            (&["lst"], "list"),
        ] {
            let error = parsed(arguments).expect_err(fragment);
            assert!(error.contains(fragment), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn every_command_explains_itself_with_an_example() {
        for command in Arguments::command().get_subcommands_mut() {
            let name = command.get_name().to_owned();
            let help = command.render_long_help().to_string();
            assert!(help.contains("EXAMPLE"), "{name}");
            assert!(
                help.contains(&format!("relay-user {name}")),
                "{name}: {help}"
            );
        }
    }

    #[test]
    fn a_cause_is_told_once() {
        let quoted = anyhow::anyhow!("no such file").context("cannot read x: no such file");
        assert_eq!(words(&quoted), "cannot read x: no such file");
        let added = anyhow::anyhow!("no such file").context("cannot read x");
        assert_eq!(words(&added), "cannot read x: no such file");
    }
}
