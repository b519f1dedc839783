//! The MSI-X table of one function (PCI Local Bus 3.0 §6.8.2): what the guest wrote, and which message a vector sends.
//!
//! The pending bit array reads as zero: a masked vector's signal waits in its eventfd instead.

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

/// Bytes of one table entry.
pub const ENTRY_BYTES: usize = 16;
/// Bits of the message control register that the guest writes.
pub const CONTROL_MASK: u16 = ENABLE | MASK_ALL;

const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;
const VECTOR_CONTROL: usize = 12;
const MASKED: u8 = 1;

/// What a vector writes, and where, to interrupt a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Address.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// A table, and the two bits of message control that rule it.
#[derive(Clone, Debug)]
pub struct Msix {
    table: Vec<[u8; ENTRY_BYTES]>,
    control: u16,
}

impl Msix {
    /// As after a reset: every vector masked.
    pub fn new(vectors: u16) -> Self {
        let mut entry = [0; ENTRY_BYTES];
        entry[VECTOR_CONTROL] = MASKED;
        Self { table: vec![entry; usize::from(vectors)], control: 0 }
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> usize {
        self.table.len()
    }

    /// The table as the guest reads it.
    pub fn image(&self) -> &[u8] {
        self.table.as_flattened()
    }

    /// The guest writes message control.
    pub fn set_control(&mut self, control: u16) {
        self.control = control;
    }

    /// The guest writes the table.
    pub fn write(&mut self, at: usize, data: &[u8]) {
        for (byte, new) in self.table.as_flattened_mut().iter_mut().skip(at).zip(data) {
            *byte = *new;
        }
    }

    /// What a vector sends; `None` if it may not now.
    pub fn message(&self, vector: usize) -> Option<Message> {
        let [a, b, c, d, e, f, g, h, i, j, k, l, control, ..] = *self.table.get(vector)?;
        let open = self.control & ENABLE != 0 && self.control & MASK_ALL == 0 && control & MASKED == 0;
        open.then(|| Message {
            address: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            data: u32::from_le_bytes([i, j, k, l]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_sends_only_while_nothing_masks_it() {
        let mut msix = Msix::new(2);
        msix.write(16, &0xfee0_1000_u64.to_le_bytes());
        msix.write(24, &0x41_u32.to_le_bytes());
        msix.set_control(ENABLE);
        assert_eq!(msix.message(1), None, "masked after reset");
        msix.write(28, &[0; 4]);
        assert_eq!(msix.message(1), Some(Message { address: 0xfee0_1000, data: 0x41 }));
        msix.set_control(ENABLE | MASK_ALL);
        assert_eq!(msix.message(1), None);
        msix.set_control(0);
        assert_eq!(msix.message(1), None);
        assert_eq!(msix.message(2), None, "there is no such vector");
    }

    #[test]
    fn writes_beyond_the_table_change_nothing() {
        let mut msix = Msix::new(1);
        let before = msix.image().to_vec();
        msix.write(16, &[0xff; 8]);
        msix.write(usize::MAX, &[0xff; 8]);
        assert_eq!(msix.image(), before);
    }
}
