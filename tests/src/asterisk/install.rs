//! The Debian that Asterisk runs in.

use std::path::PathBuf;

use anyhow::Result;

use crate::debian::Debian;

const ASTERISK: Debian<'_> = Debian {
    cache: "relay-asterisk",
    name: "forky-1",
    purpose: "Asterisk",
    // The release that has Asterisk 22. Debian 12 and 13 have none.
    suite: "forky",
    packages: &["asterisk", "asterisk-core-sounds-en-wav"],
    finish: Some("mkdir /lab"),
};

/// The root directory of a Debian with Asterisk; installs it first if need be.
///
/// # Errors
/// As [`Debian::installed`].
pub(super) fn installed() -> Result<PathBuf> {
    ASTERISK.installed()
}
