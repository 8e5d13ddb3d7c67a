//! The daemon behind `relay-user attach`.

use anyhow::bail;

use crate::config::AttachSettings;

/// Attaches the relay to an interface and serves until it is told to stop.
///
/// # Errors
/// Whatever keeps the relay from starting, with its remedy.
pub fn run(settings: AttachSettings) -> anyhow::Result<()> {
    bail!(
        "cannot attach to {}: this build holds no datapath",
        settings.interface
    )
}

/// Removes the programs, links, maps and pins that a daemon which was killed left on an interface;
/// returns whether there were any. Refuses while a daemon serves that interface, on whatever socket.
///
/// # Errors
/// What kept a thing from being removed.
pub fn remove_leftovers(interface: &str) -> anyhow::Result<bool> {
    bail!("cannot look for leftovers on {interface}: this build holds no datapath")
}
