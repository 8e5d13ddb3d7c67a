//! The servers for browsers and for Prometheus: off unless asked for, and without anything that changes
//! what the relay does.

mod guard;
mod page;

use std::{
    io,
    net::{self, SocketAddr},
    sync::Arc,
    task::Context,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderMap, HeaderValue, header},
    response::Response,
    routing::get,
};
use serde::Deserialize;
use tokio::{
    net::TcpListener,
    sync::mpsc,
    task::{JoinHandle, spawn_blocking},
};
use tokio_util::sync::CancellationToken;

pub use guard::Hosts;

use crate::{
    config::AttachSettings,
    control::{
        Command,
        connection::{self, LIMITS, Limits},
        model::{ApiError, ErrorCode},
        server::{Api, refuse, unknown_path},
    },
    events::EventBus,
    metrics::{self, Format, MOST_STREAMS},
};

/// Of clients who come through the network. Together they cost the controller no more than one does.
const WEB_LIMITS: Limits = Limits {
    // They send none.
    body: 0,
    pairs: 500,
    followers: 8,
    freshness: Duration::from_millis(500),
    ..LIMITS
};

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot serve {what} on {address}: {source}; choose another address or port with {flag}, or end what listens there"
)]
pub struct BindError {
    what: &'static str,
    flag: &'static str,
    address: SocketAddr,
    source: io::Error,
}

/// What the daemon listens on.
#[derive(Debug)]
pub struct Listeners {
    metrics: Option<net::TcpListener>,
    http: Option<net::TcpListener>,
}

impl Listeners {
    /// Listens where the settings say, and puts the port into them where they leave it to the kernel.
    ///
    /// # Errors
    /// [`BindError`]: an address that is taken, is not this host's, or needs rights.
    pub fn bind(settings: &mut AttachSettings) -> Result<Self, BindError> {
        Ok(Self {
            metrics: bind("metrics", "--metrics", &mut settings.metrics)?,
            http: bind("the page", "--http", &mut settings.http)?,
        })
    }

    /// Serves until `stop`.
    ///
    /// # Errors
    /// The event loop does not take a listener.
    pub fn serve(
        self,
        hosts: Hosts,
        commands: &mpsc::Sender<Command>,
        events: &EventBus,
        stop: &CancellationToken,
    ) -> io::Result<Vec<JoinHandle<()>>> {
        let servers = [
            ("metrics", self.metrics, measured as fn(Arc<Api>) -> Router),
            ("page", self.http, page::routes),
        ];
        let mut serving = Vec::new();
        for (name, listener, routes) in servers {
            let Some(listener) = listener else { continue };
            let listener = TcpListener::from_std(listener)?;
            let ending = CancellationToken::new();
            let (commands, events) = (commands.clone(), events.clone());
            let api = Api::new(commands, events, ending.clone(), WEB_LIMITS);
            let routes = guard::guarded(routes(Arc::new(api)), hosts.clone());
            let stop = stop.clone().cancelled_owned();
            serving.push(tokio::spawn(async move {
                let accept = |context: &mut Context<'_>| {
                    let accepted = listener.poll_accept(context);
                    accepted.map_ok(|(stream, _)| stream)
                };
                let routes = |_: &_| routes.clone();
                connection::serve(name, WEB_LIMITS, accept, routes, ending, stop).await;
            }));
        }
        Ok(serving)
    }
}

fn bind(
    what: &'static str,
    flag: &'static str,
    address: &mut Option<SocketAddr>,
) -> Result<Option<net::TcpListener>, BindError> {
    let Some(address) = address else {
        return Ok(None);
    };
    let asked = *address;
    let bound = net::TcpListener::bind(asked).and_then(|listener| {
        listener.set_nonblocking(true)?;
        *address = listener.local_addr()?;
        Ok(listener)
    });
    let listener = bound.map_err(|source| BindError {
        what,
        flag,
        address: asked,
        source,
    })?;
    tracing::info!(%address, "serving {what}");
    if !address.ip().to_canonical().is_loopback() {
        tracing::warn!(%address, "whoever reaches this address gets {what}, without a password: let a firewall choose who may");
    }
    Ok(Some(listener))
}

/// What Prometheus asks for.
fn measured(api: Arc<Api>) -> Router {
    Router::new()
        .route("/metrics", get(scrape))
        .fallback(unknown_path)
        .with_state(api)
}

/// The query of `/metrics`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Scrape {
    /// How many streams are to have series of their own.
    #[serde(default)]
    streams: usize,
}

async fn scrape(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    query: Result<Query<Scrape>, QueryRejection>,
) -> Response {
    let accept = headers.get_all(header::ACCEPT).iter();
    let accept: Vec<_> = accept.filter_map(|value| value.to_str().ok()).collect();
    let format = Format::accepted(&accept.join(","));
    match exposed(&api, query, format).await {
        Ok(text) => {
            let mut response = Response::new(Body::from(text));
            let content_type = HeaderValue::from_static(format.content_type());
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_TYPE, content_type);
            headers.insert(header::VARY, HeaderValue::from_static("accept"));
            response
        }
        Err(error) => refuse(&error),
    }
}

async fn exposed(
    api: &Api,
    query: Result<Query<Scrape>, QueryRejection>,
    format: Format,
) -> Result<String, ApiError> {
    let invalid = |wrong: &dyn std::fmt::Display| {
        ApiError::new(
            ErrorCode::InvalidRequest,
            format_args!(
                "{wrong}: write /metrics, or /metrics?streams=N for series of at most N streams, up to {MOST_STREAMS}"
            ),
        )
    };
    let Query(Scrape { streams }) = query.map_err(|error| invalid(&error.body_text()))?;
    if streams > MOST_STREAMS {
        return Err(invalid(&format_args!("{streams} streams are too many")));
    }
    let report = api.metrics().await?;
    let pairs = match streams {
        0 => None,
        _ => Some(api.pairs().await?),
    };
    let internal = |error: &dyn std::fmt::Display| ApiError::new(ErrorCode::Internal, error);
    // Many streams take a while: elsewhere, so that the daemon goes on meanwhile.
    let expose = move || {
        let pairs = pairs.as_ref().map_or(&[][..], |list| &list.pairs);
        metrics::expose(report, pairs, streams, format)
    };
    spawn_blocking(expose)
        .await
        .map_err(|error| internal(&error))?
        .map_err(|error| internal(&error))
}
