//! The control socket: where it is, how a daemon claims it, and how a client finds it.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{
            fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    libc,
    sys::{
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
        },
        stat::{Mode, fchmod},
    },
};

/// Where daemons put their sockets unless told otherwise.
pub const FOLDER: &str = "/run/relay-user";

/// The default socket of an interface's daemon.
pub fn of_interface(interface: &str) -> PathBuf {
    in_folder(Path::new(FOLDER), interface)
}

fn in_folder(folder: &Path, interface: &str) -> PathBuf {
    folder.join(format!("{interface}.sock"))
}

/// What is at a path where a control socket is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occupant {
    /// A socket that somebody listens on.
    Daemon,
    /// The socket of a process that is gone.
    Leftover,
    /// Nothing.
    Nothing,
    /// Something that is no socket.
    Other,
}

/// Why a control socket could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another daemon listens there.
    #[error("a relay daemon already listens on {path}: end it with `relay-user detach IFACE --socket {path}`, or choose another --socket", path = .0.display())]
    Taken(PathBuf),
    /// Something else is in its place, and it is not ours to delete.
    #[error("{} is there already and is no socket: move it away, or choose another --socket", .0.display())]
    NotASocket(PathBuf),
    /// Its folder does not exist.
    #[error("the folder {} does not exist: create it, or choose another --socket", .0.display())]
    NoFolder(PathBuf),
    /// Longer than a socket's address can be (unix(7)).
    #[error("the socket path {} is too long: the kernel takes 107 bytes; choose a shorter --socket", .0.display())]
    TooLong(PathBuf),
    /// Not a file's path.
    #[error("{} names no file: choose another --socket", .0.display())]
    NoName(PathBuf),
    /// Anything else.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A listening control socket that only its owner can connect to. Dropping it removes it.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    inode: (u64, u64),
}

impl ControlSocket {
    /// Listens on `path`. A socket whose daemon is gone is replaced; one that is in use never is.
    /// [`FOLDER`] is created when it is missing, any other folder is not.
    ///
    /// # Errors
    /// Every [`SocketError`].
    pub fn claim(path: &Path) -> Result<Self, SocketError> {
        let failed = |action| {
            move |source: io::Error| SocketError::System {
                action,
                path: path.to_owned(),
                source,
            }
        };
        let address = address(path)?;
        let folder = match path.parent() {
            Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
            Some(folder) => folder,
            None => return Err(SocketError::NoName(path.to_owned())),
        };
        if folder == Path::new(FOLDER) {
            create(folder).map_err(|source| SocketError::System {
                action: "create",
                path: folder.to_owned(),
                source,
            })?;
        } else if !folder.is_dir() {
            return Err(SocketError::NoFolder(folder.to_owned()));
        }
        let _lock = Lock::take(path)?;
        match occupant(path).map_err(failed("look at"))? {
            Occupant::Daemon => return Err(SocketError::Taken(path.to_owned())),
            Occupant::Other => return Err(SocketError::NotASocket(path.to_owned())),
            Occupant::Leftover => fs::remove_file(path).map_err(failed("remove"))?,
            Occupant::Nothing => {}
        }
        let listener =
            listen_private(&address).map_err(|error| failed("listen on")(error.into()))?;
        let inode = inode(path).map_err(failed("look at"))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            inode,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The listener, non-blocking.
    pub(super) fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // While we still listen nobody replaces our socket, so what is checked is what is removed.
        if inode(&self.path).is_ok_and(|inode| inode == self.inode)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(socket = %self.path.display(), %error, "cannot remove the control socket");
        }
    }
}

/// Removes the socket of a daemon that is gone; one in use, and anything else, is left alone.
///
/// # Errors
/// [`SocketError::System`], and [`SocketError::TooLong`].
pub fn remove_leftover(path: &Path) -> Result<(), SocketError> {
    let failed = |action| {
        move |source: io::Error| SocketError::System {
            action,
            path: path.to_owned(),
            source,
        }
    };
    if occupant(path).map_err(failed("look at"))? != Occupant::Leftover {
        return Ok(());
    }
    let _lock = Lock::take(path)?;
    // Again, because a daemon may have replaced it before the lock was ours.
    if occupant(path).map_err(failed("look at"))? == Occupant::Leftover {
        fs::remove_file(path).map_err(failed("remove"))?;
    }
    Ok(())
}

/// Looks at what is at `path`, by connecting to it.
///
/// # Errors
/// What the kernel says, above all "permission denied" to who may not connect.
pub fn occupant(path: &Path) -> io::Result<Occupant> {
    let kind = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Occupant::Nothing),
        Err(error) => return Err(error),
    };
    // Connecting to a plain file fails like connecting to a socket nobody listens on.
    if !kind.is_socket() {
        return Ok(Occupant::Other);
    }
    match connect(stream()?.as_raw_fd(), &UnixAddr::new(path)?) {
        // EAGAIN: it listens, and its queue of connections is full (unix(7)).
        Ok(()) | Err(Errno::EAGAIN) => Ok(Occupant::Daemon),
        Err(Errno::ECONNREFUSED) => Ok(Occupant::Leftover),
        Err(Errno::ENOENT) => Ok(Occupant::Nothing),
        Err(error) => Err(error.into()),
    }
}

fn address(path: &Path) -> Result<UnixAddr, SocketError> {
    UnixAddr::new(path).map_err(|error| match error {
        Errno::ENAMETOOLONG => SocketError::TooLong(path.to_owned()),
        error => SocketError::System {
            action: "listen on",
            path: path.to_owned(),
            source: error.into(),
        },
    })
}

fn stream() -> nix::Result<OwnedFd> {
    socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )
}

fn listen_private(address: &UnixAddr) -> nix::Result<UnixListener> {
    let socket = stream()?;
    // bind(2) gives the file the mode of the unbound socket (unix_bind_bsd in net/unix/af_unix.c),
    // so there is no moment at which others could connect.
    fchmod(socket.as_fd(), Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), address)?;
    listen(&socket, Backlog::new(64)?)?;
    Ok(socket.into())
}

fn create(folder: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o755).create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        outcome => outcome,
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Held while a socket's path is looked at and changed, so that two daemons that start at once
/// cannot both find the same leftover and one then remove the other's socket.
struct Lock {
    path: PathBuf,
    _file: Flock<fs::File>,
}

impl Lock {
    fn take(socket: &Path) -> Result<Self, SocketError> {
        let name = socket
            .file_name()
            .ok_or_else(|| SocketError::NoName(socket.to_owned()))?;
        let mut lock_name = name.to_owned();
        lock_name.push(".lock");
        let path = socket.with_file_name(lock_name);
        let failed = |source: io::Error| SocketError::System {
            action: "lock",
            path: path.clone(),
            source,
        };
        loop {
            // For its owner alone, or anybody could hold the lock and keep daemons from starting.
            let file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)
                .map_err(failed)?;
            let file = Flock::lock(file, FlockArg::LockExclusive)
                .map_err(|(_, error)| failed(error.into()))?;
            let locked = file.metadata().map_err(failed)?;
            // Its last holder has removed it: others now lock a new file.
            if inode(&path).is_ok_and(|inode| inode == (locked.dev(), locked.ino())) {
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Still locked here; whoever waits for it sees that it is gone and takes a new one.
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(lock = %self.path.display(), %error, "cannot remove the lock");
        }
    }
}

/// Why a client finds no daemon to talk to.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiscoveryError {
    /// No socket at all.
    #[error("no relay daemon runs here: start one with `relay-user attach IFACE`")]
    None,
    /// Sockets, but nobody listens.
    #[error("the relay daemon of {} is gone: start it again with `relay-user attach IFACE`, or remove what it left with `relay-user detach IFACE`", .0.join(", "))]
    AllGone(Vec<String>),
    /// More than one.
    #[error("several relay daemons run here, on {}: choose one with --interface", .0.join(", "))]
    Several(Vec<String>),
}

/// Finds the socket to talk to: the one named, else the interface's, else the only one there is.
///
/// # Errors
/// Every [`DiscoveryError`].
pub fn find(named: Option<&Path>, interface: Option<&str>) -> Result<PathBuf, DiscoveryError> {
    find_in(Path::new(FOLDER), named, interface)
}

fn find_in(
    folder: &Path,
    named: Option<&Path>,
    interface: Option<&str>,
) -> Result<PathBuf, DiscoveryError> {
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    if let Some(interface) = interface {
        return Ok(in_folder(folder, interface));
    }
    let mut running = Vec::new();
    let mut gone = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(interface) = name.to_str().and_then(|name| name.strip_suffix(".sock")) else {
            continue;
        };
        match occupant(&entry.path()) {
            Ok(Occupant::Leftover) => gone.push(interface.to_owned()),
            Ok(Occupant::Nothing | Occupant::Other) => {}
            // An error is for the connection to tell: permission denied, say.
            Ok(Occupant::Daemon) | Err(_) => running.push(interface.to_owned()),
        }
    }
    running.sort_unstable();
    gone.sort_unstable();
    match running.as_slice() {
        [only] => Ok(in_folder(folder, only)),
        [] if gone.is_empty() => Err(DiscoveryError::None),
        [] => Err(DiscoveryError::AllGone(gone)),
        _ => Err(DiscoveryError::Several(running)),
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, sync::Barrier, thread};

    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().expect("temporary directory")
    }

    fn leftover(path: &Path) {
        drop(UnixListener::bind(path).expect("socket"));
        assert_eq!(occupant(path).expect("socket"), Occupant::Leftover);
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .expect("folder")
            .map(|entry| {
                entry
                    .expect("entry")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn the_socket_is_private_and_goes_with_its_owner() {
        let folder = folder();
        let path = folder.path().join("eth0.sock");
        let socket = ControlSocket::claim(&path).expect("claim");
        assert_eq!(fs::metadata(&path).expect("socket").mode() & 0o7777, 0o600);
        assert_eq!(occupant(&path).expect("socket"), Occupant::Daemon);
        assert_eq!(names(folder.path()), ["eth0.sock"]);
        drop(socket);
        assert_eq!(names(folder.path()), [""; 0]);
    }

    #[test]
    fn a_live_socket_is_refused_and_left_alone() {
        let folder = folder();
        let path = folder.path().join("eth0.sock");
        let first = ControlSocket::claim(&path).expect("claim");
        let before = inode(&path).expect("socket");
        let error = ControlSocket::claim(&path)
            .expect_err("second daemon")
            .to_string();
        assert!(error.contains("already listens on"), "{error}");
        assert_eq!(inode(&path).expect("socket"), before);
        // Also when its queue is full, so that connecting neither succeeds nor is refused.
        let mut queue = Vec::new();
        loop {
            let stream = stream().expect("socket");
            match connect(stream.as_raw_fd(), &UnixAddr::new(&path).expect("address")) {
                Ok(()) => queue.push(stream),
                Err(error) => break assert_eq!(error, Errno::EAGAIN),
            }
        }
        assert!(matches!(
            ControlSocket::claim(&path),
            Err(SocketError::Taken(_))
        ));
        drop(first);
    }

    #[test]
    fn a_leftover_is_replaced() {
        let folder = folder();
        let path = folder.path().join("eth0.sock");
        leftover(&path);
        let socket = ControlSocket::claim(&path).expect("claim");
        UnixStream::connect(socket.path()).expect("connect");
    }

    #[test]
    fn of_daemons_starting_at_once_exactly_one_wins() {
        for _ in 0..50 {
            let folder = folder();
            let path = folder.path().join("eth0.sock");
            leftover(&path);
            let barrier = Barrier::new(4);
            let sockets: Vec<_> = thread::scope(|scope| {
                let claim = || {
                    barrier.wait();
                    ControlSocket::claim(&path)
                };
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(claim)).collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().expect("thread"))
                    .collect()
            });
            assert_eq!(
                sockets.iter().filter(|socket| socket.is_ok()).count(),
                1,
                "{sockets:?}"
            );
            assert_eq!(occupant(&path).expect("socket"), Occupant::Daemon);
            assert_eq!(names(folder.path()), ["eth0.sock"]);
        }
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let folder = folder();
        let path = folder.path().join("eth0.sock");
        fs::write(&path, "precious").expect("file");
        assert!(matches!(
            ControlSocket::claim(&path),
            Err(SocketError::NotASocket(_))
        ));
        remove_leftover(&path).expect("nothing to remove");
        assert_eq!(fs::read_to_string(&path).expect("file"), "precious");
        let link = folder.path().join("link.sock");
        std::os::unix::fs::symlink(&path, &link).expect("link");
        assert!(matches!(
            ControlSocket::claim(&link),
            Err(SocketError::NotASocket(_))
        ));
    }

    #[test]
    fn bad_paths_are_named() {
        let folder = folder();
        let long = folder.path().join("x".repeat(108));
        for (path, fragment) in [
            (long.as_path(), "too long"),
            (
                &folder.path().join("none/eth0.sock"),
                "does not exist: create it",
            ),
            (Path::new("/"), "names no file"),
        ] {
            let error = ControlSocket::claim(path).expect_err(fragment).to_string();
            assert!(error.contains(fragment), "{error}");
        }
    }

    #[test]
    fn only_a_leftover_is_removed() {
        let folder = folder();
        let path = folder.path().join("eth0.sock");
        remove_leftover(&path).expect("nothing");
        leftover(&path);
        remove_leftover(&path).expect("leftover");
        assert_eq!(names(folder.path()), [""; 0]);
        let socket = ControlSocket::claim(&path).expect("claim");
        remove_leftover(&path).expect("live");
        assert!(socket.path().exists());
    }

    #[test]
    fn a_client_finds_its_daemon() {
        let folder = folder();
        let find = |named, interface| find_in(folder.path(), named, interface);
        let at = |interface| in_folder(folder.path(), interface);
        let missing = folder.path().join("none");
        assert_eq!(find_in(&missing, None, None), Err(DiscoveryError::None));
        assert_eq!(find(None, None), Err(DiscoveryError::None));
        leftover(&at("eth9"));
        assert_eq!(
            find(None, None),
            Err(DiscoveryError::AllGone(vec!["eth9".into()]))
        );
        let _first = ControlSocket::claim(&at("eth1")).expect("claim");
        assert_eq!(find(None, None), Ok(at("eth1")));
        let _second = ControlSocket::claim(&at("eth0")).expect("claim");
        assert_eq!(
            find(None, None),
            Err(DiscoveryError::Several(vec!["eth0".into(), "eth1".into()]))
        );
        assert_eq!(find(None, Some("eth0")), Ok(at("eth0")));
        assert_eq!(find(Some(Path::new("/x")), None), Ok("/x".into()));
    }
}
