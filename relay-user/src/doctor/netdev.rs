//! What a driver says of its XDP support: the generic netlink family `netdev`, since Linux 6.3.

use std::io;

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLM_F_ACK, Nla as _, NlasIterator, ParseableParametrized,
};
use netlink_packet_generic::{
    GenlFamily, GenlHeader, GenlMessage,
    ctrl::{GenlCtrl, GenlCtrlCmd, nlas::GenlCtrlAttrs},
};
use nix::errno::Errno;

use crate::netlink::{Refusal, exchange_generic};

/// The family's name, version, command and attributes (include/uapi/linux/netdev.h).
const FAMILY: &str = "netdev";
const VERSION: u8 = 1;
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
/// `enum netdev_xdp_act`: returns of a program but XDP_REDIRECT are carried out.
const NETDEV_XDP_ACT_BASIC: u64 = 1;

/// Whether the driver of an interface has native XDP, XDP_TX included. `None`: the kernel is older than
/// the question.
///
/// # Errors
/// What the kernel answers instead.
pub(super) fn native_xdp(index: u32) -> io::Result<Option<bool>> {
    let Some(family) = family_id()? else {
        return Ok(None);
    };
    let question = Device(vec![DefaultNla::new(
        NETDEV_A_DEV_IFINDEX,
        index.to_ne_bytes().to_vec(),
    )]);
    let mut request = GenlMessage::from_payload(question);
    request.set_resolved_family_id(family);
    let mut features = None;
    exchange_generic(request, NLM_F_ACK, |answer: GenlMessage<Device>| {
        features = answer.payload.xdp_features();
    })?;
    Ok(features.map(|features| features & NETDEV_XDP_ACT_BASIC != 0))
}

/// The number that this kernel has given the family.
fn family_id() -> Result<Option<u16>, Refusal> {
    let request = GenlMessage::from_payload(GenlCtrl {
        cmd: GenlCtrlCmd::GetFamily,
        nlas: vec![GenlCtrlAttrs::FamilyName(FAMILY.to_owned())],
    });
    let mut id = None;
    let outcome = exchange_generic(request, NLM_F_ACK, |answer: GenlMessage<GenlCtrl>| {
        id = answer.payload.nlas.iter().find_map(|nla| match nla {
            GenlCtrlAttrs::FamilyId(id) => Some(*id),
            _ => None,
        });
    });
    match outcome {
        Err(refusal) if refusal.errno == Errno::ENOENT => Ok(None),
        outcome => outcome.map(|()| id),
    }
}

/// A message of the family about one interface: its attributes.
#[derive(Clone, Debug)]
struct Device(Vec<DefaultNla>);

impl Device {
    fn xdp_features(&self) -> Option<u64> {
        let features = self
            .0
            .iter()
            .find(|nla| nla.kind() == NETDEV_A_DEV_XDP_FEATURES)?;
        let mut bytes = [0; 8];
        if features.value_len() != bytes.len() {
            return None;
        }
        features.emit_value(&mut bytes);
        Some(u64::from_ne_bytes(bytes))
    }
}

impl GenlFamily for Device {
    fn family_name() -> &'static str {
        FAMILY
    }

    fn command(&self) -> u8 {
        NETDEV_CMD_DEV_GET
    }

    fn version(&self) -> u8 {
        VERSION
    }
}

impl Emitable for Device {
    fn buffer_len(&self) -> usize {
        self.0.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.0.as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Device {
    fn parse_with_param(bytes: &[u8], _: GenlHeader) -> Result<Self, DecodeError> {
        NlasIterator::new(bytes)
            .map(|nla| nla.map(|nla| DefaultNla::new(nla.kind(), nla.value().to_vec())))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}
