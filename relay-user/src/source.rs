//! Where `list`, `show`, `stats` and `top` have their answers from: the daemon or, when none answers,
//! the maps that it has left pinned.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    control::{
        client::{Client, ClientError, Text},
        model::{ApiError, PairReport},
        socket::{self, DiscoveryError},
    },
    datapath::{DatapathError, PinnedMaps, pinned_interfaces},
    snapshot::Snapshot,
    stats::{self, Totals},
};

/// The daemon answers within 10 s, or says that it is busy: one that does neither hangs.
const PATIENCE: Duration = Duration::from_secs(11);

/// A daemon, or what it has left.
#[derive(Debug)]
pub struct Source {
    socket: Option<PathBuf>,
    interface: Option<String>,
}

/// What was found, and where.
#[derive(Debug)]
pub struct Found<T> {
    /// The answer.
    pub answer: T,
    /// Why it is not the daemon's; none where it is.
    pub instead: Option<Instead>,
}

/// Why an answer comes from the pinned maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instead {
    /// Why no daemon answered.
    pub absence: String,
    /// Folder of the maps.
    pub pins: PathBuf,
}

impl fmt::Display for Instead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}; read from the maps in {}, which know neither the PBX's names nor refused calls",
            self.absence,
            self.pins.display()
        )
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No daemon can be found.
    #[error(transparent)]
    Discovery(#[from] DiscoveryError),
    /// The daemon does not answer, or refuses.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The pinned maps cannot be read.
    #[error("{absence}; and its pinned maps cannot be read")]
    Maps {
        /// Why no daemon answered.
        absence: String,
        /// What is wrong with the maps.
        source: DatapathError,
    },
    /// Nobody says which maps to read.
    #[error("no relay daemon answers, and there are pinned maps of {}: choose with --interface", .0.join(", "))]
    Several(Vec<String>),
}

impl SourceError {
    /// Whether the daemon is away, so that what it has left may be looked at. One that refuses, or is
    /// of another version, is not.
    #[must_use]
    pub fn is_absence(&self) -> bool {
        match self {
            Self::Discovery(DiscoveryError::None | DiscoveryError::AllGone(_)) => true,
            Self::Client(error) => matches!(
                error,
                ClientError::NoDaemon(_)
                    | ClientError::Gone(_)
                    | ClientError::Silent(_)
                    | ClientError::Broken { .. }
            ),
            _ => false,
        }
    }
}

impl Source {
    /// The daemon behind this socket, or of this interface, or the only one.
    #[must_use]
    pub fn new(socket: Option<&Path>, interface: Option<&str>) -> Self {
        Self {
            socket: socket.map(Into::into),
            interface: interface.map(Into::into),
        }
    }

    /// A client of the daemon.
    ///
    /// # Errors
    /// [`SourceError::Discovery`].
    pub fn client(&self) -> Result<Client, SourceError> {
        let socket = socket::find(self.socket.as_deref(), self.interface.as_deref())?;
        Ok(Client::new(socket).with_patience(PATIENCE))
    }

    /// Every pair.
    ///
    /// # Errors
    /// Every [`SourceError`].
    pub async fn pairs(&self) -> Result<Found<Vec<PairReport>>, SourceError> {
        let asked = async { Ok(self.client()?.list().await?.pairs) }.await;
        self.or_maps(asked, Snapshot::pairs)
    }

    /// Every pair, in the JSON that the daemon writes, unread; none where no daemon answers.
    ///
    /// # Errors
    /// [`SourceError::Discovery`] and [`SourceError::Client`].
    pub async fn pairs_text(&self) -> Result<Option<Text>, SourceError> {
        let asked: Result<_, SourceError> = async { Ok(self.client()?.list_text().await?) }.await;
        match asked {
            Err(error) if error.is_absence() => Ok(None),
            asked => asked.map(Some),
        }
    }

    /// One pair.
    ///
    /// # Errors
    /// Every [`SourceError`].
    pub async fn pair(&self, id: u64) -> Result<Found<PairReport>, SourceError> {
        let asked = async { Ok(Some(self.client()?.show(id).await?)) }.await;
        let found = self.or_maps(asked, |snapshot| {
            snapshot.pairs().into_iter().find(|pair| pair.id == id)
        })?;
        let unknown = || SourceError::Client(ApiError::unknown_pair(id).into());
        Ok(Found {
            answer: found.answer.ok_or_else(unknown)?,
            instead: found.instead,
        })
    }

    /// Packets by reason.
    ///
    /// # Errors
    /// Every [`SourceError`].
    pub async fn totals(&self) -> Result<Found<Totals>, SourceError> {
        let asked = async {
            let status = self.client()?.status().await?;
            Ok(Totals {
                interface: status.interface,
                at: crate::clock::monotonic_now(),
                reasons: status.reasons,
            })
        };
        self.or_maps(asked.await, |snapshot| Totals {
            interface: snapshot.interface.clone(),
            at: snapshot.taken.monotonic,
            reasons: stats::reasons(&snapshot.counters),
        })
    }

    /// The daemon's answer or, where it is away and has left maps, what they say.
    fn or_maps<T>(
        &self,
        asked: Result<T, SourceError>,
        read: impl FnOnce(&Snapshot) -> T,
    ) -> Result<Found<T>, SourceError> {
        let absence = match asked {
            Ok(answer) => {
                return Ok(Found {
                    answer,
                    instead: None,
                });
            }
            Err(error) if error.is_absence() => error,
            Err(error) => return Err(error),
        };
        let Some(interface) = self.pinned()? else {
            return Err(absence);
        };
        let absence = absence.to_string();
        let maps = PinnedMaps::open(&interface).and_then(|maps| {
            let snapshot = Snapshot::take(&maps)?;
            Ok((maps.directory(), snapshot))
        });
        match maps {
            Ok((pins, snapshot)) => Ok(Found {
                answer: read(&snapshot),
                instead: Some(Instead { absence, pins }),
            }),
            Err(source) => Err(SourceError::Maps { absence, source }),
        }
    }

    /// Whose pinned maps to read: those of the interface, or the only ones; none where there are none.
    ///
    /// # Errors
    /// [`SourceError::Several`].
    pub fn pinned(&self) -> Result<Option<String>, SourceError> {
        choose(
            pinned_interfaces(),
            self.interface.as_deref(),
            self.socket.as_deref(),
        )
    }
}

/// The interface named, else the one that the socket has its name from, else the only one.
fn choose(
    mut pinned: Vec<String>,
    interface: Option<&str>,
    socket: Option<&Path>,
) -> Result<Option<String>, SourceError> {
    let named = interface.or_else(|| {
        let stem = socket?.file_stem()?.to_str()?;
        pinned
            .iter()
            .any(|interface| interface == stem)
            .then_some(stem)
    });
    match named {
        Some(named) => Ok(pinned.into_iter().find(|interface| interface == named)),
        None if pinned.len() > 1 => Err(SourceError::Several(pinned)),
        None => Ok(pinned.pop()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_chosen_as_daemons_are() {
        let two = || vec!["eth0".to_owned(), "eth1".to_owned()];
        let one = || vec!["eth0".to_owned()];
        let chosen = |pinned, interface, socket: Option<&str>| {
            choose(pinned, interface, socket.map(Path::new)).map_err(|error| error.to_string())
        };
        let eth = |name: &str| Ok(Some(name.to_owned()));
        assert_eq!(chosen(one(), None, None), eth("eth0"));
        assert_eq!(chosen(two(), Some("eth1"), None), eth("eth1"));
        assert_eq!(chosen(two(), Some("eth2"), None), Ok(None));
        assert_eq!(
            chosen(two(), None, Some("/run/relay-user/eth1.sock")),
            eth("eth1")
        );
        assert_eq!(chosen(one(), None, Some("/tmp/socket")), eth("eth0"));
        assert_eq!(chosen(Vec::new(), None, None), Ok(None));
        let error = chosen(two(), None, Some("/tmp/socket")).expect_err("several");
        assert!(
            error.contains("eth0, eth1") && error.contains("--interface"),
            "{error}"
        );
    }

    #[test]
    fn only_a_daemon_that_is_away_is_replaced_by_its_maps() {
        let refused = SourceError::Client(ApiError::unknown_pair(7).into());
        assert!(!refused.is_absence());
        assert!(!SourceError::Client(ClientError::Denied("/x".into())).is_absence());
        assert!(!SourceError::Discovery(DiscoveryError::Several(vec![])).is_absence());
        assert!(SourceError::Client(ClientError::Gone("/x".into())).is_absence());
        assert!(SourceError::Discovery(DiscoveryError::None).is_absence());
    }
}
