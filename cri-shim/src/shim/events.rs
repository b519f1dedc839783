//! What happens, told to containerd in the order in which it happens.
//!
//! containerd may be restarting, so each event is tried for a while; what is lost then containerd asks for itself when it
//! finds the shim again.

use std::time::Duration;

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::MessageFull;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::context;
use tokio::sync::mpsc;

use super::process::timestamp;
use crate::clock;

/// Events that may wait.
const QUEUE: usize = 1024;

/// How often one is tried.
const TRIES: u32 = 10;

/// Between two tries, and longest for one.
const TRY_AGAIN: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_secs(5);

/// An event and what it is called.
pub(super) trait Topic: MessageFull {
    /// As containerd's clients subscribe to it.
    const TOPIC: &'static str;
}

macro_rules! topics {
    ($($event:ty => $topic:literal),* $(,)?) => { $(impl Topic for $event { const TOPIC: &'static str = $topic; })* };
}

topics! {
    TaskCreate => "/tasks/create",
    TaskStart => "/tasks/start",
    TaskExit => "/tasks/exit",
    TaskDelete => "/tasks/delete",
    TaskExecAdded => "/tasks/exec-added",
    TaskExecStarted => "/tasks/exec-started",
    TaskOOM => "/tasks/oom",
    TaskPaused => "/tasks/paused",
    TaskResumed => "/tasks/resumed",
}

/// The way to containerd. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Events {
    queue: mpsc::Sender<Envelope>,
    /// containerd's, of all that this shim has.
    pub(super) namespace: String,
}

impl Events {
    /// Nothing is connected before the first event.
    pub(super) fn start(address: String, namespace: String) -> Self {
        let (queue, events) = mpsc::channel(QUEUE);
        tokio::spawn(forward(address, events));
        Self { queue, namespace }
    }

    /// Tells one; waits only if very many wait already.
    pub(super) async fn tell<E: Topic>(&self, event: E) {
        let value = event.write_to_bytes().unwrap_or_default();
        let any = Any { type_url: E::descriptor().full_name().into(), value, ..Any::default() };
        let envelope = Envelope {
            timestamp: Some(timestamp(clock::realtime_ns())).into(),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.into(),
            event: Some(any).into(),
            ..Envelope::default()
        };
        // Fails only when all ends.
        let _ = self.queue.send(envelope).await;
    }
}

async fn forward(address: String, mut events: mpsc::Receiver<Envelope>) {
    let address = format!("unix://{}", address.trim_start_matches("unix://"));
    let mut client = None;
    while let Some(envelope) = events.recv().await {
        let topic = envelope.topic.clone();
        let request = ForwardRequest { envelope: Some(envelope).into(), ..ForwardRequest::default() };
        for attempt in 1..=TRIES {
            match send(&address, &mut client, &request).await {
                Ok(()) => break,
                Err(error) => tracing::warn!(topic, attempt, error, "containerd does not take an event"),
            }
            client = None;
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }
}

async fn send(address: &str, client: &mut Option<EventsClient>, request: &ForwardRequest) -> Result<(), String> {
    if client.is_none() {
        *client = Some(EventsClient::new(Client::connect(address).await.map_err(|error| error.to_string())?));
    }
    let Some(client) = client else { return Ok(()) };
    client.forward(context::with_duration(LIMIT), request).await.map(drop).map_err(|error| error.to_string())
}
