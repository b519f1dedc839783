//! Container images: names, registries, and the read-only disks that guests mount.
//!
//! An image comes from a registry, an OCI layout or an archive; its layers are merged, while they arrive, into one EROFS file
//! that a pod's VM gets as a disk. No file of an image is ever created on the host under its own name, and what another program
//! wrote into a layer is never trusted: all of it is bounded, and checked by digest before it can be seen.
//!
//! Read in this order: [`Store`] (what there is), `pull` (how it comes), `registry`, `convert`, `layer`, `tree`, `erofs`.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::arithmetic_side_effects
)]

mod convert;
mod digest;
mod erofs;
mod import;
mod index;
mod kind;
mod layer;
mod manifest;
mod pull;
mod reference;
mod registry;
mod signature;
mod spool;
mod store;
mod tree;
mod verity;
mod work;

pub use digest::{BadDigest, Digest, Mismatch};
pub use manifest::ImageConfig;
pub use pull::{LayerProgress, PullProgress};
pub use reference::{BadReference, Reference};
pub use registry::{Auth, HostConfig, RegistryConfig};
pub use store::{Error, FsInfo, Hold, Image, Store, StoreConfig};
pub use verity::Verity;

/// The errors of the parts, for those who want to tell them apart.
pub mod errors {
    pub use super::convert::Error as Convert;
    pub use super::erofs::Error as Erofs;
    pub use super::import::Error as Import;
    pub use super::layer::Error as Layer;
    pub use super::manifest::Error as Manifest;
    pub use super::registry::Error as Registry;
    pub use super::signature::Error as Signature;
    pub use super::tree::Error as Tree;
}
