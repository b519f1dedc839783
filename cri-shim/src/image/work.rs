//! The place where a disk is made: one file per chain of layers, locked by whoever makes it, gone when that ends in any way.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::digest::Digest;
use super::verity::Verity;

/// How often a lock held by another process is tried: flock(2) cannot be waited for and given up.
const LOCK_POLL: Duration = Duration::from_millis(50);

/// The right to make the disk of one chain. Held by one at a time, in all processes.
pub(crate) struct Work {
    dir: PathBuf,
    chain: String,
    /// By what the disk is checked, once it is made.
    pub(crate) verity: Option<Verity>,
    /// Locked until it is closed.
    _lock: File,
}

impl Work {
    /// Waits until nobody else makes the same.
    pub(crate) async fn begin(dir: &Path, chain: &Digest) -> io::Result<Self> {
        loop {
            match try_lock(dir, chain.hex())? {
                Some(lock) => {
                    let (dir, chain) = (dir.to_owned(), chain.hex().to_owned());
                    return Ok(Self { dir, chain, verity: None, _lock: lock });
                }
                None => tokio::time::sleep(LOCK_POLL).await,
            }
        }
    }

    /// The disk being made; it vanishes with this unless it was renamed.
    pub(crate) fn disk(&self) -> PathBuf {
        self.dir.join(format!("{}.erofs", self.chain))
    }

    /// An empty file there.
    pub(crate) fn create_disk(&self) -> io::Result<File> {
        create(&self.disk())
    }

    /// An empty file without a name.
    pub(crate) fn nameless(&self, number: usize) -> io::Result<File> {
        let path = self.dir.join(format!("{}.{number}", self.chain));
        let file = create(&path)?;
        fs::remove_file(path)?;
        Ok(file)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // What is not there was renamed or never made; what cannot be removed is swept by the next start.
        let _gone = fs::remove_file(self.disk());
        let _gone = fs::remove_file(lock_path(&self.dir, &self.chain));
    }
}

/// An empty file without a name, to read back what is written.
pub(crate) fn scratch(dir: &Path) -> io::Result<File> {
    let path = dir.join(format!("scratch-{}-{:?}.tmp", std::process::id(), std::thread::current().id()));
    let file = create(&path)?;
    fs::remove_file(path)?;
    Ok(file)
}

fn create(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

fn lock_path(dir: &Path, chain: &str) -> PathBuf {
    dir.join(format!("{chain}.lock"))
}

/// Locks the chain's lock file; `None` if another has it, or has just removed it.
fn try_lock(dir: &Path, chain: &str) -> io::Result<Option<File>> {
    let path = lock_path(dir, chain);
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let same = fs::metadata(&path).ok().map(|m| m.ino()) == Some(file.metadata()?.ino());
    Ok(same.then_some(file))
}

/// Removes what processes that are gone have left.
pub(crate) fn sweep(dir: &Path) -> io::Result<()> {
    let mut names: Vec<String> =
        fs::read_dir(dir)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    // The lock files last, since they say whether the others are in use.
    names.sort_by_key(|name| name.ends_with(".lock"));
    for name in names {
        let chain = name.split('.').next().unwrap_or_default();
        if let Some(_lock) = try_lock(dir, chain)? {
            fs::remove_file(dir.join(&name))?;
            if !name.ends_with(".lock") {
                fs::remove_file(lock_path(dir, chain))?;
            }
        }
    }
    Ok(())
}
