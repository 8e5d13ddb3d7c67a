//! rtpengine in userspace, as Debian 12 has it. Calls are set up by its control protocol "ng": dictionaries in bencode,
//! each in a UDP datagram behind a cookie (docs/ng_control_protocol.md of rtpengine).

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use relay_tests::{
    debian::Installation,
    namespace::{Host, Process},
    topology::PBX_V4,
};
use serde::{Deserialize, Serialize};

use crate::wire::call::{Call, Leg};

const INSTALLATION: Installation = Installation {
    program: "rtpengine",
    cache: "relay-rtpengine",
    name: "bookworm-1",
    suite: "bookworm",
    packages: &["rtpengine-daemon"],
    finish: None,
};
/// Where it is told of calls.
const CONTROL: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 2223);
/// The setting without which it relays with its kernel module.
pub(crate) const WITHOUT_MODULE: &str = "--table=-1";
/// How long it may take to start.
const PATIENCE: Duration = Duration::from_secs(20);
/// Before a question is asked again.
const AGAIN: Duration = Duration::from_millis(200);

/// A running rtpengine. Dropping it kills it.
pub(crate) struct Rtpengine {
    process: Process,
    control: UdpSocket,
}

#[derive(Serialize)]
struct Request<'a> {
    command: &'a str,
    #[serde(rename = "call-id", skip_serializing_if = "Option::is_none")]
    call: Option<&'a str>,
    #[serde(rename = "from-tag", skip_serializing_if = "Option::is_none")]
    from: Option<&'a str>,
    #[serde(rename = "to-tag", skip_serializing_if = "Option::is_none")]
    to: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sdp: Option<&'a str>,
    #[serde(rename = "ICE", skip_serializing_if = "Option::is_none")]
    ice: Option<&'a str>,
}

#[derive(Deserialize)]
struct Answer {
    result: String,
    #[serde(rename = "error-reason")]
    reason: Option<String>,
    sdp: Option<String>,
}

impl Rtpengine {
    /// Starts it in a machine that has [`PBX_V4`].
    ///
    /// # Errors
    /// It cannot be installed, or does not start.
    pub(crate) fn start(host: &Host) -> Result<Self> {
        Self::start_from(&INSTALLATION.root()?, host, &[WITHOUT_MODULE])
    }

    /// The same with the rtpengine of a Debian's root directory, and with more settings.
    ///
    /// # Errors
    /// It does not start.
    pub(crate) fn start_from(root: &Path, host: &Host, settings: &[&str]) -> Result<Self> {
        let mut command = Command::new("chroot");
        command.arg(root).args([
            "rtpengine",
            "--foreground",
            "--log-stderr",
            "--log-level=2",
            // Nobody talks while others are measured.
            "--timeout=86400",
            "--port-min=10000",
            "--port-max=19999",
        ]);
        command.args(settings);
        command.arg(format!("--interface={PBX_V4}"));
        command.arg(format!("--listen-ng={CONTROL}"));
        // Under overload it complains of every packet.
        command.stdin(Stdio::null()).stderr(Stdio::null());
        let process = host.spawn(command)?;
        let control = host.run(|| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)))?;
        control.set_read_timeout(Some(AGAIN))?;
        let mut rtpengine = Self { process, control };
        let pong = rtpengine.ask(&Request {
            command: "ping",
            call: None,
            from: None,
            to: None,
            sdp: None,
            ice: None,
        })?;
        ensure!(pong.result == "pong", "rtpengine says {}", pong.result);
        Ok(rtpengine)
    }

    /// The process id.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Sets up a call between two phones, and returns it with the ports that rtpengine has chosen.
    ///
    /// # Errors
    /// It refuses: the text holds why.
    pub(crate) fn call(&mut self, number: usize, phones: [SocketAddrV4; 2]) -> Result<Call> {
        let call = format!("call-{number}");
        let [first, second] = phones.map(session);
        let offer = Request {
            command: "offer",
            call: Some(&call),
            from: Some("caller"),
            to: None,
            sdp: Some(&first),
            ice: Some("remove"),
        };
        let to_second = self.port(&offer)?;
        let to_first = self.port(&Request {
            command: "answer",
            to: Some("callee"),
            sdp: Some(&second),
            ..offer
        })?;
        let leg = |local, remote| Leg { local, remote };
        Ok([leg(to_first, phones[0]), leg(to_second, phones[1])])
    }

    /// Where rtpengine receives, as its answer says.
    fn port(&mut self, request: &Request<'_>) -> Result<SocketAddrV4> {
        let answer = self.ask(request)?;
        if answer.result != "ok" {
            let reason = answer.reason.unwrap_or_default();
            bail!("rtpengine: {}: {reason}", answer.result);
        }
        let sdp = answer.sdp.context("an answer without SDP")?;
        let media = sdp.lines().find_map(|line| line.strip_prefix("m=audio "));
        let port = media.and_then(|media| media.split(' ').next()?.parse().ok());
        let port = port.with_context(|| format!("no audio in {sdp}"))?;
        match SocketAddr::new(PBX_V4, port) {
            SocketAddr::V4(local) => Ok(local),
            SocketAddr::V6(_) => bail!("the PBX's address is of version 4"),
        }
    }

    /// Asks until it answers. It knows by the cookie what is asked again.
    fn ask(&mut self, request: &Request<'_>) -> Result<Answer> {
        let cookie = format!("{}-{}", request.command, request.call.unwrap_or_default());
        let mut message = format!("{cookie} ").into_bytes();
        message.extend(serde_bencode::to_bytes(request)?);
        let mut buffer = [0; 8192];
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.process.try_wait() {
                bail!("rtpengine has ended: {status}");
            }
            self.control.send_to(&message, CONTROL)?;
            // Nobody listens yet, or nothing came.
            let Ok(length) = self.control.recv(&mut buffer) else {
                std::thread::sleep(AGAIN / 4);
                continue;
            };
            if let Some(answer) = buffer[..length].strip_prefix(cookie.as_bytes()) {
                return Ok(serde_bencode::from_bytes(answer.trim_ascii_start())?);
            }
        }
        bail!("rtpengine does not answer `{}`", request.command)
    }
}

/// A session of G.711 in SDP (RFC 8866).
fn session(phone: SocketAddrV4) -> String {
    let (ip, port) = (phone.ip(), phone.port());
    format!(
        "v=0\r\no=- 1 1 IN IP4 {ip}\r\ns=-\r\nc=IN IP4 {ip}\r\nt=0 0\r\nm=audio {port} RTP/AVP 0\r\n\
         a=rtpmap:0 PCMU/8000\r\na=sendrecv\r\n"
    )
}
