#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic")]

use serde_json::json;

use super::*;

fn descriptor(media_type: &str) -> serde_json::Value {
    json!({"mediaType": media_type, "digest": Digest::of(media_type.as_bytes()), "size": 3})
}

fn manifest(config: &str, layers: &[&str]) -> Result<Document, Error> {
    let layers: Vec<_> = layers.iter().map(|layer| descriptor(layer)).collect();
    Document::parse(json!({"schemaVersion": 2, "config": descriptor(config), "layers": layers}).to_string().as_bytes())
}

#[test]
fn both_specifications_are_read() {
    let oci = manifest(CONFIG_TYPES[0], &["application/vnd.oci.image.layer.v1.tar+zstd"]).unwrap();
    assert!(matches!(oci, Document::Manifest(manifest) if manifest.layers.len() == 1));
    let docker = manifest(CONFIG_TYPES[1], &["application/vnd.docker.image.rootfs.diff.tar.gzip"; 256]).unwrap();
    assert!(matches!(docker, Document::Manifest(manifest) if manifest.layers.len() == 256));
}

#[test]
fn what_is_no_image_is_refused() {
    assert!(matches!(manifest("application/vnd.cncf.helm.config.v1+json", &[]), Err(Error::Artifact(_))));
    let encrypted = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted";
    assert!(matches!(manifest(CONFIG_TYPES[0], &[encrypted]), Err(Error::LayerType(_))));
    let many = ["application/vnd.oci.image.layer.v1.tar"; 257];
    assert!(matches!(manifest(CONFIG_TYPES[0], &many), Err(Error::Layers(257))));
    assert!(matches!(Document::parse(br#"{"schemaVersion": 1}"#), Err(Error::Schema(1))));
    assert!(matches!(Document::parse(br#"{"schemaVersion": 2}"#), Err(Error::Json(..))));
    assert!(matches!(Document::parse(b"<html>"), Err(Error::Json(..))));
    let path =
        json!({"schemaVersion": 2, "manifests": [{"mediaType": "", "digest": "sha256:../../etc/passwd", "size": 1}]});
    assert!(matches!(Document::parse(path.to_string().as_bytes()), Err(Error::Json(..))));
}

#[test]
fn the_guests_platform_is_chosen() {
    let entry = |os: &str, architecture: &str| {
        let mut entry = descriptor(architecture);
        entry["platform"] = json!({"os": os, "architecture": architecture});
        serde_json::from_value::<Descriptor>(entry).unwrap()
    };
    let all =
        [entry("linux", "arm64"), entry("windows", "amd64"), entry("linux", "amd64"), entry("unknown", "unknown")];
    assert_eq!(for_guest(&all).unwrap().digest, Digest::of(b"amd64"));
    let error = for_guest(&all[..2]).unwrap_err();
    assert!(matches!(&error, Error::Platform(have) if have == "linux/arm64, windows/amd64"), "{error}");
}

#[test]
fn configurations_of_all_tools_are_read() {
    let full = json!({
        "os": "linux", "architecture": "amd64", "created": "2020-01-01T00:00:00Z", "history": [{"empty_layer": true}],
        "config": {"User": "1:2", "Env": ["A=b"], "Entrypoint": ["/e"], "Cmd": ["c"], "WorkingDir": "/w", "StopSignal": "SIGQUIT",
            "Labels": {"l": "m"}, "Volumes": {"/v": {}}, "ExposedPorts": {"80/tcp": {}}, "Healthcheck": {"Test": ["NONE"]}},
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(b"x")]},
    });
    let parsed = Configuration::parse(full.to_string().as_bytes(), 1).unwrap().config;
    let words = |word: &str| vec![word.to_owned()];
    assert_eq!(
        (parsed.env, parsed.entrypoint, parsed.cmd, parsed.volumes),
        (words("A=b"), words("/e"), words("c"), words("/v"))
    );
    assert_eq!((parsed.user.as_str(), parsed.cwd.as_str(), parsed.stop_signal.as_str()), ("1:2", "/w", "SIGQUIT"));
    let nulls = json!({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": []},
        "config": {"Env": null, "Cmd": null, "Entrypoint": null, "Labels": null, "Volumes": null, "User": null}});
    assert_eq!(Configuration::parse(nulls.to_string().as_bytes(), 0).unwrap().config, ImageConfig::default());
    assert!(matches!(Configuration::parse(nulls.to_string().as_bytes(), 1), Err(Error::LayerCount(0, 1))));
    let arm = json!({"os": "linux", "architecture": "arm64", "rootfs": {"diff_ids": []}});
    assert!(matches!(Configuration::parse(arm.to_string().as_bytes(), 0), Err(Error::Platform(_))));
}

#[test]
fn chain_ids_are_the_specifications() {
    let (a, b, c) = (Digest::of(b"a"), Digest::of(b"b"), Digest::of(b"c"));
    assert_eq!(chain_id(std::slice::from_ref(&a)), a);
    let two = Digest::of(format!("{a} {b}").as_bytes());
    assert_eq!(chain_id(&[a.clone(), b.clone()]), two);
    assert_eq!(chain_id(&[a, b, c.clone()]), Digest::of(format!("{two} {c}").as_bytes()));
}
