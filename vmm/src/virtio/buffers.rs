//! The guest memory that descriptor chains name, and moving bytes between it and files, sockets and taps.
//!
//! This is the one place where devices touch guest memory: data goes straight from there to the kernel and back,
//! with no copy in between. It never keeps a reference to those bytes, since the guest may change them at any time.

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
#![expect(unsafe_code, reason = "vectored system calls and volatile copies take raw pointers into guest memory")]

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use libc::{c_int, c_void, iovec, off_t};
use virtio_queue::DescriptorChain;
use vm_memory::guest_memory::Permissions;
use vm_memory::{ByteValued, GuestAddress, GuestMemory, GuestMemoryMmap, VolatileSlice};

use super::device::DeviceError;
use crate::memory;

/// Most pieces of guest memory in one operation: what readv(2) takes (`UIO_MAXIOV`).
const PARTS: usize = 1024;

/// The position of what has none, and of a file the current one: preadv2(2) then is readv(2), which the filter need not allow.
const NO_POSITION: off_t = -1;

/// Bytes of zeros written at a time.
const ZEROS: [u8; 4096] = [0; 4096];

/// An ordered run of bytes in guest memory, in pieces. Made once per device run and filled anew for each chain.
#[derive(Debug)]
pub struct Buffers<'m> {
    memory: &'m GuestMemoryMmap,
    /// Non-empty pieces; each lies inside one region of `memory`.
    parts: Vec<iovec>,
    /// Sum of the lengths of `parts`.
    len: usize,
    /// The part of `parts` that a system call is about to be given.
    window: Vec<iovec>,
}

impl<'m> Buffers<'m> {
    /// No bytes yet, and memory set aside for any chain.
    pub fn new(memory: &'m GuestMemoryMmap) -> Self {
        Self { memory, parts: Vec::with_capacity(PARTS), len: 0, window: Vec::with_capacity(PARTS) }
    }

    /// No bytes yet; for what is mostly empty or seldom used.
    pub fn empty(memory: &'m GuestMemoryMmap) -> Self {
        Self { memory, parts: Vec::new(), len: 0, window: Vec::new() }
    }

    /// Forgets every piece.
    pub fn clear(&mut self) {
        self.parts.clear();
        self.len = 0;
    }

    /// Forgets the first pieces, which together have `bytes` bytes.
    pub fn discard_front(&mut self, bytes: usize) {
        let mut rest = bytes;
        let whole = self.parts.iter().take_while(|part| match rest.checked_sub(part.iov_len) {
            Some(left) => {
                rest = left;
                true
            }
            None => false,
        });
        // Never more than there are, of which this tells the compiler: it leaves the panic out.
        let count = whole.count().min(self.parts.len());
        self.parts.drain(..count);
        self.len = self.len.saturating_sub(bytes.saturating_sub(rest));
    }

    /// Count of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn push(&mut self, address: GuestAddress, len: u32) -> Result<(), DeviceError> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        for slice in self.memory.get_slices(address, len, Permissions::ReadWrite)? {
            let slice = slice?;
            if self.parts.len() >= PARTS {
                return Err(DeviceError::Driver("a descriptor chain has too many buffers"));
            }
            let base = slice.ptr_guard_mut().as_ptr();
            self.add(base.cast(), slice.len());
        }
        Ok(())
    }

    /// Adds the first `at` bytes to `front` and the rest to `back`; `false`, and nothing is added, if `back` would have too many
    /// pieces for one system call.
    pub fn split(&self, at: usize, front: &mut Self, back: &mut Self) -> bool {
        if back.parts.len().saturating_add(self.parts.len()) > PARTS {
            return false;
        }
        let mut rest = at;
        for part in &self.parts {
            let len = part.iov_len.min(rest);
            rest = rest.saturating_sub(len);
            front.add(part.iov_base, len);
            back.add(part.iov_base.wrapping_byte_add(len), part.iov_len.saturating_sub(len));
        }
        true
    }

    fn add(&mut self, base: *mut c_void, len: usize) {
        if len > 0 {
            self.parts.push(iovec { iov_base: base, iov_len: len });
            self.len = self.len.saturating_add(len);
        }
    }

    /// The pieces that make up `range`, cut to it; what lies past the end is left out.
    fn pieces(&self, range: Range<usize>) -> impl Iterator<Item = iovec> {
        let mut start = 0_usize;
        let mut parts = self.parts.iter();
        // Pieces behind the range are not even looked at: there may be many, and packets are small.
        let up_to_end = std::iter::from_fn(move || {
            if start >= range.end {
                return None;
            }
            let part = parts.next()?;
            let (first, end) = (start, start.saturating_add(part.iov_len));
            start = end;
            let skip = range.start.saturating_sub(first).min(part.iov_len);
            let len = range.end.min(end).saturating_sub(first.saturating_add(skip));
            let base = part.iov_base.wrapping_byte_add(skip);
            Some(iovec { iov_base: base, iov_len: len })
        });
        up_to_end.filter(|piece| piece.iov_len > 0)
    }

    fn slices(&self, range: Range<usize>) -> impl Iterator<Item = VolatileSlice<'m>> {
        // SAFETY: `push` took each piece from a region of `memory`, which stays mapped for `'m`, and `pieces` only
        // makes them smaller.
        self.pieces(range).map(|part| unsafe { VolatileSlice::new(part.iov_base.cast(), part.iov_len) })
    }

    /// Copies bytes out from `offset` on; `false` if there are not as many.
    pub fn read_at(&self, offset: usize, out: &mut [u8]) -> bool {
        let mut rest = out;
        for slice in self.slices(offset..offset.saturating_add(rest.len())) {
            let copied = slice.copy_to(rest);
            rest = rest.get_mut(copied..).unwrap_or_default();
        }
        rest.is_empty()
    }

    /// Copies `bytes` in at `offset`; `false` if there is less room, and then as many as fit are written.
    pub fn write_at(&mut self, offset: usize, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        for slice in self.slices(offset..offset.saturating_add(rest.len())) {
            slice.copy_from(rest);
            rest = rest.get(slice.len()..).unwrap_or_default();
        }
        rest.is_empty()
    }

    /// Reads the object at `offset`, once; the caller checks the copy, which the guest cannot change.
    pub fn read_object<T: ByteValued + Default>(&self, offset: usize) -> Option<T> {
        let mut object = T::default();
        self.read_at(offset, object.as_mut_slice()).then_some(object)
    }

    /// Fills `range` with zeros.
    pub fn zero(&mut self, range: Range<usize>) {
        let mut offset = range.start;
        while offset < range.end.min(self.len) {
            let chunk = ZEROS.len().min(range.end.saturating_sub(offset));
            self.write_at(offset, ZEROS.get(..chunk).unwrap_or(&ZEROS));
            offset = offset.saturating_add(chunk);
        }
    }

    /// Gives the whole pages of every piece back to the host; they read as zeros from then on. Returns how many bytes.
    pub fn discard(&mut self) -> io::Result<usize> {
        let mut sum = 0_usize;
        for slice in self.slices(0..self.len) {
            sum = sum.saturating_add(memory::discard(&slice)?);
        }
        Ok(sum)
    }

    /// Reads from a file at `position` into `range`: preadv2(2) with `flags`. 0 means end of file.
    pub fn pread(
        &mut self,
        range: Range<usize>,
        file: &impl AsRawFd,
        position: u64,
        flags: c_int,
    ) -> io::Result<usize> {
        let (fd, position) = (file.as_raw_fd(), file_position(position)?);
        self.vectored(range, |parts, count| {
            // SAFETY: `vectored` gives pieces of mapped guest memory and their number. That the guest may see or
            // change those bytes meanwhile is no matter: only the kernel touches them.
            unsafe { libc::preadv2(fd, parts, count, position, flags) }
        })
    }

    /// The pieces that make up `range`, for the kernel to fill; valid until the next call.
    pub fn window(&mut self, range: Range<usize>) -> &[iovec] {
        let mut window = std::mem::take(&mut self.window);
        window.clear();
        window.extend(self.pieces(range));
        self.window = window;
        &self.window
    }

    /// Writes `range` to a file at `position`: pwritev2(2).
    pub fn pwrite(&mut self, range: Range<usize>, file: &impl AsRawFd, position: u64) -> io::Result<usize> {
        let (fd, position) = (file.as_raw_fd(), file_position(position)?);
        self.vectored(range, |parts, count| {
            // SAFETY: as in `pread`.
            unsafe { libc::pwritev2(fd, parts, count, position, 0) }
        })
    }

    /// Reads from a stream or a packet from a tap into `range`.
    pub fn receive(&mut self, range: Range<usize>, source: &impl AsRawFd) -> io::Result<usize> {
        let fd = source.as_raw_fd();
        self.vectored(range, |parts, count| {
            // SAFETY: as in `pread`.
            unsafe { libc::preadv2(fd, parts, count, NO_POSITION, 0) }
        })
    }

    /// Writes `range` to a stream, or as one packet to a tap.
    pub fn send(&mut self, range: Range<usize>, sink: &impl AsRawFd) -> io::Result<usize> {
        let fd = sink.as_raw_fd();
        self.vectored(range, |parts, count| {
            // SAFETY: as in `pread`.
            unsafe { libc::pwritev2(fd, parts, count, NO_POSITION, 0) }
        })
    }

    /// Makes a system call over `range`, again after a signal.
    fn vectored(&mut self, range: Range<usize>, call: impl Fn(*const iovec, c_int) -> isize) -> io::Result<usize> {
        let mut window = std::mem::take(&mut self.window);
        window.clear();
        window.extend(self.pieces(range));
        let result = match c_int::try_from(window.len()) {
            Ok(count) => repeat_interrupted(|| call(window.as_ptr(), count)),
            Err(_) => Err(io::ErrorKind::InvalidInput.into()),
        };
        self.window = window;
        result
    }
}

fn repeat_interrupted(call: impl Fn() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

fn file_position(position: u64) -> io::Result<off_t> {
    off_t::try_from(position).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Adds the memory of one descriptor chain: what the device reads to `readable`, what it writes to `writable`.
pub fn gather<'m>(
    chain: DescriptorChain<&'m GuestMemoryMmap>,
    readable: &mut Buffers<'m>,
    writable: &mut Buffers<'m>,
) -> Result<(), DeviceError> {
    let (mut complete, mut writing) = (false, false);
    for descriptor in chain {
        // The iterator ends early at an index outside the table, a loop or a bad indirect table: then the last
        // descriptor it gave still has a next one.
        complete = !descriptor.has_next();
        if descriptor.is_write_only() {
            writing = true;
            writable.push(descriptor.addr(), descriptor.len())?;
        } else if writing {
            // virtio 1.2 §2.7.4.2: device-writable elements come after all device-readable ones.
            return Err(DeviceError::Driver("a device-readable buffer follows a device-writable one"));
        } else {
            readable.push(descriptor.addr(), descriptor.len())?;
        }
    }
    if complete { Ok(()) } else { Err(DeviceError::Driver("a descriptor chain is broken")) }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::*;
    use crate::virtio::testing::{Guest, Part, SEAM};

    /// The chain of `parts` as the device sees it: (readable, writable).
    fn load<'m>(guest: &'m Guest, parts: &[Part]) -> Result<(Buffers<'m>, Buffers<'m>), DeviceError> {
        let (mut driver, mut active) = guest.queue(64);
        driver.post(parts);
        let (mut readable, mut writable) = (Buffers::new(&guest.memory), Buffers::new(&guest.memory));
        let chain = active.pop(&guest.memory)?.expect("a chain was posted");
        gather(chain, &mut readable, &mut writable)?;
        Ok((readable, writable))
    }

    #[test]
    fn a_run_is_split_anywhere() {
        let guest = Guest::new();
        guest.write(0x10_0000, b"abc");
        guest.write(0x20_0000, b"def");
        let (whole, _) = load(&guest, &[Part::readable(0x10_0000, 3), Part::readable(0x20_0000, 3)]).unwrap();
        for at in 0..=7 {
            let (mut front, mut back) = (Buffers::empty(&guest.memory), Buffers::empty(&guest.memory));
            assert!(whole.split(at, &mut front, &mut back));
            let (mut first, mut rest) = (vec![0; at.min(6)], vec![0; 6_usize.saturating_sub(at)]);
            assert!(front.read_at(0, &mut first) && back.read_at(0, &mut rest));
            assert_eq!((front.len(), back.len()), (first.len(), rest.len()));
            assert_eq!([first, rest].concat(), b"abcdef");
        }
        let (many, _) = load(&guest, &[Part::readable(0x10_0000, 1); 60]).unwrap();
        let (mut front, mut back) = (Buffers::empty(&guest.memory), Buffers::empty(&guest.memory));
        for _ in 0..PARTS / 60 {
            assert!(many.split(0, &mut front, &mut back));
        }
        assert!(!many.split(0, &mut front, &mut back), "one system call takes no more");
        assert_eq!(back.len(), PARTS / 60 * 60);
    }

    #[test]
    fn offsets_run_across_descriptors_and_memory_regions() {
        let guest = Guest::new();
        guest.write(SEAM - 3, b"abcdef");
        guest.write(0x10_0000, b"ghi");
        let (buffers, _) = load(&guest, &[Part::readable(SEAM - 3, 6), Part::readable(0x10_0000, 3)]).unwrap();
        assert_eq!(buffers.len(), 9);
        let mut out = [0; 5];
        assert!(buffers.read_at(2, &mut out));
        assert_eq!(&out, b"cdefg");
        assert!(!buffers.read_at(5, &mut out), "one byte short");
        assert_eq!(buffers.read_object::<u16>(7).unwrap(), u16::from_le_bytes(*b"hi"));
        assert!(buffers.read_object::<u16>(8).is_none());
        assert!(buffers.read_object::<u16>(usize::MAX).is_none());
    }

    #[test]
    fn a_write_past_the_end_stops_there() {
        let guest = Guest::new();
        let (_, mut buffers) = load(&guest, &[Part::writable(0x10_0000, 4)]).unwrap();
        assert!(buffers.write_at(0, b"wxyz"));
        assert!(!buffers.write_at(2, b"123"));
        assert_eq!(guest.read(0x10_0000, 6), b"wx12\0\0");
        buffers.zero(1..100);
        assert_eq!(guest.read(0x10_0000, 4), b"w\0\0\0");
    }

    #[test]
    fn files_are_read_and_written_in_place() {
        let guest = Guest::new();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let (_, mut buffers) = load(&guest, &[Part::writable(0x10_0000, 3), Part::writable(0x20_0000, 20)]).unwrap();
        assert_eq!(buffers.pread(1..9, &file, 2, 0).unwrap(), 8);
        assert_eq!(guest.read(0x10_0000, 3), b"\x0023");
        assert_eq!(guest.read(0x20_0000, 7), b"456789\0");
        assert_eq!(buffers.pread(0..23, &file, 8, 0).unwrap(), 2, "short at the end of the file");
        assert_eq!(buffers.pwrite(0..3, &file, 100).unwrap(), 3);
        assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), 103);
        assert_eq!(buffers.pread(0..1, &file, u64::MAX, 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn streams_are_read_and_written_in_place() {
        let guest = Guest::new();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"hello").unwrap();
        let (_, mut buffers) = load(&guest, &[Part::writable(0x10_0000, 2), Part::writable(0x20_0000, 8)]).unwrap();
        assert_eq!(buffers.receive(0..10, &ours).unwrap(), 5);
        assert_eq!(guest.read(0x20_0000, 3), b"llo");
        assert_eq!(buffers.send(1..4, &ours).unwrap(), 3);
        drop(ours);
        assert_eq!(io::read_to_string(theirs).unwrap(), "ell");
    }

    #[test]
    fn pieces_that_are_done_with_are_forgotten() {
        let guest = Guest::new();
        guest.write(0x10_0000, b"abcdef");
        let parts = [Part::readable(0x10_0000, 1), Part::readable(0x10_0001, 2), Part::readable(0x10_0003, 3)];
        let (mut buffers, _) = load(&guest, &parts).unwrap();
        buffers.discard_front(3);
        assert_eq!((buffers.len(), buffers.read_object::<u8>(0)), (3, Some(b'd')));
        buffers.discard_front(0);
        buffers.discard_front(3);
        assert!(buffers.is_empty());
    }

    #[test]
    fn broken_chains_are_refused() {
        let guest = Guest::new();
        let outside = load(&guest, &[Part::readable(guest.end(), 1)]);
        assert!(matches!(outside, Err(DeviceError::Memory(_))));
        let straddling = load(&guest, &[Part::writable(guest.end() - 1, 2)]);
        assert!(matches!(straddling, Err(DeviceError::Memory(_))));
        let wrapping = load(&guest, &[Part::readable(u64::MAX, u32::MAX)]);
        assert!(matches!(wrapping, Err(DeviceError::Memory(_))));
        let disordered = load(&guest, &[Part::writable(0, 1), Part::readable(0, 1)]);
        assert!(matches!(disordered, Err(DeviceError::Driver(_))));
    }

    #[test]
    fn a_chain_in_a_circle_is_refused() {
        let guest = Guest::new();
        let (mut driver, mut active) = guest.queue(4);
        driver.post_circle();
        let chain = active.pop(&guest.memory).unwrap().unwrap();
        let (mut readable, mut writable) = (Buffers::new(&guest.memory), Buffers::new(&guest.memory));
        assert!(matches!(gather(chain, &mut readable, &mut writable), Err(DeviceError::Driver(_))));
    }

    #[test]
    fn more_pieces_than_a_system_call_takes_are_refused() {
        let guest = Guest::new();
        let parts = vec![Part::readable(0x10_0000, 1); PARTS];
        assert_eq!(load_indirect(&guest, &parts).unwrap(), PARTS);
        let parts = vec![Part::readable(0x10_0000, 1); PARTS + 1];
        assert!(matches!(load_indirect(&guest, &parts), Err(DeviceError::Driver(_))));
    }

    fn load_indirect(guest: &Guest, parts: &[Part]) -> Result<usize, DeviceError> {
        let (mut driver, mut active) = guest.queue(64);
        driver.post_indirect(parts);
        let chain = active.pop(&guest.memory)?.expect("a chain was posted");
        let (mut readable, mut writable) = (Buffers::new(&guest.memory), Buffers::new(&guest.memory));
        gather(chain, &mut readable, &mut writable)?;
        Ok(readable.len())
    }

    proptest! {
        /// Whatever the pieces and the range, bytes come out as from one flat array.
        #[test]
        fn pieces_are_one_array(parts in prop::collection::vec((SEAM - 64..SEAM + 64, 0_u32..40), 1..12),
                                range in (0_usize..300, 0_usize..300)) {
            let guest = Guest::new();
            let pattern: Vec<u8> = (0..=255).collect();
            guest.write(SEAM - 64, &pattern);
            let posted: Vec<_> = parts.iter().map(|(address, len)| Part::readable(*address, *len)).collect();
            let (buffers, _) = load(&guest, &posted).unwrap();
            let flat: Vec<u8> =
                parts.iter().flat_map(|(address, len)| guest.read(*address, *len as usize)).collect();
            prop_assert_eq!(buffers.len(), flat.len());
            let (offset, len) = range;
            let mut out = vec![0; len];
            let fits = buffers.read_at(offset, &mut out);
            prop_assert_eq!(fits, offset + len <= flat.len() || len == 0);
            if fits && len > 0 {
                prop_assert_eq!(&out, &flat[offset..offset + len]);
            }
        }

        /// Any descriptor table at all ends in a chain or an error, never in a panic or a long loop.
        #[test]
        fn any_descriptor_table_is_survived(table in prop::collection::vec(any::<u8>(), 16 * 16), head: u16) {
            let guest = Guest::new();
            let (mut driver, mut active) = guest.queue(16);
            driver.post_raw(&table, head);
            let (mut readable, mut writable) = (Buffers::new(&guest.memory), Buffers::new(&guest.memory));
            if let Some(chain) = active.pop(&guest.memory).unwrap() {
                let _outcome = gather(chain, &mut readable, &mut writable);
            }
        }
    }
}
