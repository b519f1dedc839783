//! What the store holds, as one file that is replaced as a whole: every change is there entirely or not at all.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::manifest::ImageConfig;
use super::verity::Verity;

/// Of the file's form.
const VERSION: u32 = 1;
const NAME: &str = "index.json";
const NEW_NAME: &str = "index.json.new";

/// All images by id.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Index {
    version: u32,
    pub(crate) images: BTreeMap<Digest, Record>,
}

/// One image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Names with tags, each of one image only.
    pub(crate) tags: Vec<String>,
    /// Names with digests.
    pub(crate) digests: Vec<String>,
    /// Not to be removed to gain space.
    pub(crate) pinned: bool,
    /// Bytes on the disk.
    pub(crate) size: u64,
    /// The layers' chain id, which names the disk.
    pub(crate) chain: Digest,
    /// By what the disk is checked; none of older stores' is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) verity: Option<Verity>,
    pub(crate) config: ImageConfig,
}

impl Default for Index {
    fn default() -> Self {
        Self { version: VERSION, images: BTreeMap::new() }
    }
}

/// Tells one version of the file from another without reading it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp(u64, i64, i64, u64);

impl Index {
    /// The file's stamp; `None` before the first change.
    pub(crate) fn stamp(dir: &Path) -> Option<Stamp> {
        use std::os::unix::fs::MetadataExt;
        let file = fs::metadata(dir.join(NAME)).ok()?;
        Some(Stamp(file.ino(), file.mtime(), file.mtime_nsec(), file.size()))
    }

    /// As it is now.
    pub(crate) fn load(dir: &Path) -> io::Result<Self> {
        let bytes = match fs::read(dir.join(NAME)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            other => other?,
        };
        let index: Self = serde_json::from_slice(&bytes).map_err(io::Error::other)?;
        if index.version != VERSION {
            return Err(io::Error::other(format!("version {} of {NAME} is not understood", index.version)));
        }
        Ok(index)
    }

    /// Replaces it, durably. The store's lock must be held.
    pub(crate) fn save(&self, dir: &Path) -> io::Result<()> {
        let new = dir.join(NEW_NAME);
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec_pretty(self).map_err(io::Error::other)?)?;
        file.sync_all()?;
        fs::rename(new, dir.join(NAME))?;
        sync_dir(dir)
    }

    /// Removes what a crash has left of a change.
    pub(crate) fn sweep(dir: &Path) -> io::Result<()> {
        match fs::remove_file(dir.join(NEW_NAME)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Gives names to an image that is there; a tag leaves the image that had it.
    pub(crate) fn name(&mut self, id: &Digest, tags: &[String], digests: &[String]) {
        for record in self.images.values_mut() {
            record.tags.retain(|tag| !tags.contains(tag));
        }
        if let Some(record) = self.images.get_mut(id) {
            record.tags.extend_from_slice(tags);
            record.digests.extend_from_slice(digests);
            for names in [&mut record.tags, &mut record.digests] {
                names.sort_unstable();
                names.dedup();
            }
        }
    }
}

/// Makes renames in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
