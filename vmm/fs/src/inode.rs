//! The nodes that the guest knows: each a descriptor opened with O_PATH, so that it stays what it is whatever the host
//! renames or removes.
//!
//! The same file below two mounts is two nodes, since what may be done to it is its mount's business.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, ResolveFlags, Statx, StatxFlags, openat2, statx};
use rustix::io::{Errno, Result};

use crate::abi::ROOT;

/// Most nodes at a time, each of which holds a descriptor.
const MOST_NODES: usize = 500_000;

/// How much of the root's listing is read at a time.
const LISTING_BYTES: usize = 4096;

/// Beneath the directory that a way starts from; other mounts are welcome, links are not.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::NO_SYMLINKS);

/// What makes two descriptors the same node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    mount: u64,
    device: (u32, u32),
    number: u64,
}

impl Key {
    pub(crate) fn of(status: &Statx) -> Self {
        let device = (status.stx_dev_major, status.stx_dev_minor);
        Self { mount: status.stx_mnt_id, device, number: status.stx_ino }
    }
}

/// Where something that is no directory was last found.
#[derive(Clone, Debug)]
struct Place {
    parent: Arc<Node>,
    name: CString,
}

/// A file, directory or whatever else the guest has looked up.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: u64,
    pub(crate) path: OwnedFd,
    /// The mount of the volume that it is in, or below which it is mounted.
    pub(crate) share: u64,
    key: Key,
    kind: FileType,
    /// A directory is reached through its own descriptor and has none.
    place: Mutex<Option<Place>>,
}

impl Node {
    pub(crate) fn is_root(&self) -> bool {
        self.id == ROOT
    }

    pub(crate) fn is_directory(&self) -> bool {
        self.kind.is_dir()
    }

    /// Fails unless entries may be made and removed here: not where the volumes themselves are.
    pub(crate) fn for_change(&self) -> Result<&Self> {
        if self.is_root() { Err(Errno::ROFS) } else { Ok(self) }
    }

    /// What there is to know now.
    pub(crate) fn status(&self) -> Result<Statx> {
        status_of(&self.path)
    }

    /// The parent and name under which it was last found.
    pub(crate) fn place(&self) -> Result<(Arc<Self>, CString)> {
        lock(&self.place).clone().map(|place| (place.parent, place.name)).ok_or(Errno::STALE)
    }

    /// Opens it to read or write. Without /proc the only way to a file is by its name, and what bears that name now
    /// may be another file: then the guest's kernel is told to look it up again.
    pub(crate) fn open(&self, flags: OFlags) -> Result<OwnedFd> {
        // What is opened by mistake must not hold this thread up, nor become its terminal.
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        match self.kind {
            FileType::Directory => openat2(&self.path, c".", flags | OFlags::DIRECTORY, Mode::empty(), BENEATH),
            FileType::RegularFile => {
                let (parent, name) = self.place()?;
                let file = openat2(&parent.path, &name, flags, Mode::empty(), BENEATH).map_err(moved)?;
                if Key::of(&status_of(&file)?) == self.key { Ok(file) } else { Err(Errno::STALE) }
            }
            _ => Err(Errno::NOTSUP),
        }
    }
}

/// A name that leads nowhere any more.
fn moved(error: Errno) -> Errno {
    match error {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP => Errno::STALE,
        error => error,
    }
}

/// What there is to know of an open file or path.
pub(crate) fn status_of(fd: &OwnedFd) -> Result<Statx> {
    let what = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    let status = statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, what)?;
    // Without a mount's number two volumes could be taken for each other.
    if status.stx_mask & StatxFlags::MNT_ID.bits() == 0 { Err(Errno::NOSYS) } else { Ok(status) }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code that holds one of our locks can panic half way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Known {
    node: Arc<Node>,
    lookups: u64,
}

#[derive(Debug)]
struct Table {
    by_id: HashMap<u64, Known>,
    by_key: HashMap<Key, u64>,
    last_id: u64,
}

/// All nodes.
#[derive(Debug)]
pub(crate) struct Nodes {
    root: Arc<Node>,
    table: Mutex<Table>,
}

impl Nodes {
    /// Knows nothing but the root.
    pub(crate) fn new(root: OwnedFd) -> Result<Self> {
        let status = status_of(&root)?;
        let (key, kind) = (Key::of(&status), kind(&status));
        let root = Arc::new(Node { id: ROOT, path: root, share: key.mount, key, kind, place: Mutex::new(None) });
        let table = Table { by_id: HashMap::new(), by_key: HashMap::new(), last_id: ROOT };
        Ok(Self { root, table: Mutex::new(table) })
    }

    /// Forgets all but the root: another kernel has come.
    pub(crate) fn clear(&self) {
        let mut table = lock(&self.table);
        let gone = (std::mem::take(&mut table.by_id), std::mem::take(&mut table.by_key));
        drop(table);
        drop(gone);
    }

    pub(crate) fn get(&self, id: u64) -> Result<Arc<Node>> {
        if id == ROOT {
            return Ok(Arc::clone(&self.root));
        }
        lock(&self.table).by_id.get(&id).map(|known| Arc::clone(&known.node)).ok_or(Errno::STALE)
    }

    /// A directory.
    pub(crate) fn directory(&self, id: u64) -> Result<Arc<Node>> {
        let node = self.get(id)?;
        if node.is_directory() { Ok(node) } else { Err(Errno::NOTDIR) }
    }

    /// Finds a name in a directory; the guest knows the node once more.
    pub(crate) fn find(&self, parent: &Arc<Node>, name: &CStr) -> Result<(Arc<Node>, Statx)> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let path = openat2(&parent.path, name, flags, Mode::empty(), BENEATH)?;
        let status = status_of(&path)?;
        // A volume's place before it is mounted, or after it was unmounted.
        if parent.is_root() && Key::of(&status).mount == self.root.key.mount {
            return Err(Errno::NOENT);
        }
        Ok((self.enter(path, &status, parent, name)?, status))
    }

    fn enter(&self, path: OwnedFd, status: &Statx, parent: &Arc<Node>, name: &CStr) -> Result<Arc<Node>> {
        let (key, kind) = (Key::of(status), kind(status));
        let place = (!kind.is_dir()).then(|| Place { parent: Arc::clone(parent), name: name.to_owned() });
        let mut table = lock(&self.table);
        let Table { by_id, by_key, last_id } = &mut *table;
        if let Some(known) = by_key.get(&key).and_then(|id| by_id.get_mut(id)) {
            known.lookups = known.lookups.saturating_add(1);
            // The last name it was found by is the likeliest to hold.
            let before = std::mem::replace(&mut *lock(&known.node.place), place);
            let node = Arc::clone(&known.node);
            drop(table);
            drop(before);
            return Ok(node);
        }
        if by_id.len() >= MOST_NODES {
            return Err(Errno::NFILE);
        }
        let id = last_id.checked_add(1).ok_or(Errno::NFILE)?;
        *last_id = id;
        let share = if parent.is_root() { key.mount } else { parent.share };
        let node = Arc::new(Node { id, path, share, key, kind, place: Mutex::new(place) });
        by_id.insert(id, Known { node: Arc::clone(&node), lookups: 1 });
        by_key.insert(key, id);
        Ok(node)
    }

    /// The guest knows a node so many times less.
    pub(crate) fn forget(&self, id: u64, times: u64) {
        let mut table = lock(&self.table);
        let Some(known) = table.by_id.get_mut(&id) else { return };
        known.lookups = known.lookups.saturating_sub(times);
        if known.lookups > 0 {
            return;
        }
        let gone = table.by_id.remove(&id);
        if let Some(known) = &gone {
            table.by_key.remove(&known.node.key);
        }
        drop(table);
        // Closing may wait for the host.
        drop(gone);
    }

    /// The volumes that are mounted now, and nothing else.
    pub(crate) fn shares(&self) -> Result<HashSet<u64>> {
        let directory = self.root.open(OFlags::RDONLY)?;
        let mut shares = HashSet::from([self.root.share]);
        let mut buffer = vec![MaybeUninit::uninit(); LISTING_BYTES];
        let mut entries = RawDir::new(&directory, &mut buffer);
        while let Some(entry) = entries.next() {
            // One that is being unmounted at this moment is none.
            let Ok(status) = status_at(&self.root, entry?.file_name()) else { continue };
            shares.insert(status.stx_mnt_id);
        }
        Ok(shares)
    }

    /// Forgets the nodes of volumes that are not mounted any more, whatever the guest still knows: their descriptors
    /// would keep a file system of the host in use.
    pub(crate) fn keep(&self, shares: &HashSet<u64>) {
        let mut table = lock(&self.table);
        let gone: Vec<_> = table.by_id.extract_if(|_, known| !shares.contains(&known.node.share)).collect();
        for (_, known) in &gone {
            table.by_key.remove(&known.node.key);
        }
        drop(table);
        drop(gone);
    }

    /// A node that the guest has renamed is found by its new name from now on.
    pub(crate) fn moved(&self, parent: &Arc<Node>, name: &CStr) {
        let Ok(status) = status_at(parent, name) else { return };
        let known = {
            let table = lock(&self.table);
            let id = table.by_key.get(&Key::of(&status));
            id.and_then(|id| table.by_id.get(id)).map(|known| Arc::clone(&known.node))
        };
        if let Some(node) = known.filter(|node| !node.is_directory()) {
            *lock(&node.place) = Some(Place { parent: Arc::clone(parent), name: name.to_owned() });
        }
    }
}

/// What there is to know of an entry of a directory.
fn status_at(directory: &Node, name: &CStr) -> Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    statx(&directory.path, name, flags, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)
}

fn kind(status: &Statx) -> FileType {
    FileType::from_raw_mode(status.stx_mode.into())
}
