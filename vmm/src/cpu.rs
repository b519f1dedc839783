//! What a virtual CPU is: the CPUID it shows, and the registers it starts with.
//!
//! The policy is fixed: leaves that are not named here read as zero, and features that a pod must not have are
//! taken out whatever the host offers. Nothing here depends on the guest.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_regs, kvm_segment, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::memory::{CPUID_TABLE, GDT, PAGE_TABLES, ZERO_PAGE};

/// Why a virtual CPU cannot be had.
#[derive(Debug, Error)]
pub enum CpuError {
    /// KVM refuses.
    #[error("KVM refuses a virtual CPU's {0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// The host's CPU is too old.
    #[error("this host's CPU lacks {0}, which every guest needs")]
    Lacks(&'static str),
    /// Too many leaves.
    #[error("this host's CPUID has more leaves than KVM takes")]
    TooMany,
    /// Guest memory refuses the write.
    #[error("cannot write the guest's memory")]
    Memory(#[from] GuestMemoryError),
}

const VENDOR: u32 = 0;
const FEATURES: u32 = 1;
const CACHES: u32 = 4;
const THERMAL: u32 = 6;
const EXTENDED_FEATURES: u32 = 7;
const TOPOLOGY: u32 = 0xb;
const XSAVE: u32 = 0xd;
const TOPOLOGY_2: u32 = 0x1f;
const KVM_BASE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
/// TSC and local APIC frequency in kHz, as most hypervisors state it.
const TIMING: u32 = 0x4000_0010;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Leaves that a guest sees; the highest basic and extended ones end what Linux asks for. Left out on purpose:
/// MONITOR (5), performance counters (0xa), processor trace (0x14), SGX (0x12), AMX (0x1d, 0x1e), SVM
/// (0x8000000a), encrypted memory (0x8000001f).
const LEAVES: [u32; 27] = [
    VENDOR,
    FEATURES,
    2,
    CACHES,
    THERMAL,
    EXTENDED_FEATURES,
    TOPOLOGY,
    XSAVE,
    0x15,
    0x16,
    TOPOLOGY_2,
    KVM_BASE,
    KVM_FEATURES,
    0x8000_0000,
    AMD_FEATURES,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_0007,
    AMD_SIZES,
    0x8000_0019,
    0x8000_001a,
    AMD_CACHES,
    AMD_TOPOLOGY,
    0x8000_0021,
];

// FEATURES, ECX.
const MONITOR: u32 = 1 << 3;
const VMX: u32 = 1 << 5;
const PDCM: u32 = 1 << 15;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
// FEATURES, EDX.
const HTT: u32 = 1 << 28;
// THERMAL, EAX: the local APIC's timer never stops.
const ARAT: u32 = 1 << 2;
// EXTENDED_FEATURES.0, EDX: AMX BF16, TILE, INT8.
const AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
// EXTENDED_FEATURES.1, EAX: AMX FP16; EDX: AMX COMPLEX.
const AMX_FP16: u32 = 1 << 21;
const AMX_COMPLEX: u32 = 1 << 8;
// XSAVE.0, EAX: XTILECFG and XTILEDATA.
const AMX_STATE: u32 = 3 << 17;
// AMD_FEATURES, ECX: SVM, and performance counters of core, north bridge and L2/L3.
const SVM: u32 = 1 << 2;
const AMD_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
/// Page faults delivered later help hosts that swap guests out, and cost each CPU a page and an interrupt
/// (KVM_FEATURE_ASYNC_PF, _VMEXIT and _INT).
const ASYNC_PF: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// `struct setup_data` up to its contents, and the type of ours: "CPID" (guest-kernel/patches).
const SETUP_DATA_BYTES: usize = 16;
const SETUP_CPUID: u32 = 0x4449_5043;

/// KVM's local APIC timer runs at 1 GHz.
const APIC_KHZ: u32 = 1_000_000;

/// The policy applied to what a host offers; each virtual CPU differs in its identifier only.
#[derive(Debug)]
pub struct Policy {
    leaves: Vec<kvm_cpuid_entry2>,
    cpus: u8,
}

impl Policy {
    /// Reads what the host offers and takes out what a pod does not get.
    pub fn new(kvm: &Kvm, cpus: u8) -> Result<Self, CpuError> {
        let offered = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|e| CpuError::Kvm("CPUID", e))?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Self::apply(offered.as_slice(), cpus, deadline)
    }

    fn apply(offered: &[kvm_cpuid_entry2], cpus: u8, deadline: bool) -> Result<Self, CpuError> {
        let mut leaves: Vec<_> = offered.iter().filter(|entry| LEAVES.contains(&entry.function)).copied().collect();
        leaves.retain(|entry| entry.function != XSAVE || entry.index < 32 && AMX_STATE & 1 << entry.index == 0);
        let mut has_x2apic = false;
        for entry in &mut leaves {
            match (entry.function, entry.index) {
                (VENDOR, _) => entry.eax = entry.eax.min(TOPOLOGY_2),
                (FEATURES, _) => {
                    has_x2apic = entry.ecx & X2APIC != 0;
                    entry.ecx =
                        entry.ecx & !(MONITOR | VMX | PDCM) | HYPERVISOR | if deadline { TSC_DEADLINE } else { 0 };
                    entry.edx = entry.edx & !HTT | if cpus > 1 { HTT } else { 0 };
                }
                (THERMAL, _) => *entry = kvm_cpuid_entry2 { eax: ARAT, ebx: 0, ecx: 0, edx: 0, ..*entry },
                (EXTENDED_FEATURES, 0) => entry.edx &= !AMX,
                (EXTENDED_FEATURES, 1) => {
                    entry.eax &= !AMX_FP16;
                    entry.edx &= !AMX_COMPLEX;
                }
                (XSAVE, 0) => entry.eax &= !AMX_STATE,
                (KVM_BASE, _) => entry.eax = TIMING,
                (KVM_FEATURES, _) => entry.eax &= !ASYNC_PF,
                (AMD_FEATURES, _) => entry.ecx &= !(SVM | AMD_COUNTERS),
                _ => {}
            }
        }
        // Both are topologies of the host; each CPU's own are added to it.
        let extended_topology =
            offered.iter().any(|entry| entry.function == AMD_FEATURES && entry.ecx & TOPOLOGY_EXTENSIONS != 0);
        leaves.retain(|entry| {
            !matches!(entry.function, TOPOLOGY | TOPOLOGY_2) && (extended_topology || entry.function != AMD_TOPOLOGY)
        });
        if !has_x2apic {
            return Err(CpuError::Lacks("x2APIC"));
        }
        Ok(Self { leaves, cpus })
    }

    /// CPUID of one virtual CPU: one package of single-threaded cores, numbered from 0.
    fn cpuid(&self, id: u8, tsc_khz: u32) -> Vec<kvm_cpuid_entry2> {
        let (id, cpus) = (u32::from(id), u32::from(self.cpus));
        let id_bits = cpus.next_power_of_two().trailing_zeros();
        let mut leaves = self.leaves.clone();
        for entry in &mut leaves {
            match entry.function {
                FEATURES => entry.ebx = entry.ebx & 0xffff | cpus << 16 | id << 24,
                CACHES if entry.eax & 0x1f != 0 => {
                    entry.eax = entry.eax & 0x3fff | shared(entry.eax, cpus) << 14 | (cpus - 1) << 26;
                }
                AMD_SIZES => entry.ecx = (cpus - 1) | id_bits << 12,
                AMD_CACHES if entry.eax & 0x1f != 0 => entry.eax = entry.eax & 0x3fff | shared(entry.eax, cpus) << 14,
                AMD_TOPOLOGY => *entry = kvm_cpuid_entry2 { eax: id, ebx: id, ecx: 0, edx: 0, ..*entry },
                _ => {}
            }
        }
        for leaf in [TOPOLOGY, TOPOLOGY_2] {
            // Threads of a core, cores of the package, the end (Intel SDM, CPUID leaf 0BH).
            for (index, shift, count, kind) in [(0, 0, 1, 1), (1, id_bits, cpus, 2), (2, 0, 0, 0)] {
                let (eax, ebx, ecx) = (shift, count, kind << 8 | index);
                let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
                leaves.push(kvm_cpuid_entry2 {
                    function: leaf,
                    index,
                    flags,
                    eax,
                    ebx,
                    ecx,
                    edx: id,
                    ..Default::default()
                });
            }
        }
        leaves.push(kvm_cpuid_entry2 { function: TIMING, eax: tsc_khz, ebx: APIC_KHZ, ..Default::default() });
        leaves
    }

    /// Gives a virtual CPU its CPUID; that of the first one is in the guest's memory as well.
    pub fn give(&self, vcpu: &VcpuFd, id: u8, tsc_khz: u32, memory: &GuestMemoryMmap) -> Result<(), CpuError> {
        let leaves = self.cpuid(id, tsc_khz);
        if id == 0 {
            write_table(memory, &leaves)?;
        }
        let cpuid = CpuId::from_entries(&leaves).map_err(|_| CpuError::TooMany)?;
        vcpu.set_cpuid2(&cpuid).map_err(|e| CpuError::Kvm("CPUID", e))
    }
}

/// `struct setup_data` with CPUID as KVM takes it. Each CPUID instruction is an exit; our guest kernel looks here first, and
/// others pass over a type that they do not know. Left out is what changes with what the guest sets (protection keys, the
/// sizes of enabled states), and what finds no room: that the instruction tells.
fn write_table(memory: &GuestMemoryMmap, leaves: &[kvm_cpuid_entry2]) -> Result<(), GuestMemoryError> {
    let changing =
        |entry: &&kvm_cpuid_entry2| matches!((entry.function, entry.index), (EXTENDED_FEATURES, 0) | (XSAVE, 0 | 1));
    let room = (PAGE_TABLES - CPUID_TABLE) as usize;
    let mut data = vec![0; SETUP_DATA_BYTES];
    for entry in leaves.iter().filter(|entry| !changing(entry)) {
        let words = [entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx, 0, 0, 0];
        data.extend(words.into_iter().flat_map(u32::to_le_bytes));
    }
    data.truncate(room);
    let length = (data.len() - SETUP_DATA_BYTES) as u32;
    data[8..12].copy_from_slice(&SETUP_CPUID.to_le_bytes());
    data[12..16].copy_from_slice(&length.to_le_bytes());
    memory.write_slice(&data, GuestAddress(CPUID_TABLE))
}

/// How many CPUs share a cache, less one: all of them from level 3 on.
fn shared(eax: u32, cpus: u32) -> u32 {
    if eax >> 5 & 7 >= 3 { cpus - 1 } else { 0 }
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const APIC_X2APIC: u64 = 1 << 10;
const RFLAGS_FIXED: u64 = 1 << 1;
/// Selectors that the boot protocol fixes: `__BOOT_CS` and `__BOOT_DS`.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
/// Flat 64-bit code and data as descriptors (Intel SDM vol. 3 §3.4.5).
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const PRESENT_WRITABLE: u64 = 3;
const HUGE: u64 = 1 << 7;

/// Writes what the first CPU needs in memory to start in 64-bit mode: descriptors, and the first GiB mapped to itself.
pub fn write_boot_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let (directories, pages) = (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    let bytes: Vec<u8> = DESCRIPTORS.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect();
    memory.write_slice(&bytes, GuestAddress(GDT))?;
    memory.write_obj(directories | PRESENT_WRITABLE, GuestAddress(PAGE_TABLES))?;
    memory.write_obj(pages | PRESENT_WRITABLE, GuestAddress(directories))?;
    let entries: Vec<u8> =
        (0..512_u64).flat_map(|index| (index << 21 | PRESENT_WRITABLE | HUGE).to_le_bytes()).collect();
    memory.write_slice(&entries, GuestAddress(pages))
}

/// Puts a CPU's local APIC into x2APIC mode, and the first CPU at the kernel's 64-bit entry
/// (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"); the others wait for it to start them.
pub fn set_registers(vcpu: &VcpuFd, id: u8, entry: u64) -> Result<(), CpuError> {
    let mut sregs = vcpu.get_sregs().map_err(|e| CpuError::Kvm("registers", e))?;
    sregs.apic_base |= APIC_X2APIC;
    if id == 0 {
        let code = kvm_segment {
            limit: u32::MAX,
            selector: BOOT_CS,
            type_: 0xb,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment { selector: BOOT_DS, type_: 3, l: 0, db: 1, ..code };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.gdt.base = GDT;
        sregs.gdt.limit = (DESCRIPTORS.len() * 8 - 1) as u16;
        sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
        sregs.cr3 = PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
        let regs = kvm_regs { rip: entry, rsi: ZERO_PAGE, rflags: RFLAGS_FIXED, ..Default::default() };
        vcpu.set_regs(&regs).map_err(|e| CpuError::Kvm("registers", e))?;
    }
    vcpu.set_sregs(&sregs).map_err(|e| CpuError::Kvm("registers", e))
}

/// Enables every state that the policy shows, as a kernel does first. A CPU that does not let the hypervisor see the
/// guest do it (an emulated one) then still states the right sizes in its CPUID.
pub fn set_states(vcpu: &VcpuFd, policy: &Policy) -> Result<(), CpuError> {
    let Some(states) = policy.leaves.iter().find(|entry| (entry.function, entry.index) == (XSAVE, 0)) else {
        return Ok(());
    };
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = u64::from(states.edx) << 32 | u64::from(states.eax);
    vcpu.set_xcrs(&xcrs).map_err(|e| CpuError::Kvm("extended states", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<kvm_cpuid_entry2> {
        let all = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        };
        let mut host: Vec<_> = (0..0x20)
            .chain([KVM_BASE, KVM_FEATURES])
            .chain(0x8000_0000..0x8000_0022)
            .map(|leaf| all(leaf, 0))
            .collect();
        host.extend([all(EXTENDED_FEATURES, 1), all(XSAVE, 1), all(XSAVE, 17), all(XSAVE, 18)]);
        host
    }

    fn leaf(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found: Vec<_> = leaves.iter().filter(|entry| (entry.function, entry.index) == (function, index)).collect();
        assert_eq!(found.len(), 1, "leaf {function:#x}.{index}");
        *found[0]
    }

    #[test]
    fn nested_virtualisation_amx_and_counters_are_off_whatever_the_host_offers() {
        let leaves = Policy::apply(&host(), 2, true).unwrap().cpuid(1, 1_000_000);
        assert_eq!(leaf(&leaves, FEATURES, 0).ecx & (VMX | MONITOR | PDCM), 0);
        assert_eq!(leaf(&leaves, AMD_FEATURES, 0).ecx & (SVM | AMD_COUNTERS), 0);
        assert_eq!(leaf(&leaves, EXTENDED_FEATURES, 0).edx & AMX, 0);
        assert_eq!(leaf(&leaves, XSAVE, 0).eax & AMX_STATE, 0);
        for absent in [5, 0xa, 0x12, 0x14, 0x1d, 0x1e, 0x8000_000a, 0x8000_001f] {
            assert!(leaves.iter().all(|entry| entry.function != absent), "leaf {absent:#x}");
        }
        assert!(leaves.iter().all(|entry| entry.function != XSAVE || entry.index < 17));
    }

    #[test]
    fn each_cpu_has_its_own_identifier_in_every_leaf_that_states_it() {
        let policy = Policy::apply(&host(), 4, true).unwrap();
        for id in 0..4 {
            let leaves = policy.cpuid(id, 1_000_000);
            let id = u32::from(id);
            assert_eq!(leaf(&leaves, FEATURES, 0).ebx >> 16, id << 8 | 4);
            assert_eq!(leaf(&leaves, TOPOLOGY, 0).edx, id);
            assert_eq!(leaf(&leaves, TOPOLOGY, 1).eax, 2);
            assert_eq!(leaf(&leaves, TOPOLOGY_2, 1).ebx, 4);
            assert_eq!(leaf(&leaves, AMD_TOPOLOGY, 0).eax, id);
            assert_eq!(leaf(&leaves, AMD_SIZES, 0).ecx, 3 | 2 << 12);
        }
    }

    #[test]
    fn the_table_in_memory_has_what_the_instruction_answers_and_nothing_that_changes() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let leaves = Policy::apply(&host(), 1, true).unwrap().cpuid(0, 1_000_000);
        write_table(&memory, &leaves).unwrap();
        let header: [u32; 4] = memory.read_obj(GuestAddress(CPUID_TABLE)).unwrap();
        assert_eq!(header[..3], [0, 0, SETUP_CPUID], "the last of its list");
        let mut table = vec![0; header[3] as usize];
        memory.read_slice(&mut table, GuestAddress(CPUID_TABLE + SETUP_DATA_BYTES as u64)).unwrap();
        let words: Vec<_> = table.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        let entries: Vec<_> = words.chunks_exact(10).collect();
        let features = leaf(&leaves, FEATURES, 0);
        assert!(
            entries.iter().any(|entry| entry[0] == FEATURES && entry[5] == features.ecx && entry[6] == features.edx)
        );
        let changing = [(EXTENDED_FEATURES, 0), (XSAVE, 0), (XSAVE, 1)];
        assert!(entries.iter().all(|entry| !changing.contains(&(entry[0], entry[1]))));
        assert!(CPUID_TABLE + SETUP_DATA_BYTES as u64 + table.len() as u64 <= PAGE_TABLES);
    }

    #[test]
    fn a_cpu_without_x2apic_is_refused() {
        let mut host = host();
        host[FEATURES as usize].ecx &= !X2APIC;
        assert!(matches!(Policy::apply(&host, 1, true), Err(CpuError::Lacks("x2APIC"))));
    }
}
