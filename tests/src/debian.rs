//! Programs of Debian's, each in a cache directory with a small Debian of its own, once for all tests and runs.

use std::{
    env, fs,
    fs::File,
    io::ErrorKind,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::namespace;

const DEFAULT_MIRROR: &str = "http://deb.debian.org/debian";

/// A Debian with a program and what that depends on. Services in it are never started.
#[derive(Clone, Copy, Debug)]
pub struct Installation {
    /// What is installed, for messages.
    pub program: &'static str,
    /// The folder in the user's cache.
    pub cache: &'static str,
    /// The folder in that. Another way to install takes a new name, so that an old cache is not used.
    pub name: &'static str,
    /// Debian's release.
    pub suite: &'static str,
    /// Packages that are installed.
    pub packages: &'static [&'static str],
    /// What its shell runs last, if anything.
    pub finish: Option<&'static str>,
}

impl Installation {
    /// Its root directory. Installs it first if need be, which takes about a minute.
    ///
    /// # Errors
    /// The cache cannot be written, or the Debian mirror not be reached: the text holds the end of the log.
    pub fn root(&self) -> Result<PathBuf> {
        let cache = match (env::var_os("XDG_CACHE_HOME"), env::var_os("HOME")) {
            (Some(cache), _) => PathBuf::from(cache),
            (None, Some(home)) => Path::new(&home).join(".cache"),
            (None, None) => bail!(
                "neither XDG_CACHE_HOME nor HOME is set: no place to keep {}",
                self.program
            ),
        };
        let cache = cache.join(self.cache);
        fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
        let root = cache.join(self.name);
        if root.is_dir() {
            return Ok(root);
        }
        // The kernel lets go of the lock when its holder is killed.
        let lock = File::create(cache.join("lock"))
            .with_context(|| format!("cannot write in {}", cache.display()))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .context("lock")?;
        if root.is_dir() {
            return Ok(root);
        }
        let partial = cache.join(format!("{}.partial", self.name));
        match fs::remove_dir_all(&partial) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).context("remove a broken install");
            }
            _ => {}
        }
        self.install(&partial, &cache.join("log"))?;
        fs::rename(&partial, &root)?;
        Ok(root)
    }

    fn install(&self, root: &Path, log: &Path) -> Result<()> {
        eprintln!(
            "installing {} into {} (a minute or more)",
            self.program,
            root.display()
        );
        File::create(log)?;
        if !["/usr/sbin/debootstrap", "/usr/bin/debootstrap"]
            .iter()
            .any(|path| Path::new(path).is_file())
        {
            run(log, &["apt-get", "update", "-qq"])?;
            run(
                log,
                &[
                    "apt-get",
                    "install",
                    "-y",
                    "-qq",
                    "--no-install-recommends",
                    "debootstrap",
                ],
            )?;
        }
        let mirror = mirror();
        let root_text = root.to_str().context("the cache's path is not UTF-8")?;
        let mut debootstrap = vec!["debootstrap", "--variant=minbase", "--merged-usr"];
        if mirror.starts_with("https:") {
            debootstrap.push("--include=ca-certificates");
        }
        // debootstrap has no script for releases younger than itself: its fourth argument names the generic one.
        debootstrap.extend([self.suite, root_text, &mirror, "sid"]);
        run(log, &debootstrap)?;
        // Services must not start inside.
        let policy = root.join("usr/sbin/policy-rc.d");
        fs::write(&policy, "#!/bin/sh\nexit 101\n")?;
        fs::set_permissions(&policy, fs::Permissions::from_mode(0o755))?;
        // Saves 250 MiB.
        let excluded = ["doc", "man", "locale"]
            .map(|name| format!("path-exclude=/usr/share/{name}/*\n"))
            .concat();
        fs::write(root.join("etc/dpkg/dpkg.cfg.d/relay-asterisk"), excluded)?;
        let mut install = vec![
            "chroot",
            root_text,
            "apt-get",
            "install",
            "-y",
            "--no-install-recommends",
        ];
        install.extend(self.packages);
        run(log, &install)?;
        if let Some(finish) = self.finish {
            run(log, &["chroot", root_text, "sh", "-ec", finish])?;
        }
        run(log, &["chroot", root_text, "apt-get", "clean"])?;
        fs::remove_dir_all(root.join("var/lib/apt/lists"))?;
        // A place to mount what an instance writes.
        fs::create_dir(root.join("lab"))?;
        Ok(())
    }
}

/// Runs a command with its output in the log. Its mounts and processes are its own (unshare(1)), so that nothing of
/// it is left when this process is killed.
fn run(log: &Path, command: &[&str]) -> Result<()> {
    let output = File::options().append(true).open(log)?;
    let mut unshare = Command::new("unshare");
    unshare
        .args([
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--",
        ])
        .args(command)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output);
    let output = namespace::start(unshare, None)?.output()?;
    if !output.status.success() {
        let text = fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(8)..].join("\n");
        bail!(
            "{command:?}: {}; the end of {}:\n{end}",
            output.status,
            log.display()
        );
    }
    Ok(())
}

/// The Debian mirror of this machine's own apt, so that installs work where only that one is reachable.
fn mirror() -> String {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    let mut more: Vec<_> = fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    more.sort();
    files.extend(more);
    let texts = files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .collect::<Vec<_>>()
        .join("\n");
    find_mirror(&texts).unwrap_or_else(|| DEFAULT_MIRROR.to_owned())
}

/// The first address that ends in `/debian` in sources of either format (sources.list(5)).
fn find_mirror(sources: &str) -> Option<String> {
    let lines = sources
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with('#'));
    let mut words = lines.flat_map(str::split_whitespace);
    words
        .find(|word| word.starts_with("http") && word.trim_end_matches('/').ends_with("/debian"))
        .map(|word| word.trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_of_both_formats() {
        let deb822 = "Types: deb\n# http://old.example/debian\nURIs: http://deb.example/debian/\nSuites: bookworm\n";
        assert_eq!(
            find_mirror(deb822).as_deref(),
            Some("http://deb.example/debian")
        );
        let list = "deb https://other.example/node stable main\ndeb [arch=amd64] https://m.example/debian sid main\n";
        assert_eq!(
            find_mirror(list).as_deref(),
            Some("https://m.example/debian")
        );
        assert_eq!(
            find_mirror("deb http://archive.example/ubuntu noble main"),
            None
        );
    }
}
