//! Cables between simulated machines: veth pairs with fixed addresses, no checksum offload and no GRO.

use std::{
    fs,
    io::{self, Error},
    mem,
    net::UdpSocket,
    os::fd::{AsRawFd as _, OwnedFd},
    ptr, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{libc, unistd::Pid};

use crate::{
    namespace::Host,
    program::{self, Kind},
};

/// How long a link may take to come up.
const LINK_UP: Duration = Duration::from_secs(5);

/// One end of a cable: an interface of a [`Host`].
#[derive(Clone, Debug)]
pub struct Interface {
    /// The machine it belongs to.
    pub host: Host,
    /// Its name there.
    pub name: String,
    /// Its interface index there.
    pub index: u32,
}

/// What one end of a cable shall be.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// The machine that gets the interface.
    pub host: &'a Host,
    /// The interface's name.
    pub name: &'a str,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its addresses with prefix length, IPv4 or IPv6.
    pub addresses: &'a [String],
}

/// Joins two machines and returns both interfaces, up and ready to send.
///
/// # Errors
/// iproute2 is missing, a name is taken or an address malformed, or the link does not come up.
pub fn connect(first: End<'_>, second: End<'_>) -> Result<[Interface; 2]> {
    first.host.ip(&format!(
        "link add {} address {} type veth peer name {} address {} netns {}",
        first.name,
        mac_text(first.mac),
        second.name,
        mac_text(second.mac),
        second.host.net_path()
    ))?;
    for end in [first, second] {
        let mut lines = String::new();
        for address in end.addresses {
            let nodad = if address.contains(':') { " nodad" } else { "" };
            lines += &format!("address add {address} dev {}{nodad}\n", end.name);
        }
        lines += &format!("link set {} up\n", end.name);
        end.host.ip(&lines)?;
    }
    let interface = |end: End<'_>| -> Result<Interface> {
        let index = end.host.run(|| up(end.name))?;
        let host = end.host.clone();
        let name = end.name.to_owned();
        Ok(Interface { host, name, index })
    };
    Ok([interface(first)?, interface(second)?])
}

/// Switches the offloads off, waits for the link and returns its index. Runs inside the machine.
fn up(name: &str) -> Result<u32> {
    // A local sender's frames would carry a partial checksum, which native XDP on the peer loses.
    for offload in [
        Offload::TransmitChecksum,
        Offload::ReceiveChecksum,
        Offload::Gro,
    ] {
        offload.set(name, false)?;
    }
    let state = format!("/sys/class/net/{name}/operstate");
    let deadline = Instant::now() + LINK_UP;
    while fs::read_to_string(&state)
        .with_context(|| state.clone())?
        .trim()
        != "up"
    {
        if Instant::now() > deadline {
            bail!("{name} is not up after {LINK_UP:?}");
        }
        thread::sleep(Duration::from_millis(1));
    }
    nix::net::if_::if_nametoindex(name).with_context(|| format!("no interface {name}"))
}

/// The legacy ethtool switches (linux/ethtool.h) that take one 32-bit value.
#[derive(Clone, Copy, Debug)]
enum Offload {
    ReceiveChecksum = 0x15,
    TransmitChecksum = 0x17,
    Gro = 0x2c,
}

impl Offload {
    fn set(self, interface: &str, on: bool) -> Result<()> {
        /// `struct ethtool_value`.
        #[repr(C)]
        struct Value {
            command: u32,
            data: u32,
        }
        let socket = UdpSocket::bind("127.0.0.1:0").context("socket for ethtool")?;
        let mut value = Value {
            command: self as u32,
            data: on.into(),
        };
        // SAFETY: all-zero is a valid ifreq.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        if interface.len() >= request.ifr_name.len() {
            bail!("interface name `{interface}` is longer than 15 bytes");
        }
        for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_data = ptr::from_mut(&mut value).cast();
        // SAFETY: SIOCETHTOOL reads the name and the ethtool_value behind ifru_data; both live across the call.
        if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) } != 0 {
            return Err(Error::last_os_error())
                .with_context(|| format!("cannot set {self:?} to {on} on {interface}"));
        }
        Ok(())
    }
}

impl Interface {
    /// One that a machine has.
    ///
    /// # Errors
    /// It has none of that name.
    pub fn of(host: &Host, name: &str) -> Result<Self> {
        let index = host.run(|| nix::net::if_::if_nametoindex(name));
        Ok(Self {
            host: host.clone(),
            name: name.to_owned(),
            index: index.with_context(|| format!("no interface {name}"))?,
        })
    }

    /// Changes the MAC address, as a failover of a gateway does. Neighbours are not told.
    ///
    /// # Errors
    /// The kernel refuses the address.
    pub fn set_mac(&self, mac: [u8; 6]) -> Result<()> {
        self.host
            .ip(&format!("link set {} address {}", self.name, mac_text(mac)))
    }

    /// The MAC address now.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn mac(&self) -> Result<[u8; 6]> {
        let path = format!("/sys/class/net/{}/address", self.name);
        let text = self
            .host
            .run(|| fs::read_to_string(&path))
            .with_context(|| path.clone())?;
        let mut mac = [0; 6];
        for (byte, digits) in mac.iter_mut().zip(text.trim().split(':')) {
            *byte = u8::from_str_radix(digits, 16).with_context(|| format!("{path}: {text}"))?;
        }
        Ok(mac)
    }

    /// Leaves the UDP checksum of packets sent from now on to the device, which for a veth means to nobody: they
    /// arrive unfinished, marked so (`CHECKSUM_PARTIAL`), as those of guests and containers do.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn leave_checksums_to_device(&self) -> Result<()> {
        self.host
            .run(|| Offload::TransmitChecksum.set(&self.name, true))
    }

    /// Has packets received as those of a NIC are: from a ring, by a kernel thread of this interface's own (threaded NAPI,
    /// Linux 5.12). Otherwise a veth's packets wait in a queue that all of its kind share. Returns the thread's id.
    ///
    /// # Errors
    /// The kernel refuses, or the name of the interface is not the only one of its kind on the machine.
    pub fn receive_by_thread(&self) -> Result<Pid> {
        // Without XDP, veth has the ring for GRO only, and puts only packets of senders without segmentation into it
        // (veth_skb_is_eligible_for_gro() in drivers/net/veth.c), as all are whose checksums are not left to the device.
        self.host.run(|| Offload::Gro.set(&self.name, true))?;
        let path = format!("/sys/class/net/{}/threaded", self.name);
        self.host
            .run(|| fs::write(&path, "1"))
            .with_context(|| path.clone())?;
        self.napi_thread()
    }

    /// Has packets fetched from the ring whenever so much time has passed, for as long as some come, instead of being told
    /// of each: no sender has to wake the thread of [`Interface::receive_by_thread`].
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn poll_every(&self, interval: Duration) -> Result<()> {
        /// Looks without a packet, before it waits to be told again.
        const LOOKS: u32 = 1000;
        let folder = format!("/sys/class/net/{}", self.name);
        self.host
            .run(|| -> io::Result<()> {
                fs::write(
                    format!("{folder}/gro_flush_timeout"),
                    interval.as_nanos().to_string(),
                )?;
                fs::write(format!("{folder}/napi_defer_hard_irqs"), LOOKS.to_string())
            })
            .with_context(|| folder.clone())
    }

    /// The kernel thread that receives for this interface. Attaching and detaching XDP may start another.
    ///
    /// # Errors
    /// There is none, or the name of the interface is not the only one of its kind on the machine.
    pub fn napi_thread(&self) -> Result<Pid> {
        let name = format!("napi/{}-", self.name);
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").context("/proc")?.flatten() {
            let id = entry.file_name().to_str().and_then(|id| id.parse().ok());
            // Some end meanwhile.
            let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            if let Some(id) = id
                && comm.starts_with(&name)
            {
                found.push(Pid::from_raw(id));
            }
        }
        match found[..] {
            [thread] => Ok(thread),
            _ => bail!("{} kernel threads are called {name}*", found.len()),
        }
    }

    /// Attaches an XDP program that passes everything, until the returned guard is dropped.
    ///
    /// veth delivers the native `XDP_TX` of one end only when the other end has an XDP program too.
    ///
    /// # Errors
    /// The kernel (5.9 or later) refuses the program or the link, as when another program is attached.
    pub fn pass_program(&self) -> Result<PassProgram> {
        const XDP_PASS: i32 = 2;
        let program = program::load(Kind::Xdp, &[program::set(0, XDP_PASS), program::EXIT])?;
        let _link = self.attach_xdp(&program)?;
        Ok(PassProgram { _link })
    }

    /// Attaches an XDP program in the driver, until the returned link is closed.
    ///
    /// # Errors
    /// As [`Interface::pass_program`].
    pub fn attach_xdp(&self, program: &OwnedFd) -> Result<OwnedFd> {
        /// The leading fields of `union bpf_attr` for `BPF_LINK_CREATE`; the kernel takes the rest as zero.
        #[repr(C)]
        struct LinkCreate {
            program: i32,
            target: u32,
            attach_type: u32,
            flags: u32,
        }
        const BPF_LINK_CREATE: libc::c_long = 28;
        const BPF_XDP: u32 = 37;
        const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
        let mut create = LinkCreate {
            program: program.as_raw_fd(),
            target: self.index,
            attach_type: BPF_XDP,
            flags: XDP_FLAGS_DRV_MODE,
        };
        // An interface index means something only inside the machine.
        self.host
            .run(|| program::bpf_descriptor(BPF_LINK_CREATE, &mut create))
            .with_context(|| format!("XDP program on {}", self.name))
    }
}

/// Holds an XDP program attached whose only act is `XDP_PASS`.
#[derive(Debug)]
pub struct PassProgram {
    _link: OwnedFd,
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
