//! SPDY/3.1, of it what Kubernetes' clients speak: streams that the client opens, multiplexed over one connection
//! (draft-mbelshe-httpbis-spdy-00; 3.1 differs in flow control only, which no client does).
//!
//! There is no flow control per stream: who does not read one stream holds back all of the connection, and nothing is
//! kept in memory beyond a few pieces. Two halves: [`Reader`] in whoever serves the connection, and a task behind
//! [`Writer`], which ends with the reader.

mod frame;
mod headers;

use bytes::{Bytes, BytesMut};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

pub(super) use headers::{Headers, value};

use super::Gone;
use frame::{Decoder, Encoder, Frame, Received};

/// Frames that may wait to be written.
const QUEUE: usize = 4;

/// Room made for each read, in bytes.
const READ_BYTES: usize = 32 << 10;

/// RST_STREAM: REFUSED_STREAM.
const REFUSED: u32 = 3;

/// Why a connection is closed.
#[derive(Debug, Error)]
pub(super) enum Error {
    #[error("version {0} of SPDY instead of 3")]
    Version(u32),
    #[error("a frame of {0} bytes is too long")]
    TooLong(usize),
    #[error("a frame is too short for its type")]
    Short,
    #[error("stream {0} cannot be")]
    Stream(u32),
    #[error("headers that do not parse, or too many")]
    Headers,
    #[error("the connection failed")]
    Io(#[from] std::io::Error),
}

/// What a client does.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// It opens a stream, and waits for a reply.
    Opened { id: u32, headers: Headers },
    /// It sends bytes; `fin` with the last of a stream.
    Data { id: u32, bytes: Bytes, fin: bool },
    /// It does not want a stream any more.
    Reset { id: u32 },
}

/// What comes from a client.
pub(super) struct Reader<T> {
    io: ReadHalf<T>,
    buffer: BytesMut,
    decoder: Decoder,
    writer: Writer,
    /// A ping to be sent back.
    pong: Option<u32>,
    last_stream: u32,
    /// Ends the task behind the writer when this is dropped.
    _writing: JoinSet<()>,
}

/// What goes to a client. Cheap to clone; waits while the client does not read.
#[derive(Clone, Debug)]
pub(super) struct Writer(mpsc::Sender<Frame>);

/// Speaks SPDY on a connection, as its server.
pub(super) fn serve<T>(io: T) -> Result<(Reader<T>, Writer), Error>
where
    T: AsyncRead + AsyncWrite + Send + 'static,
{
    let (reader, writer) = tokio::io::split(io);
    let (frames, queue) = mpsc::channel(QUEUE);
    let mut writing = JoinSet::new();
    writing.spawn(write(writer, queue, Encoder::new()?));
    let writer = Writer(frames);
    let reader = Reader {
        io: reader,
        buffer: BytesMut::new(),
        decoder: Decoder::new(),
        writer: writer.clone(),
        pong: None,
        last_stream: 0,
        _writing: writing,
    };
    Ok((reader, writer))
}

impl<T: AsyncRead> Reader<T> {
    /// The next thing that the client does; `None` when it has gone. Losing the future loses nothing.
    pub(super) async fn next(&mut self) -> Result<Option<Event>, Error> {
        loop {
            if let Some(id) = self.pong {
                if self.writer.send(Frame::Ping { id }).await.is_err() {
                    return Ok(None);
                }
                self.pong = None;
            }
            if let Some(received) = self.decoder.next(&mut self.buffer)? {
                match self.event(received)? {
                    Some(event) => return Ok(Some(event)),
                    None => continue,
                }
            }
            self.buffer.reserve(READ_BYTES);
            if self.io.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }

    fn event(&mut self, received: Received) -> Result<Option<Event>, Error> {
        Ok(match received {
            Received::Opened { id, headers, fin } => {
                // A client's streams have odd and growing numbers (SPDY/3 §2.3.2).
                if id % 2 == 0 || id <= self.last_stream || fin {
                    return Err(Error::Stream(id));
                }
                self.last_stream = id;
                Some(Event::Opened { id, headers })
            }
            Received::Data { id, bytes, fin } => Some(Event::Data { id, bytes, fin }),
            Received::Reset { id } => Some(Event::Reset { id }),
            Received::Ping { id } => {
                // Even ones would be answers to ours, of which there are none.
                self.pong = Some(id).filter(|id| id % 2 == 1);
                None
            }
            Received::GoAway | Received::Ignored => None,
        })
    }
}

impl Writer {
    /// Accepts a stream.
    pub(super) async fn reply(&self, id: u32) -> Result<(), Gone> {
        self.send(Frame::Reply { id }).await
    }

    /// Refuses a stream.
    pub(super) async fn refuse(&self, id: u32) -> Result<(), Gone> {
        self.send(Frame::Reset { id, status: REFUSED }).await
    }

    /// Sends some bytes.
    pub(super) async fn data(&self, id: u32, bytes: impl Into<Bytes>) -> Result<(), Gone> {
        self.send(Frame::Data { id, bytes: bytes.into(), fin: false }).await
    }

    /// Sends nothing more on a stream.
    pub(super) async fn finish(&self, id: u32) -> Result<(), Gone> {
        self.send(Frame::Data { id, bytes: Bytes::new(), fin: true }).await
    }

    /// Sends nothing more at all.
    pub(super) async fn go_away(&self, last: u32) -> Result<(), Gone> {
        self.send(Frame::GoAway { last }).await
    }

    async fn send(&self, frame: Frame) -> Result<(), Gone> {
        self.0.send(frame).await.map_err(|_| Gone)
    }
}

async fn write<T: AsyncWrite>(mut io: WriteHalf<T>, mut queue: mpsc::Receiver<Frame>, mut encoder: Encoder) {
    let mut bytes = Vec::new();
    while let Some(frame) = queue.recv().await {
        bytes.clear();
        if encoder.encode(&frame, &mut bytes).is_err() || io.write_all(&bytes).await.is_err() {
            return;
        }
        if queue.is_empty() && io.flush().await.is_err() {
            return;
        }
        if let Frame::GoAway { .. } = frame {
            break;
        }
    }
    // A client that has gone does not mind.
    let _ = io.shutdown().await;
}

#[cfg(test)]
pub(super) mod tests {
    use tokio::io::DuplexStream;

    use super::headers::Deflater;
    use super::*;

    /// A client that speaks just enough.
    pub(in crate::streaming) struct Client {
        io: DuplexStream,
        deflater: Deflater,
        decoder: Decoder,
        buffer: BytesMut,
    }

    impl Client {
        /// Its other end is for [`serve`].
        pub(in crate::streaming) fn new() -> (Self, DuplexStream) {
            let (io, server) = tokio::io::duplex(1 << 16);
            let deflater = Deflater::new().expect("zlib");
            (Self { io, deflater, decoder: Decoder::new(), buffer: BytesMut::new() }, server)
        }

        pub(in crate::streaming) async fn open(&mut self, id: u32, headers: &[(&str, &str)]) {
            let bytes = frame::tests::syn_stream(&mut self.deflater, id, headers);
            self.io.write_all(&bytes).await.expect("writes");
        }

        pub(in crate::streaming) async fn data(&mut self, id: u32, text: &str, fin: bool) {
            let frame = Frame::Data { id, bytes: Bytes::copy_from_slice(text.as_bytes()), fin };
            let mut bytes = Vec::new();
            Encoder::new().expect("zlib").encode(&frame, &mut bytes).expect("fits");
            self.io.write_all(&bytes).await.expect("writes");
        }

        /// Bytes of the server's data frames, with their stream and whether it has ended, until it says no more.
        pub(in crate::streaming) async fn all(&mut self) -> Vec<(u32, Vec<u8>, bool)> {
            let mut found: Vec<(u32, Vec<u8>, bool)> = Vec::new();
            loop {
                while let Some(frame) = self.decoder.next(&mut self.buffer).expect("valid") {
                    let Received::Data { id, bytes, fin } = frame else { continue };
                    match found.iter_mut().find(|(known, ..)| *known == id) {
                        Some(stream) => {
                            stream.1.extend_from_slice(&bytes);
                            stream.2 |= fin;
                        }
                        None => found.push((id, bytes.to_vec(), fin)),
                    }
                }
                if self.io.read_buf(&mut self.buffer).await.expect("reads") == 0 {
                    return found;
                }
            }
        }
    }

    #[tokio::test]
    async fn streams_are_told_apart_and_pings_come_back() {
        let (mut client, server) = Client::new();
        let (mut reader, writer) = serve(server).expect("zlib");
        client.open(1, &[("streamtype", "stdin")]).await;
        client.io.write_all(&[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 9]).await.expect("writes");
        client.data(1, "hello", true).await;
        let headers = vec![("streamtype".to_owned(), "stdin".to_owned())];
        assert_eq!(reader.next().await.expect("valid"), Some(Event::Opened { id: 1, headers }));
        let data = Event::Data { id: 1, bytes: Bytes::from_static(b"hello"), fin: true };
        assert_eq!(reader.next().await.expect("valid"), Some(data));
        let mut pong = [0; 12];
        client.io.read_exact(&mut pong).await.expect("reads");
        assert_eq!(pong, [0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 9]);
        writer.reply(1).await.expect("is there");
        writer.data(1, "bye").await.expect("is there");
        writer.finish(1).await.expect("is there");
        writer.go_away(1).await.expect("is there");
        assert_eq!(client.all().await, [(1, b"bye".to_vec(), true)]);
        drop(client);
        assert_eq!(reader.next().await.expect("closed"), None);
    }

    #[tokio::test]
    async fn streams_out_of_order_end_the_connection() {
        for ids in [&[2][..], &[3, 1], &[1, 1]] {
            let (mut client, server) = Client::new();
            let (mut reader, _writer) = serve(server).expect("zlib");
            for id in ids {
                client.open(*id, &[]).await;
            }
            let mut last = Ok(None);
            for _ in ids {
                last = reader.next().await;
            }
            assert!(matches!(last, Err(Error::Stream(_))), "{ids:?}");
        }
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_holds_its_sender_back() {
        let (_client, server) = Client::new();
        let (_reader, writer) = serve(server).expect("zlib");
        let endless = async {
            loop {
                writer.data(1, vec![0; 1 << 14]).await.expect("is there");
            }
        };
        let held_back = tokio::time::timeout(std::time::Duration::from_millis(100), endless).await;
        assert!(held_back.is_err());
    }
}
