//! A fake PBX: a process that forwards RTP in userspace, as Asterisk does, and says on AMI what Asterisk says.
//!
//! It is a process of its own (`src/bin/pbx.rs`), so that its CPU time can be measured.

mod ami;
mod call;
mod exchange;
mod media;

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{ChildStdin, ChildStdout, Command, Stdio},
    sync::Mutex,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, de::DeserializeOwned};

pub use exchange::{Options, run};

use crate::{
    namespace::{Host, Process},
    relay::binary,
};

/// The only AMI user, with the least privileges that the relay needs.
pub const USER: &str = "relay";
/// Its secret.
pub const SECRET: &str = "not a secret";

/// A call of the fake PBX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Call {
    /// Its number, for the commands of [`Pbx`].
    pub id: u64,
    /// Where the PBX receives RTP from the caller and from the callee.
    pub local: [SocketAddr; 2],
}

/// Packets of one leg.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Counters {
    /// Received by the PBX on this leg.
    pub received: u64,
    /// Of these, sent to the other leg.
    pub forwarded: u64,
}

/// A running fake PBX. Dropping it kills it.
#[derive(Debug)]
pub struct Pbx {
    process: Process,
    ami: SocketAddr,
    dialogue: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
    secret_file: PathBuf,
}

impl Pbx {
    /// Starts it in a machine that has `address`, and waits until it listens.
    ///
    /// # Errors
    /// The program `pbx` of this crate is not built, or cannot listen.
    pub fn start(host: &Host, address: IpAddr) -> Result<Self> {
        #[derive(Deserialize)]
        struct Ready {
            ami: SocketAddr,
        }
        let secret_file = host.private_file("secret", SECRET)?;
        let mut command = Command::new(binary("pbx", "RELAY_PBX_BIN")?);
        command
            .arg("--address")
            .arg(address.to_string())
            .arg("--ami-secret-file")
            .arg(&secret_file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut process = host.spawn(command)?;
        let child = process.child_mut();
        let stdin = child.stdin.take().context("the PBX has a standard input")?;
        let mut stdout = BufReader::new(
            child
                .stdout
                .take()
                .context("the PBX has a standard output")?,
        );
        let ready: Ready = line(&mut stdout)?;
        Ok(Self {
            process,
            ami: ready.ami,
            dialogue: Mutex::new((stdin, stdout)),
            secret_file,
        })
    }

    /// Where its AMI listens; the user is [`USER`].
    pub fn ami(&self) -> SocketAddr {
        self.ami
    }

    /// The file with [`SECRET`], which is visible inside the machine only.
    pub fn secret_file(&self) -> &Path {
        &self.secret_file
    }

    /// Connects two phones. The bridge turns native about 10 ms later.
    ///
    /// # Errors
    /// No port is left.
    pub fn call(&self, caller: SocketAddr, callee: SocketAddr) -> Result<Call> {
        self.call_named(["caller", "callee"], [caller, callee])
    }

    /// The same between these endpoints, which are words without spaces: their names are those of the channels.
    ///
    /// # Errors
    /// No port is left.
    pub fn call_named(&self, endpoints: [&str; 2], phones: [SocketAddr; 2]) -> Result<Call> {
        let ([caller, callee], [first, second]) = (endpoints, phones);
        self.command(&format!("call {first} {second} {caller} {callee}"))
    }

    /// Begins as many calls as are asked for that only AMI tells of: they have no ports, and nobody sends. The legs'
    /// ports follow on `local`, two apart; the phones' addresses, all with the port of `phone`, on that.
    ///
    /// # Errors
    /// There are not so many ports.
    pub fn silent_calls(
        &self,
        count: u16,
        local: SocketAddr,
        phone: SocketAddr,
    ) -> Result<Vec<Call>> {
        self.command(&format!("silent {count} {local} {phone}"))
    }

    /// Ends a call.
    ///
    /// # Errors
    /// No such call.
    pub fn hang_up(&self, call: Call) -> Result<()> {
        self.order("hangup", call)
    }

    /// The caller puts the call on hold; the technology stays native.
    ///
    /// # Errors
    /// No such call.
    pub fn hold(&self, call: Call) -> Result<()> {
        self.order("hold", call)
    }

    /// The caller resumes the call.
    ///
    /// # Errors
    /// No such call.
    pub fn unhold(&self, call: Call) -> Result<()> {
        self.order("unhold", call)
    }

    /// Turns the bridge to `simple_bridge`, as MixMonitor does: SSRC and sequence become the PBX's own.
    ///
    /// # Errors
    /// No such call.
    pub fn simple(&self, call: Call) -> Result<()> {
        self.order("simple", call)
    }

    /// Turns the bridge to `native_rtp`.
    ///
    /// # Errors
    /// No such call.
    pub fn native(&self, call: Call) -> Result<()> {
        self.order("native", call)
    }

    /// From now on the callee hears the caller in another coding, and nothing on AMI says so.
    ///
    /// # Errors
    /// No such call.
    pub fn transcode(&self, call: Call) -> Result<()> {
        self.order("transcode", call)
    }

    /// Cuts every AMI connection, as a restart of Asterisk's manager does. New ones are welcome.
    ///
    /// # Errors
    /// The PBX is gone.
    pub fn disconnect_ami(&self) -> Result<()> {
        self.command::<serde_json::Value>("disconnect").map(drop)
    }

    /// From now on AMI tells what happens, but answers no question about calls, as a busy Asterisk does for a while.
    ///
    /// # Errors
    /// The PBX is gone.
    pub fn stall_ami(&self) -> Result<()> {
        self.command::<serde_json::Value>("stall").map(drop)
    }

    /// AMI answers again, the questions of before too.
    ///
    /// # Errors
    /// The PBX is gone.
    pub fn unstall_ami(&self) -> Result<()> {
        self.command::<serde_json::Value>("unstall").map(drop)
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Packets of each call that is up, by its number: caller's leg, callee's leg.
    ///
    /// # Errors
    /// The PBX is gone.
    pub fn counters(&self) -> Result<BTreeMap<u64, [Counters; 2]>> {
        self.command("counters")
    }

    /// CPU time that the PBX has used until now.
    ///
    /// # Errors
    /// The PBX is gone.
    pub fn cpu_time(&self) -> Result<Duration> {
        self.process.cpu_time()
    }

    fn order(&self, verb: &str, call: Call) -> Result<()> {
        self.command::<serde_json::Value>(&format!("{verb} {}", call.id))
            .map(drop)
    }

    fn command<T: DeserializeOwned>(&self, command: &str) -> Result<T> {
        let mut dialogue = self.dialogue.lock().expect("no holder of this lock panics");
        let (stdin, stdout) = &mut *dialogue;
        writeln!(stdin, "{command}").context("the fake PBX is gone")?;
        line(stdout).with_context(|| format!("fake PBX: {command}"))
    }
}

fn line<T: DeserializeOwned>(stdout: &mut BufReader<ChildStdout>) -> Result<T> {
    let mut text = String::new();
    if stdout.read_line(&mut text)? == 0 {
        bail!("the fake PBX has ended");
    }
    let answer: serde_json::Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    if let Some(error) = answer.get("error") {
        bail!("{error}");
    }
    Ok(serde_json::from_value(answer)?)
}
