//! Chains of any shape and requests of any content to the memory device, between sizes that the host asks for.
#![no_main]

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pericarp_vmm::memory::{BLOCK, CHUNK};
use pericarp_vmm::virtio::mem::{self, Backing};
use pericarp_vmm::virtio::testing::{Guest, Idling, Part, run_once};

const START: u64 = 5 << 30;
const BYTES: u64 = 4 * CHUNK;
const REQUESTS: u64 = 0x20_0000;
const RESPONSES: u64 = 0x30_0000;

/// Chunks that the guest can reach.
#[derive(Clone, Default)]
struct Host(Arc<Mutex<BTreeSet<u64>>>);

impl Backing for Host {
    fn open(&mut self, chunk: u64) -> io::Result<()> {
        assert!((START..START + BYTES).contains(&chunk) && chunk % CHUNK == 0);
        assert!(self.0.lock().unwrap().insert(chunk));
        Ok(())
    }

    fn close(&mut self, chunk: u64) -> io::Result<()> {
        assert!(self.0.lock().unwrap().remove(&chunk));
        Ok(())
    }

    fn discard(&mut self, range: Range<u64>) -> io::Result<()> {
        assert!(START <= range.start && range.start < range.end && range.end <= START + BYTES);
        Ok(())
    }
}

#[derive(Arbitrary, Debug)]
enum Request {
    /// Type, block and count of blocks.
    Likely(u8, u16, u16),
    Any([u8; 24]),
    /// Parts of a chain: address, length, whether it is written.
    Chain(Vec<(u16, u16, bool)>),
}

#[derive(Arbitrary, Debug)]
struct Input {
    /// Blocks that the host asks for.
    size: u16,
    requests: Vec<Request>,
}

fuzz_target!(|input: Input| {
    let guest = Guest::new();
    let host = Host::default();
    let (info, device, handle) = mem::device((START, BYTES), Box::new(host.clone()), || {}).unwrap();
    let size = u64::from(input.size) * BLOCK;
    let idling = Idling::start(device);
    let asked = handle.request(size).is_ok();
    assert_eq!(asked, size <= BYTES);
    let mut device = idling.stop();
    let (mut driver, active) = guest.queue(info.queue_sizes[0]);
    for (number, request) in (0_u64..).zip(&input.requests) {
        let (from, to) = (REQUESTS + 64 * number, RESPONSES + 64 * number);
        let bytes = match request {
            Request::Likely(kind, block, blocks) => {
                let mut bytes = [0; 24];
                bytes[0] = kind % 5;
                bytes[8..16].copy_from_slice(&(START + u64::from(*block) * BLOCK).to_le_bytes());
                bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
                bytes
            }
            Request::Any(bytes) => *bytes,
            Request::Chain(_) => [0; 24],
        };
        guest.write(from, &bytes);
        let parts: Vec<Part> = match request {
            Request::Chain(parts) => parts
                .iter()
                .take(6)
                .map(|(at, len, writable)| Part {
                    address: REQUESTS + u64::from(*at),
                    len: u32::from(*len),
                    writable: *writable,
                })
                .collect(),
            _ => vec![Part::readable(from, 24), Part::writable(to, 10)],
        };
        if parts.is_empty() || driver.room() < parts.len() {
            break;
        }
        driver.post(&parts);
    }
    let _outcome = run_once(&mut device, &guest, info.features, vec![active]);
    let idling = Idling::start(device);
    let plugged = handle.look().unwrap();
    let open = host.0.lock().unwrap().len() as u64;
    assert!(plugged.bytes <= size && plugged.bytes <= open * CHUNK && open * BLOCK <= plugged.bytes);
    idling.stop();
});
