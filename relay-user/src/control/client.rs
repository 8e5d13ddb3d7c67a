//! The client side of the control API.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response,
    body::{Bytes, Incoming},
    client::conn::http1,
    header,
};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{
    net::UnixStream,
    time::{sleep, timeout},
};

use super::{
    model::{
        AddAllReport, AddAllRequest, AddRequest, AddResult, ApiError, Detached, ErrorBody,
        PairList, PairReport, StatusReport,
    },
    socket::{self, Occupant},
};
use crate::{events::Event, pair::Pair};

/// Longer than the server takes for any answer, so that its own words arrive first.
const PATIENCE: Duration = Duration::from_secs(40);
/// Longer than any line that the daemon sends as an event.
const LONGEST_LINE: usize = 64 * 1024;
/// How long an ending daemon has to give its socket up.
const ENDING: Duration = Duration::from_secs(10);

/// Talks to the daemon behind one socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    patience: Duration,
}

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no socket.
    #[error("no relay daemon listens on {}: start one with `relay-user attach IFACE`", .0.display())]
    NoDaemon(PathBuf),
    /// A socket, but nobody listens.
    #[error("the relay daemon of {} is gone: start it again with `relay-user attach IFACE`, or remove what it left with `relay-user detach IFACE`", .0.display())]
    Gone(PathBuf),
    /// The socket is somebody else's.
    #[error("not allowed to connect to {}: run this as root, or as the daemon's own user", .0.display())]
    Denied(PathBuf),
    /// Connecting failed otherwise.
    #[error("cannot connect to {path}: {source}", path = path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The connection broke before the answer was complete.
    #[error("the relay daemon of {path} broke off: {source}; look at its log", path = path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What happened.
        source: hyper::Error,
    },
    /// An answer that this API does not give.
    #[error("what listens on {path} does not answer like a relay daemon of this version ({what}): check --socket, and that the daemon was restarted after an upgrade", path = path.display())]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What is wrong with the answer.
        what: String,
    },
    /// No answer.
    #[error("the relay daemon of {} does not answer: look at its log, and end it with SIGTERM if it hangs", .0.display())]
    Silent(PathBuf),
    /// A detach was answered, but the daemon goes on.
    #[error("the relay daemon of {} has detached but does not end: look at its log", .0.display())]
    Lingers(PathBuf),
    /// The daemon refused.
    #[error(transparent)]
    Refused(#[from] ApiError),
}

impl Client {
    /// A client of the daemon behind this socket. Connects with each request.
    pub const fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            patience: PATIENCE,
        }
    }

    /// How long a whole request may take.
    #[must_use]
    pub const fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Adds a pair; returns it as it then stands.
    ///
    /// # Errors
    /// Every [`ClientError`], as in all other requests.
    pub async fn add(&self, pair: &Pair) -> Result<PairReport, ClientError> {
        let body = serde_json::to_vec(&AddRequest::from(pair))
            .map_err(|error| self.answer_error(error.to_string()))?;
        self.request(Method::POST, "/v1/pairs", body).await
    }

    /// Adds several pairs, at most [`BATCH`](super::model::BATCH), in a fraction of the time that they
    /// would take one by one. Returns their numbers, or why they were refused, in the same order.
    ///
    /// # Errors
    /// Every [`ClientError`].
    pub async fn add_all(&self, pairs: &[Pair]) -> Result<Vec<Result<u64, ApiError>>, ClientError> {
        let request = AddAllRequest {
            pairs: pairs.iter().map(AddRequest::from).collect(),
        };
        let body =
            serde_json::to_vec(&request).map_err(|error| self.answer_error(error.to_string()))?;
        let report: AddAllReport = self.request(Method::POST, "/v1/pairs/batch", body).await?;
        if report.results.len() != pairs.len() {
            return Err(self.answer_error("not one result for each pair".to_owned()));
        }
        let results = report.results.into_iter();
        results
            .map(|result| match result {
                AddResult { id: Some(id), .. } => Ok(Ok(id)),
                AddResult {
                    error: Some(error), ..
                } => Ok(Err(error)),
                _ => Err(self.answer_error("a result that is none".to_owned())),
            })
            .collect()
    }

    /// Takes a pair back; returns it as it last was.
    ///
    /// # Errors
    /// Every [`ClientError`].
    pub async fn remove(&self, id: u64) -> Result<PairReport, ClientError> {
        self.request(Method::DELETE, &format!("/v1/pairs/{id}"), Vec::new())
            .await
    }

    /// Takes every pair back; returns them as they last were.
    ///
    /// # Errors
    /// Every [`ClientError`].
    pub async fn flush(&self) -> Result<PairList, ClientError> {
        self.request(Method::DELETE, "/v1/pairs", Vec::new()).await
    }

    /// Every pair.
    ///
    /// # Errors
    /// Every [`ClientError`].
    pub async fn list(&self) -> Result<PairList, ClientError> {
        self.request(Method::GET, "/v1/pairs", Vec::new()).await
    }

    /// Every pair, in the JSON that the daemon writes, unread.
    ///
    /// # Errors
    /// Every [`ClientError`].
    pub async fn list_text(&self) -> Result<Text, ClientError> {
        let sent = timeout(
            self.patience,
            self.send(Method::GET, "/v1/pairs", Vec::new()),
        );
        let response = sent
            .await
            .map_err(|_| ClientError::Silent(self.socket.clone()))??;
        Ok(Text {
            client: self.clone(),
            body: response.into_body(),
        })
    }

    /// One pair.
    ///
    /// # Errors
    /// Every [`ClientError`].
    pub async fn show(&self, id: u64) -> Result<PairReport, ClientError> {
        self.request(Method::GET, &format!("/v1/pairs/{id}"), Vec::new())
            .await
    }

    /// The daemon itself.
    ///
    /// # Errors
    /// Every [`ClientError`].
    pub async fn status(&self) -> Result<StatusReport, ClientError> {
        self.request(Method::GET, "/v1/status", Vec::new()).await
    }

    /// What happens from now on, or after event number `since`.
    ///
    /// # Errors
    /// Every [`ClientError`].
    pub async fn events(&self, since: Option<u64>) -> Result<Events, ClientError> {
        let path = match since {
            Some(since) => format!("/v1/events?since={since}"),
            None => "/v1/events".to_owned(),
        };
        let response = timeout(PATIENCE, self.send(Method::GET, &path, Vec::new()))
            .await
            .map_err(|_| ClientError::Silent(self.socket.clone()))??;
        let kind = response.headers().get(header::CONTENT_TYPE);
        if kind.is_none_or(|kind| kind != "text/event-stream") {
            return Err(self.answer_error("no stream of events".to_owned()));
        }
        Ok(Events {
            client: self.clone(),
            body: response.into_body(),
            received: Vec::new(),
        })
    }

    /// Ends the daemon; returns when its socket is free for the next.
    ///
    /// # Errors
    /// Every [`ClientError`].
    pub async fn detach(&self) -> Result<Detached, ClientError> {
        let detached = self.request(Method::POST, "/v1/detach", Vec::new()).await?;
        let freed = async {
            while socket::occupant(&self.socket).is_ok_and(|it| it == Occupant::Daemon) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(ENDING, freed)
            .await
            .map_err(|_| ClientError::Lingers(self.socket.clone()))?;
        Ok(detached)
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, ClientError> {
        timeout(self.patience, self.exchange(method, path, body))
            .await
            .map_err(|_| ClientError::Silent(self.socket.clone()))?
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, ClientError> {
        let body = self.collect(self.send(method, path, body).await?).await?;
        serde_json::from_slice(&body).map_err(|error| self.answer_error(error.to_string()))
    }

    /// Sends a request on a connection of its own; returns the answer if it is a success.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| self.connect_error(error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken(error))?;
        // It ends with the answer. How it ended, who reads the answer learns too.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| self.answer_error(error.to_string()))?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| self.broken(error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = self.collect(response).await?;
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(body) => Err(body.error.into()),
            Err(_) => Err(self.answer_error(format!("HTTP status {status}"))),
        }
    }

    async fn collect(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = response.into_body().collect().await;
        Ok(body.map_err(|error| self.broken(error))?.to_bytes())
    }

    fn broken(&self, source: hyper::Error) -> ClientError {
        ClientError::Broken {
            path: self.socket.clone(),
            source,
        }
    }

    fn connect_error(&self, source: io::Error) -> ClientError {
        let path = self.socket.clone();
        match source.kind() {
            io::ErrorKind::NotFound => ClientError::NoDaemon(path),
            // Reset: it ended before it got to us in its queue.
            io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => {
                ClientError::Gone(path)
            }
            io::ErrorKind::PermissionDenied => ClientError::Denied(path),
            _ => ClientError::Connect { path, source },
        }
    }

    fn answer_error(&self, what: String) -> ClientError {
        ClientError::Answer {
            path: self.socket.clone(),
            what,
        }
    }
}

/// An answer as it arrives.
#[derive(Debug)]
pub struct Text {
    client: Client,
    body: Incoming,
}

impl Text {
    /// The next part of it; none at the end.
    ///
    /// # Errors
    /// [`ClientError::Broken`] and [`ClientError::Silent`].
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            let frame = timeout(self.client.patience, self.body.frame())
                .await
                .map_err(|_| ClientError::Silent(self.client.socket.clone()))?;
            match frame {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                Some(Err(error)) => return Err(self.client.broken(error)),
                None => return Ok(None),
            }
        }
    }
}

/// What the daemon tells as it happens.
#[derive(Debug)]
pub struct Events {
    client: Client,
    body: Incoming,
    /// What follows the last whole line.
    received: Vec<u8>,
}

impl Events {
    /// The next event; none when the daemon has ended.
    ///
    /// # Errors
    /// [`ClientError::Broken`], [`ClientError::Silent`] and [`ClientError::Answer`].
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            while let Some(line) = self.line() {
                // The data repeats number and kind; a comment says only that the daemon lives.
                if let Some(data) = line.strip_prefix(b"data:") {
                    let event = serde_json::from_slice(data)
                        .map_err(|error| self.client.answer_error(error.to_string()))?;
                    return Ok(Some(event));
                }
            }
            if self.received.len() > LONGEST_LINE {
                let what = "an event without end".to_owned();
                return Err(self.client.answer_error(what));
            }
            let frame = timeout(PATIENCE, self.body.frame())
                .await
                .map_err(|_| ClientError::Silent(self.client.socket.clone()))?;
            match frame {
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.received.extend_from_slice(data);
                    }
                }
                Some(Err(error)) => return Err(self.client.broken(error)),
                None => return Ok(None),
            }
        }
    }

    /// The first whole line received, without its end.
    fn line(&mut self) -> Option<Vec<u8>> {
        let end = self.received.iter().position(|&byte| byte == b'\n')?;
        let mut line: Vec<_> = self.received.drain(..=end).collect();
        line.pop();
        Some(line)
    }
}
