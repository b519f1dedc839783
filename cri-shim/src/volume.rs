//! A volume's mount: a copy of what the host has mounted at a path, attached nowhere yet, with the propagation and the
//! write protection that were asked for. The host's kernel keeps both, whatever a guest or its file server does.
#![expect(unsafe_code, reason = "open_tree and mount_setattr")]

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::stat::{SFlag, fstat};

use crate::error::{Error, IoContext, Result};
use crate::mount_table;
use crate::spec::MountSpec;

/// A mount that is attached nowhere: it is gone once this is dropped.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) mount: OwnedFd,
    pub(crate) directory: bool,
}

/// Copies what is at `source`, links followed, for a mount as asked for by `mount`.
pub(crate) fn clone(source: &Path, mount: &MountSpec) -> Result<Volume> {
    let doing = || format!("mounting {}", source.display());
    let tree = open_tree(source).doing(doing)?;
    let kind = SFlag::from_bits_truncate(fstat(&tree).doing(doing)?.st_mode) & SFlag::S_IFMT;
    if kind != SFlag::S_IFDIR && kind != SFlag::S_IFREG {
        return Err(refusal(source));
    }
    let propagation = if mount.host_to_container { libc::MS_SLAVE } else { libc::MS_PRIVATE };
    // A device of the host's means nothing to a guest, and its file server has no business with it.
    let (nodev, read_only) = (libc::MOUNT_ATTR_NODEV, libc::MOUNT_ATTR_RDONLY);
    let below = libc::AT_RECURSIVE;
    let everywhere = if mount.recursive_read_only { nodev | read_only } else { nodev };
    set(tree.as_fd(), below, everywhere, propagation).doing(doing)?;
    if mount.read_only {
        set(tree.as_fd(), 0, read_only, 0).doing(doing)?;
    }
    Ok(Volume { mount: tree, directory: kind == SFlag::S_IFDIR })
}

/// Why something that is neither file nor directory cannot be had in a guest.
pub(crate) fn refusal(source: &Path) -> Error {
    Error::InvalidArgument(format!(
        "{} is a socket, pipe or device of the host, which no guest can use: reach what is behind it over the network",
        source.display()
    ))
}

/// Whether the host has mounted something below a directory.
pub(crate) fn has_mounts_below(directory: &Path) -> Result<bool> {
    let directory = fs::canonicalize(directory).doing(|| format!("looking for {}", directory.display()))?;
    Ok(mount_table::read()?.iter().any(|mount| mount.point != directory && mount.point.starts_with(&directory)))
}

fn open_tree(source: &Path) -> nix::Result<OwnedFd> {
    let path = CString::new(source.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_RECURSIVE.cast_unsigned();
    // SAFETY: a C string that lives past the call (open_tree(2)).
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor and nobody else holds it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// mount_setattr(2) on a mount, and with AT_RECURSIVE on all below it.
fn set(mount: BorrowedFd<'_>, recursive: libc::c_int, attributes: u64, propagation: u64) -> nix::Result<()> {
    let attributes = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation, userns_fd: 0 };
    // SAFETY: the structure lives past the call and its size is passed with it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_with_a_mount_below_is_told_from_one_without() {
        assert!(has_mounts_below(Path::new("/")).expect("looks"));
        let dir = tempfile::tempdir().expect("a directory");
        assert!(!has_mounts_below(dir.path()).expect("looks"));
    }
}
