//! The thread around a device's backend: it lends the backend the queues while the driver is ready, and gives them
//! back when the driver resets the device.
//!
//! ```text
//! idle ──start──▶ run ──stop──▶ idle        run ──error──▶ idle, and the driver is told to reset
//! ```

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Active, Backend, DeviceError};
use crate::notes::{Note, Notifier};

/// Longest wait for a device's last requests when the VM ends.
const PATIENCE: Duration = Duration::from_secs(2);

/// The transport's end of a device's thread.
#[derive(Debug)]
pub struct Worker {
    orders: Sender<Active>,
    wake: Arc<EventFd>,
    returned: Receiver<Active>,
    /// Whether the thread has the queues, as far as is known here.
    pub lent: bool,
}

impl Worker {
    /// Starts the thread of the device in `slot`.
    pub fn spawn(slot: usize, name: &str, backend: Box<dyn Backend>, notifier: Notifier) -> io::Result<Self> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let (orders, inbox) = channel();
        let (outbox, returned) = channel();
        let thread = Thread { slot, name: name.to_owned(), backend, wake: Arc::clone(&wake), inbox, outbox, notifier };
        thread::Builder::new().name(name.to_owned()).spawn(move || thread.work())?;
        Ok(Self { orders, wake, returned, lent: false })
    }

    /// Lends the queues.
    pub fn start(&mut self, active: Active) -> io::Result<()> {
        self.lent = true;
        self.orders.send(active).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        self.wake.write(1)
    }

    /// Asks for the queues back; the answer is a [`Note::DeviceStopped`].
    pub fn stop(&self) -> io::Result<()> {
        self.wake.write(1)
    }

    /// Takes the queues back if the thread has returned them.
    pub fn take_back(&mut self) -> bool {
        if self.lent && self.returned.try_recv().is_ok() {
            self.lent = false;
        }
        !self.lent
    }

    /// Waits for the queues, but not for ever: a host disk may hang.
    pub fn wait(&mut self) {
        if self.lent && self.returned.recv_timeout(PATIENCE).is_ok() {
            self.lent = false;
        }
    }
}

/// The thread's own end.
struct Thread {
    slot: usize,
    name: String,
    backend: Box<dyn Backend>,
    wake: Arc<EventFd>,
    inbox: Receiver<Active>,
    outbox: Sender<Active>,
    notifier: Notifier,
}

impl Thread {
    fn work(mut self) {
        loop {
            if let Err(error) = self.backend.idle(&self.wake) {
                return self.fail(&error);
            }
            // Only after this may the next order come in unseen, and it signals again.
            let _ = self.wake.read();
            while let Ok(mut active) = self.inbox.try_recv() {
                if let Err(error) = self.backend.run(&mut active, &self.wake) {
                    self.fail(&error);
                }
                if self.outbox.send(active).is_err() {
                    return;
                }
                self.notifier.tell(Note::DeviceStopped { slot: self.slot });
            }
        }
    }

    fn fail(&self, error: &DeviceError) {
        let reason = crate::describe(error);
        self.notifier.tell(Note::DeviceFailed { slot: self.slot, device: self.name.clone(), reason });
    }
}
