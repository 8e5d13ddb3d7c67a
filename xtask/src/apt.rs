//! Installing packages on Debian and its relatives.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail, ensure};

/// The package manager of this machine.
pub(crate) struct Apt {
    lists_are_fresh: bool,
}

impl Apt {
    /// `None` on a distribution that has no apt.
    pub(crate) fn find() -> Option<Self> {
        crate::setup::on_path("apt-get").then_some(Self {
            lists_are_fresh: false,
        })
    }

    /// The version of `package` that would be installed, or `None` where there is none.
    pub(crate) fn candidate(&mut self, package: &str) -> Result<Option<String>> {
        self.update()?;
        let policy = Command::new("apt-cache")
            .args(["policy", package])
            .env("LC_ALL", "C")
            .output();
        let policy = policy.context("cannot run apt-cache")?;
        Ok(candidate_in(&String::from_utf8_lossy(&policy.stdout)))
    }

    /// Installs `packages`, or brings them up to date. Removes nothing.
    ///
    /// # Errors
    /// When not root, with the command to run as root, and when apt-get fails.
    pub(crate) fn install(&mut self, packages: &[&str]) -> Result<()> {
        let list = packages.join(" ");
        if !crate::is_root()? {
            bail!(
                "installing packages needs root: run \
                 `apt-get update && apt-get install --no-install-recommends {list}` as root, then again"
            );
        }
        self.update()?;
        crate::setup::say("installing", &format!("packages {list}"));
        let status = apt_get(&["install", "--yes", "--no-install-recommends", "--no-remove"])
            .args(packages)
            .status()
            .context("cannot run apt-get")?;
        ensure!(
            status.success(),
            "apt-get could not install {list}, see above"
        );
        Ok(())
    }

    /// Puts one program of `package` into `folder`, and installs nothing.
    ///
    /// # Errors
    /// When apt-get does not get the package, or the program is not in it.
    pub(crate) fn unpack(&mut self, package: &str, program: &str, folder: &Path) -> Result<()> {
        self.update()?;
        crate::setup::say("unpacking", &format!("{program} of package {package}"));
        let scratch = folder.join(package);
        fs::create_dir_all(&scratch)
            .with_context(|| format!("cannot make {}", scratch.display()))?;
        let status = apt_get(&["download", package])
            .current_dir(&scratch)
            .status()
            .context("cannot run apt-get")?;
        ensure!(
            status.success(),
            "apt-get could not download {package}, see above"
        );
        let files = fs::read_dir(&scratch)?;
        let archive = files
            .filter_map(|file| Some(file.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt-get left no package in {}", scratch.display()))?;
        let status = Command::new("dpkg-deb")
            .arg("--extract")
            .args([&archive, &scratch])
            .status()
            .context("cannot run dpkg-deb")?;
        ensure!(status.success(), "dpkg-deb could not unpack {package}");
        fs::rename(scratch.join("usr/bin").join(program), folder.join(program))
            .with_context(|| format!("the package {package} has no {program}"))?;
        fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))
    }

    /// Only before the first question or installation: a machine with everything in place is left
    /// alone, and a fresh one has no lists at all.
    fn update(&mut self) -> Result<()> {
        if self.lists_are_fresh || !crate::is_root()? {
            return Ok(());
        }
        crate::setup::say("updating", "package lists");
        let status = apt_get(&["update"])
            .status()
            .context("cannot run apt-get")?;
        if !status.success() {
            // Of several sources one may be unreachable, and another one have all that is needed.
            crate::setup::say("warning", "apt-get update failed, see above; going on");
        }
        self.lists_are_fresh = true;
        Ok(())
    }
}

fn apt_get(command: &[&str]) -> Command {
    let mut apt_get = Command::new("apt-get");
    apt_get
        // A new machine's unattended upgrade holds the lock in its first minutes.
        .args([
            "-qq",
            "-o",
            "DPkg::Lock::Timeout=300",
            "-o",
            "Dpkg::Use-Pty=0",
        ])
        .args(command)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(std::process::Stdio::null());
    apt_get
}

fn candidate_in(policy: &str) -> Option<String> {
    let candidate = policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (candidate != "(none)").then(|| candidate.to_owned())
}

#[cfg(test)]
mod tests {
    use super::candidate_in;

    #[test]
    fn a_candidate_is_a_version_or_none() {
        let known = "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n";
        assert_eq!(
            candidate_in(known).as_deref(),
            Some("1.96.0+dfsg1-1~deb12u2")
        );
        let removed = "rustc-web:\n  Installed: (none)\n  Candidate: (none)\n";
        assert_eq!(candidate_in(removed), None);
        assert_eq!(candidate_in(""), None, "a name that apt never heard of");
    }
}
