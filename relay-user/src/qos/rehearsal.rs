//! A network namespace that nobody sees, in which trees are built before they are built for good.

use std::thread;

use nix::{
    errno::Errno,
    sched::{CloneFlags, unshare},
};

use super::{
    kernel::Rtnetlink,
    leaf::Leaf,
    tree::{StepError, Tree, run},
};
use crate::netlink::Refusal;

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

/// Builds a tree with the best leaves that the kernel has, and tells which these are.
///
/// # Errors
/// [`RehearsalError`].
pub(super) fn best_leaf(trees: Vec<(Leaf, Tree)>) -> Result<Leaf, RehearsalError> {
    elsewhere(move || {
        let last = trees.len().saturating_sub(1);
        for (place, (leaf, tree)) in trees.into_iter().enumerate() {
            match build(&tree) {
                Ok(_) => return Ok(leaf),
                Err(RehearsalError::Step(error)) if error.lacks(leaf) && place < last => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Leaf::Pfifo)
    })
}

/// Whether a tree, built from what was read of it, reads the same again.
///
/// # Errors
/// [`RehearsalError::NotPermitted`].
pub(super) fn restorable(tree: Tree) -> Result<bool, RehearsalError> {
    elsewhere(move || Ok(build(&tree).is_ok_and(|built| built == tree)))
}

/// Builds a tree on an interface that has the kernel's default, and reads it back.
fn build(tree: &Tree) -> Result<Tree, RehearsalError> {
    let kernel = &mut Rtnetlink;
    let outcome = run(kernel, &Tree::default().plan(LOOPBACK, tree).first);
    let built = Tree::read(kernel, LOOPBACK)?;
    // For the next one.
    run(kernel, &built.plan(LOOPBACK, &Tree::default()).first)?;
    outcome?;
    Ok(built)
}

/// Runs in a network namespace of its own, which is gone afterwards.
fn elsewhere<T: Send>(
    work: impl FnOnce() -> Result<T, RehearsalError> + Send,
) -> Result<T, RehearsalError> {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(RehearsalError::NotPermitted)?;
            work()
        });
        inside
            .join()
            .unwrap_or(Err(RehearsalError::NotPermitted(Errno::ECANCELED)))
    })
}
