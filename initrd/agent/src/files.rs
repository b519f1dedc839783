//! Small trees of files that the host sends, laid out in guest memory.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects)]

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path};

use agent_protocol::v1::{FileEntry, FileTree};
use thiserror::Error;

/// Most bytes of all files of a tree.
const TREE_BYTES: usize = 1 << 20;

/// Why a tree cannot be laid out.
#[derive(Debug, Error)]
pub(crate) enum FilesError {
    /// Over [`TREE_BYTES`].
    #[error("a tree of {0} bytes is over the limit of {TREE_BYTES}")]
    TooLarge(usize),
    /// Climbs, is absolute, or of an unknown kind.
    #[error("{0:?} cannot be an entry of a file tree")]
    Entry(String),
    /// Guest memory is full, say.
    #[error("cannot write {0:?}: {1}")]
    Write(String, #[source] io::Error),
}

/// Writes `tree` to `place`, which does not exist yet.
pub(crate) fn lay_out(tree: &FileTree, place: &Path) -> Result<(), FilesError> {
    let total = tree.entries.iter().fold(0usize, |sum, entry| sum.saturating_add(entry.content.len()));
    if total > TREE_BYTES {
        return Err(FilesError::TooLarge(total));
    }
    let single = matches!(tree.entries.as_slice(), [only] if only.path.is_empty() && kind(only) != libc::S_IFDIR);
    if !single {
        fs::create_dir_all(place).map_err(|error| FilesError::Write(String::new(), error))?;
    }
    tree.entries.iter().try_for_each(|entry| {
        if !Path::new(&entry.path).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(FilesError::Entry(entry.path.clone()));
        }
        // An empty path must not add a slash, which would make a single file a directory.
        let path = if entry.path.is_empty() { place.to_owned() } else { place.join(&entry.path) };
        write_entry(entry, &path).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => FilesError::Entry(entry.path.clone()),
            _ => FilesError::Write(entry.path.clone(), error),
        })
    })
}

fn kind(entry: &FileEntry) -> u32 {
    entry.mode & libc::S_IFMT
}

fn write_entry(entry: &FileEntry, path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    match kind(entry) {
        libc::S_IFDIR => fs::create_dir_all(path)?,
        libc::S_IFREG => {
            // No link that an earlier entry made is followed.
            let mut options = OpenOptions::new();
            options.write(true).create_new(true).custom_flags(libc::O_NOFOLLOW);
            options.open(path)?.write_all(&entry.content)?;
        }
        libc::S_IFLNK => symlink(std::ffi::OsStr::from_bytes(&entry.content), path)?,
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    }
    lchown(path, Some(entry.uid), Some(entry.gid))?;
    if kind(entry) != libc::S_IFLNK {
        fs::set_permissions(path, Permissions::from_mode(entry.mode & 0o7777))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, mode: u32, content: &[u8]) -> FileEntry {
        let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        FileEntry { path: path.into(), mode, uid, gid, content: content.into() }
    }

    fn laid_out(entries: Vec<FileEntry>) -> Result<tempfile::TempDir, FilesError> {
        let place = tempfile::tempdir().expect("directory");
        lay_out(&FileTree { entries }, &place.path().join("tree")).map(|()| place)
    }

    #[test]
    fn a_tree_is_laid_out() {
        let place = laid_out(vec![
            entry("", libc::S_IFDIR | 0o750, b""),
            entry("..data", libc::S_IFLNK | 0o777, b"v1"),
            entry("v1/key", libc::S_IFREG | 0o400, b"value"),
        ])
        .expect("laid out");
        let tree = place.path().join("tree");
        assert_eq!(fs::read(tree.join("..data/key")).expect("reads"), b"value");
        let mode = |path: &str| fs::metadata(tree.join(path)).expect("there").permissions().mode() & 0o7777;
        assert_eq!((mode(""), mode("v1/key")), (0o750, 0o400));
    }

    #[test]
    fn one_unnamed_entry_is_a_file() {
        let place = laid_out(vec![entry("", libc::S_IFREG | 0o644, b"127.0.0.1 localhost\n")]).expect("laid out");
        assert!(fs::metadata(place.path().join("tree")).expect("there").is_file());
    }

    #[test]
    fn entries_that_would_leave_the_tree_are_refused() {
        for path in ["../x", "/etc/x", "a/../../x"] {
            let tree = laid_out(vec![entry(path, libc::S_IFREG | 0o644, b"")]);
            assert!(matches!(tree, Err(FilesError::Entry(_))), "{path}");
        }
        assert!(matches!(laid_out(vec![entry("a", libc::S_IFBLK, b"")]), Err(FilesError::Entry(_))));
        let large = entry("a", libc::S_IFREG, &vec![0; TREE_BYTES + 1]);
        assert!(matches!(laid_out(vec![large]), Err(FilesError::TooLarge(_))));
    }
}
