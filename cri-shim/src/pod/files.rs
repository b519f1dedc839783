//! Files of the host that a container is given as copies: a snapshot in guest memory, which [`super::copies`] keeps up.
//! Which those are is [`super::share`]'s decision.
//!
//! Only small trees of regular files, directories and symbolic links; a link is copied, never followed, except for the
//! mount's own source. Nothing a container writes there reaches the host.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use agent_protocol::v1::{FileEntry, FileTree};

use crate::error::{Error, IoContext, Result};

/// Most bytes of contents in one tree.
const TREE_BYTES: u64 = 1 << 20;

/// Most entries in one tree.
const TREE_ENTRIES: usize = 1024;

/// Deepest directory in one tree.
const TREE_DEPTH: usize = 32;

/// Most times that a tree which changes meanwhile is read.
const MOST_LOOKS: u32 = 5;

/// Permission bits of the files that every container is given.
const GENERATED_MODE: u32 = libc::S_IFREG | 0o644;

/// A single file with the given bytes.
pub(super) fn text(content: impl Into<Vec<u8>>) -> FileTree {
    let entry = FileEntry { mode: GENERATED_MODE, content: content.into(), ..FileEntry::default() };
    FileTree { entries: vec![entry] }
}

/// Whether a mount's source is small and simple enough to be copied.
pub(super) fn is_small(source: &Path) -> Result<bool> {
    match snapshot(source) {
        Ok(_) => Ok(true),
        Err(Error::InvalidArgument(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Copies a mount's source.
pub(super) fn snapshot(source: &Path) -> Result<FileTree> {
    look(source)?;
    Ok(tree(source)?.0)
}

/// A tree as it is at one moment, as far as its own directory goes: a kubelet exchanges a volume's files by a link there
/// (`..data`). Also returns its directories.
pub(super) fn tree(source: &Path) -> Result<(FileTree, Vec<PathBuf>)> {
    let mut looks = 1;
    loop {
        let before = changed_at(source);
        let taken = take(source);
        if looks == MOST_LOOKS || before == changed_at(source) {
            return taken;
        }
        looks += 1;
    }
}

fn take(source: &Path) -> Result<(FileTree, Vec<PathBuf>)> {
    let found = fs::metadata(source).doing(|| format!("looking at {}", source.display()))?;
    let mut tree = Tree { entries: Vec::new(), directories: Vec::new(), bytes: 0, source };
    tree.add(source, "", &found, 0)?;
    Ok((FileTree { entries: tree.entries }, tree.directories))
}

/// When names in a directory last changed.
fn changed_at(directory: &Path) -> Option<(i64, i64)> {
    fs::metadata(directory).ok().map(|found| (found.mtime(), found.mtime_nsec()))
}

/// What a mount's source is, links followed.
pub(super) fn look(source: &Path) -> Result<Metadata> {
    fs::metadata(source).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::NotFound(format!("the mount's source {} does not exist", source.display())),
        _ => Error::io(format_args!("the mount's source {}", source.display()), &error),
    })
}

struct Tree<'a> {
    entries: Vec<FileEntry>,
    directories: Vec<PathBuf>,
    bytes: u64,
    source: &'a Path,
}

impl Tree<'_> {
    fn add(&mut self, at: &Path, path: &str, found: &Metadata, depth: usize) -> Result<()> {
        if self.entries.len() >= TREE_ENTRIES || depth > TREE_DEPTH {
            return Err(self.too_large());
        }
        let content = if found.is_file() {
            self.read(at)?
        } else if found.is_symlink() {
            fs::read_link(at).doing(|| format!("reading the link {}", at.display()))?.as_os_str().as_bytes().to_vec()
        } else if found.is_dir() {
            Vec::new()
        } else {
            return Err(Error::InvalidArgument(format!(
                "{} is neither a file, a directory nor a symbolic link, and cannot be copied into a guest",
                at.display()
            )));
        };
        let (mode, uid, gid) = (found.mode(), found.uid(), found.gid());
        self.entries.push(FileEntry { path: path.into(), mode, uid, gid, content });
        if found.is_dir() { self.add_children(at, path, depth) } else { Ok(()) }
    }

    fn add_children(&mut self, at: &Path, path: &str, depth: usize) -> Result<()> {
        let listing = || format!("listing {}", at.display());
        self.directories.push(at.to_owned());
        let mut entries = fs::read_dir(at).and_then(Iterator::collect::<io::Result<Vec<_>>>).doing(listing)?;
        // So that one tree is always told in one way.
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let not_text = |_| Error::InvalidArgument(format!("{} is not UTF-8", entry.path().display()));
            let name = entry.file_name().into_string().map_err(not_text)?;
            let path = if path.is_empty() { name } else { format!("{path}/{name}") };
            let found = entry.metadata().doing(|| format!("looking at {}", entry.path().display()))?;
            self.add(&entry.path(), &path, &found, depth.saturating_add(1))?;
        }
        Ok(())
    }

    /// Reads no more than there is room for, whatever size the file claims, and never waits on a FIFO put in its place.
    fn read(&mut self, at: &Path) -> Result<Vec<u8>> {
        let room = TREE_BYTES.saturating_sub(self.bytes);
        let mut content = Vec::new();
        let read = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(at);
        let read = read.and_then(|file| file.take(room.saturating_add(1)).read_to_end(&mut content));
        let length = read.doing(|| format!("reading {}", at.display()))? as u64;
        if length > room {
            return Err(self.too_large());
        }
        self.bytes = self.bytes.saturating_add(length);
        Ok(content)
    }

    fn too_large(&self) -> Error {
        Error::InvalidArgument(format!(
            "{} is more than the 1 MiB and {TREE_ENTRIES} files that are copied into a guest",
            self.source.display()
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_config_map_is_copied_with_its_links() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join("..1")).expect("creates");
        fs::write(dir.path().join("..1/key"), "value").expect("writes");
        symlink("..1", dir.path().join("..data")).expect("links");
        symlink("..data/key", dir.path().join("key")).expect("links");
        let tree = snapshot(dir.path()).expect("copies");
        let content =
            |path: &str| tree.entries.iter().find(|entry| entry.path == path).map(|entry| entry.content.clone());
        assert_eq!(content("..1/key").expect("a file"), b"value");
        assert_eq!(content("..data").expect("a link"), b"..1");
        assert_eq!(content("key").expect("a link"), b"..data/key");
        assert_eq!(tree.entries.first().map(|entry| entry.path.as_str()), Some(""));
    }

    #[test]
    fn a_single_file_is_copied_and_a_missing_one_is_told() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("termination-log");
        fs::write(&file, "").expect("writes");
        assert_eq!(snapshot(&file).expect("copies").entries.len(), 1);
        assert!(matches!(snapshot(&dir.path().join("none")), Err(Error::NotFound(_))));
    }

    #[test]
    fn what_is_too_much_or_no_file_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("a"), vec![0; 1 << 20]).expect("writes");
        assert!(is_small(dir.path()).expect("looks"));
        fs::write(dir.path().join("b"), "x").expect("writes");
        assert!(!is_small(dir.path()).expect("looks"));
        let zero = Path::new("/dev/zero");
        assert!(matches!(snapshot(zero), Err(Error::InvalidArgument(_))));
    }
}
