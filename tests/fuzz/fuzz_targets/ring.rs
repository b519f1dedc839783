//! Any bytes as descriptor table and rings of a disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pericarp_vmm::config::DiskSetup;
use pericarp_vmm::virtio::blk;
use pericarp_vmm::virtio::testing::{Guest, run_once};
use vmm_control::Limits;

/// Where [`Guest::queue`] begins to lay out rings.
const RINGS: u64 = 0x1000;
const LIMIT: usize = 4096;

fuzz_target!(|bytes: &[u8]| {
    let guest = Guest::new();
    let (_, mut disk, _) = blk::device(
        "disk0".into(),
        DiskSetup { capacity_bytes: 1 << 20, queues: 1, extents: vec![], limits: Limits::default() },
        None,
    )
    .unwrap();
    let (_, queue) = guest.queue(16);
    guest.write(RINGS, &bytes[..bytes.len().min(LIMIT)]);
    let _outcome = run_once(&mut disk, &guest, 0, vec![queue]);
});
