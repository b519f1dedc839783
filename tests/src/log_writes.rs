//! A disk that remembers the order of its writes and flushes (device mapper, `log-writes`), and what it held at each flush.
//!
//! The log is described in the kernel's Documentation/admin-guide/device-mapper/log-writes.rst: a super block, then entries of
//! one sector, each followed by its data.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const SECTOR: u64 = 512;

const FLUSH: u64 = 1;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// What our marks say; the target leaves one of its own when it ends.
const HERE: &str = "here";

/// Bytes set aside for the log.
const LOG_BYTES: u64 = 256 << 20;

/// A block device over one file that keeps its log in another.
#[derive(Debug)]
pub struct LoggedDisk {
    name: String,
    log: PathBuf,
    loops: [String; 2],
}

/// What the disk was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Data for a byte offset.
    Write(u64, Vec<u8>),
    /// What was at a byte offset, of a length, is not needed any more.
    Discard(u64, u64),
    /// All that was written so far is durable.
    Flush,
    /// Whoever tests says how far things are.
    Mark,
}

impl LoggedDisk {
    /// A disk over `file`, with a log beside it.
    pub fn new(name: &str, file: &Path) -> Self {
        run("modprobe", &["dm-log-writes"]);
        let log = file.with_extension("log");
        File::create(&log).and_then(|log| log.set_len(LOG_BYTES)).expect("the test's directory is writable");
        let bytes = fs::metadata(file).expect("the disk's file is there").len();
        let loops = [file, &log].map(|file| run("losetup", &["--find", "--show", text(file)]));
        let table = format!("0 {} log-writes {} {}", bytes / SECTOR, loops[0], loops[1]);
        run("dmsetup", &["create", name, "--table", &table]);
        Self { name: name.to_owned(), log, loops }
    }

    /// The device.
    pub fn device(&self) -> String {
        // The name below /dev/mapper is a link where udev is, and nothing where it is not.
        let minor = run("dmsetup", &["info", "--columns", "--noheadings", "--options", "minor", &self.name]);
        format!("/dev/dm-{}", minor.trim())
    }

    /// Leaves a mark in the log.
    pub fn mark(&self) {
        run("dmsetup", &["message", &self.name, "0", "mark", HERE]);
    }

    /// Ends the device and returns its log.
    pub fn entries(self) -> Vec<Entry> {
        run("dmsetup", &["remove", "--retry", &self.name]);
        parse(&File::open(&self.log).expect("the log is there"))
    }
}

impl Drop for LoggedDisk {
    fn drop(&mut self) {
        // Gone already, unless the test failed.
        let _ = Command::new("dmsetup").args(["remove", "--force", &self.name]).output();
        for device in &self.loops {
            let _ = Command::new("losetup").args(["--detach", device]).status();
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn run(program: &str, arguments: &[&str]) -> String {
    let done = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(done.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).trim().to_owned()
}

fn parse(log: &File) -> Vec<Entry> {
    let words = |at: u64| {
        let mut bytes = [0; 32];
        log.read_exact_at(&mut bytes, at).expect("the log goes on");
        let word = |n: usize| u64::from_le_bytes(bytes[8 * n..8 * n + 8].try_into().expect("8 bytes"));
        [word(0), word(1), word(2), word(3)]
    };
    let [magic, version, count, sector] = words(0);
    assert_eq!((magic, version, sector & 0xffff_ffff), (MAGIC, 1, SECTOR), "not a log of this version");
    let mut at = SECTOR;
    let mut entries = Vec::new();
    for _ in 0..count {
        let [sector, sectors, flags, _] = words(at);
        at += SECTOR;
        let (start, bytes) = (sector * SECTOR, sectors * SECTOR);
        // A write that asks for a flush has it before it takes effect.
        if flags & FLUSH != 0 {
            entries.push(Entry::Flush);
        }
        if flags & MARK != 0 {
            // What it says follows the entry's four words in the same sector.
            let mut said = [0; HERE.len()];
            log.read_exact_at(&mut said, at - SECTOR + 32).expect("the log goes on");
            entries.extend((said == HERE.as_bytes()).then_some(Entry::Mark));
        } else if flags & DISCARD != 0 {
            entries.push(Entry::Discard(start, bytes));
        } else if bytes > 0 {
            let mut data = vec![0; usize::try_from(bytes).expect("fits")];
            log.read_exact_at(&mut data, at).expect("the log holds its data");
            at += bytes;
            entries.push(Entry::Write(start, data));
        }
    }
    entries
}
