//! Virtio 1.2 devices: what each one is, the thread that serves it, and how it appears on the PCI bus.

pub mod balloon;
pub mod blk;
pub mod buffers;
pub mod counters;
pub mod device;
pub mod fs;
pub mod inbox;
pub mod limit;
pub mod mem;
pub mod net;
pub mod pace;
pub mod poller;
pub mod registers;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transport;
pub mod vsock;
pub mod worker;
