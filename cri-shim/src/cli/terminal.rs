//! The caller's terminal, and a session pumped through it.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use anyhow::Result;
use libc::{TIOCGWINSZ, winsize};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::output::{self, Format};
use crate::agent::{Session, SessionOutput, SessionWriter};

/// Bytes read from the terminal at once.
const TYPED_BYTES: usize = 16 << 10;

/// Added to the number of the signal that ended a program, in its exit code.
pub(super) const SIGNALLED: i32 = 128;

/// A terminal in raw mode, put back when dropped.
pub(super) struct RawTerminal(Termios);

impl RawTerminal {
    /// Enters raw mode if standard input is a terminal.
    pub(super) fn enter() -> Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that has gone away.
        let _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &self.0);
    }
}

/// The signals that would end this program, heard from when it is made on: none is lost between two waits.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    pub(super) fn listen() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for the next one.
    pub(super) async fn next(&mut self) -> i32 {
        tokio::select! {
            () = came(&mut self.interrupt) => libc::SIGINT,
            () = came(&mut self.terminate) => libc::SIGTERM,
        }
    }
}

async fn came(signal: &mut Signal) {
    if signal.recv().await.is_none() {
        std::future::pending::<()>().await;
    }
}

/// What a process is given of the caller's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Given {
    /// Standard input.
    pub(super) stdin: bool,
    /// The window's size, and what is typed as it is.
    pub(super) terminal: bool,
}

/// Where a process's output goes.
#[derive(Debug, Default)]
pub(super) enum Output {
    /// To the caller's own streams, as it comes.
    #[default]
    Passed,
    /// Kept for a document: standard output and standard error.
    Kept(Vec<u8>, Vec<u8>),
}

impl Output {
    /// Where it goes in that format.
    pub(super) fn of(format: Format) -> Self {
        match format {
            Format::Table => Self::Passed,
            Format::Json => Self::Kept(Vec::new(), Vec::new()),
        }
    }

    fn stdout(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Passed => show(io::stdout(), bytes),
            Self::Kept(kept, _) => show(kept, bytes),
        }
    }

    fn stderr(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Passed => show(io::stderr(), bytes),
            Self::Kept(_, kept) => show(kept, bytes),
        }
    }

    /// Prints the document, if there is to be one.
    pub(super) fn finish(self, exit_code: i32) -> Result<()> {
        let Self::Kept(stdout, stderr) = self else { return Ok(()) };
        let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        output::json(&json!({"exit_code": exit_code, "stdout": stdout, "stderr": stderr}))
    }
}

/// Carries bytes between the caller and a session's process until it ends; the value is its exit code.
///
/// With a terminal, what is typed goes to the process as it is and its window follows the caller's. Without one, signals
/// that would end this program go to the process instead.
pub(super) async fn pump(session: Session, given: Given, signals: &mut Signals, output: &mut Output) -> Result<i32> {
    let (mut said, mut input) = session.split();
    let _raw = if given.terminal { RawTerminal::enter()? } else { None };
    let listen = async {
        loop {
            match said.next().await? {
                SessionOutput::Stdout(bytes) => output.stdout(&bytes)?,
                SessionOutput::Stderr(bytes) => output.stderr(&bytes)?,
                SessionOutput::Exit(code) => return anyhow::Ok(code),
            }
        }
    };
    // Both at once: a process that takes no input may have something to say first.
    tokio::select! {
        code = listen => code,
        ended = tell(&mut input, given, signals) => Ok(SIGNALLED + ended?),
    }
}

/// Something that a process is told.
enum Told {
    Typed(usize),
    Resized,
    Signal(i32),
}

/// Tells a process what the caller does, for as long as it is heard. Ends only with a signal that comes while the
/// process takes nothing: there is no other way to obey it.
async fn tell(input: &mut SessionWriter, given: Given, signals: &mut Signals) -> Result<i32> {
    let mut stdin = given.stdin.then(tokio::io::stdin);
    let mut typed = vec![0; TYPED_BYTES];
    let mut resized = signal(SignalKind::window_change())?;
    let mut next = given.terminal.then_some(Told::Resized);
    loop {
        let told = match next.take() {
            Some(told) => told,
            None => tokio::select! {
                count = read(&mut stdin, &mut typed) => Told::Typed(count),
                () = came(&mut resized), if given.terminal => Told::Resized,
                signal = signals.next() => Told::Signal(signal),
            },
        };
        if let Told::Typed(0) = told {
            stdin = None;
        }
        let telling = say(input, &told, &typed);
        tokio::select! {
            biased;
            done = telling => if done.is_err() {
                // The process has ended, which the other half is about to hear, with its exit code.
                return std::future::pending().await;
            },
            signal = signals.next() => return Ok(signal),
        }
    }
}

async fn say(input: &mut SessionWriter, told: &Told, typed: &[u8]) -> crate::Result<()> {
    match told {
        Told::Typed(0) => input.close_stdin().await,
        Told::Typed(count) => input.write(typed.get(..*count).unwrap_or_default()).await,
        Told::Resized => match window_size() {
            Some((columns, rows)) => input.resize(columns, rows).await,
            None => Ok(()),
        },
        Told::Signal(signal) => input.signal(*signal).await,
    }
}

/// How many bytes of the caller's input came; none at its end, or if it cannot be read. Never ends once there is no
/// input.
async fn read(input: &mut Option<tokio::io::Stdin>, buffer: &mut [u8]) -> usize {
    match input {
        Some(input) => input.read(buffer).await.unwrap_or(0),
        None => std::future::pending().await,
    }
}

fn show(mut to: impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

#[expect(unsafe_code, reason = "TIOCGWINSZ has no safe wrapper among our crates")]
fn window_size() -> Option<(u32, u32)> {
    let mut size = winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize (ioctl_tty(2)), and `size` is one that outlives the call.
    let result = unsafe { libc::ioctl(libc::STDOUT_FILENO, TIOCGWINSZ, &raw mut size) };
    (result == 0 && size.ws_col > 0).then(|| (size.ws_col.into(), size.ws_row.into()))
}
