//! The fake PBX itself: its calls, its AMI clients, and the commands by which a test drives it.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
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
    call::{Call, Channel, Message},
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
    next_call: u64,
    next_channel: u32,
}

#[derive(Debug)]
struct Running {
    call: Arc<Call>,
    stop: Arc<EventFd>,
    thread: JoinHandle<Result<()>>,
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
        let id = lines.next_call;
        lines.next_call += 1;
        let epoch = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)?
            .as_secs();
        let mut channel = |endpoint: &str, side: usize| {
            let number = lines.next_channel;
            lines.next_channel += 1;
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
        let call = Arc::new(Call {
            bridge_id: format!("{epoch:08x}-b71d-4000-8000-{id:012x}"),
            caller: channel(endpoints[0], 0),
            callee: channel(endpoints[1], 1),
            native: AtomicBool::new(false),
            transcoded: AtomicBool::new(false),
            started: Instant::now(),
        });
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let thread = {
            let (exchange, call, stop) = (Arc::clone(self), Arc::clone(&call), Arc::clone(&stop));
            thread::Builder::new()
                .name(format!("call {id}"))
                .spawn(move || {
                    media::forward(&call, &sockets, &stop, || exchange.switch(&call, true))
                })?
        };
        lines.calls.insert(
            id,
            Running {
                call: Arc::clone(&call),
                stop,
                thread,
            },
        );
        drop(lines);
        self.publish(&call.start());
        Ok(json!({ "id": id, "local": locals }))
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
            .calls
            .remove(&id)
            .with_context(|| format!("no call {id}"))?;
        self.publish(&running.call.end());
        running.stop.write(1)?;
        running.thread.join().expect("forwarding does not panic")
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
