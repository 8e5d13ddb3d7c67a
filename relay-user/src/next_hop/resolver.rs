//! The task that keeps paths resolved: moves messages between the kernel, the [`Table`] and those
//! who ask. It decides nothing.

use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use super::{
    Notice, Path,
    netlink::{Hint, Kernel, NetlinkError, Notifications},
    table::Table,
};

/// Commands served in one go.
const COMMANDS: usize = 256;

/// Route lookups between two looks at notifications and commands: about a millisecond. More where more
/// is asked for at once, so that every watch is answered in the step that reads it.
const LOOKUPS: usize = 256;

/// Changes that wait in the channel. Further ones wait in the table, where a newer one replaces
/// an older one of the same path.
const NOTICES: usize = 1024;

/// Every change of a watched path after the answer to its first watch. A receiver that is slow gets
/// the latest state of each path, and may miss states in between.
pub type Changes = mpsc::Receiver<Notice>;

/// Asks the resolver. Cheap to clone; the resolver ends when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct NextHops {
    commands: mpsc::Sender<Command>,
}

#[derive(Debug)]
enum Command {
    Watch {
        paths: Vec<Path>,
        answer: oneshot::Sender<Vec<Notice>>,
    },
    Unwatch {
        path: Path,
    },
}

/// The resolver has ended, so nothing keeps next hops current any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the next hop resolver has ended; its own error says why")]
pub struct Stopped;

impl NextHops {
    /// Resolves a path now and keeps watching it. Each watch of a path needs its own
    /// [`NextHops::unwatch`]. To be awaited to its end, or the watch may remain.
    ///
    /// # Errors
    /// When the resolver has ended.
    pub async fn watch(&self, path: Path) -> Result<Notice, Stopped> {
        self.watch_all(vec![path]).await?.pop().ok_or(Stopped)
    }

    /// The same with several paths, in less time than one after the other. One that is named twice is
    /// watched twice.
    ///
    /// # Errors
    /// When the resolver has ended.
    pub async fn watch_all(&self, paths: Vec<Path>) -> Result<Vec<Notice>, Stopped> {
        let (answer, notices) = oneshot::channel();
        let command = Command::Watch { paths, answer };
        self.commands.send(command).await.map_err(|_| Stopped)?;
        notices.await.map_err(|_| Stopped)
    }

    /// Ends one watch. Changes of the path that are in the channel already still arrive.
    ///
    /// # Errors
    /// When the resolver has ended.
    pub async fn unwatch(&self, path: Path) -> Result<(), Stopped> {
        let command = Command::Unwatch { path };
        self.commands.send(command).await.map_err(|_| Stopped)
    }
}

/// Keeps the watched paths of one interface resolved. Runs as a task of its own.
pub struct Resolver {
    kernel: Kernel,
    notifications: Notifications,
    table: Table,
    commands: mpsc::Receiver<Command>,
    notices: mpsc::Sender<Notice>,
}

/// Prepares a resolver for streams that leave through the interface of this index, in the network
/// namespace of the calling thread. To be called within a Tokio runtime.
///
/// # Errors
/// When the kernel's sockets cannot be opened or the interfaces not be listed.
pub fn open(interface: u32) -> Result<(NextHops, Resolver, Changes), NetlinkError> {
    // Subscribed before anything is read, so no change falls in between.
    let notifications = Notifications::open()?;
    let mut kernel = Kernel::open()?;
    let now = Instant::now();
    let mut table = Table::new(interface, now);
    table.interfaces(kernel.interfaces()?);
    let (commands_in, commands) = mpsc::channel(COMMANDS);
    let (notices, changes) = mpsc::channel(NOTICES);
    let resolver = Resolver {
        kernel,
        notifications,
        table,
        commands,
        notices,
    };
    Ok((
        NextHops {
            commands: commands_in,
        },
        resolver,
        changes,
    ))
}

impl Resolver {
    /// Runs until all [`NextHops`] or the receiver of changes are dropped.
    ///
    /// # Errors
    /// When the attached interface is removed, or the kernel's sockets fail. Next hops are then no
    /// longer kept current.
    pub async fn run(mut self) -> Result<(), NetlinkError> {
        let mut hints = Vec::new();
        let mut commands = Vec::new();
        loop {
            let deadline = self.table.deadline().into();
            tokio::select! {
                read = self.notifications.read(&mut hints) => read?,
                count = self.commands.recv_many(&mut commands, COMMANDS) => {
                    if count == 0 {
                        return Ok(());
                    }
                }
                permit = self.notices.reserve(), if self.table.has_notices() => match permit {
                    Ok(permit) => if let Some((path, resolution)) = self.table.next_notice() {
                        let serial = self.table.serial(path);
                        permit.send(Notice { path, serial, resolution });
                    },
                    Err(_) => return Ok(()),
                },
                () = tokio::time::sleep_until(deadline) => {}
            }
            self.step(&mut hints, &mut commands)?;
            if let Some(name) = self.table.attached_gone() {
                return Err(NetlinkError::InterfaceGone(name.to_owned()));
            }
            // A long pass finds some branch ready each time, and would keep the others out.
            tokio::task::yield_now().await;
        }
    }

    fn step(
        &mut self,
        hints: &mut Vec<Hint>,
        commands: &mut Vec<Command>,
    ) -> Result<(), NetlinkError> {
        let now = Instant::now();
        if hints.contains(&Hint::Lost) {
            tracing::warn!("netlink notifications were lost; reading everything again");
            self.table.interfaces(self.kernel.interfaces()?);
        }
        // A route that flaps is one change.
        hints.sort_unstable();
        hints.dedup();
        for hint in hints.drain(..) {
            self.table.hint(hint);
        }
        let mut asked = Vec::new();
        for command in commands.drain(..) {
            match command {
                Command::Watch { paths, answer } => {
                    for path in &paths {
                        self.table.watch(*path);
                    }
                    asked.push((paths, answer));
                }
                Command::Unwatch { path } => self.table.unwatch(path),
            }
        }
        for index in self.table.links_due() {
            self.table.link_answer(index, self.kernel.interface(index)?);
        }
        let watched: usize = asked.iter().map(|(paths, _)| paths.len()).sum();
        let paths = self.table.lookups_due(now, LOOKUPS.max(watched));
        let routes = self.kernel.routes(&paths);
        self.table
            .route_answers(paths.into_iter().zip(routes), Instant::now());
        let keys = self.table.reads_due(LOOKUPS);
        for (key, entry) in keys.iter().zip(self.kernel.neighbours(&keys)) {
            self.table.neighbour_answer(*key, entry, now);
        }
        let keys = self.table.uses_due(now);
        self.kernel.use_neighbours(&keys);
        // Some states that a use leads to are not notified, such as NUD_NOARP at once.
        for (key, entry) in keys.iter().zip(self.kernel.neighbours(&keys)) {
            self.table.neighbour_answer(*key, entry, now);
        }
        for (paths, answer) in asked {
            let notices = paths.iter().map(|&path| {
                let serial = self.table.serial(path);
                let resolution = self.table.answer(path)?;
                Some(Notice {
                    path,
                    serial,
                    resolution,
                })
            });
            if let Some(notices) = notices.collect()
                && answer.send(notices).is_err()
            {
                for path in paths {
                    self.table.unwatch(path);
                }
            }
        }
        while self.table.has_notices() {
            let Ok(permit) = self.notices.try_reserve() else {
                break;
            };
            let Some((path, resolution)) = self.table.next_notice() else {
                break;
            };
            let serial = self.table.serial(path);
            permit.send(Notice {
                path,
                serial,
                resolution,
            });
        }
        Ok(())
    }
}
