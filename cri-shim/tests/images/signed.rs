//! Images that are signed, by others, over others, or not at all: keys and signatures are openssl(1)'s.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cri_shim::image::errors::Signature;
use cri_shim::image::{Error, Store, StoreConfig};
use oci_client::secrets::RegistryAuth;
use serde_json::{Value, json};

use crate::registry::{Options, Registry};
use crate::token::openssl;
use crate::{build, files, plain, sample};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const PAYLOAD: &str = "application/vnd.dev.cosign.simplesigning.v1+json";

/// A key pair in files.
struct Key(PathBuf);

impl Key {
    fn new(dir: &Path, name: &str) -> Self {
        let path = dir.join(name);
        openssl(&["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", &path.display().to_string()], b"");
        Self(path)
    }

    fn public(&self) -> String {
        let pem = openssl(&["ec", "-in", &self.0.display().to_string(), "-pubout"], b"");
        String::from_utf8(pem).expect("PEM")
    }

    fn sign(&self, payload: &[u8]) -> Vec<u8> {
        openssl(&["dgst", "-sha256", "-sign", &self.0.display().to_string()], payload)
    }
}

/// As cosign has it.
fn payload(digest: &str, kind: &str) -> Vec<u8> {
    json!({
        "critical": {
            "identity": {"docker-reference": "somewhere/else"},
            "image": {"docker-manifest-digest": digest},
            "type": kind,
        },
        "optional": null,
    })
    .to_string()
    .into_bytes()
}

fn cosign(digest: &str) -> Vec<u8> {
    payload(digest, "cosign container image signature")
}

/// A repository of a registry that can be written to.
struct Repository<'a> {
    registry: &'a Registry,
    name: &'a str,
    http: reqwest::Client,
}

impl<'a> Repository<'a> {
    fn new(registry: &'a Registry, name: &'a str) -> Self {
        let _already = rustls::crypto::ring::default_provider().install_default();
        Self { registry, name, http: reqwest::Client::new() }
    }

    fn url(&self, rest: &str) -> String {
        format!("http://{}/v2/{}/{rest}", self.registry.address, self.name)
    }

    async fn push_blob(&self, bytes: &[u8]) -> Value {
        let answer = self.http.post(self.url("blobs/uploads/")).send().await.expect("an upload");
        let place = answer.headers()["location"].to_str().expect("text").to_owned();
        let digest = build::digest(bytes);
        let put =
            self.http.put(format!("{place}&digest={digest}")).body(bytes.to_vec()).send().await.expect("answered");
        assert!(put.status().is_success(), "{}", put.status());
        json!({"digest": digest, "size": bytes.len()})
    }

    /// Puts a manifest under a tag; its digest.
    async fn push_manifest(&self, tag: &str, kind: &str, manifest: &Value) -> String {
        let bytes = manifest.to_string();
        let put = self.http.put(self.url(&format!("manifests/{tag}"))).header("content-type", kind).body(bytes.clone());
        let status = put.send().await.expect("answered").status();
        assert!(status.is_success(), "{status}");
        build::digest(bytes.as_bytes())
    }

    /// A manifest that holds payloads with their signatures.
    async fn signatures(&self, signed: &[(Vec<u8>, Vec<u8>)]) -> Value {
        let mut config = self.push_blob(b"{}").await;
        config["mediaType"] = "application/vnd.oci.image.config.v1+json".into();
        let mut layers = vec![];
        for (payload, signature) in signed {
            let mut layer = self.push_blob(payload).await;
            layer["mediaType"] = PAYLOAD.into();
            layer["annotations"] = json!({"dev.cosignproject.cosign/signature": STANDARD.encode(signature)});
            layers.push(layer);
        }
        json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers})
    }

    /// Signs as cosign does.
    async fn sign(&self, digest: &str, signed: &[(Vec<u8>, Vec<u8>)]) {
        let manifest = self.signatures(signed).await;
        self.push_manifest(&format!("{}.sig", digest.replace(':', "-")), MANIFEST, &manifest).await;
    }
}

/// The node's policy in a file, and what comes of a pull under it.
struct Node {
    dir: tempfile::TempDir,
    config: StoreConfig,
}

impl Node {
    fn new(registry: &Registry, policy: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("policy.toml");
        fs::write(&path, policy).expect("written");
        Self { dir, config: StoreConfig { policy: Some(path), ..plain(&registry.address) } }
    }

    /// The pulled image's id.
    async fn pull(&self, name: &str) -> Result<String, Error> {
        let dir = self.dir.path().join("images");
        let store = Store::open(&dir, self.config.clone())?;
        let pulled = store.pull(name, None, None).await.map(|image| image.id);
        if pulled.is_err() {
            assert!(files(&dir).is_empty() && store.list().expect("a list").is_empty(), "nothing comes of a refusal");
        }
        pulled
    }

    async fn refusal(&self, name: &str) -> Signature {
        match self.pull(name).await {
            Err(Error::Signature(_, error)) => error,
            other => panic!("{name}: {other:?}"),
        }
    }
}

fn signed_by(keys: &[&Key]) -> String {
    let keys: Vec<_> = keys.iter().map(|key| format!("'''{}'''", key.public())).collect();
    format!("default = \"signed\"\nkeys = [{}]\n", keys.join(", "))
}

#[tokio::test]
async fn only_what_a_key_of_the_policy_has_signed_is_let_in() {
    let registry = Registry::start(&Options::default());
    let keys = tempfile::tempdir().expect("a directory");
    let (ours, old, theirs) = (Key::new(keys.path(), "ours"), Key::new(keys.path(), "old"), Key::new(keys.path(), "x"));
    let node = Node::new(&registry, &signed_by(&[&old, &ours]));
    let image = sample();
    let push = async |name: &str| image.push(&registry.address, &format!("{name}:1"), &RegistryAuth::Anonymous).await;
    let name = |repository: &str| format!("{}/{repository}:1", registry.address);

    push("unsigned").await;
    assert!(matches!(node.refusal(&name("unsigned")).await, Signature::Unsigned(_)));

    let digest = push("foreign").await;
    let foreign = Repository::new(&registry, "foreign");
    foreign.sign(&digest, &[(cosign(&digest), theirs.sign(&cosign(&digest)))]).await;
    assert!(matches!(node.refusal(&name("foreign")).await, Signature::Untrusted(_)));

    // A good signature, taken from beside another image.
    let digest = push("moved").await;
    let elsewhere = cosign(&build::digest(b"another image"));
    Repository::new(&registry, "moved").sign(&digest, &[(elsewhere.clone(), ours.sign(&elsewhere))]).await;
    let refusal = node.refusal(&name("moved")).await;
    assert!(matches!(&refusal, Signature::Other(..)) && refusal.to_string().contains("put there"), "{refusal}");

    // A payload changed after it was signed, a signature changed, something signed that is none.
    let digest = push("tampered").await;
    let tampered = Repository::new(&registry, "tampered");
    let (good, other) = (cosign(&digest), payload(&digest, "a good book"));
    let mut damaged = ours.sign(&good);
    damaged[20] ^= 1;
    let bad = [
        (good.clone(), ours.sign(&elsewhere)),
        (good.clone(), damaged),
        (good.clone(), vec![]),
        (other.clone(), ours.sign(&other)),
    ];
    tampered.sign(&digest, &bad).await;
    assert!(matches!(node.refusal(&name("tampered")).await, Signature::Untrusted(_)));
    // One good one among them is enough.
    tampered.sign(&digest, &[&bad[..], &[(good.clone(), ours.sign(&good))]].concat()).await;
    assert_eq!(node.pull(&name("tampered")).await.expect("signed"), image.id());
}

#[tokio::test]
async fn signatures_are_found_where_cosign_puts_them() {
    let registry = Registry::start(&Options::default());
    let keys = tempfile::tempdir().expect("a directory");
    let key = Key::new(keys.path(), "key");
    let image = sample();
    let digest = image.push(&registry.address, "tagged:1", &RegistryAuth::Anonymous).await;
    let signed = [(cosign(&digest), key.sign(&cosign(&digest)))];
    Repository::new(&registry, "tagged").sign(&digest, &signed).await;
    let name = |repository: &str| format!("{}/{repository}:1", registry.address);
    let policy = signed_by(&[&key]);
    assert_eq!(Node::new(&registry, &policy).pull(&name("tagged")).await.expect("signed"), image.id());

    // Among the referrers, by the tag that stands for them in a registry without that list, as Debian's is.
    image.push(&registry.address, "referred:1", &RegistryAuth::Anonymous).await;
    let referred = Repository::new(&registry, "referred");
    let manifest = referred.signatures(&signed).await;
    let signature = referred.push_manifest("any", MANIFEST, &manifest).await;
    let entry = json!({
        "mediaType": MANIFEST, "digest": signature, "size": manifest.to_string().len(),
        "artifactType": "application/vnd.dev.cosign.artifact.sig.v1+json",
    });
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]});
    referred.push_manifest(&digest.replace(':', "-"), INDEX, &index).await;
    assert_eq!(Node::new(&registry, &policy).pull(&name("referred")).await.expect("signed"), image.id());

    // The image of an index is signed by the index's digest, which is what its tag stands for.
    let listed = Repository::new(&registry, "listed");
    image.push(&registry.address, "listed:plain", &RegistryAuth::Anonymous).await;
    let size =
        referred.http.get(listed.url("manifests/plain")).header("accept", MANIFEST).send().await.expect("answered");
    let size = size.bytes().await.expect("a body").len();
    let platform = json!({"os": "linux", "architecture": "amd64"});
    let entry = json!({"mediaType": MANIFEST, "digest": digest, "size": size, "platform": platform});
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]});
    let of_index = listed.push_manifest("1", INDEX, &index).await;
    listed.sign(&digest, &signed).await;
    assert!(matches!(Node::new(&registry, &policy).refusal(&name("listed")).await, Signature::Unsigned(_)));
    listed.sign(&of_index, &[(cosign(&of_index), key.sign(&cosign(&of_index)))]).await;
    assert_eq!(Node::new(&registry, &policy).pull(&name("listed")).await.expect("signed"), image.id());
}

#[tokio::test]
async fn the_policy_decides_by_name_and_is_read_for_each_pull() {
    let registry = Registry::start(&Options::default());
    let image = sample();
    for name in ["open/app:1", "closed/app:1"] {
        image.push(&registry.address, name, &RegistryAuth::Anonymous).await;
    }
    let name = |name: &str| format!("{}/{name}:1", registry.address);
    let text = format!("default = \"reject\"\n[[images]]\nprefix = \"{}/open\"\npolicy = \"accept\"", registry.address);
    let node = Node::new(&registry, &text);
    let before = registry.requests("closed");
    assert!(matches!(node.refusal(&name("closed/app")).await, Signature::Rejected));
    assert_eq!(registry.requests("closed"), before, "its registry is not even asked");
    assert_eq!(node.pull(&name("open/app")).await.expect("let in"), image.id());
    let path = node.config.policy.clone().expect("a policy");
    fs::write(&path, "default = \"accept\"").expect("written");
    assert_eq!(node.pull(&name("closed/app")).await.expect("let in"), image.id());
    // A policy that cannot be read lets nothing in, and a store does not open with one.
    let store = Store::open(&node.dir.path().join("images"), node.config.clone()).expect("opens");
    fs::write(&path, "default = \"accpet\"").expect("written");
    let error = store.pull(&name("open/app"), None, None).await.expect_err("the policy is wrong");
    assert!(matches!(&error, Error::Signature(_, Signature::Policy(..))), "{error:?}");
    let opened = Store::open(&node.dir.path().join("images"), node.config.clone());
    assert!(matches!(opened.err(), Some(Error::Policy(Signature::Policy(..)))));
}
