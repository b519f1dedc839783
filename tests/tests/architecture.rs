//! The arrows between the crates, checked: who may depend on whom (docs/architecture.md).

use std::collections::{BTreeSet, VecDeque};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, PackageId};

/// Every crate that `name` links, itself left out.
fn links(metadata: &Metadata, name: &str) -> BTreeSet<String> {
    let resolve = metadata.resolve.as_ref().expect("cargo resolves the workspace");
    let start = metadata.packages.iter().find(|package| package.name.as_str() == name).expect("a crate of ours");
    let mut found = BTreeSet::new();
    let mut queue: VecDeque<&PackageId> = VecDeque::from([&start.id]);
    while let Some(id) = queue.pop_front() {
        let node = resolve.nodes.iter().find(|node| &node.id == id).expect("a node per package");
        for dependency in &node.deps {
            let linked = dependency.dep_kinds.iter().any(|kind| kind.kind == DependencyKind::Normal);
            if linked && found.insert(metadata[&dependency.pkg].name.to_string()) {
                queue.push_back(&dependency.pkg);
            }
        }
    }
    found
}

fn metadata() -> Metadata {
    MetadataCommand::new()
        .other_options(["--filter-platform".to_owned(), "x86_64-unknown-linux-gnu".to_owned()])
        .exec()
        .expect("cargo metadata runs in the workspace")
}

fn assert_links_none(crate_name: &str, forbidden: &[&str]) {
    let links = links(&metadata(), crate_name);
    let found: Vec<_> = forbidden.iter().filter(|name| links.contains(**name)).collect();
    assert!(found.is_empty(), "{crate_name} links {found:?}");
}

#[test]
fn the_vmm_never_sees_the_node_side() {
    assert_links_none("pericarp-vmm", &["cri-shim", "agent-protocol", "pericarp-init", "prost"]);
}

#[test]
fn the_file_server_sees_nothing_of_ours() {
    assert_links_none("pericarp-fs", &["cri-shim", "agent-protocol", "pericarp-vmm", "vmm-control", "serde"]);
}

#[test]
fn async_and_grpc_stay_under_cri_shim() {
    for name in ["pericarp-vmm", "pericarp-fs", "vmm-control", "agent-protocol", "pericarp-init"] {
        assert_links_none(name, &["tokio", "tonic", "hyper", "async-std", "futures"]);
    }
}

#[test]
fn the_agent_links_nothing_of_the_host() {
    assert_links_none("pericarp-init", &["cri-shim", "pericarp-vmm", "vmm-control", "kvm-ioctls", "vm-memory"]);
}

#[test]
fn the_check_sees_links_at_all() {
    let links = links(&metadata(), "pericarp-vmm");
    assert!(links.contains("vmm-control") && links.contains("virtio-queue"), "{links:?}");
}

#[test]
fn the_top_level_holds_what_it_should_and_no_more() {
    let root = metadata().workspace_root;
    let allowed = [
        "Cargo.lock",
        "Cargo.toml",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "benches",
        "cri-shim",
        "deny.toml",
        "deploy",
        "docs",
        "guest-kernel",
        "initrd",
        "target",
        "tests",
        "vmm",
    ];
    let strangers: Vec<_> = std::fs::read_dir(root)
        .expect("the workspace is readable")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.') && !allowed.contains(&name.as_str()))
        .collect();
    assert!(strangers.is_empty(), "at the top level: {strangers:?}");
}
