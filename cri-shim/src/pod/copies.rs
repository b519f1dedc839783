//! Directories of the host of which containers have copies, kept as the host has them: ConfigMaps, Secrets, projected
//! volumes, whose files a kubelet exchanges under running containers.
//!
//! A change is sent as the whole tree, and the agent changes what differs: so nothing needs to be known of what a
//! container already has, and a daemon that starts anew sends every tree once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use agent_protocol::v1::{self, FileTree, mount};
use prost::Message;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::context::blocking;
use super::files;
use super::owner::Owner;
use super::watcher::Follower;
use crate::agent::Call;
use crate::error::{Error, Result};
use crate::record::{Life, Record};
use crate::spec::MountSource;

/// How long changes may gather before they are sent: a kubelet makes several at once.
const SETTLE: Duration = Duration::from_millis(50);

/// After a failure.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// Longest time for the agent to change a tree.
const LIMIT: Duration = Duration::from_secs(10);

/// A mount: the container's id and the place in it.
type Place = (String, String);

/// What the agent has of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    /// Another daemon sent it.
    Unknown,
    /// This, by its digest.
    Tree([u8; 32]),
}

/// The copies of one pod.
pub(super) struct Copies {
    follower: Follower,
    sent: BTreeMap<Place, Sent>,
    due: Option<Instant>,
}

impl Copies {
    /// Those that an earlier daemon may have made for a pod are looked at soon.
    pub(super) fn new(follower: Follower, record: &Record) -> Self {
        let places = record.containers.iter().flat_map(|(id, container)| {
            let shared = |destination: &String| container.shares.contains_key(destination);
            let host = container.spec.mounts.iter().filter(|mount| matches!(mount.source, MountSource::Host(_)));
            let copied = host.filter(move |mount| !shared(&mount.destination));
            copied.map(|mount| ((id.clone(), mount.destination.clone()), Sent::Unknown))
        });
        let sent: BTreeMap<_, _> = places.collect();
        let due = (!sent.is_empty()).then(Instant::now);
        Self { follower, sent, due }
    }

    /// Waits until it is time for [`Owner::refresh`].
    pub(super) async fn due(&mut self) {
        loop {
            match self.due {
                Some(at) => return tokio::time::sleep_until(at).await,
                None => self.follower.changed().await,
            }
            self.due = Some(Instant::now() + SETTLE);
        }
    }

    /// Looks at all of them soon.
    pub(super) fn look(&mut self) {
        self.due = Some(Instant::now());
    }

    /// Remembers what a container is made with.
    pub(super) fn sent(&mut self, create: &v1::CreateContainer) {
        for made in &create.mounts {
            if let Some(mount::Source::Files(tree)) = &made.source {
                self.sent.insert((create.id.clone(), made.destination.clone()), Sent::Tree(digest(tree)));
            }
        }
        self.look();
    }

    /// The guest has gone, and the copies with it.
    pub(super) fn end(&mut self) {
        self.sent.clear();
        self.due = None;
        self.follower.follow(&BTreeSet::new());
    }

    /// A container has gone, or its process has.
    pub(super) fn forget(&mut self, container: &str) {
        self.sent.retain(|(id, _), _| id != container);
        self.look();
    }
}

fn digest(tree: &FileTree) -> [u8; 32] {
    Sha256::digest(tree.encode_to_vec()).into()
}

impl Owner {
    /// Sends containers what has changed of the directories they have copies of, and follows those.
    pub(super) async fn refresh(&mut self) {
        self.copies.due = None;
        let mut directories = BTreeSet::new();
        for (place, source) in self.copied() {
            let known = self.copies.sent.get(&place).copied();
            match self.compare(&place, source, known).await {
                Ok((sent, found)) => {
                    self.copies.sent.insert(place, sent);
                    directories.extend(found);
                }
                // Neither will be otherwise if it is tried again.
                Err(error @ (Error::NotFound(_) | Error::InvalidArgument(_))) => {
                    tracing::warn!(pod = self.record.id, container = place.0, mount = place.1, %error, "not kept up");
                    self.copies.sent.remove(&place);
                }
                Err(error) => {
                    tracing::debug!(pod = self.record.id, container = place.0, mount = place.1, %error, "tried again");
                    self.copies.due = Some(Instant::now() + TRY_AGAIN);
                }
            }
        }
        let new = !directories.iter().all(|directory| self.copies.follower.follows(directory));
        self.copies.follower.follow(&directories);
        if new {
            // What has changed before they were followed.
            self.copies.due = self.copies.due.or_else(|| Some(Instant::now() + SETTLE));
        }
    }

    /// Mounts of containers that may still run, and where they are copied from.
    fn copied(&self) -> Vec<(Place, PathBuf)> {
        let living = self.record.containers.iter().filter(|(_, it)| !matches!(it.life, Life::Exited { .. }));
        let places = living.flat_map(|(id, container)| {
            container.spec.mounts.iter().filter_map(move |mount| match &mount.source {
                MountSource::Host(source) => Some(((id.clone(), mount.destination.clone()), source.clone())),
                _ => None,
            })
        });
        places.filter(|(place, _)| self.copies.sent.contains_key(place)).collect()
    }

    /// Sends a tree if it is not what the container has. Also returns the directories to follow.
    async fn compare(&self, place: &Place, source: PathBuf, known: Option<Sent>) -> Result<(Sent, Vec<PathBuf>)> {
        let (id, destination) = place.clone();
        let found = blocking(move || if source.is_dir() { files::tree(&source).map(Some) } else { Ok(None) }).await?;
        // A file is the container's own from its creation on, as with a bind mount of what was replaced since.
        let Some((tree, directories)) = found else { return Ok((known.unwrap_or(Sent::Unknown), Vec::new())) };
        let now = Sent::Tree(digest(&tree));
        if known != Some(now) {
            let update = v1::UpdateFiles { id, destination, files: Some(tree) };
            self.agent()?.tell(Call::UpdateFiles(update), LIMIT).await?;
            tracing::info!(pod = self.record.id, container = place.0, mount = place.1, "files brought up to date");
        }
        Ok((now, directories))
    }
}
