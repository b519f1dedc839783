//! The thread around a device's backend: it lends the backend the queues while the driver is ready, and gives them
//! back when the driver resets the device.
//!
//! ```text
//! idle ──start──▶ run ──stop──▶ idle        run ──error──▶ idle, and the driver is told to reset
//! ```

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Active, Backend, DeviceError};
use crate::notes::{Note, Notifier};

/// Longest wait for a device's last requests when the VM ends.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the transport asks of the thread. Each order comes with a wake-up, but a wake-up alone means nothing: it may
/// be that of an order which the thread has taken already.
enum Order {
    Run(Active),
    Stop,
}

/// The transport's end of a device's thread.
#[derive(Debug)]
pub struct Worker {
    orders: Sender<Order>,
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
        self.order(Order::Run(active))
    }

    /// Asks for the queues back; the answer is a [`Note::DeviceStopped`].
    pub fn stop(&self) -> io::Result<()> {
        self.order(Order::Stop)
    }

    fn order(&self, order: Order) -> io::Result<()> {
        self.orders.send(order).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
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
    inbox: Receiver<Order>,
    outbox: Sender<Active>,
    notifier: Notifier,
}

impl Thread {
    fn work(mut self) {
        loop {
            if let Err(error) = self.backend.idle(&self.wake) {
                return self.fail(&error);
            }
            let _ = self.wake.read();
            while let Ok(order) = self.inbox.try_recv() {
                // After an error the queues are back before they are asked for.
                let Order::Run(active) = order else { continue };
                let active = self.run(active);
                if self.outbox.send(active).is_err() {
                    return;
                }
                self.notifier.tell(Note::DeviceStopped { slot: self.slot });
            }
        }
    }

    /// Serves the queues until they are asked for or the guest has spoilt them.
    fn run(&mut self, mut active: Active) -> Active {
        // While it has the queues there is no other order than to stop, and one whose wake-up is read is looked for.
        while matches!(self.inbox.try_recv(), Err(TryRecvError::Empty)) {
            if let Err(error) = self.backend.run(&mut active, &self.wake) {
                self.fail(&error);
                break;
            }
            let _ = self.wake.read();
        }
        active
    }

    fn fail(&self, error: &DeviceError) {
        let reason = crate::describe(error);
        self.notifier.tell(Note::DeviceFailed { slot: self.slot, device: self.name.clone(), reason });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::Receiver;

    use super::*;
    use crate::notes::Notes;
    use crate::virtio::testing::{Guest, HANG, readable};

    /// Tells of each run, and runs until it is stopped.
    struct Counted(Sender<()>);

    impl Backend for Counted {
        fn run(&mut self, _: &mut Active, stop: &EventFd) -> Result<(), DeviceError> {
            self.0.send(()).unwrap();
            assert!(readable(stop, HANG));
            Ok(())
        }
    }

    fn worker() -> (Worker, Receiver<()>, Notes) {
        let (notifier, notes) = Notes::new().unwrap();
        let (sender, runs) = channel();
        (Worker::spawn(0, "counted", Box::new(Counted(sender)), notifier).unwrap(), runs, notes)
    }

    fn active() -> Active {
        Active { memory: Guest::new().memory, features: 0, queues: Vec::new() }
    }

    #[test]
    fn the_thread_keeps_the_queues_until_they_are_asked_for() {
        let (mut worker, runs, _notes) = worker();
        worker.start(active()).unwrap();
        runs.recv_timeout(HANG).unwrap();
        // The wake-up of an order that the thread took before it came.
        worker.wake.write(1).unwrap();
        runs.recv_timeout(HANG).unwrap();
        assert!(!worker.take_back());
        worker.stop().unwrap();
        worker.wait();
        assert!(worker.take_back());
        assert!(runs.try_recv().is_err());
    }

    #[test]
    fn a_device_starts_anew_right_after_it_stopped() {
        let (mut worker, runs, _notes) = worker();
        for _ in 0..1000 {
            worker.start(active()).unwrap();
            worker.stop().unwrap();
            worker.wait();
            assert!(worker.take_back());
        }
        runs.try_iter().for_each(drop);
        worker.start(active()).unwrap();
        runs.recv_timeout(HANG).unwrap();
        worker.stop().unwrap();
        worker.wait();
        assert!(worker.take_back());
    }
}
