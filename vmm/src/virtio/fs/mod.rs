//! A shared directory: a virtio-fs device (virtio 1.2 §5.11) that carries FUSE messages between the guest and the
//! process that serves them, over one packet socket.
//!
//! It copies each message and looks at nothing in it but the two headers' lengths, and the number that joins an answer
//! to its request, in whose place it puts one of its own. It trusts neither side: what the guest sends is bounded in
//! size and number, and a server that breaks the rules or ends is one that answers everything with EIO from then on.

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

mod message;
mod relay;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use vmm_sys_util::eventfd::EventFd;

use self::relay::Relay;
use super::counters::counters;
use super::device::{Active, Backend, DeviceConfig, DeviceError, DeviceInfo, Vectors};
use crate::complain;

/// Longest tag in bytes (virtio 1.2 §5.11.4).
const TAG_BYTES: usize = 36;

/// Entries of the high priority and the request queue.
const QUEUE_SIZES: [u16; 2] = [128, 128];

/// Why there can be no such device.
#[derive(Debug, Error)]
pub enum FsError {
    /// The guest could not name it.
    #[error("a shared directory's tag must have 1 to {TAG_BYTES} bytes, none of them NUL: {0:?}")]
    Tag(String),
    /// The server's socket.
    #[error("the server's socket cannot be used")]
    Socket(#[from] io::Error),
}

counters! {
    requests,
    refused,
    failed,
    from_guest_bytes,
    to_guest_bytes,
}

/// The device's thread.
pub struct Fs {
    /// `None` once it has ended or broken the rules.
    server: Option<OwnedFd>,
    /// Numbers of messages; never used again, so that an answer to a driver that has gone finds nobody.
    next_id: u64,
    counters: Arc<Counters>,
}

/// Makes a device that the guest finds by `tag` and the packet socket `server` answers for.
pub fn device(name: String, tag: &str, server: OwnedFd) -> Result<(DeviceInfo, Fs, Arc<Counters>), FsError> {
    let config = config(tag).ok_or_else(|| FsError::Tag(tag.to_owned()))?;
    let flags = OFlag::from_bits_retain(fcntl(&server, FcntlArg::F_GETFL).map_err(io::Error::from)?);
    fcntl(&server, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map_err(io::Error::from)?;
    let counters = Arc::<Counters>::default();
    let info = DeviceInfo {
        name,
        id: u16::try_from(VIRTIO_ID_FS).unwrap_or_default(),
        // Mass storage, "other".
        class: [0x01, 0x80, 0x00],
        features: 1 << VIRTIO_RING_F_INDIRECT_DESC,
        queue_sizes: QUEUE_SIZES.to_vec(),
        vectors: Vectors::Shared,
        config: DeviceConfig::Fixed(config),
    };
    Ok((info, Fs { server: Some(server), next_id: 0, counters: Arc::clone(&counters) }, counters))
}

/// `struct virtio_fs_config` (virtio 1.2 §5.11.4): the tag, padded with NUL, and one request queue.
fn config(tag: &str) -> Option<Vec<u8>> {
    if tag.is_empty() || tag.len() > TAG_BYTES || tag.contains('\0') {
        return None;
    }
    let mut config = tag.as_bytes().to_vec();
    config.resize(TAG_BYTES, 0);
    config.extend(1_u32.to_le_bytes());
    Some(config)
}

impl Backend for Fs {
    fn run(&mut self, active: &mut Active, stop: &EventFd) -> Result<(), DeviceError> {
        Relay::new(self, active)?.serve(stop)
    }
}

impl Fs {
    /// Stops speaking to the server.
    fn hang_up(&mut self, why: &str) {
        if let Some(server) = self.server.take() {
            complain(format_args!("shared directories are gone, descriptor {}: {why}", server.as_raw_fd()));
        }
    }
}
