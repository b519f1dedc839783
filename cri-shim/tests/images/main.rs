//! Images from a real registry (Debian's docker-registry) to a disk that EROFS' own tools and the kernel accept.

#![expect(clippy::expect_used, clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod build;
mod registry;

use std::collections::BTreeMap;
use std::process::Command;

use build::{Archive, Image, Packing};
use cri_shim::image::{HostConfig, RegistryConfig, Store, StoreConfig};
use oci_client::secrets::RegistryAuth;
use registry::{Options, Registry};

fn plain(address: &str) -> StoreConfig {
    let host = HostConfig { plain_http: true, ..HostConfig::default() };
    let registries = RegistryConfig { stall_seconds: 2, hosts: BTreeMap::from([(address.to_owned(), host)]) };
    StoreConfig { registries, ..StoreConfig::default() }
}

fn sample() -> Image {
    let base = Archive::new()
        .dir("bin", 0o755)
        .file("bin/busybox", 0o755, &[7; 10_000])
        .link(tar::EntryType::Link, "bin/sh", "bin/busybox")
        .dir("etc", 0o755)
        .file("etc/passwd", 0o644, b"root:x:0:0::/:/bin/sh\n")
        .link(tar::EntryType::Symlink, "etc/alternative", "/bin/sh")
        .file("etc/gone", 0o600, b"secret");
    let top = Archive::new().file("etc/.wh.gone", 0, b"").file("etc/motd", 0o644, b"hello\n");
    let last = Archive::new().file("etc/motd", 0o644, b"hello again\n");
    Image::new(vec![base.done(Packing::Gzip), top.done(Packing::Zstd), last.done(Packing::Plain)])
}

/// `fsck.erofs` finds nothing to complain about.
fn fsck(disk: &std::path::Path) {
    let output =
        Command::new("fsck.erofs").arg(disk).output().expect("fsck.erofs runs: install Debian's package erofs-utils");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test]
async fn pulls_an_image_anonymously() {
    let registry = Registry::start(&Options::default());
    let image = sample();
    let digest = image.push(&registry.address, "test/sample:1", &RegistryAuth::Anonymous).await;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), plain(&registry.address)).unwrap();
    let name = format!("{}/test/sample:1", registry.address);
    let pulled = store.pull(&name, None, None).await.unwrap_or_else(|error| panic!("{error:?}"));
    assert_eq!(pulled.id, image.id());
    assert_eq!(pulled.tags, [name.as_str()]);
    assert_eq!(pulled.digests, [format!("{}/test/sample@{digest}", registry.address)]);
    assert_eq!(pulled.config.cmd, ["/bin/sh"]);
    fsck(&pulled.disks[0]);
}
