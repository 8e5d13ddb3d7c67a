//! BPF programs and filters on the interface.

use std::{collections::BTreeMap, io};

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption},
};
use nix::errno::Errno;

use super::interface::told;
use crate::{
    datapath::{
        Direction,
        links::{Hook, Link, LinkInfo},
        names::PROGRAM_PREFIX,
    },
    doctor::facts::{Place, Program},
    netlink::exchange,
    next_hop::{Interface, XdpHook},
};

pub(super) fn all(interface: &Interface, unread: &mut Vec<String>) -> Vec<Program> {
    let names: BTreeMap<u32, String> = aya::programs::loaded_programs()
        .filter_map(Result::ok)
        .filter_map(|program| Some((program.id(), program.name_as_str()?.to_owned())))
        .collect();
    let links = told("BPF links", Link::all(), unread).unwrap_or_default();
    let mut found = in_xdp(interface, &names, &links);
    for (direction, place) in [
        (Direction::Ingress, Place::TcIngress),
        (Direction::Egress, Place::TcEgress),
    ] {
        let programs = Link::tcx_programs(interface.index, direction);
        let programs = told("TCX", programs, unread).flatten().unwrap_or_default();
        found.extend(
            programs
                .into_iter()
                .map(|(id, link)| program(place, id, link, &names)),
        );
        let filters = filters(interface.index, direction, place);
        found.extend(told("filters", filters, unread).unwrap_or_default());
    }
    found
}

fn program(place: Place, id: u32, link: Option<u32>, names: &BTreeMap<u32, String>) -> Program {
    let name = names.get(&id).cloned().unwrap_or_default();
    Program {
        place,
        id: Some(id),
        link,
        preference: None,
        ours: name.starts_with(PROGRAM_PREFIX),
        name,
    }
}

fn in_xdp(
    interface: &Interface,
    names: &BTreeMap<u32, String>,
    links: &[LinkInfo],
) -> Vec<Program> {
    let attached = interface.xdp.iter().map(|attached| {
        let place = match attached.hook {
            XdpHook::Native => Place::XdpNative,
            XdpHook::Generic => Place::XdpGeneric,
            XdpHook::Hardware => Place::XdpHardware,
        };
        let link = links.iter().find(|link| {
            link.hook == Some(Hook::Xdp)
                && link.interface == interface.index
                && link.program == attached.id
        });
        program(place, attached.id, link.map(|link| link.id), names)
    });
    attached.collect()
}

/// The filters of one side of clsact.
fn filters(index: u32, direction: Direction, place: Place) -> io::Result<Vec<Program>> {
    let mut found = Vec::new();
    let request = RouteNetlinkMessage::GetTrafficFilter(direction.address(index));
    let outcome = exchange(request, NLM_F_DUMP, |message| {
        if let RouteNetlinkMessage::NewTrafficFilter(filter) = message
            && let Some(filter) = read(&filter, place)
        {
            found.push(filter);
        }
    });
    match outcome {
        // No clsact, or no interface.
        Err(refusal) if matches!(refusal.errno, Errno::EINVAL | Errno::ENODEV | Errno::ENOENT) => {}
        outcome => outcome?,
    }
    Ok(found)
}

fn read(filter: &TcMessage, place: Place) -> Option<Program> {
    let (mut kind, mut name, mut id) = (None, None, None);
    for attribute in &filter.attributes {
        match attribute {
            TcAttribute::Kind(text) => kind = Some(text.clone()),
            TcAttribute::Options(options) => {
                for option in options {
                    match option {
                        TcOption::Bpf(TcFilterBpfOption::ProgName(text)) => {
                            name = Some(text.clone())
                        }
                        TcOption::Bpf(TcFilterBpfOption::ProgId(number)) => id = Some(*number),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    // Without a handle it is not a filter but the place of some.
    if u32::from(filter.header.handle) == 0 {
        return None;
    }
    let name = name.or(kind)?;
    Some(Program {
        place,
        id,
        link: None,
        // TC_H_MAJ() of tcm_info in include/uapi/linux/rtnetlink.h.
        preference: Some((filter.header.info >> 16) as u16),
        ours: name.starts_with(PROGRAM_PREFIX),
        name,
    })
}
