//! A case of suite `program` in the kernel.

use std::{
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use relay_common::capture::{Capture, SNAP_MAX};
use relay_tests::{
    fixture::{self, Family, Hook, SLOTS},
    kernel::{self, Kernel},
    program::{self, Kind, Run},
};

use super::case::{Case, REPEAT, Relay, Subject, flowing};
use crate::{interpreter::Trace, peer::swap::XDP_TX};

/// A case, its program loaded.
pub(super) struct Loaded {
    pub(super) case: Case,
    program: Program,
    /// Mean times of a run, ns.
    pub(super) samples: Vec<f64>,
}

enum Program {
    Floor(OwnedFd),
    Relay(Box<Kernel>, Box<Relay>),
}

impl Program {
    fn descriptor(&self) -> Result<BorrowedFd<'_>> {
        match self {
            Self::Floor(program) => Ok(program.as_fd()),
            Self::Relay(kernel, relay) => kernel.descriptor(relay.hook),
        }
    }
}

impl Loaded {
    pub(super) fn new(case: Case) -> Result<Self> {
        let program = match &case.subject {
            Subject::Floor(instructions) => Program::Floor(program::load(Kind::Xdp, instructions)?),
            Subject::Part(part) => {
                let mut kernel = Kernel::load(Hook::NativeXdp, SLOTS)?;
                kernel.set(&[fixture::offloaded(fixture::cycle(Family::V4).0)])?;
                let instructions = part.program(kernel.streams()?);
                Program::Floor(program::load(Kind::Xdp, &instructions)?)
            }
            Subject::Relay(relay) => {
                let mut kernel = Kernel::load(relay.hook, SLOTS)?;
                kernel.set(&[relay.entry])?;
                if relay.is_captured {
                    kernel.set_capture(Capture {
                        until: u64::MAX,
                        snap: SNAP_MAX as u32,
                        sample: u32::MAX,
                        ..Capture::default()
                    })?;
                }
                Program::Relay(Box::new(kernel), relay.clone())
            }
        };
        Ok(Self {
            case,
            program,
            samples: vec![],
        })
    }

    /// The datapath that it runs, if any.
    pub(super) fn kernel(&self) -> Option<(&Kernel, Hook)> {
        match &self.program {
            Program::Floor(_) => None,
            Program::Relay(kernel, relay) => Some((kernel, relay.hook)),
        }
    }

    /// Mean time of a run, ns.
    pub(super) fn measure(&mut self, calls: u32) -> Result<f64> {
        let counted = self.counted()?;
        let mut after = vec![0; self.case.frame.len()];
        let mut time = Duration::ZERO;
        for _ in 0..calls {
            self.set_flowing()?;
            let program = self.program.descriptor()?;
            let Run {
                time: one,
                length,
                verdict,
            } = program::test_run(program, &self.case.frame, &mut after, REPEAT, 0)
                .context("BPF_PROG_TEST_RUN")?;
            time += one;
            let floors = matches!(self.program, Program::Floor(_));
            ensure!(
                !floors || verdict == XDP_TX as u32,
                "{}: {verdict}",
                self.case.name
            );
            if let Program::Relay(kernel, relay) = &mut self.program
                && relay.is_captured
            {
                // A full ring buffer would cost less.
                let captured = kernel.take_captured()?.len();
                ensure!(
                    captured == 2 * REPEAT as usize,
                    "{captured} packets captured"
                );
            }
            let right = length == after.len() && after == self.case.after;
            ensure!(
                right,
                "{}: {after:02x?} and not {:02x?}",
                self.case.name,
                self.case.after
            );
        }
        let counted = self.counted()? - counted;
        let expected = match self.program {
            Program::Floor(_) => 0,
            Program::Relay(..) => u64::from(calls) * u64::from(REPEAT),
        };
        ensure!(
            counted == expected,
            "{}: {counted} of {expected} packets counted",
            self.case.name
        );
        Ok(time.as_nanos() as f64 / f64::from(calls))
    }

    /// Counts instructions, and sees that they do to the frame what the kernel's do.
    pub(super) fn trace(&mut self) -> Result<Option<Trace>> {
        let Some(trace) = self.case.trace()? else {
            return Ok(None);
        };
        // In TC a part of it is the kernel's work.
        if !matches!(&self.program, Program::Relay(_, relay) if relay.hook == Hook::Tc) {
            self.set_flowing()?;
            let mut after = vec![0; self.case.frame.len()];
            program::test_run(
                self.program.descriptor()?,
                &self.case.frame,
                &mut after,
                1,
                0,
            )?;
            ensure!(
                trace.frame == after,
                "{}: traced to {:02x?}",
                self.case.name,
                trace.frame
            );
        }
        Ok(Some(trace))
    }

    /// Has the stream's last packet come just now.
    fn set_flowing(&mut self) -> Result<()> {
        let Program::Relay(kernel, relay) = &mut self.program else {
            return Ok(());
        };
        let state = flowing(&relay.entry, kernel::now()?);
        kernel.set_state(relay.entry.stream.slot, state)
    }

    /// Packets that were found to have the case's reason so far.
    fn counted(&self) -> Result<u64> {
        Ok(match &self.program {
            Program::Floor(_) => 0,
            Program::Relay(kernel, relay) => kernel.counters()?[relay.reason as usize].packets,
        })
    }
}
