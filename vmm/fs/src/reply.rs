//! Putting an answer together: room for the header first, filled in last.

use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes};

use crate::abi::OutHeader;

/// Longest answer and longest request: 128 KiB of data and headers, as the VMM's device carries them.
pub(crate) const MESSAGE_BYTES: usize = (128 << 10) + 4096;

/// An answer's bytes.
#[derive(Debug, Default)]
pub(crate) struct Reply(Vec<u8>);

impl Reply {
    /// Begins anew.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
        self.put(&OutHeader::default());
    }

    /// Adds a structure.
    pub(crate) fn put<T: IntoBytes + Immutable>(&mut self, part: &T) {
        self.0.extend_from_slice(part.as_bytes());
    }

    /// Adds bytes.
    pub(crate) fn put_bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Adds at most `length` bytes, as many as `fill` says it has written.
    pub(crate) fn fill<E>(&mut self, length: usize, fill: impl FnOnce(&mut [u8]) -> Result<usize, E>) -> Result<(), E> {
        let start = self.0.len();
        self.0.resize(start.saturating_add(length), 0);
        let filled = fill(self.0.get_mut(start..).unwrap_or_default());
        let written = filled.as_ref().map_or(0, |written| *written);
        self.0.truncate(start.saturating_add(written));
        filled.map(drop)
    }

    /// Count of bytes behind the header.
    pub(crate) fn len(&self) -> usize {
        self.0.len().saturating_sub(size_of::<OutHeader>())
    }

    /// The whole answer to request `unique`.
    pub(crate) fn finish(&mut self, unique: u64, outcome: Result<(), Errno>) -> &[u8] {
        let error = match outcome {
            Ok(()) => 0,
            Err(error) => {
                self.clear();
                error.raw_os_error().saturating_neg()
            }
        };
        let header = OutHeader { len: u32::try_from(self.0.len()).unwrap_or(u32::MAX), error, unique };
        let bytes = header.as_bytes();
        if let Some(place) = self.0.get_mut(..bytes.len()) {
            place.copy_from_slice(bytes);
        }
        &self.0
    }
}
