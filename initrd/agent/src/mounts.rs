//! The agent's own file systems: what is mounted before any container, and where the agent keeps things.
//!
//! A container never sees any of it: its mount namespace starts as a copy of the agent's and pivots away.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use agent_protocol::v1;
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};
use thiserror::Error;

/// All below here is guest memory and the agent's alone.
pub(crate) const RUN: &str = "/run";

/// Where a container's root is put together, in its own mount namespace.
pub(crate) const STAGE: &str = "/run/stage";

/// The pod's `/dev/shm`.
pub(crate) const SHM: &str = "/run/shm";

/// The pod's writable disk.
pub(crate) const SCRATCH: &str = "/run/scratch";

/// Image disks, one directory each.
pub(crate) const IMAGES: &str = "/run/images";

/// Small files that the host sent, one directory for each container.
pub(crate) const FILES: &str = "/run/files";

/// Directories of the host, one for each virtio-fs device.
pub(crate) const SHARED: &str = "/run/shared";

/// The pod's volumes of memory, one directory each.
const VOLUMES: &str = "/run/volumes";

/// Writable roots of pods without a disk.
pub(crate) const MEMORY_ROOTS: &str = "/run/roots";

/// A directory with nothing in it, for a process that needs no files.
pub(crate) const EMPTY: &str = "/run/empty";

/// Size of a pod's `/dev/shm` if none is asked for.
const SHM_BYTES: u64 = 64 << 20;

/// Why the guest has no file systems.
#[derive(Debug, Error)]
#[error("cannot mount {} on {target}", .kind)]
pub(crate) struct MountError {
    kind: String,
    target: String,
    source: io::Error,
}

/// mount(2) of a file system that needs no device.
pub(crate) fn mount_kind(kind: &str, target: &str, flags: MsFlags, options: &str) -> Result<(), MountError> {
    let failed = |error: nix::Error| MountError { kind: kind.into(), target: target.into(), source: error.into() };
    mount(Some(kind), target, Some(kind), flags, Some(options)).map_err(failed)
}

fn directory(path: &str) -> Result<(), MountError> {
    fs::create_dir_all(path).map_err(|source| MountError { kind: "a directory".into(), target: path.into(), source })
}

/// The kernel's root cannot be pivoted away from, so it is bound over itself: the agent, and each container's mount
/// namespace at its start, then has a root that can.
fn bind_root() -> Result<(), MountError> {
    let failed = |error: nix::Error| MountError { kind: "/".into(), target: "/".into(), source: error.into() };
    let none = None::<&str>;
    mount(Some("/"), "/root", none, MsFlags::MS_BIND, none).map_err(failed)?;
    chdir("/root").map_err(failed)?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none).map_err(failed)?;
    chroot(".").map_err(failed)
}

const PLAIN: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC);

/// What every Linux system has. Only a guest that has just booted lacks a root to pivot from, and devices.
pub(crate) fn prepare_system(in_guest: bool) -> Result<(), MountError> {
    if in_guest {
        bind_root()?;
        mount_kind("devtmpfs", "/dev", PLAIN, "mode=0755")?;
    }
    mount_kind("proc", "/proc", PLAIN | MsFlags::MS_NODEV, "")?;
    mount_kind("sysfs", "/sys", PLAIN | MsFlags::MS_NODEV, "")
}

/// What the agent needs for itself.
pub(crate) fn prepare() -> Result<(), MountError> {
    mount_kind("cgroup2", crate::cgroup::ROOT, PLAIN | MsFlags::MS_NODEV, "")?;
    mount_kind("tmpfs", RUN, MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=0700")?;
    [STAGE, SHM, SCRATCH, IMAGES, FILES, SHARED, VOLUMES, MEMORY_ROOTS, EMPTY].into_iter().try_for_each(directory)
}

/// Asks the kernel to look for devices that have been plugged in.
const RESCAN: &str = "/sys/bus/pci/rescan";

/// Finds devices that have been plugged in.
pub(crate) fn rescan() -> io::Result<()> {
    fs::write(RESCAN, "1")
}

/// Where a device's directories are, mounted the first time. Devices in them are nobody's business in the guest.
pub(crate) fn shared(tag: &str) -> Result<PathBuf, MountError> {
    let place = below(SHARED, tag);
    let failed =
        |source: io::Error| MountError { kind: format!("virtiofs {tag}"), target: place.display().to_string(), source };
    // By its name in our own memory: what is mounted there might not answer.
    if fs::read_dir(SHARED).map_err(failed)?.flatten().any(|entry| entry.path() == place) {
        return Ok(place);
    }
    rescan().map_err(failed)?;
    fs::create_dir(&place).map_err(failed)?;
    if let Err(error) = mount(Some(tag), &place, Some("virtiofs"), MsFlags::MS_NODEV, None::<&str>) {
        drop(fs::remove_dir(&place));
        return Err(failed(error.into()));
    }
    Ok(place)
}

/// Where a volume of memory is, mounted the first time.
pub(crate) fn memory(volume: &v1::PodMemory) -> Result<PathBuf, MountError> {
    let place = below(VOLUMES, &volume.name);
    if !place.is_dir() {
        let target = place.to_string_lossy();
        directory(&target)?;
        let v1::PodMemory { size_bytes, uid, gid, .. } = volume;
        let mode = volume.mode & 0o7777;
        let options = format!("size={size_bytes},mode={mode:o},uid={uid},gid={gid}");
        if let Err(error) = mount_kind("tmpfs", &target, MsFlags::MS_NOSUID | MsFlags::MS_NODEV, &options) {
            drop(fs::remove_dir(&place));
            return Err(error);
        }
    }
    Ok(place)
}

/// The memory that all containers of the pod share by name.
pub(crate) fn mount_shm(bytes: u64) -> Result<(), MountError> {
    let bytes = if bytes == 0 { SHM_BYTES } else { bytes };
    mount_kind("tmpfs", SHM, PLAIN | MsFlags::MS_NODEV, &format!("mode=1777,size={bytes}"))
}

/// `path` below `root`, whatever it starts with. Only for names that the host has chosen.
pub(crate) fn below(root: &str, path: &str) -> PathBuf {
    Path::new(root).join(path.trim_start_matches('/'))
}
