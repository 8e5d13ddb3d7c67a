//! Serves the control API on its socket.
//!
//! It only turns requests into [`Command`]s and answers into JSON, and the [`EventBus`] into streams.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    future::Future,
    io,
    sync::Arc,
    task::Context,
    time::{Duration, Instant},
};

use axum::{
    Extension, Router,
    body::{Body, Bytes},
    extract::{Query, Request, State, rejection::QueryRejection},
    http::{HeaderMap, StatusCode, Uri, header},
    response::Response,
    routing::{delete, get, post},
};
use futures_util::{StreamExt as _, stream};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Mutex, Semaphore, mpsc, oneshot},
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Command, MetricsReport, Reply,
    connection::{self, LIMITS, Limits, Place},
    model::{
        AddAllReport, AddAllRequest, AddRequest, AddResult, ApiError, BATCH, ErrorBody, ErrorCode,
        PairList, PairReport, StatusReport,
    },
    selection::Selection,
    socket::ControlSocket,
};
use crate::{
    clock,
    events::{Crowded, Event, EventBus, Lagged, Subscription},
    pair::Pair,
};

/// Longest filter of pairs, bytes: every word of it is looked for in every pair.
const FILTER_MAX: usize = 1024;

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
    let routes = routes(Arc::new(Api::new(commands, events, ending.clone(), limits)));
    let routes = |stream: &UnixStream| {
        // The socket's mode keeps others out already; this holds if somebody changes it.
        let allowed = stream
            .peer_cred()
            .is_ok_and(|peer| may_control(peer.uid(), geteuid().as_raw()));
        if allowed {
            routes.clone()
        } else {
            Router::new().fallback(forbidden)
        }
    };
    let accept = |context: &mut Context<'_>| {
        let accepted = listener.poll_accept(context);
        accepted.map_ok(|(stream, _)| stream)
    };
    connection::serve("control socket", limits, accept, routes, ending, stop).await;
    Ok(())
}

/// Root rules the maps anyway, and the daemon's own user could end the daemon.
const fn may_control(peer: u32, own: u32) -> bool {
    peer == 0 || peer == own
}

/// What the routes of a server work with.
pub(crate) struct Api {
    commands: mpsc::Sender<Command>,
    events: EventBus,
    /// Cancelled when the server ends.
    ending: CancellationToken,
    limits: Limits,
    followers: Arc<Semaphore>,
    pairs: Recent<Arc<PairList>>,
    status: Recent<StatusReport>,
    metrics: Recent<MetricsReport>,
}

/// An answer of the controller's that serves several clients.
struct Recent<T>(Mutex<Option<(Instant, T)>>);

impl<T: Clone> Recent<T> {
    const fn new() -> Self {
        Self(Mutex::const_new(None))
    }

    /// Asks, unless the last answer is not older than `freshness`. Who comes meanwhile waits for the
    /// same answer.
    async fn get(
        &self,
        freshness: Duration,
        ask: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        if freshness.is_zero() {
            return ask.await;
        }
        let mut kept = self.0.lock().await;
        if let Some((at, value)) = &*kept
            && at.elapsed() < freshness
        {
            return Ok(value.clone());
        }
        let value = ask.await?;
        *kept = Some((Instant::now(), value.clone()));
        Ok(value)
    }
}

fn routes(api: Arc<Api>) -> Router {
    let writing = Router::new()
        .route("/v1/pairs", post(add).delete(flush))
        .route("/v1/pairs/batch", post(add_all))
        .route("/v1/pairs/{id}", delete(remove))
        .route("/v1/detach", post(detach))
        .with_state(api.clone());
    reading(api)
        .merge(writing)
        .method_not_allowed_fallback(method_not_allowed)
}

/// The requests that change nothing.
pub(crate) fn reading(api: Arc<Api>) -> Router {
    Router::new()
        .route("/v1/pairs", get(list))
        .route("/v1/pairs/{id}", get(show))
        .route("/v1/status", get(status))
        .route("/v1/events", get(events))
        .fallback(unknown_path)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(api)
}

async fn add(State(api): State<Arc<Api>>, request: Request) -> Response {
    answer(StatusCode::CREATED, async {
        let request: AddRequest = api.body(request, api.limits.body, "a pair").await?;
        let pair = Pair::try_from(request)?;
        api.ask(|reply| Command::Add { pair, reply }).await
    })
    .await
}

async fn add_all(State(api): State<Arc<Api>>, request: Request) -> Response {
    answer(StatusCode::OK, async {
        let longest = api.limits.batch_body;
        let request: AddAllRequest = api.body(request, longest, "several pairs").await?;
        if request.pairs.len() > BATCH {
            return Err(ApiError::new(
                ErrorCode::InvalidRequest,
                format_args!("there are more than {BATCH} pairs: add them in several requests"),
            ));
        }
        let mut pairs = Vec::with_capacity(request.pairs.len());
        let mut invalid = BTreeMap::new();
        for (index, pair) in request.pairs.into_iter().enumerate() {
            match Pair::try_from(pair) {
                Ok(pair) => pairs.push(pair),
                Err(error) => {
                    invalid.insert(index, ApiError::from(error));
                }
            }
        }
        let mut results = api.ask(|reply| Command::AddAll { pairs, reply }).await?;
        // In ascending order, so that each comes to stand where it was.
        for (index, error) in invalid {
            results.insert(index, Err(error));
        }
        let results = results.into_iter().map(AddResult::from).collect();
        Ok(AddAllReport { results })
    })
    .await
}

async fn list(
    State(api): State<Arc<Api>>,
    query: Result<Query<Selection>, QueryRejection>,
) -> Response {
    let selection = || {
        let Query(selection) = query.map_err(|rejection| {
            let wrong = rejection.body_text();
            ApiError::new(
                ErrorCode::InvalidRequest,
                format_args!("the query does not select pairs: {wrong}"),
            )
        })?;
        if selection
            .filter
            .iter()
            .any(|filter| filter.len() > FILTER_MAX)
        {
            return Err(ApiError::new(
                ErrorCode::InvalidRequest,
                format_args!("a filter is not longer than {FILTER_MAX} bytes"),
            ));
        }
        Ok(selection)
    };
    let selection = match selection() {
        Ok(selection) if selection == Selection::default() && api.limits.pairs == usize::MAX => {
            return list_all(api).await;
        }
        selection => selection,
    };
    answer(StatusCode::OK, async {
        let mut selection = selection?;
        let most = api.limits.pairs;
        selection.limit = Some(selection.limit.unwrap_or(most).min(most));
        let pairs = api.pairs().await?;
        // Many take a while to sort: elsewhere, as writing them out.
        spawn_blocking(move || selection.of(&pairs))
            .await
            .map_err(|error| ApiError::new(ErrorCode::Internal, error))
    })
    .await
}

/// Every pair, part by part: while one is written out, the controller makes the next.
async fn list_all(api: Arc<Api>) -> Response {
    let time = clock::utc_now();
    let first = match api.pairs_after(0).await {
        Ok(first) => first,
        Err(error) => return refuse(&error),
    };
    let (written, mut parts) = mpsc::channel(2);
    tokio::spawn(async move {
        let mut pairs = first;
        let mut matching = 0;
        loop {
            let begun = matching > 0;
            matching += pairs.len();
            let (last, is_end) = (pairs.last().map(|pair| pair.id), pairs.len() < PART);
            let part = spawn_blocking(move || part(&pairs, begun));
            // Nobody reads on.
            if written.send(part).await.is_err() {
                return;
            }
            let Some(last) = last.filter(|_| !is_end) else {
                break;
            };
            pairs = match api.pairs_after(last).await {
                Ok(pairs) => pairs,
                Err(error) => {
                    // What was sent already is no answer; the connection breaks off.
                    let _ = written.send(spawn_blocking(|| Err(error))).await;
                    return;
                }
            };
        }
        let end = format!("\n],\"matching\":{matching},\"time\":\"{time}\"}}\n");
        let _ = written.send(spawn_blocking(|| Ok(end.into()))).await;
    });
    let parts = stream::poll_fn(move |context| parts.poll_recv(context));
    let parts = parts.then(async |part| {
        part.await
            .map_err(io::Error::other)?
            .map_err(io::Error::other)
    });
    let mut response = json(StatusCode::OK, Vec::new());
    *response.body_mut() = Body::from_stream(parts);
    response
}

/// Pairs in a part of a list.
const PART: usize = 1000;

/// What those mostly take.
const PART_BYTES: usize = 2 * PART * 1024;

/// Pairs as they stand in a list: each on a line of its own, for those who read it without a program.
fn part(pairs: &[PairReport], begun: bool) -> Result<Bytes, ApiError> {
    let mut text = Vec::with_capacity(PART_BYTES);
    if !begun {
        text.extend_from_slice(b"{\"pairs\":[");
    }
    for (index, pair) in pairs.iter().enumerate() {
        text.extend_from_slice(if begun || index > 0 { b",\n" } else { b"\n" });
        serde_json::to_writer(&mut text, pair)
            .map_err(|error| ApiError::new(ErrorCode::Internal, error))?;
    }
    Ok(text.into())
}

async fn flush(State(api): State<Arc<Api>>) -> Response {
    answer(StatusCode::OK, async {
        api.ask(|reply| Command::Flush { reply })
            .await
            .map(PairList::from)
    })
    .await
}

async fn show(State(api): State<Arc<Api>>, uri: Uri) -> Response {
    answer(StatusCode::OK, async { api.pair(id(&uri)?).await }).await
}

async fn remove(State(api): State<Arc<Api>>, uri: Uri) -> Response {
    answer(StatusCode::OK, async {
        let id = id(&uri)?;
        api.ask(|reply| Command::Remove { id, reply }).await
    })
    .await
}

async fn status(State(api): State<Arc<Api>>) -> Response {
    answer(StatusCode::OK, async {
        let ask = api.ask(|reply| Command::Status { reply });
        api.status.get(api.limits.freshness, ask).await
    })
    .await
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
    let crowded = || ApiError::new(ErrorCode::Busy, Crowded(api.limits.followers));
    let subscribed = since(&headers, query).and_then(|since| {
        let follower = api.followers.clone().try_acquire_owned();
        let follower = follower.map_err(|_| crowded())?;
        let subscription = api.events.subscribe(since);
        let subscription = subscription.map_err(|error| ApiError::new(ErrorCode::Busy, error))?;
        Ok((subscription, follower))
    });
    let subscription = match subscribed {
        Ok(subscription) => subscription,
        Err(error) => return refuse(&error),
    };
    place.release();
    let follow = stream::unfold(
        (api, subscription),
        async |(api, (mut subscription, follower))| {
            let text = told(&api, &mut subscription).await?;
            Some((Ok::<_, Infallible>(text), (api, (subscription, follower))))
        },
    );
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

/// The answer to a path that there is not.
pub(crate) async fn unknown_path(uri: Uri) -> Response {
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
    pub(crate) fn new(
        commands: mpsc::Sender<Command>,
        events: EventBus,
        ending: CancellationToken,
        limits: Limits,
    ) -> Self {
        Self {
            commands,
            events,
            ending,
            limits,
            followers: Arc::new(Semaphore::new(limits.followers)),
            pairs: Recent::new(),
            status: Recent::new(),
            metrics: Recent::new(),
        }
    }

    /// What metrics are made of.
    pub(crate) async fn metrics(&self) -> Result<MetricsReport, ApiError> {
        let ask = self.ask(|reply| Command::Metrics { reply });
        self.metrics.get(self.limits.freshness, ask).await
    }

    /// All pairs, in the order of their numbers.
    pub(crate) async fn pairs(&self) -> Result<Arc<PairList>, ApiError> {
        let ask = async {
            let mut pairs = self.pairs_after(0).await?;
            let mut last = pairs.len();
            while last == PART
                && let Some(pair) = pairs.last()
            {
                let more = self.pairs_after(pair.id).await?;
                last = more.len();
                pairs.extend(more);
            }
            Ok(Arc::new(pairs.into()))
        };
        self.pairs.get(self.limits.freshness, ask).await
    }

    /// At most [`PART`] pairs, those that follow on a number.
    async fn pairs_after(&self, after: u64) -> Result<Vec<PairReport>, ApiError> {
        self.ask(|reply| Command::List {
            after,
            limit: PART,
            reply,
        })
        .await
    }

    async fn pair(&self, id: u64) -> Result<PairReport, ApiError> {
        if self.limits.freshness.is_zero() {
            return self.ask(|reply| Command::Show { id, reply }).await;
        }
        let all = self.pairs().await?;
        let pair = all.pairs.iter().find(|pair| pair.id == id).cloned();
        pair.ok_or_else(|| ApiError::unknown_pair(id))
    }

    /// The JSON that a request comes with; `of` says what it describes.
    async fn body<T: DeserializeOwned>(
        &self,
        request: Request,
        longest: usize,
        of: &str,
    ) -> Result<T, ApiError> {
        let arrival = self.limits.arrival;
        match timeout(
            arrival,
            Limited::new(request.into_body(), longest).collect(),
        )
        .await
        {
            Ok(Ok(body)) => serde_json::from_slice(&body.to_bytes()).map_err(|error| {
                ApiError::new(
                    ErrorCode::InvalidRequest,
                    format_args!("the body is not the JSON of {of}: {error}"),
                )
            }),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::new(
                ErrorCode::BodyTooLarge,
                format_args!(
                    "the body is longer than the {longest} bytes that {of} may take: split it"
                ),
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

/// The answer that is this error.
pub(crate) fn refuse(error: &ApiError) -> Response {
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
