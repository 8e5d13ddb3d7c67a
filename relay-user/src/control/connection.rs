//! Connections of the daemon's HTTP servers, whatever they come in through.
//!
//! What a client does or omits to do costs at most its own connection: number and size of everything
//! are bounded, and the duration of everything but a stream of events.

use std::{
    future::{Future, poll_fn},
    io,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::events::SUBSCRIBERS;

/// What one client may take of the daemon.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Connections served at once, without streams of events; more wait in the kernel's queue.
    pub(crate) connections: usize,
    /// Longest body of a request, in bytes.
    pub(crate) body: usize,
    /// The same of a request about several pairs.
    pub(crate) batch_body: usize,
    /// Largest request head, in bytes.
    pub(crate) head: usize,
    /// For the head of a request to arrive, and for its body.
    pub(crate) arrival: Duration,
    /// For the controller to answer.
    pub(crate) answer: Duration,
    /// For a connection from first to last, so also for the client to read the answer; not for a
    /// stream of events.
    pub(crate) connection: Duration,
    /// Between signs of life in a stream of events.
    pub(crate) heartbeat: Duration,
    /// For answers under way when the server ends.
    pub(crate) ending: Duration,
    /// Pairs in one answer.
    pub(crate) pairs: usize,
    /// Streams of events at once.
    pub(crate) followers: usize,
    /// How old an answer may be that many clients get; zero asks the controller for each.
    pub(crate) freshness: Duration,
}

/// Of the control socket's clients, who are root.
pub(crate) const LIMITS: Limits = Limits {
    connections: 64,
    body: 64 * 1024,
    batch_body: 1024 * 1024,
    head: 16 * 1024,
    arrival: Duration::from_secs(5),
    answer: Duration::from_secs(10),
    connection: Duration::from_secs(30),
    heartbeat: Duration::from_secs(15),
    ending: Duration::from_secs(1),
    pairs: usize::MAX,
    followers: SUBSCRIBERS,
    freshness: Duration::ZERO,
};

/// A connection's share of [`Limits::connections`], until it becomes a stream of events: those are
/// counted by the [`EventBus`] and last as long as their clients like.
#[derive(Clone)]
pub(crate) struct Place(Arc<Mutex<Option<OwnedSemaphorePermit>>>);

impl Place {
    pub(crate) fn release(&self) {
        drop(self.permit().take());
    }

    fn is_released(&self) -> bool {
        self.permit().is_none()
    }

    fn permit(&self) -> impl std::ops::DerefMut<Target = Option<OwnedSemaphorePermit>> + '_ {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves what `accept` polls from a listener, each with the routes for it, until `stop` completes.
/// Then cancels `ending`, and gives answers under way [`Limits::ending`]. `name` is for the log.
pub(crate) async fn serve<S>(
    name: &'static str,
    limits: Limits,
    accept: impl Fn(&mut Context<'_>) -> Poll<io::Result<S>>,
    routes: impl Fn(&S) -> Router,
    ending: CancellationToken,
    stop: impl Future<Output = ()>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let places = Arc::new(Semaphore::new(limits.connections));
    let mut connections = JoinSet::new();
    tokio::pin!(stop);
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            (poll_fn(&accept).await, place.ok())
        };
        tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            (accepted, place) = accepted => match accepted {
                Ok(stream) => {
                    let routes = routes(&stream);
                    let place = Place(Arc::new(Mutex::new(place)));
                    connections.spawn(connection(name, limits, stream, routes, place));
                }
                Err(error) => {
                    // Out of file descriptors, most likely, and then the next try fails at once too.
                    tracing::warn!(%error, "cannot accept a connection to the {name}");
                    sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    ending.cancel();
    let finish = async { while connections.join_next().await.is_some() {} };
    if timeout(limits.ending, finish).await.is_err() {
        tracing::debug!("cut off connections to the {name} that did not finish");
    }
}

async fn connection<S>(name: &'static str, limits: Limits, stream: S, routes: Router, place: Place)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let routes = routes.layer(Extension(place.clone()));
    // One request each: then a bound on the connection is one on the request, and an idle client
    // holds no place. Connecting anew costs next to nothing on a Unix socket and on loopback.
    let served = http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(limits.arrival)
        .max_buf_size(limits.head)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    tokio::pin!(served);
    let outcome = match timeout(limits.connection, &mut served).await {
        Err(_) if place.is_released() => Ok(served.await),
        outcome => outcome,
    };
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a connection to the {name} broke"),
        Err(_) => tracing::debug!("a connection to the {name} took too long"),
    }
}
