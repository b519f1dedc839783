//! The registers through which a driver and a virtio device agree (virtio 1.2 §4.1.4.3): a pure state machine.
//!
//! ```text
//! reset → ACKNOWLEDGE → DRIVER → features → FEATURES_OK → queues → DRIVER_OK ⇒ Start
//!   ↑                                                                   │
//!   └───────────────────────── 0 is written ⇒ Reset ────────────────────┘
//! ```

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

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

/// Length of `struct virtio_pci_common_cfg` without the fields of features not offered here.
pub const BYTES: usize = 56;
/// A queue or configuration change without a vector.
pub const NO_VECTOR: u16 = 0xffff;

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;

const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;
const NEEDS_RESET: u8 = 64;

/// What the driver's write asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing beyond the registers.
    None,
    /// Serve the queues.
    Start,
    /// Stop serving them, and then call [`Registers::reset`].
    Reset,
}

#[derive(Clone, Copy, Debug)]
struct QueueRegisters {
    most: u16,
    size: u16,
    vector: u16,
    enabled: bool,
    /// Descriptor table, available ring, used ring.
    rings: [u64; 3],
}

impl QueueRegisters {
    fn new(most: u16) -> Self {
        Self { most, size: most, vector: NO_VECTOR, enabled: false, rings: [0; 3] }
    }
}

/// The registers of one device.
#[derive(Clone, Debug)]
pub struct Registers {
    offered: u64,
    accepted: u64,
    offered_select: u32,
    accepted_select: u32,
    config_vector: u16,
    generation: u8,
    vectors: u16,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// A queue as the driver set it up.
#[derive(Debug)]
pub struct QueueSetup {
    /// The rings; not ready if the driver left the queue off.
    pub queue: Queue,
    /// Its vector, [`NO_VECTOR`] for none.
    pub vector: u16,
}

impl Registers {
    /// As after a reset. `features` are those of the device; those of the transport are added.
    pub fn new(features: u64, queue_sizes: &[u16], vectors: u16) -> Self {
        Self {
            offered: features | VERSION_1 | EVENT_IDX,
            accepted: 0,
            offered_select: 0,
            accepted_select: 0,
            config_vector: NO_VECTOR,
            generation: 0,
            vectors,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|most| QueueRegisters::new(*most)).collect(),
        }
    }

    /// Back to the beginning.
    pub fn reset(&mut self) {
        self.accepted = 0;
        (self.offered_select, self.accepted_select) = (0, 0);
        self.config_vector = NO_VECTOR;
        self.status = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.most);
        }
    }

    /// The device cannot go on until it is reset (virtio 1.2 §2.1.1).
    pub fn set_needs_reset(&mut self) {
        self.status |= NEEDS_RESET;
    }

    /// What the host changes of the device's configuration has been changed (§4.1.4.3.1).
    pub fn next_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// Features that the driver accepted.
    pub fn features(&self) -> u64 {
        self.accepted
    }

    /// Vector of configuration changes, [`NO_VECTOR`] for none.
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// The queues as set up, `None` if one that the driver enabled lies outside guest memory.
    pub fn queues(&self, memory: &GuestMemoryMmap) -> Option<Vec<QueueSetup>> {
        let setup = |registers: &QueueRegisters| {
            let mut queue = Queue::new(registers.most).ok()?;
            if registers.enabled {
                let [descriptors, available, used] = registers.rings.map(halves);
                queue.set_size(registers.size);
                queue.set_desc_table_address(descriptors.0, descriptors.1);
                queue.set_avail_ring_address(available.0, available.1);
                queue.set_used_ring_address(used.0, used.1);
                queue.set_event_idx(self.accepted & EVENT_IDX != 0);
                queue.set_ready(true);
                if !queue.is_valid(memory) {
                    return None;
                }
            }
            Some(QueueSetup { queue, vector: registers.vector })
        };
        self.queues.iter().map(setup).collect()
    }

    /// The registers as the driver reads them.
    pub fn image(&self) -> [u8; BYTES] {
        let mut image = [0; BYTES];
        let queue = self.queue().copied().unwrap_or(QueueRegisters { vector: NO_VECTOR, ..QueueRegisters::new(0) });
        let [descriptors, available, used] = queue.rings.map(u64::to_le_bytes);
        let count = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        put(&mut image, 0x00, &self.offered_select.to_le_bytes());
        put(&mut image, 0x04, &window(self.offered, self.offered_select).to_le_bytes());
        put(&mut image, 0x08, &self.accepted_select.to_le_bytes());
        put(&mut image, 0x0c, &window(self.accepted, self.accepted_select).to_le_bytes());
        put(&mut image, 0x10, &self.config_vector.to_le_bytes());
        put(&mut image, 0x12, &count.to_le_bytes());
        put(&mut image, 0x14, &[self.status]);
        put(&mut image, 0x15, &[self.generation]);
        put(&mut image, 0x16, &self.queue_select.to_le_bytes());
        put(&mut image, 0x18, &queue.size.to_le_bytes());
        put(&mut image, 0x1a, &queue.vector.to_le_bytes());
        put(&mut image, 0x1c, &u16::from(queue.enabled).to_le_bytes());
        put(&mut image, 0x1e, &self.queue_select.to_le_bytes());
        put(&mut image, 0x20, &descriptors);
        put(&mut image, 0x28, &available);
        put(&mut image, 0x30, &used);
        image
    }

    /// The driver writes one register, or half of one of 64 bits (§4.1.3.1).
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Action {
        match (offset, data) {
            (0x00, &[a, b, c, d]) => self.offered_select = u32::from_le_bytes([a, b, c, d]),
            (0x08, &[a, b, c, d]) => self.accepted_select = u32::from_le_bytes([a, b, c, d]),
            (0x0c, &[a, b, c, d]) => self.accept(u32::from_le_bytes([a, b, c, d])),
            (0x10, &[a, b]) => self.config_vector = self.checked_vector(u16::from_le_bytes([a, b])),
            (0x14, &[status]) => return self.set_status(status),
            (0x16, &[a, b]) => self.queue_select = u16::from_le_bytes([a, b]),
            (0x18..BYTES, data) => self.write_queue(offset, data),
            _ => {}
        }
        Action::None
    }

    fn accept(&mut self, bits: u32) {
        let shift = match self.accepted_select {
            0 => 0,
            1 => 32_u32,
            _ => return,
        };
        if self.status & FEATURES_OK == 0 {
            let keep = self.accepted & !(u64::from(u32::MAX) << shift);
            self.accepted = keep | u64::from(bits) << shift;
        }
    }

    fn set_status(&mut self, status: u8) -> Action {
        if status == 0 {
            return Action::Reset;
        }
        let mut status = status | self.status & NEEDS_RESET;
        let acceptable = self.accepted & !self.offered == 0 && self.accepted & VERSION_1 != 0;
        if !acceptable {
            // The driver reads FEATURES_OK back to learn that its choice is refused (§3.1.1).
            status &= !FEATURES_OK;
        }
        let starts = status & DRIVER_OK != 0 && status & FEATURES_OK != 0 && self.status & DRIVER_OK == 0;
        self.status = status;
        if starts { Action::Start } else { Action::None }
    }

    fn write_queue(&mut self, offset: usize, data: &[u8]) {
        let checked = match data {
            &[a, b] => self.checked_vector(u16::from_le_bytes([a, b])),
            _ => NO_VECTOR,
        };
        let running = self.status & DRIVER_OK != 0;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        match (offset, data) {
            (0x1a, &[_, _]) => queue.vector = checked,
            // A queue in use stays as it is (§4.1.4.3.2).
            _ if queue.enabled || running => {}
            (0x18, &[a, b]) => {
                let size = u16::from_le_bytes([a, b]);
                if size.is_power_of_two() && size <= queue.most {
                    queue.size = size;
                }
            }
            (0x1c, &[1, 0]) => queue.enabled = true,
            (0x20..0x38, data) => {
                let mut bytes = queue.rings.map(u64::to_le_bytes);
                put(bytes.as_flattened_mut(), offset.saturating_sub(0x20), data);
                queue.rings = bytes.map(u64::from_le_bytes);
            }
            _ => {}
        }
    }

    fn checked_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors { vector } else { NO_VECTOR }
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }
}

fn window(features: u64, select: u32) -> u32 {
    let [low, high] = [features & u64::from(u32::MAX), features >> 32_u32];
    u32::try_from(match select {
        0 => low,
        1 => high,
        _ => 0,
    })
    .unwrap_or(0)
}

fn halves(value: u64) -> (Option<u32>, Option<u32>) {
    (Some(window(value, 0)), Some(window(value, 1)))
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    for (byte, new) in image.iter_mut().skip(at).zip(bytes) {
        *byte = *new;
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    fn registers() -> Registers {
        Registers::new(1 << 5, &[256, 128], 3)
    }

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    fn word(registers: &Registers, at: usize) -> u16 {
        u16::from_le_bytes(registers.image()[at..at + 2].try_into().unwrap())
    }

    /// What a driver does up to FEATURES_OK.
    fn negotiate(registers: &mut Registers, features: u64) {
        for status in [1, 3] {
            assert_eq!(registers.write(0x14, &[status]), Action::None);
        }
        for (select, bits) in [(0_u32, features), (1, features >> 32)] {
            registers.write(0x08, &select.to_le_bytes());
            registers.write(0x0c, &u32::try_from(bits & 0xffff_ffff).unwrap().to_le_bytes());
        }
        assert_eq!(registers.write(0x14, &[11]), Action::None);
    }

    #[test]
    fn a_driver_sees_that_the_configuration_has_changed() {
        let mut registers = registers();
        let before = registers.image()[0x15];
        registers.next_generation();
        assert_ne!(registers.image()[0x15], before);
        registers.reset();
        assert_ne!(registers.image()[0x15], before, "a reset does not take the change back");
    }

    #[test]
    fn a_driver_reads_every_feature_offered_and_no_more() {
        let mut registers = registers();
        let mut features = 0;
        for select in 0..4_u32 {
            registers.write(0x00, &select.to_le_bytes());
            let bits = u32::from_le_bytes(registers.image()[4..8].try_into().unwrap());
            features |= u128::from(bits) << (32 * select);
        }
        assert_eq!(features, u128::from(VERSION_1 | EVENT_IDX | 1 << 5));
    }

    #[test]
    fn features_not_offered_or_without_version_1_are_refused() {
        for (features, status) in [(VERSION_1, 11), (VERSION_1 | 1 << 5, 11), (VERSION_1 | 1 << 6, 3), (1 << 5, 3)] {
            let mut registers = registers();
            negotiate(&mut registers, features);
            assert_eq!(registers.image()[0x14], status, "{features:#x}");
        }
    }

    #[test]
    fn a_device_starts_once_and_resets_whenever_asked() {
        let mut registers = registers();
        assert_eq!(registers.write(0x14, &[15]), Action::None, "no features were agreed on");
        registers.reset();
        negotiate(&mut registers, VERSION_1 | EVENT_IDX);
        assert_eq!(registers.write(0x14, &[15]), Action::Start);
        assert_eq!(registers.write(0x14, &[15]), Action::None);
        registers.set_needs_reset();
        assert_eq!(registers.write(0x14, &[15]), Action::None);
        assert_eq!(registers.image()[0x14], 15 | NEEDS_RESET);
        assert_eq!(registers.write(0x14, &[0]), Action::Reset);
        registers.reset();
        assert_eq!(registers.image()[0x14], 0);
    }

    #[test]
    fn a_queue_is_set_up_as_written_and_stays_so_once_enabled() {
        let mut registers = registers();
        negotiate(&mut registers, VERSION_1 | EVENT_IDX);
        registers.write(0x16, &1_u16.to_le_bytes());
        registers.write(0x18, &64_u16.to_le_bytes());
        registers.write(0x18, &63_u16.to_le_bytes());
        registers.write(0x18, &256_u16.to_le_bytes());
        registers.write(0x1a, &2_u16.to_le_bytes());
        for (at, address) in [(0x20, 0x1000_u32), (0x28, 0x2000), (0x30, 0x3000)] {
            registers.write(at, &address.to_le_bytes());
            registers.write(at + 4, &[0; 4]);
        }
        registers.write(0x1c, &1_u16.to_le_bytes());
        registers.write(0x20, &0xffff_u32.to_le_bytes());
        registers.write(0x18, &2_u16.to_le_bytes());
        let queues = registers.queues(&memory()).unwrap();
        assert!(!queues[0].queue.ready());
        let queue = &queues[1];
        assert_eq!((queue.queue.size(), queue.vector, queue.queue.desc_table()), (64, 2, 0x1000));
        assert_eq!((queue.queue.avail_ring(), queue.queue.used_ring()), (0x2000, 0x3000));
        assert!(queue.queue.event_idx_enabled());
    }

    #[test]
    fn a_queue_outside_guest_memory_is_refused() {
        let mut registers = registers();
        registers.write(0x24, &[0xff; 4]);
        registers.write(0x1c, &1_u16.to_le_bytes());
        assert!(registers.queues(&memory()).is_none());
    }

    #[test]
    fn vectors_and_queues_that_do_not_exist_are_not_there() {
        let mut registers = registers();
        registers.write(0x10, &3_u16.to_le_bytes());
        assert_eq!(word(&registers, 0x10), NO_VECTOR);
        registers.write(0x10, &2_u16.to_le_bytes());
        assert_eq!(word(&registers, 0x10), 2);
        registers.write(0x16, &2_u16.to_le_bytes());
        registers.write(0x1c, &1_u16.to_le_bytes());
        assert_eq!((word(&registers, 0x18), word(&registers, 0x1a), word(&registers, 0x1c)), (0, NO_VECTOR, 0));
    }

    #[test]
    fn odd_accesses_change_nothing() {
        let mut registers = registers();
        let before = registers.image();
        for offset in 0..BYTES + 16 {
            for length in [0, 3, 5, 8] {
                if (0x20..0x38).contains(&offset) {
                    continue;
                }
                assert_eq!(registers.write(offset, &vec![0xff; length]), Action::None);
            }
        }
        assert_eq!(registers.image(), before);
    }
}
