//! An AMI server's connection with trouble on it: cut, slow, or flooded with events.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::namespace::Host;

/// How often a thread looks whether the trouble has changed.
const TURN: Duration = Duration::from_millis(10);
/// A client that takes nothing for so long is no concern of the flood.
const STUCK: Duration = Duration::from_secs(10);

/// What is wrong with the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Nothing.
    None,
    /// Every connection is cut, and every new one as soon as it is there.
    Cut,
    /// What the server says comes at so many bytes a second.
    Slow(u32),
    /// So many events a second that concern nobody, between those of the server.
    Flood(u32),
}

/// Stands between clients and an AMI server of one machine. Dropping it cuts every connection.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    server: SocketAddr,
    host: Host,
    trouble: Mutex<Trouble>,
    closing: AtomicBool,
    invented: AtomicU64,
}

impl Proxy {
    /// Listens on the machine's loopback, for a server that the machine can reach.
    ///
    /// # Errors
    /// Out of ports or threads.
    pub fn start(host: &Host, server: SocketAddr) -> Result<Self> {
        let listener = host
            .run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
            .context("listen as AMI server")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            server,
            host: host.clone(),
            trouble: Mutex::new(Trouble::None),
            closing: AtomicBool::new(false),
            invented: AtomicU64::new(0),
        });
        let thread = {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name("ami proxy".to_owned())
                .spawn(move || shared.listen(&listener))?
        };
        Ok(Self {
            shared,
            address,
            thread: Some(thread),
        })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on this is wrong.
    pub fn set(&self, trouble: Trouble) {
        *self
            .shared
            .trouble
            .lock()
            .expect("no holder of this lock panics") = trouble;
    }

    /// Events of a flood that a client has taken until now.
    pub fn invented(&self) -> u64 {
        self.shared.invented.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// What is wrong now; a connection of a proxy that ends is cut.
    fn trouble(&self) -> Trouble {
        if self.closing.load(Ordering::Relaxed) {
            return Trouble::Cut;
        }
        *self.trouble.lock().expect("no holder of this lock panics")
    }

    fn listen(self: &Arc<Self>, listener: &TcpListener) {
        while !self.closing.load(Ordering::Relaxed) {
            let Ok((client, _)) = listener.accept() else {
                thread::sleep(TURN);
                continue;
            };
            // Cut by dropping it.
            if self.trouble() == Trouble::Cut {
                continue;
            }
            // A server that is gone shows as a cut connection.
            let Ok(server) = self.host.run(|| TcpStream::connect(self.server)) else {
                continue;
            };
            let shared = Arc::clone(self);
            thread::spawn(move || {
                // Either end may go away at any time.
                let _ = shared.serve(&client, &server);
                let _ = client.shutdown(Shutdown::Both);
                let _ = server.shutdown(Shutdown::Both);
            });
        }
    }

    fn serve(&self, client: &TcpStream, server: &TcpStream) -> Result<()> {
        for stream in [client, server] {
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(TURN))?;
        }
        client.set_write_timeout(Some(STUCK))?;
        thread::scope(|scope| {
            let up = scope.spawn(|| self.pass_questions(client, server));
            let down = self.pass_answers(server, client);
            let _ = server.shutdown(Shutdown::Both);
            let _ = client.shutdown(Shutdown::Both);
            up.join().expect("passing bytes on does not panic")?;
            down
        })
    }

    fn pass_questions(&self, mut from: &TcpStream, mut to: &TcpStream) -> Result<()> {
        let mut buffer = [0; 4096];
        while self.trouble() != Trouble::Cut {
            match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(len) => to.write_all(&buffer[..len])?,
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn pass_answers(&self, mut from: &TcpStream, mut to: &TcpStream) -> Result<()> {
        let mut buffer = vec![0; 65_536];
        // What the server has said and the client has not got.
        let mut waiting = Vec::new();
        // Events are put between messages only.
        let mut between = false;
        let mut last = Instant::now();
        loop {
            let trouble = self.trouble();
            if trouble == Trouble::Cut {
                return Ok(());
            }
            // While slow, the server's own buffer is what fills.
            if waiting.len() < buffer.len() {
                match from.read(&mut buffer) {
                    Ok(0) => return Ok(()),
                    Ok(len) => waiting.extend(&buffer[..len]),
                    Err(error) if is_timeout(&error) => {}
                    Err(error) => return Err(error.into()),
                }
            } else {
                thread::sleep(TURN);
            }
            let due = |rate: u32| (last.elapsed().as_secs_f64() * f64::from(rate)) as usize;
            match trouble {
                Trouble::Slow(rate) => {
                    let len = due(rate).min(waiting.len());
                    if len > 0 {
                        last = Instant::now();
                        to.write_all(&waiting[..len])?;
                        between = waiting[..len].ends_with(b"\r\n\r\n");
                        waiting.drain(..len);
                    } else if waiting.is_empty() {
                        last = Instant::now();
                    }
                }
                _ => {
                    if !waiting.is_empty() {
                        to.write_all(&waiting)?;
                        between = waiting.ends_with(b"\r\n\r\n");
                        waiting.clear();
                    }
                    match trouble {
                        Trouble::Flood(rate) if between => {
                            let events = due(rate);
                            if events > 0 {
                                last = Instant::now();
                                self.flood(to, events)?;
                            }
                        }
                        _ => last = Instant::now(),
                    }
                }
            }
        }
    }

    /// Half of the events are of the kinds that a relay must look at.
    fn flood(&self, mut to: &TcpStream, events: usize) -> Result<()> {
        let mut text = String::new();
        for _ in 0..events {
            let number = self.invented.fetch_add(1, Ordering::Relaxed);
            let kind = if number.is_multiple_of(2) {
                "Newexten\r\nPrivilege: dialplan,all\r\nApplication: NoOp"
            } else {
                "VarSet\r\nPrivilege: dialplan,all\r\nVariable: BRIDGEPEER\r\nValue: "
            };
            text += &format!(
                "Event: {kind}\r\nChannel: PJSIP/nobody-{:08x}\r\nUniqueid: 1.{number}\r\n\r\n",
                number % 10_000
            );
        }
        Ok(to.write_all(text.as_bytes())?)
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
