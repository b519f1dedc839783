//! A node that is switched off and on again: `make test-kubernetes` runs the first test in one lab and the second in the next,
//! on the same disk.

use std::fs;
use std::path::Path;

use pericarp_tests::{Cluster, Pod, container, image};
use serde_json::json;

const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

fn disk() {
    assert!(std::env::var_os("LAB_DISK").is_some(), "this test needs a disk: run it by `make test-kubernetes`");
}

#[test]
fn first_boot_leaves_pods() {
    disk();
    let cluster = Cluster::get();
    let counting = "n=$(cat /v/boots 2>/dev/null); echo $((n + 1)) > /v/boots; sleep 100000";
    let always = json!({"command": ["sh", "-c", counting], "volumeMounts": [{"name": "v", "mountPath": "/v"}]});
    let directory = Path::new("/var/lib/kubelet/kept");
    fs::create_dir_all(directory).expect("the disk is writable");
    let spec = |policy: &str, container| {
        json!({
            "restartPolicy": policy,
            "volumes": [{"name": "v", "hostPath": {"path": directory}}],
            "containers": [container],
        })
    };
    let always = Pod::run(&cluster, "always", &spec("Always", container("c", &always)));
    let never = Pod::run(&cluster, "never", &spec("Never", container("c", &json!({}))));
    let web = container("web", &json!({"image": image::WEB}));
    cluster.apply(&json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "web"}}, "template": {
            "metadata": {"labels": {"app": "web"}}, "spec": {"runtimeClassName": "pericarp", "containers": [web]},
        }},
    }));
    cluster.kubectl(["rollout", "status", "deployment/web", "--timeout=300s"]).ok();
    fs::write("/var/lib/kubelet/kept/boot-id", always.sh(BOOT_ID)).expect("the disk is writable");
    always.keep();
    never.keep();
    cluster.switch_off();
}

#[test]
fn second_boot_finds_them_as_kubernetes_promises() {
    disk();
    let cluster = Cluster::get();
    let (always, never) = (Pod::known(&cluster, "always"), Pod::known(&cluster, "never"));
    cluster.eventually("the pod to be started again", || always.container("c")["restartCount"] == 1);
    always.ready();
    let before = fs::read_to_string("/var/lib/kubelet/kept/boot-id").expect("the disk has it");
    assert_ne!(always.sh(BOOT_ID), before);
    assert_eq!(always.sh("cat /v/boots"), "2");
    cluster.eventually("the one that is not to be started again to have ended", || {
        ["Failed", "Succeeded"].iter().any(|phase| never.object()["status"]["phase"] == *phase)
    });
    cluster.kubectl(["rollout", "status", "deployment/web", "--timeout=300s"]).ok();
    // Of the first boot nothing is left: as many pods as there are, and a scratch file for each.
    let running = || cluster.crictl(["pods", "-q", "--state", "ready"]).ok().lines().count();
    let of_a_pod = |entry: &fs::DirEntry| !entry.file_name().to_string_lossy().starts_with("template");
    let scratch = || fs::read_dir("/var/lib/pericarp/scratch").expect("it is there").flatten().filter(of_a_pod).count();
    cluster.eventually("what is left of the first boot to be gone", || running() == 2 && scratch() == 2);
}
