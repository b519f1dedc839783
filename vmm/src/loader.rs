//! Puts kernel, initrd and boot parameters into guest memory, for the 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst).
//!
//! Files are read straight into guest memory. Nothing here starts anything.

use std::fs::File;
use std::io::{Seek, SeekFrom};

use linux_loader::loader::bootparam::{
    CAN_USE_HEAP, LOADED_HIGH, XLF_KERNEL_64, boot_e820_entry, boot_params, setup_header,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult, elf};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

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
    Initrd(#[source] std::io::Error),
    /// Too long a command line.
    #[error("the kernel command line has {0} bytes, and the kernel takes {limit}", limit = COMMAND_LINE_BYTES - 1)]
    CommandLine(usize),
    /// Guest memory refuses the write.
    #[error("cannot write the guest's memory")]
    Memory(#[from] GuestMemoryError),
    /// The host has no random numbers.
    #[error("the host gives no random numbers")]
    Random(#[source] std::io::Error),
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
#[derive(Clone, Copy, Debug)]
pub struct Loaded {
    /// Address of the first instruction.
    pub entry: u64,
    /// First and last address of what was loaded above the first MiB.
    pub extent: (u64, u64),
}

/// Loads all of it.
pub fn load(ram: &GuestRam, image: Image<'_>) -> Result<Loaded, LoadError> {
    let Image { mut kernel, initrd, command_line, seed, cpuid_table, acpi_root } = image;
    let kernel = load_kernel(ram, &mut kernel)?;
    let mut params = boot_params { acpi_rsdp_addr: acpi_root, ..Default::default() };
    params.hdr = kernel.header;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_TYPE;
    let mut end = kernel.end;
    if let Some(mut initrd) = initrd {
        let (at, length) = load_initrd(ram, &mut initrd, kernel.end, kernel.initrd_follows)?;
        params.hdr.ramdisk_image = at as u32;
        params.hdr.ramdisk_size = length as u32;
        if kernel.initrd_follows {
            end = at + length;
        }
    }
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.cmdline_size = write_command_line(ram, command_line)? as u32;
    params.hdr.setup_data = write_seed(ram, &seed, if cpuid_table { CPUID_TABLE } else { 0 })?;
    describe_memory(ram, &mut params);
    ram.memory.write_obj(params, GuestAddress(ZERO_PAGE))?;
    Ok(Loaded { entry: kernel.entry, extent: (kernel.entry, end) })
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
        Err(LoadError::Random(std::io::Error::last_os_error()))
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

/// Reads the initrd in, behind the kernel or at the end of low memory; returns its address and length.
fn load_initrd(ram: &GuestRam, file: &mut File, kernel_end: u64, follows: bool) -> Result<(u64, u64), LoadError> {
    let length = file.seek(SeekFrom::End(0)).map_err(LoadError::Initrd)?;
    file.rewind().map_err(LoadError::Initrd)?;
    let top = ram.low_end;
    let lowest = kernel_end.next_multiple_of(PAGE);
    let too_large = LoadError::TooLarge { needed: lowest.saturating_add(length), room: top };
    let end = lowest.checked_add(length).filter(|end| *end <= top).ok_or(too_large)?;
    let at = if follows { lowest } else { lowest + (top - end) / HUGE_PAGE * HUGE_PAGE };
    ram.memory.read_exact_volatile_from(GuestAddress(at), file, length as usize)?;
    Ok((at, length))
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
