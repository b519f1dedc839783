//! Writable space of pods: a sparse ext4 file each, copied from a template that is made once.
//!
//! The template has no journal, and no checksums, since a pod's writable layers do not outlive the pod, and its inode tables are left
//! for the guest to initialise, so that it is a few hundred KiB of data in a file of any size.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::error::{Error, IoContext, Result};

/// Changes with the way in which the template is made.
const TEMPLATE_VERSION: u32 = 1;

/// Longest run of bytes copied at once.
const COPY_BYTES: usize = 64 << 10;

nix::ioctl_write_int_bad!(
    /// ioctl_ficlone(2).
    ficlone,
    libc::FICLONE
);

/// The template for writable space of `bytes`, made now if it is not there.
pub(crate) fn template(directory: &Path, bytes: u64) -> Result<PathBuf> {
    let path = directory.join(format!("template-v{TEMPLATE_VERSION}-{bytes}.ext4"));
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(directory).doing(|| format!("creating {}", directory.display()))?;
    let new = directory.join(format!("template.{}.new", std::process::id()));
    let made = make(&new, bytes).and_then(|()| {
        fs::rename(&new, &path).doing(|| format!("renaming to {}", path.display()))?;
        Ok(path)
    });
    if made.is_err() {
        // Best effort: the next start makes it anew.
        let _ = fs::remove_file(&new);
    }
    made
}

fn make(path: &Path, bytes: u64) -> Result<()> {
    let file = File::create(path).doing(|| format!("creating {}", path.display()))?;
    file.set_len(bytes).doing(|| format!("sizing {}", path.display()))?;
    let output = Command::new("mkfs.ext4")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(["-q", "-F", "-b", "4096", "-m", "0", "-O", "^has_journal,^resize_inode,sparse_super2,^metadata_csum"])
        .args(["-E", "lazy_itable_init=1,nodiscard,packed_meta_blocks=1,root_owner=0:0"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Error::Unavailable(format!("mkfs.ext4: {error}: install e2fsprogs")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Internal(format!("mkfs.ext4: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())))
}

/// Copies the template, sharing its blocks where the file system can and leaving its holes where not.
pub(crate) fn create(template: &Path, path: &Path) -> Result<File> {
    let copy = || -> io::Result<File> {
        let from = File::open(template)?;
        let to = File::options().read(true).write(true).create_new(true).open(path)?;
        if !clone_blocks(&from, &to)? {
            copy_data(&from, &to)?;
        }
        Ok(to)
    };
    copy().doing(|| format!("copying {} to {}", template.display(), path.display()))
}

#[expect(unsafe_code, reason = "an ioctl")]
fn clone_blocks(from: &File, to: &File) -> io::Result<bool> {
    // SAFETY: both descriptors are open for the length of the call.
    match unsafe { ficlone(to.as_raw_fd(), from.as_raw_fd()) } {
        Ok(_) => Ok(true),
        Err(Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::EXDEV | Errno::EINVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn copy_data(from: &File, to: &File) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    while let Some((start, end)) = next_data(from, at, length)? {
        at = start;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            let read = from.read_at(&mut buffer[..wanted], at)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            to.write_all_at(&buffer[..read], at)?;
            at += read as u64;
        }
    }
    Ok(())
}

/// The next run of bytes at or after `at` that is not a hole.
fn next_data(file: &File, at: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    let offset = |value: u64| i64::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge));
    if at >= length {
        return Ok(None);
    }
    let start = match lseek(file, offset(at)?, Whence::SeekData) {
        Ok(start) => start,
        Err(Errno::ENXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let end = lseek(file, start, Whence::SeekHole)?;
    Ok(Some((u64::try_from(start).unwrap_or(length), u64::try_from(end).unwrap_or(length))))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_copy_is_equal_and_as_sparse() {
        let dir = tempfile::tempdir().expect("a directory");
        let template = template(dir.path(), 1 << 30).expect("mkfs.ext4 works");
        let path = dir.path().join("pod.ext4");
        create(&template, &path).expect("copies");
        let (old, new) = (fs::metadata(&template).expect("is there"), fs::metadata(&path).expect("is there"));
        assert_eq!((old.len(), new.len()), (1 << 30, 1 << 30));
        assert!(new.blocks() <= old.blocks() + 64, "{} blocks from {}", new.blocks(), old.blocks());
        let check = Command::new("/usr/sbin/e2fsck").args(["-fn"]).arg(&path).output().expect("e2fsck runs");
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        assert!(create(&template, &path).is_err(), "an existing file is not overwritten");
    }

    #[test]
    fn the_template_is_made_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = template(dir.path(), 64 << 20).expect("mkfs.ext4 works");
        let made = fs::metadata(&first).expect("is there").ino();
        let again = template(dir.path(), 64 << 20).expect("is there");
        assert_eq!(fs::metadata(again).expect("is there").ino(), made);
        assert_eq!(fs::read_dir(dir.path()).expect("lists").count(), 1);
    }
}
