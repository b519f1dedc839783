//! Images built in memory, and pushed to a registry.

use std::io::Write;

use oci_client::client::{ClientConfig, ClientProtocol, Config, ImageLayer};
use oci_client::manifest::OciImageManifest;
use oci_client::secrets::RegistryAuth;
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
            Packing::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
                encoder.write_all(&self.0).expect("compressed");
                encoder.finish().expect("compressed")
            }
            Packing::Zstd => zstd::encode_all(self.0.as_slice(), 1).expect("compressed"),
        }
    }

    fn media_type(&self, docker: bool) -> &'static str {
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
    pub(crate) config: serde_json::Value,
}

impl Image {
    pub(crate) fn new(layers: Vec<Layer>) -> Self {
        Self { layers, docker: false, config: serde_json::json!({"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]}) }
    }

    /// The configuration blob.
    pub(crate) fn config_bytes(&self) -> Vec<u8> {
        let diff_ids: Vec<_> = self.layers.iter().map(|layer| digest(&layer.0)).collect();
        serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        })
        .to_string()
        .into_bytes()
    }

    pub(crate) fn id(&self) -> String {
        digest(&self.config_bytes())
    }

    /// Pushes it, and returns the manifest's digest.
    pub(crate) async fn push(&self, registry: &str, name: &str, auth: &RegistryAuth) -> String {
        let _already = rustls::crypto::ring::default_provider().install_default();
        let client =
            oci_client::Client::new(ClientConfig { protocol: ClientProtocol::Http, ..ClientConfig::default() });
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
