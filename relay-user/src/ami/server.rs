//! An AMI server in this process, for tests of session and feed.

use std::collections::HashMap;

use md5::{Digest, Md5};
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex,
    split,
};

use super::{
    conditions,
    session::{AmiError, Session},
    simulation::Pbx,
    tracker::{CallId, Query},
};
use crate::{config::AmiSettings, secret::Secret};

pub(super) const BANNER: &str = "Asterisk Call Manager/11.0.0\r\n";
const CHALLENGE: &str = "168239472";

pub(super) fn config() -> AmiSettings {
    AmiSettings {
        address: "pbx.example:5038".to_owned(),
        user: "relay".to_owned(),
        secret: Secret::new("hunter2".to_owned()).expect("secret"),
    }
}

/// The server's end of one connection.
pub(super) struct Server<S = DuplexStream> {
    reader: ReadHalf<S>,
    writer: WriteHalf<S>,
    received: Vec<u8>,
    /// The login as received.
    pub(super) login: HashMap<String, String>,
}

/// Both ends of a connection in memory. With it, tokio's paused clock moves only when every task
/// really waits, which sockets cannot promise.
pub(super) fn pipe() -> (DuplexStream, Server) {
    let (ours, theirs) = duplex(64 * 1024);
    (ours, Server::new(theirs))
}

/// A logged-in session and its server.
pub(super) async fn logged_in() -> (Session<DuplexStream>, Server) {
    let (stream, mut server) = pipe();
    let config = config();
    let (session, ()) = tokio::join!(Session::login(stream, &config), server.accept());
    (session.expect("the right secret"), server)
}

/// How a login ends that the server answers like this: one text per action, the ActionID in place of `$`.
pub(super) async fn login_against(answers: &[&str]) -> Result<Session<DuplexStream>, AmiError> {
    let (stream, mut server) = pipe();
    let config = config();
    let serve = async {
        for (index, answer) in answers.iter().enumerate() {
            if index == 0 {
                server.send(answer).await;
                continue;
            }
            let action = server.action().await.expect("an action for every answer");
            server.send(&answer.replace("$", &action["ActionID"])).await;
        }
        drop(server);
    };
    tokio::join!(Session::login(stream, &config), serve).0
}

impl<S: AsyncRead + AsyncWrite> Server<S> {
    pub(super) fn new(stream: S) -> Self {
        let (reader, writer) = split(stream);
        Self {
            reader,
            writer,
            received: Vec::new(),
            login: HashMap::new(),
        }
    }

    pub(super) async fn send(&mut self, text: &str) {
        // A client that is gone is what some tests are about.
        let _ = self.writer.write_all(text.as_bytes()).await;
    }

    /// The next action's headers; `None` at the end of the stream.
    pub(super) async fn action(&mut self) -> Option<HashMap<String, String>> {
        loop {
            if let Some(end) = self
                .received
                .windows(4)
                .position(|window| window == b"\r\n\r\n")
            {
                let rest = self.received.split_off(end + 4);
                let text =
                    String::from_utf8(std::mem::replace(&mut self.received, rest)).expect("UTF-8");
                let headers = text.lines().filter_map(|line| line.split_once(": "));
                return Some(
                    headers
                        .map(|(key, value)| (key.to_owned(), value.to_owned()))
                        .collect(),
                );
            }
            let mut chunk = [0; 4096];
            match self.reader.read(&mut chunk).await {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
            }
        }
    }

    /// Does what Asterisk does until a client is logged in and has asked for its privileges.
    pub(super) async fn accept(&mut self) {
        self.send(BANNER).await;
        while let Some(action) = self.action().await {
            let id = &action["ActionID"];
            match action["Action"].as_str() {
                "Challenge" => {
                    self.send(&format!(
                        "Response: Success\r\nActionID: {id}\r\nChallenge: {CHALLENGE}\r\n\r\n"
                    ))
                    .await;
                }
                "Login" => {
                    let key: String = Md5::digest(format!("{CHALLENGE}hunter2"))
                        .iter()
                        .map(|byte| format!("{byte:02x}"))
                        .collect();
                    let welcome = action.get("Key") == Some(&key);
                    let answer = if welcome {
                        "Response: Success\r\nActionID: $\r\nMessage: Authentication accepted\r\n\r\n\
                         Event: FullyBooted\r\nPrivilege: system,all\r\nStatus: Fully Booted\r\n\r\n"
                    } else {
                        "Response: Error\r\nActionID: $\r\nMessage: Authentication failed\r\n\r\n"
                    };
                    self.send(&answer.replace("$", id)).await;
                    self.login = action;
                }
                "Getvar" => {
                    self.send(&format!(
                        "Response: Error\r\nActionID: {id}\r\nMessage: No such channel\r\n\r\n"
                    ))
                    .await;
                }
                _ => {
                    let variable = &action["Variable"];
                    self.send(&format!(
                        "Response: Success\r\nActionID: {id}\r\nMessage: Variable Set\r\n\r\n\
                         Event: VarSet\r\nPrivilege: dialplan,all\r\nChannel: none\r\n\
                         Uniqueid: none\r\nVariable: {variable}\r\nValue: \r\n\r\n"
                    ))
                    .await;
                    return;
                }
            }
        }
    }

    /// Answers the feed's questions as a PBX would, until the connection ends.
    pub(super) async fn serve(&mut self, pbx: &Pbx) {
        while let Some(action) = self.action().await {
            self.answer(&action, pbx).await;
        }
    }

    pub(super) async fn answer(&mut self, action: &HashMap<String, String>, pbx: &Pbx) {
        let call = |id: &str| CallId::new(id).expect("a bridge id");
        let query = match action["Action"].as_str() {
            "BridgeList" => Query::Bridges,
            "BridgeInfo" => Query::Bridge {
                call: call(&action["BridgeUniqueid"]),
                generation: 0,
            },
            "Status" => Query::Channel {
                call: call("unknown"),
                generation: 0,
                channel: action["Channel"].clone(),
            },
            "Getvar" if action["Variable"].starts_with("PJSIP_ENDPOINT") => Query::RtpTimeout {
                endpoint: action["Variable"]
                    .trim_start_matches("PJSIP_ENDPOINT(")
                    .trim_end_matches(",rtp_timeout)")
                    .to_owned(),
            },
            "Getvar" => Query::Item {
                call: call("unknown"),
                generation: 0,
                channel: action["Channel"].clone(),
                item: conditions::items(true, false, false)
                    .iter()
                    .copied()
                    .find(|item| *item == action["Variable"])
                    .expect("an item that the conditions need"),
            },
            _ => {
                return self
                    .send(&format!(
                        "Response: Success\r\nActionID: {}\r\nPing: Pong\r\n\r\n",
                        action["ActionID"]
                    ))
                    .await;
            }
        };
        let answer = pbx.answer(&query);
        let mut text = String::new();
        for message in std::iter::once(&answer.response).chain(&answer.items) {
            for (index, (key, value)) in message.fields().enumerate() {
                text.push_str(&format!("{key}: {value}\r\n"));
                if index == 0 {
                    text.push_str(&format!("ActionID: {}\r\n", action["ActionID"]));
                }
            }
            text.push_str("\r\n");
        }
        self.send(&text).await;
    }
}
