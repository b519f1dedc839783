//! What containers have written: the blocks and inodes of their writable layers, counted by walking them.
//!
//! A walk goes a few entries at a time between the agent's other work, so that a large layer holds nobody up; it is not
//! begun more often than its cost allows. The trees are the containers' and change meanwhile: a directory is opened
//! beneath its layer's own root and through no link.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects)]

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, Metadata, ReadDir};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_protocol::v1;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::time;

/// A count younger than this is not taken anew.
const FRESH: Duration = Duration::from_secs(5);

/// Part of the time that walks may take: one in this many.
const SHARE: u32 = 10;

/// Entries looked at before others have their turn.
const ENTRIES: usize = 256;

/// How long an answer waits for a count that has just been begun.
const PATIENCE: Duration = Duration::from_millis(300);

/// Most files with several names that are remembered so as to be counted once.
const LINKS: usize = 1 << 17;

/// Bytes of a block as stat(2) counts them.
const BLOCK: u64 = 512;

/// The counts, and the walk that makes the next.
#[derive(Debug, Default)]
pub(crate) struct Census {
    counts: BTreeMap<String, v1::DiskUsage>,
    walk: Option<Walk>,
    /// When the last walk was over, and how long it took.
    last: Option<(Instant, Duration)>,
}

#[derive(Debug)]
struct Walk {
    begun: Instant,
    layer: Option<(String, Layer)>,
    ahead: Vec<(String, PathBuf)>,
    counts: BTreeMap<String, v1::DiskUsage>,
}

impl Census {
    /// Begins to count these layers (containers' ids and directories) if what is known of them is too old.
    pub(crate) fn want(&mut self, layers: impl FnOnce() -> Vec<(String, PathBuf)>) {
        let rest = |(over, took): (Instant, Duration)| over.elapsed() < FRESH.max(took.saturating_mul(SHARE));
        if self.walk.is_none() && !self.last.is_some_and(rest) {
            self.walk = Some(Walk { begun: Instant::now(), layer: None, ahead: layers(), counts: BTreeMap::new() });
        }
    }

    /// Whether [`Self::step`] has something to do.
    pub(crate) fn is_counting(&self) -> bool {
        self.walk.is_some()
    }

    /// Whether there will soon be a better answer than [`Self::counts`].
    pub(crate) fn is_worth_waiting(&self) -> bool {
        self.walk.as_ref().is_some_and(|walk| walk.begun.elapsed() < PATIENCE)
    }

    /// Counts a little.
    pub(crate) fn step(&mut self) {
        let Some(walk) = &mut self.walk else { return };
        for _ in 0..ENTRIES {
            if !walk.step() {
                let took = walk.begun.elapsed();
                self.counts = std::mem::take(&mut walk.counts);
                (self.walk, self.last) = (None, Some((Instant::now(), took)));
                return;
            }
        }
    }

    /// What the last walk that came to its end has found, by container.
    pub(crate) fn counts(&self) -> &BTreeMap<String, v1::DiskUsage> {
        &self.counts
    }
}

impl Walk {
    /// Whether there is more.
    fn step(&mut self) -> bool {
        let Some((id, layer)) = &mut self.layer else {
            let Some((id, path)) = self.ahead.pop() else { return false };
            // One that has gone meanwhile is left out.
            self.layer = Layer::open(&path).ok().map(|layer| (id, layer));
            return true;
        };
        if !layer.step() {
            let counted_at_ns = time::now_ns();
            let count = v1::DiskUsage { bytes: layer.bytes, inodes: layer.inodes, counted_at_ns };
            self.counts.insert(id.clone(), count);
            self.layer = None;
        }
        true
    }
}

#[derive(Debug)]
struct Layer {
    root: OwnedFd,
    /// The directory that is being read, below the root.
    now: Option<(PathBuf, ReadDir)>,
    ahead: Vec<PathBuf>,
    links: HashSet<u64>,
    bytes: u64,
    inodes: u64,
}

impl Layer {
    fn open(path: &Path) -> io::Result<Self> {
        let root = File::open(path)?;
        let found = root.metadata()?;
        let mut layer = Self {
            root: root.into(),
            now: None,
            ahead: vec![PathBuf::from(".")],
            links: HashSet::new(),
            bytes: 0,
            inodes: 0,
        };
        layer.add(&found);
        Ok(layer)
    }

    fn add(&mut self, found: &Metadata) {
        let known = !found.is_dir()
            && found.nlink() > 1
            && (!self.links.insert(found.ino()) || self.links.len() > LINKS && self.links.remove(&found.ino()));
        if !known {
            self.bytes = self.bytes.saturating_add(found.blocks().saturating_mul(BLOCK));
            self.inodes = self.inodes.saturating_add(1);
        }
    }

    /// Looks at one more entry; whether there may be more.
    fn step(&mut self) -> bool {
        let Some((path, entries)) = &mut self.now else {
            let Some(path) = self.ahead.pop() else { return false };
            self.now = self.read(&path).ok().map(|entries| (path, entries));
            return true;
        };
        match entries.next() {
            Some(Ok(entry)) => {
                let path = path.join(entry.file_name());
                // One that has gone meanwhile is not counted. (This does not follow a link.)
                if let Ok(found) = entry.metadata() {
                    if found.is_dir() {
                        self.ahead.push(path);
                    }
                    self.add(&found);
                }
            }
            Some(Err(_)) | None => self.now = None,
        }
        true
    }

    fn read(&self, path: &Path) -> io::Result<ReadDir> {
        let beneath = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = openat2(&self.root, path, OpenHow::new().flags(flags).resolve(beneath))?;
        fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn count(census: &mut Census, path: &Path) -> v1::DiskUsage {
        census.want(|| vec![("c".to_owned(), path.to_owned())]);
        while census.is_counting() {
            census.step();
        }
        *census.counts().get("c").expect("counted")
    }

    #[test]
    fn blocks_are_counted_and_hard_links_once() {
        let layer = tempfile::tempdir().expect("a directory");
        let root = layer.path();
        let empty = count(&mut Census::default(), root);
        assert_eq!(empty.inodes, 1);
        fs::create_dir_all(root.join("a/b")).expect("made");
        fs::write(root.join("a/b/file"), vec![1; 1 << 20]).expect("written");
        fs::hard_link(root.join("a/b/file"), root.join("link")).expect("linked");
        File::create(root.join("hole")).and_then(|file| file.set_len(1 << 30)).expect("made");
        symlink("/usr", root.join("out")).expect("linked");
        let full = count(&mut Census::default(), root);
        assert_eq!(full.inodes, empty.inodes + 5);
        assert!((1 << 20..(1 << 20) + (64 << 10)).contains(&(full.bytes - empty.bytes)), "{empty:?} {full:?}");
        assert!(full.counted_at_ns > 0);
    }

    #[test]
    fn a_large_layer_takes_several_steps_and_a_new_count_is_not_due_at_once() {
        let layer = tempfile::tempdir().expect("a directory");
        for number in 0..ENTRIES * 2 {
            fs::write(layer.path().join(number.to_string()), "").expect("written");
        }
        let mut census = Census::default();
        census.want(|| vec![("c".to_owned(), layer.path().to_owned()), ("gone".to_owned(), "/no/such".into())]);
        census.step();
        assert!(census.is_counting() && census.is_worth_waiting() && census.counts().is_empty());
        while census.is_counting() {
            census.step();
        }
        assert_eq!(census.counts().get("c").map(|count| count.inodes), u64::try_from(ENTRIES * 2 + 1).ok());
        assert_eq!(census.counts().len(), 1);
        census.want(|| panic!("what is fresh is not counted"));
        assert!(!census.is_counting());
    }
}
