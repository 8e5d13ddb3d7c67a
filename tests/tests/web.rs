//! Metrics as Prometheus gets them, and who gets an answer at all.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use relay_tests::{
    namespace::Host,
    promtool,
    relay::{Relay, binary},
    scene::Scene,
    topology::{Direct, PBX_V4},
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);
const DASHBOARD: &str = include_str!("../../docs/grafana-dashboard.json");
const DESCRIPTION: &str = include_str!("../../docs/metrics.md");
const OPENMETRICS: &str = "Accept: application/openmetrics-text;version=1.0.0\r\n";

/// An answer.
#[derive(Debug)]
struct Answer {
    status: u16,
    /// Names in lower case.
    headers: BTreeMap<String, String>,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("JSON")
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// Sends a request as it is written, and reads until the server closes.
fn exchange(host: &Host, address: SocketAddr, request: &str) -> String {
    let mut stream = host.run(|| TcpStream::connect(address)).expect("connected");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    // The server may answer and close before it has read everything.
    let _ = stream.write_all(request.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).expect("text")
}

/// A request with a first line such as `GET /metrics` and more headers, which end their lines.
fn ask(host: &Host, address: SocketAddr, line: &str, headers: &str) -> Answer {
    let named = headers.to_ascii_lowercase().contains("host:");
    let name = match named {
        true => String::new(),
        false => format!("Host: {address}\r\n"),
    };
    let answer = exchange(
        host,
        address,
        &format!("{line} HTTP/1.1\r\n{name}{headers}\r\n"),
    );
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1));
    Answer {
        status: status
            .and_then(|status| status.parse().ok())
            .expect("status"),
        headers: lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect(),
        body: body.to_owned(),
    }
}

/// Samples of a text in either format: name with labels, value.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let sample = |line: &str| {
        let (series, value) = line.rsplit_once(' ').expect(line);
        (series.to_owned(), value.parse().expect(line))
    };
    lines.map(sample).collect()
}

/// The names that samples have.
fn names(text: &str) -> BTreeSet<String> {
    let name = |series: &String| series.split('{').next().expect("name").to_owned();
    samples(text).keys().map(name).collect()
}

/// Every name that begins with `relay_` in a text.
fn mentioned(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words
        .filter(|word| word.starts_with("relay_"))
        .map(str::to_owned)
        .collect()
}

/// All of this key, however deep.
fn values<'a>(value: &'a Value, key: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(fields) => {
            found.extend(fields.get(key).and_then(Value::as_str));
            fields.values().for_each(|field| values(field, key, found));
        }
        Value::Array(items) => items.iter().for_each(|item| values(item, key, found)),
        _ => {}
    }
}

#[test]
fn metrics_say_what_status_says() {
    let scene = Scene::open().expect("scene");
    let address = scene.address("metrics").expect("address");
    let scrape = |path: &str, headers: &str| {
        let answer = ask(scene.host(), address, &format!("GET {path}"), headers);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer
    };
    let plain = scrape("/metrics", "");
    assert_eq!(
        plain.header("content-type"),
        "text/plain; version=0.0.4; charset=utf-8"
    );
    let open = scrape("/metrics", OPENMETRICS);
    assert_eq!(
        open.header("content-type"),
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    );
    assert!(open.body.ends_with("# EOF\n") && !plain.body.contains("# EOF"));
    assert_eq!(names(&plain.body), names(&open.body));

    let status = scene.relay.json(["status"]).expect("status");
    let samples_now = samples(&plain.body);
    for (series, value) in [
        (r#"relay_pairs{state="offloaded"}"#, 4.0),
        (r#"relay_pairs{state="refused"}"#, 1.0),
        (r#"relay_refusals_total{cause="on_hold"}"#, 1.0),
        ("relay_ami_up", 1.0),
        ("relay_map_entries_max", 65_536.0),
    ] {
        assert_eq!(samples_now.get(series), Some(&value), "{series}");
    }
    // Each direction of the four calls that are offloaded, and the untouched one of the transcoded call.
    let proofs = samples_now["relay_proof_seconds_count"];
    assert!((8.0..=9.0).contains(&proofs), "{proofs}");
    assert_eq!(
        samples_now[r#"relay_proof_seconds_bucket{le="+Inf"}"#],
        proofs
    );
    // Eight packets, 20 ms apart, and the first needs no wait.
    let shortest = samples_now[r#"relay_proof_seconds_bucket{le="0.1"}"#];
    assert_eq!(shortest, 0.0, "proven sooner than packets come");
    let reasons = status["reasons"].as_array().expect("reasons");
    for row in reasons {
        let series = format!(
            "relay_packets_total{{reason={},verdict={}}}",
            row["reason"], row["verdict"]
        );
        let before = samples_now.get(&series).expect(&series);
        let after = row["packets"].as_u64().expect("packets") as f64;
        assert!(*before <= after, "{series}: {before}, then {after}");
    }

    // Counters grow between scrapes and begin nowhere anew.
    let again = samples(&scrape("/metrics", "").body);
    let totals = samples_now.iter().filter(|(series, _)| {
        series
            .split('{')
            .next()
            .is_some_and(|name| name.ends_with("_total"))
    });
    for (series, before) in totals {
        assert!(again[series] >= *before, "{series}");
    }
    assert!(!plain.body.contains("relay_stream_"), "only on request");
}

#[test]
fn promtool_documentation_and_dashboard_agree_with_a_scrape() {
    let scene = Scene::open().expect("scene");
    let address = scene.address("metrics").expect("address");
    let path = "GET /metrics?streams=1000";
    let scraped = ask(scene.host(), address, path, "").body;
    promtool::check_metrics(&scraped).expect("promtool check metrics");

    // A histogram is documented under the name of its family.
    let served = names(&scraped);
    let family = |name: &String| {
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix))
            .filter(|family| served.contains(&format!("{family}_bucket")));
        family.unwrap_or(name).to_owned()
    };
    let rows = DESCRIPTION
        .lines()
        .filter_map(|line| line.strip_prefix("| `"));
    let documented: BTreeSet<_> = rows
        .filter_map(|row| Some(row.split_once('`')?.0.to_owned()))
        .collect();
    assert_eq!(
        served.iter().map(family).collect::<BTreeSet<_>>(),
        documented
    );

    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("dashboard");
    let mut expressions = Vec::new();
    values(&dashboard, "expr", &mut expressions);
    assert!(expressions.len() >= 10, "{expressions:?}");
    for expression in expressions {
        let used = mentioned(expression);
        assert!(!used.is_empty(), "{expression}");
        let unknown: Vec<_> = used.difference(&served).collect();
        assert!(unknown.is_empty(), "{expression} uses {unknown:?}");
        promtool::check_expression(expression).expect(expression);
    }
}

#[test]
fn series_of_streams_are_few_and_the_worst() {
    let scene = Scene::open().expect("scene");
    let address = scene.address("metrics").expect("address");
    let scrape = |query: &str| ask(scene.host(), address, &format!("GET /metrics?{query}"), "");
    let series = |text: &str, name: &str| {
        let begins = format!("{name}{{");
        let found = samples(text).into_iter();
        found
            .filter(|(series, _)| series.starts_with(&begins))
            .collect::<Vec<_>>()
    };
    // The weak line loses one packet of sixty: more than a percent, once so many have come.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let one = scrape("streams=1").body;
        let lost = series(&one, "relay_stream_lost_packets");
        assert_eq!(lost.len(), 1, "{one}");
        if lost[0].1 > 0.0 {
            let whose = r#"channel="PJSIP/mobile-17-"#;
            assert!(lost[0].0.contains(whose), "{lost:?}");
            break;
        }
        assert!(Instant::now() < deadline, "nothing is lost: {one}");
        thread::sleep(Duration::from_millis(100));
    }
    let all = scrape("streams=1000").body;
    assert_eq!(series(&all, "relay_stream_offloaded").len(), 10);
    for query in ["streams=1001", "streams=-1", "streams=all", "strems=1"] {
        let answer = scrape(query);
        assert_eq!(answer.status, 400, "{query}");
        assert_eq!(answer.json()["error"]["code"], "invalid_request", "{query}");
    }
}

#[test]
fn the_network_may_only_read_and_only_by_a_right_name() {
    let scene = Scene::open().expect("scene");
    let host = scene.host();
    let (page, metrics) = (
        scene.address("http").expect("page"),
        scene.address("metrics").expect("metrics"),
    );
    for (address, path) in [(page, "/"), (page, "/v1/pairs"), (metrics, "/metrics")] {
        let line = format!("GET {path}");
        for name in ["localhost", "127.0.0.1:1", "[::1]", "pbx.test"] {
            let answer = ask(host, address, &line, &format!("Host: {name}\r\n"));
            assert_eq!(answer.status, 200, "{path} of {name}");
            assert!(
                answer
                    .header("content-security-policy")
                    .starts_with("default-src 'none'; ")
            );
            assert_eq!(answer.header("x-content-type-options"), "nosniff");
            assert_eq!(answer.header("referrer-policy"), "no-referrer");
        }
        for name in ["evil.example", "127.0.0.1.evil.example", ""] {
            let answer = ask(host, address, &line, &format!("Host: {name}\r\n"));
            assert_eq!(answer.status, 421, "{path} of {name}");
            assert_eq!(answer.json()["error"]["code"], "wrong_host");
        }
        let foreign = "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\n";
        assert_eq!(ask(host, address, &line, foreign).status, 403, "{path}");
        for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
            let answer = ask(host, address, &format!("{method} {path}"), "");
            assert_eq!(answer.status, 405, "{method} {path}");
        }
        let head = ask(host, address, &format!("HEAD {path}"), "");
        assert_eq!((head.status, head.body.as_str()), (200, ""), "{path}");
    }
    for line in [
        "DELETE /v1/pairs",
        "DELETE /v1/pairs/1",
        "POST /v1/detach",
        "POST /v1/pairs",
    ] {
        assert_eq!(ask(host, page, line, "").status, 405, "{line}");
    }
    assert_eq!(ask(host, page, "GET /metrics", "").status, 404);
    assert_eq!(ask(host, metrics, "GET /v1/pairs", "").status, 404);
    let long = format!("X: {}\r\n", "x".repeat(20_000));
    assert_eq!(ask(host, page, "GET /", &long).status, 431);
    // All of it left the calls alone.
    scene.until("offloaded", 4).expect("calls");

    let list = ask(host, page, "GET /v1/pairs?limit=2&sort=worst", "").json();
    assert_eq!(list["pairs"].as_array().map(Vec::len), Some(2));
    assert_eq!(
        (&list["matching"], &list["pairs"][0]["state"]),
        (&6.into(), &"refused".into())
    );
}

#[test]
fn followers_of_events_are_few_and_do_not_crowd_out_the_operator() {
    let scene = Scene::open().expect("scene");
    let (host, page) = (scene.host(), scene.address("http").expect("page"));
    let follow = || {
        let mut stream = host.run(|| TcpStream::connect(page)).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let request = format!("GET /v1/events?since=0 HTTP/1.1\r\nHost: {page}\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("asked");
        let mut status = [0; 12];
        stream.read_exact(&mut status).expect("answered");
        (stream, String::from_utf8_lossy(&status).into_owned())
    };
    let followers: Vec<_> = (0..8).map(|_| follow()).collect();
    assert!(followers.iter().all(|(_, status)| status == "HTTP/1.1 200"));
    assert_eq!(follow().1, "HTTP/1.1 504");
    let operator = scene.relay.follow().expect("events");
    operator.until("ami_up").expect("the operator follows");
    for (stream, _) in followers {
        stream.shutdown(Shutdown::Both).expect("left");
    }
    let deadline = Instant::now() + PATIENCE;
    while follow().1 != "HTTP/1.1 200" {
        assert!(Instant::now() < deadline, "no place was given back");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn other_machines_are_served_where_that_is_asked_for_and_warned_of() {
    let net = Direct::new(1).expect("network");
    let page = |relay: &Relay| -> SocketAddr {
        let status = relay.json(["status"]).expect("status");
        status["http"]
            .as_str()
            .expect("page")
            .parse()
            .expect("address")
    };
    let relay = Relay::attach(&net.pbx, "eth0", ["--http", "0"]).expect("relay");
    assert!(page(&relay).ip().is_loopback());
    assert!(
        !relay.log().contains("without a password"),
        "{}",
        relay.log()
    );
    drop(relay);
    let relay = Relay::attach(&net.pbx, "eth0", ["--http", "0.0.0.0:0"]).expect("relay");
    let log = relay.log();
    let warned = log
        .lines()
        .any(|line| line.contains("WARN") && line.contains("without a password"));
    assert!(warned, "{log}");
    let address = SocketAddr::new(PBX_V4, page(&relay).port());
    let answer = ask(&net.phones, address, "GET /v1/status", "");
    assert_eq!(
        (answer.status, &answer.json()["interface"]),
        (200, &"eth0".into())
    );
}

#[test]
fn an_address_that_cannot_be_had_is_a_clear_error() {
    let net = Direct::new(1).expect("network");
    let taken = net
        .pbx
        .run(|| TcpListener::bind("127.0.0.1:9180"))
        .expect("bound");
    let attach = |arguments: &[&str]| {
        let mut command = Command::new(binary("relay-user", "RELAY_USER_BIN").expect("built"));
        command.args(["attach", "eth0"]).args(arguments);
        let output = net.pbx.run_to_end(command).expect("run");
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let error = attach(&["--metrics", "9180"]);
    assert!(
        error.contains("cannot serve metrics on 127.0.0.1:9180: Address already in use"),
        "{error}"
    );
    let error = attach(&["--http", "198.51.100.1:80"]);
    assert!(
        error.contains("cannot serve the page on 198.51.100.1:80") && error.contains("--http"),
        "{error}"
    );
    drop(taken);
}
