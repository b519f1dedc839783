//! Bad input: each a clear error that says what to do, and nothing left behind.

use std::fs;
use std::path::Path;

use pericarp_tests::{Node, image};
use serde_json::json;

fn path(path: &Path) -> String {
    path.to_str().expect("a plain path").to_owned()
}

#[track_caller]
fn assert_says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.to_lowercase().contains(&word.to_lowercase()), "{word:?} is not in: {message}");
    }
}

#[test]
fn images_that_cannot_be_had() {
    let node = Node::start();
    let before = node.inventory();
    let missing = node.crictl(["pull", "registry.k8s.io/no-such-image:1"]).refused();
    assert_says(&missing, &["NotFound", "no-such-image", "check the name"]);
    let digest = format!("registry.k8s.io/e2e-test-images/busybox@sha256:{}", "0".repeat(64));
    assert_says(&node.crictl(["pull", &digest]).refused(), &["NotFound", "check the name"]);
    assert_says(&node.crictl(["pull", "127.0.0.1:1/nobody/listens:1"]).refused(), &["127.0.0.1:1"]);
    assert_says(&node.crictl(["pull", "UPPER CASE"]).refused(), &["UPPER CASE"]);
    node.inventory().assert_same_as(&before);
}

#[test]
fn pods_that_cannot_be() {
    let node = Node::start();
    let first = node.run_pod("first", &json!({}));
    node.remove_pod(&first);
    let before = node.inventory();
    let host_network =
        node.pod_config("hostnet", &json!({"linux": {"security_context": {"namespace_options": {"network": 2}}}}));
    assert_says(&node.crictl(["runp", &path(&host_network)]).refused(), &["hostNetwork", "runtime class"]);
    let host_ipc =
        node.pod_config("hostipc", &json!({"linux": {"security_context": {"namespace_options": {"ipc": 2}}}}));
    assert_says(&node.crictl(["runp", &path(&host_ipc)]).refused(), &["hostIPC"]);
    let plain = node.pod_config("handler", &json!({}));
    assert_says(&node.crictl(["runp", "--runtime", "no-such", &path(&plain)]).refused(), &["no-such", "pericarp"]);
    node.inventory().assert_same_as(&before);
}

#[test]
fn containers_that_cannot_be() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("bad", &json!({}));
    let pod_config = path(&node.pod_config("bad", &json!({})));
    let command = path(&node.container_config("nocommand", image::BUSYBOX, &["no-such-command"], &json!({})));
    let create = node.crictl(["create", "--no-pull", &pod, &command, &pod_config]);
    let refusal = if create.code == 0 { node.crictl(["start", &create.stdout]).refused() } else { create.refused() };
    assert_says(&refusal, &["no-such-command", "not found"]);
    let image = path(&node.container_config("noimage", "registry.k8s.io/never-pulled:1", &["sh"], &json!({})));
    assert_says(&node.crictl(["create", "--no-pull", &pod, &image, &pod_config]).refused(), &["never-pulled", "pull"]);
    fs::remove_dir_all(node.log_directory().join("bad")).expect("the log directory is there");
    let nolog = path(&node.container_config("nolog", image::BUSYBOX, &["sleep", "1"], &json!({})));
    let refusal = node.crictl(["create", "--no-pull", &pod, &nolog, &pod_config]).refused();
    assert_says(&refusal, &["log"]);
    let ids = node.crictl(["ps", "-aq"]).ok();
    assert!(ids.lines().count() <= 1, "refused containers are still listed: {ids}");
    node.remove_pod(&pod);
}
