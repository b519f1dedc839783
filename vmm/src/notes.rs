//! What the other threads tell the main thread, which alone decides what happens to the VM.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use nix::time::{ClockId, clock_gettime};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Something that happened in another thread.
#[derive(Debug)]
pub enum Note {
    /// The guest brought up a device.
    DeviceStarted,
    /// A device's thread has given its queues back after the guest reset the device.
    DeviceStopped {
        /// Its place on the bus.
        slot: usize,
    },
    /// A device ended, and the guest has to reset it.
    DeviceFailed {
        /// Its place on the bus.
        slot: usize,
        /// Its name.
        device: String,
        /// What went wrong.
        reason: String,
    },
    /// The agent dialled the host.
    AgentConnected,
    /// The guest has as much memory plugged as it was asked to have.
    MemorySettled,
    /// The guest is over.
    Ended(End),
}

/// How a guest came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It switched itself off.
    PowerOff,
    /// It reset itself.
    Reset,
    /// KVM cannot run it any further.
    Fault(String),
}

/// The sending end; every thread has its own.
#[derive(Clone, Debug)]
pub struct Notifier {
    sender: Sender<(u64, Note)>,
    wake: Arc<EventFd>,
}

impl Notifier {
    /// Tells the main thread, with the time of now.
    pub fn tell(&self, note: Note) {
        // Without a main thread the process is about to end: then nobody is to be told.
        if self.sender.send((now(), note)).is_ok() {
            let _ = self.wake.write(1);
        }
    }
}

/// The receiving end.
#[derive(Debug)]
pub struct Notes {
    receiver: Receiver<(u64, Note)>,
    /// Readable while notes may wait.
    pub wake: Arc<EventFd>,
}

impl Notes {
    /// Both ends.
    pub fn new() -> io::Result<(Notifier, Self)> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let (sender, receiver) = channel();
        Ok((Notifier { sender, wake: Arc::clone(&wake) }, Self { receiver, wake }))
    }

    /// The next note and when it was written.
    pub fn next(&self) -> Option<(u64, Note)> {
        self.receiver.try_recv().ok()
    }

    /// Takes the wake-up back; call before reading the notes.
    pub fn acknowledge(&self) {
        let _ = self.wake.read();
    }
}

/// `CLOCK_BOOTTIME` in nanoseconds.
pub fn now() -> u64 {
    let Ok(time) = clock_gettime(ClockId::CLOCK_BOOTTIME) else { return 0 };
    let [seconds, nanoseconds] = [time.tv_sec(), time.tv_nsec()].map(|count| u64::try_from(count).unwrap_or(0));
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}
