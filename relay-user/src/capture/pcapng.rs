//! Copies of packets as pcapng (<https://www.ietf.org/archive/id/draft-ietf-opsawg-pcapng-05.html>).

use std::{
    borrow::Cow,
    io::{self, BufWriter, Write},
    time::Duration,
};

use nix::sys::utsname::uname;
use pcap_file::{
    DataLink, Endianness, PcapError,
    pcapng::{
        PcapNgBlock, PcapNgWriter,
        blocks::{
            enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption},
            interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption},
            section_header::{SectionHeaderBlock, SectionHeaderOption},
        },
    },
};
use relay_common::{
    capture::{Captured, side},
    reason::{Reason, Verdict},
};

use crate::next_hop::{Interface, LinkLayer};

/// Writes copies to a file of one interface.
pub struct Writer<W: Write> {
    file: PcapNgWriter<BufWriter<W>>,
    interface: String,
    origin: Duration,
}

impl<W: Write> Writer<W> {
    /// Begins a file. `origin` is the time of day when `CLOCK_MONOTONIC` showed 0.
    ///
    /// # Errors
    /// What `out` answers.
    pub fn new(out: W, interface: &Interface, snap: u32, origin: Duration) -> io::Result<Self> {
        let mut options = vec![SectionHeaderOption::UserApplication(
            concat!("relay-user ", env!("CARGO_PKG_VERSION")).into(),
        )];
        if let Ok(system) = uname() {
            let text = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
            options.push(SectionHeaderOption::Hardware(text(system.machine()).into()));
            let (name, release) = (text(system.sysname()), text(system.release()));
            options.push(SectionHeaderOption::OS(format!("{name} {release}").into()));
        }
        let section = SectionHeaderBlock {
            endianness: Endianness::native(),
            options,
            ..SectionHeaderBlock::default()
        };
        let description = InterfaceDescriptionBlock {
            linktype: match interface.layer {
                LinkLayer::Ip => DataLink::RAW,
                LinkLayer::Ethernet | LinkLayer::Other => DataLink::ETHERNET,
            },
            snaplen: snap,
            options: vec![
                InterfaceDescriptionOption::IfName(interface.name.clone().into()),
                // Nanoseconds.
                InterfaceDescriptionOption::IfTsResol(9),
            ],
        };
        let file = PcapNgWriter::with_section_header(BufWriter::new(out), section);
        let mut writer = Self {
            file: file.map_err(written)?,
            interface: interface.name.clone(),
            origin,
        };
        writer.block(description)?;
        writer.flush()?;
        Ok(writer)
    }

    /// Writes a packet.
    ///
    /// # Errors
    /// What the file answers.
    pub fn packet(&mut self, header: &Captured, bytes: &[u8]) -> io::Result<()> {
        const INBOUND: u32 = 1;
        const OUTBOUND: u32 = 2;
        let direction = if header.side == side::RECEIVED {
            INBOUND
        } else {
            OUTBOUND
        };
        let frame = frame(header, bytes);
        let original = header.length as usize + (frame.len() - bytes.len());
        self.block(EnhancedPacketBlock {
            interface_id: 0,
            timestamp: self.origin + Duration::from_nanos(header.time),
            original_len: original as u32,
            data: frame,
            options: vec![
                EnhancedPacketOption::Comment(comment(&self.interface, header).into()),
                EnhancedPacketOption::Flags(direction),
            ],
        })
    }

    /// Hands on what was written.
    ///
    /// # Errors
    /// What the file answers.
    pub fn flush(&mut self) -> io::Result<()> {
        self.file.get_mut().flush()
    }

    fn block<'a>(&mut self, block: impl PcapNgBlock<'a>) -> io::Result<()> {
        self.file
            .write_pcapng_block(block)
            .map(drop)
            .map_err(written)
    }
}

fn written(error: PcapError) -> io::Error {
    match error {
        PcapError::IoError(error) => error,
        error => io::Error::other(error),
    }
}

/// The frame with all its VLAN tags: one that was beside it stands behind the addresses.
fn frame<'a>(header: &Captured, bytes: &'a [u8]) -> Cow<'a, [u8]> {
    const ADDRESSES: usize = 12;
    match bytes.split_at_checked(ADDRESSES) {
        Some((addresses, rest)) if header.tag_protocol != 0 => {
            let protocol = header.tag_protocol.to_be_bytes();
            let control = header.tag_control.to_be_bytes();
            [addresses, &protocol, &control, rest].concat().into()
        }
        _ => bytes.into(),
    }
}

/// What became of the packet, for whoever looks at the file.
fn comment(interface: &str, header: &Captured) -> String {
    let reason = Reason::ALL.get(header.reason as usize);
    let what = match reason {
        Some(Reason::Relayed) => "relayed, ".to_owned(),
        Some(reason) if reason.verdict() == Verdict::Drop => {
            format!("dropped, {}, ", reason.name())
        }
        Some(reason) if header.side == side::RECEIVED => format!("passed up, {}, ", reason.name()),
        Some(reason) => format!("{}, ", reason.name()),
        None => String::new(),
    };
    let (done, leg) = match header.side {
        side::RECEIVED => ("received", header.leg),
        side::SENT => ("sent", 1 - header.leg),
        _ => ("sent by the PBX", 1 - header.leg),
    };
    let leg = ["first", "second"][usize::from(leg)];
    let pair = header.pair;
    format!("{interface} {done}: {what}pair {pair}, {leg} leg")
}

#[cfg(test)]
mod tests {
    use pcap_file::pcapng::{Block, PcapNgReader};
    use relay_common::capture::UNCOUNTED;

    use super::*;

    const RELAYED: Captured = Captured {
        time: 1_500,
        pair: 7,
        length: 60,
        reason: Reason::Relayed as u32,
        tag_protocol: 0,
        tag_control: 0,
        side: side::RECEIVED,
        leg: 0,
        padding: [0; 2],
    };

    fn interface() -> Interface {
        Interface {
            index: 1,
            name: "eth0".to_owned(),
            layer: LinkLayer::Ethernet,
            mac: None,
            mtu: 1500,
            kind: None,
            up: true,
            carrier: true,
            vlan: None,
            xdp: Vec::new(),
        }
    }

    #[test]
    fn a_comment_tells_what_became_of_a_packet() {
        let of = |change: fn(&mut Captured)| {
            let mut header = RELAYED;
            change(&mut header);
            comment("eth0", &header)
        };
        assert_eq!(of(|_| {}), "eth0 received: relayed, pair 7, first leg");
        assert_eq!(
            of(|header| header.side = side::SENT),
            "eth0 sent: relayed, pair 7, second leg"
        );
        assert_eq!(
            of(|header| header.reason = Reason::Keepalive as u32),
            "eth0 received: passed up, keepalive, pair 7, first leg"
        );
        let pbx = |header: &mut Captured, reason| {
            (header.side, header.leg, header.reason) = (side::PBX, 1, reason);
        };
        let mut header = RELAYED;
        for (reason, expected) in [
            (Reason::Echo as u32, "echo, "),
            (Reason::ComfortNoise as u32, "dropped, comfort_noise, "),
            (UNCOUNTED, ""),
        ] {
            pbx(&mut header, reason);
            assert_eq!(
                comment("eth0", &header),
                format!("eth0 sent by the PBX: {expected}pair 7, first leg")
            );
        }
    }

    #[test]
    fn a_tag_beside_the_frame_is_put_back() {
        let bytes: Vec<u8> = (0..60).collect();
        assert_eq!(*frame(&RELAYED, &bytes), bytes);
        let tagged = Captured {
            tag_protocol: 0x8100,
            tag_control: 0xa064,
            ..RELAYED
        };
        let expected = [&bytes[..12], &[0x81, 0, 0xa0, 0x64], &bytes[12..]].concat();
        assert_eq!(*frame(&tagged, &bytes), expected);
    }

    #[test]
    fn what_is_written_can_be_read() {
        let mut file = Vec::new();
        let origin = Duration::from_secs(1_700_000_000);
        let mut writer = Writer::new(&mut file, &interface(), 40, origin).expect("a file");
        writer.packet(&RELAYED, &[1; 40]).expect("written");
        writer.flush().expect("written");
        drop(writer);
        let mut reader = PcapNgReader::new(&file[..]).expect("a section");
        let described = reader.next_block().expect("a block").expect("readable");
        let Block::InterfaceDescription(described) = described else {
            panic!("{described:?}");
        };
        assert_eq!(
            (described.linktype, described.snaplen),
            (DataLink::ETHERNET, 40)
        );
        let packet = reader.next_block().expect("a block").expect("readable");
        let Block::EnhancedPacket(packet) = packet else {
            panic!("{packet:?}");
        };
        assert_eq!(packet.timestamp, origin + Duration::from_nanos(1_500));
        assert_eq!((packet.original_len, &*packet.data), (60, &[1; 40][..]));
        assert!(packet.options.contains(&EnhancedPacketOption::Flags(1)));
    }
}
