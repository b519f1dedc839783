//! Websockets as a client of Kubernetes uses them: binary messages, either channels of a command, the first byte
//! telling which, or a tunnel for SPDY, whose bytes they carry as they come.

use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode};

use super::Gone;

/// Longest message in bytes. Clients send pieces of 32 KiB.
const MESSAGE_BYTES: usize = 1 << 20;

/// Bytes on their way through a tunnel.
pub(super) const TUNNEL_BYTES: usize = 64 << 10;

/// What comes from a client.
pub(super) struct Reader<T>(SplitStream<WebSocketStream<T>>);

/// What goes to a client. Waits while it does not read.
pub(super) struct Writer<T>(SplitSink<WebSocketStream<T>, Message>);

/// Speaks websocket on a connection, as its server; hands have been shaken.
pub(super) async fn serve<T: AsyncRead + AsyncWrite + Unpin>(io: T) -> (Reader<T>, Writer<T>) {
    let config = WebSocketConfig::default().max_message_size(Some(MESSAGE_BYTES)).max_frame_size(Some(MESSAGE_BYTES));
    let (writer, reader) = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await.split();
    (Reader(reader), Writer(writer))
}

impl<T: AsyncRead + AsyncWrite + Unpin> Reader<T> {
    /// The next message; `None` when the client has gone. Losing the future loses nothing.
    pub(super) async fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            match self.0.next().await? {
                Ok(Message::Binary(bytes)) => return Some(bytes.into()),
                // Answered on the way.
                Ok(Message::Ping(_) | Message::Pong(_)) => {}
                // Kubernetes' protocols are binary.
                Ok(Message::Text(_) | Message::Close(_) | Message::Frame(_)) | Err(_) => return None,
            }
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Writer<T> {
    pub(super) async fn send(&mut self, bytes: Vec<u8>) -> Result<(), Gone> {
        self.0.send(Message::Binary(bytes.into())).await.map_err(|_| Gone)
    }

    /// Says that all has gone well and nothing follows.
    pub(super) async fn close(&mut self) -> Result<(), Gone> {
        let frame = CloseFrame { code: CloseCode::Normal, reason: "".into() };
        self.0.send(Message::Close(Some(frame))).await.map_err(|_| Gone)
    }
}

/// Carries bytes between a websocket and `far` until both directions, or the client, have ended.
pub(super) async fn tunnel<T: AsyncRead + AsyncWrite + Unpin>(io: T, far: DuplexStream) {
    let (mut reader, mut writer) = serve(io).await;
    let (mut from, mut to) = tokio::io::split(far);
    let inward = async {
        while let Some(bytes) = reader.next().await {
            if to.write_all(&bytes).await.is_err() {
                break;
            }
        }
        let _ = to.shutdown().await;
    };
    let outward = async {
        let mut piece = vec![0; TUNNEL_BYTES];
        loop {
            match from.read(&mut piece).await {
                Ok(0) | Err(_) => return writer.close().await,
                Ok(count) => writer.send(piece.get(..count).unwrap_or_default().to_vec()).await?,
            }
        }
    };
    // Neither has anything to say about how it ended.
    let _ = tokio::join!(inward, outward);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_tunnel_carries_bytes_both_ways_and_ends_with_them() {
        let (client_io, server_io) = tokio::io::duplex(1 << 16);
        let (mut near, far) = tokio::io::duplex(TUNNEL_BYTES);
        let mut client = WebSocketStream::from_raw_socket(client_io, Role::Client, None).await;
        let tunnel = tokio::spawn(tunnel(server_io, far));
        client.send(Message::Binary(b"there"[..].into())).await.expect("sends");
        let mut five = [0; 5];
        near.read_exact(&mut five).await.expect("reads");
        assert_eq!(&five, b"there");
        near.write_all(b"back").await.expect("writes");
        assert_eq!(client.next().await.expect("open").expect("valid"), Message::Binary(b"back"[..].into()));
        near.shutdown().await.expect("ends");
        let closed = client.next().await.expect("open").expect("valid");
        assert!(matches!(closed, Message::Close(Some(frame)) if frame.code == CloseCode::Normal));
        drop(client);
        assert_eq!(near.read(&mut five).await.expect("ends"), 0);
        tunnel.await.expect("ends");
    }
}
