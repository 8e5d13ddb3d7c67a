//! A program on a terminal: a pseudo-terminal, and a screen that is drawn as a real one would be.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    num::NonZero,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    libc,
    pty::{Winsize, openpty},
    sys::{
        signal::Signal,
        termios::{Termios, tcgetattr},
    },
    unistd::setsid,
};

use crate::namespace::{Host, Process, readable};

/// How long the screen may take to show what is awaited.
const PATIENCE: Duration = Duration::from_secs(30);

/// A terminal with a program on it. Dropping it kills the program.
pub struct Terminal {
    process: Process,
    master: File,
    /// How it was set before the program began.
    settings: Termios,
    parser: vt100::Parser,
}

impl Terminal {
    /// Starts a program in a machine on a terminal of so many rows and columns, which controls it as the terminal of a
    /// login does: Ctrl-C is a signal, and so is a change of size.
    ///
    /// # Errors
    /// There is no pseudo-terminal, or the program cannot be started.
    pub fn open(host: &Host, mut command: Command, rows: u16, columns: u16) -> Result<Self> {
        let pty = openpty(&size(rows, columns), None).context("no pseudo-terminal")?;
        let settings = tcgetattr(&pty.slave)?;
        let end = |slave: &OwnedFd| slave.try_clone();
        command
            .env("TERM", "xterm-256color")
            .env_remove("COLUMNS")
            .env_remove("LINES")
            .stdin(end(&pty.slave)?)
            .stdout(end(&pty.slave)?)
            .stderr(end(&pty.slave)?);
        // SAFETY: system calls alone, which are allowed between fork and exec (signal-safety(7)).
        unsafe {
            command.pre_exec(|| {
                setsid()?;
                // Standard input is the terminal by now.
                if libc::ioctl(0, libc::TIOCSCTTY, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let process = host.spawn(command)?;
        Ok(Self {
            process,
            master: pty.master.into(),
            settings,
            parser: vt100::Parser::new(cells(rows), cells(columns), 0),
        })
    }

    /// The program.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Types.
    ///
    /// # Errors
    /// The terminal takes nothing.
    pub fn press(&mut self, keys: &str) -> Result<()> {
        Ok(self.master.write_all(keys.as_bytes())?)
    }

    /// Sends the program a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Changes the size of the window.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn resize(&mut self, rows: u16, columns: u16) -> Result<()> {
        let size = size(rows, columns);
        // SAFETY: the kernel reads the size that the pointer is to.
        let outcome =
            unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        if outcome != 0 {
            return Err(io::Error::last_os_error()).context("TIOCSWINSZ");
        }
        self.parser
            .screen_mut()
            .set_size(cells(rows), cells(columns));
        Ok(())
    }

    /// The screen as it is drawn so far.
    pub fn screen(&self) -> &vt100::Screen {
        self.parser.screen()
    }

    /// Its lines, without what is blank at their ends.
    pub fn lines(&self) -> Vec<String> {
        let screen = self.parser.screen();
        let (_, columns) = screen.size();
        screen
            .rows(0, columns.get())
            .map(|line| line.trim_end().to_owned())
            .collect()
    }

    /// Waits until the lines are as awaited, and returns them.
    ///
    /// # Errors
    /// They do not become so in time, or the program ends: the text holds the screen.
    pub fn wait(&mut self, awaited: &str, fits: impl Fn(&[String]) -> bool) -> Result<Vec<String>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let lines = self.lines();
            if fits(&lines) {
                return Ok(lines);
            }
            if Instant::now() > deadline {
                bail!("not {awaited} after {PATIENCE:?}:\n{}", lines.join("\n"));
            }
            if !self.read(Duration::from_millis(200))? {
                bail!(
                    "the program ended before it was {awaited}:\n{}",
                    lines.join("\n")
                );
            }
        }
    }

    /// Waits until a text is on the screen.
    ///
    /// # Errors
    /// As [`Terminal::wait`].
    pub fn wait_for(&mut self, text: &str) -> Result<Vec<String>> {
        self.wait(&format!("showing `{text}`"), |lines| {
            lines.iter().any(|line| line.contains(text))
        })
    }

    /// Looks on for a while, and returns the screen as it then is.
    ///
    /// # Errors
    /// The program ends meanwhile: the text holds the screen.
    pub fn watch(&mut self, time: Duration) -> Result<vt100::Screen> {
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            if !self.read(left)? {
                bail!("the program ended:\n{}", self.lines().join("\n"));
            }
        }
        Ok(self.parser.screen().clone())
    }

    /// Draws what the program has written; returns whether it may write more.
    fn read(&mut self, patience: Duration) -> Result<bool> {
        if !readable(self.master.as_fd(), patience)? {
            return Ok(true);
        }
        let mut written = [0; 65_536];
        match self.master.read(&mut written) {
            Ok(0) => Ok(false),
            Ok(length) => {
                self.parser.process(&written[..length]);
                Ok(true)
            }
            // Nobody has the other end any longer (pty(7)).
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(false),
            Err(error) => Err(error).context("cannot read the terminal"),
        }
    }

    /// Waits until the program has ended, and draws the last that it wrote.
    ///
    /// # Errors
    /// It does not in time: the text holds the screen.
    pub fn end(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        while self.read(Duration::from_millis(200))? {
            if Instant::now() > deadline {
                bail!(
                    "still running after {PATIENCE:?}:\n{}",
                    self.lines().join("\n")
                );
            }
        }
        self.process.wait(PATIENCE)
    }

    /// Whether the terminal is as it was before the program: its settings, the cursor, the ordinary screen.
    ///
    /// # Errors
    /// The kernel does not tell the settings.
    pub fn is_restored(&self) -> Result<bool> {
        let screen = self.parser.screen();
        Ok(tcgetattr(&self.master)? == self.settings
            && !screen.hide_cursor()
            && !screen.alternate_screen())
    }
}

/// A screen has one at least, whatever its window.
fn cells(count: u16) -> NonZero<u16> {
    NonZero::new(count).unwrap_or(NonZero::<u16>::MIN)
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
