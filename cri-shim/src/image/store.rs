//! The images of a node, in one directory that several processes may use at once.
//!
//! ```text
//! lock                 held while the rest changes
//! index.json           images by id, with names and configuration
//! disks/CHAIN-1.erofs  one per chain of layers; locked shared by whoever uses it
//! work/CHAIN.*         a disk being made, locked by its maker
//! ```
//! A disk appears by a rename and an image by the rename of the index, both under the lock: what the index does not name is
//! left over, and removed by the next [`Store::open`] or [`Store::remove`] unless somebody still uses it.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use super::convert;
use super::digest::Digest;
use super::index::{Index, Record, Stamp, sync_dir};
use super::manifest::ImageConfig;
use super::pull::{PullProgress, Pulls};
use super::reference::{BadReference, Reference};
use super::registry::{self, Auth, RegistryConfig};
use super::signature::{self, Policy};
use super::verity::Verity;
use super::work::{self, Work};

/// Of the disks' form: another one gets other names.
const DISK_VERSION: u32 = 1;
/// `st_blocks` counts these (stat(2)).
const STAT_BLOCK: u64 = 512;
/// How often an image is made anew because another process removed its disk at that moment.
pub(crate) const MAX_TRIES: usize = 3;
/// Fewest digits of an id that are taken for one.
const MIN_ID_DIGITS: usize = 6;

/// What can go wrong with images.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a name.
    #[error(transparent)]
    Reference(#[from] BadReference),
    /// The registry or the way to it.
    #[error("cannot pull {0}")]
    Pull(String, #[source] registry::Error),
    /// The policy does not let it in.
    #[error("{0} is not let in")]
    Signature(String, #[source] signature::Error),
    /// The policy itself.
    #[error(transparent)]
    Policy(signature::Error),
    /// The image's layers.
    #[error("cannot unpack {0}")]
    Unpack(String, #[source] convert::Error),
    /// The file it should come from.
    #[error(transparent)]
    Import(#[from] super::import::Error),
    /// No room for it.
    #[error(
        "no space left in {0}: remove images that are not needed (crictl rmi --prune), or give the image store a larger disk"
    )]
    DiskFull(PathBuf, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// The store's directory.
    #[error("cannot use the image store {0}")]
    Io(PathBuf, #[source] io::Error),
    /// This program's own threads are ending.
    #[error("the pull was cut off because the program is ending")]
    Ending,
    /// The same pull, asked for by somebody else at the same time, failed.
    #[error(transparent)]
    Shared(Arc<Error>),
}

/// How a store works.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// Most MiB that an image may have unpacked, holes of sparse files included.
    pub max_unpacked_mib: u64,
    /// How registries are reached.
    pub registries: RegistryConfig,
    /// File that says which images may be pulled; without one, all may.
    pub policy: Option<PathBuf>,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { max_unpacked_mib: 64 << 10, registries: RegistryConfig::default(), policy: None }
    }
}

/// An image that is there.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// `sha256:…` of its configuration.
    pub id: String,
    /// Names with tags (CRI RepoTags).
    pub tags: Vec<String>,
    /// Names with digests (CRI RepoDigests).
    pub digests: Vec<String>,
    /// Bytes on the disk.
    pub size: u64,
    /// How to run it.
    pub config: ImageConfig,
    /// EROFS files, top to bottom; so far exactly one.
    pub disks: Vec<PathBuf>,
    /// By what the disk is checked as it is read.
    pub verity: Option<Verity>,
    /// Not to be removed to gain space.
    pub pinned: bool,
}

/// Use of the file system that holds the images (CRI FilesystemUsage).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsInfo {
    /// The store's directory.
    pub mountpoint: PathBuf,
    /// Bytes of all images.
    pub used_bytes: u64,
    /// Files on the host.
    pub used_inodes: u64,
    /// When this was found, in ns since 1970.
    pub timestamp: i64,
}

/// An image about to be made.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) id: Digest,
    pub(crate) chain: Digest,
    pub(crate) config: ImageConfig,
    pub(crate) tags: Vec<String>,
    pub(crate) digests: Vec<String>,
}

/// Keeps an image's disks while it lives. A copy of its files, in whatever process, keeps them too.
#[derive(Debug)]
pub struct Hold {
    /// As [`Image::disks`], open for reading.
    pub disks: Vec<File>,
}

/// See the module. A clone is the same store.
#[derive(Clone)]
pub struct Store(Arc<Shared>);

struct Shared {
    dir: PathBuf,
    config: StoreConfig,
    /// The index as last read, good while the file's stamp is the same.
    cache: Mutex<Option<(Stamp, Arc<Index>)>>,
    pulls: Pulls,
}

impl Store {
    /// Opens or makes a store, and removes what crashes have left.
    pub fn open(dir: &Path, config: StoreConfig) -> Result<Self, Error> {
        let io = |error| Error::Io(dir.to_owned(), error);
        // A mistake in it is to be known before the first pull.
        config.policy.as_deref().map(Policy::load).transpose().map_err(Error::Policy)?;
        for dir in [dir.to_owned(), dir.join("disks"), dir.join("work")] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
        }
        let store =
            Self(Arc::new(Shared { dir: dir.to_owned(), config, cache: Mutex::default(), pulls: Pulls::default() }));
        let _lock = store.lock().map_err(io)?;
        Index::sweep(dir).and_then(|()| work::sweep(&store.work_dir())).map_err(io)?;
        let index = Index::load(dir).map_err(io)?;
        store.sweep_disks(&index).map_err(io)?;
        Ok(store)
    }

    /// Brings an image, or finds that it is there. Pulls of the same image at the same time are one pull; it ends when the last
    /// who waits for it does.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<Auth>,
        progress: Option<watch::Sender<PullProgress>>,
    ) -> Result<Image, Error> {
        let reference = Reference::parse(reference)?;
        self.0.pulls.pull(self.clone(), reference, auth, progress).await
    }

    /// Brings the images of an OCI layout directory.
    pub async fn import_layout(&self, path: &Path) -> Result<Vec<Image>, Error> {
        super::import::import(self, path).await
    }

    /// Brings the images of an archive: an OCI layout's or one of `docker save`, packed or not.
    pub async fn import_tar(&self, path: &Path) -> Result<Vec<Image>, Error> {
        super::import::import(self, path).await
    }

    /// The image of a name, an id, or the beginning of one.
    pub fn resolve(&self, name_or_id: &str) -> Option<Image> {
        let index = self.index().ok()?;
        let id = find(&index, name_or_id)?;
        index.images.get(&id).map(|record| self.image(&id, record))
    }

    /// All images.
    pub fn list(&self) -> Result<Vec<Image>, Error> {
        let index = self.index().map_err(|error| self.io(error))?;
        Ok(index.images.iter().map(|(id, record)| self.image(id, record)).collect())
    }

    /// Takes a tag off its image, and removes the image with its last tag; by id or digest, removes the image with all its names.
    /// It is no error if there is none. Disks in use go when their use ends.
    pub fn remove(&self, name_or_id: &str) -> Result<(), Error> {
        self.change(|index| {
            let Some(id) = find(index, name_or_id) else { return };
            match index.images.get_mut(&id).and_then(|record| Some((one_of_many(record, name_or_id)?, record))) {
                Some((tag, record)) => record.tags.retain(|other| *other != tag),
                None => drop(index.images.remove(&id)),
            }
        })
    }

    /// The image that [`Store::remove`] would remove, not only take a tag off.
    pub fn removes(&self, name_or_id: &str) -> Option<Image> {
        let index = self.index().ok()?;
        let id = find(&index, name_or_id)?;
        let record = index.images.get(&id).filter(|record| one_of_many(record, name_or_id).is_none())?;
        Some(self.image(&id, record))
    }

    /// Marks an image as one to keep.
    pub fn pin(&self, id: &str, pinned: bool) -> Result<(), Error> {
        self.change(|index| {
            if let Some(record) = find(index, id).and_then(|id| index.images.get_mut(&id)) {
                record.pinned = pinned;
            }
        })
    }

    /// Keeps an image's disks, even if the image is removed.
    pub fn hold(&self, id: &str) -> Result<Option<Hold>, Error> {
        let _lock = self.lock().map_err(|error| self.io(error))?;
        let Some(image) = self.resolve(id) else { return Ok(None) };
        let open = |disk: &PathBuf| -> io::Result<File> {
            let file = File::open(disk)?;
            file.lock_shared()?;
            Ok(file)
        };
        let disks = image.disks.iter().map(open).collect::<io::Result<_>>();
        disks.map(|disks| Some(Hold { disks })).map_err(|error| self.io(error))
    }

    /// What the images take.
    pub fn fs_info(&self) -> Result<FsInfo, Error> {
        let (mut used_bytes, mut used_inodes) = (0_u64, 0_u64);
        let mut count = |file: &fs::Metadata| {
            used_bytes = used_bytes.saturating_add(file.blocks().saturating_mul(STAT_BLOCK));
            used_inodes = used_inodes.saturating_add(1);
        };
        count(&fs::metadata(&self.0.dir).map_err(|error| self.io(error))?);
        for dir in [self.0.dir.clone(), self.disks_dir(), self.work_dir()] {
            for entry in fs::read_dir(dir).map_err(|error| self.io(error))?.filter_map(Result::ok) {
                // One that has gone since takes nothing.
                entry.metadata().iter().for_each(&mut count);
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
        Ok(FsInfo { mountpoint: self.0.dir.clone(), used_bytes, used_inodes, timestamp })
    }

    /// How it works.
    pub(crate) fn config(&self) -> &StoreConfig {
        &self.0.config
    }

    /// Where disks are made.
    pub(crate) fn work_dir(&self) -> PathBuf {
        self.0.dir.join("work")
    }

    /// Most bytes of an image's files.
    pub(crate) fn unpacked_limit(&self) -> u64 {
        self.0.config.max_unpacked_mib.saturating_mul(1 << 20)
    }

    /// The right to make a chain's disk, once nobody else makes it; `None` if the disk is there.
    pub(crate) async fn begin(&self, chain: &Digest) -> Result<Option<Work>, Error> {
        if self.has_disk(chain)? {
            return Ok(None);
        }
        let work = Work::begin(&self.work_dir(), chain).await.map_err(|error| self.io(error))?;
        // Another may have made it while this waited.
        Ok(if self.has_disk(chain)? { None } else { Some(work) })
    }

    /// Whether a chain's disk is there, and what it is checked by is known: of one that is only still in use, it is not.
    fn has_disk(&self, chain: &Digest) -> Result<bool, Error> {
        let index = self.index().map_err(|error| self.io(error))?;
        Ok(index.images.values().any(|record| record.chain == *chain) && self.disk(chain).exists())
    }

    /// Makes an image visible, with the disk made for it if there was none. `None` comes back if there was one, and it is gone
    /// again: begin anew.
    pub(crate) async fn commit(&self, entry: &Entry, made: Option<Work>) -> Result<Option<Image>, Error> {
        let (store, entry) = (self.clone(), entry.clone());
        let committed =
            spawn_blocking(move || store.commit_now(&entry, made.as_ref())).await.map_err(|_| Error::Ending)?;
        committed.map_err(|error| self.io(error))
    }

    fn commit_now(&self, entry: &Entry, made: Option<&Work>) -> io::Result<Option<Image>> {
        let _lock = self.lock()?;
        let disk = self.disk(&entry.chain);
        if let Some(made) = made {
            fs::rename(made.disk(), &disk)?;
            sync_dir(&self.disks_dir())?;
        }
        let size = match fs::metadata(&disk) {
            Ok(file) => file.blocks().saturating_mul(STAT_BLOCK),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut index = Index::load(&self.0.dir)?;
        let (chain, config) = (entry.chain.clone(), entry.config.clone());
        let same = |record: &&mut Record| record.chain == chain;
        let verity = match made {
            Some(made) => {
                index.images.values_mut().filter(same).for_each(|record| record.verity.clone_from(&made.verity));
                made.verity.clone()
            }
            None => match index.images.values().find(|record| record.chain == chain) {
                Some(record) => record.verity.clone(),
                None => return Ok(None),
            },
        };
        let record = Record { tags: vec![], digests: vec![], pinned: false, size, chain, verity, config };
        index.images.entry(entry.id.clone()).or_insert(record);
        index.name(&entry.id, &entry.tags, &entry.digests);
        index.save(&self.0.dir)?;
        Ok(index.images.get(&entry.id).map(|record| self.image(&entry.id, record)))
    }

    /// An image vanished [`MAX_TRIES`] times while it was made.
    pub(crate) fn contended(&self) -> Error {
        self.io(io::Error::other("another process removes the image again and again"))
    }

    /// The store has no room.
    pub(crate) fn full(&self, error: impl std::error::Error + Send + Sync + 'static) -> Error {
        Error::DiskFull(self.0.dir.clone(), error.into())
    }

    /// An I/O error of the store, told as what it means.
    pub(crate) fn io(&self, error: io::Error) -> Error {
        if is_full(&error) {
            Error::DiskFull(self.0.dir.clone(), error.into())
        } else {
            Error::Io(self.0.dir.clone(), error)
        }
    }

    fn disks_dir(&self) -> PathBuf {
        self.0.dir.join("disks")
    }

    fn disk(&self, chain: &Digest) -> PathBuf {
        self.disks_dir().join(format!("{}-{DISK_VERSION}.erofs", chain.hex()))
    }

    fn image(&self, id: &Digest, record: &Record) -> Image {
        Image {
            id: id.to_string(),
            tags: record.tags.clone(),
            digests: record.digests.clone(),
            size: record.size,
            config: record.config.clone(),
            disks: vec![self.disk(&record.chain)],
            verity: record.verity.clone(),
            pinned: record.pinned,
        }
    }

    /// Held until it is dropped.
    fn lock(&self) -> io::Result<File> {
        let path = self.0.dir.join("lock");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        file.lock()?;
        Ok(file)
    }

    fn index(&self) -> io::Result<Arc<Index>> {
        let Some(stamp) = Index::stamp(&self.0.dir) else { return Ok(Arc::default()) };
        let mut cache = self.0.cache.lock().unwrap_or_else(PoisonError::into_inner);
        match &*cache {
            Some((cached, index)) if *cached == stamp => Ok(Arc::clone(index)),
            _ => {
                let index = Arc::new(Index::load(&self.0.dir)?);
                *cache = Some((stamp, Arc::clone(&index)));
                Ok(index)
            }
        }
    }

    fn change(&self, change: impl FnOnce(&mut Index)) -> Result<(), Error> {
        let io = |error| self.io(error);
        let _lock = self.lock().map_err(io)?;
        let mut index = Index::load(&self.0.dir).map_err(io)?;
        let before = index.clone();
        change(&mut index);
        if index != before {
            index.save(&self.0.dir).map_err(io)?;
        }
        self.sweep_disks(&index).map_err(io)
    }

    /// Removes disks that no image needs and nobody uses. The store's lock must be held.
    fn sweep_disks(&self, index: &Index) -> io::Result<()> {
        let needed: BTreeSet<PathBuf> = index.images.values().map(|record| self.disk(&record.chain)).collect();
        for entry in fs::read_dir(self.disks_dir())? {
            let path = entry?.path();
            if needed.contains(&path) {
                continue;
            }
            match File::open(&path)?.try_lock() {
                Ok(()) => fs::remove_file(&path)?,
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Whether there was no room.
pub(crate) fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<io::Error>()
            && matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        {
            return true;
        }
        next = error.source();
    }
    false
}

/// The tag that a name is, if its image has others too.
fn one_of_many(record: &Record, name: &str) -> Option<String> {
    let tag = Reference::parse(name).ok()?.repo_tag()?;
    (record.tags.contains(&tag) && record.tags.len() > 1).then_some(tag)
}

/// The id of a name, an id, or the beginning of one that no other id shares.
fn find(index: &Index, name_or_id: &str) -> Option<Digest> {
    let hex = name_or_id.strip_prefix("sha256:").unwrap_or(name_or_id);
    let is_id = hex.len() >= MIN_ID_DIGITS && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    let named = || {
        let reference = Reference::parse(name_or_id).ok()?;
        let tag = reference.repo_tag();
        let digest = reference.digest().map(|digest| reference.repo_digest(digest));
        let has_name = |record: &Record| {
            tag.iter().any(|tag| record.tags.contains(tag))
                || digest.iter().any(|digest| record.digests.contains(digest))
        };
        index.images.iter().find(|(_, record)| has_name(record)).map(|(id, _)| id.clone())
    };
    let by_id = || {
        let mut ids = index.images.keys().filter(|id| is_id && id.hex().starts_with(hex));
        ids.next().filter(|_| ids.next().is_none()).cloned()
    };
    named().or_else(by_id)
}

#[cfg(test)]
mod tests;
