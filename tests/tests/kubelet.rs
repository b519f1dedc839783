//! A kubelet without an API server: what it is told by manifests it runs, and nothing stays of what it is no longer told.

use std::fs;
use std::process::Command;

use pericarp_tests::{Cluster, container, image};
use serde_json::{Value, json};

/// What the kubelet says of its pods.
fn pods() -> Vec<Value> {
    let mut curl = Command::new("curl");
    let output =
        curl.args(["-sk", "--max-time", "20", "https://127.0.0.1:10250/pods"]).output().expect("curl is installed");
    let list: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    list["items"].as_array().cloned().unwrap_or_default()
}

#[test]
fn static_pods_run_are_probed_and_go() {
    let node = Cluster::kubelet_alone();
    let manifest = node.manifests().join("web.json");
    let probe = json!({"httpGet": {"port": 80}, "periodSeconds": 1});
    let web = container("web", &json!({"image": image::WEB, "readinessProbe": probe}));
    let write = |name: &str| {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"},
            "spec": {"containers": [web], "terminationGracePeriodSeconds": 2},
        });
        // In one step: the kubelet watches.
        let aside = node.write("manifest.json", &pod.to_string());
        fs::rename(aside, &manifest).expect("they are of one file system");
    };
    let ready = |name: &str| {
        let is_ready = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
        let conditions = |pod: &Value| pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let named = |pod: &Value| pod["metadata"]["name"].as_str().is_some_and(|of| of.starts_with(name));
        pods().iter().any(|pod| named(pod) && conditions(pod).iter().any(is_ready))
    };
    let gone = || node.crictl(["pods", "-q"]).ok().is_empty();
    // A first pod makes what stays: the bridge, the kubelet's own cgroups.
    write("first");
    node.wait_for("the first pod to be ready", || ready("first"));
    fs::remove_file(&manifest).expect("it is there");
    node.wait_for("the first pod to be gone", gone);
    let before = node.inventory();
    write("second");
    node.wait_for("the second pod to be ready", || ready("second"));
    fs::remove_file(&manifest).expect("it is there");
    node.wait_for("the second pod to be gone", gone);
    let mut now = node.inventory();
    node.wait_for("the node to be as it was", || {
        now = node.inventory();
        now == before
    });
}
