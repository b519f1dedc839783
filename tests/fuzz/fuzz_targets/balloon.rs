//! Chains of any shape in each of the balloon's queues: nothing but whole pages that were reported is emptied.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pericarp_vmm::virtio::balloon;
use pericarp_vmm::virtio::testing::{Guest, Part, SEAM, run_once};
use virtio_queue::QueueT;

/// Chains point into this much memory, where two regions meet.
const AREA: u64 = 0x1_0000;
const PAGE: u64 = 4096;

#[derive(Arbitrary, Debug)]
struct Input {
    /// For each queue whether it is ready, and the parts of its chains: place, length, whether it is written.
    queues: [(bool, Vec<Vec<(u16, u16, bool)>>); 5],
}

fuzz_target!(|input: Input| {
    let guest = Guest::new();
    let start = SEAM - AREA / 2;
    guest.write(start, &[7; AREA as usize]);
    let (info, mut device, _) = balloon::device();
    let mut reported = [false; AREA as usize];
    let mut queues = Vec::new();
    for (number, (ready, chains)) in input.queues.iter().enumerate() {
        let (mut driver, mut active) = guest.queue(info.queue_sizes[number]);
        active.queue.set_ready(*ready);
        for chain in chains.iter().take(8) {
            let parts: Vec<Part> = chain
                .iter()
                .take(8)
                .map(|(at, len, writable)| Part {
                    address: start + u64::from(*at),
                    len: u32::from(*len).min((AREA - u64::from(*at)) as u32),
                    writable: *writable,
                })
                .collect();
            if parts.is_empty() || driver.room() < parts.len() {
                break;
            }
            for part in parts.iter().filter(|part| part.writable && *ready && number >= 2) {
                let from = (part.address - start).next_multiple_of(PAGE);
                let to = (part.address - start + u64::from(part.len)) / PAGE * PAGE;
                (from..to).for_each(|at| reported[at as usize] = true);
            }
            driver.post(&parts);
        }
        queues.push(active);
    }
    let outcome = run_once(&mut device, &guest, info.features, queues);
    let after = guest.read(start, AREA as usize);
    for (byte, reported) in after.iter().zip(reported) {
        assert!(*byte == 7 || reported && *byte == 0);
        // Unless the device gave up on its guest before it was done.
        assert!(outcome.is_err() || *byte == if reported { 0 } else { 7 });
    }
});
