//! The caller's terminal, and a session pumped through it.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use anyhow::Result;
use libc::{TIOCGWINSZ, winsize};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::agent::{Session, SessionOutput};

/// Bytes read from the terminal at once.
const TYPED_BYTES: usize = 16 << 10;

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

/// Carries bytes between the caller and a session's process until it ends; the value is its exit code.
///
/// With a terminal, what is typed goes to the process as it is and its window follows the caller's. Without one, signals
/// that would end this program go to the process instead.
pub(super) async fn pump(session: &mut Session, stdin: bool, terminal: bool) -> Result<i32> {
    let raw = if terminal { RawTerminal::enter()? } else { None };
    let mut typed = vec![0; TYPED_BYTES];
    let mut input = stdin.then(tokio::io::stdin);
    let mut resized = signal(SignalKind::window_change())?;
    let (mut interrupted, mut terminated) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    if terminal {
        resize(session).await?;
    }
    let code = loop {
        tokio::select! {
            output = session.next() => match output? {
                SessionOutput::Stdout(bytes) => show(io::stdout(), &bytes)?,
                SessionOutput::Stderr(bytes) => show(io::stderr(), &bytes)?,
                SessionOutput::Exit(code) => break code,
            },
            read = read(&mut input, &mut typed) => match read? {
                [] => {
                    input = None;
                    session.close_stdin().await?;
                }
                bytes => session.write(bytes).await?,
            },
            () = came(&mut resized) => if terminal { resize(session).await? },
            () = came(&mut interrupted) => session.signal(libc::SIGINT).await?,
            () = came(&mut terminated) => session.signal(libc::SIGTERM).await?,
        }
    };
    drop(raw);
    Ok(code)
}

async fn came(signal: &mut Signal) {
    if signal.recv().await.is_none() {
        std::future::pending::<()>().await;
    }
}

/// The next bytes of the caller's input; never ends once there is none.
async fn read<'a>(input: &mut Option<tokio::io::Stdin>, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
    let Some(input) = input else { return std::future::pending().await };
    let count = input.read(buffer).await?;
    Ok(buffer.get(..count).unwrap_or_default())
}

fn show(mut to: impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

async fn resize(session: &mut Session) -> Result<()> {
    if let Some((columns, rows)) = window_size() {
        session.resize(columns, rows).await?;
    }
    Ok(())
}

#[expect(unsafe_code, reason = "TIOCGWINSZ has no safe wrapper among our crates")]
fn window_size() -> Option<(u32, u32)> {
    let mut size = winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize (ioctl_tty(2)), and `size` is one that outlives the call.
    let result = unsafe { libc::ioctl(libc::STDOUT_FILENO, TIOCGWINSZ, &raw mut size) };
    (result == 0 && size.ws_col > 0).then(|| (size.ws_col.into(), size.ws_row.into()))
}
