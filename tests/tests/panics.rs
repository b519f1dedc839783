//! What a guest reaches in the VMM calls no panic: the machine code of the installed program is searched.
//!
//! Lints keep panics out of the sources (each module of a device denies indexing, `unwrap` and their like); this finds those that
//! come in with what is inlined from elsewhere. A call of a panic names its place in the sources; each that is left is listed with the reason
//! why no guest can provoke it. Running out of memory ends the process as well, and is not looked for: nothing that a guest sends is as long
//! as it says.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::Command;

/// Modules that handle what a guest has written, and the libraries that do so for them; and what the compiler makes a part of these or
/// leaves where it is, as it likes: a reason is needed either way.
const REACHED: [&str; 15] = [
    "pericarp_vmm::bus::",
    "pericarp_vmm::console::",
    "pericarp_vmm::ioapic::",
    "pericarp_vmm::pci::",
    "pericarp_vmm::room::",
    "pericarp_vmm::serial::",
    "pericarp_vmm::slots::",
    "pericarp_vmm::vcpu::",
    "pericarp_vmm::virtio::",
    "vm_memory::",
    "virtio_queue::",
    "vmm_sys_util::",
    "vm_superio::",
    "kvm_ioctls::ioctls::vcpu::",
    "std::sys::pal::unix::time::Timespec>::now",
];

/// Parts of the names of functions that do not return.
const PANICS: [&str; 7] = [
    "core::panicking::",
    "::expect_failed",
    "::unwrap_failed",
    "::slice_index_fail",
    "::len_mismatch_fail",
    "::panic_already",
    "capacity_overflow",
];

/// Where a panic for a double panic is called, of which there is none: the first one ends the process.
const IN_CLEANUP: &str = "panic_in_cleanup";

/// Source files in which panics stand that are left: a crate or library, a part of the path in it, and why no guest comes there.
const ARGUED: [(&str, &str, &str); 9] = [
    ("/vm-memory-", "/src/guest_memory.rs", "an address is looked for in the region that it was found in"),
    ("/vm-memory-", "/src/region.rs", "the same"),
    ("/vm-memory-", "/src/io.rs", "a volatile copy's own length, in a range that was checked before"),
    ("/vmm-sys-util-", "/src/fam.rs", "an array behind a header, as long as the list of routes that it is made of"),
    (
        "/kvm-ioctls-",
        "/src/ioctls/vcpu.rs",
        "where an exit's data lies in the page shared with KVM, which only KVM says",
    ),
    ("/library/alloc/", "/collections/btree/", "a map's own nodes"),
    ("/library/std/", "/src/io/mod.rs", "write(2) said that it had taken more than it was given"),
    ("/library/std/", "/src/sys/pal/unix/time.rs", "the kernel's clock, whose nanoseconds are less than a second"),
    ("/library/std/", "/src/sync/mpmc/", "a channel's own state; only the host asks"),
];

/// Instructions before a call in which it is given the place that it is to name.
const BEFORE: usize = 24;

/// A `core::panic::Location`: the file's name by address and length, line and column.
const LOCATION_BYTES: u64 = 24;

/// The program: its bytes where they are loaded, its functions, and which addresses are written where as it is loaded.
struct Program {
    bytes: Vec<u8>,
    /// Addresses, and where in the file their bytes are.
    segments: Vec<(Range<u64>, u64)>,
    functions: BTreeMap<u64, String>,
    addresses: BTreeMap<u64, u64>,
    /// As objdump prints it.
    code: String,
}

fn binutils(program: &str, arguments: &[&str], file: &Path) -> String {
    let output =
        Command::new(program).args(arguments).arg(file).output().expect("binutils are installed with the compiler");
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).ok()
}

impl Program {
    fn read(file: &Path) -> Self {
        let segment = |line: &str| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let ["LOAD", offset, address, _, length, ..] = fields[..] else { return None };
            let address = hexadecimal(address)?;
            Some((address..address + hexadecimal(length)?, hexadecimal(offset)?))
        };
        let function = |line: &str| {
            let mut fields = line.splitn(3, ' ');
            let address = hexadecimal(fields.next()?)?;
            Some((address, fields.nth(1)?.to_owned()))
        };
        let relocation = |line: &str| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [at, _, "R_X86_64_RELATIVE", address] = fields[..] else { return None };
            Some((hexadecimal(at)?, hexadecimal(address)?))
        };
        Self {
            bytes: fs::read(file).expect("`make target/root` installs it"),
            segments: binutils("readelf", &["--segments", "--wide"], file).lines().filter_map(segment).collect(),
            functions: binutils("nm", &["--demangle=rust"], file).lines().filter_map(function).collect(),
            addresses: binutils("readelf", &["--relocs", "--wide"], file).lines().filter_map(relocation).collect(),
            code: binutils("objdump", &["--disassemble", "--demangle=rust", "--no-show-raw-insn"], file),
        }
    }

    fn bytes(&self, address: u64, length: u64) -> Option<&[u8]> {
        let end = address.checked_add(length)?;
        let (range, offset) = self.segments.iter().find(|(range, _)| range.contains(&address) && end <= range.end)?;
        let start = usize::try_from(offset + address - range.start).ok()?;
        self.bytes.get(start..start + usize::try_from(length).ok()?)
    }

    /// The place in the sources that lies at an address, if one does.
    fn place(&self, address: u64) -> Option<String> {
        let location = self.bytes(address, LOCATION_BYTES)?;
        let length = u64::from_le_bytes(location.get(8..16)?.try_into().ok()?);
        let line = u32::from_le_bytes(location.get(16..20)?.try_into().ok()?);
        let file = str::from_utf8(self.bytes(*self.addresses.get(&address)?, length)?).ok()?;
        file.ends_with(".rs").then(|| format!("{file}:{line}"))
    }

    /// The target of a call or jump, in which the disassembler puts the name last. Calls between crates go by a table.
    fn callee<'p>(&'p self, instruction: &'p str) -> Option<&'p str> {
        let (mnemonic, operands) = instruction.split_once(' ')?;
        if !(mnemonic == "call" || mnemonic.starts_with('j')) {
            return None;
        }
        if operands.trim_start().starts_with('*') {
            let slot = hexadecimal(operands.split_once("# ")?.1.split(' ').next()?)?;
            return self.functions.get(self.addresses.get(&slot)?).map(String::as_str);
        }
        Some(operands.split_once('<')?.1.trim_end_matches('>'))
    }

    /// Calls of panics in what a guest reaches: the place that they name, and the function that the call is in now.
    fn panics(&self) -> BTreeSet<(String, &str)> {
        let mut found = BTreeSet::new();
        let (mut function, mut before) = ("", VecDeque::<Option<u64>>::new());
        for line in self.code.lines() {
            if let Some((_, name)) = line.strip_suffix(">:").and_then(|line| line.split_once('<')) {
                (function, before) = (name, VecDeque::new());
                continue;
            }
            let Some((_, instruction)) = line.split_once('\t') else { continue };
            if is_reached(function) && self.callee(instruction).is_some_and(is_panic) {
                let given = before.iter().rev().flatten().find_map(|address| self.place(*address));
                found.insert((given.unwrap_or_else(|| "a place that is not named".to_owned()), function));
            }
            before.push_back(loaded(instruction));
            before.drain(..before.len().saturating_sub(BEFORE));
        }
        found
    }
}

/// The address that an instruction loads.
fn loaded(instruction: &str) -> Option<u64> {
    hexadecimal(instruction.strip_prefix("lea ")?.split_once("# ")?.1.split(' ').next()?)
}

fn is_reached(function: &str) -> bool {
    REACHED.iter().any(|module| function.contains(module))
}

fn is_panic(function: &str) -> bool {
    PANICS.iter().any(|panic| function.contains(panic)) && !function.contains(IN_CLEANUP)
}

#[test]
fn what_a_guest_reaches_calls_no_panic() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/root/usr/lib/pericarp/pericarp-vmm");
    let program = Program::read(&file);
    let panics = program.panics();
    println!(
        "{} functions, {} places",
        program.functions.values().filter(|name| is_reached(name)).count(),
        panics.len()
    );
    assert!(!panics.is_empty(), "there are some in libraries, and the program has symbols to find them by");
    let argued = |place: &str| ARGUED.iter().position(|(of, part, _)| place.contains(of) && place.contains(part));
    let found: Vec<_> = panics.iter().filter(|(place, _)| argued(place).is_none()).collect();
    assert!(found.is_empty(), "panics that a guest might provoke: {found:#?}");
    let used: BTreeSet<_> = panics.iter().filter_map(|(place, _)| argued(place)).collect();
    let stale: Vec<_> = (0..ARGUED.len()).filter(|index| !used.contains(index)).map(|index| ARGUED[index]).collect();
    assert!(stale.is_empty(), "reasons that nothing needs any more: {stale:#?}");
}
