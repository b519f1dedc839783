//! The configuration space of one function (PCI Local Bus 3.0 §6): bytes, and which of their bits the guest may write.

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

/// Conventional configuration space; there is no extended one without a PCI Express capability.
pub const BYTES: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const FIRST_BAR: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: u8 = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_NO_INTX: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Who a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Base class, subclass, interface.
    pub class: [u8; 3],
    /// Revision.
    pub revision: u8,
}

/// The configuration space of one function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; BYTES],
    writable: [u8; BYTES],
    next_capability: u8,
    last_link: usize,
}

impl ConfigSpace {
    /// A function without BARs and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; BYTES],
            writable: [0; BYTES],
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES,
        };
        let [class, subclass, interface] = identity.class;
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision, interface, subclass, class]);
        space.set(0x2c, &identity.vendor.to_le_bytes());
        space.set(0x2e, &identity.device.to_le_bytes());
        space.allow(COMMAND, &(COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_NO_INTX).to_le_bytes());
        space
    }

    /// A 32-bit memory BAR in register `index`, already at its address below 4 GiB. One of 64 bits would have a second
    /// half, which a guest sizes by two more writes.
    pub fn add_bar(&mut self, index: usize, address: u64, bytes: u32) {
        let at = FIRST_BAR.saturating_add(index.saturating_mul(4));
        let [a, b, c, d, ..] = address.to_le_bytes();
        self.set(at, &[a, b, c, d]);
        self.allow(at, &bytes.wrapping_neg().to_le_bytes());
    }

    /// Adds a capability whose body follows its identifier and link; returns where it lies.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next_capability;
        self.set(self.last_link, &[at]);
        let at = usize::from(at);
        self.set(at, &[id, 0]);
        self.set(at.saturating_add(2), body);
        self.last_link = at.saturating_add(1);
        let end = at.saturating_add(2).saturating_add(body.len()).next_multiple_of(4);
        self.next_capability = u8::try_from(end).unwrap_or(u8::MAX);
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        at
    }

    /// Lets the guest write the bits of `mask` at `at`.
    pub fn allow(&mut self, at: usize, mask: &[u8]) {
        for (bits, mask) in self.writable.iter_mut().skip(at).zip(mask) {
            *bits = *mask;
        }
    }

    /// All of it, as the guest reads it.
    pub fn image(&self) -> &[u8; BYTES] {
        &self.bytes
    }

    /// The guest writes; bits that it may not write stay as they are.
    pub fn write(&mut self, at: usize, data: &[u8]) {
        for ((byte, mask), new) in self.bytes.iter_mut().zip(&self.writable).skip(at).zip(data) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// A 16-bit register.
    pub fn word(&self, at: usize) -> u16 {
        self.bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u16::from_le_bytes(*bytes))
    }

    /// Where a BAR lies, if the function answers to memory accesses at all.
    pub fn bar(&self, index: usize) -> Option<u64> {
        let at = FIRST_BAR.saturating_add(index.saturating_mul(4));
        let bytes: [u8; 4] = *self.bytes.get(at..)?.first_chunk()?;
        (self.word(COMMAND) & COMMAND_MEMORY != 0).then_some(u64::from(u32::from_le_bytes(bytes) & !0xf))
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        for (byte, new) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *byte = *new;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity { vendor: 0x1af4, device: 0x1053, class: [2, 0, 0], revision: 1 };
        let mut space = ConfigSpace::new(identity);
        space.add_bar(0, 0xe010_3000, 0x1000);
        space
    }

    fn dword(space: &ConfigSpace, at: usize) -> u32 {
        u32::from_le_bytes(space.image()[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn a_bar_is_sized_by_writing_ones_and_keeps_its_kind() {
        let mut space = space();
        space.write(0x10, &[0xff; 4]);
        assert_eq!(dword(&space, 0x10), 0xffff_f000);
        space.write(0x10, &0xe010_3004_u32.to_le_bytes());
        assert_eq!(space.bar(0), None, "memory accesses are off");
        space.write(COMMAND, &COMMAND_MEMORY.to_le_bytes());
        assert_eq!(space.bar(0), Some(0xe010_3000));
        for absent in [0x14, 0x18, 0x1c, 0x20, 0x24, 0x30] {
            space.write(absent, &[0xff; 4]);
            assert_eq!(dword(&space, absent), 0);
        }
    }

    #[test]
    fn capabilities_are_linked_and_read_only() {
        let mut space = space();
        let first = space.add_capability(9, &[16, 1, 0]);
        let second = space.add_capability(0x11, &[3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(usize::from(space.image()[CAPABILITIES]), first);
        assert_eq!(usize::from(space.image()[first + 1]), second);
        assert_eq!(space.image()[second + 1], 0);
        assert_eq!(second % 4, 0);
        let before = *space.image();
        for at in (0x34..BYTES).step_by(4) {
            space.write(at, &[0xff; 4]);
        }
        assert_eq!(space.image(), &before);
    }

    #[test]
    fn writes_beyond_the_end_change_nothing() {
        let mut space = space();
        let before = *space.image();
        space.write(254, &[0xff; 8]);
        space.write(usize::MAX, &[0xff; 4]);
        assert_eq!(space.image(), &before);
    }
}
