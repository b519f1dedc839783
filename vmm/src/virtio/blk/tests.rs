//! The whole device behind its queue, driven by a fake guest.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use vmm_control::{Limits, POD_DISK_BYTES};

use super::request::Request;
use super::*;
use crate::virtio::buffers::{Buffers, gather};
use crate::virtio::testing::{DriverQueue, Guest, Idling, Part, Running, SEAM};

const HEADER: u64 = 0x10_0000;
const STATUS: u64 = 0x11_0000;
/// Data lies across the seam of two memory regions.
const DATA: u64 = SEAM - 0x1200;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const PENDING: u8 = 0xff;

fn setup(capacity_bytes: u64, extents: Vec<(Extent, File)>) -> DiskSetup {
    DiskSetup { capacity_bytes, queues: 1, extents, limits: Limits::default() }
}

fn extent(first_sector: u64, sectors: u64, read_only: bool) -> Extent {
    Extent { first_sector, sectors, read_only, file: -1 }
}

/// A file of `len` bytes, none of them zero.
fn file(len: usize) -> File {
    let mut file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..len).map(|n| u8::try_from(n % 251).unwrap() + 1).collect();
    file.write_all(&bytes).unwrap();
    file
}

fn content(file: &File, start: u64, len: usize) -> Vec<u8> {
    let mut file = file.try_clone().unwrap();
    let mut bytes = vec![0; len];
    file.seek(SeekFrom::Start(start)).unwrap();
    file.read_exact(&mut bytes).unwrap();
    bytes
}

fn pod_disk(extents: Vec<(Extent, File)>) -> Result<(DeviceInfo, Blk, Handle), DiskError> {
    device("disk0".into(), setup(POD_DISK_BYTES, extents), Some(Ring::new(1).expect("this host's kernel has io_uring")))
}

struct Rig {
    guest: Guest,
    driver: DriverQueue,
    running: Running<Blk>,
    handle: Handle,
}

impl Rig {
    fn new(extents: Vec<(Extent, File)>) -> Self {
        Self::of(pod_disk(extents).unwrap())
    }

    fn of((info, backend, handle): (DeviceInfo, Blk, Handle)) -> Self {
        let guest = Guest::new();
        let (driver, active) = guest.queue(info.queue_sizes[0]);
        let running = Running::start(backend, &guest, info.features, vec![active]);
        Self { guest, driver, running, handle }
    }

    fn header(&self, kind: u32, sector: u64) {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.guest.write(HEADER, &header);
        self.guest.write(STATUS, &[PENDING]);
    }

    /// One request; returns its status and the length that the device reports.
    fn request(&mut self, kind: u32, sector: u64, data: &[Part]) -> (u8, u32) {
        self.header(kind, sector);
        let mut parts = vec![Part::readable(HEADER, 16)];
        parts.extend(data);
        parts.push(Part::writable(STATUS, 1));
        let head = self.driver.post(&parts);
        self.driver.kick();
        let (used, len) = self.driver.wait_used();
        assert_eq!(used, head);
        (self.guest.read(STATUS, 1)[0], len)
    }

    fn read(&mut self, sector: u64, len: u32) -> (u8, Vec<u8>) {
        let (status, _) = self.request(VIRTIO_BLK_T_IN, sector, &[Part::writable(DATA, len)]);
        (status, self.guest.read(DATA, usize::try_from(len).unwrap()))
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.guest.write(DATA, bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        self.request(VIRTIO_BLK_T_OUT, sector, &[Part::readable(DATA, len)]).0
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.guest.write(DATA, &bytes);
        self.request(kind, 0, &[Part::readable(DATA, u32::try_from(bytes.len()).unwrap())]).0
    }
}

#[test]
fn a_read_returns_what_the_file_holds() {
    let image = file(64 << 10);
    let mut rig = Rig::new(vec![(extent(2048, 128, true), image.try_clone().unwrap())]);
    let (status, bytes) = rig.read(2048 + 3, 0x2400);
    assert_eq!(status, OK);
    assert_eq!(bytes, content(&image, 3 * 512, 0x2400));
    let (_, len) = rig.request(VIRTIO_BLK_T_IN, 2048, &[Part::writable(DATA, 512), Part::writable(DATA, 1024)]);
    assert_eq!(len, 512 + 1024 + 1);
    let counters = rig.handle.counters();
    assert_eq!(counters[..4], [("requests", 2), ("errors", 0), ("set_aside", 0), ("read_bytes", 0x2400 + 1536)]);
    rig.running.stop();
}

#[test]
fn what_the_host_must_be_waited_for_is_set_aside() {
    let (left, right) = (file(64 << 10), file(64 << 10));
    let extents =
        vec![(extent(0, 128, false), left.try_clone().unwrap()), (extent(128, 256, false), right.try_clone().unwrap())];
    let mut rig = Rig::new(extents);
    assert_eq!(rig.write(126, &[7; 2048]), OK);
    assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    assert_eq!(rig.handle.counters()[2], ("set_aside", 2), "one flush of each file");
    assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    assert_eq!(rig.handle.counters()[2], ("set_aside", 2), "there is nothing to make durable");
    for file in [&left, &right] {
        posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    }
    // From the first file into the second one, and beyond the end of that.
    let (status, bytes) = rig.read(0, 320 * 512);
    assert_eq!(status, OK);
    assert_eq!(bytes, [content(&left, 0, 64 << 10), content(&right, 0, 64 << 10), vec![0; 32 << 10]].concat());
    rig.running.stop();
}

#[test]
fn a_flush_does_not_count_on_one_that_is_under_way() {
    let mut disk = Disk::new(4096).unwrap();
    disk.add(&extent(0, 8, false), file(4096)).unwrap();
    let guest = Guest::new();
    let (mut driver, mut active) = guest.queue(8);
    guest.write(HEADER, &[&VIRTIO_BLK_T_OUT.to_le_bytes()[..], &[0; 12]].concat());
    driver.post(&[Part::readable(HEADER, 16), Part::readable(DATA, 512), Part::writable(STATUS, 1)]);
    let (mut readable, mut writable) = (Buffers::new(&guest.memory), Buffers::new(&guest.memory));
    gather(active.pop(&guest.memory).unwrap().unwrap(), &mut readable, &mut writable).unwrap();
    let write = Request::parse(&readable, &writable, disk.capacity()).unwrap();
    disk.begin(write, &mut readable, &mut writable).unwrap();
    let mut flush = || disk.begin(Request::Flush, &mut readable, &mut writable).unwrap();
    let (mut first, mut second, mut third) = (flush(), flush(), flush());
    assert!(disk.advance(&mut first, &mut writable, true).unwrap().is_some());
    assert!(disk.advance(&mut second, &mut writable, true).unwrap().is_some(), "the first one may still fail");
    disk.arrived(&mut first, Ok(0), &mut writable).unwrap();
    assert!(disk.advance(&mut first, &mut writable, true).unwrap().is_none());
    assert!(disk.advance(&mut third, &mut writable, true).unwrap().is_none(), "all is durable");
}

#[test]
fn a_disk_without_a_ring_waits_for_the_host() {
    let scratch = file(64 << 10);
    let extents = vec![(extent(0, 256, false), scratch.try_clone().unwrap())];
    let mut rig = Rig::of(device("disk0".into(), setup(POD_DISK_BYTES, extents), None).unwrap());
    assert_eq!(rig.write(5, &[0xee; 0x1400]), OK);
    assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    posix_fadvise(&scratch, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    assert_eq!(rig.read(0, 0x8000), (OK, content(&scratch, 0, 0x8000)));
    assert_eq!(rig.handle.counters()[2], ("set_aside", 0));
    rig.running.stop();
}

#[test]
fn each_queue_has_its_own_answers_and_its_turn() {
    let setup = DiskSetup { queues: 3, ..setup(POD_DISK_BYTES, vec![(extent(0, 128, true), file(64 << 10))]) };
    let (info, backend, handle) = device("disk0".into(), setup, None).unwrap();
    assert_eq!((info.queue_sizes.len(), info.vector_count()), (3, 4));
    assert_eq!(info.config.bytes()[34..36], [3, 0]);
    let guest = Guest::new();
    let (mut drivers, mut active): (Vec<_>, Vec<_>) = (0..3).map(|_| guest.queue(64)).unzip();
    // The driver leaves the last one off.
    active[2].queue.set_ready(false);
    guest.write(HEADER, &[&VIRTIO_BLK_T_IN.to_le_bytes()[..], &[0; 12]].concat());
    let mut posted = [Vec::new(), Vec::new()];
    let addresses = |number: u64| (0x20_0000 + 512 * number, STATUS + number);
    for request in 0..20 {
        for (queue, heads) in (0..).zip(&mut posted) {
            let (data, status) = addresses(2 * request + queue);
            guest.write(status, &[PENDING]);
            let parts = [Part::readable(HEADER, 16), Part::writable(data, 512), Part::writable(status, 1)];
            heads.push(drivers[usize::try_from(queue).unwrap()].post(&parts));
        }
    }
    drivers[1].kick();
    let running = Running::start(backend, &guest, info.features, active);
    for (driver, heads) in drivers.iter_mut().zip(posted) {
        for head in heads {
            assert_eq!(driver.wait_used(), (head, 513));
        }
    }
    assert!((0..40).all(|number| guest.read(addresses(number).1, 1) == [OK]));
    assert_eq!(handle.counters()[0], ("requests", 40));
    // Either one wakes the disk.
    for driver in &mut drivers[..2] {
        let (data, status) = addresses(40);
        driver.post(&[Part::readable(HEADER, 16), Part::writable(data, 512), Part::writable(status, 1)]);
        driver.kick();
        assert_eq!(driver.wait_used().1, 513);
    }
    running.stop();
    for queues in [0, 9] {
        let setup = DiskSetup { queues, capacity_bytes: 4096, extents: vec![], limits: Limits::default() };
        assert!(matches!(device("disk0".into(), setup, None), Err(DiskError::Queues(_))));
    }
}

#[test]
fn a_limited_disk_is_no_faster_than_that() {
    let limits = Limits { operations_per_s: 100, bytes_per_s: 0 };
    let setup = DiskSetup { limits, ..setup(POD_DISK_BYTES, vec![(extent(0, 8, true), file(4096))]) };
    let mut rig = Rig::of(device("disk0".into(), setup, None).unwrap());
    let began = Instant::now();
    // A tenth of a second's worth, and the first one, come at once.
    (0..10 + 1 + 20).for_each(|_| assert_eq!(rig.read(0, 512).0, OK));
    assert!(began.elapsed() >= Duration::from_millis(200), "{:?}", began.elapsed());
    rig.running.stop();
}

#[test]
fn a_write_reaches_the_file_and_nothing_else() {
    let scratch = file(64 << 10);
    let mut rig = Rig::new(vec![(extent(0, 128, false), scratch.try_clone().unwrap())]);
    let before = content(&scratch, 0, 64 << 10);
    assert_eq!(rig.write(5, &[0xee; 0x1400]), OK);
    let after = content(&scratch, 0, 64 << 10);
    assert_eq!(after[..5 * 512], before[..5 * 512]);
    assert!(after[5 * 512..][..0x1400].iter().all(|byte| *byte == 0xee));
    assert_eq!(after[5 * 512 + 0x1400..], before[5 * 512 + 0x1400..]);
    assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    rig.running.stop();
}

#[test]
fn a_read_only_extent_stays_as_it_is() {
    // The descriptor itself could be written: the device alone refuses.
    let image = file(8192);
    let mut rig = Rig::new(vec![(extent(0, 16, true), image.try_clone().unwrap())]);
    assert_eq!(rig.write(0, &[0; 512]), IOERR);
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 16, 0)]), IOERR);
    assert_eq!(rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 16, 1)]), IOERR);
    assert_eq!(content(&image, 0, 8192), content(&file(8192), 0, 8192));
    assert_eq!(rig.handle.counters()[1], ("errors", 3));
    rig.running.stop();
}

#[test]
fn requests_cross_from_one_file_to_the_next_but_not_into_a_gap() {
    let (left, right) = (file(4096), file(8192));
    let extents =
        vec![(extent(8, 8, false), left.try_clone().unwrap()), (extent(16, 16, false), right.try_clone().unwrap())];
    let mut rig = Rig::new(extents);
    let (status, bytes) = rig.read(12, 4096);
    assert_eq!(status, OK);
    assert_eq!(bytes, [content(&left, 2048, 2048), content(&right, 0, 2048)].concat());
    assert_eq!(rig.write(15, &[7; 1024]), OK);
    assert_eq!(content(&left, 3584, 512), [7; 512]);
    assert_eq!(content(&right, 0, 512), [7; 512]);
    for (sector, len) in [(7, 512), (7, 1024), (31, 1024), (32, 512), (1 << 35, 512)] {
        assert_eq!(rig.read(sector, len).0, IOERR, "sector {sector}");
    }
    // A write that would end in a gap changes nothing at all.
    let before = content(&right, 0, 8192);
    assert_eq!(rig.write(31, &[9; 1024]), IOERR);
    assert_eq!(content(&right, 0, 8192), before);
    rig.running.stop();
}

#[test]
fn the_rest_of_an_extent_past_the_end_of_its_file_is_zeros() {
    let short = file(1000);
    let mut rig = Rig::new(vec![(extent(0, 16, false), short.try_clone().unwrap())]);
    rig.guest.write(DATA, &[0xaa; 4096]);
    let (status, bytes) = rig.read(0, 4096);
    assert_eq!(status, OK);
    assert_eq!(bytes[..1000], content(&short, 0, 1000));
    assert!(bytes[1000..].iter().all(|byte| *byte == 0));
    assert_eq!(rig.write(10, &[1; 512]), OK);
    assert_eq!(short.metadata().unwrap().len(), 11 * 512);
    rig.running.stop();
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros_and_take_no_space() {
    let scratch = file(1 << 20);
    scratch.sync_all().unwrap();
    let mut rig = Rig::new(vec![(extent(0, 2048, false), scratch.try_clone().unwrap())]);
    let blocks = scratch.metadata().unwrap().blocks();
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 256, 0), (512, 256, 0)]), OK);
    assert_eq!(rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(1024, 8, 0), (1032, 8, 1)]), OK);
    assert!(scratch.metadata().unwrap().blocks() + 500 < blocks);
    assert_eq!(scratch.metadata().unwrap().len(), 1 << 20);
    let untouched = file(1 << 20);
    for (start, len, zero) in [(0, 256, true), (256, 256, false), (512, 256, true), (768, 256, false), (1024, 16, true)]
    {
        let found = content(&scratch, start * 512, len * 512);
        if zero {
            assert!(found.iter().all(|byte| *byte == 0));
        } else {
            assert_eq!(found, content(&untouched, start * 512, len * 512));
        }
    }
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 1)]), UNSUPP);
    assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0), (2040, 16, 0)]), IOERR);
    rig.running.stop();
}

#[test]
fn the_disk_tells_its_name() {
    let mut rig = Rig::new(vec![]);
    let (status, len) = rig.request(VIRTIO_BLK_T_GET_ID, 0, &[Part::writable(DATA, 20)]);
    assert_eq!((status, len), (OK, 21));
    assert_eq!(rig.guest.read(DATA, 20), b"pericarp-disk\0\0\0\0\0\0\0");
    rig.running.stop();
}

#[test]
fn unknown_and_empty_requests_fail_alone() {
    let mut rig = Rig::new(vec![(extent(0, 8, true), file(4096))]);
    assert_eq!(rig.request(77, 0, &[]), (UNSUPP, 1));
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &[]), (IOERR, 1));
    let (status, len) = rig.request(VIRTIO_BLK_T_IN, 0, &[Part::writable(DATA, 100)]);
    assert_eq!((status, len), (IOERR, 0), "a failed read has written nothing that counts");
    assert_eq!(rig.read(0, 512).0, OK);
    rig.running.stop();
}

#[test]
fn header_status_and_data_may_be_framed_in_any_way() {
    let image = file(4096);
    let mut rig = Rig::new(vec![(extent(0, 8, true), image.try_clone().unwrap())]);
    rig.header(VIRTIO_BLK_T_IN, 1);
    let head = rig.driver.post(&[
        Part::readable(HEADER, 3),
        Part::readable(HEADER + 3, 13),
        Part::writable(DATA, 500),
        Part::writable(0x20_0000, 13),
    ]);
    rig.driver.kick();
    assert_eq!(rig.driver.wait_used(), (head, 513));
    assert_eq!(rig.guest.read(DATA, 500), content(&image, 512, 500));
    assert_eq!(rig.guest.read(0x20_0000, 13), [content(&image, 1012, 12), vec![OK]].concat());
    rig.running.stop();
}

#[test]
fn several_hundred_segments_fit_one_request() {
    let image = file(1 << 20);
    let mut rig = Rig::new(vec![(extent(0, 2048, true), image.try_clone().unwrap())]);
    rig.header(VIRTIO_BLK_T_IN, 0);
    let mut parts = vec![Part::readable(HEADER, 16)];
    parts.extend((0..254).map(|n| Part::writable(0x20_0000 + 8192 * n, 4096)));
    parts.push(Part::writable(STATUS, 1));
    for indirect in [false, true] {
        rig.guest.write(STATUS, &[PENDING]);
        if indirect {
            rig.driver.post_indirect(&parts)
        } else {
            rig.driver.post(&parts)
        };
        rig.driver.kick();
        assert_eq!(rig.driver.wait_used().1, 254 * 4096 + 1);
        assert_eq!(rig.guest.read(STATUS, 1), [OK]);
        for n in [0, 1, 253] {
            assert_eq!(rig.guest.read(0x20_0000 + 8192 * n, 4096), content(&image, 4096 * n, 4096));
        }
    }
    rig.running.stop();
}

#[test]
fn a_full_queue_is_answered_to_the_last() {
    let image = file(64 << 10);
    let mut rig = Rig::new(vec![(extent(0, 128, true), image)]);
    rig.header(VIRTIO_BLK_T_IN, 0);
    for _ in 0..10 {
        let mut posted = 0;
        while rig.driver.room() >= 3 {
            rig.driver.post(&[Part::readable(HEADER, 16), Part::writable(DATA, 4096), Part::writable(STATUS, 1)]);
            posted += 1;
        }
        rig.driver.kick();
        assert_eq!(posted, 85);
        for _ in 0..posted {
            assert_eq!(rig.driver.wait_used().1, 4097);
        }
    }
    rig.running.stop();
}

#[test]
fn a_ring_that_lies_ends_the_device() {
    let mut rig = Rig::new(vec![]);
    rig.driver.corrupt_index();
    rig.driver.kick();
    assert!(matches!(rig.running.fail(), DeviceError::Ring(_)));

    let mut rig = Rig::new(vec![]);
    rig.driver.post(&[Part::readable(HEADER, 16)]);
    rig.driver.kick();
    assert!(matches!(rig.running.fail(), DeviceError::Driver(_)), "no room for a status");

    let mut rig = Rig::new(vec![]);
    rig.driver.post(&[Part::readable(rig.guest.end(), 16), Part::writable(STATUS, 1)]);
    rig.driver.kick();
    assert!(matches!(rig.running.fail(), DeviceError::Memory(_)));
}

#[test]
fn extents_come_and_go_while_the_guest_runs() {
    let mut rig = Rig::new(vec![]);
    assert_eq!(rig.read(0, 512).0, IOERR);
    rig.handle.add(extent(0, 8, true), file(4096)).unwrap();
    assert_eq!(rig.read(0, 512).0, OK);
    rig.handle.remove(0).unwrap();
    assert_eq!(rig.read(0, 512).0, IOERR);
    rig.running.stop();
}

#[test]
fn extents_come_and_go_while_there_is_no_driver() {
    let (_, backend, handle) = pod_disk(vec![]).unwrap();
    let idling = Idling::start(backend);
    handle.add(extent(0, 8, true), file(4096)).unwrap();
    let backend = idling.stop();
    let guest = Guest::new();
    let (driver, active) = guest.queue(8);
    let running = Running::start(backend, &guest, 0, vec![active]);
    let mut rig = Rig { guest, driver, running, handle };
    assert_eq!(rig.read(0, 512).0, OK);
    let (backend, _) = rig.running.stop();
    let idling = Idling::start(backend);
    rig.handle.remove(0).unwrap();
    drop(idling.stop());
    assert!(matches!(rig.handle.remove(0), Err(ChangeError::NoAnswer(AskError::Ended))));
}

#[test]
fn bad_extents_are_refused_with_a_reason() {
    let refusal = |extents: Vec<(Extent, File)>| pod_disk(extents).err().unwrap().to_string();
    let page = || file(4096);
    assert!(refusal(vec![(extent(0, 0, true), page())]).contains("empty"));
    assert!(refusal(vec![(extent(1, 8, true), page())]).contains("multiples of 8"));
    assert!(refusal(vec![(extent(8, 12, true), page())]).contains("multiples of 8"));
    let last = POD_DISK_BYTES / SECTOR_BYTES - 8;
    assert!(pod_disk(vec![(extent(last, 8, true), page())]).is_ok());
    for (first, sectors) in [(last, 16), (u64::MAX - 7, 8), (8, u64::MAX - 7), (1 << 60, 8)] {
        assert!(refusal(vec![(extent(first, sectors, true), page())]).contains("ends past"));
    }
    for (first, sectors) in [(16, 8), (8, 16), (24, 8), (8, 32), (20 & !7, 8)] {
        let both = vec![(extent(16, 16, true), page()), (extent(first, sectors, true), page())];
        assert!(refusal(both).contains("overlaps the one at sector 16"), "{first} {sectors}");
    }
    assert!(pod_disk(vec![(extent(16, 16, true), page()), (extent(32, 8, true), page())]).is_ok());
    let path = tempfile::NamedTempFile::new().unwrap();
    let open = |options: &mut OpenOptions| options.open(path.path()).unwrap();
    let reader = open(OpenOptions::new().read(true));
    assert!(refusal(vec![(extent(0, 8, false), reader)]).contains("not open for writing"));
    let writer = open(OpenOptions::new().write(true));
    assert!(refusal(vec![(extent(0, 8, false), writer)]).contains("not open for reading"));
    let appender = open(OpenOptions::new().read(true).append(true));
    assert!(refusal(vec![(extent(0, 8, false), appender)]).contains("writing in place"));
    let null = File::open("/dev/null").unwrap();
    assert!(refusal(vec![(extent(0, 8, true), null)]).contains("neither a regular file"));
}

#[test]
fn a_small_disk_ends_where_it_says() {
    let (info, backend, handle) =
        device("disk1".into(), setup(9 * 512, vec![(extent(0, 16, true), file(8192))]), None).unwrap();
    assert_eq!(info.config.bytes()[..8], 9_u64.to_le_bytes());
    let guest = Guest::new();
    let (driver, active) = guest.queue(8);
    let running = Running::start(backend, &guest, 0, vec![active]);
    let mut rig = Rig { guest, driver, running, handle };
    assert_eq!(rig.read(8, 512).0, OK);
    assert_eq!(rig.read(8, 1024).0, IOERR);
    rig.running.stop();
    assert!(matches!(device("disk1".into(), setup(100, vec![]), None), Err(DiskError::Capacity(100))));
    let past = device("disk1".into(), setup(9 * 512, vec![(extent(0, 24, true), file(8192))]), None);
    assert!(matches!(past, Err(DiskError::PastEnd(4608))));
}

#[test]
fn the_configuration_is_laid_out_as_the_specification_says() {
    let (info, _, _) = pod_disk(vec![]).unwrap();
    let config = info.config.bytes();
    assert_eq!(config.len(), 60);
    assert_eq!(config[..8], (POD_DISK_BYTES / 512).to_le_bytes());
    assert_eq!(config[12..16], SEG_MAX.to_le_bytes());
    assert_eq!(config[36..40], RANGE_SECTORS.to_le_bytes());
    assert_eq!(config[40..44], 16_u32.to_le_bytes());
    assert_eq!(config[52..57], [16, 0, 0, 0, 1]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any mix of writes, discards and reads leaves the same bytes as a flat array would hold.
    #[test]
    fn the_disk_is_an_array(steps in prop::collection::vec((0_u8..3, 0_u64..64, 1_u32..24, any::<u8>()), 1..40)) {
        let mut model = vec![0_u8; 64 * 512];
        let extents = vec![
            (extent(0, 24, false), tempfile::tempfile().unwrap()),
            (extent(24, 8, false), tempfile::tempfile().unwrap()),
            (extent(32, 32, false), tempfile::tempfile().unwrap()),
        ];
        let mut rig = Rig::new(extents);
        for (step, sector, sectors, fill) in steps {
            let fits = sector + u64::from(sectors) <= 64;
            let start = usize::try_from(sector).unwrap() * 512;
            let len = usize::try_from(sectors).unwrap() * 512;
            let status = match step {
                0 => rig.write(sector, &vec![fill; len]),
                1 => rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(sector, sectors, 0)]),
                _ => {
                    let (status, bytes) = rig.read(sector, sectors * 512);
                    if fits {
                        prop_assert_eq!(&bytes, &model[start..start + len]);
                    }
                    status
                }
            };
            prop_assert_eq!(status, if fits { OK } else { IOERR });
            if fits && step < 2 {
                model[start..start + len].fill(if step == 0 { fill } else { 0 });
            }
        }
        rig.running.stop();
    }

    /// Chains of any shape and content are answered or end the device; it never hangs and never panics.
    #[test]
    fn any_chain_is_survived(chains in prop::collection::vec(
        (prop::collection::vec((HEADER - 64..HEADER + 64, 0_u32..600, any::<bool>()), 1..6), any::<bool>()), 1..20),
        memory in prop::collection::vec(0_u8..16, 128)) {
        let mut rig = Rig::new(vec![(extent(0, 1 << 20, false), tempfile::tempfile().unwrap())]);
        rig.guest.write(HEADER - 64, &memory);
        let mut posted = 0;
        for (mut parts, ordered) in chains {
            if ordered {
                parts.sort_by_key(|part| part.2);
            }
            let parts: Vec<_> =
                parts.into_iter().map(|(address, len, writable)| Part { address, len, writable }).collect();
            rig.driver.post(&parts);
            posted += 1;
        }
        rig.driver.kick();
        let stopped = {
            let mut used = 0;
            while used < posted && rig.driver.try_wait_used(Duration::from_millis(20)).is_some() {
                used += 1;
            }
            used < posted
        };
        if stopped {
            prop_assert!(matches!(rig.running.fail(), DeviceError::Driver(_)));
        } else {
            rig.running.stop();
        }
    }
}
