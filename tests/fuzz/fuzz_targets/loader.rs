//! Any bytes as a kernel and an initrd, with headers that are nearly right.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, OnceLock};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pericarp_vmm::loader::{self, Image, SEED_BYTES};
use pericarp_vmm::memory::{self, GuestRam, MIB};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const RAM: u64 = 16 * MIB;

/// What the first bytes are made to be.
#[derive(Arbitrary, Debug)]
enum Kind {
    Elf,
    BzImage,
    Anything,
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    kind: Kind,
    kernel: &'a [u8],
    initrd: Option<&'a [u8]>,
    command_line: &'a str,
    cpuid_table: bool,
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(bytes).expect("there is room");
    file
}

/// The bytes with the magic numbers of a kind in their places.
fn kernel(kind: &Kind, bytes: &[u8]) -> Vec<u8> {
    let mut kernel = bytes.to_vec();
    let marks: &[(usize, &[u8])] = match kind {
        // ELF-64 specification, file header: class, byte order, version, machine.
        Kind::Elf => &[(0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]), (18, &[62, 0, 1, 0])],
        // Documentation/arch/x86/boot.rst, real-mode kernel header.
        Kind::BzImage => &[(0x1fe, &[0x55, 0xaa]), (0x202, b"HdrS")],
        Kind::Anything => &[],
    };
    for (at, mark) in marks {
        let end = at + mark.len();
        kernel.resize(kernel.len().max(end), 0);
        kernel[*at..end].copy_from_slice(mark);
    }
    kernel
}

fuzz_target!(|input: Input<'_>| {
    static MEMORY: OnceLock<Arc<GuestMemoryMmap>> = OnceLock::new();
    let memory = MEMORY
        .get_or_init(|| Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).expect("memory")));
    let ram = GuestRam { memory: Arc::clone(memory), low_end: RAM, high_end: memory::ABOVE_4G, room: (0, 0) };
    let image = Image {
        kernel: file(&kernel(&input.kind, input.kernel)),
        initrd: input.initrd.map(file),
        command_line: input.command_line,
        seed: [7; SEED_BYTES],
        cpuid_table: input.cpuid_table,
        acpi_root: memory::ACPI_TABLES,
    };
    if let Ok(loaded) = loader::load(&ram, image) {
        let _populated = loaded.pages.into_iter().all(|pages| ram.populate(pages));
    }
});
