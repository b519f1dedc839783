//! The guest's console without a device: the persistent RAM zones of Linux's ramoops
//! (Documentation/admin-guide/ramoops.rst) in memory that the guest leaves alone.
//!
//! The guest writes there what it likes: nothing read from it is trusted, only bounded.

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

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::memory::RING;

/// All zones together: dumps first, the console behind them (fs/pstore/ram.c, `ramoops_probe`).
pub const RING_BYTES: u64 = 128 << 10;
/// The console zone.
const CONSOLE_BYTES: u64 = 64 << 10;
/// One dump of the kernel log, made when the kernel panics or oopses.
const DUMP_BYTES: u64 = 16 << 10;
const DUMPS: u64 = 4;
/// How much of the console a panic event carries.
pub const TAIL_BYTES: usize = 16 << 10;

/// `struct persistent_ram_buffer` (fs/pstore/ram_core.c): signature, start, size, then data.
const SIGNATURE: u32 = 0x4347_4244;
const HEADER_BYTES: u64 = 12;
/// A dump begins with a line for its time, then one that says why it was made (fs/pstore/platform.c).
const PANIC: &[u8] = b"Panic#";
const DUMP_HEAD_BYTES: u64 = 128;

const _: () = assert!(CONSOLE_BYTES + DUMP_BYTES * DUMPS == RING_BYTES, "the zones fill the region");

/// The valid part of one zone.
struct Zone {
    data: u64,
    capacity: u64,
    /// Where the next byte goes.
    next: u64,
    size: u64,
}

/// What the kernel must be told; memory type 2 is ordinary cached memory.
pub fn parameters() -> String {
    format!(
        "ramoops.mem_address={RING:#x} ramoops.mem_size={RING_BYTES:#x} ramoops.mem_type=2 ramoops.record_size={DUMP_BYTES:#x} \
         ramoops.console_size={CONSOLE_BYTES:#x} ramoops.ftrace_size=0 ramoops.pmsg_size=0"
    )
}

/// The last `limit` bytes of the console.
pub fn tail(memory: &GuestMemoryMmap, limit: usize) -> Vec<u8> {
    let Ok(Some(zone)) = console(memory) else { return Vec::new() };
    let mut text = zone.read(memory).unwrap_or_default();
    text.split_off(text.len().saturating_sub(limit))
}

/// Whether the kernel left the dump of a panic, as opposed to that of an oops that it survived.
pub fn has_panic(memory: &GuestMemoryMmap) -> bool {
    (0..DUMPS).any(|index| {
        let Ok(Some(zone)) = Zone::open(memory, dump(index), DUMP_BYTES) else { return false };
        let head = zone.bytes(memory, 0, zone.size.min(DUMP_HEAD_BYTES)).unwrap_or_default();
        head.split(|byte| *byte == b'\n').nth(1).is_some_and(|line| line.starts_with(PANIC))
    })
}

fn dump(index: u64) -> u64 {
    RING.saturating_add(DUMP_BYTES.saturating_mul(index))
}

fn console(memory: &GuestMemoryMmap) -> Result<Option<Zone>, GuestMemoryError> {
    Zone::open(memory, dump(DUMPS), CONSOLE_BYTES)
}

impl Zone {
    /// `None` if the guest has not made the zone, or has made nonsense of it.
    fn open(memory: &GuestMemoryMmap, at: u64, bytes: u64) -> Result<Option<Self>, GuestMemoryError> {
        let field = |offset: u64| memory.read_obj::<u32>(GuestAddress(at.saturating_add(offset)));
        let (signature, next, size) = (field(0)?, u64::from(field(4)?), u64::from(field(8)?));
        let capacity = bytes.saturating_sub(HEADER_BYTES);
        let sane = signature == SIGNATURE && size <= capacity && next <= size;
        Ok(sane.then_some(Self { data: at.saturating_add(HEADER_BYTES), capacity, next, size }))
    }

    /// Everything in it, oldest byte first.
    fn read(&self, memory: &GuestMemoryMmap) -> Result<Vec<u8>, GuestMemoryError> {
        if self.size < self.capacity {
            return self.bytes(memory, 0, self.size);
        }
        let mut text = self.bytes(memory, self.next, self.capacity.saturating_sub(self.next))?;
        text.extend(self.bytes(memory, 0, self.next)?);
        Ok(text)
    }

    fn bytes(&self, memory: &GuestMemoryMmap, from: u64, length: u64) -> Result<Vec<u8>, GuestMemoryError> {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        memory.read_slice(&mut bytes, GuestAddress(self.data.saturating_add(from)))?;
        Ok(bytes)
    }
}

/// Follows the console zone, so that a reader can ask for what is new.
///
/// The zone keeps no count of all bytes ever written, so one is kept here: it is right as long as less than a whole
/// zone is written between two looks.
#[derive(Debug, Default)]
pub struct Follower {
    /// Bytes seen since the guest began.
    total: u64,
    /// Where the zone's next byte went at the last look.
    next: u64,
    full: bool,
}

impl Follower {
    /// What was printed from byte `from` on, and the position after it.
    pub fn read(&mut self, memory: &GuestMemoryMmap, from: u64) -> (u64, String) {
        let Ok(Some(zone)) = console(memory) else { return (self.total, String::new()) };
        let Ok(text) = zone.read(memory) else { return (self.total, String::new()) };
        let full = zone.size == zone.capacity;
        // The first time around, the zone becomes full; later ones show by its next byte falling back.
        let wrapped = full && (!self.full || zone.next < self.next);
        let lap = if wrapped { zone.capacity } else { 0 };
        let fresh = zone.next.saturating_add(lap).saturating_sub(self.next);
        self.total = self.total.saturating_add(fresh);
        self.next = zone.next;
        self.full = full;
        let held = u64::try_from(text.len()).unwrap_or(0);
        let wanted = usize::try_from(self.total.saturating_sub(from).min(held)).unwrap_or(0);
        let new = text.get(text.len().saturating_sub(wanted)..).unwrap_or_default();
        (self.total, String::from_utf8_lossy(new).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: u64 = RING + DUMPS * DUMP_BYTES;
    const CAPACITY: u64 = CONSOLE_BYTES - HEADER_BYTES;

    fn guest() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    fn header(memory: &GuestMemoryMmap, at: u64, start: u32, size: u32) {
        for (offset, value) in [(0, SIGNATURE), (4, start), (8, size)] {
            memory.write_obj(value, GuestAddress(at + offset)).unwrap();
        }
    }

    /// Writes as `persistent_ram_write` does.
    fn print(memory: &GuestMemoryMmap, text: &[u8]) {
        let mut start: u32 = memory.read_obj(GuestAddress(CONSOLE + 4)).unwrap();
        let mut size: u32 = memory.read_obj(GuestAddress(CONSOLE + 8)).unwrap();
        for byte in text {
            memory.write_obj(*byte, GuestAddress(CONSOLE + HEADER_BYTES + u64::from(start))).unwrap();
            start = (start + 1) % CAPACITY as u32;
            size = (size + 1).min(CAPACITY as u32);
        }
        header(memory, CONSOLE, start, size);
    }

    #[test]
    fn a_zone_never_made_or_full_of_nonsense_is_empty() {
        let memory = guest();
        assert!(tail(&memory, TAIL_BYTES).is_empty());
        for (start, size) in [(0, u32::MAX), (u32::MAX, 5), (9, 8), (u32::MAX, u32::MAX)] {
            header(&memory, CONSOLE, start, size);
            assert!(tail(&memory, TAIL_BYTES).is_empty());
            header(&memory, RING, start, size);
            assert!(!has_panic(&memory));
        }
    }

    #[test]
    fn the_tail_runs_over_the_end_of_the_zone() {
        let memory = guest();
        header(&memory, CONSOLE, 0, 0);
        print(&memory, &vec![b'x'; CAPACITY as usize - 3]);
        print(&memory, b"abcdef");
        assert_eq!(tail(&memory, 8), b"xxabcdef");
        assert_eq!(tail(&memory, usize::MAX).len(), CAPACITY as usize);
    }

    #[test]
    fn a_follower_sees_each_byte_once() {
        let memory = guest();
        header(&memory, CONSOLE, 0, 0);
        let (mut follower, mut seen, mut said) = (Follower::default(), 0, String::new());
        let mut all = String::new();
        for round in 0..40 {
            let text = format!("{round}{}", "y".repeat(3001));
            print(&memory, text.as_bytes());
            all.push_str(&text);
            let (next, text) = follower.read(&memory, seen);
            said.push_str(&text);
            seen = next;
        }
        assert_eq!(said, all);
        assert_eq!(follower.read(&memory, seen).1, "");
    }

    #[test]
    fn a_panic_is_told_from_an_oops_that_the_guest_survived() {
        let memory = guest();
        let write = |index: u64, text: &[u8]| {
            let at = dump(index);
            header(&memory, at, 0, text.len() as u32);
            memory.write_slice(text, GuestAddress(at + HEADER_BYTES)).unwrap();
        };
        write(0, b"====1700000000.000000-D\nOops#1 Part1\n<4>[ 1.0] Panic# is not here\n");
        assert!(!has_panic(&memory));
        write(1, b"====1700000000.000001-D\nPanic#2 Part1\n");
        assert!(has_panic(&memory));
    }
}
