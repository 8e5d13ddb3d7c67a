//! `relay-user top`: the streams of one interface on a full screen, as they go.
//!
//! The figures are read from the pinned maps every second, which costs little and needs no daemon. What
//! only the daemon knows is asked of it now and then.

pub mod board;
pub mod controls;
pub mod daemon;
pub mod history;
pub mod layout;
pub mod screen;
#[cfg(test)]
mod tests;

use std::{
    io::{self, IsTerminal as _},
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use crossterm::event::{self, Event};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

use self::{
    board::Board,
    controls::Controls,
    screen::{Palette, draw},
};
use crate::{
    datapath::PinnedMaps,
    listing::{Filter, Order},
    output::Style,
    snapshot::Snapshot,
    source::{Source, SourceError},
};

/// How `top` begins.
#[derive(Debug)]
pub struct Options {
    /// The daemon, or what it has left.
    pub source: Source,
    /// Time between two looks at the maps.
    pub period: Duration,
    /// By what rows are sorted at first.
    pub order: Order,
    /// Which are shown at first.
    pub filter: Filter,
    /// The same as it was typed.
    pub filter_text: String,
}

/// Shows the streams until the user has seen enough.
///
/// # Errors
/// No terminal, no daemon and no pinned maps, or a terminal that fails.
pub async fn run(options: Options) -> anyhow::Result<()> {
    ensure!(
        io::stdout().is_terminal() && io::stdin().is_terminal(),
        "top draws on a terminal, and there is none: for a file or a pipe there are `relay-user list --watch` and `relay-user stats --watch`"
    );
    let mut eye = Eye::open(&options.source).await?;
    let palette = Palette {
        colour: Style::of_stdout().colour,
    };
    let mut board = Board::new(options.order, options.filter);
    let mut controls = Controls {
        filter: options.filter_text,
        ..Controls::default()
    };
    let listen = "cannot listen for signals";
    let mut signals = (
        signal(SignalKind::terminate()).context(listen)?,
        signal(SignalKind::interrupt()).context(listen)?,
        signal(SignalKind::hangup()).context(listen)?,
    );
    let mut answers = daemon::ask(options.source);
    let mut ticks = interval(options.period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // It restores the terminal also when this panics.
    let mut terminal = ratatui::try_init().context("cannot draw on this terminal")?;
    let _restored = Restored;
    let mut inputs = inputs();
    loop {
        tokio::select! {
            _ = ticks.tick() => match eye.look() {
                Ok(snapshot) => board.observe(snapshot),
                Err(why) => board.lose_sight(why),
            },
            Some(daemon) = answers.recv() => board.tell(daemon),
            input = inputs.recv() => match input {
                Some(Ok(Event::Key(key))) => {
                    if controls.key(key, &mut board) {
                        return Ok(());
                    }
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error).context("cannot read the terminal"),
                None => return Ok(()),
            },
            _ = signals.0.recv() => return Ok(()),
            _ = signals.1.recv() => return Ok(()),
            _ = signals.2.recv() => return Ok(()),
        }
        terminal
            .draw(|frame| draw(frame, &board, &mut controls, palette))
            .context("cannot draw on this terminal")?;
    }
}

/// Gives the terminal back when it goes.
struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Keys and changes of size, read on a thread of their own, which ends with the process.
fn inputs() -> mpsc::Receiver<io::Result<Event>> {
    let (told, inputs) = mpsc::channel(16);
    thread::spawn(move || {
        loop {
            let event = event::read();
            let failed = event.is_err();
            if told.blocking_send(event).is_err() || failed {
                return;
            }
        }
    });
    inputs
}

/// Looks at the pinned maps of an interface, whichever instance they are of at the time.
struct Eye {
    interface: String,
    maps: Option<PinnedMaps>,
}

impl Eye {
    /// On the interface of the daemon, or on what one has left.
    async fn open(source: &Source) -> anyhow::Result<Self> {
        let asked = match source.client() {
            Ok(client) => client.status().await.map_err(SourceError::from),
            Err(error) => Err(error),
        };
        let interface = match asked {
            Ok(status) => status.interface,
            Err(error) if error.is_absence() => match source.pinned()? {
                Some(interface) => interface,
                None => return Err(error.into()),
            },
            Err(error) => return Err(error.into()),
        };
        let maps = PinnedMaps::open(&interface)?;
        Ok(Self {
            interface,
            maps: Some(maps),
        })
    }

    /// The maps as they are now or, in words, why they cannot be read.
    fn look(&mut self) -> Result<Snapshot, String> {
        let maps = match self.maps.take().filter(PinnedMaps::is_current) {
            Some(maps) => maps,
            None => PinnedMaps::open(&self.interface).map_err(|error| error.to_string())?,
        };
        let snapshot = Snapshot::take(&maps).map_err(|error| error.to_string())?;
        self.maps = Some(maps);
        Ok(snapshot)
    }
}
