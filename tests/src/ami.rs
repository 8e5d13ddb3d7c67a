//! A plain AMI client for tests: what it learns is learnt without any code of the relay.

mod proxy;

use std::{
    fmt,
    io::{BufRead as _, BufReader, ErrorKind, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use md5::{Digest as _, Md5};

pub use proxy::{Proxy, Trouble};

use crate::namespace::Host;

/// How long the server may take to answer.
const ANSWER: Duration = Duration::from_secs(20);

/// One message: its lines in order. Keys may repeat.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message(Vec<(String, String)>);

impl Message {
    /// The first value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }

    /// All values of a key.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .iter()
            .filter(move |(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }

    /// The value that `Status` gives for one of its `Variables`.
    pub fn variable(&self, name: &str) -> Option<&str> {
        self.all("Variable")
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
    }

    /// Whether it is this event.
    pub fn is_event(&self, name: &str) -> bool {
        self.get("Event") == Some(name)
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|(key, value)| writeln!(f, "{key}: {value}"))
    }
}

/// A logged-in connection.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<TcpStream>,
    line: Vec<u8>,
    partial: Message,
    events: Vec<Message>,
    next: u64,
}

impl Client {
    /// Connects from inside the machine and logs in by MD5 challenge.
    ///
    /// # Errors
    /// No server there, or it refuses the secret.
    pub fn login(host: &Host, server: SocketAddr, user: &str, secret: &str) -> Result<Self> {
        let stream = host
            .run(|| TcpStream::connect(server))
            .with_context(|| format!("connect to AMI at {server}"))?;
        stream.set_nodelay(true)?;
        let mut client = Self {
            stream: BufReader::new(stream),
            line: Vec::new(),
            partial: Message::default(),
            events: Vec::new(),
            next: 1,
        };
        let challenge = client.action("Challenge", &[("AuthType", "MD5")])?;
        let challenge = challenge[0]
            .get("Challenge")
            .context("the server gives no challenge")?;
        let key: String = Md5::digest(format!("{challenge}{secret}"))
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        client
            .action(
                "Login",
                &[("AuthType", "MD5"), ("Username", user), ("Key", &key)],
            )
            .with_context(|| format!("AMI login as {user}"))?;
        Ok(client)
    }

    /// Sends an action and returns the response, and the items of its list if it announces one, its end included.
    ///
    /// # Errors
    /// The response is an error (the text holds it), or does not come.
    pub fn action(&mut self, name: &str, fields: &[(&str, &str)]) -> Result<Vec<Message>> {
        let id = self.next.to_string();
        self.next += 1;
        let mut text = format!("Action: {name}\r\nActionID: {id}\r\n");
        for (key, value) in fields {
            text += &format!("{key}: {value}\r\n");
        }
        self.stream
            .get_mut()
            .write_all(format!("{text}\r\n").as_bytes())
            .context("the AMI server is gone")?;
        let deadline = Instant::now() + ANSWER;
        let mut answer = Vec::<Message>::new();
        loop {
            let message = self
                .read(deadline)?
                .with_context(|| format!("no answer to {name} after {ANSWER:?}"))?;
            if message.get("ActionID") != Some(&id) {
                self.events.push(message);
                continue;
            }
            let list = answer.first().unwrap_or(&message).get("EventList") == Some("start");
            let last = !list || message.get("EventList") == Some("Complete");
            if message.get("Response") == Some("Error") {
                bail!("{name}: {}", message.get("Message").unwrap_or_default());
            }
            answer.push(message);
            if last {
                return Ok(answer);
            }
        }
    }

    /// Takes the oldest event that satisfies `wanted`, and drops those before it.
    ///
    /// # Errors
    /// There is none within `timeout`.
    pub fn wait_event(
        &mut self,
        timeout: Duration,
        wanted: impl Fn(&Message) -> bool,
    ) -> Result<Message> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(at) = self.events.iter().position(&wanted) {
                return Ok(self
                    .events
                    .drain(..=at)
                    .next_back()
                    .expect("position lies inside"));
            }
            self.events.clear();
            let Some(message) = self.read(deadline)? else {
                bail!("no such event within {timeout:?}")
            };
            self.events.push(message);
        }
    }

    /// Reads one message; `None` at the deadline, with what came so far kept.
    fn read(&mut self, deadline: Instant) -> Result<Option<Message>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.get_ref().set_read_timeout(Some(left))?;
            match self.stream.read_until(b'\n', &mut self.line) {
                Ok(0) => bail!("the AMI server has closed the connection"),
                Ok(_) if !self.line.ends_with(b"\n") => {
                    bail!("the AMI server has closed the connection")
                }
                Ok(_) => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    return Ok(None);
                }
                Err(error) => return Err(error).context("read from AMI"),
            }
            let line = String::from_utf8_lossy(&self.line)
                .trim_end_matches(['\r', '\n'])
                .to_owned();
            self.line.clear();
            match line.split_once(':') {
                Some((key, value)) => {
                    self.partial.0.push((
                        key.to_owned(),
                        value.strip_prefix(' ').unwrap_or(value).to_owned(),
                    ));
                }
                None if line.is_empty() && !self.partial.0.is_empty() => {
                    return Ok(Some(std::mem::take(&mut self.partial)));
                }
                // The banner has no colon.
                None => {}
            }
        }
    }
}
