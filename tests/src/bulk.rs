//! Greedy TCP flows: they send as much as the network takes.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result};

use crate::namespace::Host;

/// Bytes that a flow writes and reads at once.
const BLOCK: usize = 64 * 1024;

/// Flows from one machine to another. They end when this is dropped.
#[derive(Debug)]
pub struct Bulk {
    received: Arc<AtomicU64>,
    sockets: Vec<TcpStream>,
    threads: Vec<JoinHandle<()>>,
}

impl Bulk {
    /// Starts so many flows to `sink`, an address of machine `to`.
    ///
    /// # Errors
    /// A flow cannot be set up.
    pub fn start(flows: usize, from: &Host, to: &Host, sink: SocketAddr) -> Result<Self> {
        let listener = to
            .run(|| TcpListener::bind(sink))
            .with_context(|| format!("cannot listen on {sink}"))?;
        let mut bulk = Self {
            received: Arc::default(),
            sockets: Vec::new(),
            threads: Vec::new(),
        };
        for _ in 0..flows {
            let sender = from
                .run(|| TcpStream::connect(sink))
                .with_context(|| format!("cannot connect to {sink}"))?;
            let (receiver, _) = listener.accept()?;
            bulk.run(sender, |mut socket| {
                let block = [0x5a; BLOCK];
                while socket.write_all(&block).is_ok() {}
            })?;
            let received = Arc::clone(&bulk.received);
            bulk.run(receiver, move |mut socket| {
                let mut block = [0; BLOCK];
                while let Ok(length @ 1..) = socket.read(&mut block) {
                    received.fetch_add(length as u64, Ordering::Relaxed);
                }
            })?;
        }
        Ok(bulk)
    }

    /// Payload bytes that have arrived until now, of all flows.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    fn run(
        &mut self,
        socket: TcpStream,
        work: impl FnOnce(TcpStream) + Send + 'static,
    ) -> Result<()> {
        self.sockets.push(socket.try_clone()?);
        let thread = thread::Builder::new().name("bulk".to_owned());
        self.threads.push(thread.spawn(move || work(socket))?);
        Ok(())
    }
}

impl Drop for Bulk {
    fn drop(&mut self) {
        for socket in &self.sockets {
            // One that has failed has ended its threads by itself.
            let _ = socket.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
