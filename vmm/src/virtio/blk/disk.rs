//! A disk's address space: which host file is behind which sectors, and moving data between them.
//!
//! It owns the files. It never writes to one that was added read-only, and never reads past an extent.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::stat::{SFlag, fstat};
use thiserror::Error;
use vmm_control::{Extent, MOST_QUEUES, SECTOR_BYTES};

use super::request::{ID_BYTES, Ranges, Request, RequestError, Span};
use crate::virtio::buffers::Buffers;

/// Most extents of one disk: each is an open file.
const EXTENTS: usize = 1024;

/// Sectors in a page; extents start and end on one.
const PAGE_SECTORS: u64 = 8;

const PAGE_BYTES: u64 = PAGE_SECTORS * SECTOR_BYTES;

/// Most bytes written at once. Before each page that it copies, tmpfs of Linux 6.12 touches all that is left of the write: a MiB from
/// pages here and there costs it four times what it costs in sixteen writes.
const WRITE_BYTES: usize = 64 << 10;

/// The answer to GET_ID, padded with zeros.
const ID: [u8; ID_BYTES] = *b"pericarp-disk\0\0\0\0\0\0\0";

/// Why an extent was not added or removed.
#[derive(Debug, Error)]
pub enum DiskError {
    /// None, or too many.
    #[error("queues is {0}; it may be 1 to {MOST_QUEUES}")]
    Queues(u8),
    /// The size is not whole sectors.
    #[error("a disk's capacity is a multiple of {SECTOR_BYTES} bytes, which {0} is not")]
    Capacity(u64),
    /// An extent of no sectors.
    #[error("the extent is empty; give it at least 8 sectors")]
    Empty,
    /// Start or length is not a whole number of pages.
    #[error("the extent's first sector and length must be multiples of 8")]
    Misaligned,
    /// It reaches past the end of the disk.
    #[error("the extent ends past the disk's {0} bytes")]
    PastEnd(u64),
    /// Some sector of it is taken.
    #[error("the extent overlaps the one at sector {0}; remove that first or choose other sectors")]
    Overlap(u64),
    /// The table is full.
    #[error("the disk has {EXTENTS} extents already; remove one first")]
    Full,
    /// Removal of what is not there.
    #[error("no extent begins at sector {0}")]
    NotFound(u64),
    /// Not a regular file or block device.
    #[error("the extent's descriptor is neither a regular file nor a block device")]
    NotAFile,
    /// The descriptor does not allow what the extent does.
    #[error("the extent's descriptor is not open for {0}")]
    Access(&'static str),
    /// The descriptor cannot be examined.
    #[error("cannot examine the extent's descriptor")]
    Io(#[from] io::Error),
}

/// A run of disk bytes backed by a file from its beginning.
#[derive(Debug)]
struct Mapping {
    range: Range<u64>,
    file: File,
    read_only: bool,
    /// How often it was changed, and how many of those changes are durable. A flush that is under way makes none durable yet.
    changes: u64,
    durable: u64,
    reads: Reads,
    is_device: bool,
}

/// How a file is read while others can be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reads {
    /// What the page cache has at once, the rest meanwhile.
    Hurried,
    /// All of it meanwhile: a block device that cannot say whether it would have to be waited for.
    Aside,
    /// At once: a file system that cannot say so is mostly one in memory, where a flush is nothing, either.
    Waited,
}

/// A request, and how far it has come.
#[derive(Debug)]
pub(super) enum Job {
    /// All of it is done.
    Done,
    /// What is still to be read.
    Read(Span),
    /// What is still to be made durable.
    Flush {
        /// The extent at hand, by its first byte, or a byte behind the last one.
        at: u64,
        /// The changes of its file that will be durable.
        changes: u64,
        /// Why some file failed.
        failure: Option<io::Error>,
    },
}

/// What the host is asked to do meanwhile.
#[derive(Debug)]
pub(super) enum Operation {
    /// Filling some bytes of the chain's writable part from a position of a file.
    Read { file: RawFd, position: u64, data: Range<usize> },
    /// Making a file durable.
    Flush { file: RawFd },
}

/// A disk, its extents by first byte.
#[derive(Debug)]
pub(super) struct Disk {
    capacity: u64,
    mappings: BTreeMap<u64, Mapping>,
}

impl Disk {
    /// A disk of so many bytes with nothing on it.
    pub(super) fn new(capacity: u64) -> Result<Self, DiskError> {
        if capacity.is_multiple_of(SECTOR_BYTES) {
            Ok(Self { capacity, mappings: BTreeMap::new() })
        } else {
            Err(DiskError::Capacity(capacity))
        }
    }

    /// Size in bytes.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Maps a file into the disk.
    pub(super) fn add(&mut self, extent: &Extent, file: File) -> Result<(), DiskError> {
        let range = checked_range(extent, self.capacity)?;
        if self.mappings.len() >= EXTENTS {
            return Err(DiskError::Full);
        }
        // Extents never overlap, so only the last one that begins before the end of this one can.
        if let Some((_, last)) = self.mappings.range(..range.end).next_back()
            && last.range.end > range.start
        {
            return Err(DiskError::Overlap(last.range.start.saturating_div(SECTOR_BYTES)));
        }
        let kind = check_file(&file, extent.read_only)?;
        let (is_device, reads) = (kind == SFlag::S_IFBLK, Reads::Hurried);
        let mapping = Mapping { range, file, read_only: extent.read_only, changes: 0, durable: 0, reads, is_device };
        self.mappings.insert(mapping.range.start, mapping);
        Ok(())
    }

    /// Takes an extent out and closes its file.
    pub(super) fn remove(&mut self, first_sector: u64) -> Result<(), DiskError> {
        let start = first_sector.checked_mul(SECTOR_BYTES).ok_or(DiskError::NotFound(first_sector))?;
        self.mappings.remove(&start).map(drop).ok_or(DiskError::NotFound(first_sector))
    }

    /// Begins a request; what may have to wait for the host's disk is left to [`Disk::advance`].
    pub(super) fn begin(
        &mut self,
        request: Request,
        readable: &mut Buffers<'_>,
        writable: &mut Buffers<'_>,
    ) -> Result<Job, RequestError> {
        match request {
            Request::Read(span) => return Ok(Job::Read(span)),
            Request::Flush => return Ok(Job::Flush { at: 0, changes: 0, failure: None }),
            Request::Write(span) => self.write(&span, readable)?,
            Request::Discard(ranges) | Request::WriteZeroes(ranges) => self.punch(&ranges)?,
            Request::GetId => drop(writable.write_at(0, &ID)),
        }
        Ok(Job::Done)
    }

    /// Goes on with a job until it is done. What the host would have to be waited for is returned if it may be `set_aside`; then
    /// [`Disk::arrived`] takes its outcome.
    pub(super) fn advance(
        &mut self,
        job: &mut Job,
        writable: &mut Buffers<'_>,
        set_aside: bool,
    ) -> Result<Option<Operation>, RequestError> {
        loop {
            let result = match job {
                Job::Done => return Ok(None),
                Job::Read(span) if span.data.is_empty() => return Ok(None),
                Job::Read(span) => {
                    let mapping = self.at_mut(span.start)?;
                    let position = span.start.saturating_sub(mapping.range.start);
                    let data = mapping.piece(span.start, &span.data);
                    match mapping.read(data.clone(), position, writable, set_aside) {
                        Err(error) if set_aside && error.kind() == io::ErrorKind::WouldBlock => {
                            return Ok(Some(Operation::Read { file: mapping.file.as_raw_fd(), position, data }));
                        }
                        result => result,
                    }
                }
                Job::Flush { at, changes, failure } => {
                    let mut rest = self.mappings.range(*at..);
                    let Some((start, mapping)) = rest.find(|(_, mapping)| mapping.changes != mapping.durable) else {
                        return failure.take().map_or(Ok(None), |error| Err(error.into()));
                    };
                    (*at, *changes) = (*start, mapping.changes);
                    if set_aside && mapping.reads != Reads::Waited {
                        return Ok(Some(Operation::Flush { file: mapping.file.as_raw_fd() }));
                    }
                    mapping.file.sync_data().map(|()| 0)
                }
            };
            self.arrived(job, result, writable)?;
        }
    }

    /// Takes the outcome of an operation: how many bytes were read.
    pub(super) fn arrived(
        &mut self,
        job: &mut Job,
        result: io::Result<usize>,
        writable: &mut Buffers<'_>,
    ) -> Result<(), RequestError> {
        match job {
            Job::Done => {}
            Job::Read(span) => {
                let count = match result {
                    // The file ends here: the rest of its extent reads as zeros.
                    Ok(0) => {
                        let rest = self.at(span.start)?.piece(span.start, &span.data);
                        writable.zero(rest.clone());
                        rest.len()
                    }
                    // It is asked again.
                    Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
                    result => result?,
                };
                advance(&mut span.start, &mut span.data, count);
            }
            Job::Flush { at, changes, failure } => {
                match result {
                    Ok(_) => {
                        let mapping = self.at_mut(*at)?;
                        mapping.durable = mapping.durable.max(*changes);
                    }
                    Err(error) => *failure = Some(error),
                }
                // The other files are made durable all the same.
                *at = at.saturating_add(1);
            }
        }
        Ok(())
    }

    fn write(&mut self, span: &Span, readable: &mut Buffers<'_>) -> Result<(), RequestError> {
        // Nothing is written unless all of it may be.
        let end = span.start.saturating_add(u64::try_from(span.data.len()).unwrap_or(u64::MAX));
        self.check_writable(span.start..end)?;
        let mut at = span.start;
        let mut data = span.data.clone();
        while !data.is_empty() {
            let mapping = self.at_mut(at)?;
            let piece = mapping.piece(at, &data);
            let piece = piece.start..piece.end.min(piece.start.saturating_add(WRITE_BYTES));
            mapping.changes = mapping.changes.saturating_add(1);
            match readable.pwrite(piece, &mapping.file, at.saturating_sub(mapping.range.start))? {
                0 => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                count => advance(&mut at, &mut data, count),
            }
        }
        Ok(())
    }

    /// Makes holes in the files. Every sector of the disk may be a hole, so both kinds of request do the same.
    fn punch(&mut self, ranges: &Ranges) -> Result<(), RequestError> {
        for range in ranges.iter() {
            self.check_writable(range.clone())?;
        }
        for range in ranges.iter() {
            let mut at = range.start;
            while at < range.end {
                let mapping = self.at_mut(at)?;
                let end = mapping.range.end.min(range.end);
                mapping.changes = mapping.changes.saturating_add(1);
                mapping.punch(at..end)?;
                at = end;
            }
        }
        Ok(())
    }

    fn check_writable(&self, range: Range<u64>) -> Result<(), RequestError> {
        let mut at = range.start;
        while at < range.end {
            let mapping = self.at(at)?;
            if mapping.read_only {
                return Err(RequestError::ReadOnly);
            }
            at = mapping.range.end;
        }
        Ok(())
    }

    /// The extent that holds a byte.
    fn at(&self, byte: u64) -> Result<&Mapping, RequestError> {
        let (_, mapping) = self.mappings.range(..=byte).next_back().ok_or(RequestError::Unmapped)?;
        if mapping.range.contains(&byte) { Ok(mapping) } else { Err(RequestError::Unmapped) }
    }

    fn at_mut(&mut self, byte: u64) -> Result<&mut Mapping, RequestError> {
        let (_, mapping) = self.mappings.range_mut(..=byte).next_back().ok_or(RequestError::Unmapped)?;
        if mapping.range.contains(&byte) { Ok(mapping) } else { Err(RequestError::Unmapped) }
    }
}

impl Mapping {
    /// Reads from the file; `WouldBlock` says that what may be `set_aside` should be.
    fn read(
        &mut self,
        data: Range<usize>,
        position: u64,
        writable: &mut Buffers<'_>,
        set_aside: bool,
    ) -> io::Result<usize> {
        if set_aside && self.reads == Reads::Hurried {
            match writable.pread(data.clone(), &self.file, position, libc::RWF_NOWAIT) {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    self.reads = if self.is_device { Reads::Aside } else { Reads::Waited };
                }
                result => return result,
            }
        }
        if set_aside && self.reads == Reads::Aside {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        writable.pread(data, &self.file, position, 0)
    }

    /// As much of `data`, whose first byte belongs at `at`, as this extent holds.
    fn piece(&self, at: u64, data: &Range<usize>) -> Range<usize> {
        let room = usize::try_from(self.range.end.saturating_sub(at)).unwrap_or(usize::MAX);
        data.start..data.end.min(data.start.saturating_add(room))
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let position = signed(range.start.saturating_sub(self.range.start))?;
        let len = signed(range.end.saturating_sub(range.start))?;
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        loop {
            match fallocate(&self.file, flags, position, len) {
                Err(Errno::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }
}

fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn advance(at: &mut u64, data: &mut Range<usize>, count: usize) {
    *at = at.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
    data.start = data.start.saturating_add(count);
}

fn checked_range(extent: &Extent, capacity: u64) -> Result<Range<u64>, DiskError> {
    if extent.sectors == 0 {
        return Err(DiskError::Empty);
    }
    if !extent.first_sector.is_multiple_of(PAGE_SECTORS) || !extent.sectors.is_multiple_of(PAGE_SECTORS) {
        return Err(DiskError::Misaligned);
    }
    let start = extent.first_sector.checked_mul(SECTOR_BYTES).ok_or(DiskError::PastEnd(capacity))?;
    let len = extent.sectors.checked_mul(SECTOR_BYTES).ok_or(DiskError::PastEnd(capacity))?;
    let end = start.checked_add(len).ok_or(DiskError::PastEnd(capacity))?;
    // The last page may reach past the last sector.
    if end > capacity.next_multiple_of(PAGE_BYTES) { Err(DiskError::PastEnd(capacity)) } else { Ok(start..end) }
}

fn check_file(file: &File, read_only: bool) -> Result<SFlag, DiskError> {
    let kind = SFlag::from_bits_truncate(fstat(file).map_err(io::Error::from)?.st_mode) & SFlag::S_IFMT;
    if kind != SFlag::S_IFREG && kind != SFlag::S_IFBLK {
        return Err(DiskError::NotAFile);
    }
    let flags = OFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GETFL).map_err(io::Error::from)?);
    match flags & OFlag::O_ACCMODE {
        OFlag::O_WRONLY => Err(DiskError::Access("reading")),
        OFlag::O_RDONLY if !read_only => Err(DiskError::Access("writing")),
        // pwritev(2) on such a file would append, wherever the guest means to write.
        _ if flags.contains(OFlag::O_APPEND) && !read_only => Err(DiskError::Access("writing in place")),
        _ => Ok(kind),
    }
}
