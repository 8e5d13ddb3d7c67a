//! rtpengine as a SIP proxy sees it: its control protocol "ng", which is bencoded dictionaries in UDP datagrams, each
//! behind a cookie that its answer repeats.

use std::{
    net::{SocketAddr, SocketAddrV4, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// How long an answer may take, and how long rtpengine may take to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// A client.
pub(crate) struct Control {
    socket: UdpSocket,
    /// Requests sent.
    sent: u64,
}

/// A request; what does not apply is left out.
#[derive(Clone, Copy, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Request<'a> {
    command: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    call_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from_tag: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to_tag: Option<&'a str>,
    #[serde(rename = "ICE", skip_serializing_if = "Option::is_none")]
    ice: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sdp: Option<&'a str>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Answer {
    result: String,
    error_reason: Option<String>,
    sdp: Option<String>,
}

impl Control {
    /// Waits until rtpengine answers there.
    ///
    /// # Errors
    /// It does not.
    pub(crate) fn connect(server: SocketAddr) -> Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(server)?;
        let mut control = Self { socket, sent: 0 };
        let start = Instant::now();
        loop {
            let ping = Request {
                command: "ping",
                ..Request::default()
            };
            match control.request(ping) {
                Ok(_) => return Ok(control),
                Err(error) if start.elapsed() > PATIENCE => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Sets a call up between two phones, and returns where each of them is to send.
    ///
    /// # Errors
    /// rtpengine refuses.
    pub(crate) fn call(
        &mut self,
        number: usize,
        phones: [SocketAddrV4; 2],
    ) -> Result<[SocketAddrV4; 2]> {
        let call = format!("call-{number}");
        let [caller, callee] = phones.map(description);
        let offer = Request {
            command: "offer",
            call_id: Some(&call),
            from_tag: Some("caller"),
            ice: Some("remove"),
            sdp: Some(&caller),
            ..Request::default()
        };
        let offered = self.request(offer)?;
        let answer = Request {
            command: "answer",
            to_tag: Some("callee"),
            sdp: Some(&callee),
            ..offer
        };
        let answered = self.request(answer)?;
        Ok([media(&answered)?, media(&offered)?])
    }

    /// The SDP in the answer, empty where there is none.
    fn request(&mut self, request: Request<'_>) -> Result<String> {
        self.sent += 1;
        let cookie = format!("{} ", self.sent);
        let datagram = [cookie.as_bytes(), &serde_bencode::to_bytes(&request)?].concat();
        self.socket.send(&datagram)?;
        let deadline = Instant::now() + PATIENCE;
        let mut buffer = [0; 65_536];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "no answer to {}", request.command);
            self.socket.set_read_timeout(Some(left))?;
            let length = self.socket.recv(&mut buffer)?;
            let Some(answer) = buffer[..length].strip_prefix(cookie.as_bytes()) else {
                continue;
            };
            let answer: Answer = serde_bencode::from_bytes(answer)?;
            match (&*answer.result, answer.error_reason) {
                ("ok" | "pong", _) => return Ok(answer.sdp.unwrap_or_default()),
                (result, reason) => bail!("{}: {result}: {reason:?}", request.command),
            }
        }
    }
}

/// An SDP (RFC 8866) with G.711 received there.
fn description(phone: SocketAddrV4) -> String {
    let (address, port) = (phone.ip(), phone.port());
    format!(
        "v=0\r\no=- 1 1 IN IP4 {address}\r\ns=-\r\nc=IN IP4 {address}\r\nt=0 0\r\n\
         m=audio {port} RTP/AVP 0\r\na=rtpmap:0 PCMU/8000\r\na=ptime:20\r\n"
    )
}

/// Where an SDP has its audio received.
fn media(description: &str) -> Result<SocketAddrV4> {
    let field = |prefix: &str| {
        let line = description
            .lines()
            .find_map(|line| line.strip_prefix(prefix));
        line.with_context(|| format!("no {prefix} in {description}"))
    };
    let address = field("c=IN IP4 ")?.trim().parse()?;
    let port = field("m=audio ")?.split(' ').next().unwrap_or_default();
    Ok(SocketAddrV4::new(address, port.parse()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_is_where_it_was_described() {
        let phone = "192.0.2.11:30000".parse().expect("an address");
        assert_eq!(media(&description(phone)).expect("an SDP"), phone);
        assert!(media("v=0").is_err());
    }

    #[test]
    fn a_request_is_a_sorted_dictionary() {
        let request = Request {
            command: "offer",
            call_id: Some("a"),
            ..Request::default()
        };
        let text = serde_bencode::to_string(&request).expect("a request");
        assert_eq!(text, "d7:call-id1:a7:command5:offere");
    }
}
