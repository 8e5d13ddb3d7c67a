//! Serves the control API on its socket.
//!
//! It only turns requests into [`Command`]s and answers into JSON. What a client does or omits to do
//! costs at most its own connection: number, size and duration of everything are bounded.

use std::{future::Future, io, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{StatusCode, Uri, header},
    response::Response,
    routing::{get, post},
};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nix::unistd::geteuid;
use serde::Serialize;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
    task::{JoinSet, spawn_blocking},
    time::{sleep, timeout},
};

use super::{
    Command, Reply,
    model::{AddRequest, ApiError, ErrorBody, ErrorCode, PairList},
    socket::ControlSocket,
};
use crate::pair::Pair;

/// What one client may take of the daemon.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Connections served at once; more wait in the kernel's queue.
    connections: usize,
    /// Longest body of a request, in bytes.
    body: usize,
    /// Largest request head, in bytes.
    head: usize,
    /// For the head of a request to arrive, and for its body.
    arrival: Duration,
    /// For the controller to answer.
    answer: Duration,
    /// For a connection from first to last, so also for the client to read the answer.
    connection: Duration,
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
    ending: Duration::from_secs(1),
};

/// Serves until `stop` completes, then finishes the answers under way and removes the socket.
///
/// # Errors
/// When the socket cannot be listened on. What goes wrong with a client is no error of the server.
pub async fn serve(
    socket: ControlSocket,
    commands: mpsc::Sender<Command>,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    serve_within(LIMITS, socket, commands, stop).await
}

async fn serve_within(
    limits: Limits,
    socket: ControlSocket,
    commands: mpsc::Sender<Command>,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let listener = UnixListener::from_std(socket.listener()?)?;
    let routes = routes(Arc::new(Api { commands, limits }));
    let mut connections = JoinSet::new();
    tokio::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept(), if connections.len() < limits.connections => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(limits, stream, routes.clone()));
                }
                Err(error) => {
                    // Out of file descriptors, most likely, and then the next try fails at once too.
                    tracing::warn!(%error, "cannot accept a connection to the control socket");
                    sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    let finish = async { while connections.join_next().await.is_some() {} };
    if timeout(limits.ending, finish).await.is_err() {
        tracing::debug!("cut off control connections that did not finish");
    }
    Ok(())
}

async fn connection(limits: Limits, stream: UnixStream, routes: Router) {
    // The socket's mode keeps others out already; this holds if somebody changes it.
    let allowed = stream
        .peer_cred()
        .is_ok_and(|peer| may_control(peer.uid(), geteuid().as_raw()));
    let routes = if allowed {
        routes
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
    match timeout(limits.connection, served).await {
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
    limits: Limits,
}

fn routes(api: Arc<Api>) -> Router {
    Router::new()
        .route("/v1/pairs", get(list).post(add).delete(flush))
        .route("/v1/pairs/{id}", get(show).delete(remove))
        .route("/v1/status", get(status))
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
