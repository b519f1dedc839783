use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::region::Answer;
use super::*;
use crate::memory::{BLOCK, CHUNK};
use crate::virtio::testing::{DriverQueue, Guest, HANG, Idling, Part, Running};

const START: u64 = 5 << 30;
const BYTES: u64 = 8 * CHUNK;
const PER_CHUNK: u16 = (CHUNK / BLOCK) as u16;

const REQUEST: u64 = 0x20_0000;
const RESPONSE: u64 = 0x20_1000;

// Types of request.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// A host that remembers what the guest can reach and what was given back.
#[derive(Clone, Default)]
struct Host(Arc<Mutex<Told>>);

#[derive(Default)]
struct Told {
    open: BTreeSet<u64>,
    discarded: Vec<Range<u64>>,
    /// How many more chunks it opens.
    refuses_after: Option<usize>,
}

impl Backing for Host {
    fn open(&mut self, chunk: u64) -> io::Result<()> {
        let mut told = self.0.lock().unwrap();
        match &mut told.refuses_after {
            Some(0) => return Err(io::Error::from_raw_os_error(libc::ENOMEM)),
            Some(left) => *left -= 1,
            None => {}
        }
        assert!((START..START + BYTES).contains(&chunk) && chunk.is_multiple_of(CHUNK));
        assert!(told.open.insert(chunk), "opened twice");
        Ok(())
    }

    fn close(&mut self, chunk: u64) -> io::Result<()> {
        assert!(self.0.lock().unwrap().open.remove(&chunk), "was not open");
        Ok(())
    }

    fn discard(&mut self, range: Range<u64>) -> io::Result<()> {
        assert!(START <= range.start && range.start < range.end && range.end <= START + BYTES);
        self.0.lock().unwrap().discarded.push(range);
        Ok(())
    }
}

impl Host {
    fn open_chunks(&self) -> Vec<u64> {
        self.0.lock().unwrap().open.iter().map(|chunk| (chunk - START) / CHUNK).collect()
    }
}

fn request(kind: u16, address: u64, blocks: u16) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

/// A region of which `bytes` are asked for.
fn region(bytes: u64) -> (Region, Host, impl FnMut(&mut Region, u16, u64, u16) -> Answer) {
    let mut region = Region::new(START, BYTES);
    assert!(region.request(bytes));
    let host = Host::default();
    let mut backing = host.clone();
    let serve = move |region: &mut Region, kind, block: u64, blocks| {
        region.serve(&request(kind, START + block * BLOCK, blocks), &mut backing).unwrap()
    };
    (region, host, serve)
}

#[test]
fn no_more_is_plugged_than_was_asked_for() {
    let (mut region, host, mut serve) = region(4 * BLOCK);
    assert_eq!(serve(&mut region, PLUG, 0, 5), Answer::Nack);
    assert!(host.open_chunks().is_empty());
    assert_eq!(serve(&mut region, PLUG, 0, 3), Answer::Ack);
    assert_eq!(serve(&mut region, PLUG, 10, 2), Answer::Nack);
    assert!(!region.is_settled());
    assert_eq!(serve(&mut region, PLUG, 10, 1), Answer::Ack);
    assert!(region.is_settled());
    assert_eq!((region.plugged_bytes(), host.open_chunks()), (4 * BLOCK, vec![0]));
    assert_eq!(serve(&mut region, PLUG, 12, 1), Answer::Nack);
}

#[test]
fn what_is_unplugged_goes_back_and_a_chunk_is_closed_with_its_last_block() {
    let (mut region, host, mut serve) = region(2 * CHUNK);
    assert_eq!(serve(&mut region, PLUG, 0, 2 * PER_CHUNK), Answer::Ack);
    assert_eq!(host.open_chunks(), [0, 1]);
    assert_eq!(serve(&mut region, UNPLUG, 0, 1), Answer::Ack);
    assert_eq!(host.open_chunks(), [0, 1], "the others of the chunk are still plugged");
    assert_eq!(serve(&mut region, UNPLUG, 1, PER_CHUNK), Answer::Ack);
    assert_eq!(host.open_chunks(), [1]);
    let discarded = host.0.lock().unwrap().discarded.clone();
    assert_eq!(discarded, [START..START + BLOCK, START + BLOCK..START + CHUNK + BLOCK]);
    assert_eq!(region.plugged_bytes(), CHUNK - BLOCK);
}

#[test]
fn all_is_unplugged_at_once() {
    let (mut region, host, mut serve) = region(4 * CHUNK);
    assert_eq!(serve(&mut region, PLUG, 3, 1), Answer::Ack);
    assert_eq!(serve(&mut region, PLUG, 200, 1), Answer::Ack);
    assert!(region.request(0));
    assert_eq!(serve(&mut region, STATE, 4 * u64::from(PER_CHUNK), 1), Answer::State(1), "as usable as before");
    assert_eq!(serve(&mut region, UNPLUG_ALL, 0, 0), Answer::Ack);
    assert!(host.open_chunks().is_empty() && region.is_settled());
    assert_eq!(serve(&mut region, STATE, 4 * u64::from(PER_CHUNK), 1), Answer::Error, "usable no more");
}

#[test]
fn the_state_of_a_range_is_told() {
    let (mut region, _, mut serve) = region(CHUNK);
    assert_eq!(serve(&mut region, PLUG, 2, 2), Answer::Ack);
    for (block, blocks, state) in [(0, 2, 1), (2, 2, 0), (1, 2, 2), (4, 100, 1)] {
        assert_eq!(serve(&mut region, STATE, block, blocks), Answer::State(state), "{blocks} from {block}");
    }
}

#[test]
fn what_makes_no_sense_is_an_error_and_changes_nothing() {
    let (mut region, host, mut serve) = region(CHUNK);
    assert_eq!(serve(&mut region, PLUG, 0, 2), Answer::Ack);
    for (kind, block, blocks) in [
        (PLUG, 1, 1),
        (PLUG, 1, 2),
        (UNPLUG, 1, 2),
        (UNPLUG, 5, 1),
        (PLUG, 0, 0),
        (STATE, 2 * u64::from(PER_CHUNK), 1),
        (PLUG, u64::from(PER_CHUNK), PER_CHUNK + 1),
        (PLUG, 1 << 40, 1),
        (4, 0, 1),
    ] {
        assert_eq!(serve(&mut region, kind, block, blocks), Answer::Error, "{kind} {block} {blocks}");
    }
    let mut backing = host.clone();
    for address in [0, START - BLOCK, START + 1, START + 4096, u64::MAX, u64::MAX - BLOCK + 1] {
        assert_eq!(region.serve(&request(PLUG, address, 1), &mut backing).unwrap(), Answer::Error, "{address:#x}");
    }
    assert_eq!((region.plugged_bytes(), host.open_chunks()), (2 * BLOCK, vec![0]));
}

#[test]
fn a_host_that_cannot_is_asked_again() {
    let (mut region, host, mut serve) = region(3 * CHUNK);
    host.0.lock().unwrap().refuses_after = Some(1);
    assert_eq!(serve(&mut region, PLUG, 0, 3 * PER_CHUNK), Answer::Busy);
    assert_eq!((region.plugged_bytes(), host.open_chunks()), (0, vec![]), "nothing is left half open");
    host.0.lock().unwrap().refuses_after = None;
    assert_eq!(serve(&mut region, PLUG, 0, 3 * PER_CHUNK), Answer::Ack);
    assert_eq!(host.open_chunks(), [0, 1, 2]);
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let mut region = Region::new(START, BYTES);
    assert!(!region.request(BYTES + BLOCK) && !region.request(BLOCK / 2) && !region.request(u64::MAX));
    assert!(region.is_settled());
    assert!(region.request(BYTES) && region.request(0));
}

#[test]
fn the_configuration_is_laid_out_as_the_standard_says() {
    let mut region = Region::new(START, BYTES);
    assert!(region.request(3 * BLOCK));
    let config = region.config();
    let field = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap());
    assert_eq!(config.len(), 56);
    assert_eq!([field(0), field(8), field(16), field(24)], [BLOCK, 0, START, BYTES]);
    assert_eq!([field(32), field(40), field(48)], [2 * CHUNK, 0, 3 * BLOCK]);
}

fn rig() -> (Guest, DriverQueue, Running<Mem>, Handle, LiveConfig, Receiver<()>) {
    let (sender, settled) = channel();
    let (info, backend, handle) =
        device((START, BYTES), Box::new(Host::default()), move || sender.send(()).unwrap()).unwrap();
    let DeviceConfig::Live(config) = info.config else { panic!("it changes") };
    let guest = Guest::new();
    let (driver, active) = guest.queue(info.queue_sizes[0]);
    let running = Running::start(backend, &guest, 0, vec![active]);
    (guest, driver, running, handle, config, settled)
}

fn ask(guest: &Guest, driver: &mut DriverQueue, request: [u8; REQUEST_BYTES]) -> u16 {
    guest.write(REQUEST, &request);
    driver.post(&[Part::readable(REQUEST, 24), Part::writable(RESPONSE, 10)]);
    driver.kick();
    assert_eq!(driver.wait_used().1, 10);
    u16::from_le_bytes(guest.read(RESPONSE, 2).try_into().unwrap())
}

#[test]
fn a_driver_plugs_what_the_host_asks_for() {
    let (guest, mut driver, running, handle, config, settled) = rig();
    let field =
        |at: usize| u64::from_le_bytes(DeviceConfig::Live(config.clone()).bytes()[at..at + 8].try_into().unwrap());
    assert_eq!(handle.request(2 * CHUNK).unwrap(), Plugged { bytes: 0, settled: false });
    assert_eq!((field(40), field(48)), (0, 2 * CHUNK));
    assert_eq!(ask(&guest, &mut driver, request(PLUG, START, PER_CHUNK)), 0);
    assert_eq!(field(40), CHUNK, "as soon as the driver hears of it");
    assert!(settled.try_recv().is_err());
    assert_eq!(ask(&guest, &mut driver, request(PLUG, START + CHUNK, PER_CHUNK)), 0);
    settled.recv_timeout(HANG).unwrap();
    assert_eq!(handle.look().unwrap(), Plugged { bytes: 2 * CHUNK, settled: true });
    assert_eq!(ask(&guest, &mut driver, request(PLUG, START + 2 * CHUNK, 1)), 1);
    assert!(matches!(handle.request(BYTES + BLOCK), Err(RequestError::Refused)));
    assert_eq!(handle.request(0).unwrap(), Plugged { bytes: 2 * CHUNK, settled: false });
    assert_eq!(ask(&guest, &mut driver, request(UNPLUG_ALL, 0, 0)), 0);
    settled.recv_timeout(HANG).unwrap();
    assert_eq!(handle.counters(), [("requests", 4), ("refused", 1)]);
    running.stop();
}

#[test]
fn a_device_without_a_driver_is_asked_too() {
    let (_, backend, handle) = device((START, BYTES), Box::new(Host::default()), || {}).unwrap();
    let idling = Idling::start(backend);
    assert_eq!(handle.request(CHUNK).unwrap(), Plugged { bytes: 0, settled: false });
    idling.stop();
}

#[test]
fn requests_that_are_cut_short_end_the_device() {
    for parts in [
        vec![Part::readable(REQUEST, 23), Part::writable(RESPONSE, 10)],
        vec![Part::readable(REQUEST, 24), Part::writable(RESPONSE, 9)],
        vec![Part::readable(REQUEST, 24)],
        vec![Part::writable(RESPONSE, 10)],
    ] {
        let (_guest, mut driver, running, _, _, _) = rig();
        driver.post(&parts);
        driver.kick();
        assert!(matches!(running.fail(), DeviceError::Driver(_)));
    }
}

proptest! {
    /// Whatever the guest asks for, it has no more than was requested, and reaches only chunks in which it has something.
    #[test]
    fn any_requests_keep_the_promise(
        steps in prop::collection::vec((0_u16..6, 0_u64..520, 0_u16..200, 0_u64..600), 1..60)
    ) {
        let (mut region, host, mut serve) = region(CHUNK);
        let mut most = CHUNK;
        for (kind, block, blocks, size) in steps {
            if kind == 5 {
                let _refused = region.request(size * BLOCK);
                most = most.max(size * BLOCK);
            } else {
                serve(&mut region, kind, block, blocks);
            }
            let open = host.open_chunks().len() as u64;
            prop_assert!(region.plugged_bytes() <= most);
            prop_assert!(open * CHUNK >= region.plugged_bytes());
            prop_assert!(open <= region.plugged_bytes() / BLOCK, "a chunk without a block is open");
        }
    }
}
