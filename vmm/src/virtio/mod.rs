//! Virtio 1.2 devices: what each one is, and the thread that serves it.

pub mod blk;
pub mod buffers;
pub mod counters;
pub mod device;
pub mod inbox;
pub mod net;
pub mod poller;
pub mod rng;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vsock;
