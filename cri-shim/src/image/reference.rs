//! Names of images, as users write them and as they are kept.

use std::fmt;
use std::net::Ipv6Addr;

use super::digest::Digest;

/// Docker Hub, as names have it, and where it answers.
const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_ADDRESS: &str = "registry-1.docker.io";

/// Another name of Docker Hub, and the user whom its names leave out.
const DOCKER_HUB_INDEX: &str = "index.docker.io";
const DOCKER_HUB_USER: &str = "library";

/// The tag that is left out.
const DEFAULT_TAG: &str = "latest";

/// Longest tag, and longest registry with repository, in bytes.
const MAX_TAG: usize = 128;
const MAX_NAME: usize = 255;

/// A name in full: registry, repository, and tag or digest or both. `busybox` is `docker.io/library/busybox:latest`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// A text that names no image.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no image name: write [REGISTRY/]REPOSITORY[:TAG][@DIGEST], the repository in lower case")]
pub struct BadReference(String);

impl Reference {
    /// Fills in what is missing, as docker does.
    ///
    /// By hand: a library's regular expression for it keeps 12 MiB, and names are parsed at every look for an image.
    pub fn parse(text: &str) -> Result<Self, BadReference> {
        Self::read(text).ok_or_else(|| BadReference(text.to_owned()))
    }

    /// The grammar is that of the distribution project's package `reference`.
    fn read(text: &str) -> Option<Self> {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::try_from(digest.to_owned()).ok()?)),
            None => (text, None),
        };
        // A colon before the last slash is a port's.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        let (registry, repository) = match name.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest),
            _ => (DOCKER_HUB, name),
        };
        let registry = if registry == DOCKER_HUB_INDEX { DOCKER_HUB } else { registry };
        let repository = match repository {
            alone if registry == DOCKER_HUB && !alone.contains('/') => format!("{DOCKER_HUB_USER}/{alone}"),
            whole => whole.to_owned(),
        };
        let fits = registry.len().saturating_add(repository.len()) < MAX_NAME;
        let right = fits && is_registry(registry) && repository.split('/').all(is_component) && tag.is_none_or(is_tag);
        let tag = tag.or(digest.is_none().then_some(DEFAULT_TAG)).map(str::to_owned);
        right.then(|| Self { registry: registry.to_owned(), repository, tag, digest })
    }

    /// The registry's host, with the port if it has one.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Where the registry of this name answers.
    pub(crate) fn address(&self) -> &str {
        if self.registry() == DOCKER_HUB { DOCKER_HUB_ADDRESS } else { self.registry() }
    }

    /// The name within the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The digest asked for.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What a registry is asked for: the digest if there is one, else the tag.
    pub(crate) fn version(&self) -> &str {
        self.digest.as_ref().map(Digest::as_str).or(self.tag.as_deref()).unwrap_or_default()
    }

    /// The name as a tag (CRI RepoTags); none if only a digest was given, or a digest beside it (which the tag may have left).
    pub fn repo_tag(&self) -> Option<String> {
        match (&self.tag, &self.digest) {
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
        write!(f, "{}/{}", self.registry, self.repository)?;
        self.tag.iter().try_for_each(|tag| write!(f, ":{tag}"))?;
        self.digest.iter().try_for_each(|digest| write!(f, "@{digest}"))
    }
}

/// A host name, an IPv4 address or an IPv6 address in brackets, and a port.
fn is_registry(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let is_label = |label: &str| {
        let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !label.is_empty() && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    let is_address = |host: &str| {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        bare.is_some_and(|bare| bare.parse::<Ipv6Addr>().is_ok())
    };
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    (host.split('.').all(is_label) || is_address(host)) && port.is_none_or(is_port)
}

/// Lower-case words with a `.`, `_`, `__` or any number of `-` between them.
fn is_component(text: &str) -> bool {
    let is_letter = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit();
    let is_separator =
        |between: &str| matches!(between, "" | "." | "_" | "__") || between.bytes().all(|byte| byte == b'-');
    text.starts_with(is_letter) && text.ends_with(is_letter) && text.split(is_letter).all(is_separator)
}

fn is_tag(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let first = text.bytes().next();
    first.is_some_and(is_word)
        && text.len() <= MAX_TAG
        && text.bytes().all(|byte| is_word(byte) || byte == b'.' || byte == b'-')
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
        assert_eq!(full("Host-1.example:80/a.b/c__d/e---f:V_1.x-y"), "Host-1.example:80/a.b/c__d/e---f:V_1.x-y");
        assert_eq!(full("[2001:db8::1]:5000/app:1"), "[2001:db8::1]:5000/app:1");
        assert_eq!(Reference::parse(&format!("x:{}", "a".repeat(128))).unwrap().version().len(), 128);
        assert_eq!(Reference::parse("busybox").unwrap().address(), "registry-1.docker.io");
    }

    #[test]
    fn a_digest_decides() {
        let digest = Digest::of(b"x");
        let both = Reference::parse(&format!("busybox:1@{digest}")).unwrap();
        assert_eq!((both.repo_tag(), both.digest(), both.version()), (None, Some(&digest), digest.as_str()));
        assert_eq!(both.repo_digest(&digest), format!("docker.io/library/busybox@{digest}"));
        assert_eq!(Reference::parse(&format!("busybox@{digest}")).unwrap().repo_tag(), None);
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = |length| "a".repeat(length);
        let texts = [
            "",
            "/",
            "UPPER",
            "a b",
            "a/../b",
            "x@sha256:12",
            "http://x/y",
            "a:b:c",
            "../etc",
            "a//b",
            "a/",
            "a_.b",
            "-a",
            "x:",
            "x@",
            "x:.1",
            "h.:1/a",
            "h.io:/a",
            "h.io:x/a",
            "-h.io/a",
            "[::1/a",
            "[::g]:1/a",
            &format!("x:{}", long(129)),
            &long(250),
        ];
        for text in texts {
            assert!(Reference::parse(text).is_err(), "{text:?}");
        }
    }
}
