//! The virtual machine monitor of one pod.

pub mod virtio;
