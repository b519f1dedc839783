#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic")]

use std::io::Write;

use super::super::spool;
use super::*;

/// A store with an image per name; the layers' chain is the part before `=`.
async fn store(dir: &Path, images: &[(&str, &[&str])]) -> Store {
    let store = Store::open(dir, StoreConfig::default()).unwrap();
    for (chain, tags) in images {
        put(&store, chain, tags).await;
    }
    store
}

async fn put(store: &Store, chain: &str, tags: &[&str]) -> Image {
    let entry = Entry {
        id: Digest::of(format!("config of {chain}").as_bytes()),
        chain: Digest::of(chain.as_bytes()),
        config: ImageConfig::default(),
        tags: tags.iter().map(|tag| Reference::parse(tag).unwrap().repo_tag().unwrap()).collect(),
        digests: vec![format!("docker.io/library/{chain}@{}", Digest::of(b"manifest"))],
    };
    let work = store.begin(&entry.chain).await.unwrap();
    if let Some(work) = &work {
        work.create_disk().unwrap().write_all(&[1; 5000]).unwrap();
    }
    store.commit(&entry, work).await.unwrap().unwrap()
}

fn files(dir: &Path) -> Vec<String> {
    let mut names = vec![];
    for sub in ["disks", "work"] {
        names.extend(
            fs::read_dir(dir.join(sub)).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()),
        );
    }
    names
}

#[tokio::test]
async fn images_are_found_by_every_name() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), &[("a", &["a:1", "a:2"]), ("b", &["b"])]).await;
    let a = store.resolve("a:2").unwrap();
    assert_eq!(a.tags, ["docker.io/library/a:1", "docker.io/library/a:2"]);
    for name in ["docker.io/library/a:1", &a.id, &a.id[7..], &a.id[7..19], &a.digests[0]] {
        assert_eq!(store.resolve(name).as_ref(), Some(&a), "{name}");
    }
    assert_eq!(store.resolve("c"), None);
    assert_eq!(store.resolve("a:3"), None);
    assert_eq!(store.list().unwrap().len(), 2);
    assert!(a.size >= 5000 && a.disks[0].exists());
    // Another process sees the same.
    assert_eq!(Store::open(dir.path(), StoreConfig::default()).unwrap().resolve("a:1"), Some(a));
}

#[tokio::test]
async fn a_tag_moves_to_the_newer_image() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), &[("a", &["x:1"]), ("b", &["x:1"])]).await;
    let moved = store.resolve("x:1").unwrap();
    assert_eq!(moved.id, Digest::of(b"config of b").to_string());
    let old = store.resolve(Digest::of(b"config of a").as_str()).unwrap();
    assert_eq!((old.tags.len(), old.digests.len()), (0, 1));
}

#[tokio::test]
async fn removing_follows_the_cri() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), &[("a", &["a:1", "a:2"]), ("b", &["b"])]).await;
    store.remove("a:1").unwrap();
    assert_eq!(store.resolve("a:2").unwrap().tags, ["docker.io/library/a:2"]);
    store.remove("a:2").unwrap();
    assert_eq!(store.resolve(Digest::of(b"config of a").as_str()), None);
    assert_eq!(files(dir.path()).len(), 1);
    store.remove(Digest::of(b"config of b").as_str()).unwrap();
    store.remove("never-was").unwrap();
    assert!(files(dir.path()).is_empty() && store.list().unwrap().is_empty());
}

#[tokio::test]
async fn a_disk_in_use_outlives_its_image() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), &[("a", &["a"])]).await;
    let hold = store.hold("a").unwrap().unwrap();
    let copy = hold.disks[0].try_clone().unwrap();
    store.remove("a").unwrap();
    drop(hold);
    // As after a restart, with a VM that still has the file.
    let store = Store::open(dir.path(), StoreConfig::default()).unwrap();
    assert_eq!((store.resolve("a"), files(dir.path()).len()), (None, 1));
    drop(copy);
    store.remove("a").unwrap();
    assert!(files(dir.path()).is_empty());
    assert!(store.hold("a").unwrap().is_none());
}

#[tokio::test]
async fn what_a_crash_leaves_is_swept() {
    let dir = tempfile::tempdir().unwrap();
    let running = store(dir.path(), &[("a", &["a"])]).await;
    let chain = Digest::of(b"being made");
    let work = running.begin(&chain).await.unwrap().unwrap();
    work.create_disk().unwrap();
    for name in [
        "work/dead.erofs",
        "work/dead.lock",
        "work/dead.3",
        "work/alone.erofs",
        "disks/unnamed-1.erofs",
        "index.json.new",
    ] {
        fs::write(dir.path().join(name), "x").unwrap();
    }
    let opened = Store::open(dir.path(), StoreConfig::default()).unwrap();
    assert!(opened.resolve("a").is_some() && !dir.path().join("index.json.new").exists());
    let mut left = files(dir.path());
    left.sort();
    let disk = format!("{}-1.erofs", Digest::of(b"a").hex());
    let mut expected = [disk, format!("{}.erofs", chain.hex()), format!("{}.lock", chain.hex())];
    expected.sort();
    assert_eq!(left, expected, "a disk being made is left alone");
    drop(work);
    assert_eq!(files(dir.path()).len(), 1);
}

#[tokio::test]
async fn one_at_a_time_makes_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (store(dir.path(), &[]).await, store(dir.path(), &[]).await);
    let chain = Digest::of(b"chain");
    let work = one.begin(&chain).await.unwrap();
    let second = other.begin(&chain);
    tokio::pin!(second);
    assert!(futures_util::poll!(&mut second).is_pending());
    drop(work);
    assert!(second.await.unwrap().is_some());
}

#[tokio::test]
async fn a_damaged_index_is_an_error_not_an_empty_store() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), &[("a", &["a"])]).await;
    fs::write(dir.path().join("index.json"), "{").unwrap();
    assert!(store.list().is_err() && store.remove("a").is_err());
    assert!(Store::open(dir.path(), StoreConfig::default()).is_err());
    assert_eq!(files(dir.path()).len(), 1);
}

#[tokio::test]
async fn use_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), &[("a", &["a"]), ("b", &["b"])]).await;
    let info = store.fs_info().unwrap();
    assert!(info.used_bytes >= 10_000 && info.used_inodes >= 4 && info.timestamp > 1_600_000_000_000_000_000);
    assert_eq!(info.mountpoint, dir.path());
    store.pin("a", true).unwrap();
    assert!(store.resolve("a").unwrap().pinned && !store.resolve("b").unwrap().pinned);
}

#[test]
fn errors_have_a_kind_for_callers() {
    let full = Error::DiskFull("/x".into(), io::Error::from_raw_os_error(28).into());
    assert!(is_full(&io::Error::from_raw_os_error(28)));
    assert!(matches!(crate::Error::from(full), crate::Error::ResourceExhausted(text) if text.contains("crictl rmi")));
    let missing = registry::Error::NotFound { name: "x".to_owned(), at: "y".to_owned() };
    let shared = Error::Shared(Arc::new(Error::Pull("x".to_owned(), missing)));
    assert!(matches!(crate::Error::from(shared), crate::Error::NotFound(_)));
}

#[tokio::test]
async fn a_spool_is_read_while_it_grows_and_ends_only_when_finished() {
    use std::io::Read;
    let (mut writer, mut reader) = spool::spool(tempfile::tempfile().unwrap()).unwrap();
    let reading = std::thread::spawn(move || {
        let mut bytes = vec![];
        reader.read_to_end(&mut bytes).map(|_| bytes)
    });
    for part in 0..100_u8 {
        writer.write(&[part; 1000]).await.unwrap();
    }
    writer.finish();
    assert_eq!(reading.join().unwrap().unwrap().len(), 100_000);
    let (mut writer, mut reader) = spool::spool(tempfile::tempfile().unwrap()).unwrap();
    writer.write(b"half").await.unwrap();
    drop(writer);
    let mut bytes = vec![];
    let error = reader.read_to_end(&mut bytes).unwrap_err();
    assert!(spool::is_abandoned(&error) && bytes == b"half");
}
