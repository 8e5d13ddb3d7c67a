//! A network namespace that nobody sees, in which trees are built before they are built for good.

use std::thread;

use netlink_packet_core::NLM_F_ACK;
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage},
};
use nix::{
    errno::Errno,
    sched::{CloneFlags, unshare},
};

use super::{
    kernel::Rtnetlink,
    leaf::Leaves,
    shape::Shape,
    tree::{Change, StepError, Tree, run},
};
use crate::netlink::{Refusal, exchange};

/// Why there was none.
#[derive(Debug, thiserror::Error)]
pub(super) enum RehearsalError {
    /// No namespace of our own to be had: that needs CAP_SYS_ADMIN.
    #[error("{0}")]
    NotPermitted(Errno),
    /// The kernel cannot build what is wanted.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The kernel cannot be asked.
    #[error(transparent)]
    Kernel(#[from] Refusal),
}

/// Every network namespace has its loopback interface under this number.
const LOOPBACK: u32 = 1;

/// Builds the trees of lines for an interface with this MTU, with the best leaves that the kernel has,
/// and tells which these are.
///
/// # Errors
/// [`RehearsalError`].
pub(super) fn best_leaves(lines: &[&Shape<'_>], mtu: u32) -> Result<Leaves, RehearsalError> {
    elsewhere(mtu, || {
        let mut leaves = Leaves::BEST;
        loop {
            let mut trees = lines.iter().map(|line| line.tree(leaves));
            match trees.try_for_each(|tree| build(&tree).map(drop)) {
                Ok(()) => return Ok(leaves),
                Err(RehearsalError::Step(error)) => leaves = error.lesser(leaves)?,
                Err(error) => return Err(error),
            }
        }
    })
}

/// Whether a tree, built from what was read of it on an interface with this MTU, reads the same again.
///
/// # Errors
/// [`RehearsalError::NotPermitted`].
pub(super) fn restorable(tree: Tree, mtu: u32) -> Result<bool, RehearsalError> {
    elsewhere(mtu, move || {
        Ok(build(&tree).is_ok_and(|built| built == tree))
    })
}

/// Builds a tree on an interface that has the kernel's default, and reads it back.
fn build(tree: &Tree) -> Result<Tree, RehearsalError> {
    let kernel = &mut Rtnetlink;
    let outcome = run(
        kernel,
        &Tree::default().plan(LOOPBACK, tree, Change::Whole).first,
    );
    let built = Tree::read(kernel, LOOPBACK)?;
    // For the next one.
    run(
        kernel,
        &built.plan(LOOPBACK, &Tree::default(), Change::Whole).first,
    )?;
    outcome?;
    Ok(built)
}

/// Runs in a network namespace of its own, which is gone afterwards. Its loopback interface has this
/// MTU, or the kernel's log would tell of bursts that are shorter than its packets.
fn elsewhere<T: Send>(
    mtu: u32,
    work: impl FnOnce() -> Result<T, RehearsalError> + Send,
) -> Result<T, RehearsalError> {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(RehearsalError::NotPermitted)?;
            let mut loopback = LinkMessage::default();
            loopback.header.index = LOOPBACK;
            loopback.attributes = vec![LinkAttribute::Mtu(mtu)];
            exchange(RouteNetlinkMessage::SetLink(loopback), NLM_F_ACK, |_| {})?;
            work()
        });
        inside
            .join()
            .unwrap_or(Err(RehearsalError::NotPermitted(Errno::ECANCELED)))
    })
}
