//! What only the daemon knows: the PBX's names, refused calls, and why a stream is not offloaded.

use std::{
    collections::HashMap,
    thread,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use crate::{control::model::StatusReport, listing::Row, source::Source};

/// Least time between two questions.
const INTERVAL: Duration = Duration::from_secs(2);

/// How many times as long as an answer takes nothing is asked: with 10,000 streams an answer is long,
/// and would cost more than all the rest.
const REST: u32 = 50;

/// Longest time between two questions.
const LONGEST: Duration = Duration::from_secs(15);

/// What a daemon answered, or why none did.
#[derive(Clone, Debug)]
pub enum Daemon {
    /// None was asked yet.
    Unasked,
    /// It runs.
    Up(Box<Answer>),
    /// It is away, in words.
    Away(String),
}

/// The answer of a daemon that runs.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The daemon itself.
    pub status: StatusReport,
    /// The rows of each pair, by its number.
    pub pairs: HashMap<u64, Vec<Row>>,
}

/// Asks the daemon from now on, on a thread of its own so that the screen never waits for it. Ends when
/// nobody listens any longer.
pub fn ask(source: Source) -> mpsc::Receiver<Daemon> {
    let (told, answers) = mpsc::channel(1);
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let Ok(runtime) = runtime else {
            return;
        };
        loop {
            let begun = Instant::now();
            let daemon = runtime
                .block_on(answer(&source))
                .unwrap_or_else(Daemon::Away);
            let rest = (begun.elapsed() * REST).clamp(INTERVAL, LONGEST);
            if told.blocking_send(daemon).is_err() {
                return;
            }
            thread::sleep(rest);
        }
    });
    answers
}

async fn answer(source: &Source) -> Result<Daemon, String> {
    let client = source.client().map_err(|error| error.to_string())?;
    let status = client.status().await.map_err(|error| error.to_string())?;
    let list = client.list().await.map_err(|error| error.to_string())?;
    let pairs = list
        .pairs
        .iter()
        .map(|pair| (pair.id, Row::of_pair(pair)))
        .collect();
    Ok(Daemon::Up(Box::new(Answer { status, pairs })))
}
