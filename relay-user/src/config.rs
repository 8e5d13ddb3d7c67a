//! The settings of `relay-user attach`: from flags, environment and a TOML file to one validated
//! whole. Flags win over the environment, and the environment over the file.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use toml::de::{DeTable, DeValue};

use crate::{
    control::socket,
    document::{self, Document, DocumentError, Entry, Position, printable},
    dscp::{Dscp, DscpError, DscpMap, EF},
    priority::{Priority, PriorityError},
    qos::{
        auto::AutoSettings,
        rate::{Rate, RateError},
        trigger::{ThresholdError, Thresholds},
    },
    secret::{Secret, SecretError, SecretFileError},
};

/// The environment variable that may hold the AMI secret.
pub const SECRET_VARIABLE: &str = "RELAY_AMI_SECRET";
/// Streams there is room for, unless told otherwise.
pub const MAX_STREAMS: u32 = 65_536;
/// The fewest that make sense: one pair.
const FEWEST_STREAMS: u32 = 2;
/// The most: kernel memory for more is better spent on a second host.
const MOST_STREAMS: u32 = 1_048_576;
/// Packets in a row that prove a stream, unless told otherwise.
pub const PROOF: u8 = 8;
/// How often the PBX hears of a phone without RTCP, unless told otherwise: a third of the shortest
/// timeout in common use.
pub const KEEPALIVE: Duration = Duration::from_secs(3);
/// How long calls go on without AMI, unless told otherwise.
pub const AMI_GRACE: Duration = Duration::from_secs(2);
/// After how long a silent phone is told of, unless told otherwise.
pub const SILENCE: Duration = Duration::from_secs(10);
/// After how long a silent stream expires, unless told otherwise.
pub const EXPIRE: Duration = Duration::from_secs(60);
/// The longest of these times: a day.
const LONGEST_TIME: Duration = Duration::from_secs(86_400);

/// Everything `relay-user attach` needs to know, complete and in range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachSettings {
    /// Name of the network interface to attach to.
    pub interface: String,
    /// How to attach.
    pub mode: Mode,
    /// DSCP of relayed packets.
    pub dscp: Dscp,
    /// Priority of relayed packets at the queueing discipline; none leaves it as it is.
    pub priority: Option<Priority>,
    /// Size of the stream table, 2 to 1,048,576; a pair takes two.
    pub max_streams: u32,
    /// Packets in a row that prove a stream; 0 asks for no proof.
    pub proof: u8,
    /// How often the PBX hears of a phone without RTCP whose timeout is not known; 0 is never.
    pub keepalive: Duration,
    /// How long calls go on without AMI.
    pub ami_grace: Duration,
    /// After how long without a packet an offloaded stream is told of.
    pub silence: Duration,
    /// After how long without a packet a stream expires.
    pub expire: Duration,
    /// Whether the datapath stays, to the end of its lease, when the daemon ends.
    pub persist: bool,
    /// Where the control socket goes.
    pub socket: PathBuf,
    /// The Asterisk to learn pairs from; none when pairs come from the API alone.
    pub ami: Option<AmiSettings>,
    /// How the interface is shaped while calls are up, if it is.
    pub qos_auto: Option<AutoSettings>,
    /// Where metrics are served, if they are; port 0 is any free one.
    pub metrics: Option<SocketAddr>,
    /// Where the page is served, if it is; port 0 likewise.
    pub http: Option<SocketAddr>,
    /// Names that browsers and Prometheus may call this host by, besides its addresses and its own name.
    pub allowed_hosts: Vec<String>,
}

/// How to reach Asterisk's manager interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AmiSettings {
    /// `HOST:PORT`; an IPv6 host is in brackets, and a name is not resolved yet.
    pub address: String,
    /// The user of manager.conf.
    pub user: String,
    /// The user's secret.
    pub secret: Secret,
}

/// The attach mode asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// TC where relayed packets need a queueing discipline, or have no Ethernet header; else native XDP
    /// where the driver has it, else generic.
    #[default]
    Auto,
    /// In the driver's receive path; refused where the driver cannot.
    Native,
    /// In the kernel's generic receive path: slower, works with every driver.
    Generic,
    /// In the ingress traffic control: what is relayed leaves through the queueing discipline.
    Tc,
}

/// What is wrong with one value. The text names it and what it may be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// Not an attach mode.
    #[error("`{0}` is not an attach mode: write native, generic, tc or auto")]
    Mode(String),
    /// Not a DSCP value.
    #[error(transparent)]
    Dscp(#[from] DscpError),
    /// Not a priority.
    #[error(transparent)]
    Priority(#[from] PriorityError),
    /// Not a usable size of the stream table.
    #[error(
        "`{0}` streams are not possible: write a number from {FEWEST_STREAMS} to {MOST_STREAMS}; a pair takes two"
    )]
    MaxStreams(String),
    /// Not a number of packets.
    #[error(
        "`{0}` is no number of packets: write 1 to 255, or 0 to relay what AMI says without proof"
    )]
    Proof(String),
    /// Not a length of time.
    #[error("`{0}` is no length of time: write seconds, such as 3 or 0.5, up to 86400")]
    Time(String),
    /// Not a host and a port.
    #[error(
        "`{0}` is not HOST:PORT: write, say, 127.0.0.1:5038, pbx.example.com:5038 or [2001:db8::1]:5038"
    )]
    AmiAddress(String),
    /// Nothing, or a control character that would end the AMI header it stands in.
    #[error(
        "the AMI user is empty or holds a control character: write the name in brackets of manager.conf"
    )]
    AmiUser,
    /// Not where a server could listen.
    #[error(
        "`{0}` is no address to listen on: write PORT for loopback alone, such as 8080, or ADDRESS:PORT, such as 192.0.2.1:8080 or [::1]:8080"
    )]
    ListenAddress(String),
    /// Not a name of a host.
    #[error("`{0}` is no host name: write it without scheme and port, such as pbx.example.com")]
    HostName(String),
    /// A path of no length.
    #[error("the path is empty: write the path of a file")]
    Path,
    /// Not a rate of a line.
    #[error(transparent)]
    Rate(#[from] RateError),
    /// Not a number of voice packets per second.
    #[error("`{0}` is no number of packets per second: write a whole number, such as 10")]
    VoiceRate(String),
    /// Thresholds that do not fit each other.
    #[error(transparent)]
    Thresholds(#[from] ThresholdError),
    /// Not a name the kernel accepts for an interface.
    #[error(
        "`{0}` cannot be the name of an interface: it has 1 to 15 characters, no space, `/` or `:`; `ip link` lists yours"
    )]
    Interface(String),
}

/// Why the settings were refused. No text holds a secret.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read, or is not of this form.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// A value out of its range.
    #[error("{at}: `{key}`: {source}")]
    Value {
        /// Where the value is.
        at: Position,
        /// The key, with its table.
        key: &'static str,
        /// What is wrong with it.
        source: SettingError,
    },
    /// `[qos.auto]` without the line's rate.
    #[error(
        "{0}: `qos.auto.uplink` is missing: write what the line carries, such as uplink = \"1000kbit\""
    )]
    NoUplink(Position),
    /// A priority, but no queueing discipline on the way.
    #[error(
        "the priority {0} is given, but XDP goes around every queueing discipline: use --mode tc, or auto"
    )]
    PriorityWithoutTc(Priority),
    /// An AMI user or secret, but nowhere to log in.
    #[error("{given} is given, but no AMI address: add --ami HOST:PORT, or `address` under [ami]")]
    NoAmiAddress {
        /// What is there without it.
        given: &'static str,
    },
    /// An AMI address, but nobody to log in as.
    #[error(
        "the AMI address {0} is given, but no user: add --ami-user NAME, or `user` under [ami]"
    )]
    NoAmiUser(String),
    /// An AMI user without a secret.
    #[error(
        "the AMI user `{0}` is given, but no secret: add --ami-secret-file FILE, `secret-file` under [ami], or set {SECRET_VARIABLE}"
    )]
    NoAmiSecret(String),
    /// The secret in the environment is none.
    #[error("environment variable {SECRET_VARIABLE}: {0}")]
    SecretVariable(SecretError),
    /// The secret file is none.
    #[error(transparent)]
    SecretFile(#[from] SecretFileError),
}

/// Settings as one source gives them: the flags, or a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `--mode`, `mode`.
    pub mode: Option<Mode>,
    /// `--dscp`, `dscp`.
    pub dscp: Option<Dscp>,
    /// `--priority`, `priority`.
    pub priority: Option<Priority>,
    /// `--max-streams`, `max-streams`.
    pub max_streams: Option<u32>,
    /// `--proof`, `proof`.
    pub proof: Option<u8>,
    /// `--keepalive`, `keepalive`.
    pub keepalive: Option<Duration>,
    /// `--ami-grace`, `grace` under `[ami]`.
    pub ami_grace: Option<Duration>,
    /// `--silence`, `silence`.
    pub silence: Option<Duration>,
    /// `--expire`, `expire`.
    pub expire: Option<Duration>,
    /// `--persist`, `persist`.
    pub persist: Option<bool>,
    /// `--socket`, `socket`.
    pub socket: Option<PathBuf>,
    /// `--ami`, `address` under `[ami]`.
    pub ami_address: Option<String>,
    /// `--ami-user`, `user` under `[ami]`.
    pub ami_user: Option<String>,
    /// `--ami-secret-file`, `secret-file` under `[ami]`.
    pub ami_secret_file: Option<PathBuf>,
    /// `[qos.auto]`.
    pub qos_auto: Option<AutoSettings>,
    /// `--metrics`, `metrics`.
    pub metrics: Option<SocketAddr>,
    /// `--http`, `http`.
    pub http: Option<SocketAddr>,
    /// `--allowed-host`, `allowed-hosts`.
    pub allowed_hosts: Option<Vec<String>>,
}

/// The sources in one: all decided, the secret file not opened yet.
#[derive(Debug, PartialEq, Eq)]
struct Merged {
    interface: String,
    mode: Mode,
    dscp: Dscp,
    priority: Option<Priority>,
    max_streams: u32,
    proof: u8,
    keepalive: Duration,
    ami_grace: Duration,
    silence: Duration,
    expire: Duration,
    persist: bool,
    socket: PathBuf,
    ami: Option<(String, String, SecretSource)>,
    qos_auto: Option<AutoSettings>,
    metrics: Option<SocketAddr>,
    http: Option<SocketAddr>,
    allowed_hosts: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum SecretSource {
    File(PathBuf),
    Variable(Secret),
}

/// Reads the configuration file, if one is named, and the secret file, and puts all together.
/// `variable` is the content of [`SECRET_VARIABLE`].
///
/// # Errors
/// Every [`ConfigError`].
pub fn load(
    interface: String,
    flags: Settings,
    variable: Option<String>,
    file: Option<&Path>,
) -> Result<AttachSettings, ConfigError> {
    let file = file.map(read).transpose()?.unwrap_or_default();
    let variable = variable
        .map(Secret::new)
        .transpose()
        .map_err(ConfigError::SecretVariable)?;
    let merged = merge(interface, flags, variable, file)?;
    let ami = match merged.ami {
        None => None,
        Some((address, user, source)) => {
            let secret = match source {
                SecretSource::File(path) => Secret::read(&path)?,
                SecretSource::Variable(secret) => secret,
            };
            Some(AmiSettings {
                address,
                user,
                secret,
            })
        }
    };
    Ok(AttachSettings {
        interface: merged.interface,
        mode: merged.mode,
        dscp: merged.dscp,
        priority: merged.priority,
        max_streams: merged.max_streams,
        proof: merged.proof,
        keepalive: merged.keepalive,
        ami_grace: merged.ami_grace,
        silence: merged.silence,
        expire: merged.expire,
        persist: merged.persist,
        socket: merged.socket,
        ami,
        qos_auto: merged.qos_auto,
        metrics: merged.metrics,
        http: merged.http,
        allowed_hosts: merged.allowed_hosts,
    })
}

fn merge(
    interface: String,
    flags: Settings,
    variable: Option<Secret>,
    file: Settings,
) -> Result<Merged, ConfigError> {
    let address = flags.ami_address.or(file.ami_address);
    let user = flags.ami_user.or(file.ami_user);
    let secret = flags
        .ami_secret_file
        .map(SecretSource::File)
        .or(variable.map(SecretSource::Variable))
        .or(file.ami_secret_file.map(SecretSource::File));
    let ami = match (address, user, secret) {
        (None, None, None) => None,
        (Some(address), Some(user), Some(secret)) => Some((address, user, secret)),
        (Some(_), Some(user), None) => return Err(ConfigError::NoAmiSecret(user)),
        (Some(address), None, _) => return Err(ConfigError::NoAmiUser(address)),
        (None, Some(_), _) => {
            return Err(ConfigError::NoAmiAddress {
                given: "an AMI user",
            });
        }
        (None, None, Some(_)) => {
            return Err(ConfigError::NoAmiAddress {
                given: "an AMI secret",
            });
        }
    };
    let mode = flags.mode.or(file.mode).unwrap_or_default();
    let priority = flags.priority.or(file.priority);
    if let (Mode::Native | Mode::Generic, Some(priority)) =
        (mode, priority.and_then(Priority::effective))
    {
        return Err(ConfigError::PriorityWithoutTc(priority));
    }
    Ok(Merged {
        mode,
        dscp: flags.dscp.or(file.dscp).unwrap_or(Dscp::Set(EF)),
        priority,
        max_streams: flags
            .max_streams
            .or(file.max_streams)
            .unwrap_or(MAX_STREAMS),
        proof: flags.proof.or(file.proof).unwrap_or(PROOF),
        keepalive: flags.keepalive.or(file.keepalive).unwrap_or(KEEPALIVE),
        ami_grace: flags.ami_grace.or(file.ami_grace).unwrap_or(AMI_GRACE),
        silence: flags.silence.or(file.silence).unwrap_or(SILENCE),
        expire: flags.expire.or(file.expire).unwrap_or(EXPIRE),
        persist: flags.persist.or(file.persist).unwrap_or(false),
        socket: flags
            .socket
            .or(file.socket)
            .unwrap_or_else(|| socket::of_interface(&interface)),
        ami,
        qos_auto: flags.qos_auto.or(file.qos_auto),
        metrics: flags.metrics.or(file.metrics),
        http: flags.http.or(file.http),
        allowed_hosts: flags
            .allowed_hosts
            .or(file.allowed_hosts)
            .unwrap_or_default(),
        interface,
    })
}

/// Reads a configuration file. Relative paths in it start from the file's own folder.
///
/// # Errors
/// Every [`ConfigError`] that is about the file.
fn read(path: &Path) -> Result<Settings, ConfigError> {
    let text = document::read(path, FILE)?;
    document(path, &text).settings()
}

/// What these files are called.
const FILE: &str = "configuration file";

fn document<'a>(path: &'a Path, text: &'a str) -> Document<'a> {
    Document {
        path,
        text,
        keys: &KEYS,
    }
}

/// Every key there is, with its table. What a misspelt key is compared with.
const KEYS: [&str; 26] = [
    "mode",
    "dscp",
    "priority",
    "max-streams",
    "proof",
    "keepalive",
    "silence",
    "expire",
    "persist",
    "socket",
    "metrics",
    "http",
    "allowed-hosts",
    "ami",
    "ami.address",
    "ami.user",
    "ami.secret-file",
    "ami.grace",
    "qos",
    "qos.auto",
    "qos.auto.uplink",
    "qos.auto.downlink",
    "qos.auto.policy",
    "qos.auto.replace",
    "qos.auto.on-threshold",
    "qos.auto.off-threshold",
];

impl Document<'_> {
    fn settings(&self) -> Result<Settings, ConfigError> {
        let document = self.parsed()?;
        let mut settings = Settings::default();
        for entry in self.entries(document.get_ref(), "")? {
            match entry.key {
                "mode" => settings.mode = Some(self.parse(&entry)?),
                "dscp" => settings.dscp = Some(self.dscp(&entry)?),
                "priority" => settings.priority = Some(self.priority(&entry)?),
                "max-streams" => {
                    settings.max_streams = Some(self.number(&entry, max_streams)?);
                }
                "proof" => settings.proof = Some(self.number(&entry, proof)?),
                "keepalive" => settings.keepalive = Some(self.time(&entry, time)?),
                "silence" => settings.silence = Some(self.time(&entry, some_time)?),
                "expire" => settings.expire = Some(self.time(&entry, some_time)?),
                "persist" => settings.persist = Some(self.flag(&entry)?),
                "socket" => settings.socket = Some(self.file_path(&entry)?),
                "metrics" => settings.metrics = Some(self.listen_address(&entry)?),
                "http" => settings.http = Some(self.listen_address(&entry)?),
                "allowed-hosts" => settings.allowed_hosts = Some(self.host_names(&entry)?),
                "qos" => {
                    for entry in self.entries(self.table(&entry, "a table: [qos.auto]")?, "qos.")? {
                        settings.qos_auto = Some(self.qos_auto(&entry)?);
                    }
                }
                _ => self.ami(self.table(&entry, "a table: [ami]")?, &mut settings)?,
            }
        }
        Ok(settings)
    }

    fn ami(&self, table: &DeTable<'_>, settings: &mut Settings) -> Result<(), ConfigError> {
        for entry in self.entries(table, "ami.")? {
            match entry.key {
                "ami.address" => settings.ami_address = Some(self.checked(&entry, ami_address)?),
                "ami.user" => settings.ami_user = Some(self.checked(&entry, ami_user)?),
                "ami.grace" => settings.ami_grace = Some(self.time(&entry, time)?),
                _ => settings.ami_secret_file = Some(self.file_path(&entry)?),
            }
        }
        Ok(())
    }

    fn qos_auto(&self, auto: &Entry<'_>) -> Result<AutoSettings, ConfigError> {
        let (mut uplink, mut downlink, mut policy, mut replace) = (None, None, None, false);
        let (mut on, mut off) = (Thresholds::ON, Thresholds::OFF);
        let rate = |entry: &Entry<'_>| self.checked(entry, |text| Ok(text.parse::<Rate>()?));
        let threshold = |entry: &Entry<'_>| self.number(entry, voice_rate);
        for entry in self.entries(self.table(auto, "a table: [qos.auto]")?, "qos.auto.")? {
            match entry.key {
                "qos.auto.uplink" => uplink = Some(rate(&entry)?),
                "qos.auto.downlink" => downlink = Some(rate(&entry)?),
                "qos.auto.policy" => policy = Some(self.file_path(&entry)?),
                "qos.auto.replace" => replace = self.flag(&entry)?,
                "qos.auto.on-threshold" => on = threshold(&entry)?,
                _ => off = threshold(&entry)?,
            }
        }
        Ok(AutoSettings {
            uplink: uplink.ok_or_else(|| ConfigError::NoUplink(self.position(auto.start)))?,
            downlink,
            policy,
            replace,
            thresholds: Thresholds::new(on, off)
                .map_err(|source| self.wrong_value(auto, source.into()))?,
        })
    }

    fn table<'t>(
        &self,
        entry: &Entry<'t>,
        wanted: &'static str,
    ) -> Result<&'t DeTable<'t>, ConfigError> {
        match entry.value {
            DeValue::Table(table) => Ok(table),
            _ => Err(self.wrong_type(entry, wanted).into()),
        }
    }

    fn checked<T>(
        &self,
        entry: &Entry<'_>,
        check: impl FnOnce(&str) -> Result<T, SettingError>,
    ) -> Result<T, ConfigError> {
        check(self.text(entry)?).map_err(|source| self.wrong_value(entry, source))
    }

    fn parse<T: FromStr<Err = SettingError>>(&self, entry: &Entry<'_>) -> Result<T, ConfigError> {
        self.checked(entry, str::parse)
    }

    fn dscp(&self, entry: &Entry<'_>) -> Result<Dscp, ConfigError> {
        let read = match entry.value {
            DeValue::Table(table) => {
                let texts: Vec<_> = table
                    .iter()
                    .map(|(from, to)| {
                        let to = code_text(to.get_ref()).ok_or_else(|| {
                            self.wrong_type(entry, "code points, such as { 0 = \"ef\" }")
                        })?;
                        Ok((from.get_ref().as_ref(), to))
                    })
                    .collect::<Result<_, ConfigError>>()?;
                DscpMap::new(
                    texts
                        .iter()
                        .map(|(from, to): &(&str, String)| (*from, to.as_str())),
                )
                .map(Dscp::Map)
            }
            value => code_text(value)
                .ok_or_else(|| {
                    let wanted = "\"ef\", \"keep\", a number from 0 to 63, or a table";
                    self.wrong_type(entry, wanted)
                })?
                .parse(),
        };
        read.map_err(|source| self.wrong_value(entry, source.into()))
    }

    fn priority(&self, entry: &Entry<'_>) -> Result<Priority, ConfigError> {
        let text = code_text(entry.value).ok_or_else(|| {
            self.wrong_type(entry, "a class such as \"1:10\", or a number from 0 to 15")
        })?;
        text.parse()
            .map_err(|source: PriorityError| self.wrong_value(entry, source.into()))
    }

    fn listen_address(&self, entry: &Entry<'_>) -> Result<SocketAddr, ConfigError> {
        let text = code_text(entry.value)
            .ok_or_else(|| self.wrong_type(entry, "a port without quotes, or \"ADDRESS:PORT\""))?;
        listen_address(&text).map_err(|source| self.wrong_value(entry, source))
    }

    fn host_names(&self, entry: &Entry<'_>) -> Result<Vec<String>, ConfigError> {
        let wrong = || self.wrong_type(entry, "a list of names, such as [\"pbx.example.com\"]");
        let DeValue::Array(names) = entry.value else {
            return Err(wrong().into());
        };
        let name = |value: &DeValue<'_>| match value {
            DeValue::String(text) => {
                host_name(text).map_err(|source| self.wrong_value(entry, source))
            }
            _ => Err(wrong().into()),
        };
        names.iter().map(|value| name(value.get_ref())).collect()
    }

    fn number<T>(
        &self,
        entry: &Entry<'_>,
        check: impl FnOnce(&str) -> Result<T, SettingError>,
    ) -> Result<T, ConfigError> {
        match entry.value {
            DeValue::Integer(number) => {
                check(&number.to_string()).map_err(|source| self.wrong_value(entry, source))
            }
            _ => Err(self
                .wrong_type(entry, "a whole number without quotes")
                .into()),
        }
    }

    fn time(
        &self,
        entry: &Entry<'_>,
        check: fn(&str) -> Result<Duration, SettingError>,
    ) -> Result<Duration, ConfigError> {
        let text = match entry.value {
            DeValue::Integer(number) => number.to_string(),
            DeValue::Float(number) => number.to_string(),
            _ => {
                return Err(self
                    .wrong_type(entry, "a number of seconds without quotes")
                    .into());
            }
        };
        check(&text).map_err(|source| self.wrong_value(entry, source))
    }

    fn file_path(&self, entry: &Entry<'_>) -> Result<PathBuf, ConfigError> {
        let folder = self.path.parent().unwrap_or(Path::new(""));
        Ok(folder.join(self.checked(entry, path)?))
    }

    fn wrong_value(&self, entry: &Entry<'_>, source: SettingError) -> ConfigError {
        ConfigError::Value {
            at: self.position(entry.start),
            key: entry.key,
            source,
        }
    }
}

/// What may be a code point.
fn code_text(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::Integer(number) => Some(number.to_string()),
        DeValue::String(text) => Some(text.to_string()),
        _ => None,
    }
}

/// Reads a size of the stream table.
///
/// # Errors
/// [`SettingError::MaxStreams`].
pub fn max_streams(text: &str) -> Result<u32, SettingError> {
    text.parse()
        .ok()
        .filter(|count| (FEWEST_STREAMS..=MOST_STREAMS).contains(count))
        .ok_or_else(|| SettingError::MaxStreams(printable(text)))
}

fn voice_rate(text: &str) -> Result<u32, SettingError> {
    text.parse()
        .map_err(|_| SettingError::VoiceRate(printable(text)))
}

/// Reads a number of packets that prove a stream.
///
/// # Errors
/// [`SettingError::Proof`].
pub fn proof(text: &str) -> Result<u8, SettingError> {
    text.parse()
        .map_err(|_| SettingError::Proof(printable(text)))
}

/// Reads a length of time, in seconds.
///
/// # Errors
/// [`SettingError::Time`].
pub fn time(text: &str) -> Result<Duration, SettingError> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|time| *time <= LONGEST_TIME)
        .ok_or_else(|| SettingError::Time(printable(text)))
}

/// Reads a length of time that is not 0, in seconds.
///
/// # Errors
/// [`SettingError::Time`].
pub fn some_time(text: &str) -> Result<Duration, SettingError> {
    match time(text)? {
        Duration::ZERO => Err(SettingError::Time(printable(text))),
        time => Ok(time),
    }
}

/// Reads a `HOST:PORT`.
///
/// # Errors
/// [`SettingError::AmiAddress`].
pub fn ami_address(text: &str) -> Result<String, SettingError> {
    let valid = text.rsplit_once(':').is_some_and(|(host, port)| {
        let host = match host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
        {
            Some(inner) => inner.parse::<std::net::Ipv6Addr>().is_ok(),
            None => {
                !host.is_empty()
                    && host
                        .chars()
                        .all(|c| c.is_alphanumeric() || matches!(c, '.' | '-' | '_'))
            }
        };
        host && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    if valid {
        Ok(text.to_owned())
    } else {
        Err(SettingError::AmiAddress(printable(text)))
    }
}

/// Reads where to listen: a port alone, or after a colon, is loopback's.
///
/// # Errors
/// [`SettingError::ListenAddress`].
pub fn listen_address(text: &str) -> Result<SocketAddr, SettingError> {
    let port = text.strip_prefix(':').unwrap_or(text);
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let address = if digits {
        port.parse()
            .ok()
            .map(|port: u16| (Ipv4Addr::LOCALHOST, port).into())
    } else {
        text.parse().ok()
    };
    address.ok_or_else(|| SettingError::ListenAddress(printable(text)))
}

/// Reads the name of a host, as a browser would send it.
///
/// # Errors
/// [`SettingError::HostName`].
pub fn host_name(text: &str) -> Result<String, SettingError> {
    let valid = (1..=253).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
    if valid {
        Ok(text.to_ascii_lowercase())
    } else {
        Err(SettingError::HostName(printable(text)))
    }
}

/// Reads the name of an AMI user.
///
/// # Errors
/// [`SettingError::AmiUser`].
pub fn ami_user(text: &str) -> Result<String, SettingError> {
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err(SettingError::AmiUser);
    }
    Ok(text.to_owned())
}

/// Reads the path of a file.
///
/// # Errors
/// [`SettingError::Path`].
pub fn path(text: &str) -> Result<PathBuf, SettingError> {
    if text.is_empty() {
        Err(SettingError::Path)
    } else {
        Ok(text.into())
    }
}

/// Reads the name of an interface. By the kernel's rule (`dev_valid_name` of net/core/dev.c), so that
/// it is also safe as the name of a file.
///
/// # Errors
/// [`SettingError::Interface`].
pub fn interface(text: &str) -> Result<String, SettingError> {
    let valid = (1..=15).contains(&text.len())
        && !matches!(text, "." | "..")
        && !text
            .chars()
            .any(|c| matches!(c, '/' | ':') || c.is_whitespace() || c.is_control());
    if valid {
        Ok(text.to_owned())
    } else {
        Err(SettingError::Interface(printable(text)))
    }
}

impl FromStr for Mode {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        match text {
            "auto" => Ok(Self::Auto),
            "native" => Ok(Self::Native),
            "generic" => Ok(Self::Generic),
            "tc" => Ok(Self::Tc),
            _ => Err(SettingError::Mode(printable(text))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    fn parsed(text: &str) -> Result<Settings, ConfigError> {
        document(Path::new("/etc/relay-user.toml"), text).settings()
    }

    fn secret(text: &str) -> Secret {
        Secret::new(text.into()).expect("secret")
    }

    fn full(tag: &str) -> Settings {
        Settings {
            mode: Some(Mode::Native),
            dscp: Some(Dscp::Set(10)),
            priority: None,
            max_streams: Some(4),
            proof: Some(3),
            keepalive: Some(Duration::from_secs(1)),
            ami_grace: Some(Duration::from_secs(1)),
            silence: Some(Duration::from_secs(1)),
            expire: Some(Duration::from_secs(1)),
            persist: Some(true),
            socket: Some(format!("/{tag}.sock").into()),
            ami_address: Some(format!("{tag}:5038")),
            ami_user: Some(tag.into()),
            ami_secret_file: Some(format!("/{tag}.secret").into()),
            qos_auto: None,
            metrics: None,
            http: None,
            allowed_hosts: None,
        }
    }

    #[test]
    fn every_key_is_read() {
        let settings = parsed(
            "mode = \"generic\"\ndscp = 26\npriority = 5\nmax-streams = 1_024\nproof = 12\nkeepalive = 0.5\n\
             silence = 20\nexpire = 90\npersist = true\nsocket = \"/run/x.sock\"\n\
             metrics = 9180\nhttp = \"[::]:8080\"\nallowed-hosts = [\"PBX.example.com\"]\n\
             [ami]\ngrace = 1\naddress = \"pbx.example.com:5038\"\nuser = \"relay\"\nsecret-file = \"secret\"\n\
             [qos.auto]\nuplink = \"1mbit\"\ndownlink = \"8mbit\"\npolicy = \"qos.toml\"\nreplace = true\n\
             on-threshold = 100\noff-threshold = 20\n",
        );
        assert_eq!(
            settings.expect("valid file"),
            Settings {
                mode: Some(Mode::Generic),
                dscp: Some(Dscp::Set(26)),
                priority: Some(Priority::new(5)),
                max_streams: Some(1024),
                proof: Some(12),
                keepalive: Some(Duration::from_millis(500)),
                ami_grace: Some(Duration::from_secs(1)),
                silence: Some(Duration::from_secs(20)),
                expire: Some(Duration::from_secs(90)),
                persist: Some(true),
                socket: Some("/run/x.sock".into()),
                ami_address: Some("pbx.example.com:5038".into()),
                ami_user: Some("relay".into()),
                ami_secret_file: Some("/etc/secret".into()),
                qos_auto: Some(AutoSettings {
                    uplink: "1mbit".parse().expect("rate"),
                    downlink: Some("8mbit".parse().expect("rate")),
                    policy: Some("/etc/qos.toml".into()),
                    replace: true,
                    thresholds: Thresholds::new(100, 20).expect("thresholds"),
                }),
                metrics: Some("127.0.0.1:9180".parse().expect("address")),
                http: Some("[::]:8080".parse().expect("address")),
                allowed_hosts: Some(vec!["pbx.example.com".into()]),
            }
        );
        assert_eq!(parsed("").expect("empty file"), Settings::default());
        assert_eq!(
            parsed("dscp = \"keep\"").expect("text").dscp,
            Some(Dscp::Keep)
        );
        assert_eq!(
            parsed("priority = \"1:f0\"").expect("text").priority,
            Some(Priority::new(0x1_00f0))
        );
        for text in [
            "dscp = \"map:0=ef,cs5=10\"",
            "dscp = { be = \"ef\", 40 = 10 }",
            "[dscp]\n0 = 46\ncs5 = \"af11\"",
        ] {
            let dscp = parsed(text).expect(text).dscp.map(|dscp| dscp.to_string());
            assert_eq!(dscp.as_deref(), Some("map:cs0=ef,cs5=af11"), "{text}");
        }
    }

    #[test]
    fn errors_name_place_and_remedy() {
        for (text, expected) in [
            (
                "\n  max_streams = 8",
                ":2:3: unknown key `max_streams`: did you mean `max-streams`?",
            ),
            ("mod = 1", ":1:1: unknown key `mod`: did you mean `mode`?"),
            (
                "[ami]\nusr = \"x\"",
                ":2:1: unknown key `ami.usr`: did you mean `ami.user`?",
            ),
            (
                "secret-file = \"x\"",
                ":1:1: unknown key `secret-file`: did you mean `ami.secret-file`?",
            ),
            (
                "[ami]\nsecret = \"hunter2\"",
                ":2:1: unknown key `ami.secret`: did you mean `ami.secret-file`?",
            ),
            (
                "[ami]\n mode = \"auto\"",
                ":2:2: unknown key `ami.mode`: did you mean `mode`?",
            ),
            (
                "\"ami.user\" = \"x\"",
                ":1:1: unknown key `ami.user`: did you mean",
            ),
            ("mode = 1", ":1:8: `mode` is a whole number: write a string"),
            (
                "mode = \"fast\"",
                ":1:8: `mode`: `fast` is not an attach mode: write native",
            ),
            ("# é\ndscp = 64", ":2:8: `dscp`: `64` is not a DSCP value"),
            ("dscp = -1", "`-1` is not a DSCP value"),
            ("priority = 16", "`16` is not a priority: write a class"),
            (
                "dscp = true",
                ":1:8: `dscp` is true or false: write \"ef\", \"keep\"",
            ),
            (
                "max-streams = 1",
                "`1` streams are not possible: write a number from 2 to 1048576",
            ),
            (
                "max-streams = 1048577",
                "`1048577` streams are not possible",
            ),
            (
                "max-streams = 99999999999999999999",
                "streams are not possible",
            ),
            (
                "max-streams = \"8\"",
                "`max-streams` is a string: write a whole number",
            ),
            ("max-streams = 8.5", "a number with a fraction"),
            ("proof = 256", "`256` is no number of packets"),
            ("silence = -1", "`-1` is no length of time: write seconds"),
            ("expire = 0", "`0` is no length of time"),
            ("keepalive = nan", "is no length of time"),
            (
                "keepalive = \"3\"",
                "is a string: write a number of seconds",
            ),
            (
                "http = 65536",
                ":1:8: `http`: `65536` is no address to listen on",
            ),
            (
                "metrics = \"pbx:80\"",
                "is no address to listen on: write PORT",
            ),
            ("http = true", "write a port without quotes, or"),
            (
                "allowed-hosts = \"x\"",
                "is a string: write a list of names",
            ),
            (
                "allowed-hosts = [\"http://x\"]",
                "`http://x` is no host name",
            ),
            ("persist = 1", "is a whole number: write true or false"),
            ("socket = \"\"", "the path is empty"),
            ("ami = 1", "`ami` is a whole number: write a table: [ami]"),
            ("[[ami]]\nuser = \"x\"", "`ami` is a list: write a table"),
            (
                "ami.address = \"pbx\"",
                ":1:15: `ami.address`: `pbx` is not HOST:PORT",
            ),
            (
                "[ami]\nuser = \"a\\r\\nb\"",
                ":2:8: `ami.user`: the AMI user is empty or",
            ),
            ("mode = \"auto\"\nmode = \"auto\"", ":2:1: duplicate key"),
            ("mode = auto", ":1:8: "),
            ("[ami\n", ":1:5: "),
            (
                "[qos.auto]\ndownlink = \"8mbit\"",
                ":1:1: `qos.auto.uplink` is missing: write what the line carries",
            ),
            (
                "[qos.auto]\nuplink = \"fast\"",
                ":2:10: `qos.auto.uplink`: `fast` is no rate",
            ),
            (
                "[qos.auto]\nuplink = \"1mbit\"\noff-threshold = 11",
                "above 10 voice packets per second and off below 11",
            ),
            (
                "[qos]\nuplink = \"1mbit\"",
                ":2:1: unknown key `qos.uplink`: did you mean `qos.auto.uplink`?",
            ),
            ("qos = 1", "write a table: [qos.auto]"),
            (
                "[qos.auto]\non-threshold = -1",
                "`-1` is no number of packets per second",
            ),
        ] {
            let error = parsed(text).expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
            assert!(error.starts_with("/etc/relay-user.toml:"), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        let error = parsed("[ami]\nsecret-file = hunter2")
            .expect_err("no quotes")
            .to_string();
        assert!(error.starts_with("/etc/relay-user.toml:2:15: "), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn flags_win_over_environment_over_file() {
        let defaults = merge(
            "eth0".into(),
            Settings::default(),
            None,
            Settings::default(),
        );
        assert_eq!(
            defaults.expect("defaults"),
            Merged {
                interface: "eth0".into(),
                mode: Mode::Auto,
                dscp: Dscp::Set(46),
                priority: None,
                max_streams: 65_536,
                proof: 8,
                keepalive: Duration::from_secs(3),
                ami_grace: Duration::from_secs(2),
                silence: Duration::from_secs(10),
                expire: Duration::from_secs(60),
                persist: false,
                socket: "/run/relay-user/eth0.sock".into(),
                ami: None,
                qos_auto: None,
                metrics: None,
                http: None,
                allowed_hosts: Vec::new(),
            }
        );
        let from = |flags, variable, file| {
            let merged = merge("eth0".into(), flags, variable, file).expect("complete");
            let (address, user, source) = merged.ami.expect("AMI");
            (merged.socket, address, user, source)
        };
        let file_of = |tag: &str| SecretSource::File(format!("/{tag}.secret").into());
        assert_eq!(
            from(full("flag"), Some(secret("variable")), full("file")),
            (
                "/flag.sock".into(),
                "flag:5038".into(),
                "flag".into(),
                file_of("flag")
            )
        );
        assert_eq!(
            from(Settings::default(), Some(secret("variable")), full("file")),
            (
                "/file.sock".into(),
                "file:5038".into(),
                "file".into(),
                SecretSource::Variable(secret("variable"))
            )
        );
        let only_user = Settings {
            ami_user: Some("flag".into()),
            ..Settings::default()
        };
        assert_eq!(
            from(only_user, None, full("file")),
            (
                "/file.sock".into(),
                "file:5038".into(),
                "flag".into(),
                file_of("file")
            )
        );
    }

    #[test]
    fn incomplete_ami_settings_are_refused_by_name() {
        let with = |clear: fn(&mut Settings), variable| {
            let mut file = full("file");
            clear(&mut file);
            merge("eth0".into(), Settings::default(), variable, file)
                .expect_err("incomplete")
                .to_string()
        };
        assert!(
            with(|file| file.ami_address = None, None)
                .contains("an AMI user is given, but no AMI address")
        );
        assert!(with(|file| file.ami_user = None, None).contains("no user: add --ami-user"));
        assert!(
            with(|file| file.ami_secret_file = None, None)
                .contains("no secret: add --ami-secret-file")
        );
        let error = with(|file| *file = Settings::default(), Some(secret("s")));
        assert!(
            error.contains("an AMI secret is given, but no AMI address"),
            "{error}"
        );
    }

    #[test]
    fn load_reads_files_and_reports_them() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let config = directory.path().join("relay.toml");
        let path = directory.path().join("secret");
        fs::write(
            &config,
            "[ami]\naddress = \"127.0.0.1:5038\"\nuser = \"relay\"\nsecret-file = \"secret\"\n",
        )
        .expect("configuration");
        fs::write(&path, "s3cret\n").expect("secret");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("mode");
        let load = |variable: Option<&str>, config: &Path| {
            load(
                "eth0".into(),
                Settings::default(),
                variable.map(str::to_owned),
                Some(config),
            )
        };
        let settings = load(None, &config).expect("valid");
        let ami = settings.ami.as_ref().expect("AMI");
        assert_eq!(
            (ami.user.as_str(), ami.secret.expose()),
            ("relay", "s3cret")
        );
        assert!(!format!("{settings:?}").contains("s3cret"));
        assert_eq!(
            load(Some("other"), &config)
                .expect("valid")
                .ami
                .expect("AMI")
                .secret
                .expose(),
            "other"
        );
        let error = load(Some(""), &config)
            .expect_err("empty variable")
            .to_string();
        assert!(
            error.contains("RELAY_AMI_SECRET: the secret is empty"),
            "{error}"
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("mode");
        assert!(
            load(None, &config)
                .expect_err("exposed")
                .to_string()
                .contains("chmod 600")
        );
        let error = load(None, &directory.path().join("none"))
            .expect_err("absent")
            .to_string();
        assert!(
            error.contains("cannot read the configuration file"),
            "{error}"
        );
        fs::write(&config, vec![b'#'; 70_000]).expect("long file");
        assert!(
            load(None, &config)
                .expect_err("long")
                .to_string()
                .contains("longer than")
        );
        fs::write(&config, b"\xff").expect("binary file");
        assert!(
            load(None, &config)
                .expect_err("binary")
                .to_string()
                .contains("not UTF-8")
        );
    }

    #[test]
    fn single_values_are_checked() {
        for good in [
            "127.0.0.1:5038",
            "pbx-1.example.com:1",
            "[2001:db8::1]:65535",
        ] {
            assert_eq!(ami_address(good).as_deref(), Ok(good));
        }
        for bad in [
            "",
            ":5038",
            "pbx",
            "pbx:",
            "pbx:0",
            "pbx:65536",
            "2001:db8::1:5038",
            "[pbx]:1",
            "a b:1",
            "a\n:1",
        ] {
            assert!(ami_address(bad).is_err(), "{bad}");
        }
        for (text, address) in [
            ("8080", "127.0.0.1:8080"),
            (":8080", "127.0.0.1:8080"),
            ("0", "127.0.0.1:0"),
            ("0.0.0.0:80", "0.0.0.0:80"),
            ("[::1]:8080", "[::1]:8080"),
        ] {
            let read = listen_address(text).map(|address| address.to_string());
            assert_eq!(read.as_deref(), Ok(address));
        }
        for bad in [
            "",
            ":",
            "+80",
            "65536",
            "192.0.2.1",
            "::1",
            "pbx:80",
            "1:2:3",
        ] {
            assert!(listen_address(bad).is_err(), "{bad}");
        }
        for good in ["eth0", "br-lan.100", "a", "123456789012345"] {
            assert_eq!(interface(good).as_deref(), Ok(good));
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "a b",
            "a:1",
            "1234567890123456",
            "../../x",
            "a\n",
        ] {
            assert!(interface(bad).is_err(), "{bad}");
        }
    }
}
