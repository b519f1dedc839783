//! Virtio 1.2 devices: what each one is, and the thread that serves it.

pub mod device;
pub mod poller;
