//! Manifests, indexes and configurations: OCI image-spec and Docker's schema 2, of which only what is used is read.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::digest::Digest;

/// Largest manifest or index, as the distribution-spec recommends to registries.
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
/// Largest configuration.
pub(crate) const MAX_CONFIG: u64 = 8 << 20;
/// Most layers of an image.
pub(crate) const MAX_LAYERS: usize = 256;

/// What is asked for, best first.
pub(crate) const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// Configurations that describe a container.
const CONFIG_TYPES: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// The platform of the guests.
const OS: &str = "linux";
const ARCHITECTURE: &str = "amd64";

/// What can be wrong with one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not JSON, or not of the form expected.
    #[error("the {0} is damaged")]
    Json(&'static str, #[source] serde_json::Error),
    /// Docker's schema 1.
    #[error(
        "the manifest has the schema version {0}, and only 2 is understood: push the image anew with a current tool"
    )]
    Schema(u64),
    /// An index without an image for the guest.
    #[error("the image is built for {0}, but not for {OS}/{ARCHITECTURE}: build it for that platform too")]
    Platform(String),
    /// An artifact that is no container image.
    #[error("it holds {0:?}, which is no container image")]
    Artifact(String),
    /// An encrypted or otherwise unknown layer.
    #[error("a layer is of the type {0:?}, which is not understood: build the image without it")]
    LayerType(String),
    /// More than [`MAX_LAYERS`].
    #[error("the image has {0} layers, more than {MAX_LAYERS}: build it with fewer")]
    Layers(usize),
    /// Configuration and manifest disagree.
    #[error("the configuration names {0} layers and the manifest {1}: push the image anew")]
    LayerCount(usize, usize),
}

/// Points at a blob.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    platform: Option<Platform>,
    /// Free; an OCI layout has names of images here.
    pub(crate) annotations: Option<BTreeMap<String, String>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
}

/// What a registry has under a name.
#[derive(Debug)]
pub(crate) enum Document {
    /// Several manifests to choose from.
    Index(Vec<Descriptor>),
    Manifest(Manifest),
}

/// Configuration and layers of one image.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    /// Base first.
    pub(crate) layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: u64,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

impl Document {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Error> {
        const WHAT: &str = "manifest";
        let raw: Raw = serde_json::from_slice(bytes).map_err(|error| Error::Json(WHAT, error))?;
        if raw.schema_version != 2 {
            return Err(Error::Schema(raw.schema_version));
        }
        if let Some(manifests) = raw.manifests {
            return Ok(Self::Index(manifests));
        }
        let missing = |field| Error::Json(WHAT, serde::de::Error::missing_field(field));
        let config = raw.config.ok_or_else(|| missing("config"))?;
        let layers = raw.layers.ok_or_else(|| missing("layers"))?;
        if !CONFIG_TYPES.contains(&config.media_type.as_str()) {
            return Err(Error::Artifact(config.media_type));
        }
        if layers.len() > MAX_LAYERS {
            return Err(Error::Layers(layers.len()));
        }
        if let Some(layer) = layers.iter().find(|layer| !is_layer(&layer.media_type)) {
            return Err(Error::LayerType(layer.media_type.clone()));
        }
        Ok(Self::Manifest(Manifest { config, layers }))
    }
}

/// The form of the types that both specifications have: `…tar`, `…tar+gzip`, `…tar.gzip`, `…tar+zstd`.
fn is_layer(media_type: &str) -> bool {
    [".tar", ".tar+gzip", ".tar.gzip", ".tar+zstd", ".tar.zstd"].iter().any(|end| media_type.ends_with(end))
}

impl Descriptor {
    /// Unless it says that it is for another platform.
    pub(crate) fn may_run(&self) -> bool {
        self.platform.as_ref().is_none_or(|platform| platform.os == OS && platform.architecture == ARCHITECTURE)
    }
}

/// The image of an index that runs in a guest.
pub(crate) fn for_guest(manifests: &[Descriptor]) -> Result<&Descriptor, Error> {
    let fits = |descriptor: &&Descriptor| descriptor.platform.is_some() && descriptor.may_run();
    // An index of one image need not say its platform; its configuration does.
    let only = || manifests.first().filter(|first| manifests.len() == 1 && first.platform.is_none());
    manifests.iter().find(fits).or_else(only).ok_or_else(|| {
        let names = manifests.iter().filter_map(|descriptor| descriptor.platform.as_ref());
        let names: Vec<_> = names.map(|platform| format!("{}/{}", platform.os, platform.architecture)).collect();
        Error::Platform(if names.is_empty() { "no platform".to_owned() } else { names.join(", ") })
    })
}

/// What an image says about running it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// `KEY=value`.
    pub env: Vec<String>,
    /// The program, before the arguments.
    pub entrypoint: Vec<String>,
    /// Arguments, or program and arguments without an entrypoint.
    pub cmd: Vec<String>,
    /// Working directory; empty means `/`.
    pub cwd: String,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty means root.
    pub user: String,
    /// Signal that asks it to stop, such as `SIGQUIT`; empty means SIGTERM.
    pub stop_signal: String,
    /// Free labels.
    pub labels: BTreeMap<String, String>,
    /// Directories meant for data that outlives the container.
    pub volumes: Vec<String>,
}

/// A configuration blob.
#[derive(Debug)]
pub(crate) struct Configuration {
    pub(crate) config: ImageConfig,
    /// Digests of the decompressed layers, base first.
    pub(crate) diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct RawConfiguration {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    config: Option<RawConfig>,
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    diff_ids: Vec<Digest>,
}

/// Tools write `null` for what is not set.
#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RawConfig {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
}

impl Configuration {
    pub(crate) fn parse(bytes: &[u8], layers: usize) -> Result<Self, Error> {
        let raw: RawConfiguration =
            serde_json::from_slice(bytes).map_err(|error| Error::Json("configuration", error))?;
        if (raw.os.as_str(), raw.architecture.as_str()) != (OS, ARCHITECTURE) {
            return Err(Error::Platform(format!("{}/{}", raw.os, raw.architecture)));
        }
        let diff_ids = raw.rootfs.diff_ids;
        if diff_ids.len() != layers {
            return Err(Error::LayerCount(diff_ids.len(), layers));
        }
        let raw = raw.config.unwrap_or_default();
        let config = ImageConfig {
            env: raw.env.unwrap_or_default(),
            entrypoint: raw.entrypoint.unwrap_or_default(),
            cmd: raw.cmd.unwrap_or_default(),
            cwd: raw.working_dir.unwrap_or_default(),
            user: raw.user.unwrap_or_default(),
            stop_signal: raw.stop_signal.unwrap_or_default(),
            labels: raw.labels.unwrap_or_default(),
            volumes: raw.volumes.unwrap_or_default().into_keys().collect(),
        };
        Ok(Self { config, diff_ids })
    }
}

/// Names what lies in layers laid over each other (OCI image-spec config.md, "Layer ChainID").
pub(crate) fn chain_id(diff_ids: &[Digest]) -> Digest {
    let mut diff_ids = diff_ids.iter();
    let first = diff_ids.next().cloned().unwrap_or_else(|| Digest::of(b""));
    diff_ids.fold(first, |chain, diff_id| Digest::of(format!("{chain} {diff_id}").as_bytes()))
}

#[cfg(test)]
mod tests;
