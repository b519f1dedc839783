//! The kernel's view of a disk against GNU tar's: the same layers, extracted one over the other.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// All that can be known of a file; hard links by the first path of the same inode.
#[derive(Debug, PartialEq)]
pub(crate) struct Seen {
    mode: u32,
    owner: (u32, u32),
    links: u64,
    mtime: (i64, i64),
    device: u64,
    content: Vec<u8>,
    xattrs: BTreeMap<OsString, Vec<u8>>,
    same_as: PathBuf,
}

/// Every file below a directory, by its path from there.
pub(crate) fn tree(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let (mut seen, mut todo) = (BTreeMap::new(), vec![PathBuf::new()]);
    while let Some(path) = todo.pop() {
        let full = root.join(&path);
        let meta = fs::symlink_metadata(&full).expect("it is there");
        let kind = meta.file_type();
        let content = if kind.is_symlink() {
            fs::read_link(&full).expect("a link").into_os_string().into_encoded_bytes()
        } else if kind.is_file() {
            fs::read(&full).expect("readable")
        } else {
            vec![]
        };
        if kind.is_dir() {
            todo.extend(
                fs::read_dir(&full).expect("a directory").map(|entry| path.join(entry.expect("an entry").file_name())),
            );
        }
        let is_device = kind.is_block_device() || kind.is_char_device();
        let names: Vec<_> = xattr::list(&full).expect("attributes").collect();
        let xattrs = names
            .into_iter()
            .map(|name| (name.clone(), xattr::get(&full, &name).expect("one").expect("there")))
            .collect();
        let file = Seen {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            // File systems do not agree on what a directory's links are, and tar touches directories as it fills them.
            links: if kind.is_dir() { 0 } else { meta.nlink() },
            mtime: if kind.is_dir() { (0, 0) } else { (meta.mtime(), meta.mtime_nsec()) },
            device: if is_device { meta.rdev() } else { 0 },
            content,
            xattrs,
            same_as: PathBuf::new(),
        };
        seen.insert(path, (meta.ino(), file));
    }
    let mut first = BTreeMap::new();
    seen.into_iter()
        .map(|(path, (inode, mut file))| {
            file.same_as = first.entry(inode).or_insert_with(|| path.clone()).clone();
            (path, file)
        })
        .collect()
}

/// The same files but for the root, which tar only has if an archive does.
pub(crate) fn assert_same(ours: &BTreeMap<PathBuf, Seen>, theirs: &BTreeMap<PathBuf, Seen>, what: &Path) {
    let what = what.display();
    for path in ours.keys().chain(theirs.keys()).filter(|path| !path.as_os_str().is_empty()) {
        match (ours.get(path), theirs.get(path)) {
            (Some(our), Some(their)) if our == their => {}
            (Some(our), Some(their)) if our.content != their.content => panic!("{what}: {path:?} has other bytes"),
            (our, their) => panic!("{what}: {path:?} is {our:?}, and by tar {their:?}"),
        }
    }
}

/// Whether this machine's kernel knows EROFS.
pub(crate) fn possible() -> bool {
    let _module = Command::new("modprobe").arg("erofs").output();
    fs::read_to_string("/proc/filesystems").is_ok_and(|list| list.contains("erofs"))
}

/// Runs a test of this program where the kernel does.
pub(crate) fn in_the_lab(test: &str) {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/lab/lab");
    let program = std::env::current_exe().expect("its path");
    let status =
        Command::new(lab).arg("--").arg(program).args(["--exact", test, "--nocapture"]).status().expect("the lab runs");
    assert!(status.success(), "{test} failed in the lab");
}

/// A disk mounted by the kernel.
pub(crate) struct Mounted(pub(crate) tempfile::TempDir);

impl Mounted {
    pub(crate) fn new(disk: &Path) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        run(Command::new("mount").args(["-t", "erofs", "-o", "loop,ro"]).arg(disk).arg(dir.path()));
        Self(dir)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run(Command::new("umount").arg(self.0.path()));
    }
}

/// Extracts layers by GNU tar as root, whiteouts obeyed by hand.
pub(crate) fn extract(layers: &[PathBuf], to: &Path) {
    for layer in layers {
        let listing = run(Command::new("tar").args(["--quoting-style=literal", "-tf"]).arg(layer));
        for path in listing.split('\n') {
            let is_dir = path.ends_with('/');
            let path = Path::new(path.strip_prefix("./").unwrap_or(path).trim_matches('/'));
            if path.as_os_str().is_empty() {
                continue;
            }
            // tar does not put a file in a full directory's place, nor a directory in a link's.
            if fs::symlink_metadata(to.join(path)).is_ok_and(|there| there.is_dir() != is_dir) {
                remove(&to.join(path));
            }
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let parent = to.join(path.parent().expect("a parent"));
            if name == ".wh..wh..opq" {
                for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
                    remove(&entry.path());
                }
            } else if let Some(hidden) = name.strip_prefix(".wh.") {
                remove(&parent.join(hidden));
            }
        }
        run(Command::new("tar")
            .args(["--numeric-owner", "--same-owner", "-p", "--xattrs", "--xattrs-include=*", "--exclude=.wh.*", "-C"])
            .arg(to)
            .arg("-xf")
            .arg(layer));
    }
}

fn remove(path: &Path) {
    let _one_of_them = fs::remove_dir_all(path).or_else(|_| fs::remove_file(path));
}

fn run(command: &mut Command) -> String {
    let output = command.output().expect("it runs");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
