//! Serves the control API on its socket.
//!
//! It only turns requests into [`Command`]s and answers into JSON, and the [`EventBus`] into streams.
//! What a client does or omits to do costs at most its own connection: number and size of everything
//! are bounded, and the duration of everything but a stream of events.

use std::{
    convert::Infallible,
    future::Future,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Extension, Router,
    body::{Body, Bytes},
    extract::{Query, Request, State, rejection::QueryRejection},
    http::{HeaderMap, StatusCode, Uri, header},
    response::Response,
    routing::{get, post},
};
use futures_util::stream;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    task::{JoinSet, spawn_blocking},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Command, Reply,
    model::{AddRequest, ApiError, ErrorBody, ErrorCode, PairList},
    socket::ControlSocket,
};
use crate::{
    events::{Event, EventBus, Lagged, Subscription},
    pair::Pair,
};

/// What one client may take of the daemon.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Connections served at once, without streams of events; more wait in the kernel's queue.
    connections: usize,
    /// Longest body of a request, in bytes.
    body: usize,
    /// Largest request head, in bytes.
    head: usize,
    /// For the head of a request to arrive, and for its body.
    arrival: Duration,
    /// For the controller to answer.
    answer: Duration,
    /// For a connection from first to last, so also for the client to read the answer; not for a
    /// stream of events.
    connection: Duration,
    /// Between signs of life in a stream of events.
    heartbeat: Duration,
    /// For answers under way when the server ends.
    ending: Duration,
}

const LIMITS: Limits = Limits {
    connections: 64,
    body: 64 * 1024,
    head: 16 * 1024,
    arrival: Duration::from_secs(5),
    answer: Duration::from_secs(10),
    connection: Duration::from_secs(30),
    heartbeat: Duration::from_secs(15),
    ending: Duration::from_secs(1),
};

/// Serves until `stop` completes, then finishes the answers under way, tells followers of `events`
/// what has happened until then, and removes the socket.
///
/// # Errors
/// When the socket cannot be listened on. What goes wrong with a client is no error of the server.
pub async fn serve(
    socket: ControlSocket,
    commands: mpsc::Sender<Command>,
    events: EventBus,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    serve_within(LIMITS, socket, commands, events, stop).await
}

async fn serve_within(
    limits: Limits,
    socket: ControlSocket,
    commands: mpsc::Sender<Command>,
    events: EventBus,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let listener = UnixListener::from_std(socket.listener()?)?;
    let ending = CancellationToken::new();
    let routes = routes(Arc::new(Api {
        commands,
        events,
        ending: ending.clone(),
        limits,
    }));
    let places = Arc::new(Semaphore::new(limits.connections));
    let mut connections = JoinSet::new();
    tokio::pin!(stop);
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            (listener.accept().await, place.ok())
        };
        tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            (accepted, place) = accepted => match accepted {
                Ok((stream, _)) => {
                    let place = Place(Arc::new(Mutex::new(place)));
                    connections.spawn(connection(limits, stream, routes.clone(), place));
                }
                Err(error) => {
                    // Out of file descriptors, most likely, and then the next try fails at once too.
                    tracing::warn!(%error, "cannot accept a connection to the control socket");
                    sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    ending.cancel();
    let finish = async { while connections.join_next().await.is_some() {} };
    if timeout(limits.ending, finish).await.is_err() {
        tracing::debug!("cut off control connections that did not finish");
    }
    Ok(())
}

/// A connection's share of [`Limits::connections`], until it becomes a stream of events: those are
/// counted by the [`EventBus`] and last as long as their clients like.
#[derive(Clone)]
struct Place(Arc<Mutex<Option<OwnedSemaphorePermit>>>);

impl Place {
    fn release(&self) {
        drop(self.permit().take());
    }

    fn is_released(&self) -> bool {
        self.permit().is_none()
    }

    fn permit(&self) -> impl std::ops::DerefMut<Target = Option<OwnedSemaphorePermit>> + '_ {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn connection(limits: Limits, stream: UnixStream, routes: Router, place: Place) {
    // The socket's mode keeps others out already; this holds if somebody changes it.
    let allowed = stream
        .peer_cred()
        .is_ok_and(|peer| may_control(peer.uid(), geteuid().as_raw()));
    let routes = if allowed {
        routes.layer(Extension(place.clone()))
    } else {
        Router::new().fallback(forbidden)
    };
    // One request each: then a bound on the connection is one on the request, and an idle client
    // holds no place. Connecting anew costs next to nothing on a Unix socket.
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
        Ok(Err(error)) => tracing::debug!(%error, "control connection broke"),
        Err(_) => tracing::debug!("control connection took too long"),
    }
}

/// Root rules the maps anyway, and the daemon's own user could end the daemon.
const fn may_control(peer: u32, own: u32) -> bool {
    peer == 0 || peer == own
}

struct Api {
    commands: mpsc::Sender<Command>,
    events: EventBus,
    /// Cancelled when the server ends.
    ending: CancellationToken,
    limits: Limits,
}

fn routes(api: Arc<Api>) -> Router {
    Router::new()
        .route("/v1/pairs", get(list).post(add).delete(flush))
        .route("/v1/pairs/{id}", get(show).delete(remove))
        .route("/v1/status", get(status))
        .route("/v1/events", get(events))
        .route("/v1/detach", post(detach))
        .fallback(unknown_path)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(api)
}

async fn add(State(api): State<Arc<Api>>, request: Request) -> Response {
    answer(StatusCode::CREATED, async {
        let body = api.body(request).await?;
        let request: AddRequest = serde_json::from_slice(&body).map_err(|error| {
            ApiError::new(
                ErrorCode::InvalidRequest,
                format_args!("the body is not the JSON of a pair: {error}"),
            )
        })?;
        let pair = Pair::try_from(request)?;
        api.ask(|reply| Command::Add { pair, reply }).await
    })
    .await
}

async fn list(State(api): State<Arc<Api>>) -> Response {
    answer(StatusCode::OK, async {
        api.ask(|reply| Command::List { reply })
            .await
            .map(|pairs| PairList { pairs })
    })
    .await
}

async fn flush(State(api): State<Arc<Api>>) -> Response {
    answer(StatusCode::OK, async {
        api.ask(|reply| Command::Flush { reply })
            .await
            .map(|pairs| PairList { pairs })
    })
    .await
}

async fn show(State(api): State<Arc<Api>>, uri: Uri) -> Response {
    answer(StatusCode::OK, async {
        let id = id(&uri)?;
        api.ask(|reply| Command::Show { id, reply }).await
    })
    .await
}

async fn remove(State(api): State<Arc<Api>>, uri: Uri) -> Response {
    answer(StatusCode::OK, async {
        let id = id(&uri)?;
        api.ask(|reply| Command::Remove { id, reply }).await
    })
    .await
}

async fn status(State(api): State<Arc<Api>>) -> Response {
    answer(StatusCode::OK, api.ask(|reply| Command::Status { reply })).await
}

/// Where a stream of events begins.
#[derive(Deserialize)]
struct Since {
    since: Option<u64>,
}

async fn events(
    State(api): State<Arc<Api>>,
    Extension(place): Extension<Place>,
    headers: HeaderMap,
    query: Result<Query<Since>, QueryRejection>,
) -> Response {
    let subscribed = since(&headers, query).and_then(|since| {
        api.events
            .subscribe(since)
            .map_err(|crowded| ApiError::new(ErrorCode::Busy, crowded))
    });
    let subscription = match subscribed {
        Ok(subscription) => subscription,
        Err(error) => return refuse(&error),
    };
    place.release();
    let follow = stream::unfold((api, subscription), async |(api, mut subscription)| {
        let text = told(&api, &mut subscription).await?;
        Some((Ok::<_, Infallible>(text), (api, subscription)))
    });
    let mut response = Response::new(Body::from_stream(follow));
    for (name, value) in [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
    ] {
        let value = header::HeaderValue::from_static(value);
        response.headers_mut().insert(name, value);
    }
    response
}

/// The number that a stream is to begin after. The header is what a client sends when it connects
/// again, with the query that it began with.
fn since(
    headers: &HeaderMap,
    query: Result<Query<Since>, QueryRejection>,
) -> Result<Option<u64>, ApiError> {
    let invalid = |what: &str, wrong: &dyn std::fmt::Display| {
        ApiError::new(
            ErrorCode::InvalidRequest,
            format_args!("{what} is not the number of an event: {wrong}"),
        )
    };
    let Query(Since { since }) = query.map_err(|error| invalid("`since`", &error.body_text()))?;
    match headers.get("last-event-id") {
        Some(last) if !last.is_empty() => {
            let number = last.to_str().ok().and_then(|text| text.parse().ok());
            number
                .map(Some)
                .ok_or_else(|| invalid("`Last-Event-ID`", &"write digits alone"))
        }
        _ => Ok(since),
    }
}

/// The next piece of a stream of events; none at its end.
async fn told(api: &Api, subscription: &mut Subscription) -> Option<Bytes> {
    let event = tokio::select! {
        event = subscription.next() => event?,
        // What was published before the end is still told.
        () = api.ending.cancelled() => subscription.ready()?,
        () = sleep(api.limits.heartbeat) => return Some(Bytes::from_static(b":\n\n")),
    };
    // Numbers and strings: writing them cannot fail.
    let data = serde_json::to_string(&event).unwrap_or_default();
    let text = match event {
        Event::Transition(transition) => format!(
            "id: {}\nevent: {}\ndata: {data}\n\n",
            transition.serial,
            transition.kind.name()
        ),
        Event::Lagged(_) => format!("event: {}\ndata: {data}\n\n", Lagged::NAME),
    };
    Some(text.into())
}

async fn detach(State(api): State<Arc<Api>>) -> Response {
    answer(StatusCode::OK, api.ask(|reply| Command::Detach { reply })).await
}

async fn unknown_path(uri: Uri) -> Response {
    let error = ApiError::new(
        ErrorCode::UnknownPath,
        format_args!(
            "there is no {}: see docs/api.md for what there is",
            uri.path()
        ),
    );
    refuse(&error)
}

async fn method_not_allowed(request: Request) -> Response {
    let error = ApiError::new(
        ErrorCode::MethodNotAllowed,
        format_args!(
            "{} cannot be done to {}: see docs/api.md for what can",
            request.method(),
            request.uri().path()
        ),
    );
    refuse(&error)
}

async fn forbidden() -> Response {
    refuse(&ApiError::new(
        ErrorCode::Forbidden,
        "only root and the daemon's own user may control the relay",
    ))
}

/// The last part of the path, as the number of a pair.
fn id(uri: &Uri) -> Result<u64, ApiError> {
    let text = uri.path().rsplit('/').next().unwrap_or_default();
    text.parse().map_err(|_| {
        ApiError::new(
            ErrorCode::InvalidRequest,
            format_args!("`{text}` is not the number of a pair: `relay-user list` shows them"),
        )
    })
}

impl Api {
    async fn body(&self, request: Request) -> Result<Vec<u8>, ApiError> {
        let Limits {
            body: longest,
            arrival,
            ..
        } = self.limits;
        match timeout(
            arrival,
            Limited::new(request.into_body(), longest).collect(),
        )
        .await
        {
            Ok(Ok(body)) => Ok(body.to_bytes().into()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::new(
                ErrorCode::BodyTooLarge,
                format_args!("the body is longer than {longest} bytes: add one pair per request"),
            )),
            Ok(Err(error)) => Err(ApiError::new(
                ErrorCode::InvalidRequest,
                format_args!("the body did not arrive whole: {error}"),
            )),
            Err(_) => Err(ApiError::new(
                ErrorCode::RequestTimeout,
                format_args!("the body did not arrive within {} s", arrival.as_secs_f64()),
            )),
        }
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, ApiError> {
        let ending = || {
            ApiError::new(
                ErrorCode::Stopping,
                "the daemon is ending: start it again with `relay-user attach IFACE`",
            )
        };
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            self.commands
                .send(command(reply))
                .await
                .map_err(|_| ending())?;
            answer.await.map_err(|_| ending())?
        };
        timeout(self.limits.answer, exchange).await.unwrap_or_else(|_| {
            Err(ApiError::new(
                ErrorCode::Busy,
                format_args!(
                    "the daemon did not answer within {} s: look at its log and at `relay-user list`, then try again",
                    self.limits.answer.as_secs_f64()
                ),
            ))
        })
    }
}

async fn answer<T: Serialize + Send + 'static>(
    status: StatusCode,
    outcome: impl Future<Output = Result<T, ApiError>>,
) -> Response {
    let value = match outcome.await {
        Ok(value) => value,
        Err(error) => return refuse(&error),
    };
    // A long list takes a while to write out: elsewhere, so that the daemon goes on meanwhile.
    match spawn_blocking(move || serde_json::to_vec(&value)).await {
        Ok(Ok(body)) => json(status, body),
        Ok(Err(error)) => refuse(&ApiError::new(ErrorCode::Internal, error)),
        Err(error) => refuse(&ApiError::new(ErrorCode::Internal, error)),
    }
}

fn refuse(error: &ApiError) -> Response {
    let status =
        StatusCode::from_u16(error.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    // Two strings: writing them cannot fail.
    json(
        status,
        serde_json::to_vec(&ErrorBody {
            error: error.clone(),
        })
        .unwrap_or_default(),
    )
}

fn json(status: StatusCode, mut body: Vec<u8>) -> Response {
    body.push(b'\n');
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static("application/json"),
    );
    response
}

#[cfg(test)]
mod tests;
