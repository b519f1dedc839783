//! Port-forward: for every connection that a client's side accepts, a pair of SPDY streams here (its bytes, and errors
//! about it) and an agent session to a port of the guest's loopback.
//!
//! The streams of all connections share one: a guest's server that does not read holds all of them back once a few
//! pieces wait for it, since SPDY's clients do no flow control.

use std::collections::HashMap;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::IDLE_LIMIT;
use super::spdy::{self, Event, Headers, Writer};
use crate::agent::SessionOutput;
use crate::error::Result;
use crate::pod::Pods;

/// Most connections of one client at a time.
const CONNECTIONS: usize = 1024;

/// Pieces that wait for a guest's server.
const QUEUE: usize = 16;

/// What a client sends on one connection; its sender is dropped when the client gives it up.
enum Piece {
    Bytes(Bytes),
    End,
}

/// Streams that belong together.
#[derive(Debug, Default)]
struct Pair {
    data: Option<u32>,
    error: Option<u32>,
    port: u16,
}

/// What a stream is for, by its headers.
#[derive(Debug, PartialEq, Eq)]
struct Purpose {
    request: String,
    port: u16,
    error: bool,
}

/// Connections of one client.
struct Forwarder {
    pods: Pods,
    pod: String,
    writer: Writer,
    /// By the client's request id: pairs of which one half is there.
    halves: HashMap<String, Pair>,
    /// By data stream.
    open: HashMap<u32, mpsc::Sender<Piece>>,
    /// Ends with its client.
    connections: JoinSet<()>,
}

/// Serves a client until it is gone.
pub(super) async fn serve<T>(pods: Pods, pod: String, io: T) -> Result<(), spdy::Error>
where
    T: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut reader, writer) = spdy::serve(io)?;
    let (halves, open) = (HashMap::new(), HashMap::new());
    let mut forwarder = Forwarder { pods, pod, writer, halves, open, connections: JoinSet::new() };
    loop {
        let event = tokio::select! {
            event = reader.next() => event?,
            Some(_) = forwarder.connections.join_next() => continue,
            () = tokio::time::sleep(IDLE_LIMIT), if forwarder.connections.is_empty() => None,
        };
        let Some(event) = event else { return Ok(()) };
        if forwarder.handle(event).await.is_none() {
            return Ok(());
        }
    }
}

impl Forwarder {
    /// `None` when the client is to be left.
    async fn handle(&mut self, event: Event) -> Option<()> {
        match event {
            Event::Opened { id, headers } => self.opened(id, &headers).await,
            Event::Data { id, bytes, fin } => {
                let Some(to) = self.open.get(&id) else { return Some(()) };
                let taken = bytes.is_empty() || to.send(Piece::Bytes(bytes)).await.is_ok();
                if taken && fin {
                    let _ = to.send(Piece::End).await;
                }
                if fin || !taken {
                    self.open.remove(&id);
                }
                Some(())
            }
            Event::Reset { id } => {
                self.open.remove(&id);
                Some(())
            }
        }
    }

    async fn opened(&mut self, id: u32, headers: &Headers) -> Option<()> {
        let full = self.halves.len().saturating_add(self.connections.len()) >= CONNECTIONS;
        let Some(purpose) = Purpose::of(id, headers).filter(|_| !full) else {
            return self.writer.refuse(id).await.ok();
        };
        self.writer.reply(id).await.ok()?;
        let pair = self.halves.entry(purpose.request.clone()).or_default();
        pair.port = purpose.port;
        if purpose.error {
            pair.error = Some(id);
        } else {
            pair.data = Some(id);
        }
        if let Pair { data: Some(data), error: Some(error), port } = *pair {
            self.halves.remove(&purpose.request);
            let (pieces, queue) = mpsc::channel(QUEUE);
            self.open.insert(data, pieces);
            let connection = Connection { pods: self.pods.clone(), pod: self.pod.clone(), port, data, error };
            self.connections.spawn(connection.run(self.writer.clone(), queue));
        }
        Some(())
    }
}

impl Purpose {
    /// The oldest clients name no request: an error stream comes just before its data stream.
    fn of(id: u32, headers: &Headers) -> Option<Self> {
        let value = |name| spdy::value(headers, name);
        let error = match value("streamtype")? {
            "error" => true,
            "data" => false,
            _ => return None,
        };
        let port = value("port")?.parse().ok().filter(|&port| port > 0)?;
        let paired = if error { id } else { id.saturating_sub(2) };
        let request = value("requestid").map_or_else(|| paired.to_string(), str::to_owned);
        Some(Self { request, port, error })
    }
}

/// One connection to a port.
struct Connection {
    pods: Pods,
    pod: String,
    port: u16,
    data: u32,
    error: u32,
}

impl Connection {
    async fn run(self, writer: Writer, mut queue: mpsc::Receiver<Piece>) {
        let result = self.carry(&writer, &mut queue).await;
        if let Err(error) = result {
            let text = format!("forwarding port {} of pod {}: {error}", self.port, self.pod);
            let _ = writer.data(self.error, text).await;
        }
        for stream in [self.data, self.error] {
            let _ = writer.finish(stream).await;
        }
    }

    async fn carry(&self, writer: &Writer, queue: &mut mpsc::Receiver<Piece>) -> Result<()> {
        let (mut from, mut to) = self.pods.port_forward(&self.pod, self.port).await?.split();
        let outward = async {
            loop {
                match from.next().await? {
                    SessionOutput::Stdout(bytes) => {
                        if writer.data(self.data, bytes).await.is_err() {
                            return Ok(());
                        }
                    }
                    SessionOutput::Stderr(_) => {}
                    SessionOutput::Exit(_) => return Ok(()),
                }
            }
        };
        let inward = async {
            loop {
                let _ = match queue.recv().await {
                    Some(Piece::Bytes(bytes)) => to.write(&bytes).await,
                    Some(Piece::End) => {
                        let closed = to.close_stdin().await;
                        // The server's answer may still be on its way.
                        if closed.is_ok() {
                            std::future::pending::<()>().await;
                        }
                        closed
                    }
                    None => return,
                };
            }
        };
        tokio::select! {
            result = outward => result,
            () = inward => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn streams_are_paired_by_request_or_by_number() {
        let named = Purpose::of(9, &headers(&[("streamtype", "data"), ("port", "80"), ("requestid", "4")]));
        assert_eq!(named, Some(Purpose { request: "4".into(), port: 80, error: false }));
        let error = Purpose::of(1, &headers(&[("streamtype", "error"), ("port", "80")])).expect("valid");
        let data = Purpose::of(3, &headers(&[("streamtype", "data"), ("port", "80")])).expect("valid");
        assert_eq!(error.request, data.request);
        for bad in [
            headers(&[("streamtype", "data"), ("port", "0")]),
            headers(&[("streamtype", "data"), ("port", "65536")]),
            headers(&[("streamtype", "stdin"), ("port", "80")]),
            headers(&[("port", "80")]),
            headers(&[]),
        ] {
            assert_eq!(Purpose::of(1, &bad), None, "{bad:?}");
        }
    }
}
