#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::arithmetic_side_effects,
    reason = "a test may panic"
)]

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;

use super::super::tree::Attributes;
use super::reader::{Found, read};
use super::*;

/// What a test puts into a tree.
#[derive(Clone, Debug)]
enum Item {
    File(Vec<u8>),
    Symlink(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
    Directory,
    /// To the n-th item before.
    Link(usize),
}

fn bytes_of(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 + 1).collect()
}

fn image(items: &[(Vec<u8>, Attributes, Item)]) -> (Vec<u8>, Tree) {
    let file = tempfile::tempfile().unwrap();
    let mut writer = Writer::new(file.try_clone().unwrap()).unwrap();
    let mut tree = Tree::new();
    tree.begin_layer();
    for (path, attributes, item) in items {
        let content = match item {
            Item::File(data) => Content::File(
                writer.add_file(&mut data.as_slice(), data.len() as u64, max_len(&attributes.xattrs)).unwrap(),
            ),
            Item::Symlink(target) => Content::Symlink(target.clone()),
            Item::Char(major, minor) => Content::CharDevice(*major, *minor),
            Item::Block(major, minor) => Content::BlockDevice(*major, *minor),
            Item::Fifo => Content::Fifo,
            Item::Directory => Content::Directory(BTreeMap::new()),
            Item::Link(number) => {
                let target = &items[number % items.len()].0;
                let _refused_if_no_file = tree.link(path, target);
                continue;
            }
        };
        // A path may lead through what is no directory by now: then it is not there, and not expected.
        let _placed = tree.place(path, attributes.clone(), content);
    }
    writer.finish(&tree, [7; 16]).unwrap();
    let mut bytes = vec![];
    let len = file.metadata().unwrap().size() as usize;
    bytes.resize(len, 0);
    file.read_exact_at(&mut bytes, 0).unwrap();
    (bytes, tree)
}

/// What the image of a tree must hold; file data by the bytes at its place, which [`Writer::add_file`] decided.
fn expected(tree: &Tree, image: &[u8]) -> BTreeMap<Vec<u8>, Found> {
    let mut all = BTreeMap::new();
    let mut names = BTreeMap::<NodeId, u32>::new();
    let mut todo = vec![(vec![], ROOT)];
    while let Some((path, id)) = todo.pop() {
        let node = tree.node(id);
        *names.entry(id).or_default() += 1;
        let a = &node.attributes;
        let (kind, rdev, data) = match &node.content {
            Content::Directory(_) => (4, 0, vec![]),
            Content::Symlink(target) => (10, 0, target.clone()),
            Content::CharDevice(major, minor) => (2, (minor & 255) | major << 8 | (minor >> 8) << 20, vec![]),
            Content::BlockDevice(major, minor) => (6, (minor & 255) | major << 8 | (minor >> 8) << 20, vec![]),
            Content::Fifo => (1, 0, vec![]),
            Content::File(data) => {
                let start = data.block as usize * 4096;
                let whole = &image[start..start + data.size as usize - data.tail.len()];
                (8, 0, [whole, &data.tail].concat())
            }
        };
        let children = tree.children(id);
        for (name, child) in children.into_iter().flatten() {
            let below = if path.is_empty() { name.clone() } else { [path.as_slice(), b"/", name].concat() };
            todo.push((below, *child));
        }
        let links =
            children.map_or(0, |names| 2 + names.values().filter(|id| tree.children(**id).is_some()).count() as u32);
        let mode = kind << 12 | a.mode;
        let (uid, gid, mtime, xattrs) = (a.uid, a.gid, a.mtime, a.xattrs.clone());
        // The node's id stands for the node number for now: only equality matters.
        let nid = id.index() as u64;
        all.insert(path, Found { mode, uid, gid, mtime, links, rdev, nid, data, xattrs });
    }
    for found in all.values_mut().filter(|found| found.links == 0) {
        found.links = names.iter().find(|(id, _)| id.index() as u64 == found.nid).map(|(_, count)| *count).unwrap();
    }
    all
}

fn assert_same(image: &[u8], tree: &Tree) {
    let (mut found, mut wanted) = (read(image), expected(tree, image));
    let mut numbers = BTreeMap::new();
    for (path, file) in &mut found {
        let other = &wanted[path];
        assert_eq!(*numbers.entry(other.nid).or_insert(file.nid), file.nid, "hard links of {path:?}");
        file.nid = other.nid;
        if file.mode >> 12 == 4 {
            file.data.clear();
        }
    }
    for file in wanted.values_mut().filter(|file| file.mode >> 12 == 4) {
        file.data.clear();
    }
    assert_eq!(found, wanted);
}

fn plain(mode: u16) -> Attributes {
    Attributes { mode, mtime: (1_700_000_000, 5), ..Attributes::default() }
}

#[test]
fn an_empty_tree_is_an_image() {
    let (image, tree) = image(&[]);
    assert_same(&image, &tree);
}

#[test]
fn file_sizes_around_blocks_and_inline_limits_come_back() {
    let sizes = [0, 1, 2047, 2048, 2049, 4031, 4032, 4095, 4096, 4097, 6144, 6145, 8192, 12_289, 100_000];
    let items: Vec<_> =
        sizes.iter().map(|&size| (format!("f{size}").into_bytes(), plain(0o644), Item::File(bytes_of(size)))).collect();
    let (image, tree) = image(&items);
    assert_same(&image, &tree);
    let found = read(&image);
    for size in sizes {
        assert_eq!(found[format!("f{size}").as_bytes()].data, bytes_of(size), "{size}");
    }
}

#[test]
fn large_directories_span_blocks_in_order() {
    let mut items: Vec<_> = (0..3000)
        .map(|i| (format!("dir/{}{i}", "n".repeat(i % 200)).into_bytes(), plain(0o600), Item::File(vec![])))
        .collect();
    // Before and behind `.` and `..`, and bytes beyond ASCII.
    for name in ["dir/!first", "dir/-", "dir/...", "dir/..a", "dir/.a", "dir/\u{fc}", "dir/\u{1f41a}"] {
        items.push((name.as_bytes().to_vec(), plain(0o600), Item::Fifo));
    }
    let (image, tree) = image(&items);
    assert_same(&image, &tree);
    assert!(read(&image)[b"dir".as_slice()].data.len() > 10 * 4096);
}

#[test]
fn attributes_of_all_kinds_come_back() {
    let mut xattrs = BTreeMap::new();
    for (name, len) in [
        ("user.a", 1),
        ("user.b", 0),
        ("security.capability", 20),
        ("trusted.overlay.opaque", 1),
        ("system.posix_acl_access", 28),
    ] {
        xattrs.insert(name.as_bytes().to_vec(), bytes_of(len));
    }
    xattrs.insert(b"user.large".to_vec(), bytes_of(60_000));
    let attributes =
        Attributes { mode: 0o6755, uid: u32::MAX - 1, gid: 70_000, mtime: (-5, 999_999_999), xattrs: xattrs.clone() };
    let shared = Attributes { xattrs: [(b"security.selinux".to_vec(), b"label".to_vec())].into(), ..plain(0o1777) };
    let items = [
        (b"file".to_vec(), attributes.clone(), Item::File(bytes_of(100))),
        (b"dir".to_vec(), attributes, Item::Directory),
        (b"shared1".to_vec(), shared.clone(), Item::Directory),
        (b"shared2".to_vec(), shared, Item::Fifo),
        (b"null".to_vec(), plain(0o666), Item::Char(1, 3)),
        (b"disk".to_vec(), plain(0o660), Item::Block(259, 1_000_000)),
        (b"link".to_vec(), plain(0o777), Item::Symlink(bytes_of(4095))),
        (b"again".to_vec(), plain(0), Item::Link(0)),
    ];
    let (image, tree) = image(&items);
    assert_same(&image, &tree);
    assert_eq!(read(&image)[b"again".as_slice()].links, 2);
    assert_eq!(read(&image)[b"file".as_slice()].xattrs, xattrs);
}

#[test]
fn replaced_data_is_gone() {
    let secret = b"a secret that a later layer deletes ".repeat(1000);
    let items = [
        (b"file".to_vec(), plain(0o644), Item::File(secret.clone())),
        (b"other".to_vec(), plain(0o644), Item::File(bytes_of(5000))),
        (b"file".to_vec(), plain(0o644), Item::File(b"new".to_vec())),
    ];
    let (image, tree) = image(&items);
    assert_same(&image, &tree);
    assert!(!image.windows(20).any(|window| window == &secret[..20]));
}

#[test]
fn numbers_beyond_the_format_are_refused() {
    let mut writer = Writer::new(tempfile::tempfile().unwrap()).unwrap();
    let error = writer.add_file(&mut &b"short"[..], 6, 0).unwrap_err();
    assert!(matches!(error, Error::Read(error) if error.kind() == io::ErrorKind::UnexpectedEof));
    let mut tree = Tree::new();
    tree.place(b"dev", plain(0), Content::CharDevice(4096, 0)).unwrap();
    assert!(matches!(writer.finish(&tree, [0; 16]), Err(Error::Device(4096, 0))));
}

#[test]
fn the_checksum_is_the_known_crc() {
    // RFC 3720 §B.4: 32 bytes of zeros have the CRC 0x8a9136aa, which is inverted at the end.
    assert_eq!(!superblock::crc32c(&[0; 32]), 0x8a91_36aa);
}

fn attributes() -> impl Strategy<Value = Attributes> {
    let xattr = (prop::sample::select(vec!["user.", "trusted.", "security."]), "[a-z]{1,20}", 0_usize..300);
    let xattrs = prop::collection::vec(xattr, 0..4);
    (0_u16..0o10000, any::<u32>(), any::<u32>(), any::<i64>(), 0_u32..1_000_000_000, xattrs).prop_map(
        |(mode, uid, gid, seconds, nanos, xattrs)| Attributes {
            mode,
            uid,
            gid,
            mtime: (seconds, nanos),
            xattrs: xattrs
                .into_iter()
                .map(|(prefix, name, len)| ((prefix.to_owned() + &name).into_bytes(), bytes_of(len)))
                .collect(),
        },
    )
}

fn item() -> impl Strategy<Value = Item> {
    prop_oneof![
        4 => prop_oneof![0_usize..5000, Just(4096), Just(8192), 0_usize..40_000].prop_map(|len| Item::File(bytes_of(len))),
        2 => "[a-z/.]{1,200}".prop_map(|target| Item::Symlink(target.into_bytes())),
        1 => (0_u32..4096, 0_u32..1_048_576).prop_map(|(major, minor)| Item::Char(major, minor)),
        1 => (0_u32..4096, 0_u32..1_048_576).prop_map(|(major, minor)| Item::Block(major, minor)),
        1 => Just(Item::Fifo),
        2 => Just(Item::Directory),
        2 => any::<usize>().prop_map(Item::Link),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_comes_back_the_same_and_twice_the_same(
        items in prop::collection::vec(("([a-c]{1,2}/){0,3}[a-z.]{1,40}", attributes(), item()), 0..60)
    ) {
        let items: Vec<_> = items.into_iter().map(|(path, a, item)| (path.into_bytes(), a, item)).collect();
        let (first, tree) = image(&items);
        assert_same(&first, &tree);
        let (second, _) = image(&items);
        prop_assert!(first == second, "the same tree, other bytes");
    }
}
