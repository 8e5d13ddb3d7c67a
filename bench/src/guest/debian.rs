//! The Debian 12 whose kernel the guest runs, and in whose folder are the peers.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use nix::mount::{MsFlags, mount};
use relay_tests::debian::Installation;

/// The kernel module is taken out of its package and built by hand: the package would build it, with DKMS, for the
/// kernel that runs now.
const BOOKWORM: Installation = Installation {
    cache: "relay-guest",
    name: "bookworm-1",
    program: "a Debian 12 with its kernel and rtpengine",
    suite: "bookworm",
    packages: &[
        "busybox-static",
        "iptables",
        "kmod",
        "linux-headers-amd64",
        "linux-image-amd64",
        "make",
        "rtpengine-daemon",
        "rtpengine-iptables",
    ],
    finish: Some(
        "cd /usr/src
         apt-get download -qq rtpengine-kernel-dkms
         dpkg-deb --extract rtpengine-kernel-dkms_*.deb /
         rm rtpengine-kernel-dkms_*.deb
         version=$(basename /lib/modules/*)
         make -C /lib/modules/$version/build M=$(echo $PWD/rtpengine-*) modules
         install -D -m 644 -t /lib/modules/$version/extra rtpengine-*/xt_RTPENGINE.ko
         depmod $version",
    ),
};

/// Its folder, installed.
pub(super) struct Bookworm {
    root: PathBuf,
}

impl Bookworm {
    /// Installs it, if need be.
    pub(super) fn installed() -> Result<Self> {
        Ok(Self::at(BOOKWORM.root()?))
    }

    /// The one in this folder.
    pub(super) const fn at(root: PathBuf) -> Self {
        Self { root }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// A file in it.
    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Version of its kernel.
    pub(super) fn kernel(&self) -> Result<String> {
        let folder = self.path("lib/modules");
        let mut versions = fs::read_dir(&folder)
            .with_context(|| format!("read {}", folder.display()))?
            .flatten();
        match (versions.next(), versions.next()) {
            (Some(version), None) => Ok(version.file_name().to_string_lossy().into_owned()),
            _ => bail!("not one kernel in {}", folder.display()),
        }
    }

    /// Gives its programs `/proc` and `/dev`. For the guest, where this is the guest's alone.
    pub(super) fn mount(&self) -> Result<()> {
        let none: Option<&str> = None;
        for (kind, place) in [("proc", "proc"), ("devtmpfs", "dev")] {
            mount(
                Some(kind),
                &self.path(place),
                Some(kind),
                MsFlags::empty(),
                none,
            )
            .with_context(|| format!("mount {place}"))?;
        }
        Ok(())
    }

    /// One of its programs, not yet started.
    pub(super) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("chroot");
        command.arg(&self.root).arg(program);
        command
    }
}
