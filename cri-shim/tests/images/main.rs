//! Images from a real registry (Debian's docker-registry) to disks that EROFS' own tools and the kernel accept, and everything
//! that can go wrong on the way. Needs Debian's docker-registry, erofs-utils and openssl; for mounts, root.

#![expect(clippy::expect_used, clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod build;
mod faulty;
mod mounted;
mod pulls;
mod registry;
mod signed;
mod token;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use build::{Archive, Image, Packing};
use cri_shim::image::errors::{Convert, Layer as LayerError, Manifest, Registry as RegistryError};
use cri_shim::image::{Auth, Error, HostConfig, Mismatch, PullProgress, RegistryConfig, Store, StoreConfig};
use faulty::{Fault, Faulty};
use oci_client::secrets::RegistryAuth;
use registry::{Options, Registry};
use token::TokenServer;

fn config(address: &str, host: HostConfig) -> StoreConfig {
    let registries = RegistryConfig { stall_seconds: 1, hosts: BTreeMap::from([(address.to_owned(), host)]) };
    StoreConfig { registries, ..StoreConfig::default() }
}

fn plain(address: &str) -> StoreConfig {
    config(address, HostConfig { plain_http: true, ..HostConfig::default() })
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

/// One layer of bytes that do not compress.
fn large(len: u32) -> Image {
    let noise: Vec<u8> = (0..len).flat_map(|i| i.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    Image::new(vec![Archive::new().file("noise", 0o644, &noise).done(Packing::Gzip)])
}

/// `fsck.erofs` finds nothing to complain about.
fn fsck(disk: &Path) {
    let output =
        Command::new("fsck.erofs").arg(disk).output().expect("fsck.erofs runs: install Debian's package erofs-utils");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Disks and work in progress.
fn files(dir: &Path) -> Vec<PathBuf> {
    ["disks", "work"]
        .iter()
        .flat_map(|sub| fs::read_dir(dir.join(sub)).unwrap().map(|entry| entry.unwrap().path()))
        .collect()
}

/// A pull that must fail and leave nothing.
async fn refused(config: StoreConfig, name: &str, auth: Option<Auth>) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), config).unwrap();
    let error = store.pull(name, auth, None).await.expect_err(name);
    assert!(files(dir.path()).is_empty() && store.list().unwrap().is_empty());
    error
}

fn registry_error(error: &Error) -> &RegistryError {
    match error {
        Error::Pull(_, error) => error,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn pulls_an_image_anonymously() {
    let registry = Registry::start(&Options::default());
    let image = sample();
    let digest = image.push(&registry.address, "test/sample:1", &RegistryAuth::Anonymous).await;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), plain(&registry.address)).unwrap();
    let name = format!("{}/test/sample:1", registry.address);
    let (sender, progress) = tokio::sync::watch::channel(PullProgress::default());
    let pulled = store.pull(&name, None, Some(sender)).await.unwrap_or_else(|error| panic!("{error:?}"));
    assert_eq!(pulled.id, image.id());
    assert_eq!(pulled.tags, [name.as_str()]);
    assert_eq!(pulled.digests, [format!("{}/test/sample@{digest}", registry.address)]);
    assert_eq!(pulled.config.cmd, ["/bin/sh"]);
    let layers = progress.borrow().layers.clone();
    assert_eq!(layers.len(), 3);
    fsck(&pulled.disks[0]);
    // By digest: another name of the same image, and nothing to download.
    let before = registry.requests("blobs");
    let by_digest = store.pull(&pulled.digests[0], None, None).await.unwrap();
    assert_eq!(by_digest, pulled);
    assert_eq!(registry.requests("blobs"), before + 1, "the configuration alone");
}

#[tokio::test]
async fn the_same_image_gives_the_same_disk_whatever_its_packaging() {
    let registry = Registry::start(&Options::default());
    let mut image = sample();
    image.push(&registry.address, "oci:1", &RegistryAuth::Anonymous).await;
    image.docker = true;
    for layer in &mut image.layers {
        layer.1 = Packing::Gzip;
    }
    image.push(&registry.address, "docker:1", &RegistryAuth::Anonymous).await;
    let mut disks = vec![];
    for name in ["oci:1", "docker:1"] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), plain(&registry.address)).unwrap();
        let pulled = store.pull(&format!("{}/{name}", registry.address), None, None).await.unwrap();
        disks.push((pulled.id, fs::read(&pulled.disks[0]).unwrap()));
    }
    assert!(disks[0] == disks[1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pulls_of_one_image_at_the_same_time_are_done_once() {
    let registry = Registry::start(&Options::default());
    let image = large(500_000);
    image.push(&registry.address, "one:1", &RegistryAuth::Anonymous).await;
    image.push(&registry.address, "other:1", &RegistryAuth::Anonymous).await;
    let dir = tempfile::tempdir().unwrap();
    let before = registry.requests(&build::digest(&image.layers[0].packed()));
    // Two stores on one directory are as two processes.
    let stores = [0, 1].map(|_| Store::open(dir.path(), plain(&registry.address)).unwrap());
    let pull = |number: usize| {
        let (store, name) = (stores[number % 2].clone(), if number < 6 { "one" } else { "other" });
        let name = format!("{}/{name}:1", registry.address);
        tokio::spawn(async move { store.pull(&name, None, None).await.unwrap().id })
    };
    let pulls: Vec<_> = (0..12).map(pull).collect();
    for pull in pulls {
        assert_eq!(pull.await.unwrap(), image.id());
    }
    assert_eq!(registry.requests(&build::digest(&image.layers[0].packed())), before + 1);
    assert_eq!(files(dir.path()).len(), 1);
    assert_eq!(stores[0].resolve(&image.id()).unwrap().tags.len(), 2);
}

#[tokio::test]
async fn passwords_and_private_authorities_are_used() {
    let dir = tempfile::tempdir().unwrap();
    token::certificate(dir.path());
    let hash = Command::new("perl")
        .args(["-e", r#"print crypt("secret", q($2y$05$pericarppericarppericau))"#])
        .output()
        .unwrap();
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    let registry = Registry::start(&Options {
        htpasswd: Some(format!("someone:{}\n", String::from_utf8(hash.stdout).unwrap())),
        tls: Some((read("cert.pem"), read("key.pem"))),
        ..Options::default()
    });
    let image = sample();
    image
        .push_with(
            &registry.address,
            "private:1",
            &RegistryAuth::Basic("someone".into(), "secret".into()),
            Some(read("cert.pem")),
        )
        .await;
    let name = format!("{}/private:1", registry.address);
    let trusted = || {
        config(&registry.address, HostConfig { ca_file: Some(dir.path().join("cert.pem")), ..HostConfig::default() })
    };
    let auth = |password: &str| Some(Auth { username: "someone".into(), password: password.into(), ..Auth::default() });
    let encoded =
        Some(Auth { auth: "c29tZW9uZTpzZWNyZXQ=".into(), server_address: registry.address.clone(), ..Auth::default() });
    for auth in [auth("secret"), encoded] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), trusted()).unwrap();
        assert_eq!(store.pull(&name, auth, None).await.unwrap().id, image.id());
    }
    for auth in [None, auth("wrong"), Some(Auth { server_address: "elsewhere".into(), ..auth("secret").unwrap() })] {
        let error = refused(trusted(), &name, auth).await;
        assert!(matches!(registry_error(&error), RegistryError::Denied { .. }), "{error:?}");
    }
    let error = refused(config(&registry.address, HostConfig::default()), &name, None).await;
    assert!(matches!(registry_error(&error), RegistryError::Unreachable(..)), "an unknown authority: {error:?}");
}

#[tokio::test]
async fn tokens_are_had_from_the_token_server() {
    let dir = tempfile::tempdir().unwrap();
    let server = TokenServer::start(dir.path());
    let registry = Registry::start(&Options { auth: Some(server.auth()), ..Options::default() });
    let image = sample();
    image.push(&registry.address, "token/app:1", &RegistryAuth::Bearer(server.push_token("token/app"))).await;
    let name = format!("{}/token/app:1", registry.address);
    let auths = [
        None,
        Some(Auth { username: token::USER.into(), password: token::PASSWORD.into(), ..Auth::default() }),
        Some(Auth { identity_token: token::IDENTITY.into(), ..Auth::default() }),
        Some(Auth { registry_token: server.push_token("token/app"), ..Auth::default() }),
    ];
    for auth in auths {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), plain(&registry.address)).unwrap();
        let pulled = store.pull(&name, auth.clone(), None).await.unwrap_or_else(|error| panic!("{auth:?}: {error:?}"));
        assert_eq!(pulled.id, image.id());
    }
    let wrong = [
        Auth { username: token::USER.into(), password: "wrong".into(), ..Auth::default() },
        Auth { identity_token: "wrong".into(), ..Auth::default() },
        Auth { registry_token: server.push_token("another/app"), ..Auth::default() },
    ];
    for auth in wrong {
        let error = refused(plain(&registry.address), &name, Some(auth)).await;
        assert!(matches!(registry_error(&error), RegistryError::Denied { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn mirrors_are_asked_first_and_names_stay() {
    let registry = Registry::start(&Options::default());
    let image = sample();
    let digest = image.push(&registry.address, "prefix/library/app:1", &RegistryAuth::Anonymous).await;
    let mirrors = vec![
        "http://127.0.0.1:1".to_owned(),
        format!("http://{}", registry.address),
        format!("http://{}/prefix", registry.address),
    ];
    let dir = tempfile::tempdir().unwrap();
    let config = config("docker.io", HostConfig { mirrors, ..HostConfig::default() });
    let store = Store::open(dir.path(), config).unwrap();
    let pulled = store.pull("app:1", None, None).await.unwrap();
    assert_eq!(pulled.tags, ["docker.io/library/app:1"]);
    assert_eq!(pulled.digests, [format!("docker.io/library/app@{digest}")]);
    assert_eq!(store.resolve("app:1"), Some(pulled));
}

#[tokio::test]
async fn what_a_registry_refuses_is_told_apart() {
    let registry = Registry::start(&Options::default());
    sample().push(&registry.address, "app:1", &RegistryAuth::Anonymous).await;
    for name in ["app:2", "never/was:1", &format!("app@{}", build::digest(b"x"))] {
        let error = refused(plain(&registry.address), &format!("{}/{name}", registry.address), None).await;
        assert!(matches!(registry_error(&error), RegistryError::NotFound { .. }), "{error:?}");
        assert!(
            matches!(cri_shim::Error::from(error), cri_shim::Error::NotFound(text) if text.contains("check the name"))
        );
    }
    let error = refused(plain("127.0.0.1:1"), "127.0.0.1:1/app:1", None).await;
    assert!(matches!(registry_error(&error), RegistryError::Unreachable(..)), "{error:?}");
    let error = refused(config("x", HostConfig::default()), &format!("{}/app:1", registry.address), None).await;
    assert!(
        matches!(registry_error(&error), RegistryError::Unreachable(at, _) if at.starts_with("https")),
        "{error:?}"
    );
    let error = refused(plain("x"), "Not A Name", None).await;
    assert!(matches!(error, Error::Reference(_)));
}

#[tokio::test]
async fn damaged_layers_are_told_apart() {
    let registry = Registry::start(&Options::default());
    let image = large(100_000);
    image.push(&registry.address, "app:1", &RegistryAuth::Anonymous).await;
    let name = format!("{}/app:1", registry.address);
    let blob = registry.blob(&build::digest(&image.layers[0].packed()));
    let good = fs::read(&blob).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    fs::write(&blob, &bad).unwrap();
    let error = refused(plain(&registry.address), &name, None).await;
    assert!(matches!(registry_error(&error), RegistryError::Mismatch(_, Mismatch::Digest { .. })), "{error:?}");
    fs::write(&blob, &good[..good.len() / 2]).unwrap();
    let error = refused(plain(&registry.address), &name, None).await;
    assert!(matches!(registry_error(&error), RegistryError::Mismatch(_, Mismatch::Size { .. })), "{error:?}");
    fs::remove_file(&blob).unwrap();
    let error = refused(plain(&registry.address), &name, None).await;
    assert!(matches!(registry_error(&error), RegistryError::NotFound { .. }), "{error:?}");
}

#[tokio::test]
async fn registries_that_stall_or_flood_are_given_up() {
    let image = large(100_000);
    for (fault, name) in [(Fault::Stall(50_000), "latest"), (Fault::Stall(0), "latest"), (Fault::Silence, "latest")] {
        let faulty = Faulty::start(&image, fault);
        let error = refused(plain(&faulty.address), &format!("{}/app:{name}", faulty.address), None).await;
        assert!(matches!(registry_error(&error), RegistryError::Stalled(_, 1)), "{error:?}");
        assert!(error.to_string().starts_with("cannot pull"));
    }
    let faulty = Faulty::start(&image, Fault::EndlessManifest);
    let error = refused(plain(&faulty.address), &format!("{}/app", faulty.address), None).await;
    assert!(matches!(registry_error(&error), RegistryError::TooLarge(..)), "{error:?}");
}

#[tokio::test]
async fn a_broken_transfer_is_taken_up_where_it_ended() {
    let image = large(100_000);
    let size = image.layers[0].packed().len();
    let faulty = Faulty::start(&image, Fault::Break(size / 3));
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), plain(&faulty.address)).unwrap();
    let pulled = store.pull(&format!("{}/app", faulty.address), None, None).await.unwrap();
    assert_eq!(pulled.id, image.id());
    assert!(faulty.requests.lock().unwrap().len() >= 5, "manifest, configuration, and the layer in parts");
    let faulty = Faulty::start(&image, Fault::Break(size / 20));
    let error = refused(plain(&faulty.address), &format!("{}/app", faulty.address), None).await;
    assert!(matches!(registry_error(&error), RegistryError::Broken(..)), "{error:?}");
}

#[tokio::test]
async fn a_pull_given_up_leaves_nothing() {
    let registry = Registry::start(&Options::default());
    let image = large(100_000);
    image.push(&registry.address, "app:1", &RegistryAuth::Anonymous).await;
    let stalled = Faulty::start(&image, Fault::Stall(100_000));
    let mut config = plain(&registry.address);
    config.registries.hosts.insert(stalled.address.clone(), HostConfig { plain_http: true, ..HostConfig::default() });
    config.registries.stall_seconds = 600;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), config).unwrap();
    let name = format!("{}/app:1", registry.address);
    let timed_out = tokio::time::timeout(Duration::from_millis(1), store.pull(&name, None, None)).await;
    assert!(timed_out.is_err() && files(dir.path()).is_empty());
    // In the middle of a layer, which the progress shows.
    let (sender, mut progress) = tokio::sync::watch::channel(PullProgress::default());
    let name = format!("{}/app", stalled.address);
    let half = progress.wait_for(|progress| progress.layers.iter().any(|layer| layer.done > 0));
    tokio::select! {
        result = store.pull(&name, None, Some(sender)) => panic!("{result:?}"),
        seen = half => assert!(seen.is_ok()),
    }
    assert!(files(dir.path()).is_empty() && store.list().unwrap().is_empty());
    // One of two who wait gives up: the other goes on.
    let name = format!("{}/app:1", registry.address);
    let stays = store.pull(&name, None, None);
    let gives_up = tokio::time::timeout(Duration::from_millis(1), store.pull(&name, None, None));
    let (pulled, _) = tokio::join!(stays, gives_up);
    assert_eq!(pulled.unwrap().id, image.id());
}

/// A tmpfs of 1 MiB.
struct Small(tempfile::TempDir);

impl Drop for Small {
    fn drop(&mut self) {
        let _gone = Command::new("umount").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_disk_is_said_and_left_as_it_was() {
    let registry = Registry::start(&Options::default());
    let noise = large(1_000_000);
    let zeros = Image::new(vec![Archive::new().file("zeros", 0o644, &vec![0; 8 << 20]).done(Packing::Gzip)]);
    let dir = tempfile::tempdir().unwrap();
    let status =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(dir.path()).status().unwrap();
    assert!(status.success(), "mounting needs root");
    let small = Small(dir);
    let store = Store::open(small.0.path(), plain(&registry.address)).unwrap();
    // The first fails on what arrives, the second on what is made of it.
    for (image, name) in [(noise, "noise:1"), (zeros, "zeros:1")] {
        image.push(&registry.address, name, &RegistryAuth::Anonymous).await;
        let error = store.pull(&format!("{}/{name}", registry.address), None, None).await.unwrap_err();
        assert!(matches!(error, Error::DiskFull(..)), "{error:?}");
        assert!(files(small.0.path()).is_empty());
        assert!(
            matches!(cri_shim::Error::from(error), cri_shim::Error::ResourceExhausted(text) if text.contains("crictl rmi --prune"))
        );
    }
    sample().push(&registry.address, "sample:1", &RegistryAuth::Anonymous).await;
    store.pull(&format!("{}/sample:1", registry.address), None, None).await.expect("there is room for this one");
}

/// Where the child of the next test finds its registry and its store.
const CHILD: &str = "IMAGES_TEST_CHILD";

#[tokio::test]
async fn a_process_killed_in_the_middle_leaves_nothing_visible() {
    if let Ok(job) = std::env::var(CHILD) {
        let (address, dir) = job.split_once(' ').unwrap();
        let mut config = plain(address);
        config.registries.stall_seconds = 600;
        let store = Store::open(Path::new(dir), config).unwrap();
        let (sender, mut progress) = tokio::sync::watch::channel(PullProgress::default());
        let name = format!("{address}/app");
        let pull = store.pull(&name, None, Some(sender));
        let kill = async {
            progress.wait_for(|progress| progress.layers.iter().any(|layer| layer.done > 0)).await.unwrap();
            // Not even destructors run.
            let _killed = Command::new("kill").args(["-KILL", &std::process::id().to_string()]).status();
        };
        let _never = tokio::join!(pull, kill);
        unreachable!("killed");
    }
    let image = large(100_000);
    let stalled = Faulty::start(&image, Fault::Stall(100_000));
    let dir = tempfile::tempdir().unwrap();
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_process_killed_in_the_middle_leaves_nothing_visible"])
        .env(CHILD, format!("{} {}", stalled.address, dir.path().display()))
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(9));
    assert!(!files(dir.path()).is_empty(), "it was killed in the middle");
    let store = Store::open(dir.path(), plain(&stalled.address)).unwrap();
    assert!(files(dir.path()).is_empty() && store.list().unwrap().is_empty());
}

/// The images that tests/lab/images makes: their directory.
fn lab_images() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/lab/images");
    let output = Command::new(script).stderr(Stdio::inherit()).output().expect("tests/lab/images runs");
    assert!(output.status.success(), "tests/lab/images failed");
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

/// Names of the repositories below `pericarp/` that begin so.
fn lab_names(images: &Path, start: &str) -> Vec<String> {
    let repositories = fs::read_dir(images.join("registry/docker/registry/v2/repositories/pericarp")).unwrap();
    let names = repositories.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(start)).collect()
}

#[tokio::test]
async fn images_that_are_damaged_or_hostile_are_refused() {
    let images = lab_images();
    let registry = Registry::start(&Options { storage: Some(images.join("registry")), ..Options::default() });
    let bad = lab_names(&images, "bad-");
    assert!(bad.len() >= 7);
    for name in bad {
        let error = refused(plain(&registry.address), &format!("{}/pericarp/{name}", registry.address), None).await;
        let expected = match (name.as_str(), &error) {
            ("bad-digest", Error::Pull(_, RegistryError::Mismatch(_, Mismatch::Digest { .. })))
            | ("bad-truncated", Error::Pull(_, RegistryError::Mismatch(_, Mismatch::Size { .. })))
            | ("bad-missing", Error::Pull(_, RegistryError::NotFound { .. }))
            | ("bad-platform", Error::Pull(_, RegistryError::Manifest(_, Manifest::Platform(_))))
            | ("bad-diff-id" | "bad-gzip", Error::Unpack(_, Convert::DiffId(..)))
            | (
                "bad-gzip" | "bad-tar",
                Error::Unpack(_, Convert::Layer(_, LayerError::Header(..) | LayerError::Read(_))),
            ) => true,
            (known, _) => {
                !["bad-digest", "bad-truncated", "bad-missing", "bad-platform", "bad-diff-id", "bad-gzip", "bad-tar"]
                    .contains(&known)
            }
        };
        assert!(expected, "{name}: {error:?}");
    }
    for name in lab_names(&images, "escape-") {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), plain(&registry.address)).unwrap();
        let _either = store.pull(&format!("{}/pericarp/{name}", registry.address), None, None).await;
        assert!(!Path::new("/tmp/pericarp-escaped").exists(), "{name}");
    }
}

/// The lab's difficult images, and one of every day, by the kernel's EROFS and by GNU tar; and by fsck.erofs.
#[tokio::test]
async fn the_kernel_sees_what_gnu_tar_extracts() {
    if !mounted::possible() {
        return mounted::in_the_lab("the_kernel_sees_what_gnu_tar_extracts");
    }
    let images = lab_images();
    let names = fs::read_to_string(images.join("names")).unwrap();
    let layouts = names.lines().map(|line| line.split(' ').next().unwrap());
    let chosen = layouts.filter(|name| name.contains("pericarp_hard-") || name.contains("pericarp_nginx"));
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), StoreConfig::default()).unwrap();
    let mut compared = 0;
    for layout in chosen.map(|name| images.join(name)) {
        let imported =
            store.import_layout(&layout).await.unwrap_or_else(|error| panic!("{}: {error:?}", layout.display()));
        fsck(&imported[0].disks[0]);
        let extracted = tempfile::tempdir().unwrap();
        mounted::extract(&build::layers_of(&layout), extracted.path());
        let mounted = mounted::Mounted::new(&imported[0].disks[0]);
        let (ours, theirs) = (mounted::tree(mounted.0.path()), mounted::tree(extracted.path()));
        mounted::assert_same(&ours, &theirs, &layout);
        compared += 1;
    }
    assert!(compared >= 12, "{compared} images");
}

#[tokio::test]
async fn archives_and_layouts_are_imported() {
    let image = sample();
    let files = tempfile::tempdir().unwrap();
    let path = |name: &str| files.path().join(name);
    image.write_layout(&path("layout"), Some("example.org/app:3"));
    let tar = |name: &str, from: &str| {
        let status =
            Command::new("tar").args(["-C"]).arg(path(from)).arg("-cf").arg(path(name)).arg(".").status().unwrap();
        assert!(status.success());
    };
    tar("oci.tar", "layout");
    image.write_docker(&path("docker"), &["example.org/app:3"]);
    tar("docker.tar", "docker");
    fs::write(path("docker.tar.gz"), build::gzip(&fs::read(path("docker.tar")).unwrap())).unwrap();
    let mut disks = vec![];
    for name in ["layout", "oci.tar", "docker.tar", "docker.tar.gz"] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), StoreConfig::default()).unwrap();
        let imported =
            if name == "layout" { store.import_layout(&path(name)).await } else { store.import_tar(&path(name)).await };
        let imported = imported.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        assert_eq!((imported.len(), imported[0].id.clone()), (1, image.id()), "{name}");
        assert_eq!(imported[0].tags, ["example.org/app:3"], "{name}");
        disks.push(fs::read(&imported[0].disks[0]).unwrap());
    }
    assert!(disks.windows(2).all(|pair| pair[0] == pair[1]));
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), StoreConfig::default()).unwrap();
    fs::write(path("nonsense"), "nonsense").unwrap();
    for name in ["nonsense", "", "not-there"] {
        let error = store.import_tar(&path(name)).await.unwrap_err();
        assert!(matches!(error, Error::Import(_)), "{error:?}");
    }
    let blob = path("layout").join("blobs").join(build::digest(&image.layers[1].packed()).replace(':', "/"));
    fs::write(&blob, "changed").unwrap();
    let error = store.import_layout(&path("layout")).await.unwrap_err();
    assert!(matches!(error, Error::Unpack(_, Convert::Blob(..))), "{error:?}");
    assert!(self::files(dir.path()).is_empty());
}
