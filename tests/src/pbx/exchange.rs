//! The fake PBX itself: its calls, its AMI clients, and the commands by which a test drives it.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Instant, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde_json::{Value, json};

use super::{
    ami::{self, Session},
    call::{Call, Channel, Message, Side},
    media,
};

/// A userspace PBX that forwards RTP and speaks AMI. Commands come on standard input, one a line; the answer to each
/// is one line of JSON. It ends with its standard input.
#[derive(Debug, Parser)]
pub struct Options {
    /// Address for RTP, and for AMI (port 5038).
    #[arg(long)]
    pub address: IpAddr,
    /// File with the AMI secret.
    #[arg(long)]
    pub ami_secret_file: PathBuf,
}

/// First RTP port, as in Asterisk's sample configuration.
const FIRST_PORT: u16 = 10_000;
/// AMI's port.
const AMI_PORT: u16 = 5038;

#[derive(Debug, Default)]
pub(super) struct Exchange {
    lines: Mutex<Lines>,
    sessions: Mutex<Vec<Arc<Session>>>,
    /// AMI answers no question.
    stalled: Mutex<bool>,
    unstalled: Condvar,
}

#[derive(Debug, Default)]
struct Lines {
    calls: BTreeMap<u64, Running>,
    bridges: HashMap<String, Arc<Call>>,
    channels: HashMap<String, Arc<Call>>,
    next_call: u64,
    next_channel: u32,
}

#[derive(Debug)]
struct Running {
    call: Arc<Call>,
    /// None of a call that only AMI tells of.
    media: Option<Media>,
}

#[derive(Debug)]
struct Media {
    stop: Arc<EventFd>,
    thread: JoinHandle<Result<()>>,
}

impl Lines {
    /// A call that is not up yet, and its number.
    fn new_call(
        &mut self,
        endpoints: [&str; 2],
        locals: [SocketAddr; 2],
        remotes: [SocketAddr; 2],
    ) -> Result<(u64, Call)> {
        let id = self.next_call;
        self.next_call += 1;
        let epoch = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)?
            .as_secs();
        let mut channel = |endpoint: &str, side: usize| {
            let number = self.next_channel;
            self.next_channel += 1;
            Channel {
                name: format!("PJSIP/{endpoint}-{number:08x}"),
                unique_id: format!("{epoch}.{number}"),
                sip_call_id: format!("{epoch:08x}-0000-4000-8000-{number:012x}"),
                local: locals[side],
                remote: remotes[side],
                held: AtomicBool::new(false),
                received: AtomicU64::new(0),
                forwarded: AtomicU64::new(0),
            }
        };
        let call = Call {
            bridge_id: format!("{epoch:08x}-b71d-4000-8000-{id:012x}"),
            caller: channel(endpoints[0], 0),
            callee: channel(endpoints[1], 1),
            native: AtomicBool::new(false),
            transcoded: AtomicBool::new(false),
            started: Instant::now(),
        };
        Ok((id, call))
    }

    fn insert(&mut self, id: u64, running: Running) {
        let call = &running.call;
        self.bridges
            .insert(call.bridge_id.clone(), Arc::clone(call));
        for channel in [&call.caller, &call.callee] {
            self.channels.insert(channel.name.clone(), Arc::clone(call));
        }
        self.calls.insert(id, running);
    }

    fn remove(&mut self, id: u64) -> Option<Running> {
        let running = self.calls.remove(&id)?;
        self.bridges.remove(&running.call.bridge_id);
        for channel in [&running.call.caller, &running.call.callee] {
            self.channels.remove(&channel.name);
        }
        Some(running)
    }
}

impl Exchange {
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().expect("no holder of this lock panics")
    }

    fn sessions(&self) -> MutexGuard<'_, Vec<Arc<Session>>> {
        self.sessions.lock().expect("no holder of this lock panics")
    }

    pub(super) fn join(&self, session: &Arc<Session>) {
        self.sessions().push(Arc::clone(session));
    }

    pub(super) fn leave(&self, session: &Arc<Session>) {
        self.sessions().retain(|other| !Arc::ptr_eq(other, session));
    }

    pub(super) fn calls(&self) -> Vec<Arc<Call>> {
        self.lines()
            .calls
            .values()
            .map(|running| Arc::clone(&running.call))
            .collect()
    }

    /// The call of a bridge.
    pub(super) fn bridge(&self, id: &str) -> Option<Arc<Call>> {
        self.lines().bridges.get(id).cloned()
    }

    /// The call and the side of a channel.
    pub(super) fn channel(&self, name: &str) -> Option<(Arc<Call>, Side)> {
        let call = self.lines().channels.get(name).cloned()?;
        let side = call.side(name)?;
        Some((call, side))
    }

    fn stall(&self, stalled: bool) {
        *self.stalled.lock().expect("no holder of this lock panics") = stalled;
        self.unstalled.notify_all();
    }

    /// Returns when AMI may answer.
    pub(super) fn await_unstalled(&self) {
        let stalled = self.stalled.lock().expect("no holder of this lock panics");
        let waited = self.unstalled.wait_while(stalled, |stalled| *stalled);
        drop(waited.expect("no holder of this lock panics"));
    }

    fn publish(&self, messages: &[Message]) {
        // Not under the lock: a stuck client must not keep others from logging in.
        let sessions = self.sessions().clone();
        for session in sessions {
            session.publish(messages);
        }
    }

    fn start(
        self: &Arc<Self>,
        address: IpAddr,
        remotes: [SocketAddr; 2],
        endpoints: [&str; 2],
    ) -> Result<Value> {
        let mut lines = self.lines();
        let sockets = [socket(address)?, socket(address)?];
        let locals = [sockets[0].local_addr()?, sockets[1].local_addr()?];
        let (id, call) = lines.new_call(endpoints, locals, remotes)?;
        let call = Arc::new(call);
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let thread = {
            let (exchange, call, stop) = (Arc::clone(self), Arc::clone(&call), Arc::clone(&stop));
            thread::Builder::new()
                .name(format!("call {id}"))
                .spawn(move || {
                    media::forward(&call, &sockets, &stop, || exchange.switch(&call, true))
                })?
        };
        lines.insert(
            id,
            Running {
                call: Arc::clone(&call),
                media: Some(Media { stop, thread }),
            },
        );
        drop(lines);
        self.publish(&call.start());
        Ok(json!({ "id": id, "local": locals }))
    }

    /// Calls that only AMI tells of: they have neither ports nor packets, so that there can be thousands. Their ports
    /// and phones follow on the first ones.
    fn start_silent(&self, count: u16, local: SocketAddr, phone: SocketAddr) -> Result<Value> {
        let IpAddr::V4(first) = phone.ip() else {
            bail!("silent calls are IPv4");
        };
        let mut calls = Vec::new();
        for number in 0..count {
            let leg = |leg: u16| -> Result<(SocketAddr, SocketAddr)> {
                let leg = 2 * number + leg;
                let port = leg
                    .checked_mul(2)
                    .and_then(|more| local.port().checked_add(more));
                let address = Ipv4Addr::from_bits(first.to_bits() + u32::from(leg));
                Ok((
                    SocketAddr::new(local.ip(), port.context("no RTP port left")?),
                    SocketAddr::new(address.into(), phone.port()),
                ))
            };
            let [(one, caller), (other, callee)] = [leg(0)?, leg(1)?];
            let mut lines = self.lines();
            let (id, call) =
                lines.new_call(["caller", "callee"], [one, other], [caller, callee])?;
            // As Asterisk would say of a call that is up.
            call.native.store(true, Ordering::Relaxed);
            for channel in [&call.caller, &call.callee] {
                channel.received.store(1, Ordering::Relaxed);
            }
            let call = Arc::new(call);
            let running = Running {
                call: Arc::clone(&call),
                media: None,
            };
            lines.insert(id, running);
            drop(lines);
            self.publish(&call.start());
            calls.push(json!({ "id": id, "local": [one, other] }));
        }
        Ok(json!(calls))
    }

    fn call(&self, id: u64) -> Result<Arc<Call>> {
        let lines = self.lines();
        let running = lines
            .calls
            .get(&id)
            .with_context(|| format!("no call {id}"))?;
        Ok(Arc::clone(&running.call))
    }

    fn hang_up(&self, id: u64) -> Result<()> {
        let running = self
            .lines()
            .remove(id)
            .with_context(|| format!("no call {id}"))?;
        self.publish(&running.call.end());
        let Some(Media { stop, thread }) = running.media else {
            return Ok(());
        };
        stop.write(1)?;
        thread.join().expect("forwarding does not panic")
    }

    /// Changes the bridge's technology, which AMI shows by nothing but `VarSet`s.
    fn switch(&self, call: &Call, native: bool) {
        call.native.store(native, Ordering::Relaxed);
        self.publish(&call.burst());
    }

    fn set_held(&self, call: &Call, held: bool) {
        call.caller.held.store(held, Ordering::Relaxed);
        self.publish(&if held { call.hold() } else { call.unhold() });
    }

    fn counters(&self) -> Value {
        let lines = self.lines();
        let channel = |channel: &Channel| {
            let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            json!({ "received": read(&channel.received), "forwarded": read(&channel.forwarded) })
        };
        let calls = lines.calls.iter().map(|(id, running)| {
            let legs = [channel(&running.call.caller), channel(&running.call.callee)];
            (id.to_string(), json!(legs))
        });
        Value::Object(calls.collect())
    }

    fn obey(self: &Arc<Self>, address: IpAddr, command: &str) -> Result<Value> {
        let words: Vec<_> = command.split_whitespace().collect();
        let id = |word: &str| {
            word.parse()
                .with_context(|| format!("`{word}` is no call's number"))
        };
        let remote = |word: &str| {
            word.parse()
                .with_context(|| format!("`{word}` is no address with a port"))
        };
        match words[..] {
            ["call", first, second, caller, callee] => {
                let remotes = [remote(first)?, remote(second)?];
                self.start(address, remotes, [caller, callee])
            }
            ["silent", count, local, phone] => {
                let count = count
                    .parse()
                    .with_context(|| format!("`{count}` is no number of calls"))?;
                self.start_silent(count, remote(local)?, remote(phone)?)
            }
            ["hangup", call] => self.hang_up(id(call)?).map(|()| json!({})),
            ["hold", call] => Ok({
                self.set_held(&*self.call(id(call)?)?, true);
                json!({})
            }),
            ["unhold", call] => Ok({
                self.set_held(&*self.call(id(call)?)?, false);
                json!({})
            }),
            ["simple", call] => Ok({
                self.switch(&*self.call(id(call)?)?, false);
                json!({})
            }),
            ["native", call] => Ok({
                self.switch(&*self.call(id(call)?)?, true);
                json!({})
            }),
            ["transcode", call] => Ok({
                let call = self.call(id(call)?)?;
                call.transcoded.store(true, Ordering::Relaxed);
                json!({})
            }),
            ["counters"] => Ok(self.counters()),
            ["stall"] => Ok({
                self.stall(true);
                json!({})
            }),
            ["unstall"] => Ok({
                self.stall(false);
                json!({})
            }),
            ["disconnect"] => {
                self.sessions().iter().for_each(|session| session.close());
                Ok(json!({}))
            }
            _ => bail!("unknown command `{command}`"),
        }
    }
}

/// A socket on the lowest even port that is free: a call takes over the ports of one that has just ended, which is
/// the hardest for the relay.
fn socket(address: IpAddr) -> Result<UdpSocket> {
    for port in (FIRST_PORT..=u16::MAX).step_by(2) {
        match UdpSocket::bind((address, port)) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            bound => return bound.with_context(|| format!("bind {address} port {port}")),
        }
    }
    bail!("no RTP port left")
}

/// Runs the PBX until its standard input ends.
///
/// # Errors
/// The secret cannot be read, a port is taken, or standard output is closed.
pub fn run(options: &Options) -> Result<()> {
    let path = &options.ami_secret_file;
    let secret =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let secret = secret.trim_end().to_owned();
    let listener = TcpListener::bind((options.address, AMI_PORT))
        .with_context(|| format!("cannot listen for AMI on {}", options.address))?;
    let exchange = Arc::new(Exchange::default());
    println!("{}", json!({ "ami": listener.local_addr()? }));
    {
        let exchange = Arc::clone(&exchange);
        thread::Builder::new()
            .name("ami".to_owned())
            .spawn(move || ami::serve(&listener, &exchange, &secret))?;
    }
    for command in io::stdin().lines() {
        let answer = exchange.obey(options.address, &command?);
        let answer = answer.unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
        writeln!(io::stdout(), "{answer}")?;
    }
    Ok(())
}
