//! Bad input: each a clear error that says what to do, and nothing left behind.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use cri_shim::cri::proto::{
    ImageSpec, PodSandboxConfig, PodSandboxMetadata, PullImageRequest, RunPodSandboxRequest, VersionRequest,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use pericarp_tests::{Fault, Front, Node, Settings, image, status_of, wait_until};
use serde_json::json;
use tonic::Code;

/// What the kubelet would never wait for, and no pod or image is ever done in.
const TOO_SHORT: Duration = Duration::from_millis(1);

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
fn images_whose_registry_has_them_damaged() {
    let node = Node::start();
    let before = node.inventory_with_images();
    for (name, words) in [
        // Other bytes than the digest names; fewer than announced; none; not what the configuration says they unpack to.
        ("digest", ["not what was announced", "sha256:"]),
        ("truncated", ["layer", "announced"]),
        ("missing", ["does not exist", "check the name"]),
        ("diff-id", ["layer", "sha256:"]),
        ("gzip", ["layer", "gzip"]),
        ("tar", ["layer", "tar"]),
        ("platform", ["amd64", "linux"]),
    ] {
        let image = format!("docker.io/pericarp/bad-{name}:latest");
        let refusal = node.crictl(["pull", &image]).refused();
        println!("{name}: {refusal}");
        assert_says(&refusal, &["code = ", &format!("bad-{name}")]);
        assert_says(&refusal, &words);
        assert_eq!(node.crictl(["images", "-q", &image]).ok(), "", "{name}");
        node.inventory_with_images().assert_same_as(&before);
    }
}

/// A node whose registry is seen through a fault.
fn fronted(fault: Fault, keys: &str) -> (Node, Front) {
    let front = Front::start(fault);
    let settings = Settings { mirror: front.url(), keys: keys.into(), ..Settings::default() };
    let node = Node::start_with(&settings);
    node.crictl(["rmi", "--all"]);
    (node, front)
}

#[test]
fn transfers_that_go_wrong() {
    let (node, front) = fronted(Fault::Damage, "");
    let before = node.inventory_with_images();
    assert_says(
        &node.crictl(["pull", image::BUSYBOX]).refused(),
        &["code = Unavailable", "not what was announced", "sha256:"],
    );
    assert!(front.spoilt() > 0);
    node.inventory_with_images().assert_same_as(&before);
    drop(node);

    let (node, front) = fronted(Fault::Break(1), "");
    node.crictl(["pull", image::BUSYBOX]).ok();
    assert_eq!(front.spoilt(), 1, "a transfer that broke is taken up again");
    drop(node);

    let (node, _front) = fronted(Fault::Break(usize::MAX), "");
    let before = node.inventory_with_images();
    let refusal = node.crictl(["pull", image::BUSYBOX]).refused();
    assert_says(&refusal, &["RegistryUnavailable: ", "broke", "pull again"]);
    node.inventory_with_images().assert_same_as(&before);
}

#[test]
fn a_registry_that_stalls() {
    let (node, front) = fronted(Fault::Stall, "registry_stall_seconds = 2");
    let before = node.inventory_with_images();
    let since = Instant::now();
    let refusal = node.crictl(["pull", image::BUSYBOX]).refused();
    assert_says(&refusal, &["RegistryUnavailable: ", "sent nothing for 2 s", "registry_stall_seconds"]);
    assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
    assert!(front.spoilt() > 0);
    node.inventory_with_images().assert_same_as(&before);
    drop(node);

    // A client that does not wait so long.
    let (node, front) = fronted(Fault::Stall, "registry_stall_seconds = 600");
    let refusal = node.crictl(["pull", "--pull-timeout", "15s", image::BUSYBOX]).refused();
    assert_says(&refusal, &["code = DeadlineExceeded"]);
    assert!(front.spoilt() > 0);
    wait_until("nothing of the pull to be left", || node.inventory_with_images() == before);
}

#[test]
fn a_disk_that_is_full() {
    let disk = Path::new("/run/pericarp-small-disk");
    fs::create_dir_all(disk).expect("/run is writable");
    mount(Some("tmpfs"), disk, Some("tmpfs"), MsFlags::empty(), Some("size=4m")).expect("the lab is root's");
    {
        let node = Node::start_with(&Settings { image_dir: disk.join("images"), ..Settings::default() });
        let before = node.inventory_with_images();
        let refusal = node.crictl(["pull", image::BUSYBOX]).refused();
        assert_says(
            &refusal,
            &["code = ResourceExhausted", "no space left in /run/pericarp-small-disk", "rmi --prune"],
        );
        node.inventory_with_images().assert_same_as(&before);
        // The room is free again.
        node.crictl(["pull", image::SMALL]).ok();
    }
    umount2(disk, MntFlags::empty()).expect("nobody uses it any more");
}

#[test]
fn calls_whose_deadline_is_too_short() {
    let node = Node::start();
    let first = node.run_pod("first", &json!({}));
    node.remove_pod(&first);
    node.crictl(["rmi", "--all"]);
    let before = node.inventory_with_images();
    let metadata = PodSandboxMetadata { name: "late".into(), uid: "late".into(), namespace: "test".into(), attempt: 0 };
    let config = PodSandboxConfig { metadata: Some(metadata), ..Default::default() };
    let run = RunPodSandboxRequest { config: Some(config), ..Default::default() };
    let status = status_of(&node.socket(), "runtime.v1.RuntimeService/RunPodSandbox", &run, TOO_SHORT);
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    let image = ImageSpec { image: image::BUSYBOX.into(), ..Default::default() };
    let pull = PullImageRequest { image: Some(image), ..Default::default() };
    let status = status_of(&node.socket(), "runtime.v1.ImageService/PullImage", &pull, TOO_SHORT);
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    wait_until("nothing of both to be left", || node.inventory_with_images() == before);
    assert_eq!(node.crictl(["pods", "-q"]).ok() + &node.crictl(["images", "-q"]).ok(), "");
    // And none that is met is touched.
    let long = Duration::from_secs(60);
    let version = VersionRequest { version: String::new() };
    assert_eq!(status_of(&node.socket(), "runtime.v1.RuntimeService/Version", &version, long).code(), Code::Ok);
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
fn a_guest_that_dies_at_its_boot_gets_one_more_try() {
    let keys = "kernel_cmdline = \"rdinit=/not-there init=/not-there\"".to_owned();
    let node = Node::start_with(&Settings { keys, ..Settings::default() });
    let before = node.inventory();
    let config = node.pod_config("dying", &json!({}));
    assert_says(&node.crictl(["runp", &path(&config)]).refused(), &["the guest kernel panicked", "not-there"]);
    assert_eq!(node.daemon_log().matches("it is started once more").count(), 1, "{}", node.daemon_log());
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
