//! `relay-user doctor`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;

use super::{Form, print, report, secret_variable, wait_for, words};
use crate::{
    config::{self, AmiSettings, ConfigError, Settings},
    doctor::{Examination, Level},
    output::{self, Style},
};

/// Look for what keeps the relay from working, or from working well
///
/// Examines the host, the interface, the network around it, Asterisk and its calls, and changes
/// nothing. Each finding is ok, a warning (the relay works, but not as well as it could, or not for
/// every call) or a problem (it does not work), with the command that mends it.
///
/// Without IFACE it examines the interface of the daemon that runs, or else that of the default route.
/// Where a daemon runs, it is asked about calls; where none runs, and AMI is given, the doctor logs in
/// itself and judges them as the daemon would.
///
/// Exits with 0 where all is ok or a warning, and with 1 where there is a problem.
#[derive(Debug, Args)]
#[command(after_long_help = "\
EXAMPLES
    relay-user doctor eth0
  With Asterisk, as `attach` would log in:
    relay-user doctor eth0 --ami 127.0.0.1:5038 --ami-user relay \\
        --ami-secret-file /etc/relay-user/ami.secret
  The commands that mend what is not ok:
    relay-user doctor eth0 --json | jq -r '.findings[].mend | values'
  Before going live, whether the driver delivers what XDP sends:
    relay-user doctor eth0 --self-test")]
pub(super) struct Doctor {
    /// Network interface that the calls' RTP comes in on
    #[arg(value_name = "IFACE", value_parser = config::interface)]
    interface: Option<String>,
    /// Also attach an XDP program for some seconds, have it send to a neighbour, and see whether that
    /// answers. Some drivers reset the link for it. Not done where a daemon or another program is
    #[arg(long)]
    self_test: bool,
    /// Asterisk's manager interface, such as 127.0.0.1:5038
    #[arg(long, value_name = "HOST:PORT", value_parser = config::ami_address)]
    ami: Option<String>,
    /// User of manager.conf to log in as
    #[arg(long, value_name = "NAME", value_parser = config::ami_user)]
    ami_user: Option<String>,
    /// File with the user's secret, which only its owner may read; or set RELAY_AMI_SECRET
    #[arg(long, value_name = "FILE", value_parser = config::path)]
    ami_secret_file: Option<PathBuf>,
    /// Configuration file of `attach` that says how to reach AMI
    /// [default: /etc/relay-user/IFACE.toml, where it is there]
    #[arg(long, value_name = "FILE", value_parser = config::path)]
    config: Option<PathBuf>,
    /// Control socket of the daemon [default: /run/relay-user/IFACE.sock]
    #[arg(long, value_name = "PATH", value_parser = config::path)]
    socket: Option<PathBuf>,
    #[command(flatten)]
    form: Form,
}

/// Examines, prints what was found, and returns the exit code.
pub(super) fn run(arguments: Doctor) -> ExitCode {
    let form = arguments.form;
    let examination = Examination {
        ami: arguments.ami_settings(),
        interface: arguments.interface,
        socket: arguments.socket,
        self_test: arguments.self_test,
    };
    let style = Style::of_stdout();
    let examined = wait_for(async { Ok(examination.report().await) }).and_then(|found| {
        let text = form.text(&found, |found| output::doctor::report(found, style))?;
        Ok((found.level, text))
    });
    match examined {
        Ok((level, text)) => {
            let printed = print(&text);
            if level == Level::Problem {
                ExitCode::FAILURE
            } else {
                printed
            }
        }
        Err(error) => {
            report(&words(&error));
            ExitCode::FAILURE
        }
    }
}

impl Doctor {
    /// How to reach AMI, as `attach` would take it from the same flags, environment and file.
    fn ami_settings(&self) -> Result<Option<AmiSettings>, ConfigError> {
        let file = self.config.clone().or_else(|| {
            let usual = format!("/etc/relay-user/{}.toml", self.interface.as_deref()?);
            Path::new(&usual).exists().then(|| usual.into())
        });
        let flags = Settings {
            ami_address: self.ami.clone(),
            ami_user: self.ami_user.clone(),
            ami_secret_file: self.ami_secret_file.clone(),
            ..Settings::default()
        };
        // A secret alone, in the environment, asks for nothing.
        if flags == Settings::default() && file.is_none() {
            return Ok(None);
        }
        let interface = self.interface.clone().unwrap_or_default();
        let settings = config::load(interface, flags, secret_variable()?, file.as_deref())?;
        Ok(settings.ami)
    }
}
