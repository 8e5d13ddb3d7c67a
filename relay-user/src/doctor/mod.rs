//! `relay-user doctor`: whether this host, this interface and this Asterisk let the relay work, and
//! what mends what does not.
//!
//! `gather` asks the kernel, the daemon and Asterisk, and changes nothing; `checks` judge what was
//! found, without asking anybody.

pub mod facts;

mod checks;
mod ethtool;
mod gather;
mod netdev;
mod self_test;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use self::facts::Facts;
use crate::config::{AmiSettings, ConfigError};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// The relay works, but not as well as it could, or not for every call.
    Warning,
    /// The relay does not work.
    Problem,
}

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// The machine and its kernel.
    Host,
    /// The interface, its driver and what is attached to it.
    Interface,
    /// Routing, filtering and neighbours.
    Network,
    /// Asterisk and its AMI.
    Asterisk,
    /// The calls that are up.
    Calls,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Its name, for scripts: stable.
    pub id: String,
    /// What it is about.
    pub group: Group,
    /// How bad it is.
    pub level: Level,
    /// What was found, in words.
    pub what: String,
    /// The command, or the setting, that mends it; none where nothing is to be mended, or nothing can.
    pub mend: Option<String>,
}

/// Everything that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Version of `relay-user`.
    pub version: String,
    /// The interface that was examined; none where none was named and none suggests itself.
    pub interface: Option<String>,
    /// The worst level of all findings.
    pub level: Level,
    /// In the order of their groups.
    pub findings: Vec<Finding>,
    /// What they were judged by.
    pub facts: Facts,
}

/// What to examine, and how to reach Asterisk.
#[derive(Debug)]
pub struct Examination {
    /// The interface; none to take that of the daemon, or of the default route.
    pub interface: Option<String>,
    /// The daemon's control socket, where it is not in its place.
    pub socket: Option<PathBuf>,
    /// How to reach AMI, if that was said, and in a way that can be used.
    pub ami: Result<Option<AmiSettings>, ConfigError>,
    /// Whether to attach a program for a moment and see what arrives.
    pub self_test: bool,
}

impl Examination {
    /// Asks everybody, and judges what they say. Changes nothing; with a self-test, an XDP program sits
    /// on the interface for some seconds.
    pub async fn report(self) -> Report {
        let facts = gather::all(self).await;
        let findings = checks::all(&facts);
        Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            interface: facts
                .interface
                .as_ref()
                .map(|interface| interface.name.clone()),
            level: findings
                .iter()
                .map(|finding| finding.level)
                .max()
                .unwrap_or(Level::Ok),
            findings,
            facts,
        }
    }
}
