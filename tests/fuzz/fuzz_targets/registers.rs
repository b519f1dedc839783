//! Any writes to a PCI function's configuration space, its MSI-X table and its virtio registers.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pericarp_vmm::pci::config::{ConfigSpace, Identity};
use pericarp_vmm::pci::msix::Msix;
use pericarp_vmm::virtio::registers::Registers;
use pericarp_vmm::virtio::testing::Guest;

const BAR: u64 = 0xe010_0000;
const BAR_BYTES: u32 = 0x8000;
const VECTORS: u16 = 2;
const MAX_QUEUE: u16 = 128;

#[derive(Arbitrary, Debug)]
enum Write {
    Config(u16, Vec<u8>),
    Table(u16, Vec<u8>),
    Control(u16),
    Register(u8, Vec<u8>),
    Reset,
}

fuzz_target!(|writes: Vec<Write>| {
    let guest = Guest::new();
    let memory = &*guest.memory;
    let identity = Identity { vendor: 0x1af4, device: 0x1042, class: [1, 0x80, 0], revision: 1 };
    let mut config = ConfigSpace::new(identity);
    config.add_bar(0, BAR, BAR_BYTES);
    config.add_capability(0x11, &[0; 10]);
    let untouched = config.image()[..4].to_vec();
    let mut msix = Msix::new(VECTORS);
    let mut registers = Registers::new(0, &[MAX_QUEUE, MAX_QUEUE], VECTORS);
    for write in writes.iter().take(256) {
        match write {
            Write::Config(at, data) => config.write(usize::from(*at), data),
            Write::Table(at, data) => msix.write(usize::from(*at), data),
            Write::Control(control) => msix.set_control(*control),
            Write::Register(at, data) => drop(registers.write(usize::from(*at), data)),
            Write::Reset => registers.reset(),
        }
        // Who the function is does not change, and its BAR stays aligned to its length.
        assert_eq!(config.image()[..4], untouched);
        assert!(config.bar(0).is_none_or(|address| address % u64::from(BAR_BYTES) == 0));
        for vector in 0..=usize::from(VECTORS) {
            assert!(vector < msix.vectors() || msix.message(vector).is_none());
        }
        let _image = registers.image();
        for setup in registers.queues(memory).into_iter().flatten() {
            use virtio_queue::QueueT;
            assert!(setup.queue.size() <= MAX_QUEUE && (!setup.queue.ready() || setup.queue.is_valid(memory)));
            assert!(setup.vector == u16::MAX || setup.vector < VECTORS);
        }
    }
});
