#![expect(clippy::unwrap_used, reason = "a test may panic")]

use super::*;

fn directory() -> Content {
    Content::Directory(BTreeMap::new())
}

fn attributes(mode: u16) -> Attributes {
    Attributes { mode, ..Attributes::default() }
}

/// A file whose size tells it from others.
fn file(size: u64) -> Content {
    Content::File(FileData { size, ..FileData::default() })
}

/// Builds layers of `path` for files (their size is the layer's number), `path/` for directories, `path -> target` for symbolic
/// and `path = target` for hard links.
fn tree(layers: &[&[&str]]) -> Tree {
    let mut tree = Tree::new();
    for (layer, number) in layers.iter().zip(1..) {
        tree.begin_layer();
        for entry in *layer {
            add(&mut tree, entry, number).unwrap();
        }
    }
    tree
}

fn add(tree: &mut Tree, entry: &str, size: u64) -> Result<(), Error> {
    if let Some((path, target)) = entry.split_once(" -> ") {
        tree.place(path.as_bytes(), attributes(0o777), Content::Symlink(target.as_bytes().to_vec()))
    } else if let Some((path, target)) = entry.split_once(" = ") {
        tree.link(path.as_bytes(), target.as_bytes())
    } else if entry.ends_with('/') {
        tree.place(entry.as_bytes(), attributes(0o700), directory())
    } else {
        tree.place(entry.as_bytes(), attributes(0o600), file(size))
    }
}

/// All paths but the root's, files with their size, directories with `/`.
fn list(tree: &Tree) -> Vec<String> {
    let mut all = vec![];
    let mut todo = vec![(String::new(), ROOT)];
    while let Some((path, id)) = todo.pop() {
        for (name, child) in tree.children(id).unwrap() {
            let below = format!("{path}{}", String::from_utf8_lossy(name));
            match &tree.node(*child).content {
                Content::Directory(_) => {
                    all.push(format!("{below}/"));
                    todo.push((format!("{below}/"), *child));
                }
                Content::File(data) => all.push(format!("{below} {}", data.size)),
                _ => all.push(below),
            }
        }
    }
    all.sort();
    all
}

#[test]
fn later_layers_lie_over_earlier_ones() {
    let tree = tree(&[&["a/x", "a/y", "b"], &["a/x", "b/", "b/now/deeper"]]);
    assert_eq!(list(&tree), ["a/", "a/x 2", "a/y 1", "b/", "b/now/", "b/now/deeper 2"].map(String::from));
}

#[test]
fn whiteouts_hide_lower_layers_only() {
    let hidden = tree(&[&["d/old", "d/sub/old", "f", "kept"], &[".wh.f", "d/.wh.sub", "d/sub/new"]]);
    assert_eq!(list(&hidden), ["d/", "d/old 1", "d/sub/", "d/sub/new 2", "kept 1"].map(String::from));
    // The order within a layer means nothing (layer.md).
    let after = tree(&[&["d/old", "d/sub/old"], &["d/sub/new", "d/.wh.sub", "d/sub/newer"]]);
    assert_eq!(list(&after), ["d/", "d/old 1", "d/sub/", "d/sub/new 2", "d/sub/newer 2"].map(String::from));
    let nothing = tree(&[&["a"], &[".wh.b", "c/.wh.d", ".wh..wh.plnk"]]);
    assert_eq!(list(&nothing), ["a 1"]);
}

#[test]
fn opaque_directories_hide_all_that_was_in_them() {
    for layer in [["d/.wh..wh..opq", "d/new", "d/sub/new"], ["d/new", "d/sub/new", "d/.wh..wh..opq"]] {
        let tree = tree(&[&["d/old", "d/sub/old", "e"], &layer]);
        assert_eq!(list(&tree), ["d/", "d/new 2", "d/sub/", "d/sub/new 2", "e 1"].map(String::from));
    }
}

#[test]
fn hard_links_share_a_node_across_layers() {
    let tree = tree(&[&["one"], &["two = /one", "d/three = two"], &["one"]]);
    let id = |path: &[u8]| tree.children(ROOT).unwrap()[path];
    assert_ne!(id(b"one"), id(b"two"));
    assert_eq!(tree.children(id(b"d")).unwrap()[b"three".as_slice()], id(b"two"));
}

#[test]
fn parents_may_be_symbolic_links_but_never_lead_out() {
    let tree = tree(&[
        &["usr/lib/", "lib -> usr/lib", "up -> ../../../usr", "abs -> /usr/lib"],
        &["lib/a", "up/b", "abs/c", "lib/.wh.x"],
    ]);
    let expected = ["abs", "lib", "up", "usr/", "usr/b 2", "usr/lib/", "usr/lib/a 2", "usr/lib/c 2"];
    assert_eq!(list(&tree), expected.map(String::from));
}

#[test]
fn a_directory_over_a_directory_keeps_what_is_in_it() {
    let mut tree = tree(&[&["d/x"]]);
    tree.begin_layer();
    tree.place(b"./d/", attributes(0o1777), directory()).unwrap();
    tree.place(b"./", attributes(0o711), directory()).unwrap();
    assert_eq!(list(&tree), ["d/", "d/x 1"].map(String::from));
    assert_eq!(tree.node(tree.children(ROOT).unwrap()[b"d".as_slice()]).attributes.mode, 0o1777);
    assert_eq!(tree.node(ROOT).attributes.mode, 0o711);
}

#[test]
fn hostile_names_are_refused() {
    let refused =
        |entry: &str| add(&mut tree(&[&["file", "dir/", "loop1 -> loop2", "loop2 -> loop1"]]), entry, 2).unwrap_err();
    assert!(matches!(refused("../../etc/passwd"), Error::DotDot(_)));
    assert!(matches!(refused("a/../b"), Error::DotDot(_)));
    assert!(matches!(refused("x = ../file"), Error::DotDot(_)));
    assert!(matches!(refused("x = nowhere"), Error::Link(..)));
    assert!(matches!(refused("x = dir"), Error::Link(..)));
    assert!(matches!(refused("file/below"), Error::NotDirectory(_)));
    assert!(matches!(refused("loop1/below"), Error::Loop(_)));
    assert!(matches!(refused(".wh."), Error::Whiteout(_)));
    assert!(matches!(refused(".wh..."), Error::Whiteout(_)));
    assert!(matches!(refused("nul\0"), Error::Nul(_)));
    assert!(matches!(refused(&"n".repeat(256)), Error::TooLong(_)));
    assert!(matches!(refused(&"n/".repeat(2049)), Error::TooLong(_)));
    assert!(list(&tree(&[&["/"]])).is_empty());
}

#[test]
fn absolute_paths_begin_at_the_images_root() {
    assert_eq!(list(&tree(&[&["/etc//./passwd"]])), ["etc/", "etc/passwd 1"].map(String::from));
}

#[test]
fn metadata_has_a_limit() {
    let mut tree = Tree::new();
    let large = Attributes { xattrs: [(b"user.x".to_vec(), vec![0; 1 << 20])].into(), ..Attributes::default() };
    let result = (0..1000).try_for_each(|i| tree.place(format!("{i}").as_bytes(), large.clone(), Content::Fifo));
    assert!(matches!(result, Err(Error::TooMuch)));
}
