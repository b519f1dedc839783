//! Names of images, as users write them and as they are kept.

use std::fmt;

use super::digest::Digest;

/// Docker Hub, as names have it, and where it answers.
const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_ADDRESS: &str = "registry-1.docker.io";

/// A name in full: registry, repository, and tag or digest or both. `busybox` is `docker.io/library/busybox:latest`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference(oci_client::Reference);

/// A text that names no image.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no image name: write [REGISTRY/]REPOSITORY[:TAG][@DIGEST], the repository in lower case")]
pub struct BadReference(String, #[source] oci_client::ParseError);

impl Reference {
    /// Fills in what is missing, as docker does.
    pub fn parse(text: &str) -> Result<Self, BadReference> {
        text.parse().map(Self).map_err(|error| BadReference(text.to_owned(), error))
    }

    /// The registry's host, with the port if it has one.
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    /// Where the registry of this name answers.
    pub(crate) fn address(&self) -> &str {
        if self.registry() == DOCKER_HUB { DOCKER_HUB_ADDRESS } else { self.registry() }
    }

    /// The name within the registry.
    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    /// The digest asked for.
    pub fn digest(&self) -> Option<Digest> {
        Digest::try_from(self.0.digest()?.to_owned()).ok()
    }

    /// What a registry is asked for: the digest if there is one, else the tag.
    pub(crate) fn version(&self) -> &str {
        self.0.digest().or(self.0.tag()).unwrap_or_default()
    }

    /// The name as a tag (CRI RepoTags); none if only a digest was given, or a digest beside it (which the tag may have left).
    pub fn repo_tag(&self) -> Option<String> {
        match (self.0.tag(), self.0.digest()) {
            (Some(tag), None) => Some(format!("{}/{}:{tag}", self.registry(), self.repository())),
            _ => None,
        }
    }

    /// The name as a digest (CRI RepoDigests).
    pub fn repo_digest(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.registry(), self.repository())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    #[test]
    fn names_are_filled_in_as_docker_does() {
        let full = |text: &str| Reference::parse(text).unwrap().repo_tag().unwrap();
        assert_eq!(full("busybox"), "docker.io/library/busybox:latest");
        assert_eq!(full("user/app:1"), "docker.io/user/app:1");
        assert_eq!(full("docker.io/busybox"), "docker.io/library/busybox:latest");
        assert_eq!(full("index.docker.io/busybox"), "docker.io/library/busybox:latest");
        assert_eq!(full("localhost:5000/app"), "localhost:5000/app:latest");
        assert_eq!(full("registry.k8s.io/pause:3.9"), "registry.k8s.io/pause:3.9");
        assert_eq!(Reference::parse("busybox").unwrap().address(), "registry-1.docker.io");
    }

    #[test]
    fn a_digest_decides() {
        let digest = Digest::of(b"x");
        let both = Reference::parse(&format!("busybox:1@{digest}")).unwrap();
        assert_eq!((both.repo_tag(), both.digest(), both.version()), (None, Some(digest.clone()), digest.as_str()));
        assert_eq!(both.repo_digest(&digest), format!("docker.io/library/busybox@{digest}"));
        assert_eq!(Reference::parse(&format!("busybox@{digest}")).unwrap().repo_tag(), None);
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in ["", "UPPER", "a b", "a/../b", "x@sha256:12", "http://x/y", "a:b:c", "../etc"] {
            assert!(Reference::parse(text).is_err(), "{text:?}");
        }
    }
}
