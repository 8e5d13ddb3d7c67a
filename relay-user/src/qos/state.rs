//! What must be known to undo: one file for each shaped interface, `/run/relay-user/qos/IFACE.json`.
//!
//! Everything else is read from the kernel.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write as _},
    os::unix::fs::{
        DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    unistd::geteuid,
};
use serde::{Deserialize, Serialize};

use super::{leaf::Leaves, policy::PolicyFile, rate::Rate, tree::Tree};

/// Where they are.
const FOLDER: &str = "/run/relay-user/qos";

/// The kernel's name of this boot (random(4)).
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// Form of the file: another one is not read.
const VERSION: u32 = 1;

/// Number of no interface.
pub(super) const NOT_YET: u32 = 0;

/// What was done to an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    version: u32,
    /// Of the boot in which it holds.
    boot: String,
    /// Whether the trees are there; the classifier and the IFB device can be without them.
    pub(super) shaped: bool,
    /// Whether what was there is known to come back whole.
    pub(super) faithful: bool,
    /// Whether packets are classified.
    pub(super) classified: bool,
    /// The policy; the built-in one if there is none.
    pub(super) policy: Option<PolicyFile>,
    /// Names of the classes.
    pub(super) classes: Vec<String>,
    /// In each class.
    pub(super) leaves: Leaves,
    /// Of the interface, in bytes, when it was shaped.
    pub(super) mtu: u32,
    /// The interface.
    pub(super) uplink: Line,
    /// The IFB device that what comes in passes.
    pub(super) downlink: Option<Line>,
    /// What of ours was on the interface before a change that may not have come to its end.
    pub(super) earlier: Option<Tree>,
}

/// A device that is shaped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Line {
    pub(super) device: String,
    /// [`NOT_YET`] for one that was about to be made.
    pub(super) index: u32,
    /// None where packets are only marked.
    pub(super) rate: Option<Rate>,
    /// What we made.
    pub(super) tree: Tree,
    /// What was there.
    pub(super) before: Tree,
}

impl State {
    pub(super) fn new(
        uplink: Line,
        downlink: Option<Line>,
        leaves: Leaves,
        mtu: u32,
    ) -> Result<Self, StateError> {
        Ok(Self {
            version: VERSION,
            boot: boot().map_err(failed("read", Path::new(BOOT)))?,
            shaped: true,
            faithful: true,
            classified: false,
            policy: None,
            classes: Vec::new(),
            leaves,
            mtu,
            uplink,
            downlink,
            earlier: None,
        })
    }

    /// Whether the interface's tree is ours.
    pub(super) fn is_at(&self, present: &Tree) -> bool {
        let trees = [Some(&self.uplink.tree), self.earlier.as_ref()];
        trees.into_iter().flatten().any(|tree| tree.is_at(present))
    }

    /// Whether it is from this boot: indices count anew in the next.
    pub(super) fn is_current(&self) -> bool {
        boot().is_ok_and(|boot| boot == self.boot)
    }
}

fn boot() -> io::Result<String> {
    let id = fs::read_to_string(BOOT)?;
    Ok(id.trim().to_owned())
}

/// Why the state cannot be had or kept.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file system refuses.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Not root.
    #[error("cannot {action} {path}: shaping is root's business: run as root", path = path.display())]
    Permission {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
    },
    /// Others could have written it.
    #[error(
        "{path} is not root's alone (owner {owner}, mode {mode:04o}) and is not believed: look at `tc qdisc show`, then remove it (`rm {path}`)",
        path = path.display()
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Number of its owner.
        owner: u32,
        /// Its mode.
        mode: u32,
    },
    /// No state, or that of another version.
    #[error(
        "{path} cannot be read as the state of `relay-user qos` ({what}): look at `tc qdisc show`, then remove it (`rm {path}`)",
        path = path.display()
    )]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

/// The files of one interface.
#[derive(Debug)]
pub(super) struct Store {
    folder: PathBuf,
    interface: String,
}

/// While it lives, nobody else changes anything about the interface.
pub(super) struct Lock(#[expect(dead_code, reason = "held, not used")] Flock<File>);

impl Store {
    pub(super) fn new(interface: &str) -> Self {
        Self {
            folder: PathBuf::from(FOLDER),
            interface: interface.to_owned(),
        }
    }

    /// The interfaces that have a state, sorted.
    pub(super) fn interfaces() -> Vec<String> {
        let entries = fs::read_dir(FOLDER).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<_> = names
            .filter_map(|name| Some(name.strip_suffix(".json")?.to_owned()))
            .collect();
        names.sort();
        names
    }

    /// A file of the interface, by what follows its name.
    pub(super) fn path(&self, suffix: &str) -> PathBuf {
        self.folder.join(format!("{}{suffix}", self.interface))
    }

    /// Waits until nobody else holds the lock.
    pub(super) fn lock(&self) -> Result<Lock, StateError> {
        const LOCK: &str = ".lock";
        Flock::lock(self.open(LOCK)?, FlockArg::LockExclusive)
            .map(Lock)
            .map_err(|(_, errno)| self.failed("lock", LOCK, errno))
    }

    /// Opens a file that is there for its lock only.
    pub(super) fn open(&self, suffix: &str) -> Result<File, StateError> {
        let mut builder = fs::DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o755)
            .create(&self.folder)
            .map_err(failed("create", &self.folder))?;
        let path = self.path(suffix);
        let mut options = File::options();
        options
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open", &path))
    }

    /// What went wrong with a file.
    pub(super) fn failed(&self, action: &'static str, suffix: &str, errno: Errno) -> StateError {
        failed(action, &self.path(suffix))(errno.into())
    }

    /// The state, if there is one.
    pub(super) fn read(&self) -> Result<Option<State>, StateError> {
        let path = self.path(".json");
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(gone) if gone.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", &path)(error)),
        };
        let metadata = file.metadata().map_err(failed("look at", &path))?;
        let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
        if owner != geteuid().as_raw() || mode & 0o077 != 0 {
            return Err(StateError::Open { path, owner, mode });
        }
        let content = |what: String| StateError::Content {
            path: path.clone(),
            what,
        };
        let text = io::read_to_string(file).map_err(failed("read", &path))?;
        let state: State =
            serde_json::from_str(&text).map_err(|error| content(error.to_string()))?;
        if state.version != VERSION {
            return Err(content(format!("version {}", state.version)));
        }
        if state.uplink.device != self.interface {
            return Err(content(format!("it is of {}", state.uplink.device)));
        }
        Ok(Some(state))
    }

    /// Puts a state in the place of the present one.
    pub(super) fn write(&self, state: &State) -> Result<(), StateError> {
        self.write_as(".json", state)
    }

    /// Puts what is to be told in the place of what was told before.
    pub(super) fn write_as(&self, suffix: &str, told: &impl Serialize) -> Result<(), StateError> {
        let text = serde_json::to_vec(told).map_err(io::Error::other);
        let path = self.path(suffix);
        text.and_then(|text| put(&path, &text))
            .map_err(failed("write", &path))
    }

    /// Removes the state. The lock's file stays, for whoever waits for it.
    pub(super) fn remove(&self) -> Result<(), StateError> {
        self.remove_as(".json")
    }

    /// Removes a file, if it is there.
    pub(super) fn remove_as(&self, suffix: &str) -> Result<(), StateError> {
        let path = self.path(suffix);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove", &path)(error))
            }
            _ => Ok(()),
        }
    }
}

/// Writes a file beside the one that it then replaces: a reader sees the old or the new.
fn put(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut next = path.as_os_str().to_owned();
    next.push(".next");
    let mut options = File::options();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&next)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.write_all(content)?;
    fs::rename(&next, path)
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::PermissionDenied => StateError::Permission { action, path },
        _ => StateError::System {
            action,
            path,
            source,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        let line = Line {
            device: "eth0".to_owned(),
            index: 7,
            rate: Some("1mbit".parse().expect("rate")),
            tree: Tree::default(),
            before: Tree::default(),
        };
        State::new(line, None, Leaves::BEST, 1500).expect("state")
    }

    fn store(folder: &Path) -> Store {
        Store {
            folder: folder.to_owned(),
            interface: "eth0".to_owned(),
        }
    }

    #[test]
    fn what_is_written_is_read_by_its_owner_only() {
        let folder = tempfile::tempdir().expect("folder");
        let store = store(folder.path());
        assert_eq!(store.read().expect("none"), None);
        store.write(&state()).expect("written");
        assert_eq!(store.read().expect("one"), Some(state()));
        assert!(state().is_current());
        let path = folder.path().join("eth0.json");
        let mode = fs::metadata(&path).expect("file").mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).expect("mode");
        let error = store.read().expect_err("open to others").to_string();
        assert!(error.contains("mode 0644"), "{error}");
        store.remove().expect("removed");
        assert_eq!(store.read().expect("none"), None);
    }

    #[test]
    fn what_is_no_state_is_not_believed() {
        let folder = tempfile::tempdir().expect("folder");
        let store = store(folder.path());
        let whole = serde_json::to_value(state()).expect("JSON");
        let with = |key: &str, value: serde_json::Value| {
            let mut changed = whole.clone();
            changed[key] = value;
            changed.to_string()
        };
        let mut other = whole.clone();
        other["uplink"]["device"] = "eth1".into();
        for (content, says) in [
            (String::new(), "EOF"),
            ("{}".to_owned(), "missing field"),
            (with("version", 2.into()), "version 2"),
            (with("surprise", 2.into()), "unknown field"),
            (other.to_string(), "it is of eth1"),
        ] {
            let path = folder.path().join("eth0.json");
            put(&path, content.as_bytes()).expect("written");
            let error = store.read().expect_err(says).to_string();
            assert!(error.contains(says) && error.contains("rm "), "{error}");
        }
    }
}
