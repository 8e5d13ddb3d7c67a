//! The page that shows live calls, and what it asks for.

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    http::{HeaderValue, header},
    response::Response,
    routing::get,
};

use crate::control::server::{self, Api};

/// The parts of the page: path, type and content.
const PARTS: [(&str, &str, &str); 4] = [
    (
        "/",
        "text/html; charset=utf-8",
        include_str!("page/page.html"),
    ),
    (
        "/page.css",
        "text/css; charset=utf-8",
        include_str!("page/page.css"),
    ),
    (
        "/page.js",
        "text/javascript; charset=utf-8",
        include_str!("page/page.js"),
    ),
    ("/icon.svg", "image/svg+xml", include_str!("page/icon.svg")),
];

/// The page, and the requests of the control API that change nothing.
pub(super) fn routes(api: Arc<Api>) -> Router {
    PARTS
        .into_iter()
        .fold(server::reading(api), |routes, (path, kind, content)| {
            routes.route(path, get(async move || part(kind, content)))
        })
}

fn part(kind: &'static str, content: &'static str) -> Response {
    let mut response = Response::new(Body::from(content));
    let kind = HeaderValue::from_static(kind);
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
