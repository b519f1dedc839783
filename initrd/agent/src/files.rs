//! Small trees of files that the host sends, laid out in guest memory.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects)]

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};

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

fn check(tree: &FileTree) -> Result<(), FilesError> {
    let total = tree.entries.iter().fold(0usize, |sum, entry| sum.saturating_add(entry.content.len()));
    if total > TREE_BYTES {
        return Err(FilesError::TooLarge(total));
    }
    let climbs =
        |entry: &&FileEntry| !Path::new(&entry.path).components().all(|part| matches!(part, Component::Normal(_)));
    match tree.entries.iter().find(climbs) {
        Some(entry) => Err(FilesError::Entry(entry.path.clone())),
        None => Ok(()),
    }
}

/// Writes `tree` to `place`, which does not exist yet.
pub(crate) fn lay_out(tree: &FileTree, place: &Path) -> Result<(), FilesError> {
    check(tree)?;
    let single = matches!(tree.entries.as_slice(), [only] if only.path.is_empty() && kind(only) != libc::S_IFDIR);
    if !single {
        fs::create_dir_all(place).map_err(|error| FilesError::Write(String::new(), error))?;
    }
    tree.entries.iter().try_for_each(|entry| write_entry(entry, &path_of(entry, place)).map_err(failed(entry)))
}

/// An empty path must not add a slash, which would make a single file a directory.
fn path_of(entry: &FileEntry, place: &Path) -> PathBuf {
    if entry.path.is_empty() { place.to_owned() } else { place.join(&entry.path) }
}

fn failed(entry: &FileEntry) -> impl Fn(io::Error) -> FilesError {
    let path = entry.path.clone();
    move |error| match error.kind() {
        io::ErrorKind::InvalidInput => FilesError::Entry(path.clone()),
        _ => FilesError::Write(path.clone(), error),
    }
}

/// By which a kubelet exchanges all files of a volume in one step.
const SWITCH: &str = "..data";

/// Makes a directory that [`lay_out`] wrote what `tree` says, each entry in one step, as the protocol has it. What is
/// put in place is made elsewhere first, so that whoever watches the directory sees it appear whole.
pub(crate) fn update(tree: &FileTree, place: &Path) -> Result<(), FilesError> {
    check(tree)?;
    if !place.is_dir() {
        return Err(FilesError::Entry(String::new()));
    }
    let staging = place.with_extension("new");
    let prepare = || match fs::remove_dir_all(&staging) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => fs::create_dir(&staging),
    };
    prepare().map_err(|error| FilesError::Write(String::new(), error))?;
    let (mut links, others): (Vec<_>, Vec<_>) = tree.entries.iter().partition(|entry| kind(entry) == libc::S_IFLNK);
    links.sort_by_key(|entry| entry.path != SWITCH);
    for entry in others.into_iter().chain(links) {
        replace(entry, &path_of(entry, place), &staging.join("entry")).map_err(failed(entry))?;
    }
    let wanted: BTreeSet<PathBuf> = tree.entries.iter().map(|entry| path_of(entry, place)).collect();
    let swept = remove_others(place, &wanted).and_then(|()| fs::remove_dir_all(&staging));
    swept.map_err(|error| FilesError::Write(String::new(), error))
}

fn replace(entry: &FileEntry, path: &Path, new: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(path).ok();
    if found.as_ref().is_some_and(|found| is_same(entry, path, found)) {
        return Ok(());
    }
    let is_directory = found.as_ref().is_some_and(fs::Metadata::is_dir);
    if kind(entry) == libc::S_IFDIR {
        if found.is_some() && !is_directory {
            fs::remove_file(path)?;
        }
        return write_entry(entry, path);
    }
    write_entry(entry, new)?;
    if is_directory {
        fs::remove_dir_all(path)?;
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::rename(new, path)
}

fn is_same(entry: &FileEntry, path: &Path, found: &fs::Metadata) -> bool {
    let permissions = kind(entry) == libc::S_IFLNK || found.mode() & 0o7777 == entry.mode & 0o7777;
    let attributes = found.mode() & libc::S_IFMT == kind(entry) && (found.uid(), found.gid()) == (entry.uid, entry.gid);
    let content = || match kind(entry) {
        libc::S_IFREG => fs::read(path).is_ok_and(|content| content == entry.content),
        libc::S_IFLNK => fs::read_link(path).is_ok_and(|target| target.as_os_str().as_bytes() == entry.content),
        _ => true,
    };
    permissions && attributes && content()
}

fn remove_others(directory: &Path, wanted: &BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let (path, is_directory) = (entry.path(), entry.file_type()?.is_dir());
        match (wanted.contains(&path), is_directory) {
            (true, true) => remove_others(&path, wanted)?,
            (true, false) => {}
            (false, true) => fs::remove_dir_all(&path)?,
            (false, false) => fs::remove_file(&path)?,
        }
    }
    Ok(())
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

    fn volume(version: &str, keys: &[&str]) -> Vec<FileEntry> {
        let mut entries = vec![entry("", libc::S_IFDIR | 0o755, b"")];
        entries.push(entry("..data", libc::S_IFLNK | 0o777, version.as_bytes()));
        entries.push(entry(version, libc::S_IFDIR | 0o755, b""));
        for key in keys {
            entries.push(entry(&format!("{version}/{key}"), libc::S_IFREG | 0o644, version.as_bytes()));
            entries.push(entry(key, libc::S_IFLNK | 0o777, format!("..data/{key}").as_bytes()));
        }
        entries
    }

    #[test]
    fn a_volume_is_exchanged_in_one_step_that_watchers_see() {
        use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
        let place = laid_out(volume("..1", &["a", "b"])).expect("laid out");
        let tree = place.path().join("tree");
        let kept = fs::symlink_metadata(tree.join("a")).expect("there").ino();
        let watch = Inotify::init(InitFlags::IN_NONBLOCK).expect("inotify");
        watch.add_watch(&tree, AddWatchFlags::IN_ALL_EVENTS & !AddWatchFlags::IN_ACCESS).expect("watched");
        update(&FileTree { entries: volume("..2", &["a", "c"]) }, &tree).expect("updated");
        assert_eq!(fs::read(tree.join("a")).expect("reads"), b"..2");
        assert_eq!(fs::read(tree.join("c")).expect("reads"), b"..2");
        assert!(
            !tree.join("b").exists() && !tree.join("..1").exists() && fs::symlink_metadata(tree.join("b")).is_err()
        );
        assert_eq!(fs::symlink_metadata(tree.join("a")).expect("there").ino(), kept, "what is the same is left alone");
        let events = watch.read_events().expect("events");
        let switched = |event: &nix::sys::inotify::InotifyEvent| {
            event.mask.contains(AddWatchFlags::IN_MOVED_TO) && event.name.as_deref() == Some("..data".as_ref())
        };
        assert_eq!(events.iter().filter(|event| switched(event)).count(), 1, "{events:?}");
        assert_eq!(fs::read_dir(place.path()).expect("lists").count(), 1, "nothing is left beside it");
    }

    #[test]
    fn plain_files_are_replaced_and_kinds_may_change() {
        let file = |path: &str, text: &str| entry(path, libc::S_IFREG | 0o644, text.as_bytes());
        let directory = |path: &str| entry(path, libc::S_IFDIR | 0o755, b"");
        let place = laid_out(vec![directory(""), file("a", "1"), directory("d"), file("d/x", "1")]).expect("laid out");
        let tree = place.path().join("tree");
        update(&FileTree { entries: vec![directory(""), directory("a"), file("a/y", "2"), file("d", "2")] }, &tree)
            .expect("updated");
        assert_eq!(fs::read(tree.join("a/y")).expect("reads"), b"2");
        assert_eq!(fs::read(tree.join("d")).expect("reads"), b"2");
        let climbing = FileTree { entries: vec![file("../x", "")] };
        assert!(matches!(update(&climbing, &tree), Err(FilesError::Entry(_))));
        assert!(matches!(update(&FileTree::default(), &tree.join("d")), Err(FilesError::Entry(_))));
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
