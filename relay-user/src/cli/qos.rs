//! `relay-user qos`.

use std::{
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use clap::{ArgAction, Args, Subcommand};

use super::{Form, printed};
use crate::{
    config, daemon,
    logging::{self, LogFormat},
    output::{self, Style},
    qos::{
        auto::{self, AutoSettings},
        kernel::Rtnetlink,
        policy::{BUILT_IN, Policy},
        rate::Rate,
        report,
        shaper::{self, Request},
        trigger::Thresholds,
    },
};

/// Give calls their share of a slow line
///
/// Packets leave an interface through HTB, a queueing discipline with four classes: real time (ICMP and
/// what TCP needs to go on), high (EF and CS3: calls), regular (the web, SSH and the like) and bulk. Each
/// has its share, and may borrow what others leave. A BPF program on the interface marks packets and
/// chooses their class, as a policy says: `relay-user qos policy` prints the built-in one.
///
/// Needs no daemon, and no `tc`.
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    after_long_help = "\
EXAMPLES
  An uplink of 2 Mbit/s:
    relay-user qos apply eth0 --uplink 2mbit
  The same while calls are up, and only then:
    relay-user qos auto eth0 --uplink 2mbit
  See how it fares:
    relay-user qos show eth0
  A policy of your own:
    relay-user qos policy > /etc/relay-user/qos.toml
    editor /etc/relay-user/qos.toml
    relay-user qos policy /etc/relay-user/qos.toml --uplink 2mbit
    relay-user qos apply eth0 --uplink 2mbit --policy /etc/relay-user/qos.toml
  Put back what was there:
    relay-user qos clear eth0"
)]
pub(super) struct Qos {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Apply(Apply),
    Auto(Auto),
    Mark(Mark),
    Show(Show),
    Clear(Clear),
    Policy(PolicyArguments),
}

/// Shape an interface, or change how it is shaped
///
/// RATE is what the line carries, written as for tc(8): 1000kbit, 1.5mbit, 1gbit; a number alone is
/// bit/s, and kbps means kilobytes per second. It is shaped to 95 % of that, so that packets wait here,
/// where calls overtake them, and not in the modem.
///
/// Done again, it changes rates and policy in their place; no packet is lost, unless the default class is
/// another one. Either all of it is done or nothing. What was there before is put back by `clear`.
///
/// On lines of less than 100 Mbit/s, packets that TCP or GRO hands over as one, up to 64 kB long, are cut
/// before they are queued; where the rate passes that bound, what waits at that moment is lost.
#[derive(Debug, Args)]
#[command(after_long_help = "\
EXAMPLES
  An uplink of 2 Mbit/s:
    relay-user qos apply eth0 --uplink 2mbit
  DSL with 1 Mbit/s up and 8 Mbit/s down:
    relay-user qos apply eth0 --uplink 1mbit --downlink 8mbit
  In the place of a queueing discipline of your own:
    relay-user qos apply eth0 --uplink 2mbit --replace
  What a program should know of it:
    relay-user qos apply eth0 --uplink 1mbit --json | jq -r '.notes[]'")]
struct Apply {
    #[command(flatten)]
    line: Line,
    #[command(flatten)]
    form: Form,
}

#[derive(Debug, Args)]
struct Line {
    /// Network interface towards the line
    #[arg(value_name = "IFACE", value_parser = config::interface)]
    interface: String,
    /// What the line carries away from this host
    #[arg(long, value_name = "RATE")]
    uplink: Rate,
    /// What the line brings: queues it too, by way of an IFB device. Senders slow down by that, and
    /// there is room for calls. Packets that the relay takes at XDP or TC ingress are not queued. Needs
    /// Ethernet headers and Linux 6.5
    #[arg(long, value_name = "RATE")]
    downlink: Option<Rate>,
    /// Policy (TOML) instead of the built-in one
    #[arg(long, value_name = "FILE", value_parser = config::path)]
    policy: Option<PathBuf>,
    /// Replace a queueing discipline that relay-user has not made
    #[arg(long)]
    replace: bool,
}

/// Shape an interface while calls are up
///
/// Runs in the foreground until SIGTERM or Ctrl-C. RTP audio that leaves the interface is counted, and so
/// are the packets that a relay there sends past the queues in XDP mode. Above --on-threshold packets per
/// second, for 3 seconds in a row, the interface is shaped as by `apply`; below --off-threshold for as
/// long, it is given back what it had. A party that is silent for less does not count as gone.
///
/// When it ends, shaping stays as it is, and the next start goes on from there: a restart in mid-call
/// changes nothing. `relay-user qos show` tells what it did and when; `relay-user qos clear` puts
/// everything back.
///
/// `relay-user attach` does the same with a table [qos.auto] in its configuration file.
#[derive(Debug, Args)]
#[command(after_long_help = "\
EXAMPLES
  Calls on a DSL line, which is all the backup's at other times:
    relay-user qos auto ppp0 --uplink 1mbit
  Only for more than one call:
    relay-user qos auto eth0 --uplink 2mbit \\
      --on-threshold 150 --off-threshold 20")]
struct Auto {
    #[command(flatten)]
    line: Line,
    /// Voice packets per second above which shaping goes on; a call has about 50 in each direction
    #[arg(long, value_name = "PPS", default_value_t = Thresholds::ON)]
    on_threshold: u32,
    /// Voice packets per second below which shaping goes off
    #[arg(long, value_name = "PPS", default_value_t = Thresholds::OFF)]
    off_threshold: u32,
    /// Log more: why things are done (-v), or everything (-vv)
    #[arg(short, long, action = ArgAction::Count)]
    verbose: u8,
    /// Form of the log on standard error
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

/// Mark what leaves an interface, and shape nothing
///
/// Applies the marks of a policy (`set-dscp`) for the network behind the interface. Queueing disciplines
/// stay as they are, and so does the choice of a class in them. Done again, it changes the policy in its
/// place.
#[derive(Debug, Args)]
#[command(after_long_help = "\
EXAMPLES
  Voice EF, video AF41, SIP CS3:
    relay-user qos mark eth0
  By TCP ports, as a script with iptables did:
    relay-user qos mark eth0 --policy docs/policies/ports.toml
  What each rule has matched:
    relay-user qos show eth0")]
struct Mark {
    /// Network interface that packets leave by
    #[arg(value_name = "IFACE", value_parser = config::interface)]
    interface: String,
    /// Policy (TOML) instead of the built-in one
    #[arg(long, value_name = "FILE", value_parser = config::path)]
    policy: Option<PathBuf>,
    #[command(flatten)]
    form: Form,
}

/// Show how shaped interfaces fare
///
/// For each class its share, what it has sent, what was dropped, how often it had to wait, and what is
/// waiting; then what each rule of the policy has matched. What was changed by hand is named. All of it
/// is read from the kernel.
#[derive(Debug, Args)]
#[command(after_long_help = "\
EXAMPLES
    relay-user qos show
  Every 2 seconds, with the rates of that time:
    relay-user qos show eth0 --watch 2
  Packets dropped, by class:
    relay-user qos show eth0 --json \\
      | jq '.interfaces[].uplink.classes[] | {name, drops}'")]
struct Show {
    /// Network interface; all that are shaped, if none is named
    #[arg(value_name = "IFACE", value_parser = config::interface)]
    interface: Option<String>,
    /// Show it again and again, until Ctrl-C
    #[arg(
        long,
        value_name = "SECONDS",
        value_parser = config::some_time,
        num_args = 0..=1,
        default_missing_value = "1"
    )]
    watch: Option<Duration>,
    #[command(flatten)]
    form: Form,
}

/// Put back what was on an interface before it was shaped
///
/// Removes the classifier, and the IFB device of --downlink too. Where nothing of relay-user's is there,
/// says so and does nothing.
#[derive(Debug, Args)]
#[command(after_long_help = "EXAMPLE\n    relay-user qos clear eth0")]
struct Clear {
    /// Network interface
    #[arg(value_name = "IFACE", value_parser = config::interface)]
    interface: String,
    #[command(flatten)]
    form: Form,
}

/// Print the built-in policy, or check one
///
/// Without FILE, prints the built-in policy to start from. With FILE, checks it and prints its classes;
/// with --uplink, with their rates on a line of that rate.
#[derive(Debug, Args)]
#[command(after_long_help = "\
EXAMPLES
    relay-user qos policy > /etc/relay-user/qos.toml
    relay-user qos policy /etc/relay-user/qos.toml --uplink 2mbit")]
struct PolicyArguments {
    /// Policy (TOML)
    #[arg(value_name = "FILE", value_parser = config::path)]
    file: Option<PathBuf>,
    /// What the line carries away from this host
    #[arg(long, value_name = "RATE")]
    uplink: Option<Rate>,
}

/// Does what was asked, and returns what is to be printed.
pub(super) fn run(arguments: &Qos) -> anyhow::Result<String> {
    match &arguments.verb {
        Verb::Apply(Apply { line, form }) => {
            auto::refuse_while_running(&line.interface)?;
            let policy = policy(line.policy.as_ref())?;
            let request = Request {
                interface: &line.interface,
                uplink: line.uplink,
                downlink: line.downlink,
                policy: &policy,
                replace: line.replace,
            };
            let applied = shaper::apply(&mut Rtnetlink, &request)?;
            form.text(&applied, output::qos::applied)
        }
        Verb::Auto(arguments) => auto(arguments).map(|()| String::new()),
        Verb::Mark(Mark {
            interface,
            policy: file,
            form,
        }) => {
            auto::refuse_while_running(interface)?;
            let policy = policy(file.as_ref())?;
            let marked = shaper::mark(&mut Rtnetlink, interface, &policy)?;
            form.text(&marked, output::qos::marked)
        }
        Verb::Show(arguments) => show(arguments),
        Verb::Clear(Clear { interface, form }) => {
            auto::refuse_while_running(interface)?;
            let cleared = shaper::clear(&mut Rtnetlink, interface)?;
            auto::forget(interface)?;
            form.text(&cleared, |cleared| output::qos::cleared(interface, cleared))
        }
        Verb::Policy(PolicyArguments {
            file: None,
            uplink: None,
        }) => Ok(BUILT_IN.to_owned()),
        Verb::Policy(PolicyArguments { file, uplink }) => {
            let policy = policy(file.as_ref())?;
            let rates = uplink
                .map(|uplink| policy.rates(uplink.shaped()))
                .transpose()?;
            Ok(output::qos::policy(
                &policy,
                rates.as_deref(),
                Style::of_stdout(),
            ))
        }
    }
}

fn auto(arguments: &Auto) -> anyhow::Result<()> {
    logging::start(arguments.log_format, arguments.verbose);
    let line = &arguments.line;
    daemon::shape_for_calls(
        line.interface.clone(),
        AutoSettings {
            uplink: line.uplink,
            downlink: line.downlink,
            policy: line.policy.clone(),
            replace: line.replace,
            thresholds: Thresholds::new(arguments.on_threshold, arguments.off_threshold)?,
        },
    )
}

fn policy(file: Option<&PathBuf>) -> anyhow::Result<Policy> {
    Ok(match file {
        Some(file) => Policy::read(file)?,
        None => Policy::built_in(),
    })
}

fn show(arguments: &Show) -> anyhow::Result<String> {
    let Show {
        interface,
        watch,
        form,
    } = arguments;
    let read = || report::show(&mut Rtnetlink, interface.as_deref());
    let style = Style::of_stdout();
    let Some(pause) = watch else {
        return form.text(&read()?, |report| output::qos::report(report, style));
    };
    let mut earlier = (read()?, Instant::now());
    loop {
        thread::sleep(*pause);
        let (mut report, now) = (read()?, Instant::now());
        let seconds = now.duration_since(earlier.1).as_secs_f64();
        let plain = report.clone();
        report.measure(&earlier.0, seconds);
        let text = if form.json {
            serde_json::to_string(&report)? + "\n"
        } else {
            output::qos::report(&report, style) + "\n"
        };
        if !printed(&text)? {
            return Ok(String::new());
        }
        earlier = (plain, now);
    }
}
