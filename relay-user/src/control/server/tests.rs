//! Server and client against each other over a real socket, with a controller that answers from a
//! fixed table.

use std::{path::PathBuf, time::Duration};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use super::*;
use crate::{
    control::{
        MetricsReport,
        client::{Client, ClientError, Events},
        model::{
            Detached, Feed, Found, LegReport, PairReport, PairState, StatusReport, StreamStates,
        },
    },
    controller::proof_time::ProofTimes,
    datapath::AttachMode,
    events::{KEPT, SUBSCRIBERS, Subject, TransitionKind},
    pair::{Leg, PayloadTypes, Proof},
};

/// Cuts off what does not arrive, and nothing else in the time of a test.
const SHORT: Limits = Limits {
    arrival: Duration::from_millis(200),
    connection: Duration::from_secs(3600),
    ..LIMITS
};

/// Longer than any of these tests takes when all is well.
const HANG: Duration = Duration::from_secs(20);

/// A served socket in a folder of its own.
struct Served {
    client: Client,
    events: EventBus,
    stop: Option<oneshot::Sender<()>>,
    server: JoinHandle<io::Result<()>>,
    folder: tempfile::TempDir,
}

impl Served {
    fn new(limits: Limits, commands: mpsc::Sender<Command>) -> Self {
        let folder = tempfile::tempdir().expect("temporary directory");
        let socket = ControlSocket::claim(&folder.path().join("eth0.sock")).expect("claim");
        let client = Client::new(socket.path().to_owned());
        let events = EventBus::new();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(serve_within(
            limits,
            socket,
            commands,
            events.clone(),
            async {
                // A dropped sender stops too.
                let _ = stopped.await;
            },
        ));
        Self {
            client,
            events,
            stop: Some(stop),
            server,
            folder,
        }
    }

    fn with_controller(limits: Limits) -> Self {
        let (commands, received) = mpsc::channel(4);
        tokio::spawn(controller(received));
        Self::new(limits, commands)
    }

    fn path(&self) -> PathBuf {
        self.client.socket().to_owned()
    }

    async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.client.socket())
            .await
            .expect("connect")
    }

    /// Sends bytes as they are; returns all that comes back.
    async fn raw(&self, request: &[u8]) -> String {
        let mut stream = self.connect().await;
        // The server may answer and close before it has read everything.
        let _ = stream.write_all(request).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Status and error code of the answer to a request.
    async fn refusal(&self, head: &str, body: &str) -> (u16, String) {
        let request = format!(
            "{head} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        refusal(&self.raw(request.as_bytes()).await)
    }
}

fn refusal(answer: &str) -> (u16, String) {
    let status = answer
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .expect(answer);
    let body = answer.split("\r\n\r\n").nth(1).expect(answer);
    let body: Value = serde_json::from_str(body).expect(answer);
    assert!(
        body["error"]["message"]
            .as_str()
            .is_some_and(|words| !words.is_empty()),
        "{answer}"
    );
    (
        status,
        body["error"]["code"].as_str().expect(answer).to_owned(),
    )
}

fn report(id: u64, pair: &Pair) -> PairReport {
    PairReport {
        id,
        feed: Feed::Api,
        call: None,
        channels: Vec::new(),
        state: PairState::Waiting,
        why: Some("no neighbour".into()),
        legs: pair
            .legs
            .iter()
            .map(|leg| LegReport {
                local: leg.local,
                remote: leg.remote,
                sends_from: leg.sends_from,
                channel: None,
            })
            .collect(),
        proof: pair.proof,
        priority: pair.priority,
        payload_types: pair.payload_types.clone(),
        streams: Vec::new(),
    }
}

fn status_report() -> StatusReport {
    StatusReport {
        time: "2026-01-31T09:30:00.120Z".into(),
        version: "0.1.0".into(),
        abi: 2,
        pid: 1,
        interface: "eth0".into(),
        ifindex: 2,
        mode: AttachMode::Generic,
        mode_reason: "asked for".into(),
        dscp: crate::dscp::Dscp::Set(46),
        priority: None,
        proof: 8,
        pins: "/sys/fs/bpf/relay/v6/eth0".into(),
        uptime_seconds: 1,
        max_streams: 2,
        pairs: 0,
        streams: 0,
        lease_ms: 5000,
        offloaded: 0,
        waiting: 0,
        refused: 0,
        unproven: 0,
        stream_states: StreamStates::default(),
        metrics: None,
        http: None,
        ami: None,
        reasons: Vec::new(),
        refusals: Vec::new(),
    }
}

/// Knows one pair of number 7, and refuses to add what its first remote port names the reason for.
async fn controller(mut commands: mpsc::Receiver<Command>) {
    let known = || report(7, &pair(30000));
    let numbered = |id| {
        if id == 7 {
            Ok(known())
        } else {
            Err(ApiError::unknown_pair(id))
        }
    };
    while let Some(command) = commands.recv().await {
        // Whether anybody still waits for an answer is not this controller's concern.
        let _ = match command {
            Command::Add { pair, reply } => reply
                .send(match usize::from(pair.legs[0].remote.port()) {
                    number if number < ErrorCode::ALL.len() + 1 => {
                        Err(ApiError::new(ErrorCode::ALL[number - 1], "told to"))
                    }
                    _ => Ok(report(8, &pair)),
                })
                .is_ok(),
            Command::AddAll { pairs, reply } => {
                let numbered =
                    pairs
                        .iter()
                        .zip(8..)
                        .map(|(pair, id)| match pair.legs[0].remote.port() {
                            1 => Err(ApiError::new(ErrorCode::Duplicate, "told to")),
                            _ => Ok(id),
                        });
                reply.send(Ok(numbered.collect())).is_ok()
            }
            Command::Remove { id, reply } | Command::Show { id, reply } => {
                reply.send(numbered(id)).is_ok()
            }
            Command::Flush { reply } => reply.send(Ok(vec![known()])).is_ok(),
            Command::List { reply, .. } => reply.send(Ok(vec![known(), known()])).is_ok(),
            Command::Status { reply } => reply.send(Ok(status_report())).is_ok(),
            Command::Metrics { reply } => reply
                .send(Ok(MetricsReport {
                    status: status_report(),
                    events: Vec::new(),
                    proof_times: ProofTimes::default(),
                }))
                .is_ok(),
            Command::Detach { reply } => reply
                .send(Ok(Detached {
                    interface: "eth0".into(),
                    found: Found::Running,
                    pairs: 1,
                }))
                .is_ok(),
        };
    }
}

fn pair(remote_port: usize) -> Pair {
    let leg = |text: &str| text.parse::<Leg>().expect(text);
    Pair::new(
        [
            leg(&format!("192.0.2.1:10000=192.0.2.11:{remote_port}")),
            leg("192.0.2.1:10002=192.0.2.12:30002"),
        ],
        vec![
            PayloadTypes::same(0),
            PayloadTypes {
                first: 101,
                second: 96,
            },
        ],
        Proof::Wire,
    )
    .expect("pair")
}

const GOOD: &str = r#"{"legs":[{"local":"192.0.2.1:10000","remote":"192.0.2.11:30000"},
    {"local":"192.0.2.1:10002","remote":"192.0.2.12:30002"}]}"#;

#[tokio::test]
async fn every_command_makes_the_round_trip() {
    let served = Served::with_controller(LIMITS);
    let client = &served.client;
    assert_eq!(
        client.add(&pair(30000)).await.expect("add"),
        report(8, &pair(30000))
    );
    assert_eq!(client.show(7).await.expect("show"), report(7, &pair(30000)));
    assert_eq!(client.remove(7).await.expect("remove").id, 7);
    assert_eq!(client.flush().await.expect("flush").pairs.len(), 1);
    assert_eq!(client.list().await.expect("list").pairs.len(), 2);
    assert_eq!(client.status().await.expect("status"), status_report());
}

#[tokio::test]
async fn detach_returns_when_the_socket_is_free() {
    let (commands, mut received) = mpsc::channel(1);
    let mut served = Served::new(LIMITS, commands);
    let path = served.path();
    let client = served.client.clone();
    let detaching = tokio::spawn(async move { client.detach().await });
    let Some(Command::Detach { reply }) = received.recv().await else {
        panic!("no detach")
    };
    reply
        .send(Ok(Detached {
            interface: "eth0".into(),
            found: Found::Running,
            pairs: 0,
        }))
        .expect("client waits");
    // The socket is still listened on, so the client must go on waiting.
    timeout(Duration::from_millis(200), async {
        while !detaching.is_finished() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect_err("detach returned while the socket was still in use");
    served.stop.take();
    assert_eq!(
        detaching.await.expect("task").expect("detach").found,
        Found::Running
    );
    assert!(matches!(
        served.client.status().await,
        Err(ClientError::NoDaemon(_))
    ));
    ControlSocket::claim(&path).expect("free");
}

#[tokio::test]
async fn every_error_code_arrives_with_its_status() {
    let served = Served::with_controller(LIMITS);
    for (index, code) in ErrorCode::ALL.into_iter().enumerate() {
        let error = served
            .client
            .add(&pair(index + 1))
            .await
            .expect_err("refused");
        let ClientError::Refused(error) = error else {
            panic!("{error}")
        };
        assert_eq!(error, ApiError::new(code, "told to"));
        let body = GOOD.replace("30000", &(index + 1).to_string());
        let (status, _) = served.refusal("POST /v1/pairs", &body).await;
        assert_eq!(status, code.status(), "{code:?}");
    }
    let error = served
        .client
        .show(9)
        .await
        .expect_err("unknown")
        .to_string();
    assert_eq!(
        error,
        "there is no pair 9: `relay-user list` shows those there are"
    );
}

#[tokio::test]
async fn bad_requests_are_refused() {
    let served = Served::with_controller(LIMITS);
    let same = GOOD.replace("10002", "10000");
    let unknown_field = GOOD.replacen('{', r#"{"codec":"ulaw","#, 1);
    let three_legs = GOOD.replace("]}", r#",{"local":"192.0.2.1:1","remote":"192.0.2.2:2"}]}"#);
    let port_zero = GOOD.replace("30002", "0");
    let long_filter = format!("GET /v1/pairs?filter={}", "+a".repeat(513));
    for (head, body, status, code) in [
        ("GET /", "", 404, "unknown_path"),
        ("GET /v1/pairs/7/streams", "", 404, "unknown_path"),
        ("GET /v1/pairs/8", "", 404, "unknown_pair"),
        ("DELETE /v1/pairs/8", "", 404, "unknown_pair"),
        ("GET /v1/pairs/seven", "", 400, "invalid_request"),
        ("GET /v1/pairs/-1", "", 400, "invalid_request"),
        ("GET /v1/pairs/%ff", "", 400, "invalid_request"),
        (&long_filter, "", 400, "invalid_request"),
        ("PUT /v1/pairs", "", 405, "method_not_allowed"),
        ("GET /v1/detach", "", 405, "method_not_allowed"),
        ("POST /v1/events", "", 405, "method_not_allowed"),
        ("GET /v1/events?since=", "", 400, "invalid_request"),
        ("GET /v1/events?since=-1", "", 400, "invalid_request"),
        ("POST /v1/pairs", "", 400, "invalid_request"),
        ("POST /v1/pairs", "{", 400, "invalid_request"),
        ("POST /v1/pairs", "[]", 400, "invalid_request"),
        ("POST /v1/pairs", &unknown_field, 400, "invalid_request"),
        ("POST /v1/pairs", &three_legs, 400, "invalid_request"),
        ("POST /v1/pairs", &same, 400, "invalid_pair"),
        ("POST /v1/pairs", &port_zero, 400, "invalid_pair"),
    ] {
        assert_eq!(
            served.refusal(head, body).await,
            (status, code.to_owned()),
            "{head} {body}"
        );
    }
    served.client.status().await.expect("still served");
}

#[tokio::test]
async fn a_request_without_payload_types_is_mu_law() {
    let served = Served::with_controller(LIMITS);
    let request = format!(
        "POST /v1/pairs HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{GOOD}",
        GOOD.len()
    );
    let answer = served.raw(request.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
    assert!(
        answer.contains(r#""payload_types":[{"first":0,"second":0}]"#),
        "{answer}"
    );
    assert!(
        answer.contains("content-type: application/json"),
        "{answer}"
    );
}

#[tokio::test]
async fn an_oversized_body_is_refused() {
    let served = Served::with_controller(LIMITS);
    let body = "x".repeat(10_000_000);
    let (status, code) = served.refusal("POST /v1/pairs", &body).await;
    assert_eq!((status, code.as_str()), (413, "body_too_large"));
    // In chunks, so that its length is not announced.
    let chunk = format!("8000\r\n{}\r\n", "x".repeat(0x8000));
    let request = format!(
        "POST /v1/pairs HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n{}",
        chunk.repeat(300)
    );
    let (status, code) = refusal(&served.raw(request.as_bytes()).await);
    assert_eq!((status, code.as_str()), (413, "body_too_large"));
    served.client.status().await.expect("still served");
}

#[tokio::test]
async fn garbage_is_refused() {
    let served = Served::with_controller(SHORT);
    let endless_head = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(1 << 20));
    for (request, status) in [
        (
            &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\x00\r\n\r\n"[..],
            "400",
        ),
        (b"relay, please\r\n\r\n", "400"),
        (b"GET /v1/status HTTP/9.9\r\n\r\n", "400"),
        (
            b"POST /v1/pairs HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
            "400",
        ),
        (endless_head.as_bytes(), "431"),
    ] {
        let answer = served.raw(request).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{answer}"
        );
    }
    served.client.status().await.expect("still served");
}

#[tokio::test]
async fn slow_clients_are_cut_off_and_block_nobody() {
    let served = Served::with_controller(SHORT);
    let mut slow = Vec::new();
    for request in [
        "",
        "GET /v1/st",
        "POST /v1/pairs HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{",
    ] {
        let mut stream = served.connect().await;
        stream.write_all(request.as_bytes()).await.expect("write");
        slow.push(stream);
    }
    served.client.status().await.expect("served meanwhile");
    let mut answers = Vec::new();
    for mut stream in slow {
        let mut answer = String::new();
        timeout(HANG, stream.read_to_string(&mut answer))
            .await
            .expect("cut off")
            .expect("closed");
        answers.push(answer);
    }
    assert_eq!(answers[..2], ["", ""]);
    assert_eq!(refusal(&answers[2]), (408, "request_timeout".to_owned()));
}

#[tokio::test]
async fn several_pairs_are_added_each_by_itself() {
    let served = Served::with_controller(SHORT);
    let pairs = [pair(30000), pair(1), pair(30000)];
    let added = served.client.add_all(&pairs).await.expect("answer");
    let codes: Vec<_> = added
        .iter()
        .map(|outcome| outcome.as_ref().map_err(|error| error.code))
        .collect();
    assert_eq!(codes, [Ok(&8), Err(ErrorCode::Duplicate), Ok(&10)]);

    // What no pair can be is refused where it stands.
    let leg =
        |local, remote| format!(r#"{{"local":"192.0.2.1:{local}","remote":"192.0.2.9:{remote}"}}"#);
    let text = |remote| format!(r#"{{"legs":[{},{}]}}"#, leg(2, remote), leg(4, 6));
    let body = format!(r#"{{"pairs":[{},{},{}]}}"#, text(8), text(0), text(8));
    let request = format!(
        "POST /v1/pairs/batch HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = served.raw(request.as_bytes()).await;
    let body = answer.split("\r\n\r\n").nth(1).expect(&answer);
    let report: AddAllReport = serde_json::from_str(body).expect(body);
    let found: Vec<_> = report
        .results
        .iter()
        .map(|result| (result.id, result.error.as_ref().map(|error| error.code)))
        .collect();
    let invalid = (None, Some(ErrorCode::InvalidPair));
    assert_eq!(found, [(Some(8), None), invalid, (Some(9), None)]);
}

#[tokio::test]
async fn a_batch_is_bounded() {
    let served = Served::with_controller(SHORT);
    let head = "POST /v1/pairs/batch";
    let one = serde_json::to_string(&AddRequest::from(&pair(30000))).expect("JSON");
    let body = |count: usize| format!(r#"{{"pairs":[{}]}}"#, vec![&one[..]; count].join(","));
    let added = served.client.add_all(&vec![pair(30000); BATCH]).await;
    assert_eq!(added.expect("answer").len(), BATCH);
    assert_eq!(
        served.refusal(head, &body(BATCH + 1)).await,
        (400, "invalid_request".to_owned())
    );
    assert_eq!(
        served
            .refusal(head, &" ".repeat(LIMITS.batch_body + 1))
            .await,
        (413, "body_too_large".to_owned())
    );
    assert_eq!(
        served.refusal(head, r#"{"pairs":[{}]}"#).await,
        (400, "invalid_request".to_owned())
    );
}

#[tokio::test]
async fn a_long_list_is_made_in_parts() {
    let (commands, mut received) = mpsc::channel(1);
    let served = Served::new(LIMITS, commands);
    let parts = [PART, PART, 1];
    let controller = async {
        let mut id = 0;
        for count in parts {
            let Some(Command::List {
                after,
                limit,
                reply,
            }) = received.recv().await
            else {
                panic!("no list")
            };
            assert_eq!((after, limit), (id, PART));
            let pairs = (0..count).map(|_| {
                id += 1;
                report(id, &pair(30000))
            });
            reply.send(Ok(pairs.collect())).expect("server waits");
        }
    };
    let (list, ()) = tokio::join!(served.client.list(), controller);
    let list = list.expect("answer");
    let ids: Vec<_> = list.pairs.iter().map(|pair| pair.id).collect();
    let all: Vec<_> = (1..=2 * PART as u64 + 1).collect();
    assert_eq!(ids, all);
    assert_eq!(list.matching, all.len() as u64);

    // The daemon ends before the last: no whole answer.
    let controller = async {
        let Some(Command::List { reply, .. }) = received.recv().await else {
            panic!("no list")
        };
        reply
            .send(Ok(vec![report(1, &pair(30000)); PART]))
            .expect("server waits");
        drop(received.recv().await);
    };
    let text = async {
        let mut text = served.client.list_text().await.expect("the first part");
        loop {
            match text.next().await {
                Ok(Some(_)) => {}
                end => break end,
            }
        }
    };
    let (end, ()) = tokio::join!(text, controller);
    assert!(matches!(end, Err(ClientError::Broken { .. })), "{end:?}");
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_off() {
    let (commands, mut received) = mpsc::channel(1);
    let limits = Limits {
        connection: Duration::from_millis(300),
        ..LIMITS
    };
    let served = Served::new(limits, commands);
    let mut deaf = served.connect().await;
    deaf.write_all(b"GET /v1/pairs HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .expect("write");
    let Some(Command::List { reply, .. }) = received.recv().await else {
        panic!("no list")
    };
    // Far more than the socket's buffers hold.
    let many = vec![report(7, &pair(30000)); 10_000];
    let whole = serde_json::to_vec(&many).expect("JSON").len();
    reply.send(Ok(many)).expect("server waits");
    tokio::spawn(controller(received));
    served.client.status().await.expect("served meanwhile");
    // Nothing is read before the server has given up, which shows in that writing fails.
    let given_up = async {
        while deaf.write_all(b" ").await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(HANG, given_up).await.expect("cut off");
    let mut answer = Vec::new();
    let _ = deaf.read_to_end(&mut answer).await;
    assert!(
        answer.len() < whole,
        "{} of {whole} bytes arrived",
        answer.len()
    );
}

#[tokio::test]
async fn more_clients_than_places_wait_for_one() {
    let (commands, mut received) = mpsc::channel(4);
    let served = Served::new(
        Limits {
            connections: 2,
            ..LIMITS
        },
        commands,
    );
    let ask = || {
        let client = served.client.clone();
        tokio::spawn(async move { client.status().await })
    };
    let asked = [ask(), ask(), ask()];
    let mut replies = Vec::new();
    for _ in 0..2 {
        let Some(Command::Status { reply }) = received.recv().await else {
            panic!("no status")
        };
        replies.push(reply);
    }
    timeout(Duration::from_millis(200), received.recv())
        .await
        .expect_err("a third was served at once");
    for reply in replies {
        reply.send(Ok(status_report())).expect("server waits");
    }
    tokio::spawn(controller(received));
    for client in asked {
        timeout(HANG, client)
            .await
            .expect("served in the end")
            .expect("task")
            .expect("status");
    }
}

#[tokio::test]
async fn a_silent_controller_is_reported_and_its_command_is_closed() {
    let (commands, mut received) = mpsc::channel(1);
    let limits = Limits {
        answer: Duration::from_millis(100),
        ..LIMITS
    };
    let served = Served::new(limits, commands);
    let error = served
        .client
        .add(&pair(30000))
        .await
        .expect_err("silence")
        .to_string();
    assert!(error.contains("did not answer within 0.1 s"), "{error}");
    let Some(Command::Add { reply, .. }) = received.recv().await else {
        panic!("no add")
    };
    assert!(reply.is_closed());
}

#[tokio::test]
async fn a_client_that_leaves_closes_its_command() {
    let (commands, mut received) = mpsc::channel(1);
    let served = Served::new(LIMITS, commands);
    let mut stream = served.connect().await;
    stream
        .write_all(b"DELETE /v1/pairs HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .expect("write");
    let Some(Command::Flush { mut reply }) = received.recv().await else {
        panic!("no flush")
    };
    drop(stream);
    reply.closed().await;
}

#[tokio::test]
async fn an_ending_controller_is_reported() {
    let (commands, received) = mpsc::channel(1);
    drop(received);
    let served = Served::new(LIMITS, commands);
    assert_eq!(
        served.refusal("GET /v1/status", "").await,
        (503, "stopping".to_owned())
    );
}

#[tokio::test]
async fn answers_under_way_are_finished_at_the_end() {
    let (commands, mut received) = mpsc::channel(1);
    let mut served = Served::new(LIMITS, commands);
    let client = served.client.clone();
    let asked = tokio::spawn(async move { client.status().await });
    let Some(Command::Status { reply }) = received.recv().await else {
        panic!("no status")
    };
    served.stop.take();
    reply.send(Ok(status_report())).expect("server waits");
    asked.await.expect("task").expect("answered");
    served.server.await.expect("task").expect("server");
    assert_eq!(
        std::fs::read_dir(served.folder.path())
            .expect("folder")
            .count(),
        0
    );
}

impl Served {
    /// Something happens to a pair of this number.
    fn happens(&self, pair: u64) {
        let subject = Subject {
            pair: Some(pair),
            ..Subject::feed(Feed::Api)
        };
        self.events
            .publish(subject, TransitionKind::Offloaded, "told to");
    }

    /// Asks for events by hand; returns the connection after the head of the answer.
    async fn follow(&self, request: &str) -> BufReader<UnixStream> {
        let mut stream = self.connect().await;
        let request = format!("GET {request}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("write");
        let mut stream = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            let read = timeout(HANG, stream.read_line(&mut head)).await;
            assert_ne!(read.expect("a head").expect("read"), 0, "{head}");
        }
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert!(
            head.contains("\r\ncontent-type: text/event-stream\r\n"),
            "{head}"
        );
        stream
    }
}

/// The serial of what is told next.
async fn serial(events: &mut Events) -> u64 {
    match told(events).await {
        Some(Event::Transition(transition)) => transition.serial,
        other => panic!("{other:?}"),
    }
}

async fn told(events: &mut Events) -> Option<Event> {
    timeout(HANG, events.next())
        .await
        .expect("told")
        .expect("events")
}

#[tokio::test]
async fn events_are_told_as_they_happen() {
    let served = Served::with_controller(LIMITS);
    served.happens(7);
    let mut now = served.client.events(None).await.expect("events");
    let mut all = served.client.events(Some(0)).await.expect("events");
    assert_eq!(serial(&mut all).await, 1);
    for serial_then in 2..5 {
        served.happens(8);
        assert_eq!(serial(&mut now).await, serial_then);
        assert_eq!(serial(&mut all).await, serial_then);
    }
    let mut later = served.client.events(Some(3)).await.expect("events");
    assert_eq!(serial(&mut later).await, 4);
}

#[tokio::test]
async fn events_are_server_sent_events() {
    let served = Served::with_controller(LIMITS);
    (1..=9).for_each(|pair| served.happens(pair));
    for (request, serial) in [
        ("/v1/events?since=7 HTTP/1.1", 8),
        // Connected again: the query is still that of the first time.
        ("/v1/events?since=0 HTTP/1.1\r\nLast-Event-ID: 8", 9),
        ("/v1/events?since=7 HTTP/1.1\r\nLast-Event-ID:", 8),
    ] {
        let mut stream = served.follow(request).await;
        let mut lines = Vec::new();
        while lines.last().is_none_or(|line| line != "\n") {
            let mut line = String::new();
            let read = timeout(HANG, stream.read_line(&mut line)).await;
            assert_ne!(read.expect("an event").expect("read"), 0, "{lines:?}");
            // Lines of the chunked encoding end otherwise.
            if !line.ends_with("\r\n") {
                lines.push(line);
            }
        }
        let [id, event, data, _] = &lines[..] else {
            panic!("{lines:?}")
        };
        assert_eq!(*id, format!("id: {serial}\n"));
        assert_eq!(event, "event: offloaded\n");
        let data = data.strip_prefix("data: ").expect("data");
        let data: Value = serde_json::from_str(data).expect("JSON");
        assert_eq!(data["serial"], serial);
        assert_eq!(data["pair"], serial);
        assert_eq!(data["call"], Value::Null);
    }
    let request = "GET /v1/events HTTP/1.1\r\nhost: x\r\nlast-event-id: seven\r\n\r\n";
    let refused = refusal(&served.raw(request.as_bytes()).await);
    assert_eq!(refused, (400, "invalid_request".to_owned()));
}

#[tokio::test]
async fn events_outlast_every_other_connection() {
    let limits = Limits {
        connection: Duration::from_millis(50),
        heartbeat: Duration::from_millis(20),
        ..LIMITS
    };
    let served = Served::with_controller(limits);
    let mut events = served.client.events(None).await.expect("events");
    let mut stream = served.follow("/v1/events HTTP/1.1").await;
    let mut heartbeats = 0;
    while heartbeats < 10 {
        let mut line = String::new();
        let read = timeout(HANG, stream.read_line(&mut line)).await;
        assert_ne!(read.expect("alive").expect("read"), 0, "cut off");
        heartbeats += u32::from(line == ":\n");
    }
    served.happens(7);
    assert_eq!(serial(&mut events).await, 1);
}

#[tokio::test]
async fn followers_are_bounded_and_take_no_place_of_a_request() {
    let limits = Limits {
        connections: 2,
        ..LIMITS
    };
    let served = Served::with_controller(limits);
    let mut followers = Vec::new();
    for _ in 0..SUBSCRIBERS {
        let follower = timeout(HANG, served.client.events(None)).await;
        followers.push(follower.expect("a place").expect("events"));
    }
    let crowded = served.client.events(None).await.expect_err("one too many");
    assert!(
        matches!(&crowded, ClientError::Refused(error) if error.code == ErrorCode::Busy),
        "{crowded}"
    );
    let status = timeout(HANG, served.client.status()).await;
    status.expect("a place").expect("status");
    followers.pop();
    let room = async {
        while served.client.events(None).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    timeout(HANG, room).await.expect("room again");
}

#[tokio::test]
async fn who_does_not_read_misses_events_and_delays_nobody() {
    let served = Served::with_controller(LIMITS);
    let mut deaf = served.client.events(None).await.expect("events");
    let mut keen = served.client.events(None).await.expect("events");
    // Far more than the socket's buffers and the bus hold.
    let last = 20_000;
    for happened in 1..=last {
        served.happens(7);
        if happened % 100 == 0 {
            for expected in happened - 99..=happened {
                assert_eq!(serial(&mut keen).await, expected);
            }
        }
    }
    let (mut next, mut missed) = (1, 0);
    while next <= last {
        match told(&mut deaf).await {
            Some(Event::Transition(transition)) => {
                assert_eq!(transition.serial, next);
                next += 1;
            }
            Some(Event::Lagged(gap)) => {
                missed += gap.missed;
                next += gap.missed;
            }
            None => panic!("ended after {next}"),
        }
    }
    assert!(missed > 0 && missed <= last - KEPT as u64, "{missed}");
}

#[tokio::test]
async fn events_end_with_the_daemon_after_its_last() {
    let mut served = Served::with_controller(LIMITS);
    let mut events = served.client.events(None).await.expect("events");
    // In this order, so that the server knows of its end before it has told anything.
    served.stop.take();
    (1..=500).for_each(|pair| served.happens(pair));
    for expected in 1..=500 {
        assert_eq!(serial(&mut events).await, expected);
    }
    assert_eq!(told(&mut events).await, None);
    served.server.await.expect("task").expect("server");
}

#[tokio::test]
async fn one_answer_of_the_controller_serves_many_and_is_cut_to_the_limit() {
    let limits = Limits {
        pairs: 1,
        freshness: Duration::from_secs(3600),
        ..LIMITS
    };
    let (commands, mut received) = mpsc::channel(4);
    let served = Served::new(limits, commands);
    let (answers, ()) = tokio::join!(
        async {
            tokio::join!(
                served.raw(b"GET /v1/pairs?limit=9 HTTP/1.1\r\nhost: x\r\n\r\n"),
                served.raw(b"GET /v1/pairs HTTP/1.1\r\nhost: x\r\n\r\n"),
                served.raw(b"GET /v1/pairs?sort=newest HTTP/1.1\r\nhost: x\r\n\r\n"),
            )
        },
        async {
            let Some(Command::List { reply, .. }) = received.recv().await else {
                panic!("no list is asked for")
            };
            let pairs = vec![report(7, &pair(30000)), report(8, &pair(30000))];
            reply.send(Ok(pairs)).expect("somebody waits");
        }
    );
    assert!(
        received.try_recv().is_err(),
        "the controller is asked twice"
    );
    for (answer, id) in [(answers.0, 7), (answers.1, 7), (answers.2, 8)] {
        let body = answer.split("\r\n\r\n").nth(1).expect(&answer);
        let list: PairList = serde_json::from_str(body).expect(body);
        let ids: Vec<_> = list.pairs.iter().map(|pair| pair.id).collect();
        assert_eq!((ids, list.matching), (vec![id], 2));
    }
    let answer = served
        .raw(b"GET /v1/pairs/8 HTTP/1.1\r\nhost: x\r\n\r\n")
        .await;
    let body = answer.split("\r\n\r\n").nth(1).expect(&answer);
    let pair: PairReport = serde_json::from_str(body).expect(body);
    assert_eq!(pair.id, 8);
    let answer = served
        .raw(b"GET /v1/pairs/9 HTTP/1.1\r\nhost: x\r\n\r\n")
        .await;
    assert_eq!(refusal(&answer), (404, "unknown_pair".to_owned()));
    assert!(
        received.try_recv().is_err(),
        "the controller is asked again"
    );
    let answer = served
        .raw(b"GET /v1/pairs?sort=best HTTP/1.1\r\nhost: x\r\n\r\n")
        .await;
    assert_eq!(refusal(&answer), (400, "invalid_request".to_owned()));
}

#[test]
fn root_and_the_own_user_may_control() {
    for (peer, own, allowed) in [
        (0, 0, true),
        (0, 1000, true),
        (1000, 1000, true),
        (1001, 1000, false),
        (1000, 0, false),
    ] {
        assert_eq!(may_control(peer, own), allowed, "{peer} {own}");
    }
}
