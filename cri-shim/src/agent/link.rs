//! One connection to a pod's agent: the VMM's `CONNECT` line, the Hellos, then frames.

use std::io;
use std::time::Duration;

use agent_protocol::{FrameError, agree, encode, frame_length, v1};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::error::{Error, Result};
use crate::pod_dir::PodDir;

/// Longest answer to `CONNECT`, in bytes.
const ANSWER_BYTES: usize = 64;

/// Longest time to hand one message to the VMM.
const WRITE_LIMIT: Duration = Duration::from_secs(30);

/// Room made for each read, in bytes.
const READ_BYTES: usize = 16 << 10;

/// A connection on which both sides have said Hello.
#[derive(Debug)]
pub(super) struct Link {
    reader: Reader,
    writer: Writer,
}

/// What comes from the agent.
#[derive(Debug)]
pub(super) struct Reader {
    stream: OwnedReadHalf,
    /// Bytes received and not yet understood.
    buffer: Vec<u8>,
}

/// What goes to the agent. It takes the loss of this half for the end of the connection.
#[derive(Debug)]
pub(super) struct Writer(OwnedWriteHalf);

impl Link {
    fn new(stream: UnixStream) -> Self {
        let (stream, writer) = stream.into_split();
        Self { reader: Reader { stream, buffer: Vec::new() }, writer: Writer(writer) }
    }

    /// Both directions apart, for two who must not wait for each other.
    pub(super) fn split(self) -> (Reader, Writer) {
        (self.reader, self.writer)
    }

    /// Sends one message.
    pub(super) async fn send(&mut self, message: &impl Message) -> Result<()> {
        self.writer.send(message).await
    }

    /// The next message; `None` if the agent closed between messages. Losing the future loses no bytes.
    pub(super) async fn next<M: Message + Default>(&mut self) -> Result<Option<M>> {
        self.reader.next().await
    }

    /// Connects to a port of the agent; also returns the guest's `uname -r`. The VMM holds the connection until the
    /// agent listens, so `limit` covers a boot.
    pub(super) async fn open(dir: &PodDir, port: u32, limit: Duration) -> Result<(Self, String)> {
        match tokio::time::timeout(limit, Self::open_in_time(dir, port)).await {
            Ok(result) => result,
            Err(_) => Err(Error::DeadlineExceeded(format!("the agent did not answer within {} s", limit.as_secs()))),
        }
    }

    async fn open_in_time(dir: &PodDir, port: u32) -> Result<(Self, String)> {
        let (_directory, path) = dir.reach(&dir.vsock())?;
        let stream = UnixStream::connect(path).await.map_err(|error| unreachable_agent(&error))?;
        let mut link = Self::new(stream);
        link.writer.write(format!("CONNECT {port}\n").as_bytes()).await?;
        let answer = link.reader.line().await?;
        if !answer.starts_with("OK ") {
            return Err(Error::Unavailable(format!("the VMM answered {answer:?} to a connection to the agent")));
        }
        link.send(&v1::Hello { version: agent_protocol::VERSION, kernel: String::new() }).await?;
        let hello = link.next::<v1::Hello>().await?.ok_or_else(closed)?;
        agree(hello.version).map_err(|error| broken(&error))?;
        Ok((link, hello.kernel))
    }
}

impl Writer {
    /// Sends one message.
    pub(super) async fn send(&mut self, message: &impl Message) -> Result<()> {
        self.write(&frame(message)?).await
    }

    /// Sends one message, however long the agent takes to want it.
    pub(super) async fn send_unhurried(&mut self, message: &impl Message) -> Result<()> {
        self.0.write_all(&frame(message)?).await.map_err(|error| unreachable_agent(&error))
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = tokio::time::timeout(WRITE_LIMIT, self.0.write_all(bytes)).await;
        let timed_out = || Error::DeadlineExceeded("the agent takes no more messages".into());
        written.map_err(|_| timed_out())?.map_err(|error| unreachable_agent(&error))
    }
}

fn frame(message: &impl Message) -> Result<Vec<u8>> {
    encode(message).map_err(|error| match error {
        FrameError::TooLong(_) => Error::InvalidArgument(format!("too much for the agent: {error}")),
        other => broken(&other),
    })
}

impl Reader {
    /// The next message; `None` if the agent closed between messages. Losing the future loses no bytes.
    pub(super) async fn next<M: Message + Default>(&mut self) -> Result<Option<M>> {
        loop {
            if let Some((word, rest)) = self.buffer.split_first_chunk() {
                let length = frame_length(*word).map_err(|error| broken(&error))?;
                if let Some(bytes) = rest.get(..length) {
                    let message = M::decode(bytes).map_err(|error| broken(&error.into()))?;
                    self.buffer.drain(..length.saturating_add(size_of::<u32>()));
                    return Ok(Some(message));
                }
            }
            if !self.fill().await? {
                return if self.buffer.is_empty() { Ok(None) } else { Err(closed()) };
            }
        }
    }

    async fn line(&mut self) -> Result<String> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.drain(..=end).collect::<Vec<_>>();
                return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            if self.buffer.len() > ANSWER_BYTES || !self.fill().await? {
                return Err(closed());
            }
        }
    }

    /// Reads some more; whether there was any.
    async fn fill(&mut self) -> Result<bool> {
        self.buffer.reserve(READ_BYTES);
        Ok(self.stream.read_buf(&mut self.buffer).await.map_err(|error| unreachable_agent(&error))? > 0)
    }
}

fn closed() -> Error {
    Error::Unavailable("the agent closed the connection".into())
}

fn broken(error: &FrameError) -> Error {
    Error::Unavailable(format!("the agent: {error}"))
}

fn unreachable_agent(error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => Error::Unavailable("the VMM has ended".into()),
        _ => Error::Unavailable(format!("the connection to the agent failed: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link() -> (Link, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("socketpair");
        (Link::new(ours), theirs)
    }

    #[tokio::test]
    async fn a_message_in_pieces_survives_a_dropped_wait() {
        let (mut link, mut agent) = link();
        let hello = v1::Hello { version: 2, kernel: "6.12".into() };
        let frame = encode(&hello).expect("encodes");
        let (first, second) = frame.split_at(5);
        agent.write_all(first).await.expect("writes");
        let cut = tokio::time::timeout(Duration::from_millis(20), link.next::<v1::Hello>()).await;
        assert!(cut.is_err(), "half a message is none");
        agent.write_all(second).await.expect("writes");
        assert_eq!(link.next::<v1::Hello>().await.expect("reads"), Some(hello));
        drop(agent);
        assert_eq!(link.next::<v1::Hello>().await.expect("reads"), None);
    }

    #[tokio::test]
    async fn an_agent_that_lies_is_cut_off() {
        let (mut link, mut agent) = link();
        agent.write_all(&[0xff; 8]).await.expect("writes");
        assert!(matches!(link.next::<v1::Hello>().await, Err(Error::Unavailable(_))));
        let (mut link, mut agent) = self::link();
        agent.write_all(&[b'x'; 4096]).await.expect("writes");
        assert!(link.reader.line().await.is_err(), "a line has a limit");
    }
}
