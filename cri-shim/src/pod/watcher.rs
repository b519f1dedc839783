//! Who wants to know when something in a directory of the host changes: one inotify(7) for all pods of the node.
//!
//! It tells that something has changed, never what: whoever is told looks for himself. It never reads a file.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::StreamExt;
use inotify::{EventMask, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::error::{IoContext, Result};

/// Bytes for events that are taken at once.
const EVENT_BYTES: usize = 4096;

/// What may change what a copy should hold.
const CHANGES: WatchMask = WatchMask::ATTRIB
    .union(WatchMask::CLOSE_WRITE)
    .union(WatchMask::CREATE)
    .union(WatchMask::DELETE)
    .union(WatchMask::MODIFY)
    .union(WatchMask::MOVE)
    .union(WatchMask::ONLYDIR);

/// The node's one.
pub(super) struct Watcher {
    shared: Arc<Shared>,
    listener: JoinHandle<()>,
}

struct Shared {
    watches: Watches,
    followers: Mutex<Followers>,
}

#[derive(Default)]
struct Followers {
    last_number: u64,
    by_watch: HashMap<WatchDescriptor, HashMap<u64, Arc<Notify>>>,
}

impl Shared {
    /// What is behind the lock is whole at every moment, so that a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, Followers> {
        self.followers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watcher {
    /// Must be called within the runtime.
    pub(super) fn new() -> Result<Self> {
        let what = || "watching directories (is fs.inotify.max_user_instances reached?)";
        let inotify = Inotify::init().doing(what)?;
        let shared = Arc::new(Shared { watches: inotify.watches(), followers: Mutex::default() });
        let events = inotify.into_event_stream([0; EVENT_BYTES]).doing(what)?;
        let listener = tokio::spawn(listen(events, Arc::clone(&shared)));
        Ok(Self { shared, listener })
    }

    /// One more that wants to know, as yet of nothing.
    pub(super) fn follower(&self) -> Follower {
        let mut followers = self.shared.lock();
        followers.last_number = followers.last_number.wrapping_add(1);
        let number = followers.last_number;
        Follower {
            shared: Arc::clone(&self.shared),
            number,
            changed: Arc::default(),
            watches: HashSet::new(),
            directories: BTreeSet::new(),
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

async fn listen(mut events: EventStream<[u8; EVENT_BYTES]>, shared: Arc<Shared>) {
    while let Some(event) = events.next().await {
        let followers = shared.lock();
        match event {
            // Some were lost, so anything may have changed.
            Ok(event) if event.mask.contains(EventMask::Q_OVERFLOW) => {
                followers.by_watch.values().flat_map(HashMap::values).for_each(|changed| changed.notify_one());
            }
            Ok(event) => {
                followers.by_watch.get(&event.wd).into_iter().flat_map(HashMap::values).for_each(|it| it.notify_one());
            }
            Err(error) => return tracing::error!(%error, "directories of the host are no longer watched"),
        }
    }
}

/// One that wants to know. Dropping it ends that.
pub(super) struct Follower {
    shared: Arc<Shared>,
    number: u64,
    changed: Arc<Notify>,
    watches: HashSet<WatchDescriptor>,
    directories: BTreeSet<PathBuf>,
}

impl Follower {
    /// Whether it has wanted to know of this directory.
    pub(super) fn follows(&self, directory: &Path) -> bool {
        self.directories.contains(directory)
    }

    /// Wants to know of these directories from now on, and of no others.
    pub(super) fn follow(&mut self, directories: &BTreeSet<PathBuf>) {
        let before = std::mem::take(&mut self.watches);
        for directory in directories {
            match self.watch(directory) {
                Ok(watch) => drop(self.watches.insert(watch)),
                // It has just gone, or there are too many (fs.inotify.max_user_watches).
                Err(error) => tracing::debug!(directory = %directory.display(), %error, "not watched"),
            }
        }
        let gone = before.difference(&self.watches).cloned().collect::<Vec<_>>();
        gone.into_iter().for_each(|watch| self.leave(watch));
        self.directories.clone_from(directories);
    }

    fn watch(&self, directory: &Path) -> std::io::Result<WatchDescriptor> {
        // Under the lock, so that nobody else gives the same watch up meanwhile.
        let mut followers = self.shared.lock();
        let watch = self.shared.watches.clone().add(directory, CHANGES)?;
        followers.by_watch.entry(watch.clone()).or_default().insert(self.number, Arc::clone(&self.changed));
        Ok(watch)
    }

    fn leave(&self, watch: WatchDescriptor) {
        let mut followers = self.shared.lock();
        let Some(others) = followers.by_watch.get_mut(&watch) else { return };
        others.remove(&self.number);
        if others.is_empty() {
            followers.by_watch.remove(&watch);
            // It fails if the directory has gone, and the watch with it.
            let _ = self.shared.watches.clone().remove(watch);
        }
    }

    /// Waits until something has changed since this was last called.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.follow(&BTreeSet::new());
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;

    async fn told(follower: &Follower) -> bool {
        tokio::time::timeout(Duration::from_secs(5), follower.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn each_follower_is_told_of_its_own() {
        let watcher = Watcher::new().expect("inotify");
        let (mine, theirs) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        let (mut one, mut other) = (watcher.follower(), watcher.follower());
        one.follow(&[mine.path().to_owned()].into());
        other.follow(&[mine.path().to_owned(), theirs.path().to_owned()].into());
        fs::write(mine.path().join("x"), "1").expect("writes");
        assert!(told(&one).await && told(&other).await);
        other.follow(&[theirs.path().to_owned()].into());
        fs::rename(mine.path().join("x"), mine.path().join("y")).expect("renames");
        assert!(told(&one).await);
        drop(one);
        assert_eq!(watcher.shared.lock().by_watch.len(), 1, "what nobody follows is not watched");
        fs::write(theirs.path().join("x"), "1").expect("writes");
        assert!(told(&other).await);
    }

    #[tokio::test]
    async fn a_directory_that_is_not_there_is_left_out() {
        let watcher = Watcher::new().expect("inotify");
        let mut follower = watcher.follower();
        follower.follow(&["/no/such/directory".into(), "/etc/hostname".into()].into());
        assert!(watcher.shared.lock().by_watch.is_empty());
    }
}
