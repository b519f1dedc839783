//! The Container Runtime Interface: a door that translates the kubelet's words into the core's and back.
//!
//! What a call means is in [`convert`]; what it does is in [`crate::pod`] and [`crate::image`]. Nothing here owns
//! state, waits for a VM or knows what a guest is.

mod convert;
mod deadline;
mod image;
mod readiness;
mod runtime;
mod stats;

use std::future::Future;

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Code, Status};

use crate::audit::Observed;
use crate::error::Error;
use crate::image::Store;
use crate::metrics::Metrics;
use crate::network::Network;
use crate::pod::Pods;
use crate::spans::Spans;
use crate::streaming::Streaming;
use deadline::Deadline;
use proto::image_service_server::ImageServiceServer;
use proto::runtime_service_server::RuntimeServiceServer;

/// The messages of `proto/cri.proto`, with a client and a server.
#[allow(missing_docs, unused_qualifications, clippy::all, reason = "generated")]
pub mod proto {
    tonic::include_proto!("runtime.v1");
}

/// Largest message in either direction, in bytes, as the kubelet has it.
pub const MESSAGE_LIMIT: usize = 16 << 20;

/// What the calls act on. Cheap to clone; every clone is the same node.
#[derive(Clone)]
pub struct Node {
    /// Pods and containers.
    pub pods: Pods,
    /// Images.
    pub images: Store,
    /// Networks.
    pub network: Network,
    /// Where clients go for exec, attach and port-forward.
    pub streaming: Streaming,
    /// The runtime handler that pods may ask for by name.
    pub handler: String,
    /// The daemon's configuration, for people who ask for it.
    pub config: serde_json::Value,
    /// Where calls are counted.
    pub metrics: Metrics,
    /// Where calls are told that their clients trace.
    pub spans: Spans,
}

/// Answers calls until `shutdown` is over; those under way are then finished.
pub async fn serve(
    listener: UnixListener,
    node: Node,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let (metrics, spans) = (node.metrics.clone(), node.spans.clone());
    let runtime = RuntimeServiceServer::new(node.clone());
    let images = ImageServiceServer::new(node);
    tonic::transport::Server::builder()
        .layer(tower::layer::layer_fn(move |inner| Observed { inner, metrics: metrics.clone(), spans: spans.clone() }))
        .layer(tower::layer::layer_fn(Deadline))
        .add_service(runtime.max_decoding_message_size(MESSAGE_LIMIT).max_encoding_message_size(MESSAGE_LIMIT))
        .add_service(images.max_decoding_message_size(MESSAGE_LIMIT).max_encoding_message_size(MESSAGE_LIMIT))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown)
        .await
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::NotFound(_) => Code::NotFound,
            Error::AlreadyExists(_) => Code::AlreadyExists,
            Error::InvalidArgument(_) => Code::InvalidArgument,
            Error::FailedPrecondition(_) => Code::FailedPrecondition,
            Error::DeadlineExceeded(_) => Code::DeadlineExceeded,
            Error::ResourceExhausted(_) => Code::ResourceExhausted,
            Error::Unavailable(_) => Code::Unavailable,
            Error::Internal(_) => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}
