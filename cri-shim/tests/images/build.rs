//! Images built in memory, and pushed to a registry.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol, Config, ImageLayer};
use oci_client::manifest::OciImageManifest;
use oci_client::secrets::RegistryAuth;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// How a layer is packed.
#[derive(Clone, Copy)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// A layer: its archive, and how it is packed.
#[derive(Clone)]
pub(crate) struct Layer(pub(crate) Vec<u8>, pub(crate) Packing);

/// `sha256:…`.
pub(crate) fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

impl Layer {
    pub(crate) fn packed(&self) -> Vec<u8> {
        match self.1 {
            Packing::Plain => self.0.clone(),
            Packing::Gzip => gzip(&self.0),
            Packing::Zstd => zstd::encode_all(self.0.as_slice(), 1).expect("compressed"),
        }
    }

    pub(crate) fn media_type(&self, docker: bool) -> &'static str {
        match (self.1, docker) {
            (Packing::Plain, false) => "application/vnd.oci.image.layer.v1.tar",
            (Packing::Gzip, false) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (Packing::Zstd, _) => "application/vnd.oci.image.layer.v1.tar+zstd",
            (Packing::Plain, true) => "application/vnd.docker.image.rootfs.diff.tar",
            (Packing::Gzip, true) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
        }
    }
}

/// An image about to be pushed.
pub(crate) struct Image {
    pub(crate) layers: Vec<Layer>,
    /// Docker's schema 2 instead of OCI's.
    pub(crate) docker: bool,
    /// The inner `config`.
    pub(crate) config: Value,
}

impl Image {
    pub(crate) fn new(layers: Vec<Layer>) -> Self {
        Self { layers, docker: false, config: json!({"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]}) }
    }

    /// The configuration blob.
    pub(crate) fn config_bytes(&self) -> Vec<u8> {
        let diff_ids: Vec<_> = self.layers.iter().map(|layer| digest(&layer.0)).collect();
        json!({
            "architecture": "amd64", "os": "linux", "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        })
        .to_string()
        .into_bytes()
    }

    pub(crate) fn id(&self) -> String {
        digest(&self.config_bytes())
    }

    /// Pushes it by plain HTTP, and returns the manifest's digest.
    pub(crate) async fn push(&self, registry: &str, name: &str, auth: &RegistryAuth) -> String {
        self.push_with(registry, name, auth, None).await
    }

    /// Pushes it by HTTPS if a certificate authority is given.
    pub(crate) async fn push_with(
        &self,
        registry: &str,
        name: &str,
        auth: &RegistryAuth,
        ca: Option<String>,
    ) -> String {
        let _already = rustls::crypto::ring::default_provider().install_default();
        let protocol = if ca.is_some() { ClientProtocol::Https } else { ClientProtocol::Http };
        let certificate = |pem: String| Certificate { encoding: CertificateEncoding::Pem, data: pem.into_bytes() };
        let extra_root_certificates = ca.map(certificate).into_iter().collect();
        let client =
            oci_client::Client::new(ClientConfig { protocol, extra_root_certificates, ..ClientConfig::default() });
        let reference: oci_client::Reference = format!("{registry}/{name}").parse().expect("a name");
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|layer| ImageLayer::new(layer.packed(), layer.media_type(self.docker).to_owned(), None))
            .collect();
        let config_type = if self.docker {
            "application/vnd.docker.container.image.v1+json"
        } else {
            "application/vnd.oci.image.config.v1+json"
        };
        let config = Config::new(self.config_bytes(), config_type.to_owned(), None);
        let mut manifest = OciImageManifest::build(&layers, &config, None);
        manifest.media_type = Some(
            if self.docker {
                "application/vnd.docker.distribution.manifest.v2+json"
            } else {
                "application/vnd.oci.image.manifest.v1+json"
            }
            .to_owned(),
        );
        client.push(&reference, &layers, config, auth, Some(manifest)).await.expect("the image is pushed");
        client.fetch_manifest_digest(&reference, auth).await.expect("the registry has the manifest")
    }

    /// Writes it as an OCI layout.
    pub(crate) fn write_layout(&self, dir: &Path, name: Option<&str>) {
        let blob = |bytes: &[u8], kind: &str| {
            let digest = digest(bytes);
            write(&dir.join("blobs").join(digest.replace(':', "/")), bytes);
            json!({"mediaType": kind, "digest": digest, "size": bytes.len()})
        };
        let layers: Vec<_> = self.layers.iter().map(|layer| blob(&layer.packed(), layer.media_type(false))).collect();
        let config = blob(&self.config_bytes(), "application/vnd.oci.image.config.v1+json");
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers});
        let mut entry = blob(manifest.to_string().as_bytes(), kind);
        if let Some(name) = name {
            entry["annotations"] =
                json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "a-tag"});
        }
        write(&dir.join("index.json"), json!({"schemaVersion": 2, "manifests": [entry]}).to_string().as_bytes());
        write(&dir.join("oci-layout"), br#"{"imageLayoutVersion": "1.0.0"}"#);
    }

    /// Writes what `docker save` puts into its archives, in its older form.
    pub(crate) fn write_docker(&self, dir: &Path, tags: &[&str]) {
        let mut layers = vec![];
        for (number, layer) in self.layers.iter().enumerate() {
            layers.push(format!("{number}/layer.tar"));
            write(&dir.join(format!("{number}/layer.tar")), &layer.0);
        }
        write(&dir.join("config.json"), &self.config_bytes());
        let manifest = json!([{"Config": "config.json", "RepoTags": tags, "Layers": layers}]);
        write(&dir.join("manifest.json"), manifest.to_string().as_bytes());
    }
}

fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().expect("a parent")).expect("made");
    fs::write(path, bytes).expect("written");
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    encoder.write_all(bytes).expect("compressed");
    encoder.finish().expect("compressed")
}

/// The layers of a layout's image for linux/amd64, base first.
pub(crate) fn layers_of(layout: &Path) -> Vec<PathBuf> {
    let blob = |descriptor: &Value| {
        layout.join("blobs").join(descriptor["digest"].as_str().expect("a digest").replace(':', "/"))
    };
    let parse = |path: PathBuf| serde_json::from_slice::<Value>(&fs::read(path).expect("read")).expect("JSON");
    let mut document = parse(layout.join("index.json"));
    while let Some(entries) = document["manifests"].as_array() {
        let platform = json!({"architecture": "amd64", "os": "linux"});
        let chosen = entries.iter().find(|entry| entry["platform"] == platform).unwrap_or(&entries[0]);
        document = parse(blob(chosen));
    }
    document["layers"].as_array().expect("layers").iter().map(blob).collect()
}

/// An archive being built.
pub(crate) struct Archive(tar::Builder<Vec<u8>>);

impl Archive {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(vec![]))
    }

    fn header(kind: tar::EntryType, mode: u32, size: usize) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_size(size as u64);
        header
    }

    pub(crate) fn file(mut self, path: &str, mode: u32, data: &[u8]) -> Self {
        let mut header = Self::header(tar::EntryType::Regular, mode, data.len());
        self.0.append_data(&mut header, path, data).expect("appended");
        self
    }

    pub(crate) fn dir(mut self, path: &str, mode: u32) -> Self {
        let mut header = Self::header(tar::EntryType::Directory, mode, 0);
        self.0.append_data(&mut header, path, &[][..]).expect("appended");
        self
    }

    pub(crate) fn link(mut self, kind: tar::EntryType, path: &str, target: &str) -> Self {
        let mut header = Self::header(kind, 0o777, 0);
        self.0.append_link(&mut header, path, target).expect("appended");
        self
    }

    pub(crate) fn done(self, packing: Packing) -> Layer {
        Layer(self.0.into_inner().expect("an archive"), packing)
    }
}
