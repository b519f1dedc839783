//! Images from files: an OCI layout directory, or an archive of one or of `docker save`, packed or not.
//!
//! An archive is read in place: its members are found once, and their bytes read where they lie. Only a packed archive is first
//! unpacked, into a file without a name.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use tokio::task::spawn_blocking;

use super::convert::{Layer, convert, decompress};
use super::digest::{BadDigest, Check, Digest, Verified};
use super::manifest::{
    self, Configuration, Descriptor, Document, MAX_CONFIG, MAX_MANIFEST, Manifest, chain_id, for_guest,
};
use super::pull::uuid;
use super::reference::Reference;
use super::store::{Entry, Image, MAX_TRIES, Store, is_full};
use super::work::{Work, scratch};

/// Most members of an archive: blobs and a few descriptions.
const MAX_MEMBERS: usize = 10_000;
/// Most images of one file.
const MAX_IMAGES: usize = 1000;
/// Names of images in a layout's index: containerd's, and the specification's, which is often a tag alone.
const NAME_ANNOTATIONS: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

/// What can be wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not readable.
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    /// Something else than an image.
    #[error(
        "{0} holds no image: give an OCI layout (a directory with index.json), or an archive by docker save or skopeo"
    )]
    NoImage(PathBuf),
    /// A part that is named and not there.
    #[error("{0} lacks {1}: make it anew")]
    Missing(PathBuf, String),
    /// A part that is too large.
    #[error("{0} has a part larger than {1} bytes where a description is expected")]
    TooLarge(PathBuf, u64),
    /// A part that is not what its digest says.
    #[error("a part of {0} is damaged: make it anew")]
    Damaged(PathBuf, #[source] io::Error),
    /// A digest that is none.
    #[error("{0} is damaged: make it anew")]
    Digest(PathBuf, #[source] BadDigest),
    /// A description that cannot be used.
    #[error("{0} cannot be used")]
    Manifest(PathBuf, #[source] manifest::Error),
}

type Result<T> = std::result::Result<T, Error>;

/// Names to offset and length in an archive.
type Members = BTreeMap<String, (u64, u64)>;

/// Where parts of images are.
#[derive(Clone)]
struct Source {
    path: PathBuf,
    /// What is in the archive; a directory has none.
    archive: Option<(Arc<File>, Arc<Members>)>,
}

/// An image found in a source.
struct Found {
    id: Digest,
    configuration: Configuration,
    /// Digest, name in the source, and length if it is known; base first.
    layers: Vec<(Digest, String, Option<u64>)>,
    tags: Vec<String>,
    digests: Vec<String>,
}

/// Brings all images of a file or directory that run in a guest.
pub(crate) async fn import(store: &Store, path: &Path) -> std::result::Result<Vec<Image>, super::store::Error> {
    let (from, work) = (path.to_owned(), store.work_dir());
    let open = move || {
        let source = Source::open(&from, &work)?;
        let found = source.images()?;
        if found.is_empty() { Err(Error::NoImage(from)) } else { Ok((source, found)) }
    };
    let (source, found) = spawn_blocking(open).await.map_err(|_| super::store::Error::Ending)??;
    let mut images = vec![];
    for found in found {
        images.push(source.import(store, found).await?);
    }
    Ok(images)
}

impl Source {
    fn open(path: &Path, work: &Path) -> Result<Self> {
        let read = |error| Error::Read(path.to_owned(), error);
        if path.is_dir() {
            return Ok(Self { path: path.to_owned(), archive: None });
        }
        let mut packed = File::open(path).map_err(read)?;
        let unpacked = match decompress(&mut packed).map_err(read)?.packed() {
            Some(mut plain) => {
                let mut file = scratch(work).map_err(read)?;
                io::copy(&mut plain, &mut file).map_err(read)?;
                Some(file)
            }
            None => None,
        };
        let mut file = unpacked.unwrap_or(packed);
        file.rewind().map_err(read)?;
        let members = members(&file).map_err(|_| Error::NoImage(path.to_owned()))?;
        Ok(Self { path: path.to_owned(), archive: Some((Arc::new(file), Arc::new(members))) })
    }

    /// A part's bytes and length; `None` if there is no such part.
    fn part(&self, name: &str) -> Result<Option<(Box<dyn Read + Send>, u64)>> {
        let Some((file, members)) = &self.archive else {
            let read = |error| Error::Read(self.path.join(name), error);
            return match File::open(self.path.join(name)) {
                Ok(file) => {
                    let len = file.metadata().map_err(read)?.len();
                    Ok(Some((Box::new(file), len)))
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(read(error)),
            };
        };
        let Some(&(at, len)) = members.get(name) else { return Ok(None) };
        Ok(Some((Box::new(Section { file: Arc::clone(file), at, left: len }), len)))
    }

    fn description(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some((part, len)) = self.part(name)? else { return Ok(None) };
        if len > limit {
            return Err(Error::TooLarge(self.path.clone(), limit));
        }
        let mut bytes = vec![];
        part.take(limit).read_to_end(&mut bytes).map_err(|error| Error::Read(self.path.join(name), error))?;
        Ok(Some(bytes))
    }

    fn images(&self) -> Result<Vec<Found>> {
        // docker save writes both descriptions; its own has the names.
        if self.archive.is_some()
            && let Some(bytes) = self.description("manifest.json", MAX_MANIFEST)?
        {
            return self.docker_images(&bytes);
        }
        match self.description("index.json", MAX_MANIFEST)? {
            Some(bytes) => self.oci_images(&bytes),
            None => Ok(vec![]),
        }
    }

    fn docker_images(&self, bytes: &[u8]) -> Result<Vec<Found>> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Entry {
            config: String,
            repo_tags: Option<Vec<String>>,
            layers: Vec<String>,
        }
        let entries: Vec<Entry> =
            serde_json::from_slice(bytes).map_err(|error| self.unusable(manifest::Error::Json("manifest", error)))?;
        let mut found = vec![];
        for entry in entries.into_iter().take(MAX_IMAGES) {
            let config = self.needed(&entry.config, MAX_CONFIG)?;
            let configuration =
                Configuration::parse(&config, entry.layers.len()).map_err(|error| self.unusable(error))?;
            let names = configuration.diff_ids.iter().cloned().zip(entry.layers);
            let layers = names.map(|(diff_id, name)| (diff_id, name, None)).collect();
            let tags = entry.repo_tags.unwrap_or_default();
            let tags = tags.iter().filter_map(|tag| Reference::parse(tag).ok()?.repo_tag()).collect();
            found.push(Found { id: Digest::of(&config), configuration, layers, tags, digests: vec![] });
        }
        Ok(found)
    }

    fn oci_images(&self, bytes: &[u8]) -> Result<Vec<Found>> {
        let Document::Index(entries) = Document::parse(bytes).map_err(|error| self.unusable(error))? else {
            return Err(Error::NoImage(self.path.clone()));
        };
        let mut found = vec![];
        for entry in entries.iter().filter(|entry| entry.may_run()).take(MAX_IMAGES) {
            let manifest = match self.document(entry)? {
                Document::Manifest(manifest) => manifest,
                Document::Index(manifests) => {
                    let chosen = for_guest(&manifests).map_err(|error| self.unusable(error))?;
                    match self.document(chosen)? {
                        Document::Manifest(manifest) => manifest,
                        Document::Index(_) => return Err(Error::NoImage(self.path.clone())),
                    }
                }
            };
            found.push(self.oci_image(entry, manifest)?);
        }
        Ok(found)
    }

    fn oci_image(&self, entry: &Descriptor, manifest: Manifest) -> Result<Found> {
        let config = self.blob(&manifest.config, MAX_CONFIG)?;
        let configuration =
            Configuration::parse(&config, manifest.layers.len()).map_err(|error| self.unusable(error))?;
        let layers = manifest.layers.into_iter().map(|layer| {
            let name = blob_name(&layer.digest);
            (layer.digest, name, Some(layer.size))
        });
        let reference = NAME_ANNOTATIONS.iter().find_map(|key| {
            // A tag alone names no image.
            let name = entry.annotations.as_ref()?.get(*key).filter(|name| name.contains(['/', ':']))?;
            Reference::parse(name).ok()
        });
        Ok(Found {
            id: manifest.config.digest,
            configuration,
            layers: layers.collect(),
            tags: reference.as_ref().and_then(Reference::repo_tag).into_iter().collect(),
            digests: reference.map(|reference| reference.repo_digest(&entry.digest)).into_iter().collect(),
        })
    }

    fn document(&self, descriptor: &Descriptor) -> Result<Document> {
        Document::parse(&self.blob(descriptor, MAX_MANIFEST)?).map_err(|error| self.unusable(error))
    }

    /// A small blob, checked.
    fn blob(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>> {
        let bytes = self.needed(&blob_name(&descriptor.digest), limit)?;
        let mut check = Check::new(descriptor.digest.clone(), Some(descriptor.size));
        let checked = check.update(&bytes).and_then(|()| check.finish());
        checked.map_err(|error| Error::Damaged(self.path.clone(), io::Error::other(error)))?;
        Ok(bytes)
    }

    fn needed(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        self.description(name, limit)?.ok_or_else(|| Error::Missing(self.path.clone(), name.to_owned()))
    }

    fn unusable(&self, error: manifest::Error) -> Error {
        Error::Manifest(self.path.clone(), error)
    }

    async fn import(&self, store: &Store, found: Found) -> std::result::Result<Image, super::store::Error> {
        let Found { id, configuration, layers, tags, digests } = found;
        let Configuration { config, diff_ids } = configuration;
        let entry = Entry { id, chain: chain_id(&diff_ids), config, tags, digests };
        for _ in 0..MAX_TRIES {
            let made = match store.begin(&entry.chain).await? {
                Some(work) => Some(self.make(store, work, self.layers(&layers, &diff_ids)?, &entry.chain).await?),
                None => None,
            };
            if let Some(image) = store.commit(&entry, made).await? {
                return Ok(image);
            }
        }
        Err(store.contended())
    }

    async fn make(
        &self,
        store: &Store,
        mut work: Work,
        layers: Vec<Layer>,
        chain: &Digest,
    ) -> std::result::Result<Work, super::store::Error> {
        let file = work.create_disk().map_err(|error| store.io(error))?;
        let (uuid, limit) = (uuid(chain), store.unpacked_limit());
        let converted = spawn_blocking(move || convert(layers, file, uuid, limit)).await;
        match converted.map_err(|_| super::store::Error::Ending)? {
            Ok(verity) => {
                work.verity = Some(verity);
                Ok(work)
            }
            Err(error) if is_full(&error) => Err(store.full(error)),
            Err(error) => Err(super::store::Error::Unpack(self.path.display().to_string(), error)),
        }
    }

    fn layers(&self, layers: &[(Digest, String, Option<u64>)], diff_ids: &[Digest]) -> Result<Vec<Layer>> {
        let mut opened = vec![];
        for ((digest, name, len), diff_id) in layers.iter().zip(diff_ids) {
            let (part, _) = self.part(name)?.ok_or_else(|| Error::Missing(self.path.clone(), name.clone()))?;
            // docker save names layers by where they are, not by their digest; then the unpacked one decides alone.
            let blob: Box<dyn Read + Send> = match len {
                Some(len) => Box::new(Verified::new(part, Check::new(digest.clone(), Some(*len)))),
                None => part,
            };
            opened.push(Layer { digest: digest.clone(), diff_id: diff_id.clone(), blob });
        }
        Ok(opened)
    }
}

/// Where a layout has a blob.
fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}", digest.as_str().replace(':', "/"))
}

/// The files in an archive by name, symbolic links resolved (older versions of docker save make one of a layer that repeats).
fn members(file: &File) -> io::Result<Members> {
    let (mut members, mut links) = (BTreeMap::new(), vec![]);
    let mut archive = tar::Archive::new(BufReader::new(file));
    for entry in archive.entries_with_seek()?.take(MAX_MEMBERS) {
        let entry = entry?;
        let Ok(name) = String::from_utf8(entry.path_bytes().into_owned()) else { continue };
        let name = name.trim_start_matches("./").to_owned();
        match (entry.header().entry_type(), entry.link_name()?) {
            (tar::EntryType::Regular, _) => {
                members.insert(name, (entry.raw_file_position(), entry.size()));
            }
            (tar::EntryType::Symlink, Some(target)) => links.push((name, target.to_string_lossy().into_owned())),
            _ => {}
        }
    }
    for (name, target) in links {
        if let Some(member) = members.get(target.trim_start_matches("../")).copied() {
            members.insert(name, member);
        }
    }
    Ok(members)
}

/// Part of a file.
struct Section {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Read for Section {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.len());
        let read = self.file.read_at(buf.get_mut(..room).unwrap_or_default(), self.at)?;
        let moved = u64::try_from(read).unwrap_or(u64::MAX);
        self.at = self.at.saturating_add(moved);
        self.left = self.left.saturating_sub(moved);
        Ok(read)
    }
}
