//! Files and directories that the guest has open.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::io::{Errno, Result};

use crate::inode::lock;

/// Most open at a time, each of which holds a descriptor.
const MOST_HANDLES: usize = 250_000;

/// Something open.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) file: OwnedFd,
    /// As [`crate::inode::Node::share`].
    share: u64,
    /// Held while a directory is read: its position belongs to the descriptor.
    pub(crate) reading: Mutex<()>,
}

impl Handle {
    pub(crate) fn new(file: OwnedFd, share: u64) -> Self {
        Self { file, share, reading: Mutex::new(()) }
    }
}

#[derive(Debug, Default)]
struct Table {
    by_number: HashMap<u64, Arc<Handle>>,
    last: u64,
}

/// All that is open.
#[derive(Debug, Default)]
pub(crate) struct Handles(Mutex<Table>);

impl Handles {
    /// A number for an open file, until [`Handles::close`].
    pub(crate) fn add(&self, file: OwnedFd, share: u64) -> Result<u64> {
        let mut table = lock(&self.0);
        if table.by_number.len() >= MOST_HANDLES {
            return Err(Errno::NFILE);
        }
        let number = table.last.checked_add(1).ok_or(Errno::NFILE)?;
        table.last = number;
        table.by_number.insert(number, Arc::new(Handle::new(file, share)));
        Ok(number)
    }

    pub(crate) fn get(&self, number: u64) -> Result<Arc<Handle>> {
        lock(&self.0).by_number.get(&number).cloned().ok_or(Errno::BADF)
    }

    pub(crate) fn close(&self, number: u64) -> Result<()> {
        let gone = lock(&self.0).by_number.remove(&number);
        // Closing may wait for the host, which nobody else should have to.
        gone.map(drop).ok_or(Errno::BADF)
    }

    /// Closes what is open in volumes that are not mounted any more.
    pub(crate) fn keep(&self, shares: &HashSet<u64>) {
        let gone: Vec<_> = lock(&self.0).by_number.extract_if(|_, handle| !shares.contains(&handle.share)).collect();
        drop(gone);
    }

    /// Closes everything.
    pub(crate) fn clear(&self) {
        let gone = std::mem::take(&mut lock(&self.0).by_number);
        drop(gone);
    }
}
