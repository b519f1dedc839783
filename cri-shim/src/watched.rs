//! Descriptors of ours that tokio waits on.
#![expect(unsafe_code, reason = "tokio asks for a promise that every owned descriptor keeps")]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Lets tokio wait on a descriptor; it should be non-blocking if it is to be read or written.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor until it is dropped, which AsyncFd does after it has ceased to
    // wait on it.
    let watched = unsafe { AsyncFd::register(fd) };
    Ok(watched?)
}
