//! The pod disk: runs of its sectors become partitions (there is no table on the disk), and those are mounted.
//!
//! An image that several containers use is mounted once. A partition that something still holds when its last user
//! goes is taken away at a later occasion.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use agent_protocol::v1::{DiskRange, Verity};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use thiserror::Error;

use crate::mounts::{IMAGES, SCRATCH};
use crate::sys;
use crate::verity::Checked;

/// The file system of images.
const EROFS: &str = "erofs";

/// The file system of what is written to.
const EXT4: &str = "ext4";

/// Bytes of a sector, as the protocol counts them.
const SECTOR: u64 = 512;

/// The kernel's limit of partitions on a disk.
const MOST_PARTITIONS: i32 = 255;

/// Why a run of sectors is not there to use.
#[derive(Debug, Error)]
pub(crate) enum DiskError {
    /// Beyond what can be addressed.
    #[error("sectors {0} and {1} after it are not on the disk")]
    Range(u64, u64),
    /// All numbers are in use.
    #[error("the pod disk has no partition number left: at most {MOST_PARTITIONS} images can be in use at once")]
    Full,
    /// The kernel refused it.
    #[error("cannot make sectors {first} and {sectors} after it of {} a partition", disk.display())]
    Partition {
        /// Which disk.
        disk: PathBuf,
        /// Start.
        first: u64,
        /// Length.
        sectors: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel cannot check it.
    #[error("cannot have {} checked as it is read: {source}", device.display())]
    Check {
        /// The partition.
        device: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Not the file system expected, or damaged.
    #[error("cannot mount {} as {kind}: {source}", device.display())]
    Mount {
        /// The partition.
        device: PathBuf,
        /// erofs or ext4.
        kind: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A run of sectors that containers use.
#[derive(Debug)]
struct Part {
    partition: i32,
    /// Where its file system is mounted; a volume's is not.
    mounted: Option<PathBuf>,
    /// Between the partition and the mount.
    checked: Option<Checked>,
    users: u32,
}

/// The disk and what is mounted from it.
#[derive(Debug)]
pub(crate) struct Disk {
    path: PathBuf,
    parts: BTreeMap<(u64, u64), Part>,
    scratch: bool,
    /// Unmounted, but still held by something a moment ago.
    leaving: Vec<i32>,
    used: BTreeSet<i32>,
}

impl Disk {
    /// Opens nothing yet.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, parts: BTreeMap::new(), scratch: false, leaving: Vec::new(), used: BTreeSet::new() }
    }

    /// Whether the pod has writable space on disk.
    pub(crate) fn has_scratch(&self) -> bool {
        self.scratch
    }

    /// Mounts the pod's writable space.
    pub(crate) fn mount_scratch(&mut self, range: &DiskRange) -> Result<(), DiskError> {
        let partition = self.add(range)?;
        let device = self.device(partition);
        if let Err(error) = mount_device(device, Path::new(SCRATCH), EXT4, MsFlags::MS_NOATIME) {
            self.delete(partition);
            return Err(error);
        }
        self.scratch = true;
        Ok(())
    }

    /// Where the image in `range` is mounted; each call wants one [`Self::release`].
    pub(crate) fn acquire_image(&mut self, range: &DiskRange) -> Result<PathBuf, DiskError> {
        if let Some(path) = self.use_again(range).and_then(|image| image.mounted.clone()) {
            return Ok(path);
        }
        let partition = self.add(range)?;
        let path = Path::new(IMAGES).join(partition.to_string());
        match self.mount_image(partition, &path, range.verity.as_ref()) {
            Ok(checked) => {
                self.parts.insert(key(range), Part { partition, mounted: Some(path.clone()), checked, users: 1 });
                Ok(path)
            }
            Err(error) => {
                self.delete(partition);
                Err(error)
            }
        }
    }

    /// Mounts an image, from a device that checks it if there is something to check it by.
    fn mount_image(&self, partition: i32, path: &Path, verity: Option<&Verity>) -> Result<Option<Checked>, DiskError> {
        let bare = self.device(partition);
        let failed = |source| DiskError::Mount { device: bare.clone(), kind: EROFS, source };
        fs::create_dir_all(path).map_err(failed)?;
        let checked = verity.map(|verity| Checked::open(&bare.to_string_lossy(), format!("image-{partition}"), verity));
        let checked = checked.transpose().map_err(|source| DiskError::Check { device: bare.clone(), source })?;
        let device = checked.as_ref().map_or(bare, |checked| checked.device.clone());
        if let Err(error) = mount_device(device, path, EROFS, MsFlags::MS_RDONLY) {
            if let Some(checked) = checked {
                drop(checked.close());
            }
            return Err(error);
        }
        Ok(checked)
    }

    /// Where the file system in `range`, which takes writes, is mounted; each call wants one [`Self::release`].
    pub(crate) fn acquire_root(&mut self, range: &DiskRange) -> Result<PathBuf, DiskError> {
        if let Some(path) = self.use_again(range).and_then(|root| root.mounted.clone()) {
            return Ok(path);
        }
        let partition = self.add(range)?;
        let (device, path) = (self.device(partition), Path::new(IMAGES).join(partition.to_string()));
        let failed = |source| DiskError::Mount { device: device.clone(), kind: EXT4, source };
        let mounted = fs::create_dir_all(&path)
            .and_then(|()| Ok(mount(Some(&device), &path, Some(EXT4), MsFlags::MS_NODEV, None::<&str>)?));
        if let Err(error) = mounted {
            self.delete(partition);
            return Err(failed(error));
        }
        self.parts.insert(key(range), Part { partition, mounted: Some(path.clone()), checked: None, users: 1 });
        Ok(path)
    }

    /// The block device of the volume in `range`; each call wants one [`Self::release`].
    pub(crate) fn acquire_volume(&mut self, range: &DiskRange) -> Result<PathBuf, DiskError> {
        let partition = match self.use_again(range) {
            Some(volume) => volume.partition,
            None => {
                let partition = self.add(range)?;
                self.parts.insert(key(range), Part { partition, mounted: None, checked: None, users: 1 });
                partition
            }
        };
        Ok(self.device(partition))
    }

    fn use_again(&mut self, range: &DiskRange) -> Option<&Part> {
        let part = self.parts.get_mut(&key(range))?;
        part.users = part.users.saturating_add(1);
        Some(part)
    }

    /// Gives back what [`Self::acquire_image`], [`Self::acquire_root`] or [`Self::acquire_volume`] gave.
    pub(crate) fn release(&mut self, range: &DiskRange) {
        let Some(part) = self.parts.get_mut(&key(range)) else { return };
        part.users = part.users.saturating_sub(1);
        if part.users > 0 {
            return;
        }
        let Some(Part { partition, mounted, checked, users: _ }) = self.parts.remove(&key(range)) else { return };
        if let Some(path) = mounted {
            if let Err(error) = umount2(&path, MntFlags::MNT_DETACH) {
                crate::kmsg::say(&format!("cannot unmount {}: {error}", path.display()));
            }
            if let Some(Err(error)) = checked.map(|checked| checked.close()) {
                crate::kmsg::say(&format!("cannot take the check of {} away: {error}", path.display()));
            }
            // It comes back if the directory is needed again.
            drop(fs::remove_dir(&path));
        }
        self.delete(partition);
    }

    fn device(&self, partition: i32) -> PathBuf {
        let disk = self.path.to_string_lossy();
        // The kernel's rule for names of partitions.
        let infix = if disk.ends_with(|last: char| last.is_ascii_digit()) { "p" } else { "" };
        PathBuf::from(format!("{disk}{infix}{partition}"))
    }

    fn add(&mut self, range: &DiskRange) -> Result<i32, DiskError> {
        for partition in std::mem::take(&mut self.leaving) {
            self.delete(partition);
        }
        let (start, length) = bytes(range)?;
        let number = (1..=MOST_PARTITIONS).find(|number| !self.used.contains(number)).ok_or(DiskError::Full)?;
        File::open(&self.path).and_then(|disk| sys::add_partition(disk.as_fd(), number, start, length)).map_err(
            |source| DiskError::Partition {
                disk: self.path.clone(),
                first: range.first_sector,
                sectors: range.sectors,
                source,
            },
        )?;
        self.used.insert(number);
        Ok(number)
    }

    fn delete(&mut self, partition: i32) {
        match File::open(&self.path).and_then(|disk| sys::delete_partition(disk.as_fd(), partition)) {
            Ok(()) => drop(self.used.remove(&partition)),
            Err(_) => self.leaving.push(partition),
        }
    }
}

fn mount_device(device: PathBuf, target: &Path, kind: &'static str, flags: MsFlags) -> Result<(), DiskError> {
    let flags = flags | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount(Some(&device), target, Some(kind), flags, None::<&str>).map_err(|error| DiskError::Mount {
        device,
        kind,
        source: error.into(),
    })
}

fn key(range: &DiskRange) -> (u64, u64) {
    (range.first_sector, range.sectors)
}

/// Start and length in bytes, as the kernel's interface wants them.
fn bytes(range: &DiskRange) -> Result<(i64, i64), DiskError> {
    let byte = |sectors: u64| sectors.checked_mul(SECTOR).and_then(|bytes| i64::try_from(bytes).ok());
    let end = range.first_sector.checked_add(range.sectors).and_then(byte);
    match (byte(range.first_sector), byte(range.sectors), end) {
        (Some(start), Some(length), Some(_)) if length > 0 => Ok((start, length)),
        _ => Err(DiskError::Range(range.first_sector, range.sectors)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_named_as_the_kernel_names_them() {
        assert_eq!(Disk::new("/dev/vda".into()).device(3), Path::new("/dev/vda3"));
        assert_eq!(Disk::new("/dev/loop7".into()).device(12), Path::new("/dev/loop7p12"));
    }

    #[test]
    fn ranges_that_cannot_be_are_refused() {
        let range = |first_sector, sectors| bytes(&DiskRange { first_sector, sectors, verity: None });
        assert_eq!(range(2048, 8).ok(), Some((1 << 20, 4096)));
        for (first, sectors) in [(0, 0), (u64::MAX, 1), (1 << 54, 1 << 54), (1, u64::MAX)] {
            assert!(range(first, sectors).is_err(), "{first} {sectors}");
        }
    }
}
