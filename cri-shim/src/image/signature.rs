//! Whether an image may be pulled: what the node's policy says of its name, and signatures as cosign makes them.
//!
//! A signature is bytes over a small document (the "simple signing" payload), which names the digest of the manifest that it is for.
//! Both lie in the image's own repository: under the tag `sha256-DIGEST.sig`, or among the manifest's referrers (OCI
//! distribution-spec 1.1). A registry is trusted with none of it: what counts is that a key of the policy's has signed
//! the digest that is then pulled. Old signatures stay good, so that a policy does not protect from an old image under a tag.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::pki_types::pem::PemObject;
use serde::Deserialize;

use super::digest::Digest;
use super::manifest::Descriptor;
use super::reference::Reference;
use super::registry::{self, Session, Sink};

/// Most bytes of a policy.
const MAX_POLICY: u64 = 1 << 20;
/// Most bytes of what is signed.
const MAX_PAYLOAD: u64 = 64 << 10;
/// Most signatures of an image that are looked at, and most manifests that may hold them.
const MAX_SIGNATURES: usize = 64;
const MAX_MANIFESTS: usize = 16;

/// Of the layers that are payloads, and where their signatures are (cosign, "Signature Specification").
const PAYLOAD_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
/// What a payload is that says that an image is as its signer wants it.
const PAYLOAD_KIND: &str = "cosign container image signature";
/// Of manifests that hold signatures, among the referrers.
const ARTIFACT_TYPE: &str = "application/vnd.dev.cosign.artifact.sig.v1+json";

/// A public key on the curve P-256, not compressed, as the DER of a SubjectPublicKeyInfo has it (RFC 5480 §2): algorithm
/// id-ecPublicKey, parameters secp256r1, a bit string of 65 bytes. The point itself follows.
const P256: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
const POINT_BYTES: usize = 65;

/// Why an image is not let in.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The policy's file.
    #[error("the image policy {0} cannot be read, so that nothing is let in")]
    Read(PathBuf, #[source] std::io::Error),
    /// What is in it.
    #[error("the image policy {0} is wrong, so that nothing is let in: {1}")]
    Policy(PathBuf, String),
    /// Its name.
    #[error("the image policy rejects it: use another image, or let its name in")]
    Rejected,
    /// Nobody has signed it.
    #[error(
        "there is no signature of {0} at its registry: sign it with a key of the image policy's (cosign sign --key)"
    )]
    Unsigned(Digest),
    /// Others have.
    #[error("{0} is signed, but not with a key of the image policy's")]
    Untrusted(Digest),
    /// A good signature of something else.
    #[error("the signature beside {0} is one of {1}: it was put there for an image that it is not about")]
    Other(Digest, String),
    /// The way to the signatures.
    #[error(transparent)]
    Registry(#[from] registry::Error),
}

/// What names are let in.
#[derive(Debug)]
pub(crate) struct Policy {
    default: Rule,
    /// The longest prefix first.
    rules: Vec<(String, Rule)>,
}

/// What is asked of an image.
#[derive(Clone, Debug)]
pub(crate) enum Rule {
    Accept,
    Reject,
    /// A signature by one of them.
    Signed(Vec<Key>),
}

/// A public key for ECDSA on P-256 with SHA-256.
#[derive(Clone, Debug)]
pub(crate) struct Key([u8; POINT_BYTES]);

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Word {
    Accept,
    Reject,
    Signed,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPolicy {
    default: Word,
    #[serde(default)]
    keys: Vec<String>,
    #[serde(default)]
    images: Vec<RawRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    prefix: String,
    policy: Word,
    #[serde(default)]
    keys: Vec<String>,
}

impl Policy {
    /// Reads a file. It is read anew for each pull, so that a change counts at once.
    pub(crate) fn load(path: &Path) -> Result<Self, Error> {
        let read = || {
            let length = fs::metadata(path)?.len();
            if length > MAX_POLICY { Err(std::io::ErrorKind::FileTooLarge.into()) } else { fs::read_to_string(path) }
        };
        let text = read().map_err(|error| Error::Read(path.to_owned(), error))?;
        Self::parse(&text).map_err(|error| Error::Policy(path.to_owned(), error))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let RawPolicy { default, keys, images } = toml::from_str(text).map_err(|error| error.to_string())?;
        let default = rule("default", default, &keys)?;
        let mut rules = Vec::new();
        for RawRule { prefix, policy, keys } in images {
            if prefix.is_empty() || prefix.ends_with('/') || prefix.contains(['@', ' ']) {
                return Err(format!("prefix {prefix:?} is no registry or repository: write REGISTRY[/REPOSITORY…]"));
            }
            let rule = rule(&prefix, policy, &keys)?;
            rules.push((prefix, rule));
        }
        rules.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.len()));
        Ok(Self { default, rules })
    }

    /// What is asked of an image of this name: by the longest prefix that is its registry, or ends at a slash of its repository's.
    pub(crate) fn rule(&self, reference: &Reference) -> &Rule {
        let name = format!("{}/{}", reference.registry(), reference.repository());
        let is_in =
            |prefix: &str| name.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        self.rules.iter().find(|(prefix, _)| is_in(prefix)).map_or(&self.default, |(_, rule)| rule)
    }
}

fn rule(what: &str, word: Word, keys: &[String]) -> Result<Rule, String> {
    match word {
        Word::Signed if keys.is_empty() => Err(format!("{what:?} is to be signed, but there are no keys")),
        Word::Signed => keys.iter().map(|pem| Key::parse(pem)).collect::<Result<_, _>>().map(Rule::Signed),
        _ if !keys.is_empty() => Err(format!("{what:?} has keys, but its policy is not \"signed\"")),
        Word::Accept => Ok(Rule::Accept),
        Word::Reject => Ok(Rule::Reject),
    }
}

impl Key {
    fn parse(pem: &str) -> Result<Self, String> {
        const WANTED: &str = "a PEM PUBLIC KEY for ECDSA on the curve P-256 is expected, as cosign.pub holds one";
        let key =
            SubjectPublicKeyInfoDer::from_pem_slice(pem.as_bytes()).map_err(|_| format!("a key is none: {WANTED}"))?;
        let point = key.as_ref().strip_prefix(&P256).and_then(|point| <[u8; POINT_BYTES]>::try_from(point).ok());
        point.map(Self).ok_or_else(|| format!("a key is of another kind: {WANTED}"))
    }

    fn has_signed(&self, payload: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &self.0).verify(payload, signature).is_ok()
    }
}

#[derive(Deserialize)]
struct Signatures {
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Referrers {
    #[serde(default)]
    manifests: Vec<Referrer>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Referrer {
    digest: Digest,
    #[serde(default)]
    artifact_type: String,
}

#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    #[serde(rename = "type")]
    kind: String,
    image: PayloadImage,
}

#[derive(Deserialize)]
struct PayloadImage {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

/// Finds a signature of a manifest by one of `keys`.
pub(crate) async fn verify(session: &Session, digest: &Digest, keys: &[Key]) -> Result<(), Error> {
    let tag = format!("{}.sig", digest.as_str().replace(':', "-"));
    let mut refusal = Error::Unsigned(digest.clone());
    if let Some((bytes, _)) = found(session.manifest(&tag).await)? {
        match good(session, &bytes, digest, keys).await {
            Err(error @ (Error::Other(..) | Error::Untrusted(_) | Error::Unsigned(_))) => refusal = error,
            other => return other,
        }
    }
    for referrer in referrers(session, digest).await? {
        let (bytes, _) = session.manifest(referrer.as_str()).await?;
        match good(session, &bytes, digest, keys).await {
            Err(Error::Unsigned(_)) => {}
            Err(error @ (Error::Other(..) | Error::Untrusted(_))) => refusal = error,
            other => return other,
        }
    }
    Err(refusal)
}

/// What is not there is nothing; any other failure is one.
fn found<T>(answer: Result<T, registry::Error>) -> Result<Option<T>, Error> {
    match answer {
        Err(registry::Error::NotFound { .. }) => Ok(None),
        other => Ok(Some(other?)),
    }
}

/// Digests of the manifests that refer to one and hold signatures, by the registry's own list or, where it has none, by the
/// tag that stands for it (distribution-spec, "Referrers Tag Schema").
async fn referrers(session: &Session, digest: &Digest) -> Result<Vec<Digest>, Error> {
    let bytes = match found(session.referrers(digest).await)? {
        Some(bytes) => bytes,
        None => match found(session.manifest(&digest.as_str().replace(':', "-")).await)? {
            Some((bytes, _)) => bytes,
            None => return Ok(Vec::new()),
        },
    };
    let Ok(list) = serde_json::from_slice::<Referrers>(&bytes) else { return Ok(Vec::new()) };
    let signatures = list.manifests.into_iter().filter(|referrer| referrer.artifact_type == ARTIFACT_TYPE);
    Ok(signatures.map(|referrer| referrer.digest).take(MAX_MANIFESTS).collect())
}

/// Whether one of the signatures that a manifest holds is good; otherwise why the last one is not.
async fn good(session: &Session, manifest: &[u8], digest: &Digest, keys: &[Key]) -> Result<(), Error> {
    let unsigned = || Error::Unsigned(digest.clone());
    let Ok(signatures) = serde_json::from_slice::<Signatures>(manifest) else { return Err(unsigned()) };
    let payloads = signatures.layers.iter().filter(|layer| layer.media_type == PAYLOAD_TYPE);
    let mut refusal = unsigned();
    for layer in payloads.filter(|layer| layer.size <= MAX_PAYLOAD).take(MAX_SIGNATURES) {
        let mut payload = vec![];
        session.blob("the signed payload", layer, Sink::Memory(&mut payload)).await?;
        match check(layer, &payload, digest, keys) {
            Ok(()) => return Ok(()),
            Err(error) => refusal = error,
        }
    }
    Err(refusal)
}

/// Nothing of a payload is believed before its signature.
fn check(layer: &Descriptor, payload: &[u8], digest: &Digest, keys: &[Key]) -> Result<(), Error> {
    let untrusted = || Error::Untrusted(digest.clone());
    let text = layer.annotations.as_ref().and_then(|annotations| annotations.get(SIGNATURE)).ok_or_else(untrusted)?;
    let signature = base64::engine::general_purpose::STANDARD.decode(text.trim()).map_err(|_| untrusted())?;
    if !keys.iter().any(|key| key.has_signed(payload, &signature)) {
        return Err(untrusted());
    }
    let Payload { critical } = serde_json::from_slice(payload).map_err(|_| untrusted())?;
    if critical.kind != PAYLOAD_KIND {
        return Err(untrusted());
    }
    if critical.image.digest != digest.as_str() {
        return Err(Error::Other(digest.clone(), critical.image.digest));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
