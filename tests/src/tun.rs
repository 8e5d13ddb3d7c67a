//! A tun device of a simulated machine: what its stack sends there comes out here, whole IP packets, and the other
//! way round.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    mem,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd},
        unix::fs::OpenOptionsExt as _,
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::libc;

use crate::namespace::{Host, readable};

/// The device. It goes with this.
#[derive(Debug)]
pub struct Tun {
    file: File,
}

impl Tun {
    /// Makes a device with an address and its prefix length, up.
    ///
    /// # Errors
    /// The kernel has no tun, or the name is taken or too long.
    pub fn open(host: &Host, name: &str, address: &str) -> Result<Self> {
        Self::made(host, name, address, libc::IFF_TUN)
    }

    /// The same with an Ethernet header before each packet: a tap device.
    ///
    /// # Errors
    /// As [`Tun::open`].
    pub fn with_ethernet(host: &Host, name: &str, address: &str) -> Result<Self> {
        Self::made(host, name, address, libc::IFF_TAP)
    }

    fn made(host: &Host, name: &str, address: &str, kind: i32) -> Result<Self> {
        let file = host
            .run(|| create(name, kind))
            .with_context(|| format!("cannot make the device {name}"))?;
        host.ip(&format!(
            "address add {address} dev {name}\nlink set {name} up"
        ))?;
        Ok(Self { file })
    }

    /// The next packet that the machine sends, without waiting: its length. A longer one than `buffer` is cut.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Waits for a packet that the machine sends; false when none comes.
    ///
    /// # Errors
    /// The kernel does not wait.
    pub fn wait(&self, timeout: Duration) -> Result<bool> {
        readable(self.as_fd(), timeout)
    }

    /// Has a packet arrive at the machine.
    ///
    /// # Errors
    /// It is no IP packet, or no Ethernet frame where there is a header.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        (&self.file).write_all(packet)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Runs inside the machine: the device belongs to the network namespace of whoever makes it.
fn create(name: &str, kind: i32) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("/dev/net/tun")?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    ensure!(
        name.len() < request.ifr_name.len(),
        "the name is longer than 15 bytes"
    );
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // No header before the packet, and none of the offloads that a reader would have to know of.
    request.ifr_ifru.ifru_flags = (kind | libc::IFF_NO_PI) as i16;
    // SAFETY: TUNSETIFF reads name and flags and writes the name; the request lives across the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    ensure!(
        result == 0,
        "TUNSETIFF: {}",
        std::io::Error::last_os_error()
    );
    Ok(file)
}
