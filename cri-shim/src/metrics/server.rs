//! HTTP for who reads the metrics: `GET /metrics`, and nothing else. What a client sends is never kept.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::{Metrics, Sources};

/// Most connections at a time; more wait to be accepted.
const CONNECTIONS: usize = 16;

/// Longest time for a request's headers to arrive, also of a second one on the same connection.
const HEADERS_LIMIT: Duration = Duration::from_secs(90);

/// Longest time that a connection lasts.
const CONNECTION_LIMIT: Duration = Duration::from_secs(3600);

/// Most bytes of a request's headers.
const HEADERS_BYTES: usize = 16 << 10;

/// The OpenMetrics text format, version 1.0.
const FORMAT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

const PATH: &str = "/metrics";

/// Serves at an address, for as long as the runtime does.
pub async fn start(address: SocketAddr, metrics: Metrics, sources: Sources) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (metrics, sources) = (metrics.clone(), sources.clone());
                    tokio::spawn(async move {
                        let _late = tokio::time::timeout(CONNECTION_LIMIT, serve(stream, &metrics, &sources)).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a reader of the metrics was not accepted");
                    // Out of descriptors, most likely: some will come free.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(address)
}

async fn serve(stream: TcpStream, metrics: &Metrics, sources: &Sources) {
    let service = service_fn(|request| async move { Ok::<_, Infallible>(answer(&request, metrics, sources).await) });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_LIMIT)
        .max_buf_size(HEADERS_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        tracing::debug!(%error, "a reader of the metrics went away");
    }
}

async fn answer(request: &Request<Incoming>, metrics: &Metrics, sources: &Sources) -> Response<Full<Bytes>> {
    if request.uri().path() != PATH {
        return plain(StatusCode::NOT_FOUND, "there is only /metrics\n");
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let refusal = plain(StatusCode::METHOD_NOT_ALLOWED, "metrics can only be read\n");
        return with(refusal, ALLOW, "GET, HEAD");
    }
    match metrics.text(sources).await {
        Ok(text) => with(Response::new(Full::from(text)), CONTENT_TYPE, FORMAT),
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be written");
            plain(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be written\n")
        }
    }
}

fn plain(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::from(text));
    *answer.status_mut() = status;
    with(answer, CONTENT_TYPE, "text/plain; charset=utf-8")
}

fn with(mut answer: Response<Full<Bytes>>, name: HeaderName, value: &'static str) -> Response<Full<Bytes>> {
    answer.headers_mut().insert(name, HeaderValue::from_static(value));
    answer
}
