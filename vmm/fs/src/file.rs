//! Open files.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use rustix::fs::{FallocateFlags, OFlags, SeekFrom, copy_file_range, fallocate, fdatasync, fsync, seek};
use rustix::io::{Errno, Result, dup, pread, pwrite};

use crate::abi::{
    CopyFileRangeIn, FSYNC_DATA, FallocateIn, FlushIn, FsyncIn, LseekIn, LseekOut, OpenIn, OpenOut, ReadIn, ReleaseIn,
    WRITE_KILL_SUIDGID, WriteIn, WriteOut,
};
use crate::attributes::kill_privileges;
use crate::body::Body;
use crate::reply::{MESSAGE_BYTES, Reply};
use crate::server::{Call, DATA_BYTES, Server};

/// Of the flags of an open in the guest, those that mean something to the host's file. Its caches are the guest's own
/// business (O_DIRECT), and so is what happens before an open (O_TRUNC comes as a SETATTR).
pub(crate) fn open_flags(flags: u32) -> OFlags {
    let passed = OFlags::ACCMODE | OFlags::APPEND | OFlags::DSYNC | OFlags::SYNC | OFlags::NOATIME;
    OFlags::from_bits_retain(flags) & passed
}

impl Server {
    pub(crate) fn open(&self, call: &Call, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let asked: OpenIn = body.take()?;
        let node = self.nodes.get(call.node)?;
        let flags = if node.is_directory() { OFlags::RDONLY } else { open_flags(asked.flags) };
        let fh = self.handles.add(node.open(flags)?, node.share)?;
        reply.put(&OpenOut { fh, ..OpenOut::default() });
        Ok(())
    }

    pub(crate) fn release(&self, mut body: Body<'_>) -> Result<()> {
        let asked: ReleaseIn = body.take()?;
        self.handles.close(asked.fh)
    }

    /// A process closes its descriptor: some file systems say only then what they could not write.
    pub(crate) fn flush(&self, call: &Call, mut body: Body<'_>) -> Result<()> {
        let asked: FlushIn = body.take()?;
        self.owners.release(call.node, asked.lock_owner);
        dup(&self.handles.get(asked.fh)?.file).map(drop)
    }

    pub(crate) fn read(&self, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let asked: ReadIn = body.take()?;
        let handle = self.handles.get(asked.fh)?;
        let size = usize::try_from(asked.size).ok().filter(|size| *size <= DATA_BYTES).ok_or(Errno::INVAL)?;
        reply.fill(size, |buffer| pread(&handle.file, buffer, asked.offset))
    }

    pub(crate) fn write(&self, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let asked: WriteIn = body.take()?;
        if u32::try_from(body.0.len()) != Ok(asked.size) {
            return Err(Errno::INVAL);
        }
        let handle = self.handles.get(asked.fh)?;
        let written = pwrite(&handle.file, body.0, asked.offset)?;
        if asked.write_flags & WRITE_KILL_SUIDGID != 0 {
            kill_privileges(&handle.file)?;
        }
        reply.put(&WriteOut { size: u32::try_from(written).unwrap_or(asked.size), padding: 0 });
        Ok(())
    }

    /// Of a file or a directory.
    pub(crate) fn fsync(&self, mut body: Body<'_>) -> Result<()> {
        let asked: FsyncIn = body.take()?;
        let handle = self.handles.get(asked.fh)?;
        if asked.fsync_flags & FSYNC_DATA != 0 { fdatasync(&handle.file) } else { fsync(&handle.file) }
    }

    pub(crate) fn fallocate(&self, mut body: Body<'_>) -> Result<()> {
        let asked: FallocateIn = body.take()?;
        let mode = FallocateFlags::from_bits(asked.mode).ok_or(Errno::OPNOTSUPP)?;
        fallocate(&self.handles.get(asked.fh)?.file, mode, asked.offset, asked.length)
    }

    /// Only where data or a hole begins: a position is the guest's.
    pub(crate) fn lseek(&self, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        const SEEK_DATA: u32 = libc::SEEK_DATA.cast_unsigned();
        const SEEK_HOLE: u32 = libc::SEEK_HOLE.cast_unsigned();
        let asked: LseekIn = body.take()?;
        let to = match asked.whence {
            SEEK_DATA => SeekFrom::Data(asked.offset),
            SEEK_HOLE => SeekFrom::Hole(asked.offset),
            _ => return Err(Errno::INVAL),
        };
        let offset = seek(&self.handles.get(asked.fh)?.file, to)?;
        reply.put(&LseekOut { offset });
        Ok(())
    }

    pub(crate) fn copy_range(&self, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let asked: CopyFileRangeIn = body.take()?;
        if asked.flags != 0 {
            return Err(Errno::INVAL);
        }
        let (from, to) = (self.handles.get(asked.fh_in)?, self.handles.get(asked.fh_out)?);
        let (mut offset_in, mut offset_out) = (asked.off_in, asked.off_out);
        // In pieces, so that one request holds a worker up no longer than another; the guest asks for the rest.
        let most = MESSAGE_BYTES.saturating_mul(COPY_MESSAGES);
        let length = usize::try_from(asked.len).unwrap_or(most).min(most);
        let copied = copy_file_range(&from.file, Some(&mut offset_in), &to.file, Some(&mut offset_out), length)?;
        reply.put(&WriteOut { size: u32::try_from(copied).map_err(|_| Errno::OVERFLOW)?, padding: 0 });
        Ok(())
    }
}

/// How much is copied in one request, in longest messages.
const COPY_MESSAGES: usize = 128;
