//! SIP messages and session descriptions (RFC 3261, RFC 4566), as much as a phone needs to talk with one PBX.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use anyhow::{Context as _, Result, bail};

/// A request or a response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `INVITE sip:… SIP/2.0` or `SIP/2.0 200 OK`.
    pub start: String,
    /// In order; names may repeat.
    pub headers: Vec<(String, String)>,
    /// A session description, or nothing.
    pub body: String,
}

impl Message {
    /// A message without headers.
    pub fn new(start: impl Into<String>) -> Self {
        Self {
            start: start.into(),
            headers: Vec::new(),
            body: String::new(),
        }
    }

    /// Reads a datagram.
    ///
    /// # Errors
    /// It is no SIP message.
    pub fn parse(datagram: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(datagram).context("SIP is UTF-8")?;
        let (head, body) = text
            .split_once("\r\n\r\n")
            .context("a SIP message without end of its headers")?;
        let mut lines = head.split("\r\n");
        let mut message = Self::new(lines.next().unwrap_or_default());
        for line in lines {
            let (name, value) = line.split_once(':').context("a header without colon")?;
            message = message.with(name.trim(), value.trim());
        }
        body.clone_into(&mut message.body);
        Ok(message)
    }

    /// Adds a header.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// Adds a session description.
    #[must_use]
    pub fn with_session(mut self, body: String) -> Self {
        self.body = body;
        self.with("Content-Type", "application/sdp")
    }

    /// The first value of a header.
    pub fn get(&self, name: &str) -> Option<&str> {
        let matching = |(known, _): &&(String, String)| known.eq_ignore_ascii_case(name);
        let (_, value) = self.headers.iter().find(matching)?;
        Some(value)
    }

    /// All values of a header.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let matching = move |(known, _): &&(String, String)| known.eq_ignore_ascii_case(name);
        self.headers
            .iter()
            .filter(matching)
            .map(|(_, value)| value.as_str())
    }

    /// The same, of a header that every message must have.
    ///
    /// # Errors
    /// It has none.
    pub fn need(&self, name: &str) -> Result<&str> {
        self.get(name)
            .with_context(|| format!("a SIP message without {name}: {}", self.start))
    }

    /// The status code, if it is a response.
    pub fn status(&self) -> Option<u16> {
        let code = self.start.strip_prefix("SIP/2.0 ")?;
        code.get(..3)?.parse().ok()
    }

    /// The method: of a response, that of its request.
    pub fn method(&self) -> &str {
        match self.status() {
            Some(_) => self.get("CSeq").and_then(|value| value.split(' ').nth(1)),
            None => self.start.split(' ').next(),
        }
        .unwrap_or_default()
    }

    /// The user in the request's address.
    pub fn user(&self) -> Option<&str> {
        let uri = self.start.split(' ').nth(1)?;
        uri.strip_prefix("sip:")?.split(['@', ';']).next()
    }

    /// The branch of the topmost `Via`, which names the transaction.
    pub fn branch(&self) -> Option<&str> {
        parameter(self.get("Via")?, "branch")
    }

    /// The message as it goes on the wire.
    pub fn write(&self) -> Vec<u8> {
        let mut text = format!("{}\r\n", self.start);
        for (name, value) in &self.headers {
            write!(text, "{name}: {value}\r\n").expect("a String takes everything");
        }
        write!(
            text,
            "Content-Length: {}\r\n\r\n{}",
            self.body.len(),
            self.body
        )
        .expect("a String takes everything");
        text.into_bytes()
    }
}

/// A parameter of a header's value: `tag` in `<sip:1@pbx>;tag=x`.
pub fn parameter<'a>(value: &'a str, name: &str) -> Option<&'a str> {
    let mut parameters = value.rsplit('>').next()?.split(';').skip(1);
    parameters.find_map(|parameter| parameter.trim().strip_prefix(name)?.strip_prefix('='))
}

/// The address between the angle brackets of a header's value, or all of it.
pub fn uri(value: &str) -> &str {
    match value.split_once('<') {
        Some((_, rest)) => rest.split('>').next().unwrap_or(rest),
        None => value.split(';').next().unwrap_or(value),
    }
}

/// Who may send, as a session description says it of its own side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Both.
    Both,
    /// Only this side: the other one is on hold.
    SendOnly,
    /// Only the other one.
    ReceiveOnly,
    /// Nobody.
    Inactive,
}

impl Way {
    const ALL: [Self; 4] = [
        Self::Both,
        Self::SendOnly,
        Self::ReceiveOnly,
        Self::Inactive,
    ];

    fn attribute(self) -> &'static str {
        match self {
            Self::Both => "sendrecv",
            Self::SendOnly => "sendonly",
            Self::ReceiveOnly => "recvonly",
            Self::Inactive => "inactive",
        }
    }

    /// What the other side says in answer.
    #[must_use]
    pub fn answer(self) -> Self {
        match self {
            Self::SendOnly => Self::ReceiveOnly,
            Self::ReceiveOnly => Self::SendOnly,
            Self::Both | Self::Inactive => self,
        }
    }
}

/// A codec and the payload type that a side receives it with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Codec {
    /// As in `a=rtpmap`: `PCMU/8000`.
    pub name: &'static str,
    /// Payload type.
    pub payload_type: u8,
}

/// G.711 µ-law.
pub const ULAW: Codec = Codec {
    name: "PCMU/8000",
    payload_type: 0,
};
/// G.711 A-law.
pub const ALAW: Codec = Codec {
    name: "PCMA/8000",
    payload_type: 8,
};
/// Opus, with a payload type that Asterisk does not choose by itself.
pub const OPUS: Codec = Codec {
    name: "opus/48000/2",
    payload_type: 111,
};

const EVENTS: &str = "telephone-event/8000";
const VIDEO: &str = "H264/90000";
/// Payload type of video where this side chooses it.
const VIDEO_TYPE: u8 = 99;

/// One side's session description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Where it wants its audio: `0.0.0.0` is the old way to hold (RFC 2543).
    pub audio: SocketAddr,
    /// The one codec it speaks.
    pub codec: Codec,
    /// Payload type of telephone events.
    pub events: u8,
    /// Who may send.
    pub way: Way,
    /// The port where it wants video, if it speaks any.
    pub video: Option<u16>,
    /// Counts its changes.
    pub version: u32,
}

/// The other side's session description, as far as a phone must know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Where it wants its audio.
    pub audio: SocketAddr,
    /// Payload type of the codec asked for, if it speaks that.
    pub payload_type: Option<u8>,
    /// Payload type of telephone events, if it takes any.
    pub events: Option<u8>,
    /// Who may send.
    pub way: Way,
    /// Payload type of its video, if it has a line for it.
    pub video: Option<u8>,
}

impl Remote {
    /// Reads a session description of a phone that speaks this codec.
    ///
    /// # Errors
    /// It has no audio, or no address.
    pub fn parse(body: &str, codec: &str) -> Result<Self> {
        let lines: Vec<_> = body.lines().map(str::trim_end).collect();
        let media = |kind: &str| {
            let start = format!("m={kind} ");
            lines
                .iter()
                .skip_while(|line| !line.starts_with(&start))
                .enumerate()
                .take_while(|(at, line)| *at == 0 || !line.starts_with("m="))
                .map(|(_, line)| *line)
                .collect::<Vec<_>>()
        };
        let audio = media("audio");
        let port = audio
            .first()
            .and_then(|line| line.split(' ').nth(1))
            .context("a session without audio")?;
        let connection = audio.iter().chain(&lines);
        let address: IpAddr = connection
            .filter_map(|line| line.strip_prefix("c=IN IP"))
            .find_map(|rest| rest.split(' ').nth(1))
            .context("a session without address")?
            .parse()?;
        let mapped = |section: &[&str], name: &str| {
            section.iter().find_map(|line| {
                let (number, known) = line.strip_prefix("a=rtpmap:")?.split_once(' ')?;
                let same = known.eq_ignore_ascii_case(name);
                same.then(|| number.parse().ok())?
            })
        };
        let video = media("video");
        let way = |way: &Way| audio.contains(&&*format!("a={}", way.attribute()));
        Ok(Self {
            audio: SocketAddr::new(address, port.parse()?),
            payload_type: mapped(&audio, codec),
            events: mapped(&audio, EVENTS),
            way: Way::ALL.into_iter().find(way).unwrap_or(Way::Both),
            video: mapped(&video, VIDEO),
        })
    }
}

impl Session {
    /// Offers this session.
    pub fn offer(&self) -> String {
        let video = self.video.map(|port| (port, VIDEO_TYPE));
        self.write(self.codec.payload_type, Some(self.events), video)
    }

    /// Answers with this session, in the payload types of the offer.
    ///
    /// # Errors
    /// The offer lacks the codec.
    pub fn answer(&self, offer: &Remote) -> Result<String> {
        let Some(payload_type) = offer.payload_type else {
            bail!("no {} in the offer", self.codec.name)
        };
        // A line for each line of the offer; port 0 declines it.
        let video = offer.video.map(|kind| (self.video.unwrap_or(0), kind));
        Ok(self.write(payload_type, offer.events, video))
    }

    fn write(&self, payload_type: u8, events: Option<u8>, video: Option<(u16, u8)>) -> String {
        let Self { audio, codec, .. } = self;
        let (address, port) = (audio.ip(), audio.port());
        let family = if address.is_ipv4() { "IP4" } else { "IP6" };
        let types = events.map_or(payload_type.to_string(), |events| {
            format!("{payload_type} {events}")
        });
        let mut body = format!(
            "v=0\r\no=- 1 {} IN IP4 {}\r\ns=-\r\nc=IN {family} {address}\r\nt=0 0\r\n\
             m=audio {port} RTP/AVP {types}\r\na=rtpmap:{payload_type} {}\r\na=ptime:20\r\na={}\r\n",
            self.version,
            Ipv4Addr::LOCALHOST,
            codec.name,
            self.way.attribute(),
        );
        if let Some(events) = events {
            let line = format!("a=rtpmap:{events} {EVENTS}\r\na=fmtp:{events} 0-16\r\n");
            body += &line;
        }
        if let Some((port, kind)) = video {
            let line = format!("m=video {port} RTP/AVP {kind}\r\na=rtpmap:{kind} {VIDEO}\r\n");
            body += &line;
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> Session {
        Session {
            audio: "192.0.2.11:40000".parse().expect("address"),
            codec: ULAW,
            events: 96,
            way: Way::SendOnly,
            video: Some(40_004),
            version: 1,
        }
    }

    #[test]
    fn a_session_reads_as_written() {
        let remote = Remote::parse(&session().offer(), ULAW.name).expect("a session");
        let expected = Remote {
            audio: session().audio,
            payload_type: Some(0),
            events: Some(96),
            way: Way::SendOnly,
            video: Some(VIDEO_TYPE),
        };
        assert_eq!(remote, expected);
        let other = Remote::parse(&session().offer(), OPUS.name).expect("a session");
        assert_eq!(other.payload_type, None);
        session().answer(&other).expect_err("no Opus offered");
        let answer = session().answer(&Remote {
            events: Some(101),
            ..remote
        });
        let answer = Remote::parse(&answer.expect("an answer"), ULAW.name).expect("a session");
        assert_eq!(answer.events, Some(101), "the offer's payload type");
    }

    #[test]
    fn a_message_reads_as_written() {
        let message = Message::new("INVITE sip:3001@192.0.2.12:5070;x=y SIP/2.0")
            .with("Via", "SIP/2.0/UDP 192.0.2.1:5060;rport;branch=z9hG4bK1")
            .with("From", "\"Me; <you>\" <sip:caller@192.0.2.1>;tag=abc")
            .with_session("v=0\r\n".to_owned());
        let read = Message::parse(&message.write()).expect("a message");
        assert_eq!(read.user(), Some("3001"));
        assert_eq!((read.method(), read.status()), ("INVITE", None));
        assert_eq!(read.branch(), Some("z9hG4bK1"));
        assert_eq!(read.body, message.body);
        assert_eq!(
            parameter(read.get("from").expect("From"), "tag"),
            Some("abc")
        );
        let response = Message::new("SIP/2.0 200 OK").with("CSeq", "7 BYE");
        assert_eq!((response.method(), response.status()), ("BYE", Some(200)));
    }
}
