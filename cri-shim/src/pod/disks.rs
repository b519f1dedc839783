//! What is on the pod disk beside its scratch space: images, and volumes: block devices of the host that containers have
//! as block devices.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vmm_control::{Command, Extent, SECTOR_BYTES};

use super::context::{blocking, chain};
use super::owner::Owner;
use super::share::ROOT;
use crate::control;
use crate::error::{Error, IoContext, Result};
use crate::image::{self, Verity};
use crate::record::{Access, DiskRecord};
use crate::spec::{ContainerSpec, DeviceSpec, Rootfs};

/// Extents are whole pages.
const EXTENT_SECTORS: u64 = 8;

impl Owner {
    /// Puts an image's disks where the guest can mount them, once per pod.
    pub(super) async fn map_image(&mut self, image: &str) -> Result<()> {
        if self.record.disks.iter().any(|disk| disk.image.as_deref() == Some(image)) {
            return Ok(());
        }
        let images = self.context.images.clone();
        let name = image.to_owned();
        let (found, hold) = blocking(move || hold(&images, &name)).await?;
        let before = self.record.disks.len();
        for (path, file) in found.disks.into_iter().zip(&hold.disks) {
            // The VMM's copy of the descriptor holds the image from then on.
            if let Err(error) = self.map_image_disk(image, path, file, found.verity.clone()).await {
                self.unmap(|number, _| number >= before).await;
                return Err(error);
            }
        }
        Ok(())
    }

    async fn map_image_disk(&mut self, image: &str, file: PathBuf, open: &File, verity: Option<Verity>) -> Result<()> {
        let bytes = open.metadata().doing(|| format!("looking at {}", file.display()))?.len();
        let (first_sector, sectors) = self.record.free_extent(bytes).ok_or_else(no_room)?;
        let image = Some(image.to_owned());
        self.record.disks.push(DiskRecord { first_sector, sectors, file, image, volume: None, verity });
        self.save()?;
        self.map(first_sector, sectors, true, open).await
    }

    /// Gives the guest a container's root file system if that is a disk, and those devices that are the host's, unless the pod has them already; returns the first
    /// sector of each by its place in the container.
    pub(super) async fn map_volumes(&mut self, spec: &ContainerSpec) -> Result<BTreeMap<String, u64>> {
        let mut places = BTreeMap::new();
        if let Rootfs::Disk(file) = &spec.rootfs {
            places.insert(ROOT.into(), self.map_volume(file.clone(), Access::ReadWrite).await?);
        }
        for asked in &spec.devices {
            let (looked_at, access) = (asked.host_path.clone(), access(asked));
            let Some(path) = blocking(move || block_device(Path::new(&looked_at))).await? else { continue };
            let same = |disk: &&DiskRecord| disk.file == path && disk.volume == Some(access);
            let first_sector = match self.record.disks.iter().find(same) {
                Some(disk) => disk.first_sector,
                None => self.map_volume(path, access).await?,
            };
            places.insert(asked.container_path.clone(), first_sector);
        }
        Ok(places)
    }

    async fn map_volume(&mut self, path: PathBuf, access: Access) -> Result<u64> {
        let opened = path.clone();
        let (file, bytes) = blocking(move || open(&opened, access)).await?;
        let (first_sector, sectors) = self.record.free_extent(bytes).ok_or_else(no_room)?;
        let volume = Some(access);
        self.record.disks.push(DiskRecord { first_sector, sectors, file: path, image: None, volume, verity: None });
        self.save()?;
        self.map(first_sector, sectors, access == Access::ReadOnly, &file).await?;
        Ok(first_sector)
    }

    /// Takes the volumes back that no container has any more.
    pub(super) async fn unmap_volumes(&mut self) {
        let containers = self.record.containers.values();
        let used: BTreeSet<u64> = containers.flat_map(|container| container.volumes.values().copied()).collect();
        self.unmap(|_, disk| disk.volume.is_some() && !used.contains(&disk.first_sector)).await;
    }

    /// Takes everything back that no container has any more.
    pub(super) async fn unmap_unused(&mut self) {
        let containers = self.record.containers.values();
        let used: BTreeSet<String> =
            containers.flat_map(|container| container.spec.images()).map(str::to_owned).collect();
        self.unmap(|_, disk| disk.image.as_ref().is_some_and(|image| !used.contains(image))).await;
        self.unmap_volumes().await;
    }

    async fn map(&self, first_sector: u64, sectors: u64, read_only: bool, file: &File) -> Result<()> {
        let sectors = sectors.next_multiple_of(EXTENT_SECTORS);
        let extent = Extent { first_sector, sectors, read_only, file: 0 };
        control::run(&self.dir, &Command::AddDisk(extent), &[file.as_raw_fd()]).await
    }

    async fn unmap(&mut self, unwanted: impl Fn(usize, &DiskRecord) -> bool) {
        let mut number = 0;
        let mut next = |disk: &mut DiskRecord| {
            let here = unwanted(number, disk);
            number = number.saturating_add(1);
            here
        };
        let removed: Vec<_> = self.record.disks.extract_if(.., |disk| next(disk)).collect();
        for disk in removed.into_iter().filter(|_| self.is_running()) {
            // Refused: it was never mapped.
            let _ = control::run(&self.dir, &Command::RemoveDisk { first_sector: disk.first_sector }, &[]).await;
        }
    }
}

/// An image's disks, kept from being removed while the hold or a copy of its descriptors lives.
fn hold(images: &image::Store, id: &str) -> Result<(image::Image, image::Hold)> {
    let missing = || Error::NotFound(format!("image {id} is not here: pull it first"));
    let found = images.resolve(id).ok_or_else(missing)?;
    let hold = images.hold(&found.id).map_err(|error| Error::Internal(chain(&error)))?;
    Ok((found, hold.ok_or_else(missing)?))
}

fn no_room() -> Error {
    Error::ResourceExhausted("the pod's disk has no room for another image or volume".into())
}

fn access(device: &DeviceSpec) -> Access {
    if device.permissions.contains('w') { Access::ReadWrite } else { Access::ReadOnly }
}

/// Where the host's block device at `path` is, if that is one. The guest has devices that the host may lack.
fn block_device(path: &Path) -> Result<Option<PathBuf>> {
    match fs::metadata(path) {
        Ok(found) if found.file_type().is_block_device() => {
            fs::canonicalize(path).map(Some).doing(|| format!("looking at {}", path.display()))
        }
        _ => Ok(None),
    }
}

/// A device and its size in bytes. It is the guest's alone: what the host has mounted, or gives to somebody else, would
/// be damaged by two writers and cannot be read reliably beside one (open(2), `O_EXCL`).
fn open(path: &Path, access: Access) -> Result<(File, u64)> {
    let mut options = File::options();
    options.read(true).write(access == Access::ReadWrite).custom_flags(libc::O_EXCL);
    let mut file = match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            return Err(Error::FailedPrecondition(format!(
                "the block device {} is mounted or in use: unmount it on the host, or stop the pod that has it",
                path.display()
            )));
        }
        opened => opened.doing(|| format!("opening {}", path.display()))?,
    };
    // One that is a plain file has no such protection of the kernel's: the VMM's descriptor keeps this lock.
    if fs::metadata(path).is_ok_and(|found| found.is_file()) && file.try_lock().is_err() {
        return Err(Error::FailedPrecondition(format!("the disk {} is in use by another pod", path.display())));
    }
    let bytes = file.seek(SeekFrom::End(0)).doing(|| format!("the size of {}", path.display()))?;
    if bytes < SECTOR_BYTES {
        return Err(Error::FailedPrecondition(format!("the block device {} is empty", path.display())));
    }
    Ok((file, bytes))
}
