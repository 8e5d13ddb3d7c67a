//! What stands before every answer to the network: who may ask, and what a browser may do with it.

use std::{io, net::IpAddr, sync::Arc};

use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderName, HeaderValue, Method, header, uri::Authority},
    middleware::{Next, from_fn_with_state},
    response::Response,
};
use nix::sys::utsname::uname;

use crate::control::{
    model::{ApiError, ErrorCode},
    server::refuse,
};

/// A page may load its own parts alone, and stand in no frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Of every answer.
const HEADERS: [(HeaderName, &str); 5] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
    (header::CACHE_CONTROL, "no-store"),
];

/// The names that a server may be asked by.
///
/// A page on the Internet can have its own name resolve to an address of this network, and then counts as
/// the same site (DNS rebinding). It cannot make the browser send another name than its own, so the name
/// tells. An address is nobody's name.
#[derive(Clone, Debug)]
pub struct Hosts(Arc<[String]>);

impl Hosts {
    /// Those allowed, `localhost`, and the kernel's name of this host; every address too.
    ///
    /// # Errors
    /// The kernel does not tell its name.
    pub fn new(allowed: &[String]) -> io::Result<Self> {
        let own = uname()?.nodename().to_string_lossy().to_ascii_lowercase();
        let names = allowed.iter().cloned();
        Ok(Self(names.chain(["localhost".to_owned(), own]).collect()))
    }

    /// Whether a server may be asked by this name, which may come with a port.
    fn allow(&self, authority: &str) -> bool {
        let Ok(authority) = authority.parse::<Authority>() else {
            return false;
        };
        let host = authority.host().to_ascii_lowercase();
        let address = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(&host);
        address.parse::<IpAddr>().is_ok() || self.0.contains(&host)
    }
}

/// Routes behind the guard.
pub(super) fn guarded(routes: Router, hosts: Hosts) -> Router {
    routes.layer(from_fn_with_state(hosts, guard))
}

async fn guard(State(hosts): State<Hosts>, request: Request, next: Next) -> Response {
    let mut response = match check(&hosts, &request) {
        Ok(()) => next.run(request).await,
        Err(error) => refuse(&error),
    };
    for (name, value) in HEADERS {
        let value = HeaderValue::from_static(value);
        response.headers_mut().insert(name, value);
    }
    response
}

fn check(hosts: &Hosts, request: &Request) -> Result<(), ApiError> {
    let header = |name: &str| {
        let value = request.headers().get(name);
        value.and_then(|value| value.to_str().ok())
    };
    // RFC 9112, section 3.2.2: a whole URI in the request line is worth more than the header.
    let authority = request.uri().authority();
    let host = authority.map_or_else(|| header("host"), |authority| Some(authority.as_str()));
    if !host.is_some_and(|host| hosts.allow(host)) {
        return Err(ApiError::new(
            ErrorCode::WrongHost,
            "this server is not asked by that name: use its address, or start the relay with --allowed-host NAME",
        ));
    }
    // Browsers say so: the first to addresses of loopback and over HTTPS alone, the second where a script means to
    // read the answer. It could not, but use up what is bounded.
    let foreign = header("sec-fetch-site") == Some("cross-site")
        && header("sec-fetch-mode") != Some("navigate");
    if foreign || !header("origin").is_none_or(|origin| is_of(origin, host)) {
        return Err(ApiError::new(
            ErrorCode::Forbidden,
            "the pages of other sites may not ask",
        ));
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return Err(ApiError::new(
            ErrorCode::MethodNotAllowed,
            "this can only be read: what changes the relay goes through its control socket",
        ));
    }
    Ok(())
}

/// Whether an origin (RFC 6454, section 6.1) is the host that was asked.
fn is_of(origin: &str, host: Option<&str>) -> bool {
    let asked = origin.split_once("://").map(|(_, authority)| authority);
    asked
        .zip(host)
        .is_some_and(|(asked, host)| asked.eq_ignore_ascii_case(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_not_this_hosts_are_refused() {
        let hosts = Hosts::new(&["pbx.example.com".to_owned()]).expect("hosts");
        for good in [
            "127.0.0.1:8080",
            "192.0.2.1",
            "[::1]:8080",
            "localhost:8080",
            "LocalHost",
            "PBX.example.com:8080",
        ] {
            assert!(hosts.allow(good), "{good}");
        }
        for bad in [
            "",
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "pbx.example.com.evil.example",
            "evil.example:8080",
            "evil.example@",
            "[evil]:1",
            "a b",
        ] {
            assert!(!hosts.allow(bad), "{bad}");
        }
    }

    #[test]
    fn an_origin_is_of_the_host_that_was_asked_or_of_another_site() {
        assert!(is_of("http://192.0.2.1:8080", Some("192.0.2.1:8080")));
        assert!(is_of("https://PBX.example.com", Some("pbx.example.com")));
        for other in ["http://evil.example", "http://192.0.2.1", "null", ""] {
            assert!(!is_of(other, Some("192.0.2.1:8080")), "{other}");
        }
    }
}
