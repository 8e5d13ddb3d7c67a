//! Queueing disciplines, classes and filters as the kernel tells them, kept to the byte so that they
//! can be put back.

use std::fmt;

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable as _, NLA_TYPE_MASK, NetlinkDeserializable, NetlinkHeader,
    NetlinkSerializable, Nla, NlasIterator, Parseable as _,
};
use netlink_packet_route::{AddressFamily, tc::TcHeader};
use serde::{Deserialize, Serialize};

/// `TC_H_ROOT` of include/uapi/linux/pkt_sched.h.
pub const ROOT: u32 = 0xffff_ffff;
/// `TC_H_INGRESS`, which clsact shares.
pub(super) const INGRESS: u32 = 0xffff_fff1;

pub(super) const TCA_KIND: u16 = 1;
pub(super) const TCA_OPTIONS: u16 = 2;
pub(super) const TCA_RATE: u16 = 5;
const TCA_STAB: u16 = 8;
const TCA_CHAIN: u16 = 11;
const TCA_INGRESS_BLOCK: u16 = 13;
const TCA_EGRESS_BLOCK: u16 = 14;

/// A netlink attribute: its number with flags, and its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attribute(u16, Vec<u8>);

impl Attribute {
    pub(super) fn new(kind: u16, value: impl AsRef<[u8]>) -> Self {
        Self(kind, value.as_ref().to_vec())
    }

    /// Reads a sequence of attributes, as far as it is one.
    pub(super) fn all(bytes: &[u8]) -> Vec<Self> {
        NlasIterator::new(bytes)
            .map_while(Result::ok)
            .filter_map(|attribute| DefaultNla::parse(&attribute).ok().map(|it| (it, attribute)))
            .map(|(parsed, attribute)| Self::new(parsed.kind(), attribute.value()))
            .collect()
    }

    /// The content of an attribute that holds others.
    pub(super) fn nest(attributes: impl IntoIterator<Item = Self>) -> Vec<u8> {
        let attributes: Vec<_> = attributes.into_iter().collect();
        let mut bytes = vec![0; attributes.as_slice().buffer_len()];
        attributes.as_slice().emit(&mut bytes);
        bytes
    }

    /// Its number, without flags.
    pub(super) const fn kind(&self) -> u16 {
        self.0 & NLA_TYPE_MASK
    }

    pub(super) fn value(&self) -> &[u8] {
        &self.1
    }
}

impl Nla for Attribute {
    fn value_len(&self) -> usize {
        self.1.len()
    }

    fn kind(&self) -> u16 {
        self.0
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.1);
    }
}

/// A queueing discipline, class or filter of an interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Object {
    /// Its own handle: `MAJOR << 16 | MINOR`; 0 for one that nobody can name.
    pub handle: u32,
    /// What it is attached to; [`ROOT`] for the interface itself.
    pub parent: u32,
    /// `tcm_info`: of a filter, priority and protocol.
    pub info: u32,
    /// All that it is made of.
    pub attributes: Vec<Attribute>,
}

impl Object {
    pub(super) fn new(handle: u32, parent: u32, kind: &str, options: Vec<u8>) -> Self {
        let mut name = kind.as_bytes().to_vec();
        name.push(0);
        Self {
            handle,
            parent,
            info: 0,
            attributes: vec![
                Attribute::new(TCA_KIND, name),
                Attribute::new(TCA_OPTIONS, options),
            ],
        }
    }

    /// The content of its attribute of this number; nothing where it has none.
    pub(super) fn attribute(&self, kind: u16) -> &[u8] {
        let mut attributes = self.attributes.iter();
        let found = attributes.find(|attribute| attribute.kind() == kind);
        found.map_or(&[], Attribute::value)
    }

    /// Name of its kind, such as `htb`.
    #[must_use]
    pub fn kind(&self) -> &str {
        let name = self.attribute(TCA_KIND);
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        str::from_utf8(name).unwrap_or_default()
    }

    pub(super) fn options(&self) -> &[u8] {
        self.attribute(TCA_OPTIONS)
    }

    /// Without what only counts or tells: the attributes that the kernel also takes.
    pub(super) fn lasting(mut self) -> Self {
        self.attributes.retain(|attribute| {
            matches!(
                attribute.kind(),
                TCA_KIND
                    | TCA_OPTIONS
                    | TCA_STAB
                    | TCA_CHAIN
                    | TCA_INGRESS_BLOCK
                    | TCA_EGRESS_BLOCK
            )
        });
        self
    }

    /// No more than what names it.
    pub(super) fn named(mut self) -> Self {
        let names = [TCA_KIND, TCA_CHAIN];
        self.attributes.retain(|it| names.contains(&it.kind()));
        self
    }

    pub(super) fn with_options(mut self, options: Vec<u8>) -> Self {
        for attribute in &mut self.attributes {
            if attribute.kind() == TCA_OPTIONS {
                attribute.1.clone_from(&options);
            }
        }
        self
    }
}

/// A handle as tc(8) writes it: hexadecimal, `1:` for `1:0`.
#[must_use]
pub fn handle(handle: u32) -> String {
    match (handle >> 16, handle & 0xffff) {
        (major, 0) => format!("{major:x}:"),
        (major, minor) => format!("{major:x}:{minor:x}"),
    }
}

/// A message of routing netlink about an [`Object`].
#[derive(Clone, Debug)]
pub struct Message {
    /// `RTM_*` of include/uapi/linux/rtnetlink.h.
    pub kind: u16,
    /// Index of the interface.
    pub index: u32,
    /// What it is about.
    pub object: Object,
}

impl Message {
    fn header(&self) -> TcHeader {
        TcHeader {
            family: AddressFamily::Unspec,
            index: self.index.cast_signed(),
            handle: self.object.handle.into(),
            parent: self.object.parent.into(),
            info: self.object.info,
        }
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.object.kind(), handle(self.object.handle))
    }
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.header().buffer_len() + self.object.attributes.as_slice().buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        let header = self.header();
        let (front, attributes) = buffer.split_at_mut(header.buffer_len());
        header.emit(front);
        self.object.attributes.as_slice().emit(attributes);
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let kind = header.message_type;
        let header = TcHeader::parse(payload)?;
        Ok(Self {
            kind,
            index: header.index.cast_unsigned(),
            object: Object {
                handle: header.handle.into(),
                parent: header.parent.into(),
                info: header.info,
                attributes: Attribute::all(payload.get(header.buffer_len()..).unwrap_or_default()),
            },
        })
    }
}
