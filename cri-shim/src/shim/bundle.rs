//! A container's bundle: the directory that containerd makes for it, with its OCI specification.

use std::fs;
use std::path::{Path, PathBuf};

use super::oci::Spec;
use crate::error::{Error, IoContext, Result};

/// Tells a pod's sandbox from its containers.
const KIND: &str = "io.kubernetes.cri.container-type";

/// Names a container's pod.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// In a bundle: where its server is reached. containerd reads it when it starts anew.
const ADDRESS: &str = "address";

/// In a bundle: the path of the configuration, if the runtime's options name one.
const CONFIG: &str = "pericarp-config";

/// What a container is to its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// It stands for the pod, and runs nothing.
    Sandbox,
    /// One of a pod's.
    Member,
    /// All there is of its pod.
    Alone,
}

/// A bundle that was read.
#[derive(Debug)]
pub(super) struct Bundle {
    pub(super) path: PathBuf,
    pub(super) spec: Spec,
}

impl Bundle {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let file = path.join("config.json");
        let text = fs::read_to_string(&file).doing(|| format!("reading {}", file.display()))?;
        let spec = serde_json::from_str(&text);
        let spec = spec.map_err(|error| Error::InvalidArgument(format!("{}: {error}", file.display())))?;
        Ok(Self { path: path.to_owned(), spec })
    }

    pub(super) fn role(&self) -> Role {
        match self.spec.annotations.get(KIND).map(String::as_str) {
            Some("sandbox") => Role::Sandbox,
            Some("container") => Role::Member,
            _ => Role::Alone,
        }
    }

    /// The container that stands for its pod: `id` itself, or another.
    pub(super) fn pod<'a>(&'a self, id: &'a str) -> &'a str {
        match self.role() {
            Role::Member => self.spec.annotations.get(SANDBOX_ID).map_or(id, String::as_str),
            Role::Sandbox | Role::Alone => id,
        }
    }

    /// Where the server of another container's bundle is reached; containerd has them side by side.
    pub(super) fn address_of(&self, other: &str) -> Result<String> {
        let file = self.path.with_file_name(other).join(ADDRESS);
        let missing =
            |error| Error::FailedPrecondition(format!("pod {other} has no shim: {}: {error}", file.display()));
        fs::read_to_string(&file).map_err(missing)
    }

    pub(super) fn write_address(&self, address: &str) -> Result<()> {
        fs::write(self.path.join(ADDRESS), address).doing(|| "writing the bundle's address")
    }

    pub(super) fn write_config(&self, config: &str) -> Result<()> {
        fs::write(self.path.join(CONFIG), config).doing(|| "writing the bundle's configuration")
    }
}

/// The configuration that a bundle's runtime options named.
pub(super) fn config(bundle: &Path) -> Option<PathBuf> {
    fs::read_to_string(bundle.join(CONFIG)).ok().map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(annotations: &str) -> Bundle {
        let spec = format!(r#"{{"ociVersion": "1.0.2", "annotations": {annotations}}}"#);
        Bundle { path: "/run/x/k8s.io/c".into(), spec: serde_json::from_str(&spec).expect("valid") }
    }

    #[test]
    fn a_container_knows_its_pod() {
        let member = r#"{"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s"}"#;
        let sandbox = r#"{"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "s"}"#;
        assert_eq!((bundle(member).role(), bundle(member).pod("c")), (Role::Member, "s"));
        assert_eq!((bundle(sandbox).role(), bundle(sandbox).pod("s")), (Role::Sandbox, "s"));
        assert_eq!((bundle("{}").role(), bundle("{}").pod("c")), (Role::Alone, "c"));
    }

    #[test]
    fn the_address_is_that_of_the_pods_own_bundle() {
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["c", "s"] {
            fs::create_dir(dir.path().join(name)).expect("makes");
        }
        let own = Bundle { path: dir.path().join("c"), ..bundle("{}") };
        assert!(matches!(own.address_of("s"), Err(Error::FailedPrecondition(_))));
        Bundle { path: dir.path().join("s"), ..bundle("{}") }.write_address("unix:///x").expect("writes");
        assert_eq!(own.address_of("s").expect("is there"), "unix:///x");
    }
}
