//! Puts kernel, initrd and boot parameters into guest memory, for the 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst).
//!
//! Files are read straight into guest memory. Nothing here starts anything.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use linux_loader::elf::{ELFMAG, Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use linux_loader::loader::bootparam::{
    CAN_USE_HEAP, LOADED_HIGH, XLF_KERNEL_64, boot_e820_entry, boot_params, setup_header,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult, elf};
use thiserror::Error;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use crate::console::RING_BYTES;
use crate::memory::{
    ABOVE_4G, COMMAND_LINE, COMMAND_LINE_BYTES, CPUID_TABLE, ECAM, ECAM_BYTES, GuestRam, HIGH_RAM, HUGE_PAGE, LOW_END,
    PAGE, RING, RNG_SEED, ZERO_PAGE,
};

/// Bytes of the seed for the guest's random number generator.
pub const SEED_BYTES: usize = 32;

/// `SETUP_RNG_SEED` (arch/x86/include/uapi/asm/setup_data.h).
const SETUP_RNG_SEED: u32 = 9;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// "Undefined" type of boot loader.
const LOADER_TYPE: u8 = 0xff;
/// Protocol 2.15, which an ELF kernel does not state itself.
const PROTOCOL: u16 = 0x020f;
/// A huge page of which less is loaded, in bytes, is not worth clearing.
const LEAST_OF_A_HUGE_PAGE: u64 = 128 << 10;
/// The 64-bit entry of a bzImage lies this far behind its load address (boot.rst, "64-bit Boot Protocol").
const ENTRY_64: u64 = 0x200;

/// Why the guest cannot be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// Neither format.
    #[error(
        "the kernel is neither an ELF vmlinux nor a 64-bit bzImage that fits below the memory's end: {elf}; {bzimage}"
    )]
    Kernel {
        /// What the ELF loader says.
        elf: linux_loader::loader::Error,
        /// What the bzImage loader says.
        bzimage: linux_loader::loader::Error,
    },
    /// A bzImage for 32 bits.
    #[error("the kernel has no 64-bit entry (XLF_KERNEL_64 in its header)")]
    Not64Bit,
    /// Too little memory.
    #[error("kernel and initrd take {needed} bytes but memory has room for {room}; raise memory_mib")]
    TooLarge {
        /// Bytes taken.
        needed: u64,
        /// Bytes there are.
        room: u64,
    },
    /// A file cannot be read.
    #[error("cannot read the initrd")]
    Initrd(#[source] io::Error),
    /// Too long a command line.
    #[error("the kernel command line has {0} bytes, and the kernel takes {limit}", limit = COMMAND_LINE_BYTES - 1)]
    CommandLine(usize),
    /// Guest memory refuses the write.
    #[error("cannot write the guest's memory")]
    Memory(#[from] GuestMemoryError),
    /// The host has no random numbers.
    #[error("the host gives no random numbers")]
    Random(#[source] io::Error),
}

/// What to load.
#[derive(Debug)]
pub struct Image<'a> {
    /// vmlinux or bzImage.
    pub kernel: File,
    /// Initial RAM disk.
    pub initrd: Option<File>,
    /// The whole kernel command line.
    pub command_line: &'a str,
    /// Seed of the guest's random number generator.
    pub seed: [u8; SEED_BYTES],
    /// Whether the kernel is one that looks for the table of CPUID that `cpu` writes.
    pub cpuid_table: bool,
    /// Address of the ACPI root pointer.
    pub acpi_root: u64,
}

/// A guest ready to run.
#[derive(Debug)]
pub struct Loaded {
    /// Address of the first instruction.
    pub entry: u64,
    /// The pages of kernel and initrd, for a kernel that says where its segments lie: whole huge pages where they pay.
    pub pages: Vec<Range<u64>>,
}

/// Loads all of it.
pub fn load(ram: &GuestRam, image: Image<'_>) -> Result<Loaded, LoadError> {
    let Image { mut kernel, initrd, command_line, seed, cpuid_table, acpi_root } = image;
    let length = initrd.as_ref().map_or(Ok(0), |file| file.metadata().map(|metadata| metadata.len()));
    let initrd_bytes = length.map_err(LoadError::Initrd)?;
    // The loader says of a file that is broken what is wrong with it.
    let mut taken = segments(&mut kernel).unwrap_or_default();
    if let Some(end) = taken.iter().map(|segment| segment.end).max() {
        taken.push(end..end.saturating_add(initrd_bytes));
    }
    let pages = lay_out(ram, &taken);
    let kernel = load_kernel(ram, &mut kernel)?;
    let mut params = boot_params { acpi_rsdp_addr: acpi_root, ..Default::default() };
    params.hdr = kernel.header;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_TYPE;
    if let Some(mut initrd) = initrd {
        params.hdr.ramdisk_image = load_initrd(ram, &mut initrd, initrd_bytes, &kernel)? as u32;
        params.hdr.ramdisk_size = initrd_bytes as u32;
    }
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.cmdline_size = write_command_line(ram, command_line)? as u32;
    params.hdr.setup_data = write_seed(ram, &seed, if cpuid_table { CPUID_TABLE } else { 0 })?;
    describe_memory(ram, &mut params);
    ram.memory.write_obj(params, GuestAddress(ZERO_PAGE))?;
    Ok(Loaded { entry: kernel.entry, pages })
}

/// Where the segments of an ELF kernel lie in the guest; none of another file.
fn segments(file: &mut File) -> io::Result<Vec<Range<u64>>> {
    let mut header = Elf64_Ehdr::default();
    file.rewind()?;
    file.read_exact(header.as_mut_slice())?;
    let mut segments = Vec::new();
    if !header.e_ident.starts_with(ELFMAG) {
        return Ok(segments);
    }
    file.seek(SeekFrom::Start(header.e_phoff))?;
    for _ in 0..header.e_phnum {
        let mut segment = Elf64_Phdr::default();
        file.read_exact(segment.as_mut_slice())?;
        if segment.p_type == PT_LOAD {
            segments.push(segment.p_paddr..segment.p_paddr.saturating_add(segment.p_memsz));
        }
    }
    Ok(segments)
}

/// The pages that are taken, in order: whole huge pages, but for those of which little is. The host backs these in small
/// pages: Linux has one for two functions against SRSO that must alias, and it would be cleared for three pages.
fn lay_out(ram: &GuestRam, taken: &[Range<u64>]) -> Vec<Range<u64>> {
    let first = taken.iter().map(|range| range.start).min().unwrap_or(0) / HUGE_PAGE * HUGE_PAGE;
    let end = taken.iter().map(|range| range.end).max().unwrap_or(0).min(ram.low_end);
    let mut pages: Vec<Range<u64>> = Vec::new();
    for start in (first..end).step_by(HUGE_PAGE as usize) {
        let huge = start..(start + HUGE_PAGE).min(ram.low_end);
        let parts = taken.iter().filter_map(|range| {
            let start = range.start.max(huge.start) / PAGE * PAGE;
            let end = range.end.min(huge.end).next_multiple_of(PAGE);
            (start < end).then_some(start..end)
        });
        match parts.clone().map(|part| part.end - part.start).sum() {
            0 => {}
            1..LEAST_OF_A_HUGE_PAGE => {
                pages.extend(parts);
                ram.in_small_pages(huge);
            }
            _ => match pages.last_mut() {
                Some(last) if last.end == huge.start => last.end = huge.end,
                _ => pages.push(huge),
            },
        }
    }
    pages
}

/// A seed from the host.
#[expect(unsafe_code, reason = "getrandom(2) has no wrapper here")]
pub fn seed() -> Result<[u8; SEED_BYTES], LoadError> {
    let mut seed = [0; SEED_BYTES];
    // SAFETY: it writes at most as many bytes as the seed has.
    let length = unsafe { libc::getrandom(seed.as_mut_ptr().cast(), seed.len(), 0) };
    // Up to 256 bytes come whole or not at all (getrandom(2)).
    if usize::try_from(length) == Ok(SEED_BYTES) {
        Ok(seed)
    } else {
        Err(LoadError::Random(io::Error::last_os_error()))
    }
}

struct Kernel {
    entry: u64,
    /// First address that the kernel does not use before it has read its memory map.
    end: u64,
    /// Whether the initrd may lie right behind it, where huge pages are touched already.
    initrd_follows: bool,
    header: setup_header,
}

fn load_kernel(ram: &GuestRam, file: &mut File) -> Result<Kernel, LoadError> {
    let high = Some(GuestAddress(HIGH_RAM));
    let elf = match Elf::load(&*ram.memory, None, file, high) {
        Ok(KernelLoaderResult { kernel_load, kernel_end, .. }) => {
            let header = setup_header { version: PROTOCOL, ..Default::default() };
            return Ok(Kernel { entry: kernel_load.0, end: kernel_end, initrd_follows: true, header });
        }
        Err(error) => error,
    };
    // The magic number tells the two apart; a broken ELF file should be called one.
    if !matches!(elf, linux_loader::loader::Error::Elf(elf::Error::InvalidElfMagicNumber)) {
        return Err(LoadError::Kernel { elf, bzimage: linux_loader::loader::Error::InvalidKernelStartAddress });
    }
    match BzImage::load(&*ram.memory, None, file, high) {
        Ok(KernelLoaderResult { kernel_load, kernel_end, setup_header: Some(mut header), .. }) => {
            if header.xloadflags & XLF_KERNEL_64 == 0 {
                return Err(LoadError::Not64Bit);
            }
            header.loadflags |= LOADED_HIGH | CAN_USE_HEAP;
            let entry = kernel_load.0 + ENTRY_64;
            // It unpacks itself to an address of its choice.
            Ok(Kernel { entry, end: kernel_end, initrd_follows: false, header })
        }
        Ok(_) => Err(LoadError::Not64Bit),
        Err(bzimage) => Err(LoadError::Kernel { elf, bzimage }),
    }
}

/// Reads the initrd in, behind the kernel or at the end of low memory; returns its address.
fn load_initrd(ram: &GuestRam, file: &mut File, length: u64, kernel: &Kernel) -> Result<u64, LoadError> {
    let top = ram.low_end;
    let lowest = kernel.end.next_multiple_of(PAGE);
    let too_large = LoadError::TooLarge { needed: lowest.saturating_add(length), room: top };
    let end = lowest.checked_add(length).filter(|end| *end <= top).ok_or(too_large)?;
    let at = if kernel.initrd_follows { lowest } else { lowest + (top - end) / HUGE_PAGE * HUGE_PAGE };
    file.rewind().map_err(LoadError::Initrd)?;
    ram.memory.read_exact_volatile_from(GuestAddress(at), file, length as usize)?;
    Ok(at)
}

fn write_command_line(ram: &GuestRam, line: &str) -> Result<usize, LoadError> {
    if line.len() >= COMMAND_LINE_BYTES || line.contains('\0') {
        return Err(LoadError::CommandLine(line.len()));
    }
    ram.memory.write_slice(line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    ram.memory.write_obj(0_u8, GuestAddress(COMMAND_LINE + line.len() as u64))?;
    Ok(line.len())
}

/// `struct setup_data` with the seed; returns its address. The kernel wipes the seed once it has used it.
fn write_seed(ram: &GuestRam, seed: &[u8; SEED_BYTES], next: u64) -> Result<u64, LoadError> {
    let mut data = [0; 16 + SEED_BYTES];
    data[..8].copy_from_slice(&next.to_le_bytes());
    data[8..12].copy_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    data[12..16].copy_from_slice(&(SEED_BYTES as u32).to_le_bytes());
    data[16..].copy_from_slice(seed);
    ram.memory.write_slice(&data, GuestAddress(RNG_SEED))?;
    Ok(RNG_SEED)
}

/// The memory map, in the order of addresses.
fn describe_memory(ram: &GuestRam, params: &mut boot_params) {
    let ring_end = RING + RING_BYTES;
    let map = [
        (0, RING, E820_RAM),
        (RING, ring_end, E820_RESERVED),
        (ring_end, LOW_END, E820_RAM),
        (LOW_END, HIGH_RAM, E820_RESERVED),
        (HIGH_RAM, ram.low_end, E820_RAM),
        (ECAM, ECAM + ECAM_BYTES, E820_RESERVED),
        (ABOVE_4G, ram.high_end, E820_RAM),
    ];
    let mut entries = 0;
    for (start, end, kind) in map.into_iter().filter(|(start, end, _)| start < end) {
        params.e820_table[entries] = boot_e820_entry { addr: start, size: end - start, r#type: kind };
        entries += 1;
    }
    params.e820_entries = entries as u8;
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use vm_memory::GuestMemoryMmap;

    use super::*;
    use crate::memory::MIB;

    #[test]
    fn a_huge_page_that_is_almost_empty_is_none() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (27 * MIB) as usize)]).unwrap();
        let ram = GuestRam { memory: Arc::new(memory), low_end: 27 * MIB, high_end: ABOVE_4G, room: (0, 0) };
        let at = |mib: u64, bytes: u64| mib * MIB..mib * MIB + bytes;
        let taken = [at(16, 3 * MIB), at(20, 2 * PAGE - 1), at(21, 1), at(26, MIB), at(24, MIB / 2)];
        let pages = [at(16, 4 * MIB), at(20, 2 * PAGE), at(21, PAGE), at(24, 3 * MIB)];
        assert_eq!(lay_out(&ram, &taken), pages);
        assert!(pages.into_iter().all(|pages| ram.populate(pages)));
        assert_eq!(lay_out(&ram, &[]), []);
    }

    #[test]
    fn a_file_is_read_from_its_begin_wherever_it_was_left() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MIB as usize)]).unwrap();
        let ram = GuestRam { memory: Arc::new(memory), low_end: MIB, high_end: ABOVE_4G, room: (0, 0) };
        let kernel = Kernel { entry: 0, end: PAGE, initrd_follows: true, header: setup_header::default() };
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"initrd").unwrap();
        assert_eq!(load_initrd(&ram, &mut file, 6, &kernel).unwrap(), PAGE);
        let mut read = [0; 6];
        ram.memory.read_slice(&mut read, GuestAddress(PAGE)).unwrap();
        assert_eq!(&read, b"initrd");

        let mut file = tempfile::tempfile().unwrap();
        let header = Elf64_Ehdr {
            e_ident: *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0",
            e_phoff: 64,
            e_phnum: 1,
            ..Default::default()
        };
        let segment = Elf64_Phdr { p_type: PT_LOAD, p_paddr: MIB, p_memsz: PAGE, ..Default::default() };
        file.write_all(header.as_slice()).unwrap();
        file.write_all(segment.as_slice()).unwrap();
        assert_eq!(segments(&mut file).unwrap().as_slice(), std::slice::from_ref(&(MIB..MIB + PAGE)));
    }
}
