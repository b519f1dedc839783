//! Guest memory: where everything lies in the guest's physical address space, and the host memory behind it.
//!
//! It owns the mappings for the life of the process. It never looks at what the guest keeps in them.
#![expect(unsafe_code, reason = "guest memory is a mapping that Rust did not make")]

use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion, VolatileSlice};

/// A MiB in bytes.
pub const MIB: u64 = 1 << 20;

/// The smallest page, in bytes.
pub const PAGE: u64 = 4096;

/// Smallest page that maps a huge page of the host to one of the guest.
pub const HUGE_PAGE: u64 = 2 * MIB;

/// Global descriptor table that the guest starts with.
pub const GDT: u64 = 0x500;

/// `struct boot_params` (Documentation/arch/x86/zero-page.rst).
pub const ZERO_PAGE: u64 = 0x7000;

/// The seed for the guest's random number generator, wiped by the guest.
pub const RNG_SEED: u64 = 0x8000;

/// What the first CPU answers to CPUID, for a kernel that would rather read than exit.
pub const CPUID_TABLE: u64 = 0x8100;

/// Three pages of page tables that map the first GiB to itself.
pub const PAGE_TABLES: u64 = 0x9000;

/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;

/// Longest kernel command line, its NUL included (`COMMAND_LINE_SIZE`).
pub const COMMAND_LINE_BYTES: usize = 2048;

/// Where the guest's console is kept ([`crate::console`]): below 1 MiB, where memory is mapped in small pages anyway, so
/// that all memory above it can be mapped in large ones.
pub const RING: u64 = 0x6_0000;

/// End of what a PC's firmware leaves to the system below 1 MiB.
pub const LOW_END: u64 = 0x9_fc00;

/// ACPI tables, where firmware keeps them.
pub const ACPI_TABLES: u64 = 0xe_0000;

/// The MultiProcessor Specification's table, where firmware keeps it.
pub const MP_TABLE: u64 = 0xf_0000;

/// Memory from here on is the kernel's.
pub const HIGH_RAM: u64 = MIB;

/// Memory below 4 GiB ends here at the latest: above it lie the devices.
pub const HOLE: u64 = 0xc000_0000;

/// Configuration space of PCI bus 0 (PCI Express 5.0 §7.2.2).
pub const ECAM: u64 = 0xe000_0000;

/// 32 devices of 8 functions of 4 KiB.
pub const ECAM_BYTES: u64 = MIB;

/// The BARs that the guest mostly reads, one page per device. It follows the configuration space, so that one
/// read-only memory slot serves both.
pub const REGISTER_BARS: u64 = ECAM + ECAM_BYTES;

/// The BARs that the guest mostly writes, one page per device.
pub const DOORBELL_BARS: u64 = REGISTER_BARS + 32 * PAGE;

/// All that PCI devices may occupy.
pub const PCI_WINDOW: u64 = ECAM;

/// Length of [`PCI_WINDOW`], the configuration space included.
pub const PCI_WINDOW_BYTES: u64 = 16 * MIB;

/// Memory that does not fit below [`HOLE`] begins here.
pub const ABOVE_4G: u64 = 1 << 32;

/// What a guest plugs and unplugs at a time: a huge page, so that taking one away breaks up none.
pub const BLOCK: u64 = HUGE_PAGE;

/// What KVM maps at a time of the memory that is plugged while the guest runs: as much as Linux adds at a time
/// (its memory blocks on x86-64), so that in practice it maps what is plugged and nothing else.
pub const CHUNK: u64 = 128 * MIB;

/// The room for memory that is plugged begins at a multiple of this.
const ROOM_ALIGN: u64 = 1 << 30;

/// A page that no guest uses, where KVM keeps a task state segment on older Intel CPUs.
pub const TSS: u64 = 0xfffb_d000;

const SLOT_LOW: u32 = 0;
const SLOT_HIGH: u32 = 1;
const SLOT_READ_ONLY: u32 = 2;
/// The first slot of the room for memory that is plugged; each chunk has one.
pub const SLOT_ROOM: u32 = 3;

/// Why there is no guest memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The host refuses the mapping.
    #[error("cannot map {mib} MiB of memory for the guest; lower memory_mib or raise the memory limit")]
    Map {
        /// Size asked for.
        mib: u64,
        /// Why.
        source: io::Error,
    },
    /// KVM refuses it.
    #[error("KVM refuses the guest's memory")]
    Slot(#[source] kvm_ioctls::Error),
    /// The pieces do not fit together.
    #[error("guest memory does not fit together")]
    Shape(#[from] vm_memory::mmap::FromRangesError),
    /// The crate refuses the mapping.
    #[error("guest memory is refused")]
    Region(#[from] vm_memory::mmap::MmapRegionError),
    /// The pieces overlap.
    #[error("guest memory overlaps itself")]
    Collection(#[from] vm_memory::GuestRegionCollectionError),
}

/// The guest's RAM: `[0, low_end)` and, if it is larger than the hole allows, `[4 GiB, high_end)`; and room above that
/// for RAM that is plugged while the guest runs.
#[derive(Clone, Debug)]
pub struct GuestRam {
    /// Every byte of it, the room included.
    pub memory: Arc<GuestMemoryMmap>,
    /// First address after RAM below 4 GiB.
    pub low_end: u64,
    /// First address after RAM above 4 GiB; 4 GiB if there is none.
    pub high_end: u64,
    /// Where the room begins, and its length; without one it is empty.
    pub room: (u64, u64),
}

impl GuestRam {
    /// Maps and registers RAM: anonymous, because a memfd has no huge pages by default. The room is mapped, which
    /// reserves addresses and nothing else, so that devices find in one place all memory that there will ever be; KVM
    /// hears of its chunks as they are plugged.
    pub fn new(vm: &VmFd, mib: u32, room_mib: u32) -> Result<Self, MemoryError> {
        let bytes = u64::from(mib) * MIB;
        let low_end = bytes.min(HOLE);
        let high_end = ABOVE_4G + (bytes - low_end);
        let room = (high_end.next_multiple_of(ROOM_ALIGN), u64::from(room_mib) * MIB);
        let mut regions = Vec::with_capacity(3);
        let all =
            [(Some(SLOT_LOW), 0, low_end), (Some(SLOT_HIGH), ABOVE_4G, high_end), (None, room.0, room.0 + room.1)];
        for (slot, start, end) in all {
            if start == end {
                continue;
            }
            let mapping = map(end - start, libc::MADV_HUGEPAGE)?;
            if let Some(slot) = slot {
                register(vm, slot, start, &mapping, 0)?;
            }
            regions.push(
                GuestRegionMmap::new(mapping, GuestAddress(start))
                    .ok_or(vm_memory::mmap::FromRangesError::InvalidGuestRegion)?,
            );
        }
        Ok(Self { memory: Arc::new(GuestMemoryMmap::from_regions(regions)?), low_end, high_end, room })
    }

    /// Backs a range with memory now, in huge pages as far as the host has them; false if the host does not know
    /// how (Linux before 5.14) or cannot.
    pub fn populate(&self, range: Range<u64>) -> bool {
        self.advise(range, libc::MADV_POPULATE_WRITE)
    }

    /// Has the host back a range in small pages.
    pub fn in_small_pages(&self, range: Range<u64>) {
        // Advice that the host does not know is no loss.
        let _ = self.advise(range, libc::MADV_NOHUGEPAGE);
    }

    fn advise(&self, range: Range<u64>, advice: libc::c_int) -> bool {
        let Ok(slice) = self.memory.get_slice(GuestAddress(range.start), (range.end - range.start) as usize) else {
            return false;
        };
        // SAFETY: the range is mapped for the life of the process, and its contents stay.
        unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), advice) == 0 }
    }
}

/// Gives the whole pages in guest memory back to the host; they read as zeros from then on. Returns how many bytes.
pub fn discard(slice: &VolatileSlice<'_>) -> io::Result<usize> {
    let guard = slice.ptr_guard_mut();
    let before = guard.as_ptr().align_offset(PAGE as usize);
    let whole = slice.len().saturating_sub(before) / PAGE as usize * PAGE as usize;
    let start = guard.as_ptr().wrapping_add(before);
    // SAFETY: the range lies within the slice, whose bytes may change at any time; to whoever looks at them they change
    // to zeros, since guest memory is private and anonymous.
    match unsafe { libc::madvise(start.cast(), whole, libc::MADV_DONTNEED) } {
        0 => Ok(whole),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What a guest looks at first besides its kernel: the page tables it starts on, and the beginning of every slot's
/// configuration space, which it reads to learn what is there.
pub fn first_pages() -> impl Iterator<Item = Range<u64>> {
    let slots = (ECAM..ECAM + ECAM_BYTES).step_by((8 * PAGE) as usize);
    std::iter::once(PAGE).chain(slots).map(|page| page..page + PAGE)
}

/// Memory that the guest reads without an exit and writes with one: the PCI configuration space and the BARs that
/// follow it.
pub fn read_only_window(vm: &VmFd) -> Result<MmapRegion, MemoryError> {
    let mapping = map(DOORBELL_BARS - ECAM, libc::MADV_NOHUGEPAGE)?;
    register(vm, SLOT_READ_ONLY, ECAM, &mapping, KVM_MEM_READONLY)?;
    Ok(mapping)
}

fn register(vm: &VmFd, slot: u32, start: u64, mapping: &MmapRegion, flags: u32) -> Result<(), MemoryError> {
    let region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: start,
        memory_size: mapping.size() as u64,
        userspace_addr: mapping.as_ptr() as u64,
    };
    // SAFETY: the mapping is never unmapped, so KVM may use it as long as this process lives; the guest can reach
    // nothing beyond its length.
    unsafe { vm.set_user_memory_region(region) }.map_err(MemoryError::Slot)
}

/// Private zeroed memory, aligned so that a huge page of the host backs one of the guest; left out of core dumps.
fn map(bytes: u64, advice: libc::c_int) -> Result<MmapRegion, MemoryError> {
    let failed = || MemoryError::Map { mib: bytes / MIB, source: io::Error::last_os_error() };
    let (length, slack) = (bytes as usize, HUGE_PAGE as usize);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice overlaps nothing.
    let start =
        unsafe { libc::mmap(ptr::null_mut(), length + slack, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(failed());
    }
    let address = start.cast::<u8>().wrapping_add(start.align_offset(slack));
    for advice in [advice, libc::MADV_DONTDUMP] {
        // SAFETY: the range lies within the mapping just made. Advice that the host does not know is no loss.
        let _ = unsafe { libc::madvise(address.cast(), length, advice) };
    }
    // SAFETY: address..address + length is mapped readable and writable, and is never unmapped.
    Ok(unsafe { MmapRegion::build_raw(address, length, libc::PROT_READ | libc::PROT_WRITE, flags) }?)
}
