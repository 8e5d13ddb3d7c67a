//! The AMI server of the fake PBX: what Asterisk 22 answers to a client with `read=call,dialplan`, `write=call`.

use std::{
    collections::hash_map::RandomState,
    fmt::Write as _,
    hash::{BuildHasher as _, Hasher as _},
    io::{BufRead as _, BufReader, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use md5::{Digest as _, Md5};

use super::{
    USER,
    call::{Message, Side},
    exchange::Exchange,
};

/// A client that takes no bytes for so long is cut off.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

/// One logged-in or not yet logged-in client.
#[derive(Debug)]
pub(super) struct Session {
    stream: Mutex<TcpStream>,
    /// Logged in, and wants events.
    events: AtomicBool,
}

/// Serves clients until the process ends.
pub(super) fn serve(listener: &TcpListener, exchange: &Arc<Exchange>, secret: &str) -> Result<()> {
    for stream in listener.incoming() {
        let stream = stream?;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let reader = stream.try_clone()?;
        let session = Arc::new(Session {
            stream: Mutex::new(stream),
            events: AtomicBool::new(false),
        });
        exchange.join(&session);
        let (exchange, secret) = (Arc::clone(exchange), secret.to_owned());
        thread::spawn(move || {
            session.write(b"Asterisk Call Manager/11.0.0\r\n");
            // A client that goes away is no fault of the server.
            let _ = session.converse(reader, &exchange, &secret);
            session.close();
            exchange.leave(&session);
        });
    }
    Ok(())
}

/// The lines of one action.
#[derive(Debug, Default)]
struct Action(Vec<(String, String)>);

impl Action {
    /// Keys are case-insensitive in Asterisk.
    fn get(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(key))
            .map(|(_, value)| value.as_str())
    }

    fn id(&self) -> Option<&str> {
        self.get("ActionID")
    }

    fn error(&self, text: &str) -> Vec<Message> {
        vec![Message::response("Error", self.id()).with("Message", text)]
    }
}

impl Session {
    fn write(&self, bytes: &[u8]) {
        let mut stream = self.stream.lock().expect("no holder of this lock panics");
        if stream.write_all(bytes).is_err() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Sends messages with nothing of another thread between them.
    fn send(&self, messages: &[Message]) {
        let mut stream = self.stream.lock().expect("no holder of this lock panics");
        for segment in messages.iter().flat_map(Message::segments) {
            if stream.write_all(&segment).is_err() {
                let _ = stream.shutdown(Shutdown::Both);
                return;
            }
        }
    }

    /// Sends the events that this client may and wants to see.
    pub(super) fn publish(&self, messages: &[Message]) {
        if self.events.load(Ordering::Relaxed) {
            self.send(messages);
        }
    }

    /// Cuts the connection.
    pub(super) fn close(&self) {
        let _ = self
            .stream
            .lock()
            .expect("no holder of this lock panics")
            .shutdown(Shutdown::Both);
    }

    fn converse(&self, reader: TcpStream, exchange: &Exchange, secret: &str) -> Result<()> {
        let mut challenge = None;
        let mut logged_in = false;
        let mut action = Action::default();
        for line in BufReader::new(reader).lines() {
            let line = line?;
            if let Some((key, value)) = line.split_once(':') {
                action
                    .0
                    .push((key.to_owned(), value.trim_start().to_owned()));
                continue;
            }
            if action.0.is_empty() {
                continue;
            }
            let action = std::mem::take(&mut action);
            let name = action
                .get("Action")
                .unwrap_or_default()
                .to_ascii_lowercase();
            match name.as_str() {
                "challenge"
                    if action
                        .get("AuthType")
                        .is_some_and(|kind| kind.eq_ignore_ascii_case("md5")) =>
                {
                    // Any number that a client cannot foresee.
                    let fresh =
                        (RandomState::new().build_hasher().finish() % 1_000_000_000).to_string();
                    self.send(&[
                        Message::response("Success", action.id()).with("Challenge", &fresh)
                    ]);
                    challenge = Some(fresh);
                }
                "challenge" => self.send(&action.error("Must specify AuthType")),
                "login" if authentic(&action, challenge.as_deref(), secret) => {
                    logged_in = true;
                    self.send(&[Message::response("Success", action.id())
                        .with("Message", "Authentication accepted")]);
                    self.set_events(action.get("Events").unwrap_or("on"));
                }
                "login" => {
                    self.send(&action.error("Authentication failed"));
                    return Ok(());
                }
                "logoff" => {
                    let goodbye = Message::response("Goodbye", action.id());
                    self.send(&[goodbye.with("Message", "Thanks for all the fish.")]);
                    return Ok(());
                }
                _ if !logged_in => self.send(&action.error("Permission denied")),
                "events" => {
                    let on = self.set_events(action.get("EventMask").unwrap_or("on"));
                    let state = if on { "On" } else { "Off" };
                    self.send(&[Message::response("Success", action.id()).with("Events", state)]);
                }
                "ping" => {
                    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
                    let time = format!("{}.{:06}", now.as_secs(), now.subsec_micros());
                    let pong = Message::response("Success", action.id()).with("Ping", "Pong");
                    self.send(&[pong.with("Timestamp", time)]);
                }
                _ => {
                    exchange.await_unstalled();
                    self.send(&answer(&name, &action, exchange));
                }
            }
        }
        Ok(())
    }

    fn set_events(&self, mask: &str) -> bool {
        let on = !matches!(
            mask.to_ascii_lowercase().as_str(),
            "off" | "no" | "false" | "0"
        );
        self.events.store(on, Ordering::Relaxed);
        on
    }
}

/// Plain secret, or MD5 of challenge and secret in hexadecimal.
fn authentic(action: &Action, challenge: Option<&str>, secret: &str) -> bool {
    if action.get("Username") != Some(USER) {
        return false;
    }
    let md5 = action
        .get("AuthType")
        .is_some_and(|kind| kind.eq_ignore_ascii_case("md5"));
    if !md5 {
        return action.get("Secret") == Some(secret);
    }
    let Some(challenge) = challenge else {
        return false;
    };
    let mut expected = String::new();
    for byte in Md5::digest(format!("{challenge}{secret}")) {
        write!(expected, "{byte:02x}").expect("a String takes everything");
    }
    action
        .get("Key")
        .is_some_and(|key| key.eq_ignore_ascii_case(&expected))
}

/// The answer to a query about calls.
fn answer(name: &str, action: &Action, exchange: &Exchange) -> Vec<Message> {
    let id = action.id();
    let start = |text: &str| {
        Message::response("Success", id)
            .with("EventList", "start")
            .with("Message", text)
    };
    let complete = |name: &str, items: usize| {
        Message::item(name, id)
            .with("EventList", "Complete")
            .with("ListItems", items)
    };
    match name {
        "bridgelist" => {
            let calls = exchange.calls();
            let mut messages = vec![start("Bridge listing will follow")];
            messages.extend(calls.iter().map(|call| call.bridge_item(id)));
            messages.push(complete("BridgeListComplete", calls.len()));
            messages
        }
        "bridgeinfo" => {
            let wanted = action.get("BridgeUniqueid").unwrap_or_default();
            let Some(call) = exchange.bridge(wanted) else {
                return action.error("Specified BridgeUniqueid not found");
            };
            let mut messages = vec![start("Bridge channel listing will follow")];
            messages.extend(call.bridge_info(id));
            messages
        }
        "status" => {
            let variables = arguments(action.get("Variables").unwrap_or_default());
            let channels: Vec<_> = match action.get("Channel") {
                None => exchange
                    .calls()
                    .into_iter()
                    .flat_map(|call| [(Arc::clone(&call), Side::Callee), (call, Side::Caller)])
                    .collect(),
                Some(name) => match exchange.channel(name) {
                    Some(found) => vec![found],
                    None => return action.error("No such channel"),
                },
            };
            let mut messages = vec![start("Channel status will follow")];
            messages.extend(
                channels
                    .iter()
                    .map(|(call, side)| call.status_item(*side, &variables, id)),
            );
            messages.push(complete("StatusComplete", channels.len()).with("Items", channels.len()));
            messages
        }
        "getvar" => {
            let variable = action.get("Variable").unwrap_or_default();
            let channel = action.get("Channel").unwrap_or_default();
            let Some((call, side)) = exchange.channel(channel) else {
                return action.error("No such channel");
            };
            let value = call.channel(side).variable(variable);
            vec![
                Message::response("Success", id)
                    .with("Variable", variable)
                    .with("Value", value),
            ]
        }
        "" => action.error("Missing action in request"),
        _ => {
            let name = action.get("Action").unwrap_or_default();
            action.error(&format!("Invalid/unknown command: {name}. Use Action: ListCommands to show available commands."))
        }
    }
}

/// Splits at commas outside of brackets.
fn arguments(list: &str) -> Vec<&str> {
    let mut depth = 0;
    list.split(|letter| {
        match letter {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        letter == ',' && depth == 0
    })
    .filter(|argument| !argument.is_empty())
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_split_outside_of_brackets() {
        assert_eq!(
            arguments("CHANNEL(rtp,src),X,CHANNEL(rtp,dest)"),
            ["CHANNEL(rtp,src)", "X", "CHANNEL(rtp,dest)"]
        );
        assert_eq!(arguments(""), [""; 0]);
    }
}
