//! A real Asterisk 22 under test, and a second one that plays all the phones, in two machines on one cable.
//!
//! A call: phones (Milliwatt) → leg A at 192.0.2.11 → Asterisk under test, `Dial` → leg B at 192.0.2.12 → phones
//! (answer, Milliwatt). The extension chooses what Asterisk does with it: see `asterisk/pbx/extensions.conf`.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, File},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::{
    mount::{MsFlags, mount},
    sys::signal::Signal,
};

use crate::{
    ami::{Client, Message},
    capture::{Direction, Flow, Quality, Recording},
    debian::Installation,
    namespace::{Host, Process},
    rtp::Rtp,
    topology::{Direct, PBX_V4},
};

/// The AMI user of the Asterisk under test with the least privileges that the relay needs.
pub const USER: &str = "relay";
/// The AMI user of both Asterisks that may do everything.
pub const FULL_USER: &str = "full";
/// The secret of both users.
pub const SECRET: &str = "not a secret";
/// An ordinary caller: one of the endpoints in `asterisk/pbx/pjsip.conf`.
pub const CALLER: &str = "caller";

/// Asterisk 22, which Debian 12 and 13 do not have.
const INSTALLATION: Installation = Installation {
    program: "Asterisk",
    cache: "relay-asterisk",
    name: "forky-1",
    suite: "forky",
    packages: &["asterisk", "asterisk-core-sounds-en-wav"],
    finish: None,
};
/// How long an Asterisk may take to boot.
const BOOT: Duration = Duration::from_secs(60);
/// Between two looks at a state that no event announces.
const LOOK: Duration = Duration::from_millis(50);
/// AMI's port on both.
const AMI_PORT: u16 = 5038;

/// Both Asterisks, up. Dropping it kills them.
#[derive(Debug)]
pub struct Lab {
    /// The network: the Asterisk under test in `pbx`, the phones in `phones`.
    pub net: Direct,
    pbx: Instance,
    phones: Instance,
    manager: Mutex<Client>,
    originator: Mutex<Client>,
    secret_file: PathBuf,
}

/// A channel of the Asterisk under test that has RTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leg {
    /// Its name.
    pub channel: String,
    /// The bridge it is in; empty for none.
    pub bridge: String,
    /// Where Asterisk receives RTP.
    pub local: SocketAddr,
    /// Where the phone does.
    pub remote: SocketAddr,
    /// RTP packets that Asterisk itself has received (`CHANNEL(rtcp,rxcount)`).
    pub received: u64,
}

/// A bridge of the Asterisk under test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// `BridgeUniqueid`.
    pub id: String,
    /// `simple_bridge`, `native_rtp`, `softmix`, …
    pub technology: String,
    /// Channels in it.
    pub channels: u32,
}

/// One direction of a call, as seen on the phones' cable.
#[derive(Clone, Debug)]
pub struct Stream {
    /// The leg whose phone sends.
    pub from: Leg,
    /// The leg whose phone receives.
    pub to: Leg,
    /// RTP packets that the phone sent.
    pub sent: u64,
    /// Different RTP packets that the other phone received.
    pub received: u64,
    /// Of these, packets whose SSRC, sequence, timestamp and payload are those of one that was sent.
    pub unchanged: u64,
    /// Packets that came again.
    pub duplicates: u64,
    /// Packets that came after a later one of their SSRC.
    pub reordered: u64,
    /// Sequence numbers between the first and the last arrival of an SSRC that never came.
    pub missing: u64,
    /// Of those that came, also again, packets marked EF: Asterisk in the lab marks none.
    pub expedited: u64,
    /// Longest time between two arrivals, whatever their SSRC.
    pub largest_gap: Duration,
    /// Longest time between two sendings: on a busy machine the phones pause too.
    pub largest_pause: Duration,
}

impl Stream {
    /// The call's bridge.
    pub fn bridge(&self) -> &str {
        &self.from.bridge
    }

    /// Different packets that came for each that was sent: 0.5 where Asterisk joins two packets into one.
    pub fn share(&self) -> f64 {
        self.received as f64 / self.sent.max(1) as f64
    }
}

impl Lab {
    /// Installs Asterisk if it is not yet in the cache, and starts both.
    ///
    /// # Errors
    /// No Debian mirror can be reached, or an Asterisk does not boot: the text holds its log.
    pub fn up() -> Result<Self> {
        Self::up_in(Direct::new(2)?)
    }

    /// The same in a network with two phones.
    ///
    /// # Errors
    /// As [`Lab::up`].
    pub fn up_in(net: Direct) -> Result<Self> {
        let root = INSTALLATION.root()?;
        let (pbx, phones) = thread::scope(|scope| {
            let pbx = scope.spawn(|| Instance::start(&net.pbx, &root, &PBX_FILES));
            let phones = Instance::start(&net.phones, &root, &PHONES_FILES);
            let pbx = pbx
                .join()
                .map_err(|panic| anyhow!("starting Asterisk panicked: {panic:?}"));
            Ok::<_, anyhow::Error>((pbx??, phones?))
        })?;
        let secret_file = net.pbx.private_file("secret", SECRET)?;
        let manager = Mutex::new(pbx.deaf_manager()?);
        let originator = Mutex::new(phones.deaf_manager()?);
        Ok(Self {
            net,
            pbx,
            phones,
            manager,
            originator,
            secret_file,
        })
    }

    /// Where the AMI of the Asterisk under test listens, for its own machine and for the phones'.
    pub fn ami(&self) -> SocketAddr {
        SocketAddr::new(PBX_V4, AMI_PORT)
    }

    /// The file with [`SECRET`], which is visible inside the machine `pbx` only.
    pub fn secret_file(&self) -> &Path {
        &self.secret_file
    }

    /// A connection of its own to the Asterisk under test, as a user who may do everything.
    ///
    /// # Errors
    /// Asterisk is gone.
    pub fn manager(&self) -> Result<Client> {
        self.pbx.manager()
    }

    /// The same for the Asterisk that plays the phones.
    ///
    /// # Errors
    /// Asterisk is gone.
    pub fn phones_manager(&self) -> Result<Client> {
        self.phones.manager()
    }

    /// Runs a CLI command of the Asterisk under test and returns what it prints.
    ///
    /// # Errors
    /// Asterisk is gone.
    pub fn cli(&self, command: &str) -> Result<String> {
        self.pbx.cli(command)
    }

    /// CPU time that the Asterisk under test has used until now.
    ///
    /// # Errors
    /// Asterisk is gone.
    pub fn cpu_time(&self) -> Result<Duration> {
        self.pbx.process.cpu_time()
    }

    /// The process id of the Asterisk under test.
    pub fn id(&self) -> u32 {
        self.pbx.process.id()
    }

    /// Kills the Asterisk under test, as a crash does, and waits for its end.
    ///
    /// # Errors
    /// It does not end.
    pub fn crash(&mut self) -> Result<()> {
        self.pbx.process.signal(Signal::SIGKILL);
        self.pbx.process.wait(BOOT)?;
        Ok(())
    }

    /// Stops the Asterisk that plays the phones for good, in the midst of its calls: these stay up, and nobody talks.
    pub fn freeze_phones(&self) {
        self.phones.process.signal(Signal::SIGSTOP);
    }

    /// Starts the Asterisk under test again after [`Lab::crash`].
    ///
    /// # Errors
    /// It does not boot: the text holds its log.
    pub fn restart(&mut self) -> Result<()> {
        self.pbx.process = launch(&self.pbx.host, &self.pbx.root)?;
        self.pbx.await_boot()?;
        *self
            .manager
            .get_mut()
            .expect("no holder of this lock panics") = self.pbx.deaf_manager()?;
        Ok(())
    }

    /// A file that the Asterisk under test has written, by its own path for it.
    ///
    /// # Errors
    /// There is none.
    pub fn file(&self, path: &str) -> Result<Vec<u8>> {
        let path = self.pbx.root.join(path.trim_start_matches('/'));
        let read = self.pbx.host.run(|| fs::read(&path));
        read.with_context(|| format!("read {}", path.display()))
    }

    /// What the Asterisk under test has logged until now.
    pub fn log(&self) -> String {
        self.pbx.log()
    }

    /// Places `calls` calls to `extension`, which hang up `seconds` after each began. `caller` is the endpoint of
    /// leg A: [`CALLER`], or another of `asterisk/pbx/pjsip.conf`. Does not wait for them to be up.
    ///
    /// # Errors
    /// The phones' Asterisk refuses.
    pub fn call(&self, calls: u32, seconds: u32, extension: &str, caller: &str) -> Result<()> {
        let mut originator = self
            .originator
            .lock()
            .expect("no holder of this lock panics");
        for call in 1..=calls {
            originator.action(
                "Originate",
                &[
                    (
                        "Channel",
                        &format!("PJSIP/{caller}/sip:{extension}@{PBX_V4}:5060"),
                    ),
                    ("Context", "caller"),
                    ("Exten", "talk"),
                    ("Priority", "1"),
                    ("CallerID", &format!("c{call} <{}>", 1000 + call)),
                    ("Async", "true"),
                    ("Timeout", "15000"),
                    ("Variable", &format!("TIMEOUT(absolute)={seconds}")),
                ],
            )?;
        }
        Ok(())
    }

    /// All bridges of the Asterisk under test.
    ///
    /// # Errors
    /// Asterisk is gone.
    pub fn bridges(&self) -> Result<Vec<Bridge>> {
        let items = self.ask("BridgeList", &[])?;
        items
            .iter()
            .filter(|item| item.is_event("BridgeListItem"))
            .map(|item| {
                let field = |key| {
                    item.get(key)
                        .with_context(|| format!("BridgeListItem without {key}"))
                };
                Ok(Bridge {
                    id: field("BridgeUniqueid")?.to_owned(),
                    technology: field("BridgeTechnology")?.to_owned(),
                    channels: field("BridgeNumChannels")?.parse()?,
                })
            })
            .collect()
    }

    /// All channels of the Asterisk under test that know their own and their phone's RTP address.
    ///
    /// # Errors
    /// Asterisk is gone.
    pub fn legs(&self) -> Result<Vec<Leg>> {
        legs(&mut self.manager.lock().expect("no holder of this lock panics"))
    }

    /// The same for the Asterisk that plays the phones: what each phone sends to and has received itself.
    ///
    /// # Errors
    /// Asterisk is gone.
    pub fn phone_legs(&self) -> Result<Vec<Leg>> {
        let mut phones = self.originator.lock();
        legs(phones.as_mut().expect("no holder of this lock panics"))
    }

    /// The calls between two phones: bridges with exactly two legs.
    ///
    /// # Errors
    /// Asterisk is gone.
    pub fn pairs(&self) -> Result<Vec<[Leg; 2]>> {
        let mut bridges = BTreeMap::<String, Vec<Leg>>::new();
        for leg in self
            .legs()?
            .into_iter()
            .filter(|leg| !leg.bridge.is_empty())
        {
            bridges.entry(leg.bridge.clone()).or_default().push(leg);
        }
        Ok(bridges
            .into_values()
            .filter_map(|legs| legs.try_into().ok())
            .collect())
    }

    /// RTP packets that the Asterisk under test has received on all channels that are up.
    ///
    /// # Errors
    /// Asterisk is gone.
    pub fn received(&self) -> Result<u64> {
        Ok(self.legs()?.iter().map(|leg| leg.received).sum())
    }

    /// Waits until exactly `calls` calls are up between two phones, both of which Asterisk has heard, and returns
    /// them.
    ///
    /// # Errors
    /// They are not within `timeout`: the text holds Asterisk's log.
    pub fn wait_calls(&self, calls: usize, timeout: Duration) -> Result<Vec<[Leg; 2]>> {
        self.poll(timeout, &format!("{calls} calls up"), || {
            let pairs = self.pairs()?;
            let heard = pairs.iter().flatten().all(|leg| leg.received > 0);
            Ok((pairs.len() == calls && heard).then_some(pairs))
        })
    }

    /// Waits until there are `bridges` bridges of two channels, all of this technology.
    ///
    /// # Errors
    /// There are not within `timeout`: the text holds Asterisk's log.
    pub fn wait_technology(
        &self,
        bridges: usize,
        technology: &str,
        timeout: Duration,
    ) -> Result<()> {
        self.poll(
            timeout,
            &format!("{bridges} bridges of technology {technology}"),
            || {
                let all = self.bridges()?;
                let right = all
                    .iter()
                    .all(|bridge| bridge.technology == technology && bridge.channels == 2);
                Ok((all.len() == bridges && right).then_some(()))
            },
        )
    }

    /// Waits until no channel is left.
    ///
    /// # Errors
    /// Some are after `timeout`: the text holds Asterisk's log.
    pub fn wait_over(&self, timeout: Duration) -> Result<()> {
        self.poll(timeout, "no channel left", || {
            let items = self.ask("Status", &[])?;
            Ok((!items.iter().any(|item| item.is_event("Status"))).then_some(()))
        })
    }

    /// Hangs up every call, and waits until it is over.
    ///
    /// # Errors
    /// Some channel stays: the text holds Asterisk's log.
    pub fn hang_up_all(&self) -> Result<()> {
        // No match is an error of this action, and what is wanted.
        let _ = self.ask("Hangup", &[("Channel", "/^PJSIP/"), ("Cause", "16")]);
        self.wait_over(Duration::from_secs(20))
    }

    fn ask(&self, action: &str, fields: &[(&str, &str)]) -> Result<Vec<Message>> {
        self.manager
            .lock()
            .expect("no holder of this lock panics")
            .action(action, fields)
    }

    /// Looks at a state until it is there: Asterisk announces not all of its states by events.
    fn poll<T>(
        &self,
        timeout: Duration,
        wanted: &str,
        look: impl Fn() -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(found) = look()? {
                return Ok(found);
            }
            if Instant::now() > deadline {
                let bridges = self.bridges()?;
                bail!(
                    "not within {timeout:?}: {wanted}; bridges: {bridges:?}; log:\n{}",
                    self.log()
                );
            }
            thread::sleep(LOOK);
        }
    }
}

/// All channels that know their own and their peer's RTP address.
fn legs(manager: &mut Client) -> Result<Vec<Leg>> {
    let channels = manager.action("Status", &[])?;
    let mut legs = Vec::new();
    for item in channels.iter().filter(|item| item.is_event("Status")) {
        let channel = item.get("Channel").context("Status without Channel")?;
        // Not as `Variables` of the Status, which freezes Asterisk 22 now and then: it waits for the call's SIP
        // thread with the channel locked (action_status in main/manager.c), and that thread for the channel.
        let mut value = |name: &str| {
            let name = format!("CHANNEL({name})");
            // The channel may be gone by now.
            let answer = manager.action("Getvar", &[("Channel", channel), ("Variable", &name)]);
            answer.ok()?.first()?.get("Value").map(str::to_owned)
        };
        let mut address = |name| value(name)?.parse().ok();
        if let (Some(local), Some(remote)) = (address("rtp,src"), address("rtp,dest")) {
            legs.push(Leg {
                channel: channel.to_owned(),
                bridge: item.get("BridgeID").unwrap_or_default().to_owned(),
                local,
                remote,
                received: value("rtcp,rxcount").map_or(0, |text| text.parse().unwrap_or(0)),
            });
        }
    }
    Ok(legs)
}

/// The streams of `pairs` in a recording of the phones' interface, two for each pair.
pub fn streams(recording: &Recording, pairs: &[[Leg; 2]]) -> Vec<Stream> {
    /// DSCP of expedited forwarding (RFC 3246).
    const EF: u8 = 46;
    /// Header, digest, arrival, DSCP.
    type Packets = Vec<(Rtp, u64, Duration, u8)>;
    let mut flows = HashMap::<(Direction, SocketAddr, SocketAddr), Packets>::new();
    for (frame, datagram) in recording.datagrams() {
        if let Some((rtp, payload)) = Rtp::parse(datagram.payload) {
            let mut hasher = DefaultHasher::new();
            (rtp.ssrc, rtp.sequence, rtp.timestamp, payload).hash(&mut hasher);
            let flow = flows
                .entry((frame.direction, datagram.source, datagram.destination))
                .or_default();
            flow.push((rtp, hasher.finish(), frame.at, datagram.dscp));
        }
    }
    let largest_gap = |packets: &Packets| {
        let gaps = packets.windows(2);
        let gaps = gaps.map(|two| two[1].2.saturating_sub(two[0].2));
        gaps.max().unwrap_or_default()
    };
    let none = Packets::new();
    let stream = |from: &Leg, to: &Leg| {
        let sent = flows
            .get(&(Direction::Out, from.remote, from.local))
            .unwrap_or(&none);
        let arrived = flows
            .get(&(Direction::In, to.local, to.remote))
            .unwrap_or(&none);
        let digests: HashSet<_> = sent.iter().map(|(_, digest, ..)| digest).collect();
        let mut by_source = BTreeMap::<u32, Flow>::new();
        for (rtp, _, at, _) in arrived {
            by_source
                .entry(rtp.ssrc)
                .or_default()
                .push(rtp.sequence, *at);
        }
        let qualities: Vec<Quality> = by_source.values().map(Flow::quality).collect();
        let distinct: HashSet<_> = arrived.iter().map(|(_, digest, ..)| digest).collect();
        Stream {
            from: from.clone(),
            to: to.clone(),
            sent: sent.len() as u64,
            received: qualities.iter().map(|quality| quality.distinct).sum(),
            unchanged: distinct.intersection(&digests).count() as u64,
            duplicates: qualities.iter().map(|quality| quality.duplicates).sum(),
            reordered: qualities.iter().map(|quality| quality.reordered).sum(),
            missing: qualities.iter().map(|quality| quality.missing).sum(),
            expedited: arrived.iter().filter(|(.., dscp)| *dscp == EF).count() as u64,
            largest_gap: largest_gap(arrived),
            largest_pause: largest_gap(sent),
        }
    };
    pairs
        .iter()
        .flat_map(|[first, second]| [stream(first, second), stream(second, first)])
        .collect()
}

/// A configuration file: its name in `/lab/etc`, and its text.
type Template = (&'static str, &'static str);

macro_rules! templates {
    ($directory:literal: $($name:literal),+) => {
        [$(($name, include_str!(concat!("../asterisk/", $directory, "/", $name)))),+]
    };
}

const COMMON_FILES: [Template; 10] = templates!("common":
    "asterisk.conf", "cdr.conf", "cel.conf", "confbridge.conf", "features.conf", "http.conf", "indications.conf",
    "logger.conf", "musiconhold.conf", "udptl.conf");
const PBX_FILES: [Template; 4] =
    templates!("pbx": "extensions.conf", "manager.conf", "pjsip.conf", "rtp.conf");
const PHONES_FILES: [Template; 4] =
    templates!("phones": "extensions.conf", "manager.conf", "pjsip.conf", "rtp.conf");
/// Asterisk complains about each of these that is missing.
const EMPTY_FILES: [&str; 10] = [
    "acl.conf",
    "ccss.conf",
    "cli.conf",
    "cli_aliases.conf",
    "dnsmgr.conf",
    "pjproject.conf",
    "pjsip_notify.conf",
    "res_fax.conf",
    "res_parking.conf",
    "stasis.conf",
];

/// One Asterisk in a machine: the installed files, read-only, with its own files at `/lab`, all in memory.
#[derive(Debug)]
struct Instance {
    host: Host,
    root: PathBuf,
    process: Process,
}

impl Instance {
    fn start(host: &Host, installed: &Path, files: &[Template]) -> Result<Self> {
        let root = host.directory("asterisk")?;
        host.run(|| prepare(&root, installed, files))
            .with_context(|| format!("prepare the Asterisk of `{}`", host.name()))?;
        let process = launch(host, &root)?;
        let mut instance = Self {
            host: host.clone(),
            root,
            process,
        };
        instance.await_boot()?;
        Ok(instance)
    }

    fn await_boot(&mut self) -> Result<()> {
        let deadline = Instant::now() + BOOT;
        while !self
            .cli("core waitfullybooted")
            .is_ok_and(|text| text.contains("fully booted"))
        {
            if let Some(status) = self.process.try_wait() {
                bail!(
                    "the Asterisk of `{}` ended ({status}):\n{}",
                    self.host.name(),
                    self.log()
                );
            }
            if Instant::now() > deadline {
                bail!(
                    "the Asterisk of `{}` has not booted after {BOOT:?}:\n{}",
                    self.host.name(),
                    self.log()
                );
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    fn cli(&self, line: &str) -> Result<String> {
        let mut command = Command::new("chroot");
        command
            .arg(&self.root)
            .args(["asterisk", "-C", "/lab/etc/asterisk.conf", "-rx", line]);
        let output = self.host.output(command)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn manager(&self) -> Result<Client> {
        Client::login(
            &self.host,
            (Ipv4Addr::LOCALHOST, AMI_PORT).into(),
            FULL_USER,
            SECRET,
        )
    }

    /// A connection that gets no events: Asterisk closes one whose events nobody reads.
    fn deaf_manager(&self) -> Result<Client> {
        let mut manager = self.manager()?;
        manager.action("Events", &[("EventMask", "off")])?;
        Ok(manager)
    }

    /// The end of what it printed and logged.
    fn log(&self) -> String {
        let end = |name: &str| {
            let path = self.root.join("lab").join(name);
            let text = self.host.run(|| fs::read(path)).unwrap_or_default();
            String::from_utf8_lossy(&text[text.len().saturating_sub(8000)..]).into_owned()
        };
        end("output") + &end("log/messages")
    }
}

/// Starts the Asterisk whose files [`prepare`] laid out.
fn launch(host: &Host, root: &Path) -> Result<Process> {
    let output = host.run(|| {
        File::options()
            .create(true)
            .append(true)
            .open(root.join("lab/output"))
    })?;
    let mut command = Command::new("chroot");
    command
        .arg(root)
        .args(["asterisk", "-f", "-C", "/lab/etc/asterisk.conf"]);
    command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output);
    // As root, because a change of user would clear the signal that ends it with this process
    // (prctl(2), PR_SET_PDEATHSIG).
    host.spawn(command)
}

/// Lays out the files of an instance. Runs inside the machine, whose mounts nobody else sees.
fn prepare(root: &Path, installed: &Path, files: &[Template]) -> Result<()> {
    const NONE: Option<&str> = None;
    let bind = |flags| mount(Some(installed), root, NONE, MsFlags::MS_BIND | flags, NONE);
    bind(MsFlags::empty()).with_context(|| format!("bind {}", installed.display()))?;
    // A bind mount takes its flags only when mounted again.
    bind(MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY).context("make it read-only")?;
    mount(
        Some("proc"),
        &root.join("proc"),
        Some("proc"),
        MsFlags::empty(),
        NONE,
    )
    .context("mount /proc")?;
    for directory in ["lab", "tmp", "run"] {
        mount(
            Some("tmpfs"),
            &root.join(directory),
            Some("tmpfs"),
            MsFlags::empty(),
            NONE,
        )
        .with_context(|| format!("mount /{directory}"))?;
    }
    let lab = root.join("lab");
    for directory in [
        "cache",
        "db",
        "etc",
        "keys/keys",
        "log/cdr-csv",
        "log/cdr-custom",
        "log/cel-custom",
        "moh",
        "run",
        "spool/monitor",
        "spool/outgoing",
        "spool/tmp",
    ] {
        fs::create_dir_all(lab.join(directory))?;
    }
    // Hold music: any file that the sound package brings.
    symlink(
        "/usr/share/asterisk/sounds/en/tt-weasels.wav",
        lab.join("moh/tt-weasels.wav"),
    )?;
    let modules = modules(root)?;
    let inside = Path::new("/").join(modules.strip_prefix(root)?);
    let etc = lab.join("etc");
    for (name, text) in COMMON_FILES.iter().chain(files) {
        let text = text
            .replace("@SECRET@", SECRET)
            .replace("@MODULES@", &inside.to_string_lossy());
        fs::write(etc.join(name), text)?;
    }
    for name in EMPTY_FILES {
        fs::write(etc.join(name), "")?;
    }
    let mut text = "[modules]\nautoload=yes\n".to_owned();
    for entry in fs::read_dir(&modules)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".so") && is_needless(&name) {
            text += &format!("noload => {name}\n");
        }
    }
    fs::write(etc.join("modules.conf"), text)?;
    Ok(())
}

/// The directory of Asterisk's modules, whose path names the machine's architecture.
fn modules(root: &Path) -> Result<PathBuf> {
    let mut found = fs::read_dir(root.join("usr/lib"))?
        .flatten()
        .map(|entry| entry.path().join("asterisk/modules"));
    found
        .find(|path| path.is_dir())
        .context("the installed Asterisk has no modules")
}

/// Databases, ARI, other channel drivers, and what else a bridged call does not need: booting takes a third as long
/// without.
fn is_needless(module: &str) -> bool {
    const PREFIXES: [&str; 14] = [
        "app_minivm",
        "app_stasis",
        "app_voicemail",
        "cdr_",
        "cel_",
        "res_ari",
        "res_calendar",
        "res_config_",
        "res_hep",
        "res_odbc",
        "res_phoneprov",
        "res_pjsip_phoneprov",
        "res_stasis",
        "func_odbc",
    ];
    const NAMES: [&str; 42] = [
        "app_adsiprog",
        "app_agent_pool",
        "app_alarmreceiver",
        "app_amd",
        "app_broadcast",
        "app_festival",
        "app_followme",
        "app_getcpeid",
        "app_jack",
        "app_queue",
        "app_sla",
        "chan_audiosocket",
        "chan_console",
        "chan_iax2",
        "chan_motif",
        "chan_unistim",
        "chan_websocket",
        "pbx_ael",
        "pbx_dundi",
        "pbx_lua",
        "pbx_realtime",
        "res_adsi",
        "res_aeap",
        "res_ael_share",
        "res_cdrel_custom",
        "res_fax_spandsp",
        "res_geolocation",
        "res_http_media_cache",
        "res_pjsip_config_wizard",
        "res_pjsip_geolocation",
        "res_pjsip_stir_shaken",
        "res_pjsip_transport_websocket",
        "res_prometheus",
        "res_resolver_unbound",
        "res_smdi",
        "res_snmp",
        "res_speech_aeap",
        "res_statsd",
        "res_stir_shaken",
        "res_stun_monitor",
        "res_timing_pthread",
        "res_websocket_client",
    ];
    let name = module.trim_end_matches(".so");
    PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        || NAMES.contains(&name)
        || name == "res_xmpp"
}
