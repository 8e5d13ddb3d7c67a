//! `relay-user capture` as a child process, and the pcapng file that it writes.

use std::{
    fs,
    io::Read as _,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use pcap_file::pcapng::{
    Block, PcapNgReader,
    blocks::{
        enhanced_packet::EnhancedPacketOption, interface_description::InterfaceDescriptionOption,
    },
};

use crate::{
    capture::{Direction, Frame},
    namespace::{Host, Process},
    relay::binary,
};

/// How long the capture may take to begin, and to end when told to.
const PATIENCE: Duration = Duration::from_secs(30);
/// A file without packets is shorter.
const HEADERS_MIN: usize = 80;

/// A capture into a file that is under way. Dropping it kills it.
#[derive(Debug)]
pub struct Captured {
    host: Host,
    /// `relay-user capture`.
    pub process: Process,
    /// The file, which only the machine can see.
    pub path: PathBuf,
}

/// What a file holds, and what its capture said at last.
#[derive(Clone, Debug)]
pub struct Captures {
    /// The file as it is.
    pub file: Vec<u8>,
    /// The packets in it.
    pub packets: Vec<Packet>,
    /// Standard error.
    pub said: String,
}

/// A captured packet.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Which way it went, and what became of it.
    pub comment: String,
    /// The option `epb_flags` (draft-ietf-opsawg-pcapng): 1 for inbound, 2 for outbound.
    pub flags: u32,
    /// The packet itself.
    pub frame: Frame,
}

/// `relay-user capture` with these arguments, not yet started.
///
/// # Errors
/// It is not built.
pub fn command(arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(binary("relay-user", "RELAY_USER_BIN")?);
    command.arg("capture").args(arguments).stdin(Stdio::null());
    Ok(command)
}

impl Captured {
    /// Starts to capture into a file of the machine. It is under way when this returns.
    ///
    /// # Errors
    /// It ends, or does not begin in time: the text holds what it says.
    pub fn start(host: &Host, arguments: &[&str]) -> Result<Self> {
        let path = host.directory("capture")?.join("file");
        let mut command = command(arguments)?;
        command.arg("-w").arg(&path).stderr(Stdio::piped());
        let process = host.spawn(command)?;
        let mut captured = Self {
            host: host.clone(),
            process,
            path,
        };
        // The file begins when everything is ready.
        let deadline = Instant::now() + PATIENCE;
        while captured.bytes().len() <= HEADERS_MIN {
            ensure!(Instant::now() < deadline, "the file does not grow");
            if let Some(status) = captured.process.try_wait() {
                bail!("the capture has ended: {status}: {}", captured.said()?);
            }
        }
        Ok(captured)
    }

    fn bytes(&self) -> Vec<u8> {
        self.host.run(|| fs::read(&self.path)).unwrap_or_default()
    }

    fn said(&mut self) -> Result<String> {
        let mut said = String::new();
        let stderr = self.process.child_mut().stderr.as_mut();
        stderr.context("no pipe")?.read_to_string(&mut said)?;
        Ok(said)
    }

    /// Ends it as Ctrl-C does.
    ///
    /// # Errors
    /// As [`Captured::end`].
    pub fn interrupt(self) -> Result<Captures> {
        self.process.signal(Signal::SIGINT);
        self.end()
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// It does not, or not with success, or the file is none of a capture on `eth0`.
    pub fn end(mut self) -> Result<Captures> {
        let said = self.said()?;
        let status = self.process.wait(PATIENCE)?;
        ensure!(status.success(), "{status}: {said}");
        let file = self.bytes();
        Ok(Captures {
            packets: packets(&file)?,
            file,
            said,
        })
    }
}

/// The packets in a file of a capture on `eth0`.
///
/// # Errors
/// It is no such file, or not whole.
pub fn packets(file: &[u8]) -> Result<Vec<Packet>> {
    let mut reader = PcapNgReader::new(file)?;
    let mut packets = Vec::new();
    while let Some(block) = reader.next_block() {
        match block? {
            Block::InterfaceDescription(described) => {
                let name = InterfaceDescriptionOption::IfName("eth0".into());
                ensure!(described.options.contains(&name), "{described:?}");
            }
            Block::EnhancedPacket(packet) => {
                let (mut comment, mut flags) = (String::new(), 0);
                for option in &packet.options {
                    match option {
                        EnhancedPacketOption::Comment(text) => comment = text.to_string(),
                        EnhancedPacketOption::Flags(word) => flags = *word,
                        other => bail!("{other:?}"),
                    }
                }
                packets.push(Packet {
                    comment,
                    flags,
                    frame: Frame {
                        at: packet.timestamp,
                        direction: if flags == 1 {
                            Direction::In
                        } else {
                            Direction::Out
                        },
                        bytes: packet.data.to_vec(),
                        checksum_pending: false,
                    },
                });
            }
            other => bail!("{other:?}"),
        }
    }
    Ok(packets)
}
