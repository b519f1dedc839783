//! The node, the runtime class, and what runs by them.

use std::fs;

use pericarp_tests::{Cluster, Pod, container, image};
use serde_json::json;

#[test]
fn node_is_ready_with_our_runtime() {
    let cluster = Cluster::get();
    let node = cluster.object("node", "node1");
    let info = &node["status"]["nodeInfo"];
    assert!(info["containerRuntimeVersion"].as_str().is_some_and(|name| name.starts_with("pericarp://")), "{info}");
    assert_eq!(info["kubeletVersion"], "v1.36.1");
    let handlers = node["status"]["runtimeHandlers"].as_array().cloned().unwrap_or_default();
    assert!(handlers.iter().any(|handler| handler["name"] == "pericarp"), "{handlers:?}");
}

#[test]
fn classes_choose_their_nodes() {
    let cluster = Cluster::get();
    cluster.apply(&json!({
        "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "chosen"}, "handler": "pericarp",
        "scheduling": {"nodeSelector": {"virtual-machines": "yes"}},
    }));
    let pod = Pod::create(&cluster, "chosen", &json!({"runtimeClassName": "chosen"}));
    cluster.eventually("the scheduler to find no node", || pod.events().contains("FailedScheduling"));
    cluster.kubectl(["label", "node", "node1", "virtual-machines=yes"]).ok();
    pod.ready();
    cluster.kubectl(["label", "node", "node1", "virtual-machines-"]).ok();
}

#[test]
fn deployment_is_ready_each_pod_with_a_kernel_of_its_own() {
    let cluster = Cluster::get();
    let labels = json!({"app": "web"});
    let web = container("web", &json!({"image": image::WEB, "ports": [{"containerPort": 80}]}));
    cluster.apply(&json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web"},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"runtimeClassName": "pericarp", "containers": [web]},
            },
        },
    }));
    cluster.kubectl(["rollout", "status", "deployment/web", "--timeout=300s"]).ok();
    let names = cluster.kubectl(["get", "pods", "-l", "app=web", "-o", "name"]).ok();
    let kernels: Vec<String> = names
        .lines()
        .map(|name| {
            cluster.kubectl(["exec", name, "--", "cat", "/proc/version", "/proc/sys/kernel/random/boot_id"]).ok()
        })
        .collect();
    let host = fs::read_to_string("/proc/version").expect("proc is mounted");
    assert_eq!(kernels.len(), 2, "{names}");
    assert!(kernels.iter().all(|kernel| !kernel.contains(host.trim())), "{kernels:?}");
    assert_ne!(kernels[0], kernels[1], "two pods share a kernel");
    cluster.delete("deployment", "web");
}
