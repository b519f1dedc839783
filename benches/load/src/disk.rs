//! Accesses to a disk or file, past the page cache of whoever runs this.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};

/// What direct access asks of addresses and offsets.
const ALIGNMENT: usize = 4096;

/// Bytes of the disk that are used; the host makes it as large.
const DISK_BYTES: u64 = 64 << 20;

/// What one access is like.
#[derive(Clone, Copy)]
pub(super) struct Access {
    pub(super) write: bool,
    pub(super) random: bool,
    pub(super) bytes: usize,
}

/// An open disk, and what is to be done with it.
pub(super) struct Disk {
    file: Arc<File>,
    access: Access,
    threads: u64,
    count: u64,
}

impl Disk {
    /// Opens `LOAD_DISK`.
    pub(super) fn open(access: Access, threads: u64, count: u64) -> Result<Self> {
        let path = std::env::var("LOAD_DISK").context("LOAD_DISK names no disk")?;
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path);
        Ok(Self { file: Arc::new(file.with_context(|| format!("opening {path}"))?), access, threads, count })
    }

    /// Each thread does its part, one access after the other.
    pub(super) fn run(self) -> Result<()> {
        let each = self.count / self.threads;
        let access = self.access;
        let others: Vec<_> = (1..self.threads)
            .map(|number| {
                let file = Arc::clone(&self.file);
                thread::spawn(move || work(&file, access, number, each))
            })
            .collect();
        work(&self.file, access, 0, each)?;
        for other in others {
            other.join().ok().context("a thread panicked")??;
        }
        Ok(())
    }
}

fn work(file: &File, access: Access, thread: u64, count: u64) -> Result<()> {
    let mut memory = vec![0x5a_u8; access.bytes + ALIGNMENT];
    let skip = memory.as_ptr().align_offset(ALIGNMENT);
    let buffer = memory.get_mut(skip..skip + access.bytes).context("alignment is at most a page")?;
    let bytes = u64::try_from(access.bytes)?;
    let slots = DISK_BYTES / bytes;
    let mut random = Random(thread + 1);
    for number in 0..count {
        let slot = if access.random { random.next() } else { thread * count + number } % slots;
        if access.write {
            file.write_all_at(buffer, slot * bytes)?;
        } else {
            file.read_exact_at(buffer, slot * bytes)?;
        }
    }
    Ok(())
}

/// Marsaglia's xorshift: the same places in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 8
    }
}
