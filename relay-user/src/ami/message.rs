//! One AMI message as received, and one action as sent.

use bytes::{BufMut, BytesMut};

/// One message of the server: an event, a response, or an item of an event list.
///
/// Keeps the text as it came and looks fields up on demand: most events of a busy PBX are dropped
/// after a look at their first line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    text: String,
}

impl Message {
    /// Takes the lines of a message, without or with the blank line that ends it. Invalid UTF-8
    /// becomes U+FFFD: a caller's display name must not cost the feed its connection.
    pub fn new(lines: &[u8]) -> Self {
        Self {
            text: String::from_utf8_lossy(lines).into_owned(),
        }
    }

    /// All fields in the order of the wire, repeated keys included. Lines without a colon are
    /// left out.
    pub fn fields(&self) -> impl Iterator<Item = (&str, &str)> {
        self.text
            .split('\n')
            .filter_map(|line| line.split_once(':'))
            .map(|(key, value)| (key, value.trim()))
    }

    /// Every value of a key. AMI repeats `Variable` and `ChanVariable`.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.fields()
            .filter(move |(name, _)| name.eq_ignore_ascii_case(key))
            .map(|(_, value)| value)
    }

    /// The first value of a key; an empty value is `Some("")`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.fields()
            .find(|(name, _)| name.eq_ignore_ascii_case(key))
            .map(|(_, value)| value)
    }

    /// The event's name, if this is an event. Asterisk always sends that field first; looking only
    /// there keeps a `Response` that carries an `Event` field from passing as one.
    pub fn event(&self) -> Option<&str> {
        self.first("Event")
    }

    /// The response's result (`Success`, `Error`, `Goodbye`), if this is a response.
    pub fn response(&self) -> Option<&str> {
        self.first("Response")
    }

    /// The value of an evaluated function in an answer to `Status`, there written
    /// `Variable: CHANNEL(rtp,src)=192.0.2.1:17722`.
    pub fn variable(&self, name: &str) -> Option<&str> {
        self.all("Variable")
            .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }

    /// Bytes this message keeps in memory.
    pub fn size(&self) -> usize {
        self.text.len()
    }

    fn first(&self, key: &str) -> Option<&str> {
        self.fields()
            .next()
            .filter(|(name, _)| name.eq_ignore_ascii_case(key))
            .map(|(_, value)| value)
    }
}

/// Asterisk reads an action line into 1,025 bytes and throws a longer one away (manager.c,
/// `inbuf`); the key and the line end need some of them.
const MAX_VALUE: usize = 900;

/// Why an action cannot be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActionError {
    /// A line end inside a value would start a header, or an action, of its own.
    #[error("{key} holds a control character, which AMI cannot carry: {value}")]
    Control {
        /// The header.
        key: &'static str,
        /// Its value, escaped and cut to 80 characters.
        value: String,
    },
    /// Asterisk would throw the line away.
    #[error("{key} is {length} bytes long; Asterisk reads at most {MAX_VALUE}")]
    TooLong {
        /// The header.
        key: &'static str,
        /// Length of the value in bytes.
        length: usize,
    },
}

/// An action for the server. Only [`Action::with`] adds headers, and it takes no value that could
/// break out of its line.
#[derive(Clone, PartialEq, Eq)]
pub struct Action {
    name: &'static str,
    headers: String,
}

impl Action {
    /// An action without headers.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            headers: String::new(),
        }
    }

    /// Adds a header.
    ///
    /// # Errors
    /// See [`ActionError`].
    pub fn with(mut self, key: &'static str, value: &str) -> Result<Self, ActionError> {
        if value.contains(char::is_control) {
            return Err(ActionError::Control {
                key,
                value: excerpt(value.as_bytes()),
            });
        }
        if value.len() > MAX_VALUE {
            return Err(ActionError::TooLong {
                key,
                length: value.len(),
            });
        }
        for part in [key, ": ", value, "\r\n"] {
            self.headers.push_str(part);
        }
        Ok(self)
    }

    /// The action's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Writes the action with an ActionID made of `prefix` and `id`.
    pub(super) fn encode(&self, prefix: &'static str, id: u64, into: &mut BytesMut) {
        let text = format!(
            "Action: {}\r\nActionID: {prefix}{id}\r\n{}\r\n",
            self.name, self.headers
        );
        into.put_slice(text.as_bytes());
    }
}

/// The name only: the headers of a plain login hold the secret.
impl std::fmt::Debug for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Action").field(&self.name).finish()
    }
}

/// At most 80 bytes of what came, printable.
pub(super) fn excerpt(bytes: &[u8]) -> String {
    const SHOWN: usize = 80;
    let (shown, rest) = bytes.split_at(bytes.len().min(SHOWN));
    format!(
        "\"{}\"{}",
        shown.escape_ascii(),
        if rest.is_empty() { "" } else { "…" }
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_are_found_as_asterisk_sends_them() {
        let message = Message::new(
            b"Event: Status\r\nBridgeID: \r\nData: a: b:c\r\nVariable: CHANNEL(rtp,src)=[2001:db8::1]:4\r\n\
              Variable: X=1=2\r\nVariable: Y=\r\nno colon here\r\n",
        );
        assert_eq!(message.event(), Some("Status"));
        assert_eq!(message.response(), None);
        assert_eq!(message.get("BridgeID"), Some(""));
        assert_eq!(message.get("Absent"), None);
        assert_eq!(message.get("Data"), Some("a: b:c"));
        assert_eq!(message.all("Variable").count(), 3);
        assert_eq!(
            message.variable("CHANNEL(rtp,src)"),
            Some("[2001:db8::1]:4")
        );
        assert_eq!(message.variable("X"), Some("1=2"));
        assert_eq!(message.variable("Y"), Some(""));
        assert_eq!(message.variable("CHANNEL(rtp"), None);
    }

    #[test]
    fn a_response_with_an_event_field_is_no_event() {
        let message = Message::new(b"Response: Success\r\nEvents: On\r\nEvent: BridgeDestroy\r\n");
        assert_eq!(message.event(), None);
        assert_eq!(message.response(), Some("Success"));
    }

    #[test]
    fn the_secret_of_a_plain_login_is_not_printed() {
        let action = Action::new("Login")
            .with("Secret", "hunter2")
            .expect("a plain value");
        assert_eq!(format!("{action:?}"), "Action(\"Login\")");
    }

    proptest! {
        /// Whatever a value holds, the server reads one action with the headers that were meant.
        #[test]
        fn no_value_breaks_out_of_its_line(value in ".{0,40}", raw in any::<Vec<u8>>()) {
            for value in [value, String::from_utf8_lossy(&raw).into_owned()] {
                let Ok(action) = Action::new("Status").with("Channel", &value) else { continue };
                let mut bytes = BytesMut::new();
                action.encode("t-", 7, &mut bytes);
                let text = std::str::from_utf8(&bytes).expect("built from strings");
                prop_assert_eq!(
                    text.split("\r\n").collect::<Vec<_>>(),
                    ["Action: Status", "ActionID: t-7", &format!("Channel: {value}"), "", ""]
                );
                prop_assert_eq!(text.matches(['\r', '\n']).count(), 8);
            }
        }
    }

    #[test]
    fn line_ends_and_long_values_are_refused() {
        for value in ["a\r\nAction: Originate", "a\nb", "a\rb", "a\0b"] {
            assert!(
                matches!(
                    Action::new("X").with("K", value),
                    Err(ActionError::Control { .. })
                ),
                "{value:?}"
            );
        }
        assert_eq!(
            Action::new("X").with("K", &"a".repeat(901)),
            Err(ActionError::TooLong {
                key: "K",
                length: 901
            })
        );
    }
}
