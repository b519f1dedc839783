//! Open directories.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::mem::MaybeUninit;

use rustix::fs::{FileType, RawDir, SeekFrom, seek};
use rustix::io::{Errno, Result};

use crate::abi::{Dirent, ReadIn};
use crate::body::Body;
use crate::inode::lock;
use crate::reply::Reply;
use crate::server::{DATA_BYTES, Server};

/// Entries are at multiples of this many bytes (`FUSE_DIRENT_ALIGN`).
const ALIGN: usize = 8;

impl Server {
    /// As many entries from a position on as the guest has room for. Their attributes are not sent along
    /// (READDIRPLUS), since it may not keep them.
    pub(crate) fn readdir(&self, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let asked: ReadIn = body.take()?;
        let handle = self.handles.get(asked.fh)?;
        let size = usize::try_from(asked.size).ok().filter(|size| *size <= DATA_BYTES).ok_or(Errno::INVAL)?;
        let _reading = lock(&handle.reading);
        seek(&handle.file, SeekFrom::Start(asked.offset))?;
        let mut buffer = vec![MaybeUninit::uninit(); size];
        let mut entries = RawDir::new(&handle.file, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            let length = size_of::<Dirent>().saturating_add(name.len()).next_multiple_of(ALIGN);
            if reply.len().saturating_add(length) > size {
                break;
            }
            let namelen = u32::try_from(name.len()).map_err(|_| Errno::NAMETOOLONG)?;
            reply.put(&Dirent {
                ino: entry.ino(),
                off: entry.next_entry_cookie(),
                namelen,
                kind: kind(entry.file_type()),
            });
            reply.put_bytes(name);
            let padding = reply.len().next_multiple_of(ALIGN).saturating_sub(reply.len());
            reply.put_bytes([0; ALIGN].get(..padding).unwrap_or_default());
        }
        Ok(())
    }
}

/// `DT_*` of readdir(3): the file type's bits of a mode, moved down.
fn kind(kind: FileType) -> u32 {
    match kind {
        FileType::Unknown => 0,
        known => known.as_raw_mode() >> 12_u32,
    }
}
