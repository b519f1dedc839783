//! A session: one connection that owns a process in a container, or watches one.

use std::time::Duration;

use agent_protocol::{CHUNK_BYTES, SESSION_PORT, v1};
use v1::from_session::Message as From;
use v1::to_session::Message as To;

use super::link::{self, Link};
use super::refusal;
use crate::error::{Error, Result};
use crate::pod_dir::PodDir;

/// Longest wait for the connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Longest wait for the process to be started.
const OPEN_LIMIT: Duration = Duration::from_secs(60);

/// What comes out of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionOutput {
    /// Bytes of standard output, or of the terminal.
    Stdout(Vec<u8>),
    /// Bytes of standard error.
    Stderr(Vec<u8>),
    /// The end, after all output: exit status, or 128 + signal.
    Exit(i32),
}

/// An exec, an attach or a forwarded port. Dropping an exec's session kills its process.
#[derive(Debug)]
pub struct Session {
    reader: SessionReader,
    writer: SessionWriter,
}

/// What comes out of a session.
#[derive(Debug)]
pub struct SessionReader(link::Reader);

/// What goes into a session. Dropping it ends the session.
#[derive(Debug)]
pub struct SessionWriter(link::Writer);

impl Session {
    pub(crate) async fn open(dir: &PodDir, kind: v1::open::Kind) -> Result<Self> {
        let (mut link, _) = Link::open(dir, SESSION_PORT, CONNECT_LIMIT).await?;
        link.send(&v1::Open { kind: Some(kind) }).await?;
        let opened = tokio::time::timeout(OPEN_LIMIT, link.next::<v1::Opened>()).await;
        let late = || Error::DeadlineExceeded(format!("the agent did not start it within {} s", OPEN_LIMIT.as_secs()));
        match opened.map_err(|_| late())?? {
            Some(v1::Opened { error: None }) => {
                let (reader, writer) = link.split();
                Ok(Self { reader: SessionReader(reader), writer: SessionWriter(writer) })
            }
            Some(v1::Opened { error: Some(error) }) => Err(refusal(error)),
            None => Err(ended_early()),
        }
    }

    /// Both directions apart, so that neither waits for the other.
    #[must_use]
    pub fn split(self) -> (SessionReader, SessionWriter) {
        (self.reader, self.writer)
    }

    /// The next output; [`SessionOutput::Exit`] is the last. Losing the future loses no output.
    pub async fn next(&mut self) -> Result<SessionOutput> {
        self.reader.next().await
    }
}

impl SessionReader {
    /// The next output; [`SessionOutput::Exit`] is the last. Losing the future loses no output.
    pub async fn next(&mut self) -> Result<SessionOutput> {
        loop {
            match self.0.next::<v1::FromSession>().await?.ok_or_else(ended_early)?.message {
                Some(From::Stdout(bytes)) => return Ok(SessionOutput::Stdout(bytes)),
                Some(From::Stderr(bytes)) => return Ok(SessionOutput::Stderr(bytes)),
                Some(From::Exit(exit)) => return Ok(SessionOutput::Exit(exit.code)),
                // A kind that a newer agent has.
                None => {}
            }
        }
    }
}

impl SessionWriter {
    /// Gives the process input.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(CHUNK_BYTES) {
            self.send(To::Stdin(chunk.to_vec())).await?;
        }
        Ok(())
    }

    /// Ends the process's input.
    pub async fn close_stdin(&mut self) -> Result<()> {
        self.send(To::CloseStdin(v1::Done {})).await
    }

    /// Tells the process's terminal its size.
    pub async fn resize(&mut self, columns: u32, rows: u32) -> Result<()> {
        self.send(To::Resize(v1::WindowSize { columns, rows })).await
    }

    /// Sends a signal to the process group.
    pub async fn signal(&mut self, signal: i32) -> Result<()> {
        self.send(To::Signal(signal)).await
    }

    /// A process that does not read holds its sender back.
    async fn send(&mut self, message: To) -> Result<()> {
        self.0.send_unhurried(&v1::ToSession { message: Some(message) }).await
    }
}

fn ended_early() -> Error {
    Error::Unavailable("the session ended before its process did: the container or its pod has stopped".into())
}
