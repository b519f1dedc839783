//! Chains of any shape and content for a disk of two queues.
#![no_main]

use std::fs::File;
use std::sync::OnceLock;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pericarp_vmm::config::DiskSetup;
use pericarp_vmm::virtio::blk;
use pericarp_vmm::virtio::testing::{Guest, Part, SEAM, run_once};
use vmm_control::{Extent, Limits};

/// Requests are built in this much memory, where two regions meet.
const AREA: u64 = 4096;

#[derive(Arbitrary, Debug)]
struct Input {
    /// What the memory holds, from its middle on.
    memory: Vec<u8>,
    /// Requests with a header of their own, which a random one seldom has.
    chains: Vec<(Option<(u8, u16)>, Vec<(u16, u16, bool)>)>,
    indirect: bool,
}

/// Two files, made once: one to write and one only to read.
fn files() -> &'static [File; 2] {
    static FILES: OnceLock<[File; 2]> = OnceLock::new();
    FILES.get_or_init(|| [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()])
}

fuzz_target!(|input: Input| {
    let guest = Guest::new();
    let extent = |first_sector, read_only| Extent { first_sector, sectors: 64, read_only, file: -1 };
    let [scratch, image] = files().each_ref().map(|file| file.try_clone().unwrap());
    let extents = vec![(extent(0, false), scratch), (extent(64, true), image)];
    let (info, mut disk, _) = blk::device(
        "disk0".into(),
        DiskSetup { capacity_bytes: 160 * 512, queues: 2, extents, limits: Limits::default() },
        blk::Ring::new(2),
    )
    .unwrap();
    guest.write(SEAM - AREA / 2, &input.memory[..input.memory.len().min(4096)]);
    let (mut drivers, queues): (Vec<_>, Vec<_>) = (0..2).map(|_| guest.queue(64)).unzip();
    for (n, (header, parts)) in input.chains.iter().enumerate() {
        let driver = &mut drivers[n % 2];
        let mut chain = Vec::new();
        if let Some((kind, sector)) = header {
            let address = 0x10_0000 + 64 * n as u64;
            guest.write(address, &u32::from(*kind).to_le_bytes());
            guest.write(address + 8, &u64::from(*sector).to_le_bytes());
            chain.push(Part::readable(address, 16));
        }
        chain.extend(parts.iter().take(8).map(|(at, len, writable)| Part {
            address: SEAM - AREA / 2 + u64::from(*at),
            len: u32::from(*len),
            writable: *writable,
        }));
        if chain.is_empty() || driver.room() < chain.len() {
            break;
        }
        if input.indirect && n == 0 {
            driver.post_indirect(&chain)
        } else {
            driver.post(&chain)
        };
    }
    let _outcome = run_once(&mut disk, &guest, info.features, queues);
});
