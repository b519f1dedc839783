//! The vsock device (virtio 1.2 §5.10): stream connections between the guest and unix sockets of the host.
//!
//! Only clients on the host open connections, with `CONNECT <port>\n` on the listening socket; they wait there until
//! the agent has dialled [`READY_PORT`]. The guest may dial sinks besides, whose bytes end in files. It only moves
//! bytes and never looks at what they mean. Whatever the guest does, the VMM holds no
//! more for it than it promised each of [`CONNECTIONS`], and that only for clients that do not read.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::as_conversions,
        clippy::arithmetic_side_effects,
        clippy::panic
    )
)]

mod burst;
mod connection;
mod credit;
mod handshake;
mod packet;
mod session;
mod sink;
mod table;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_control::GUEST_CID;
#[cfg(doc)]
use vmm_control::READY_PORT;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use self::session::Session;
pub use self::sink::SinkError;
use self::sink::Sinks;
use super::counters::{Snapshot, counters};
use super::device::{Active, Backend, DeviceConfig, DeviceError, DeviceInfo, Vectors};
use super::inbox::{AskError, Asker, Inbox};
use super::poller::{Poller, Wait};

/// Most connections at a time, those included that are being opened or closed.
const CONNECTIONS: usize = 1100;

/// Host ports of clients begin here; sinks are below.
const FIRST_CLIENT_PORT: u32 = 1 << 31;

/// How long a client may take to name its port and the guest to accept it; how long the guest may take to confirm
/// that a connection is over.
const PATIENCE: Duration = Duration::from_secs(10);

/// Entries of the receive, transmit and event queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 8];

enum Question {
    Set(u32, File),
    Remove(u32),
}

/// Why a change of the sinks was refused.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// The device refused it.
    #[error(transparent)]
    Refused(#[from] SinkError),
    /// The device did not answer.
    #[error(transparent)]
    NoAnswer(#[from] AskError),
}

counters! {
    connections,
    refused,
    resets,
    from_guest_bytes,
    to_guest_bytes,
    sink_dropped_bytes,
}

/// Reaches the device from other threads.
#[derive(Clone)]
pub struct Handle {
    asker: Asker<Question, Result<(), SinkError>>,
    counters: Arc<Counters>,
}

impl Handle {
    /// Appends what the guest sends to a port to a file, or changes the file at the next line end.
    pub fn set_sink(&self, port: u32, file: File) -> Result<(), ChangeError> {
        Ok(self.asker.ask(Question::Set(port, file))??)
    }

    /// Closes a sink and resets its connections.
    pub fn remove_sink(&self, port: u32) -> Result<(), ChangeError> {
        Ok(self.asker.ask(Question::Remove(port))??)
    }

    /// What the device has done so far.
    pub fn counters(&self) -> Snapshot {
        self.counters.snapshot()
    }
}

/// The device's thread. What it owns outlives a driver; connections do not.
pub struct Vsock {
    listener: UnixListener,
    ready: Box<dyn FnMut() + Send>,
    sinks: Sinks,
    inbox: Inbox<Question, Result<(), SinkError>>,
    counters: Arc<Counters>,
    /// [`PATIENCE`], but in tests of it.
    patience: Duration,
}

/// Makes the device; `ready` is called on its thread when the agent first dials [`READY_PORT`], once per driver.
pub fn device(listener: UnixListener, ready: impl FnMut() + Send + 'static) -> io::Result<(DeviceInfo, Vsock, Handle)> {
    listener.set_nonblocking(true)?;
    let (asker, inbox) = Inbox::new()?;
    let counters = Arc::<Counters>::default();
    let handle = Handle { asker, counters: Arc::clone(&counters) };
    let info = DeviceInfo {
        name: "vsock".into(),
        id: u16::try_from(VIRTIO_ID_VSOCK).unwrap_or_default(),
        // Communication controller, "other".
        class: [0x07, 0x80, 0x00],
        // Without any feature bit the device does streams alone (virtio 1.2 §5.10.3).
        features: 0,
        queue_sizes: QUEUE_SIZES.to_vec(),
        vectors: Vectors::Shared,
        config: DeviceConfig::Fixed(GUEST_CID.to_le_bytes().to_vec()),
    };
    let vsock =
        Vsock { listener, ready: Box::new(ready), sinks: Sinks::default(), inbox, counters, patience: PATIENCE };
    Ok((info, vsock, handle))
}

impl Backend for Vsock {
    fn idle(&mut self, wake: &EventFd) -> Result<(), DeviceError> {
        const WAKE: u64 = 0;
        const INBOX: u64 = 1;
        let mut poller = Poller::new()?;
        poller.add(wake, EventSet::IN, WAKE)?;
        poller.add(&self.inbox, EventSet::IN, INBOX)?;
        loop {
            for (token, _) in poller.wait(Wait::Block)? {
                if token == WAKE {
                    return Ok(());
                }
                self.inbox.answer_all(|question| match question {
                    Question::Set(port, file) => self.sinks.set(port, file),
                    Question::Remove(port) => self.sinks.remove(port),
                });
            }
        }
    }

    fn run(&mut self, active: &mut Active, stop: &EventFd) -> Result<(), DeviceError> {
        let outcome = Session::new(self, active, stop).and_then(Session::serve);
        self.sinks.disconnect();
        outcome
    }
}
