//! Pulls from registries that die, that want no more of them, and on hosts that trust nobody; and what the store says it takes.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use cri_shim::image::errors::Registry as RegistryError;
use cri_shim::image::{Error, PullProgress, Store};
use oci_client::secrets::RegistryAuth;
use tokio::sync::watch;

use crate::registry::{Options, Registry};
use crate::{files, large, plain, refused, registry_error, sample};

/// Waits until a layer is on its way.
async fn begun(mut progress: watch::Receiver<PullProgress>) {
    let seen = progress.wait_for(|progress| progress.layers.iter().any(|layer| layer.done > 0)).await;
    assert!(seen.is_ok(), "the pull ended before it began");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_killed_in_the_middle_of_a_pull_leaves_nothing_and_the_next_pull_is_whole() {
    let mut registry = Registry::start(&Options::default());
    // 48 MiB that do not compress: what has come when the first part is seen is far from all.
    let image = large(12 << 20);
    image.push(&registry.address, "app:1", &RegistryAuth::Anonymous).await;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), plain(&registry.address)).unwrap();
    let name = format!("{}/app:1", registry.address);
    let (sender, progress) = watch::channel(PullProgress::default());
    let pull = store.pull(&name, None, Some(sender));
    let kill = async {
        begun(progress).await;
        registry.kill();
    };
    let (pulled, ()) = tokio::join!(pull, kill);
    let error = pulled.expect_err("its registry is gone");
    assert!(matches!(registry_error(&error), RegistryError::Unreachable(..) | RegistryError::Broken(..)), "{error:?}");
    assert!(files(dir.path()).is_empty() && store.list().unwrap().is_empty(), "nothing of it is left");

    // There again before the pull gives up: it goes on where it was.
    registry.serve();
    let blob = crate::build::digest(&image.layers[0].packed());
    let asked = registry.requests(&blob);
    let (sender, progress) = watch::channel(PullProgress::default());
    let pull = store.pull(&name, None, Some(sender));
    let restart = async {
        begun(progress).await;
        registry.kill();
        registry.serve();
    };
    let (pulled, ()) = tokio::join!(pull, restart);
    assert_eq!(pulled.unwrap_or_else(|error| panic!("{error:?}")).id, image.id());
    assert!(registry.requests(&blob) > asked, "{}", registry.log());
}

#[tokio::test]
async fn a_registry_that_lets_no_more_pulls_through_is_told_from_one_that_fails() {
    for (status, limited) in [("429 Too Many Requests", true), ("503 Service Unavailable", false)] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            for mut client in listener.incoming().flatten() {
                let _some = client.read(&mut [0; 4096]);
                let _sent = write!(client, "HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            }
        });
        let error = refused(plain(&address), &format!("{address}/app:1"), None).await;
        let found = matches!(registry_error(&error), RegistryError::RateLimited(_));
        let failed = matches!(registry_error(&error), RegistryError::Status(_, 503));
        assert_eq!((found, failed), (limited, !limited), "{error:?}");
        assert_eq!(error.word(), if limited { "rate_limited" } else { "registry_fails" });
    }
}

/// Says to the next test that it is its own child, and where its registry is.
const CHILD: &str = "IMAGES_TEST_TRUSTS_NOBODY";

#[tokio::test]
async fn a_host_without_authorities_pulls_without_tls() {
    if let Ok(name) = std::env::var(CHILD) {
        let dir = tempfile::tempdir().unwrap();
        let (address, _) = name.split_once('/').unwrap();
        let store = Store::open(dir.path(), plain(address)).unwrap();
        assert_eq!(store.pull(&name, None, None).await.unwrap().tags, [name]);
        let error = store.pull("localhost:1/needs/tls:1", None, None).await.unwrap_err();
        assert!(matches!(registry_error(&error), RegistryError::Client(_)), "{error:?}");
        return;
    }
    let registry = Registry::start(&Options::default());
    sample().push(&registry.address, "app:1", &RegistryAuth::Anonymous).await;
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "pulls::a_host_without_authorities_pulls_without_tls"])
        .env(CHILD, format!("{}/app:1", registry.address))
        // Where the system's certificates are looked for first.
        .env("SSL_CERT_FILE", "/dev/null")
        .env("SSL_CERT_DIR", registry.dir.path())
        .status()
        .unwrap();
    assert!(status.success());
}

/// Bytes and files as du(1) counts them.
fn du(dir: &Path) -> (u64, u64) {
    let count = |arguments: &[&str]| {
        let output = Command::new("du").args(arguments).arg(dir).output().expect("du runs");
        let text = String::from_utf8(output.stdout).expect("text");
        text.split_whitespace().next().and_then(|count| count.parse().ok()).expect("a number")
    };
    (count(&["--summarize", "--block-size=1"]), count(&["--summarize", "--inodes"]))
}

#[tokio::test]
async fn the_store_takes_what_du_says_it_takes() {
    let registry = Registry::start(&Options::default());
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), plain(&registry.address)).unwrap();
    let same = |what: &str| {
        let usage = store.fs_info().unwrap();
        assert_eq!((usage.used_bytes, usage.used_inodes), du(dir.path()), "{what}");
        assert_eq!(usage.mountpoint, dir.path());
        usage.used_bytes
    };
    let empty = same("an empty store");
    for (name, image) in [("sample:1", sample()), ("large:1", large(100_000))] {
        image.push(&registry.address, name, &RegistryAuth::Anonymous).await;
        store.pull(&format!("{}/{name}", registry.address), None, None).await.unwrap();
    }
    let full = same("two images");
    let sizes: u64 = store.list().unwrap().iter().map(|image| image.size).sum();
    assert!(full >= empty + sizes && full - empty - sizes < 64 << 10, "{empty} and {sizes} in {full}");
    for image in store.list().unwrap() {
        store.remove(&image.id).unwrap();
    }
    assert!(same("no images any more") < empty + (64 << 10));
    assert!(matches!(store.pull("Not A Name", None, None).await, Err(Error::Reference(_))));
}
