//! The relay's program at its hook, whichever that is.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd},
};

use aya::programs::{Program, SchedClassifier};

use super::{
    AttachMode,
    links::Link,
    names,
    tc::{Filter, TcAttachment},
};

/// The relay's program, attached.
pub(super) enum RelayAttachment {
    /// By XDP.
    Xdp(Link),
    /// By the ingress traffic control.
    Tc(TcAttachment),
}

impl RelayAttachment {
    /// Attaches the program of a mode.
    pub(super) fn attach(
        mode: AttachMode,
        program: &mut Program,
        interface: &str,
        index: u32,
    ) -> io::Result<Self> {
        match mode {
            AttachMode::Native => Link::xdp(descriptor(program)?, index, true).map(Self::Xdp),
            AttachMode::Generic => Link::xdp(descriptor(program)?, index, false).map(Self::Xdp),
            AttachMode::Tc => {
                TcAttachment::attach(names::RELAY, classifier(program)?, interface, index)
                    .map(Self::Tc)
            }
        }
    }

    /// Puts another program of the same mode in its place: a packet sees the old one or the new one.
    pub(super) fn update(&self, program: &mut Program, interface: &str) -> io::Result<()> {
        match self {
            Self::Xdp(link) => link.update(descriptor(program)?),
            Self::Tc(attachment) => attachment.update(classifier(program)?, interface),
        }
    }

    /// Detaches it. An interface that is gone is no error.
    pub(super) fn detach(&self) -> io::Result<()> {
        match self {
            Self::Xdp(link) => link.detach(),
            Self::Tc(attachment) => attachment.detach(),
        }
    }

    /// What can be pinned of it.
    pub(super) const fn link(&self) -> Option<&Link> {
        match self {
            Self::Xdp(link) | Self::Tc(TcAttachment::Link(link)) => Some(link),
            Self::Tc(TcAttachment::Filter(_)) => None,
        }
    }

    /// What cannot.
    pub(super) const fn filter(&self) -> Option<Filter> {
        match self {
            Self::Tc(attachment) => attachment.filter(),
            Self::Xdp(_) => None,
        }
    }
}

fn descriptor(program: &Program) -> io::Result<BorrowedFd<'_>> {
    program.fd().map(|fd| fd.as_fd()).map_err(io::Error::other)
}

fn classifier(program: &mut Program) -> io::Result<&mut SchedClassifier> {
    program.try_into().map_err(io::Error::other)
}
