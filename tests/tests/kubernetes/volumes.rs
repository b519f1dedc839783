//! Volumes of every kind that a node has without a driver.

use std::fs;
use std::process::Command;

use pericarp_tests::{Cluster, Pod, container};
use serde_json::{Value, json};

fn with_mounts(mounts: &Value, volumes: &Value) -> Value {
    json!({"volumes": volumes, "containers": [container("c", &json!({"volumeMounts": mounts}))]})
}

#[test]
fn config_maps_and_secrets_as_files_and_environment() {
    let cluster = Cluster::get();
    let map = |value: &str| {
        cluster.apply(
            &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cm"}, "data": {"key": value}}),
        );
    };
    map("one");
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hidden"}, "stringData": {"word": "sesame"},
    }));
    let c = json!({
        "env": [{"name": "KEY", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "key"}}}],
        "envFrom": [{"secretRef": {"name": "hidden"}}],
        "volumeMounts": [
            {"name": "cm", "mountPath": "/cm"}, {"name": "hidden", "mountPath": "/hidden"},
            {"name": "cm", "mountPath": "/one/file", "subPath": "key"},
        ],
    });
    let pod = Pod::run(
        &cluster,
        "config",
        &json!({
            "volumes": [
                {"name": "cm", "configMap": {"name": "cm"}},
                {"name": "hidden", "secret": {"secretName": "hidden", "defaultMode": 0o400}},
            ],
            "containers": [container("c", &c)],
        }),
    );
    assert_eq!(pod.sh("echo $KEY $word; cat /cm/key /one/file; cat /hidden/word"), "one sesame\noneonesesame");
    assert_eq!(pod.sh("stat -L -c %a /hidden/word"), "400");
    assert!(pod.exec("echo > /cm/key").code != 0, "a ConfigMap was written to");
    map("two");
    cluster.eventually("the change to be seen", || pod.sh("cat /cm/key") == "two");
    assert_eq!(pod.sh("cat /one/file"), "one");
}

#[test]
fn projected_volumes_the_downward_api_and_a_token() {
    let cluster = Cluster::get();
    let c = json!({
        "resources": {"limits": {"memory": "64Mi"}},
        "env": [
            {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "MEMORY", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory"}}},
        ],
        "volumeMounts": [{"name": "all", "mountPath": "/all"}],
    });
    let sources = json!([
        {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
    ]);
    let pod = Pod::run(
        &cluster,
        "projected",
        &json!({
            "volumes": [{"name": "all", "projected": {"sources": sources}}],
            "containers": [container("c", &c)],
        }),
    );
    let address = &pod.addresses()[0];
    assert_eq!(
        pod.sh("echo $NAME $IP $MEMORY; cat /all/labels"),
        format!("projected {address} 67108864\napp=\"projected\"")
    );
    assert_eq!(pod.sh("tr . '\\n' < /all/token | wc -l"), "2");
    assert_eq!(pod.sh("ls /var/run/secrets/kubernetes.io/serviceaccount"), "ca.crt\nnamespace\ntoken");
}

#[test]
fn empty_directories_are_shared_by_the_containers_of_a_pod() {
    let cluster = Cluster::get();
    let mounts = json!({"volumeMounts": [
        {"name": "disk", "mountPath": "/disk"}, {"name": "memory", "mountPath": "/memory"},
        {"name": "disk", "mountPath": "/part", "subPath": "part"},
    ]});
    let pod = Pod::run(
        &cluster,
        "empty",
        &json!({
            "volumes": [{"name": "disk", "emptyDir": {}}, {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}}],
            "containers": [container("c", &mounts), container("d", &mounts)],
        }),
    );
    pod.sh("echo 1 > /disk/file; echo 2 > /memory/file; echo 3 > /part/file");
    let other =
        cluster.kubectl(["exec", "empty", "-c", "d", "--", "cat", "/disk/file", "/memory/file", "/disk/part/file"]);
    assert_eq!(other.ok(), "1\n2\n3");
    assert!(pod.sh("df -k /memory").contains(" 16384 "), "{}", pod.sh("df -k /memory"));
}

#[test]
fn host_paths_are_the_hosts() {
    let cluster = Cluster::get();
    let directory = cluster.directory().join("host-path");
    fs::create_dir_all(&directory).expect("the directory is writable");
    fs::write(directory.join("from-host"), "hello").expect("writable");
    let pod = Pod::run(
        &cluster,
        "host-path",
        &with_mounts(
            &json!([{"name": "h", "mountPath": "/h"}, {"name": "h", "mountPath": "/ro", "readOnly": true}]),
            &json!([{"name": "h", "hostPath": {"path": directory, "type": "Directory"}}]),
        ),
    );
    assert_eq!(pod.sh("cat /h/from-host; echo back > /h/from-guest; cat /ro/from-guest"), "helloback");
    assert_eq!(fs::read_to_string(directory.join("from-guest")).expect("it was written"), "back\n");
    assert!(pod.exec("touch /ro/x").stderr.contains("Read-only"));
}

/// A volume and a claim that is bound to it.
fn claim(cluster: &Cluster, name: &str, source: &Value, mode: &str) {
    let mut volume = json!({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "16Mi"}, "accessModes": ["ReadWriteOnce"], "volumeMode": mode, "storageClassName": name,
            "nodeAffinity": {"required": {"nodeSelectorTerms": [
                {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["node1"]}]},
            ]}},
        },
    });
    for (key, value) in source.as_object().expect("an object") {
        volume["spec"][key] = value.clone();
    }
    cluster.apply(&volume);
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "16Mi"}}, "volumeMode": mode,
            "storageClassName": name,
        },
    }));
}

#[test]
fn a_claim_outlives_its_pods() {
    let cluster = Cluster::get();
    let directory = cluster.directory().join("claimed");
    fs::create_dir_all(&directory).expect("the directory is writable");
    claim(&cluster, "files", &json!({"hostPath": {"path": directory}}), "Filesystem");
    let spec = with_mounts(
        &json!([{"name": "v", "mountPath": "/v"}]),
        &json!([{"name": "v", "persistentVolumeClaim": {"claimName": "files"}}]),
    );
    let first = Pod::run(&cluster, "claims", &spec);
    first.sh("echo kept > /v/file");
    first.remove();
    assert_eq!(Pod::run(&cluster, "claims-again", &spec).sh("cat /v/file"), "kept");
}

#[test]
fn a_claim_may_be_a_block_device() {
    let cluster = Cluster::get();
    let image = cluster.write("block.img", "");
    fs::File::options().write(true).open(&image).and_then(|file| file.set_len(16 << 20)).expect("a sparse file");
    let losetup = |arguments: &[&str]| {
        let output = Command::new("losetup").args(arguments).output().expect("losetup runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let device = losetup(&["--find", "--show", &image]);
    claim(&cluster, "block", &json!({"local": {"path": device}}), "Block");
    let c = json!({"volumeDevices": [{"name": "v", "devicePath": "/dev/block"}]});
    let pod = Pod::run(
        &cluster,
        "block",
        &json!({
            "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "block"}}],
            "containers": [container("c", &c)],
        }),
    );
    pod.sh("echo written by a guest | dd of=/dev/block bs=512 conv=fsync 2>/dev/null");
    let host = fs::read(&device).expect("a block device can be read");
    assert!(host.starts_with(b"written by a guest\n"));
    assert_eq!(host.len(), 16 << 20);
    pod.remove();
    losetup(&["--detach", &device]);
}
