//! A container's root file system as containerd's snapshotters describe it: mounted in the container's bundle, from where the
//! guest shares it, or a disk that the guest mounts itself.

use std::os::unix::fs::{FileTypeExt, MetadataExt, lchown};
use std::path::{Path, PathBuf};
use std::{fs, thread};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::error::{Error, IoContext, Result};
use crate::spec::Rootfs;

/// Where containerd wants it, in the bundle.
const PLACE: &str = "rootfs";

/// Bytes of options that mount(2) takes: a page.
const OPTION_BYTES: usize = 4096;

/// How owners are to be shown mapped (`uidmap=INSIDE:OUTSIDE:LENGTH`, and as many as there are).
const UIDS: &str = "uidmap=";

/// The same for groups.
const GIDS: &str = "gidmap=";

/// One of the mounts that a snapshot consists of (containerd's `types.Mount`).
#[derive(Clone, Debug)]
pub(crate) struct Mount {
    pub(crate) kind: String,
    pub(crate) source: String,
    /// Below the root of the others.
    pub(crate) target: String,
    pub(crate) options: Vec<String>,
}

/// Makes the root file system of a bundle; [`unmount`] undoes it. Without mounts it is the directory that the bundle names.
pub(crate) fn prepare(bundle: &Path, root: &Path, mounts: &[Mount]) -> Result<Rootfs> {
    if let [only] = mounts
        && let Some(disk) = disk(only)
    {
        return Ok(Rootfs::Disk(disk));
    }
    let place = bundle.join(PLACE);
    if mounts.is_empty() {
        // Somebody else's directory, or one that containerd has mounted.
        return Ok(Rootfs::Directory { path: bundle.join(root), mapped: false });
    }
    fs::create_dir_all(&place).doing(|| format!("making {}", place.display()))?;
    for asked in mounts {
        let target = place.join(asked.target.trim_start_matches('/'));
        mount_one(asked, &target).map_err(|error| {
            Error::io(format_args!("mounting {} {:?} on {}", asked.kind, asked.source, target.display()), &error.into())
        })?;
    }
    // Owners are mapped in the guest, whose user namespace it is.
    let mapped = mounts.iter().any(|asked| asked.options.iter().any(|option| option.starts_with(UIDS)));
    if mapped {
        give_back(&place, mounts).doing(|| format!("giving {} to its own root", place.display()))?;
    }
    Ok(Rootfs::Directory { path: place, mapped })
}

/// The root directory of a new snapshot belongs already to whom its owner would be mapped to.
fn give_back(place: &Path, mounts: &[Mount]) -> std::io::Result<()> {
    let options = || mounts.iter().flat_map(|asked| &asked.options);
    let first = |name: &str| options().find_map(|option| outside(option.strip_prefix(name)?));
    let found = fs::metadata(place)?;
    let inside = |owner: u32, name: &str| owner.checked_sub(first(name)?);
    match (inside(found.uid(), UIDS), inside(found.gid(), GIDS)) {
        // It was given back before, or cannot be written.
        (None, None) => Ok(()),
        (uid, gid) => lchown(place, uid, gid),
    }
}

/// The number outside to which the mapping that begins at root maps it.
fn outside(mappings: &str) -> Option<u32> {
    mappings.split(',').find_map(|mapping| mapping.strip_prefix("0:")?.split(':').next()?.parse().ok())
}

/// A disk that a guest can mount: ext4 in a file or block device, to be written to.
fn disk(asked: &Mount) -> Option<PathBuf> {
    let found = fs::metadata(&asked.source).ok()?.file_type();
    let fits = asked.kind == "ext4" && (found.is_file() || found.is_block_device());
    (fits && !asked.options.iter().any(|option| option == "ro")).then(|| PathBuf::from(&asked.source))
}

/// Takes everything off that is mounted in a bundle.
pub(crate) fn unmount(bundle: &Path) -> Result<()> {
    let place = bundle.join(PLACE);
    loop {
        match umount2(&place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(Error::io(format_args!("unmounting {}", place.display()), &error.into())),
        }
    }
}

fn mount_one(asked: &Mount, target: &Path) -> nix::Result<()> {
    let (mut flags, mut data) = (MsFlags::empty(), Vec::new());
    for option in &asked.options {
        match option.as_str() {
            "rw" | "defaults" => {}
            "ro" => flags |= MsFlags::MS_RDONLY,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            // The copy that the guest shares has a propagation of its own.
            "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared" => {}
            mapping if mapping.starts_with(UIDS) || mapping.starts_with(GIDS) => {}
            _ => data.push(option.clone()),
        }
    }
    let (source, kind) = (asked.source.clone(), asked.kind.clone());
    let (target, (directory, data)) = (target.to_owned(), shorten(&kind, &data));
    let again = flags.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY).then_some(flags | MsFlags::MS_REMOUNT);
    // In a thread of its own, whose working directory nobody else has.
    let work = move || {
        if let Some(directory) = directory {
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(&directory)?;
        }
        mount(Some(source.as_str()), &target, Some(kind.as_str()), flags, Some(data.as_str()))?;
        // A bind mount is made read-only in a second step (mount(2)).
        let none = None::<&str>;
        again.map_or(Ok(()), |flags| mount(none, &target, none, flags, none))
    };
    thread::spawn(work).join().unwrap_or(Err(Errno::EIO))
}

/// Options as one text. An overlay's many layers may be too long for it: then they are named from the directory that
/// they have in common.
fn shorten(kind: &str, options: &[String]) -> (Option<PathBuf>, String) {
    let text = options.join(",");
    let lowers = options.iter().find_map(|option| option.strip_prefix("lowerdir="));
    let Some(lowers) = lowers.filter(|_| kind == "overlay" && text.len() >= OPTION_BYTES) else { return (None, text) };
    let layers: Vec<&Path> = lowers.split(':').map(Path::new).collect();
    let Some(common) = common(&layers) else { return (None, text) };
    let below = |layer: &&Path| layer.strip_prefix(&common).unwrap_or(layer).display().to_string();
    let short = layers.iter().map(below).collect::<Vec<_>>().join(":");
    (Some(common), text.replace(lowers, &short))
}

/// The deepest directory that all are below.
fn common(paths: &[&Path]) -> Option<PathBuf> {
    let first = paths.first()?.parent()?;
    first.ancestors().find(|above| paths.iter().all(|path| path.starts_with(above))).map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_tells_whom_root_is_mapped_to() {
        assert_eq!(["0:65536:65536", "5:9:1,0:7:5", "5:9:1", ""].map(outside), [Some(65536), Some(7), None, None]);
    }

    #[test]
    fn many_layers_are_named_from_where_they_all_are() {
        let layer = |number: usize| format!("/var/lib/containerd/snapshots/{number:03}/fs");
        let layers = |count| (0..count).map(layer).collect::<Vec<_>>().join(":");
        let options = |count| vec![format!("lowerdir={}", layers(count)), "index=off".to_owned()];
        let (directory, text) = shorten("overlay", &options(2));
        assert_eq!((directory, text), (None, format!("lowerdir={},index=off", layers(2))));
        let (directory, text) = shorten("overlay", &options(200));
        assert_eq!(directory.as_deref(), Some(Path::new("/var/lib/containerd/snapshots")));
        assert!(text.starts_with("lowerdir=000/fs:001/fs:") && text.ends_with("199/fs,index=off"));
        assert!(text.len() < OPTION_BYTES);
    }
}
