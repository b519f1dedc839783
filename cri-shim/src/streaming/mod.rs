//! Exec, attach and port-forward: a server on loopback that a kubelet passes its clients on to.
//!
//! ```text
//! CRI call ──▶ [Streaming] ──▶ URL with a token, good once and for a minute
//! client ─────▶ [http] ──▶ SPDY/3.1 [spdy] or websocket [websocket]
//!                             ├──▶ [command]: exec and attach, one agent session
//!                             └──▶ [forward]: ports of the guest's loopback, one agent session per connection
//! ```
//! A shim's clients come without a server: by FIFOs, files or a program ([stdio], [logger]), and by dialling the loopback of the
//! pod's network namespace on the host ([loopback]).
//!
//! Bytes are passed on as they are taken: who reads slowly is waited for, and nothing is kept for them. A client that
//! vanishes takes its sessions with it, and with an exec's session goes its process.

mod command;
mod forward;
mod http;
mod logger;
pub(crate) mod loopback;
mod spdy;
pub(crate) mod stdio;
mod token;
mod websocket;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::error::{IoContext, Result};
use crate::pod::Pods;
use token::Tokens;

/// Most connections at a time; more wait to be accepted.
const CONNECTIONS: usize = 1024;

/// Longest wait for a client to open the streams that belong together.
const STREAMS_LIMIT: Duration = Duration::from_secs(30);

/// Longest time in which nothing happens on a connection, as the kubelet has it.
const IDLE_LIMIT: Duration = Duration::from_secs(4 * 60 * 60);

/// How long a client may take to hang up once everything has been said.
const FAREWELL: Duration = Duration::from_secs(10);

/// The other end of a connection is not there any more.
#[derive(Debug, PartialEq, Eq)]
struct Gone;

/// Which of a command's streams a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Gives it input.
    pub stdin: bool,
    /// Reads its output.
    pub stdout: bool,
    /// Reads its errors.
    pub stderr: bool,
    /// It has a terminal, whose size the client may tell.
    pub terminal: bool,
}

/// What a token stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Run a command in a container.
    Exec {
        /// The container.
        container: String,
        /// The command and its arguments.
        args: Vec<String>,
        /// Streams.
        wanted: Wanted,
    },
    /// Watch a container's own process.
    Attach {
        /// The container.
        container: String,
        /// Streams.
        wanted: Wanted,
    },
    /// Connect to ports of a pod's loopback.
    PortForward {
        /// The pod.
        pod: String,
    },
}

impl Request {
    fn path(&self) -> &'static str {
        match self {
            Self::Exec { .. } => "exec",
            Self::Attach { .. } => "attach",
            Self::PortForward { .. } => "portforward",
        }
    }
}

/// Where clients are sent to. Cheap to clone; every clone is the same server.
#[derive(Clone, Debug)]
pub struct Streaming {
    address: SocketAddr,
    tokens: Tokens,
}

impl Streaming {
    /// Listens on a port of loopback, and serves for as long as the runtime does.
    pub async fn start(pods: Pods) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.doing(|| "listening on loopback")?;
        let address = listener.local_addr().doing(|| "the address of the streaming server")?;
        let tokens = Tokens::default();
        tokio::spawn(accept(listener, http::Server { pods, tokens: tokens.clone() }));
        Ok(Self { address, tokens })
    }

    /// The URL by which a client gets what was asked for, once and soon.
    pub fn url(&self, request: Request) -> Result<String> {
        let path = request.path();
        Ok(format!("http://{}/{path}/{}", self.address, self.tokens.issue(request)?))
    }
}

async fn accept(listener: TcpListener, server: http::Server) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => server.clone().spawn(stream, place),
            Err(error) => {
                tracing::warn!(%error, "a streaming connection was not accepted");
                // Out of descriptors, most likely: some will come free.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
