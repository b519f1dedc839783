//! What a guest reaches in the VMM calls no panic: the machine code of the installed program is searched.
//!
//! Lints keep panics out of the sources (each module of a device denies indexing, `unwrap` and their like); this finds those that
//! come in with what is inlined from elsewhere. Each that is left is listed with the reason why no guest can provoke it. Running out of
//! memory ends the process as well, and is not looked for: nothing that a guest sends is as long as it says.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// Modules that handle what a guest has written, and the libraries that do so for them.
const REACHED: [&str; 12] = [
    "pericarp_vmm::bus::",
    "pericarp_vmm::console::",
    "pericarp_vmm::ioapic::",
    "pericarp_vmm::pci::",
    "pericarp_vmm::room::",
    "pericarp_vmm::serial::",
    "pericarp_vmm::vcpu::",
    "pericarp_vmm::virtio::",
    "vm_memory::",
    "virtio_queue::",
    "vm_superio::",
    "kvm_ioctls::ioctls::vcpu::",
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

/// Beginnings of the names of functions that call a panic, and why no guest makes them do it.
const ARGUED: [(&str, &str); 16] = [
    ("pericarp_vmm::virtio::blk::", "the standard library's BTreeMap, of its own nodes"),
    ("pericarp_vmm::virtio::vsock::sink::Sinks::", "the same"),
    ("pericarp_vmm::virtio::inbox::", "the standard library's channel, of its own state; only the host asks"),
    (
        "pericarp_vmm::virtio::vsock::connection::Connection::accepted",
        "io::Write::write_all, of a count beyond what it gave write(2)",
    ),
    ("pericarp_vmm::virtio::vsock::sink::Sink::append", "the same"),
    ("pericarp_vmm::vcpu::Cpus::pause", "the end of a wait by the clock; the host's command"),
    (
        "pericarp_vmm::pci::irq::Irqs::commit",
        "vmm-sys-util's array behind a header, whose length is that of the routes it is made of",
    ),
    ("pericarp_vmm::pci::Pci::", "vm-memory's volatile copy, of its own length; get_slice has checked the range"),
    ("pericarp_vmm::virtio::device::LiveConfig::", "the same"),
    ("vm_memory::guest_memory::<impl vm_memory::bytes::Bytes", "the same"),
    (
        "pericarp_vmm::virtio::device::ActiveQueue::signal_used_since",
        "vm-memory looks for an address in the region that it found by it",
    ),
    ("vm_memory::guest_memory::GuestMemoryBackend::to_region_addr", "the same"),
    ("<virtio_queue::queue::AvailIter", "the same"),
    ("<virtio_queue::queue::Queue as virtio_queue::QueueOwnedT>::iter", "the same"),
    ("<virtio_queue::queue::Queue as virtio_queue::QueueT>::", "the same"),
    (
        "kvm_ioctls::ioctls::vcpu::VcpuFd::run",
        "where an exit's data lies in the page shared with KVM, which only KVM says",
    ),
];

/// Who calls whom, by demangled names.
type Calls = BTreeMap<String, BTreeSet<String>>;

fn binutils(program: &str, arguments: &[&str], file: &Path) -> String {
    let output =
        Command::new(program).args(arguments).arg(file).output().expect("binutils are installed with the compiler");
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).ok()
}

/// Functions by address.
fn symbols(program: &Path) -> BTreeMap<u64, String> {
    let parse = |line: &str| {
        let mut fields = line.splitn(3, ' ');
        let address = hexadecimal(fields.next()?)?;
        Some((address, fields.nth(1)?.to_owned()))
    };
    binutils("nm", &["--demangle=rust"], program).lines().filter_map(parse).collect()
}

/// What the slots of the global offset table lead to: calls between crates go by them.
fn slots(program: &Path) -> BTreeMap<u64, String> {
    let symbols = symbols(program);
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [slot, _, "R_X86_64_RELATIVE", target] = fields[..] else { return None };
        Some((hexadecimal(slot)?, symbols.get(&hexadecimal(target)?)?.clone()))
    };
    binutils("readelf", &["--relocs", "--wide"], program).lines().filter_map(parse).collect()
}

fn calls(program: &Path) -> Calls {
    let slots = slots(program);
    let mut calls = Calls::new();
    let mut function = String::new();
    for line in binutils("objdump", &["--disassemble", "--demangle=rust", "--no-show-raw-insn"], program).lines() {
        if let Some(name) = line.strip_suffix(">:").and_then(|line| line.split_once('<')) {
            function = name.1.to_owned();
        } else if let Some(callee) = callee(line, &slots) {
            calls.entry(function.clone()).or_default().insert(callee);
        }
    }
    calls
}

/// The target of a call or jump, in which the disassembler puts the name last.
fn callee(line: &str, slots: &BTreeMap<u64, String>) -> Option<String> {
    let instruction = line.split_once('\t')?.1;
    let (mnemonic, operands) = instruction.split_once(' ')?;
    if !(mnemonic == "call" || mnemonic.starts_with('j')) {
        return None;
    }
    if operands.trim_start().starts_with('*') {
        let slot = operands.split_once("# ")?.1.split(' ').next()?;
        return slots.get(&hexadecimal(slot)?).cloned();
    }
    Some(operands.split_once('<')?.1.trim_end_matches('>').to_owned())
}

fn is_reached(function: &str) -> bool {
    REACHED.iter().any(|module| function.contains(module))
}

fn is_panic(function: &str) -> bool {
    PANICS.iter().any(|panic| function.contains(panic)) && !function.contains(IN_CLEANUP)
}

#[test]
fn what_a_guest_reaches_calls_no_panic() {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/root/usr/lib/pericarp/pericarp-vmm");
    assert!(program.exists(), "{}: `make target/root` installs it", program.display());
    let calls = calls(&program);
    assert!(
        calls.values().flatten().any(|callee| is_panic(callee)),
        "the program has symbols, and some panic elsewhere"
    );
    let mut argued = BTreeSet::new();
    let mut found = Vec::new();
    for (function, callees) in calls.iter().filter(|(function, _)| is_reached(function)) {
        for callee in callees.iter().filter(|callee| is_panic(callee)) {
            match ARGUED.iter().find(|(beginning, _)| function.starts_with(beginning)) {
                Some((beginning, _)) => drop(argued.insert(beginning)),
                None => found.push(format!("{function} calls {callee}")),
            }
        }
    }
    println!("{} functions looked at", calls.keys().filter(|function| is_reached(function)).count());
    assert!(found.is_empty(), "panics that a guest might provoke:\n{}", found.join("\n"));
    let stale: Vec<_> = ARGUED.iter().filter(|(beginning, _)| !argued.contains(beginning)).collect();
    assert!(stale.is_empty(), "reasons that nothing needs any more: {stale:?}");
}
