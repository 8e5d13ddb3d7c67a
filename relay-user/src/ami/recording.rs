//! Recorded sessions of a real Asterisk 22.10.1, for tests.

use std::{collections::HashMap, fs, path::Path, time::Duration};

/// One recorded dialogue: `--- SECONDS server|client` lines, each followed by what went over the
/// wire, with its CRLF line ends written as LF.
pub(super) struct Recording {
    /// Time, whether the server said it, and the text.
    pub(super) segments: Vec<(Duration, bool, String)>,
}

impl Recording {
    pub(super) fn load(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/ami")
            .join(format!("{name}.txt"));
        let text =
            fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut segments: Vec<(Duration, bool, String)> = Vec::new();
        for line in text.split_inclusive('\n') {
            if let Some(head) = line.strip_prefix("---") {
                let mut words = head.split_whitespace();
                let seconds: f64 = words
                    .next()
                    .and_then(|word| word.parse().ok())
                    .expect("a time");
                segments.push((
                    Duration::from_secs_f64(seconds),
                    words.next() == Some("server"),
                    String::new(),
                ));
            } else {
                segments.last_mut().expect("a head first").2.push_str(line);
            }
        }
        Self { segments }
    }

    /// The exact bytes that the server sent.
    pub(super) fn server_bytes(&self) -> Vec<u8> {
        let server = self.segments.iter().filter(|segment| segment.1);
        server.flat_map(|segment| crlf(&segment.2)).collect()
    }

    /// What the recorded client asked: ActionID → headers.
    pub(super) fn actions(&self) -> HashMap<String, HashMap<String, String>> {
        self.segments
            .iter()
            .filter(|segment| !segment.1)
            .map(|segment| {
                segment
                    .2
                    .lines()
                    .filter_map(|line| line.split_once(": "))
                    .map(|(k, v)| (k.to_owned(), v.to_owned()))
                    .collect()
            })
            .filter_map(|headers: HashMap<String, String>| {
                Some((headers.get("ActionID")?.clone(), headers))
            })
            .collect()
    }
}

/// As it was on the wire.
pub(super) fn crlf(text: &str) -> Vec<u8> {
    text.replace('\n', "\r\n").into_bytes()
}
