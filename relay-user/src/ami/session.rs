//! A logged-in AMI connection: requests correlated with their answers, events in between, and a
//! keepalive.

use std::{collections::BTreeMap, fmt, io, time::Duration};

use bytes::BytesMut;
use futures_util::StreamExt;
use md5::{Digest, Md5};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    net::{TcpStream, lookup_host},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::codec::FramedRead;

use super::{
    codec::{Codec, CodecError, Frame},
    message::{Action, ActionError, Message},
};
use crate::config::AmiSettings;

/// How long connecting, the banner, and each answer may take.
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// How long an answer may take while others keep coming. A server that is slower than this has
/// take-backs waiting for as long, and is of no use.
pub const SLOWEST: Duration = Duration::from_secs(15);
/// A `Ping` goes out this often; one without an answer ends the session.
pub const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Requests on the way at one time. Asterisk answers them one after the other anyway.
pub const MAX_PENDING: usize = 64;
/// Bytes of unfinished event lists kept. A `BridgeList` item is about 250 bytes.
const MAX_LISTS: usize = 16 * 1024 * 1024;
/// Events like `OriginateResponse` carry the ActionID of another client to everybody; the prefix
/// keeps those from being taken for our answers.
const ID_PREFIX: &str = "relay-";

/// What an AMI user must be allowed to do, as it is written in manager.conf.
pub const PRIVILEGES: &str = "read=call,dialplan and write=call";

/// Why there is no AMI session, or no longer. The text names the server and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum AmiError {
    /// The address is not HOST:PORT, or the name is unknown.
    #[error(
        "cannot resolve AMI address `{address}`: {source}; write HOST:PORT, such as 127.0.0.1:5038"
    )]
    Resolve {
        /// As configured.
        address: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// No TCP connection.
    #[error(
        "cannot connect to AMI at {address}: {source}; check that Asterisk runs and that manager.conf has enabled=yes with this port and bindaddr"
    )]
    Connect {
        /// As configured.
        address: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Nobody answers at the address.
    #[error("AMI at {address} does not answer within {} s; check the address and the firewall on the way", TIMEOUT.as_secs())]
    ConnectTimeout {
        /// As configured.
        address: String,
    },
    /// Connected, but no banner comes.
    #[error("{address} accepts the connection but sends no AMI banner within {} s; check that it is the port of manager.conf", TIMEOUT.as_secs())]
    NoBanner {
        /// As configured.
        address: String,
    },
    /// What came is not AMI, or not within its bounds.
    #[error("AMI at {address}: {source}")]
    Protocol {
        /// As configured.
        address: String,
        /// What is wrong with it.
        source: CodecError,
    },
    /// The server closed the connection.
    #[error(
        "AMI at {address} closed the connection {stage}; if this repeats, check permit/deny and allowmultiplelogin in manager.conf, and Asterisk's log"
    )]
    Closed {
        /// As configured.
        address: String,
        /// What was going on.
        stage: &'static str,
    },
    /// User, secret or ACL.
    #[error(
        "AMI at {address} refused user {user}: {message}; check secret and permit/deny in manager.conf"
    )]
    Refused {
        /// As configured.
        address: String,
        /// As configured.
        user: String,
        /// Asterisk's words.
        message: String,
    },
    /// Logged in, but not allowed to ask.
    #[error(
        "AMI at {address} does not let user {user} run {action}: {message}; give it {PRIVILEGES} in manager.conf"
    )]
    Privileges {
        /// As configured.
        address: String,
        /// As configured.
        user: String,
        /// The action that was refused.
        action: &'static str,
        /// Asterisk's words.
        message: String,
    },
    /// A request without an answer: the connection is as good as lost.
    #[error("AMI at {address} left {action} without an answer for {} s; the connection counts as lost", waited.as_secs())]
    Unanswered {
        /// As configured.
        address: String,
        /// The action.
        action: &'static str,
        /// How long it was waited for.
        waited: Duration,
    },
    /// Logged in, but the events that tell when to take back do not come.
    #[error(
        "AMI at {address} shows user {user} no VarSet event, so the end of a call's relaying would go unseen: give it {PRIVILEGES}, and no eventfilter that drops VarSet, in manager.conf"
    )]
    Blind {
        /// As configured.
        address: String,
        /// As configured.
        user: String,
    },
    /// An event list beyond all bounds.
    #[error("AMI at {address} answers {action} with more than {MAX_LISTS} bytes")]
    ListTooLong {
        /// As configured.
        address: String,
        /// The action.
        action: &'static str,
    },
    /// The user name cannot be sent.
    #[error("AMI user or secret is unusable: {0}")]
    Unusable(#[from] ActionError),
}

/// What an action brought: its response, and the event list if it has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The `Response:` message.
    pub response: Message,
    /// The items of the event list, its completing event last. Empty for a plain response.
    pub items: Vec<Message>,
}

impl Answer {
    /// Whether Asterisk did what was asked.
    pub fn is_success(&self) -> bool {
        self.response.response() == Some("Success")
    }

    /// Asterisk's words, such as "Authentication failed".
    pub fn message(&self) -> &str {
        self.response.get("Message").unwrap_or("no reason given")
    }

    /// Whether the user lacks a privilege class for the action.
    pub fn is_permission_denied(&self) -> bool {
        !self.is_success() && self.message().contains("Permission denied")
    }
}

/// What a session hands out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// An event nobody asked for.
    Event(Message),
    /// The complete answer to the request of this number.
    Answer(u64, Answer),
}

struct Pending {
    action: &'static str,
    asked: Instant,
    /// Set by the response that announces an event list.
    answer: Option<Answer>,
    keepalive: bool,
}

/// A logged-in connection over a byte stream.
pub struct Session<S = TcpStream> {
    address: String,
    banner: String,
    stage: &'static str,
    reader: FramedRead<ReadHalf<S>, Codec>,
    writer: WriteHalf<S>,
    out: BytesMut,
    /// By request number. Asterisk answers in order, so only the first is waited for.
    pending: BTreeMap<u64, Pending>,
    /// When the last answer, or item of an event list, came: the others get their time from here.
    answered: Instant,
    /// Since when a deadline is known to be over, with something left to read each time.
    overdue: Option<Instant>,
    next_id: u64,
    list_bytes: usize,
    ping_at: Instant,
}

impl<S> fmt::Debug for Session<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("address", &self.address)
            .field("banner", &self.banner)
            .finish_non_exhaustive()
    }
}

/// Connects and logs in, and makes sure that the user may ask what the feed has to ask.
///
/// # Errors
/// Every [`AmiError`]; the text names the remedy.
pub async fn connect(config: &AmiSettings) -> Result<Session, AmiError> {
    let address = config.address.clone();
    let stream = timeout(TIMEOUT, open(&config.address))
        .await
        .unwrap_or(Err(AmiError::ConnectTimeout { address }))?;
    Session::login(stream, config).await
}

async fn open(address: &str) -> Result<TcpStream, AmiError> {
    let resolve = |source| AmiError::Resolve {
        address: address.to_owned(),
        source,
    };
    let mut failure = resolve(io::Error::new(
        io::ErrorKind::NotFound,
        "the name has no address",
    ));
    for candidate in lookup_host(address).await.map_err(resolve)? {
        match TcpStream::connect(candidate).await {
            Ok(stream) => {
                // A request is one small segment; waiting to fill it would only add delay.
                if let Err(source) = stream.set_nodelay(true) {
                    return Err(AmiError::Connect {
                        address: address.to_owned(),
                        source,
                    });
                }
                return Ok(stream);
            }
            Err(source) => {
                failure = AmiError::Connect {
                    address: address.to_owned(),
                    source,
                }
            }
        }
    }
    Err(failure)
}

impl<S: AsyncRead + AsyncWrite> Session<S> {
    /// Logs in over an open stream.
    pub(super) async fn login(stream: S, config: &AmiSettings) -> Result<Self, AmiError> {
        let (reader, writer) = tokio::io::split(stream);
        let mut session = Self {
            address: config.address.clone(),
            banner: String::new(),
            stage: "before its banner",
            reader: FramedRead::new(reader, Codec::default()),
            writer,
            out: BytesMut::new(),
            pending: BTreeMap::new(),
            answered: Instant::now(),
            overdue: None,
            next_id: 0,
            list_bytes: 0,
            ping_at: Instant::now() + PING_INTERVAL,
        };
        let greeting =
            timeout(TIMEOUT, session.reader.next())
                .await
                .map_err(|_| AmiError::NoBanner {
                    address: config.address.clone(),
                })?;
        match greeting {
            Some(Ok(Frame::Banner(banner))) => session.banner = banner,
            Some(Ok(Frame::Message(_))) | None => return Err(session.closed()),
            Some(Err(error)) => return Err(session.broken(error)),
        }

        session.stage = "during login";
        let login = session.authenticate(config).await?;
        if !login.is_success() {
            return Err(AmiError::Refused {
                address: config.address.clone(),
                user: config.user.clone(),
                message: login.message().to_owned(),
            });
        }

        // There is no such channel: this asks whether asking is allowed, and nothing else.
        // Who may run Getvar may run all that the tracker asks.
        let probe = session
            .request(
                &Action::new("Getvar")
                    .with("Channel", "relay-user")?
                    .with("Variable", "CHANNEL(rtp,dest)")?,
            )
            .await?;
        if probe.is_permission_denied() {
            return Err(AmiError::Privileges {
                address: config.address.clone(),
                user: config.user.clone(),
                action: "Getvar",
                message: probe.message().to_owned(),
            });
        }
        session.check_events(config).await?;
        session.stage = "while it was in use";
        Ok(session)
    }

    /// Makes sure that VarSet events come. AMI does not tell what a user may read; but setting a
    /// global variable raises the event, and an empty global one reads as one that was never set.
    /// Of this name, because that is what an eventfilter must let through.
    async fn check_events(&mut self, config: &AmiSettings) -> Result<(), AmiError> {
        let set = self.submit(
            &Action::new("Setvar")
                .with("Variable", "BRIDGEPEER")?
                .with("Value", "")?,
        );
        let (mut done, mut seen) = (false, false);
        let come = async {
            while !(done && seen) {
                match self.next().await? {
                    // Who may ask but not set is not checked here: the tracker refuses calls when
                    // none of them brings a VarSet.
                    Incoming::Answer(id, answer) if id == set && !answer.is_success() => break,
                    Incoming::Answer(id, _) => done |= id == set,
                    Incoming::Event(event) => {
                        seen |= event.event() == Some("VarSet")
                            && event.get("Variable") == Some("BRIDGEPEER");
                    }
                }
            }
            Ok(())
        };
        match timeout(TIMEOUT, come).await {
            Ok(outcome) => outcome,
            // Setvar itself was left without an answer.
            Err(_) if !done => Err(self.unanswered("Setvar", TIMEOUT)),
            Err(_) => Err(AmiError::Blind {
                address: config.address.clone(),
                user: config.user.clone(),
            }),
        }
    }

    async fn authenticate(&mut self, config: &AmiSettings) -> Result<Answer, AmiError> {
        let challenge = self
            .request(&Action::new("Challenge").with("AuthType", "MD5")?)
            .await?;
        let login = Action::new("Login").with("Username", &config.user)?;
        let login = match challenge.response.get("Challenge") {
            Some(nonce) if challenge.is_success() => {
                let digest = Md5::digest(format!("{nonce}{}", config.secret.expose()));
                let key: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
                login.with("AuthType", "MD5")?.with("Key", &key)?
            }
            // Only a server that does not know the action, or the method, gets the secret itself.
            _ if ["unknown command", "AuthType"]
                .iter()
                .any(|words| challenge.message().contains(words)) =>
            {
                login.with("Secret", config.secret.expose())?
            }
            _ => return Ok(challenge),
        };
        // `call`: bridges, hang-ups, hold, MixMonitor; `dialplan`: VarSet. Nothing else is read.
        self.request(&login.with("Events", "call,dialplan")?).await
    }

    /// The server's greeting, such as `Asterisk Call Manager/11.0.0`.
    pub fn banner(&self) -> &str {
        &self.banner
    }

    /// Whether another request may be submitted now.
    pub fn is_ready(&self) -> bool {
        self.pending.len() < MAX_PENDING
    }

    /// Queues a request and returns its number. [`Session::next`] sends it and hands out the answer.
    pub fn submit(&mut self, action: &Action) -> u64 {
        self.enqueue(action, false)
    }

    fn enqueue(&mut self, action: &Action, keepalive: bool) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        action.encode(ID_PREFIX, id, &mut self.out);
        self.pending.insert(
            id,
            Pending {
                action: action.name(),
                asked: Instant::now(),
                answer: None,
                keepalive,
            },
        );
        id
    }

    /// When the oldest request counts as left without an answer.
    fn deadline(&self) -> Option<Instant> {
        let (_, oldest) = self.pending.first_key_value()?;
        Some(self.deadline_of(oldest))
    }

    fn deadline_of(&self, oldest: &Pending) -> Instant {
        let silent = oldest.asked.max(self.answered) + TIMEOUT;
        silent.min(oldest.asked + SLOWEST)
    }

    /// Waits for the next event or complete answer; meanwhile sends what is queued, keeps the
    /// connection alive, and watches every deadline. Cancelling it loses nothing.
    ///
    /// What has arrived is read before a deadline counts: the answer may lie there because this
    /// process, not the server, was late. So that a flood of events cannot put off a deadline for
    /// ever, that goes on for [`TIMEOUT`] at most.
    ///
    /// # Errors
    /// Whatever ends the session.
    pub async fn next(&mut self) -> Result<Incoming, AmiError> {
        loop {
            let now = Instant::now();
            if self.ping_at <= now {
                self.enqueue(&Action::new("Ping"), true);
                self.ping_at = now + PING_INTERVAL;
            }
            let deadline = self.deadline();
            if deadline.is_none_or(|deadline| now < deadline) {
                self.overdue = None;
            } else if *self.overdue.get_or_insert(now) + TIMEOUT <= now {
                self.check_deadline(now)?;
            }
            let wake = deadline.map_or(self.ping_at, |deadline| deadline.min(self.ping_at));
            tokio::select! {
                biased;
                // At most MAX_PENDING requests: it cannot keep the others from their turn.
                written = self.writer.write_buf(&mut self.out), if !self.out.is_empty() => {
                    written.map_err(|error| self.broken(CodecError::Io(error)))?;
                }
                frame = self.reader.next() => match frame {
                    Some(Ok(Frame::Message(message))) => {
                        if let Some(incoming) = self.sort(message)? {
                            return Ok(incoming);
                        }
                    }
                    Some(Ok(Frame::Banner(_))) => {}
                    Some(Err(error)) => return Err(self.broken(error)),
                    None => return Err(self.closed()),
                },
                () = sleep_until(wake) => self.check_deadline(Instant::now())?,
            }
        }
    }

    /// Fails once the oldest request is past its deadline.
    fn check_deadline(&self, now: Instant) -> Result<(), AmiError> {
        match self.pending.first_key_value() {
            Some((_, oldest)) if self.deadline_of(oldest) <= now => {
                Err(self.unanswered(oldest.action, now - oldest.asked))
            }
            _ => Ok(()),
        }
    }

    fn unanswered(&self, action: &'static str, waited: Duration) -> AmiError {
        AmiError::Unanswered {
            address: self.address.clone(),
            action,
            waited,
        }
    }

    /// Tells an answer, a piece of one, and an event apart.
    fn sort(&mut self, message: Message) -> Result<Option<Incoming>, AmiError> {
        let id = message
            .get("ActionID")
            .and_then(|id| id.strip_prefix(ID_PREFIX)?.parse().ok());
        let Some((id, pending)) = id.and_then(|id| Some((id, self.pending.get_mut(&id)?))) else {
            return Ok(message
                .event()
                .is_some()
                .then_some(Incoming::Event(message)));
        };
        self.answered = Instant::now();
        let list = message.get("EventList");
        let complete = match &mut pending.answer {
            None if message.response().is_some() => {
                let complete = !list.is_some_and(|list| list.eq_ignore_ascii_case("start"));
                pending.answer = Some(Answer {
                    response: message,
                    items: Vec::new(),
                });
                complete
            }
            // An item before its response: Asterisk never does that.
            None => false,
            Some(answer) => {
                self.list_bytes += message.size();
                if self.list_bytes > MAX_LISTS {
                    return Err(AmiError::ListTooLong {
                        address: self.address.clone(),
                        action: pending.action,
                    });
                }
                let complete = list.is_some_and(|list| !list.eq_ignore_ascii_case("start"));
                answer.items.push(message);
                complete
            }
        };
        if !complete {
            return Ok(None);
        }
        let Some(Pending {
            answer: Some(answer),
            keepalive,
            ..
        }) = self.pending.remove(&id)
        else {
            return Ok(None);
        };
        self.list_bytes -= answer.items.iter().map(Message::size).sum::<usize>();
        Ok((!keepalive).then_some(Incoming::Answer(id, answer)))
    }

    /// One request and its answer. Events that come meanwhile are dropped: only used before the
    /// resync, which learns all that they could tell.
    pub(crate) async fn request(&mut self, action: &Action) -> Result<Answer, AmiError> {
        let id = self.submit(action);
        loop {
            match self.next().await? {
                Incoming::Answer(answered, answer) if answered == id => return Ok(answer),
                Incoming::Answer(..) | Incoming::Event(_) => {}
            }
        }
    }

    fn closed(&self) -> AmiError {
        AmiError::Closed {
            address: self.address.clone(),
            stage: self.stage,
        }
    }

    fn broken(&self, error: CodecError) -> AmiError {
        match error {
            // Asterisk closes a session it dislikes with data unread, which arrives as a reset.
            CodecError::Io(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                self.closed()
            }
            CodecError::Io(error) if error.kind() == io::ErrorKind::BrokenPipe => self.closed(),
            source => AmiError::Protocol {
                address: self.address.clone(),
                source,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::ami::{
        codec::MAX_LINE,
        server::{BANNER, Server, config, logged_in, login_against, pipe},
    };

    const CHALLENGED: &str = "Response: Success\r\nActionID: $\r\nChallenge: 1\r\n\r\n";
    const ACCEPTED: &str =
        "Response: Success\r\nActionID: $\r\nMessage: Authentication accepted\r\n\r\n";

    const NO_CHANNEL: &str = "Response: Error\r\nActionID: $\r\nMessage: No such channel\r\n\r\n";
    const SEEN: &str = "Event: VarSet\r\nChannel: none\r\nVariable: BRIDGEPEER\r\nValue: \r\n\r\n\
                        Response: Success\r\nActionID: $\r\nMessage: Variable Set\r\n\r\n";

    async fn failure(answers: &[&str]) -> String {
        login_against(answers)
            .await
            .expect_err("no login")
            .to_string()
    }

    #[tokio::test(start_paused = true)]
    async fn the_login_answers_a_challenge_and_never_shows_the_secret() {
        let (session, server) = logged_in().await;
        assert_eq!(session.banner(), "Asterisk Call Manager/11.0.0");
        assert_eq!(server.login["AuthType"], "MD5");
        assert_eq!(server.login["Events"], "call,dialplan");
        assert!(!server.login.contains_key("Secret"));
        assert_eq!(format!("{:?}", config().secret), "***");
    }

    #[tokio::test(start_paused = true)]
    async fn the_secret_is_sent_only_to_a_server_that_knows_no_challenge() {
        let unknown = "Response: Error\r\nActionID: $\r\nMessage: Invalid/unknown command: Challenge.\r\n\r\n";
        let denied = "Response: Error\r\nActionID: $\r\nMessage: No such channel\r\n\r\n";
        assert!(
            login_against(&[BANNER, unknown, ACCEPTED, denied, SEEN])
                .await
                .is_ok()
        );
        let busy = "Response: Error\r\nActionID: $\r\nMessage: Permission denied\r\n\r\n";
        let error = failure(&[BANNER, busy]).await;
        assert!(
            error.contains("refused user relay: Permission denied"),
            "{error}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_wrong_secret_is_told_with_its_remedy() {
        let failed = "Response: Error\r\nActionID: $\r\nMessage: Authentication failed\r\n\r\n";
        assert_eq!(
            failure(&[BANNER, CHALLENGED, failed]).await,
            "AMI at pbx.example:5038 refused user relay: Authentication failed; check secret and permit/deny in manager.conf"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn missing_privileges_are_told_at_login() {
        let denied = "Response: Error\r\nActionID: $\r\nMessage: Permission denied\r\n\r\n";
        let error = failure(&[BANNER, CHALLENGED, ACCEPTED, denied]).await;
        assert!(
            error.contains("does not let user relay run Getvar")
                && error.contains("read=call,dialplan and write=call"),
            "{error}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_user_who_sees_no_varset_is_told_at_login() {
        let (stream, mut server) = pipe();
        let config = config();
        let serve = async {
            server.send(BANNER).await;
            let set = "Response: Success\r\nActionID: $\r\nMessage: Variable Set\r\n\r\n\
                       Event: VarSet\r\nChannel: none\r\nVariable: OTHER\r\nValue: \r\n\r\n";
            for answer in [CHALLENGED, ACCEPTED, NO_CHANNEL, set] {
                let action = server.action().await.expect("an action");
                server.send(&answer.replace("$", &action["ActionID"])).await;
            }
            std::future::pending::<()>().await;
        };
        let error = tokio::select! {
            session = Session::login(stream, &config) => session.expect_err("blind").to_string(),
            () = serve => unreachable!("never ends"),
        };
        assert!(
            error.contains("shows user relay no VarSet event")
                && error.contains("read=call,dialplan and write=call"),
            "{error}"
        );
        // Who may not set is left to the tracker.
        let denied = "Response: Error\r\nActionID: $\r\nMessage: Permission denied\r\n\r\n";
        assert!(
            login_against(&[BANNER, CHALLENGED, ACCEPTED, NO_CHANNEL, denied])
                .await
                .is_ok()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_closes_is_told_at_each_stage() {
        for (answers, stage) in [
            (&[""][..], "closed the connection before its banner"),
            (
                &["Asterisk Call Man"],
                "closed the connection before its banner",
            ),
            (&[BANNER], "closed the connection during login"),
            (&[BANNER, CHALLENGED], "closed the connection during login"),
            (
                &[BANNER, CHALLENGED, "Response: Succ"],
                "closed the connection during login",
            ),
            (
                &[BANNER, CHALLENGED, ACCEPTED],
                "closed the connection during login",
            ),
        ] {
            let error = failure(answers).await;
            assert!(error.contains(stage), "{answers:?}: {error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn garbage_is_quoted() {
        let error = failure(&["220 mail.example ESMTP\r\n"]).await;
        assert!(
            error.contains("pbx.example:5038") && error.contains("220 mail.example ESMTP"),
            "{error}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_told_at_each_stage() {
        let config = config();
        let (stream, _silent) = pipe();
        let error = Session::login(stream, &config)
            .await
            .expect_err("no banner")
            .to_string();
        assert!(error.contains("sends no AMI banner within 5 s"), "{error}");
        let (stream, mut server) = pipe();
        server.send(BANNER).await;
        let error = Session::login(stream, &config)
            .await
            .expect_err("no answer")
            .to_string();
        assert!(
            error.contains("left Challenge without an answer for 5 s"),
            "{error}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_endless_line_ends_the_session() {
        let (mut session, mut server) = logged_in().await;
        let flood = tokio::spawn(async move {
            let chunk = "x".repeat(1 << 20);
            server.send("Event: VarSet\r\nValue: ").await;
            for _ in 0..100 {
                server.send(&chunk).await;
            }
        });
        let error = session.next().await.expect_err("100 MB in one line");
        assert!(
            error
                .to_string()
                .contains("a line is longer than 65536 bytes"),
            "{error}"
        );
        assert!(
            session.reader.read_buffer().capacity() <= 3 * MAX_LINE,
            "{}",
            session.reader.read_buffer().capacity()
        );
        drop(session);
        flood
            .await
            .expect("the server's writes fail, they do not hang");
    }

    #[tokio::test(start_paused = true)]
    async fn answers_and_events_are_told_apart_however_they_interleave() {
        let (mut session, mut server) = logged_in().await;
        let list = session.submit(&Action::new("BridgeList"));
        let status = session.submit(&Action::new("Status"));
        let serve = async {
            let first = server.action().await.expect("two actions")["ActionID"].clone();
            let second = server.action().await.expect("two actions")["ActionID"].clone();
            for byte in format!(
                "Response: Success\r\nActionID: {first}\r\nEventList: start\r\n\r\n\
                 Event: Hangup\r\nChannel: x\r\n\r\n\
                 Event: BridgeListItem\r\nActionID: {first}\r\nBridgeUniqueid: one\r\n\r\n\
                 Event: OriginateResponse\r\nActionID: 1\r\n\r\n\
                 Response: Error\r\nActionID: {second}\r\nMessage: No such channel\r\n\r\n\
                 Response: Success\r\nActionID: relay-99\r\n\r\n\
                 Event: BridgeListComplete\r\nActionID: {first}\r\nEventList: Complete\r\n\r\n"
            )
            .bytes()
            {
                server
                    .send(std::str::from_utf8(&[byte]).expect("ASCII"))
                    .await;
                tokio::task::yield_now().await;
            }
            server
        };
        let collect = async {
            let mut incoming = Vec::new();
            for _ in 0..4 {
                incoming.push(session.next().await.expect("a live session"));
            }
            incoming
        };
        let (_server, incoming) = tokio::join!(serve, collect);
        let event = |incoming: &Incoming| match incoming {
            Incoming::Event(event) => event.event().map(str::to_owned),
            Incoming::Answer(..) => None,
        };
        assert_eq!(event(&incoming[0]).as_deref(), Some("Hangup"));
        assert_eq!(event(&incoming[1]).as_deref(), Some("OriginateResponse"));
        assert!(
            matches!(&incoming[2], Incoming::Answer(id, answer) if *id == status && !answer.is_success())
        );
        assert!(
            matches!(&incoming[3], Incoming::Answer(id, answer) if *id == list && answer.items.len() == 2)
        );
        assert_eq!(session.list_bytes, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_ping_without_an_answer_ends_the_session() {
        let (mut session, mut server) = logged_in().await;
        let start = Instant::now();
        let serve = async {
            let ping = server.action().await.expect("a ping");
            assert_eq!(
                (ping["Action"].as_str(), start.elapsed()),
                ("Ping", PING_INTERVAL)
            );
            server
                .send(&format!(
                    "Response: Success\r\nActionID: {}\r\nPing: Pong\r\n\r\n",
                    ping["ActionID"]
                ))
                .await;
            assert_eq!(server.action().await.expect("another")["Action"], "Ping");
            std::future::pending::<()>().await;
        };
        let error = tokio::select! {
            incoming = session.next() => incoming.expect_err("no answer to the second ping"),
            () = serve => unreachable!("never ends"),
        };
        assert!(
            error.to_string().contains("left Ping without an answer"),
            "{error}"
        );
        assert_eq!(start.elapsed(), 2 * PING_INTERVAL + TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_byte_a_second_is_a_lost_connection_in_the_end() {
        let (mut session, mut server) = logged_in().await;
        let drip = tokio::spawn(async move {
            for byte in "Event: X\r\n".repeat(100).chars() {
                tokio::time::sleep(Duration::from_secs(1)).await;
                server.send(&byte.to_string()).await;
            }
        });
        assert!(matches!(
            session.next().await,
            Err(AmiError::Unanswered { action: "Ping", .. })
        ));
        drip.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_whose_answers_trickle_is_lost_in_the_end() {
        let (mut session, mut server) = logged_in().await;
        let start = Instant::now();
        for _ in 0..20 {
            session.submit(&Action::new("BridgeList"));
        }
        let serve = async {
            while let Some(action) = server.action().await {
                tokio::time::sleep(TIMEOUT - Duration::from_secs(1)).await;
                let id = &action["ActionID"];
                server
                    .send(&format!("Response: Success\r\nActionID: {id}\r\n\r\n"))
                    .await;
            }
        };
        let fail = async {
            loop {
                if let Err(error) = session.next().await {
                    return error;
                }
            }
        };
        let error = tokio::select! {
            error = timeout(2 * SLOWEST, fail) => error.expect("lost"),
            () = serve => unreachable!("the session is still open"),
        };
        assert!(
            matches!(
                error,
                AmiError::Unanswered {
                    action: "BridgeList",
                    ..
                }
            ),
            "{error}"
        );
        assert_eq!(start.elapsed(), SLOWEST);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_waited_for_us_is_no_lost_connection() {
        let (mut session, mut server) = logged_in().await;
        let ours = session.submit(&Action::new("BridgeList"));
        let sent = async {
            let action = server.action().await.expect("an action");
            let id = &action["ActionID"];
            let flood = "Event: VarSet\r\nChannel: x\r\n\r\n".repeat(100);
            server
                .send(&format!(
                    "{flood}Response: Success\r\nActionID: {id}\r\n\r\n"
                ))
                .await;
            server
        };
        // This process sleeps once the question is on its way.
        let _server = tokio::select! {
            biased;
            _ = async { session.next().await.expect("live"); std::future::pending::<()>().await } => unreachable!(),
            server = sent => server,
        };
        tokio::time::advance(4 * SLOWEST).await;
        loop {
            match session.next().await.expect("the answer is there") {
                Incoming::Event(_) => {}
                Incoming::Answer(id, _) => break assert_eq!(id, ours),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_events_puts_off_no_deadline_for_ever() {
        let (mut session, mut server) = logged_in().await;
        session.submit(&Action::new("BridgeList"));
        let start = Instant::now();
        let event = "Event: VarSet\r\nChannel: x\r\n\r\n";
        // There is always more to read.
        server.send(&event.repeat(100)).await;
        let error = loop {
            server.send(event).await;
            match session.next().await {
                Ok(_) => assert!(start.elapsed() < 3 * TIMEOUT),
                Err(error) => break error,
            }
            tokio::time::advance(Duration::from_millis(100)).await;
        };
        assert!(matches!(error, AmiError::Unanswered { .. }), "{error}");
        assert_eq!(start.elapsed(), 2 * TIMEOUT);
    }

    #[tokio::test]
    async fn a_session_opens_over_tcp() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = listener.local_addr().expect("bound").to_string();
        let accept = async {
            Server::new(listener.accept().await.expect("a client").0)
                .accept()
                .await;
        };
        let config = AmiSettings {
            address,
            ..config()
        };
        let (session, ()) = tokio::join!(connect(&config), accept);
        session.expect("the right secret");

        let wrong = AmiSettings {
            secret: crate::secret::Secret::new("guess".to_owned()).expect("secret"),
            ..config
        };
        let accept = async {
            let mut server = Server::new(listener.accept().await.expect("a client").0);
            server.accept().await;
        };
        let error = tokio::select! {
            session = connect(&wrong) => session.expect_err("the wrong secret"),
            () = accept => unreachable!("the client leaves first"),
        };
        assert!(matches!(error, AmiError::Refused { .. }), "{error}");
    }

    #[tokio::test]
    async fn nobody_there_is_told_with_the_remedy() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = listener.local_addr().expect("bound").to_string();
        drop(listener);
        let error = connect(&AmiSettings {
            address: address.clone(),
            ..config()
        })
        .await
        .expect_err("closed")
        .to_string();
        assert!(
            error.contains(&address) && error.contains("enabled=yes"),
            "{error}"
        );
        let error = connect(&AmiSettings {
            address: "no-port".to_owned(),
            ..config()
        })
        .await
        .expect_err("malformed");
        assert!(error.to_string().contains("write HOST:PORT"), "{error}");
    }
}
