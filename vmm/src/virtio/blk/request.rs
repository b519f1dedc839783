//! What the guest asks of a disk: one descriptor chain, read and checked (virtio 1.2 §5.2.6).
//!
//! Only translates. It never touches a file, and each guest field is read once.

use std::io;
use std::ops::Range;

use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Le32, Le64};
use vmm_control::SECTOR_BYTES;

use crate::virtio::buffers::Buffers;
use crate::virtio::device::DeviceError;

/// Bytes of `struct virtio_blk_req` before its data.
const HEADER_BYTES: usize = 16;

/// Bytes of `struct virtio_blk_discard_write_zeroes`.
const RANGE_BYTES: usize = 16;

/// Most ranges in one DISCARD or WRITE_ZEROES, as the configuration announces.
pub(super) const RANGES: usize = 16;

/// Bytes of the answer to GET_ID.
pub(super) const ID_BYTES: usize = 20;

/// `unmap`, the only flag of a range that is defined.
const FLAG_UNMAP: u32 = 1;

/// A checked request; every range lies on the disk.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Fills the chain's writable bytes, save the status, from the disk.
    Read(Span),
    /// Writes the chain's readable bytes, save the header, to the disk.
    Write(Span),
    /// Makes every write that was answered before durable.
    Flush,
    /// Forgets the content of ranges.
    Discard(Ranges),
    /// Fills ranges with zeros.
    WriteZeroes(Ranges),
    /// Answers the disk's name.
    GetId,
}

/// A run of bytes on the disk and where in the chain its data is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// First byte on the disk.
    pub(super) start: u64,
    /// Which bytes of the chain's readable or writable part.
    pub(super) data: Range<usize>,
}

/// Up to [`RANGES`] runs of bytes on the disk.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Ranges {
    ranges: [Range<u64>; RANGES],
    count: usize,
}

impl Ranges {
    fn push(&mut self, range: Range<u64>) {
        if let Some(slot) = self.ranges.get_mut(self.count) {
            *slot = range;
            self.count = self.count.saturating_add(1);
        }
    }

    /// The runs, in the order asked for.
    pub(super) fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        self.ranges.iter().take(self.count).cloned()
    }
}

/// Why a request failed; it owns the status that the guest reads.
#[derive(Debug, Error)]
pub(super) enum RequestError {
    /// A kind of request, or a flag, that was not offered.
    #[error("request type or flag {0} is not supported")]
    Unsupported(u32),
    /// The data is not whole sectors, or too short.
    #[error("the data has a bad length")]
    BadLength,
    /// Some byte lies outside the disk or where no file is mapped.
    #[error("no file is mapped there")]
    Unmapped,
    /// A write to an extent that is read-only.
    #[error("the extent is read-only")]
    ReadOnly,
    /// The host's file failed.
    #[error("the host's file failed")]
    Host(#[from] io::Error),
}

impl RequestError {
    /// The status byte (virtio 1.2 §5.2.6).
    pub(super) fn status(&self) -> u8 {
        let unsupported = match self {
            Self::Unsupported(_) => true,
            // A file system that cannot punch holes: the guest then writes zeros itself.
            Self::Host(error) => error.raw_os_error() == Some(libc::EOPNOTSUPP),
            Self::BadLength | Self::Unmapped | Self::ReadOnly => false,
        };
        status_byte(if unsupported { VIRTIO_BLK_S_UNSUPP } else { VIRTIO_BLK_S_IOERR })
    }
}

/// The status byte of a request that was carried out.
pub(super) fn status_ok() -> u8 {
    status_byte(VIRTIO_BLK_S_OK)
}

fn status_byte(status: u32) -> u8 {
    u8::try_from(status).unwrap_or(u8::MAX)
}

/// Where the status goes: the last writable byte, whatever the framing (virtio 1.2 §2.7.4).
pub(super) fn status_offset(writable: &Buffers<'_>) -> Result<usize, DeviceError> {
    writable.len().checked_sub(1).ok_or(DeviceError::Driver("a disk request has no room for its status"))
}

impl Request {
    /// Reads and checks the request in a chain.
    pub(super) fn parse(readable: &Buffers<'_>, writable: &Buffers<'_>, capacity: u64) -> Result<Self, RequestError> {
        let kind = u32::from(readable.read_object::<Le32>(0).ok_or(RequestError::BadLength)?);
        let sector = u64::from(readable.read_object::<Le64>(8).ok_or(RequestError::BadLength)?);
        let room = 0..writable.len().saturating_sub(1);
        match kind {
            VIRTIO_BLK_T_IN => Ok(Self::Read(Span::new(sector, room, capacity)?)),
            VIRTIO_BLK_T_OUT => Ok(Self::Write(Span::new(sector, HEADER_BYTES..readable.len(), capacity)?)),
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            // Discarding may not be asked to unmap: that is what it is (virtio 1.2 §5.2.6.2).
            VIRTIO_BLK_T_DISCARD => Ok(Self::Discard(parse_ranges(readable, 0, capacity)?)),
            VIRTIO_BLK_T_WRITE_ZEROES => Ok(Self::WriteZeroes(parse_ranges(readable, FLAG_UNMAP, capacity)?)),
            VIRTIO_BLK_T_GET_ID if room.len() < ID_BYTES => Err(RequestError::BadLength),
            VIRTIO_BLK_T_GET_ID => Ok(Self::GetId),
            other => Err(RequestError::Unsupported(other)),
        }
    }

    /// How many bytes of the chain it fills, the status not counted, and how many of it go to the disk.
    pub(super) fn moves(&self) -> (usize, usize) {
        match self {
            Self::Read(span) => (span.data.len(), 0),
            Self::Write(span) => (0, span.data.len()),
            Self::GetId => (ID_BYTES, 0),
            Self::Flush | Self::Discard(_) | Self::WriteZeroes(_) => (0, 0),
        }
    }
}

impl Span {
    fn new(sector: u64, data: Range<usize>, capacity: u64) -> Result<Self, RequestError> {
        let len = u64::try_from(data.len()).map_err(|_| RequestError::BadLength)?;
        if len == 0 || !len.is_multiple_of(SECTOR_BYTES) {
            return Err(RequestError::BadLength);
        }
        Ok(Self { start: disk_range(sector, len, capacity)?.start, data })
    }
}

fn parse_ranges(readable: &Buffers<'_>, allowed: u32, capacity: u64) -> Result<Ranges, RequestError> {
    let mut offset = HEADER_BYTES;
    let mut ranges = Ranges::default();
    while offset < readable.len() {
        if ranges.count == RANGES {
            return Err(RequestError::BadLength);
        }
        let raw: [u8; RANGE_BYTES] = readable.read_object(offset).ok_or(RequestError::BadLength)?;
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = raw;
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & !allowed != 0 {
            return Err(RequestError::Unsupported(flags));
        }
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u64::from(u32::from_le_bytes([n0, n1, n2, n3]));
        ranges.push(disk_range(sector, sectors.saturating_mul(SECTOR_BYTES), capacity)?);
        offset = offset.saturating_add(RANGE_BYTES);
    }
    if ranges.count == 0 { Err(RequestError::BadLength) } else { Ok(ranges) }
}

/// The bytes from `sector` on, if they lie on the disk.
fn disk_range(sector: u64, len: u64, capacity: u64) -> Result<Range<u64>, RequestError> {
    let start = sector.checked_mul(SECTOR_BYTES).ok_or(RequestError::Unmapped)?;
    let end = start.checked_add(len).ok_or(RequestError::Unmapped)?;
    if end > capacity { Err(RequestError::Unmapped) } else { Ok(start..end) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmm_control::POD_DISK_BYTES;

    use super::*;
    use crate::virtio::buffers::gather;
    use crate::virtio::testing::{Guest, Part};

    const HEADER: u64 = 0x10_0000;
    const DATA: u64 = 0x20_0000;
    const STATUS: u64 = 0x30_0000;

    fn parse(header: &[u8], data: &[u8], room: u32) -> Result<Request, RequestError> {
        let guest = Guest::new();
        guest.write(HEADER, header);
        guest.write(DATA, data);
        let (mut driver, mut active) = guest.queue(8);
        driver.post(&[
            Part::readable(HEADER, u32::try_from(header.len()).unwrap()),
            Part::readable(DATA, u32::try_from(data.len()).unwrap()),
            Part::writable(DATA, room),
            Part::writable(STATUS, 1),
        ]);
        let (mut readable, mut writable) = (Buffers::new(&guest.memory), Buffers::new(&guest.memory));
        gather(active.pop(&guest.memory).unwrap().unwrap(), &mut readable, &mut writable).unwrap();
        assert_eq!(status_offset(&writable).unwrap(), usize::try_from(room).unwrap());
        Request::parse(&readable, &writable, POD_DISK_BYTES)
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
    }

    fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    #[test]
    fn reads_and_writes_name_disk_bytes_and_data() {
        let read = parse(&header(VIRTIO_BLK_T_IN, 8), &[], 1024).unwrap();
        assert_eq!(read, Request::Read(Span { start: 4096, data: 0..1024 }));
        let write = parse(&header(VIRTIO_BLK_T_OUT, 9), &[0; 512], 0).unwrap();
        assert_eq!(write, Request::Write(Span { start: 4608, data: 16..528 }));
    }

    #[test]
    fn data_must_be_whole_sectors_on_the_disk() {
        for (sector, room) in [(0, 0), (0, 511), (0, 513)] {
            let result = parse(&header(VIRTIO_BLK_T_IN, sector), &[], room);
            assert!(matches!(result, Err(RequestError::BadLength)), "{result:?}");
        }
        let last = POD_DISK_BYTES / SECTOR_BYTES - 1;
        assert!(parse(&header(VIRTIO_BLK_T_IN, last), &[], 512).is_ok());
        for sector in [last, last + 1, u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1] {
            let result = parse(&header(VIRTIO_BLK_T_IN, sector), &[], 1024);
            assert!(matches!(result, Err(RequestError::Unmapped)), "{result:?}");
        }
    }

    #[test]
    fn a_short_header_is_refused() {
        assert!(matches!(parse(&header(0, 0)[..15], &[], 512), Err(RequestError::BadLength)));
        assert!(matches!(parse(&[], &[], 512), Err(RequestError::BadLength)));
    }

    #[test]
    fn unknown_requests_are_unsupported() {
        let error = parse(&header(99, 0), &[], 512).unwrap_err();
        assert_eq!(u32::from(error.status()), VIRTIO_BLK_S_UNSUPP);
    }

    #[test]
    fn the_name_needs_its_room() {
        assert_eq!(parse(&header(VIRTIO_BLK_T_GET_ID, 0), &[], 20).unwrap(), Request::GetId);
        assert!(matches!(parse(&header(VIRTIO_BLK_T_GET_ID, 0), &[], 19), Err(RequestError::BadLength)));
    }

    #[test]
    fn ranges_are_counted_and_flags_checked() {
        let two = [range(8, 8, 0), range(32, 1, 0)].concat();
        let Request::Discard(ranges) = parse(&header(VIRTIO_BLK_T_DISCARD, 0), &two, 0).unwrap() else {
            panic!("a discard")
        };
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [4096..8192, 16384..16896]);
        let unmap = range(0, 8, FLAG_UNMAP);
        assert!(parse(&header(VIRTIO_BLK_T_WRITE_ZEROES, 0), &unmap, 0).is_ok());
        let refused = parse(&header(VIRTIO_BLK_T_DISCARD, 0), &unmap, 0).unwrap_err();
        assert_eq!(u32::from(refused.status()), VIRTIO_BLK_S_UNSUPP);
        let unknown = parse(&header(VIRTIO_BLK_T_WRITE_ZEROES, 0), &range(0, 8, 2), 0).unwrap_err();
        assert_eq!(u32::from(unknown.status()), VIRTIO_BLK_S_UNSUPP);
        assert!(parse(&header(VIRTIO_BLK_T_DISCARD, 0), &range(0, 8, 0).repeat(RANGES), 0).is_ok());
        for bad in [vec![], range(0, 8, 0).repeat(RANGES + 1), vec![0; 17]] {
            let error = parse(&header(VIRTIO_BLK_T_DISCARD, 0), &bad, 0).unwrap_err();
            assert_eq!(u32::from(error.status()), VIRTIO_BLK_S_IOERR);
        }
    }

    proptest! {
        /// Any bytes parse to a request inside the disk or to an error.
        #[test]
        fn any_request_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..80), kind in 0_u32..16,
                                   sector: u64, room in 0_u32..2048, typed: bool) {
            let header = if typed { header(kind, sector) } else { vec![] };
            match parse(&header, &bytes, room) {
                Ok(Request::Read(span) | Request::Write(span)) => {
                    prop_assert!(span.start + u64::try_from(span.data.len()).unwrap() <= POD_DISK_BYTES);
                    prop_assert!(!span.data.is_empty());
                }
                Ok(Request::Discard(ranges) | Request::WriteZeroes(ranges)) => {
                    prop_assert!(ranges.iter().all(|range| range.end <= POD_DISK_BYTES));
                }
                Ok(Request::Flush | Request::GetId) => {}
                Err(error) => prop_assert_ne!(error.status(), status_ok()),
            }
        }
    }
}
