//! Volumes of memory: each `emptyDir` with `medium: Memory`.
//!
//! A kubelet makes a tmpfs of the host for each, and mounts it or a directory of it (`subPath`) into containers. What they
//! keep there is to count against their own limits (Kubernetes, Volumes, emptyDir), which only the guest's memory does:
//! so the pod has a tmpfs of its own for each, as large, and the host's stays empty.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::statvfs::statvfs;

use crate::error::{IoContext, Result};
use crate::mount_table::{self, Mount};
use crate::spec::{ContainerSpec, MemoryVolume, MountSource};

/// Where a kubelet has them, each below its own name.
const EMPTY_DIRS: &str = "kubernetes.io~empty-dir";

/// The file system of memory.
const TMPFS: &str = "tmpfs";

/// Puts the guest's memory in the place of mounts that are the host's.
pub(super) fn replace(mut spec: ContainerSpec) -> Result<ContainerSpec> {
    for mount in &mut spec.mounts {
        if let MountSource::Host(path) = &mount.source
            && let Some(volume) =
                find(path).map_err(|error| error.context(format_args!("mount {}", mount.destination)))?
        {
            mount.source = MountSource::Memory(volume);
        }
    }
    Ok(spec)
}

/// The volume of memory at a path of the host, if there is one.
fn find(path: &Path) -> Result<Option<MemoryVolume>> {
    let doing = || format!("looking at {}", path.display());
    let host_path = path.to_owned();
    // What is not there is told by whoever comes to use it.
    let Ok(path) = fs::canonicalize(path) else { return Ok(None) };
    if statfs(&path).doing(doing)?.filesystem_type() != TMPFS_MAGIC {
        return Ok(None);
    }
    let Some((volume, sub_path)) = locate(&mount_table::read()?, &path) else { return Ok(None) };
    let (name, sub_path) = match (volume.file_name().and_then(|name| name.to_str()), sub_path.to_str()) {
        (Some(name), Some(sub_path)) => (name.to_owned(), sub_path.to_owned()),
        _ => return Ok(None),
    };
    let (space, root) = (statvfs(&volume).doing(doing)?, fs::metadata(&volume).doing(doing)?);
    let size = space.blocks().saturating_mul(space.fragment_size());
    Ok(Some(MemoryVolume { host_path, name, size, mode: root.mode(), uid: root.uid(), gid: root.gid(), sub_path }))
}

/// Where the volume of a path is mounted as a whole, and which of its directories the path is.
fn locate(table: &[Mount], source: &Path) -> Option<(PathBuf, PathBuf)> {
    let mount = mount_table::at(table, source).filter(|mount| mount.kind == TMPFS)?;
    let is_volume = |point: &Path| point.parent().is_some_and(|parent| parent.ends_with(EMPTY_DIRS));
    let whole =
        |other: &&Mount| other.device == mount.device && other.root == Path::new("/") && is_volume(&other.point);
    let volume = table.iter().find(whole)?;
    let (root, below) = (mount.root.strip_prefix("/").ok()?, source.strip_prefix(&mount.point).ok()?);
    // By components: joining nothing would leave a slash at the end, which only a directory may have.
    Some((volume.point.clone(), root.components().chain(below.components()).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(device: &str, root: &str, point: &str, kind: &str) -> Mount {
        Mount { device: device.into(), root: root.into(), point: point.into(), kind: kind.into() }
    }

    #[test]
    fn a_volume_is_known_by_its_place_and_its_directories_by_their_file_system() {
        let pod = "/var/lib/kubelet/pods/1/volumes";
        let cache = format!("{pod}/kubernetes.io~empty-dir/cache");
        let table = [
            mount("8:1", "/", "/", "ext4"),
            mount("0:40", "/", &cache, TMPFS),
            mount("0:41", "/", &format!("{pod}/kubernetes.io~secret/token"), TMPFS),
            mount("0:40", "/a", "/var/lib/kubelet/pods/1/volume-subpaths/cache/c/0", TMPFS),
        ];
        let found = |path: &str| {
            let (volume, sub_path) = locate(&table, Path::new(path))?;
            assert_eq!(volume, Path::new(&cache));
            Some(sub_path.to_string_lossy().into_owned())
        };
        assert_eq!(found(&cache).as_deref(), Some(""));
        assert_eq!(found(&format!("{cache}/x/y")).as_deref(), Some("x/y"));
        assert_eq!(found("/var/lib/kubelet/pods/1/volume-subpaths/cache/c/0").as_deref(), Some("a"));
        assert_eq!(found("/var/lib/kubelet/pods/1/volume-subpaths/cache/c/0/b").as_deref(), Some("a/b"));
        for other in
            ["/srv", &format!("{pod}/kubernetes.io~secret/token"), &format!("{pod}/kubernetes.io~empty-dir/disk")]
        {
            assert_eq!(found(other), None, "{other}");
        }
    }
}
