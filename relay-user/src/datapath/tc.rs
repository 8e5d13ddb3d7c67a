//! Programs in traffic control, by TCX (Linux 6.6) or, below, as filters of the queueing discipline
//! clsact.
//!
//! A filter is no object that could be pinned: it stays until someone deletes it, and is known by its
//! name. The clsact itself stays, because whether another program needs it nobody can tell.

use std::{io, os::fd::AsFd as _};

use aya::programs::{
    ProgramError, ProgramFd, SchedClassifier, TcAttachType,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact},
};
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{self, TcAttribute, TcFilterBpfOption, TcMessage, TcOption},
};
use nix::{errno::Errno, libc};

use super::links::Link;
use crate::netlink::{Refusal, exchange};

/// A program of ours in traffic control, and where it sits there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TcHook {
    /// Name of the program, of which an interface has one at most.
    pub(crate) program: &'static str,
    pub(crate) direction: Direction,
    pub(crate) order: Order,
}

/// What passes a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What comes in, before the stack.
    Ingress,
    /// What goes out, before the queueing discipline.
    Egress,
}

/// Where a program stands among those of a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Before all that are there.
    First,
    /// After all that are there.
    Last,
}

/// A program that is attached.
pub(crate) enum TcAttachment {
    /// By TCX.
    Link(Link),
    /// By clsact.
    Filter(Filter),
}

impl TcAttachment {
    /// Attaches a program, besides any that is there.
    pub(crate) fn attach(
        hook: TcHook,
        program: &mut SchedClassifier,
        interface: &str,
        index: u32,
    ) -> io::Result<Self> {
        let descriptor = descriptor(program)?.as_fd();
        match Link::tcx(descriptor, index, hook.direction, hook.order) {
            // Before Linux 6.6, a link could not have a program of this type.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                Filter::attach(hook, program, interface, index).map(Self::Filter)
            }
            link => link.map(Self::Link),
        }
    }

    /// Puts another program in its place: a packet sees the old one or the new one.
    pub(crate) fn update(&self, program: &mut SchedClassifier, interface: &str) -> io::Result<()> {
        match self {
            Self::Link(link) => link.update(descriptor(program)?.as_fd()),
            Self::Filter(filter) => filter.update(program, interface),
        }
    }

    /// Detaches it. An interface that is gone is no error.
    pub(crate) fn detach(&self) -> io::Result<()> {
        match self {
            Self::Link(link) => link.detach(),
            Self::Filter(filter) => filter.delete(),
        }
    }

    /// The filter that it is, if it is one.
    pub(crate) const fn filter(&self) -> Option<Filter> {
        match self {
            Self::Filter(filter) => Some(*filter),
            Self::Link(_) => None,
        }
    }
}

/// A filter of clsact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Filter {
    direction: Direction,
    index: u32,
    priority: u16,
    handle: u32,
}

impl Filter {
    fn attach(
        hook: TcHook,
        program: &mut SchedClassifier,
        interface: &str,
        index: u32,
    ) -> io::Result<Self> {
        match qdisc_add_clsact(interface) {
            // It is there already.
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
            // Nothing has this name any more.
            Err(TcError::IoError(error)) => return Err(error),
            outcome => outcome.map_err(io::Error::other)?,
        }
        let options = TcAttachOptions::Netlink(NlOptions {
            priority: match hook.order {
                // The kernel puts a filter without a priority before all that are there.
                Order::First => 0,
                Order::Last => u16::MAX,
            },
            ..NlOptions::default()
        });
        let attach = |program: &mut SchedClassifier| {
            let attach_type = hook.direction.attach_type();
            let id = program.attach_with_options(interface, attach_type, options)?;
            let link = program.take_link(id)?;
            let (priority, handle) = (link.priority()?, link.handle()?.into());
            // It only holds what was just read, and would delete the filter.
            std::mem::forget(link);
            Ok(Self {
                direction: hook.direction,
                index,
                priority,
                handle,
            })
        };
        attach(program).map_err(|error: ProgramError| io::Error::other(error.to_string()))
    }

    fn update(self, program: &mut SchedClassifier, interface: &str) -> io::Result<()> {
        // cls_bpf_change() in net/sched/cls_bpf.c replaces a filter of the same handle under RCU.
        let filter = SchedClassifierLink::attached(
            interface,
            self.direction.attach_type(),
            self.priority,
            TcHandle::from(self.handle),
            None,
        )?;
        let update = |program: &mut SchedClassifier| {
            let id = program.attach_to_link(filter)?;
            // As in `attach`.
            std::mem::forget(program.take_link(id)?);
            Ok(())
        };
        update(program).map_err(|error: ProgramError| io::Error::other(error.to_string()))
    }

    /// All filters of a hook with its program; none without clsact or interface.
    pub(crate) fn all(hook: TcHook, index: u32) -> io::Result<Vec<Self>> {
        let mut filters = Vec::new();
        let request = RouteNetlinkMessage::GetTrafficFilter(hook.direction.address(index));
        let outcome = exchange(request, NLM_F_DUMP, |message| {
            if let RouteNetlinkMessage::NewTrafficFilter(filter) = message
                && is_program(&filter, hook.program)
            {
                filters.push(Self {
                    direction: hook.direction,
                    index,
                    // TC_H_MAJ() of tcm_info in include/uapi/linux/rtnetlink.h.
                    priority: (filter.header.info >> 16) as u16,
                    handle: filter.header.handle.into(),
                });
            }
        });
        absent(outcome)?;
        Ok(filters)
    }

    /// Deletes it. A filter or an interface that is gone is no error.
    pub(crate) fn delete(self) -> io::Result<()> {
        let mut message = self.direction.address(self.index);
        message.header.handle = self.handle.into();
        let protocol = u32::from((libc::ETH_P_ALL as u16).to_be());
        message.header.info = u32::from(self.priority) << 16 | protocol;
        let request = RouteNetlinkMessage::DelTrafficFilter(message);
        absent(exchange(request, NLM_F_ACK, |_| {}))
    }
}

impl Direction {
    /// The side of the interface that it is on.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    const fn attach_type(self) -> TcAttachType {
        match self {
            Self::Ingress => TcAttachType::Ingress,
            Self::Egress => TcAttachType::Egress,
        }
    }

    /// Addresses this side of an interface's clsact.
    pub(crate) fn address(self, index: u32) -> TcMessage {
        let mut message = TcMessage::with_index(index.cast_signed());
        // `tc::TcHandle::CLSACT` is ffff:fff1, whose major half the parent shares.
        message.header.parent = tc::TcHandle {
            major: tc::TcHandle::CLSACT.major,
            minor: match self {
                Self::Ingress => tc::TcHandle::MIN_INGRESS,
                Self::Egress => tc::TcHandle::MIN_EGRESS,
            },
        };
        message
    }
}

fn descriptor(program: &SchedClassifier) -> io::Result<&ProgramFd> {
    program.fd().map_err(io::Error::other)
}

fn is_program(filter: &TcMessage, program: &str) -> bool {
    let options = filter
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            TcAttribute::Options(options) => Some(options),
            _ => None,
        });
    options.flatten().any(|option| {
        matches!(option, TcOption::Bpf(TcFilterBpfOption::ProgName(name)) if name == program)
    })
}

/// What is not there is not to be found or deleted.
fn absent(outcome: Result<(), Refusal>) -> io::Result<()> {
    match outcome {
        // No interface; no clsact; no filter.
        Err(refusal) if matches!(refusal.errno, Errno::ENODEV | Errno::EINVAL | Errno::ENOENT) => {
            Ok(())
        }
        outcome => Ok(outcome?),
    }
}
