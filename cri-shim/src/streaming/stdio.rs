//! A process's streams: between its session and the FIFOs (or files, or a program) that containerd names for it.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, watch};

use super::logger;
use crate::agent::{Session, SessionOutput, SessionReader, SessionWriter};
use crate::error::{Error, IoContext, Result};

/// Bytes read from standard input at once.
const INPUT_BYTES: usize = 32 << 10;

/// Orders that may wait.
const ORDERS: usize = 64;

/// Exit code of a process whose session ended first.
const KILLED_CODE: i32 = 128 + libc::SIGKILL;

/// How long output that nobody takes is waited with once its process has been killed.
const KILLED_LIMIT: Duration = Duration::from_secs(1);

/// Where a process's streams lead; empty is nowhere.
#[derive(Clone, Debug, Default)]
pub(crate) struct Streams {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// What a session can be told beside its input.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    /// Standard input ends after what is there of it.
    CloseStdin,
    /// The terminal's columns and rows.
    Resize(u32, u32),
    /// To the process.
    Signal(i32),
}

/// A session that is pumped.
#[derive(Debug)]
pub(crate) struct Pump {
    orders: mpsc::Sender<Order>,
    killed: watch::Sender<bool>,
    ended: watch::Receiver<Option<i32>>,
}

impl Pump {
    /// Opens the streams and begins; the process has an id in one of containerd's namespaces.
    pub(crate) async fn start(session: Session, streams: &Streams, namespace: &str, id: &str) -> Result<Self> {
        let (logger, stdout, stderr) = if streams.stdout.starts_with("binary://") {
            // One program takes both.
            let (logger, stdout, stderr) = logger::start(&streams.stdout, namespace, id).await?;
            (Some(logger), Sink::Fifo(stdout), Sink::Fifo(stderr))
        } else {
            (None, Sink::open(&streams.stdout)?, Sink::open(&streams.stderr)?)
        };
        let stdin = if streams.stdin.is_empty() { None } else { Some(source(&streams.stdin)?) };
        let (reader, writer) = session.split();
        let (orders, inbox) = mpsc::channel(ORDERS);
        let (killed, is_killed) = watch::channel(false);
        tokio::spawn(feed(writer, stdin, inbox, is_killed.clone()));
        let (end, ended) = watch::channel(None);
        tokio::spawn(async move {
            let code = drain(reader, stdout, stderr, is_killed).await;
            if let Some(logger) = logger {
                logger.end().await;
            }
            end.send_replace(Some(code));
        });
        Ok(Self { orders, killed, ended })
    }

    /// Gives an order; a session that has ended does not hear it.
    pub(crate) async fn order(&self, order: Order) {
        let _ = self.orders.send(order).await;
    }

    /// Waits until all output has been taken; the exit code as the session told it, or that of SIGKILL.
    pub(crate) async fn ended(&self) -> i32 {
        let ended = self.ended.clone().wait_for(Option::is_some).await.ok().and_then(|code| *code);
        ended.unwrap_or(KILLED_CODE)
    }

    /// From now on nobody need take the output any more, and no input is waited with.
    pub(crate) fn killed(&self) {
        self.killed.send_replace(true);
    }
}

/// Standard input. It ends when its last writer closes it, or by [`Order::CloseStdin`]; before the first one comes it has no end.
fn source(path: &str) -> Result<pipe::Receiver> {
    pipe::OpenOptions::new().open_receiver(path).doing(|| format!("opening {path}"))
}

/// Where output goes.
enum Sink {
    Nowhere,
    Fifo(pipe::Sender),
    File(tokio::fs::File),
}

impl Sink {
    fn open(uri: &str) -> Result<Self> {
        if uri.is_empty() {
            return Ok(Self::Nowhere);
        }
        let path = match uri.split_once("://") {
            None => uri,
            Some(("fifo" | "file", path)) => path,
            Some((scheme, _)) => {
                return Err(Error::InvalidArgument(format!(
                    "output to {scheme}:// is not supported: use a FIFO, file:// or binary://"
                )));
            }
        };
        if std::fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo()) {
            // For reading as well: so it stays open while containerd is away, and a writer is held up, not killed.
            let fifo = pipe::OpenOptions::new().read_write(true).open_sender(path);
            return fifo.map(Self::Fifo).doing(|| format!("opening {path}"));
        }
        let file = std::fs::File::options().create(true).append(true).open(Path::new(path));
        Ok(Self::File(file.doing(|| format!("opening {path}"))?.into()))
    }

    async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Nowhere => Ok(()),
            Self::Fifo(fifo) => fifo.write_all(bytes).await,
            Self::File(file) => file.write_all(bytes).await,
        }
    }

    async fn end(self) {
        if let Self::File(mut file) = self {
            let _ = file.flush().await;
        }
    }
}

/// Output, to its end.
async fn drain(
    mut reader: SessionReader,
    mut stdout: Sink,
    mut stderr: Sink,
    mut killed: watch::Receiver<bool>,
) -> i32 {
    let code = loop {
        let (sink, bytes) = match reader.next().await {
            Ok(SessionOutput::Stdout(bytes)) => (&mut stdout, bytes),
            Ok(SessionOutput::Stderr(bytes)) => (&mut stderr, bytes),
            Ok(SessionOutput::Exit(code)) => break code,
            Err(error) => {
                tracing::debug!(%error, "a session has ended");
                break KILLED_CODE;
            }
        };
        let too_late = async {
            let _ = killed.wait_for(|killed| *killed).await;
            tokio::time::sleep(KILLED_LIMIT).await;
        };
        tokio::select! {
            biased;
            written = sink.write(&bytes) => if let Err(error) = written {
                tracing::warn!(%error, "output is thrown away");
                *sink = Sink::Nowhere;
            },
            () = too_late => *sink = Sink::Nowhere,
        }
    };
    stdout.end().await;
    stderr.end().await;
    code
}

/// Input and orders, until nobody gives any; then the session ends.
async fn feed(
    mut writer: SessionWriter,
    mut stdin: Option<pipe::Receiver>,
    mut orders: mpsc::Receiver<Order>,
    mut killed: watch::Receiver<bool>,
) {
    let mut chunk = vec![0; INPUT_BYTES];
    loop {
        let done = tokio::select! {
            biased;
            order = orders.recv() => match order {
                Some(Order::CloseStdin) => close(&mut writer, stdin.take(), &mut chunk).await,
                Some(Order::Resize(columns, rows)) => writer.resize(columns, rows).await,
                Some(Order::Signal(signal)) => writer.signal(signal).await,
                None => return,
            },
            count = read(stdin.as_ref(), &mut chunk) => if count == 0 {
                close(&mut writer, stdin.take(), &mut chunk).await
            } else {
                let write = writer.write(chunk.get(..count).unwrap_or_default());
                tokio::select! {
                    written = write => written,
                    // A process that does not read could not be ended otherwise.
                    _ = killed.wait_for(|killed| *killed) => return,
                }
            }
        };
        // The session has ended; who gives orders finds that out by the process's end.
        if done.is_err() {
            return;
        }
    }
}

/// What is there already, then the end.
async fn close(writer: &mut SessionWriter, stdin: Option<pipe::Receiver>, chunk: &mut [u8]) -> Result<()> {
    let Some(stdin) = stdin else { return Ok(()) };
    while let Ok(count @ 1..) = stdin.try_read(chunk) {
        writer.write(chunk.get(..count).unwrap_or_default()).await?;
    }
    writer.close_stdin().await
}

/// How many bytes came, 0 at the end. It never ends if there is nothing to read from.
async fn read(stdin: Option<&pipe::Receiver>, chunk: &mut [u8]) -> usize {
    let Some(stdin) = stdin else { return std::future::pending().await };
    loop {
        if stdin.readable().await.is_err() {
            return std::future::pending().await;
        }
        match stdin.try_read(chunk) {
            Ok(count) => return count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return std::future::pending().await,
        }
    }
}
