//! HTTP/1.1: a request shows a token and asks for an upgrade; what comes after is somebody else's.

use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{
    CONNECTION, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::token::Tokens;
use super::{FAREWELL, Request, command, forward, spdy, websocket};
use crate::pod::Pods;

/// Longest time for a request's headers to arrive.
const HEADERS_LIMIT: Duration = Duration::from_secs(30);

/// Most bytes of a request's headers.
const HEADERS_BYTES: usize = 64 << 10;

const SPDY: &str = "SPDY/3.1";
const WEBSOCKET: &str = "websocket";

/// Where a SPDY client names the versions of its protocol and the server its choice.
const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
/// Where the server names what it would have taken.
const ACCEPTED_PROTOCOLS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

/// Commands over SPDY, best first.
const SPDY_COMMAND: [&str; 4] = ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
/// Commands over websockets, best first.
const WEBSOCKET_COMMAND: [&str; 2] = ["v5.channel.k8s.io", "v4.channel.k8s.io"];
/// Ports over SPDY, and over SPDY in a websocket.
const SPDY_FORWARD: [&str; 1] = ["portforward.k8s.io"];
const WEBSOCKET_FORWARD: [&str; 1] = ["SPDY/3.1+portforward.k8s.io"];

type Answer = Response<Full<Bytes>>;

/// An answer instead of what was asked for.
type Refusal = Box<Answer>;

/// What requests act on.
#[derive(Clone)]
pub(super) struct Server {
    pub(super) pods: Pods,
    pub(super) tokens: Tokens,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Spdy,
    Websocket,
}

impl Server {
    /// Serves a connection in a task of its own, for as long as that holds its place.
    pub(super) fn spawn(self, stream: TcpStream, place: OwnedSemaphorePermit) {
        let place = std::sync::Arc::new(place);
        tokio::spawn(async move {
            // Small pieces, each of which somebody waits for.
            let _ = stream.set_nodelay(true);
            let service = service_fn(|request| {
                let answer = self.answer(request, std::sync::Arc::clone(&place));
                async move { Ok::<_, std::convert::Infallible>(answer) }
            });
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADERS_LIMIT)
                .max_buf_size(HEADERS_BYTES)
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            if let Err(error) = served.await {
                tracing::debug!(%error, "a streaming connection failed");
            }
        });
    }

    fn answer(&self, mut request: hyper::Request<Incoming>, place: std::sync::Arc<OwnedSemaphorePermit>) -> Answer {
        let (transport, found) = match self.examine(&request) {
            Ok(found) => found,
            Err(refusal) => return *refusal,
        };
        let (answer, protocol) = match agree(transport, &found, request.headers()) {
            Ok(agreed) => agreed,
            Err(refusal) => return *refusal,
        };
        let upgrade = hyper::upgrade::on(&mut request);
        let pods = self.pods.clone();
        tokio::spawn(async move {
            match upgrade.await {
                Ok(io) => serve(pods, found, transport, protocol, TokioIo::new(io)).await,
                Err(error) => tracing::debug!(%error, "a streaming connection was not upgraded"),
            }
            drop(place);
        });
        answer
    }

    /// What is asked for, and over what.
    fn examine(&self, request: &hyper::Request<Incoming>) -> Result<(Transport, Request), Refusal> {
        let upgrade = words(request.headers(), &UPGRADE);
        let asks = |name: &str| upgrade.iter().any(|word| word.eq_ignore_ascii_case(name));
        let transport = if asks(SPDY) {
            Transport::Spdy
        } else if asks(WEBSOCKET) {
            Transport::Websocket
        } else {
            return Err(refusal(StatusCode::BAD_REQUEST, "this wants an upgrade to SPDY/3.1 or websocket"));
        };
        let mut path = request.uri().path().trim_start_matches('/').splitn(2, '/');
        let (kind, token) = (path.next().unwrap_or_default(), path.next().unwrap_or_default());
        match self.tokens.redeem(token).filter(|found| found.path() == kind) {
            Some(found) => Ok((transport, found)),
            None => Err(refusal(StatusCode::NOT_FOUND, "there is no such token: it is good once and for a minute")),
        }
    }
}

/// The answer that upgrades, and the protocol chosen; empty if a SPDY client names none, as the oldest did.
fn agree(transport: Transport, request: &Request, headers: &HeaderMap) -> Result<(Answer, &'static str), Refusal> {
    let forward = matches!(request, Request::PortForward { .. });
    let (name, known): (_, &[&'static str]) = match (transport, forward) {
        (Transport::Spdy, false) => (STREAM_PROTOCOL, &SPDY_COMMAND),
        (Transport::Spdy, true) => (STREAM_PROTOCOL, &SPDY_FORWARD),
        (Transport::Websocket, false) => (SEC_WEBSOCKET_PROTOCOL, &WEBSOCKET_COMMAND),
        (Transport::Websocket, true) => (SEC_WEBSOCKET_PROTOCOL, &WEBSOCKET_FORWARD),
    };
    let asked = words(headers, &name);
    let chosen = known.iter().find(|known| asked.contains(known));
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let fields = answer.headers_mut();
    fields.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    match transport {
        Transport::Spdy => fields.insert(UPGRADE, HeaderValue::from_static(SPDY)),
        Transport::Websocket => fields.insert(UPGRADE, HeaderValue::from_static(WEBSOCKET)),
    };
    match chosen {
        Some(chosen) => fields.insert(name, HeaderValue::from_static(chosen)),
        None if transport == Transport::Spdy && asked.is_empty() => None,
        None => return Err(no_protocol(known)),
    };
    if transport == Transport::Websocket {
        fields.insert(SEC_WEBSOCKET_ACCEPT, websocket_key(headers)?);
    }
    Ok((answer, chosen.copied().unwrap_or_default()))
}

/// The proof that the server speaks websocket (RFC 6455 §4.2).
fn websocket_key(headers: &HeaderMap) -> Result<HeaderValue, Refusal> {
    let version = headers.get(SEC_WEBSOCKET_VERSION).is_some_and(|version| version == "13");
    let key = headers.get(SEC_WEBSOCKET_KEY).filter(|_| version);
    key.and_then(|key| HeaderValue::from_str(&derive_accept_key(key.as_bytes())).ok())
        .ok_or_else(|| refusal(StatusCode::BAD_REQUEST, "this wants a key and version 13 for a websocket"))
}

/// A header's values, one by one.
fn words<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Vec<&'a str> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|word| !word.is_empty()).collect()
}

fn refusal(status: StatusCode, text: &'static str) -> Refusal {
    let mut answer = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *answer.status_mut() = status;
    Box::new(answer)
}

fn no_protocol(known: &[&'static str]) -> Refusal {
    let mut answer = refusal(StatusCode::FORBIDDEN, "none of the protocols asked for is known here");
    for name in known {
        answer.headers_mut().append(ACCEPTED_PROTOCOLS, HeaderValue::from_static(name));
    }
    answer
}

async fn serve(
    pods: Pods,
    request: Request,
    transport: Transport,
    protocol: &'static str,
    io: TokioIo<hyper::upgrade::Upgraded>,
) {
    let served = match (transport, request) {
        (Transport::Spdy, Request::PortForward { pod }) => forward::serve(pods, pod, io).await,
        (Transport::Websocket, Request::PortForward { pod }) => {
            let (near, far) = tokio::io::duplex(websocket::TUNNEL_BYTES);
            let mut forward = std::pin::pin!(forward::serve(pods, pod, near));
            let mut tunnel = std::pin::pin!(websocket::tunnel(io, far));
            tokio::select! {
                served = &mut forward => {
                    // A client that does not close its side is not waited for.
                    let _ = tokio::time::timeout(FAREWELL, tunnel).await;
                    served
                }
                () = &mut tunnel => forward.await,
            }
        }
        (Transport::Spdy, request) => command::over_spdy(pods, request, protocol, io).await,
        (Transport::Websocket, request) => {
            command::over_websocket(pods, request, io).await;
            Ok(())
        }
    };
    if let Err(error) = served {
        // A client's doing, which is told to whoever looks for it.
        tracing::debug!(error = chain(&error), "a streaming connection was closed");
    }
}

fn chain(error: &spdy::Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Wanted;
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    fn exec() -> Request {
        let wanted = Wanted { stdin: false, stdout: true, stderr: true, terminal: false };
        Request::Exec { container: "c".into(), args: vec!["ls".into()], wanted }
    }

    #[test]
    fn the_best_protocol_that_both_know_is_chosen() {
        let name = "x-stream-protocol-version";
        let several = headers(&[(name, "channel.k8s.io"), (name, "v5.channel.k8s.io, v4.channel.k8s.io")]);
        let (answer, chosen) = agree(Transport::Spdy, &exec(), &several).expect("agreed");
        assert_eq!((answer.status(), chosen), (StatusCode::SWITCHING_PROTOCOLS, "v4.channel.k8s.io"));
        assert_eq!(answer.headers()[name], "v4.channel.k8s.io");
        let (answer, chosen) = agree(Transport::Spdy, &exec(), &HeaderMap::new()).expect("the oldest name none");
        assert!(chosen.is_empty() && !answer.headers().contains_key(name));
        let strange = agree(Transport::Spdy, &exec(), &headers(&[(name, "v9.channel.k8s.io")])).expect_err("refused");
        assert_eq!(strange.status(), StatusCode::FORBIDDEN);
        assert_eq!(strange.headers().get_all(ACCEPTED_PROTOCOLS).iter().count(), SPDY_COMMAND.len());
    }

    #[test]
    fn a_websocket_proves_itself() {
        let asked = [
            ("sec-websocket-protocol", "v5.channel.k8s.io"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        let (answer, chosen) = agree(Transport::Websocket, &exec(), &headers(&asked)).expect("agreed");
        // The example of RFC 6455 §1.3.
        assert_eq!(answer.headers()[SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(chosen, "v5.channel.k8s.io");
        assert!(agree(Transport::Websocket, &exec(), &headers(&asked[..2])).is_err(), "no key");
        let forward = Request::PortForward { pod: "p".into() };
        assert!(agree(Transport::Websocket, &forward, &headers(&asked)).is_err(), "a command's protocol");
    }
}
