//! The table of Intel's MultiProcessor Specification 1.4, for kernels that look for it before they know of ACPI: every Linux with
//! `CONFIG_X86_MPPARSE`, which most have. Where there is none they map and unmap the whole of a PC's firmware for each 16
//! bytes of it, which is a twentieth of the boot of a small kernel. What they find they hardly look at, for ACPI says the same.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::acpi::{IOAPIC, LOCAL_APIC, SERIAL_GSI};
use crate::memory::{LOW_END, MP_TABLE};

/// Version 1.4 of the specification.
const VERSION: u8 = 4;
/// What a local APIC and an I/O APIC say of themselves.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;

/// Types of entries (§4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const INTERRUPT: u8 = 3;

const ENABLED: u8 = 1 << 0;
const BOOT_PROCESSOR: u8 = 1 << 1;
/// CPUID leaf 1, EDX: a floating point unit and a local APIC.
const CPU_FEATURES: u32 = 1 << 0 | 1 << 9;
/// Active high, edge-triggered.
const EDGE: u16 = 1 << 0 | 1 << 2;

/// Writes the table, and what leads to it to the last KiB of base memory (§4).
pub fn write(memory: &GuestMemoryMmap, cpus: u8) -> Result<(), GuestMemoryError> {
    memory.write_slice(&table(cpus), GuestAddress(MP_TABLE))?;
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(MP_TABLE as u32).to_le_bytes());
    pointer[8] = (pointer.len() / 16) as u8;
    pointer[9] = VERSION;
    pointer[10] = checksum(&pointer);
    memory.write_slice(&pointer, GuestAddress(LOW_END))
}

fn table(cpus: u8) -> Vec<u8> {
    // An ID that no CPU has, as far as there is one.
    let (bus, ioapic) = (0, cpus);
    let mut entries = Vec::new();
    for id in 0..cpus {
        let flags = ENABLED | if id == 0 { BOOT_PROCESSOR } else { 0 };
        entries.extend([PROCESSOR, id, LOCAL_APIC_VERSION, flags, 0, 0, 0, 0]);
        entries.extend(CPU_FEATURES.to_le_bytes());
        entries.extend([0; 8]);
    }
    entries.extend([BUS, bus]);
    entries.extend(b"ISA   ");
    entries.extend([IO_APIC, ioapic, IOAPIC_VERSION, ENABLED]);
    entries.extend((IOAPIC as u32).to_le_bytes());
    entries.extend([INTERRUPT, 0]);
    entries.extend(EDGE.to_le_bytes());
    entries.extend([bus, SERIAL_GSI as u8, ioapic, 0]);

    // The header (§4.2): no table of the manufacturer's, and none beyond this one.
    let mut table = b"PCMP".to_vec();
    table.extend(((44 + entries.len()) as u16).to_le_bytes());
    table.extend([VERSION, 0]);
    table.extend(b"PCARP   PERICARP    ");
    table.extend([0; 6]);
    table.extend((u16::from(cpus) + 3).to_le_bytes());
    table.extend(LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    table[7] = checksum(&table);
    table
}

/// The byte that makes the sum of all of them zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pointer_leads_to_the_table() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write(&memory, 3).unwrap();
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            bytes
        };
        let pointer = read(LOW_END, 16);
        assert_eq!((&pointer[..4], checksum(&pointer)), (&b"_MP_"[..], 0));
        let at = u32::from_le_bytes(pointer[4..8].try_into().unwrap());
        let length: u16 = memory.read_obj(GuestAddress(u64::from(at) + 4)).unwrap();
        let table = read(at.into(), length.into());
        assert_eq!((&table[..4], checksum(&table)), (&b"PCMP"[..], 0));
        // Three CPUs of 20 bytes each, and three entries of 8.
        assert_eq!((table[34], usize::from(length)), (6, 44 + 3 * 20 + 3 * 8));
        assert_eq!([table[44 + 3], table[64 + 3]], [ENABLED | BOOT_PROCESSOR, ENABLED]);
    }
}
