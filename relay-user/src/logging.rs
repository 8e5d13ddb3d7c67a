//! The daemon's log: what is happening, on standard error, as text or as JSON lines.

use std::io::{self, IsTerminal as _};

use tracing_subscriber::EnvFilter;

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// One readable line per message.
    #[default]
    Text,
    /// One JSON object per line, for log collectors.
    Json,
}

/// Starts logging to standard error. `verbosity` is the number of `-v`: 0 tells what changes, 1 also
/// why, 2 everything this program does.
///
/// A second call changes nothing: a process has one log.
pub fn start(format: LogFormat, verbosity: u8) {
    let filter = match verbosity {
        0 => "warn,relay_user=info",
        1 => "info,relay_user=debug",
        _ => "debug,relay_user=trace",
    };
    let colour =
        io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
    let log = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(io::stderr)
        .with_ansi(colour)
        // A log that nobody reads must not end a daemon that relays calls: the report of a failed
        // write goes to standard error too, and panics there.
        .log_internal_errors(false);
    let started = match format {
        LogFormat::Text => tracing::subscriber::set_global_default(log.finish()),
        LogFormat::Json => tracing::subscriber::set_global_default(log.json().finish()),
    };
    if started.is_err() {
        tracing::debug!("the log was started before");
    }
}
