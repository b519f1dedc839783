//! The life of containers: probes, hooks, init containers and sidecars, restarts, and what events tell of failures.

use pericarp_tests::{Cluster, Pod, container, image};
use serde_json::{Value, json};

/// A probe that is asked often.
fn probe(how: &Value) -> Value {
    let mut probe = json!({"periodSeconds": 1, "timeoutSeconds": 10, "failureThreshold": 60});
    for (key, value) in how.as_object().expect("an object") {
        probe[key] = value.clone();
    }
    probe
}

fn ready(pod: &Pod) -> bool {
    pod.container("c")["ready"] == true
}

#[test]
fn probes_by_exec_decide_what_is_ready_and_what_restarts() {
    let cluster = Cluster::get();
    let probes = json!({
        "readinessProbe": probe(&json!({"exec": {"command": ["test", "-e", "/tmp/ready"]}, "failureThreshold": 1})),
        "livenessProbe": probe(&json!({"exec": {"command": ["test", "!", "-e", "/tmp/ill"]}, "failureThreshold": 1})),
        "startupProbe": probe(&json!({"exec": {"command": ["true"]}})),
    });
    let pod = Pod::create(&cluster, "probe-exec", &json!({"containers": [container("c", &probes)]}));
    cluster.eventually("the container to start", || pod.container("c")["started"] == true);
    assert!(!ready(&pod));
    pod.sh("touch /tmp/ready");
    pod.ready();
    pod.sh("rm /tmp/ready");
    cluster.eventually("the pod not to be ready", || !ready(&pod));
    pod.sh("touch /tmp/ill");
    cluster.eventually("a restart", || pod.container("c")["restartCount"] == 1);
    // Each failure is an event too, but a kubelet tells no more than 25 warnings of a pod, which the other probe may have used up.
    let killed = "Killing: Container c failed liveness probe, will be restarted";
    cluster.eventually("the reason to be told", || pod.events().contains(killed));
}

#[test]
fn probes_by_http_and_tcp() {
    let cluster = Cluster::get();
    for (name, good, bad) in [
        (
            "probe-http",
            json!({"httpGet": {"path": "/", "port": 80}}),
            json!({"httpGet": {"path": "/none", "port": 80}}),
        ),
        ("probe-tcp", json!({"tcpSocket": {"port": 80}}), json!({"tcpSocket": {"port": 81}})),
    ] {
        let web = |how: &Value| {
            let web = json!({"image": image::WEB, "readinessProbe": probe(how)});
            json!({"containers": [container("c", &web)]})
        };
        let bad = Pod::create(&cluster, &format!("{name}-bad"), &web(&bad));
        Pod::run(&cluster, name, &web(&good));
        cluster.eventually("the probe to fail", || bad.events().contains("Readiness probe failed"));
        assert!(!ready(&bad));
    }
}

/// etcd answers gRPC's health checks; the host's own is lent to the pod.
#[test]
fn probes_by_grpc() {
    let cluster = Cluster::get();
    let host = |name: &str, path: &str| json!({"name": name, "hostPath": {"path": path}});
    let mount = |name: &str, path: &str| json!({"name": name, "mountPath": path, "readOnly": true});
    let listen = "--listen-client-urls http://0.0.0.0:2379 --advertise-client-urls http://127.0.0.1:2379";
    let run = format!("exec /host/ld.so --library-path /host/lib /host/bin/etcd --data-dir /tmp/etcd {listen}");
    let etcd = json!({
        "command": ["sh", "-c", run],
        "readinessProbe": probe(&json!({"grpc": {"port": 2379}})),
        "volumeMounts": [mount("bin", "/host/bin"), mount("lib", "/host/lib"), mount("ld", "/host/ld.so")],
    });
    Pod::run(
        &cluster,
        "probe-grpc",
        &json!({
            "volumes": [
                host("bin", "/usr/bin"), host("lib", "/lib/x86_64-linux-gnu"), host("ld", "/lib64/ld-linux-x86-64.so.2"),
            ],
            "containers": [container("c", &etcd)],
        }),
    );
}

#[test]
fn hooks_run_after_the_start_and_before_the_stop() {
    let cluster = Cluster::get();
    let directory = cluster.directory().join("hooks");
    std::fs::create_dir_all(&directory).expect("the directory is writable");
    let hook = |text: &str| json!({"exec": {"command": ["sh", "-c", format!("echo {text} >> /data/log")]}});
    let hooked = json!({
        "lifecycle": {"postStart": hook("started"), "preStop": hook("stopping")},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    });
    let pod = Pod::run(
        &cluster,
        "hooks",
        &json!({
            "volumes": [{"name": "data", "hostPath": {"path": directory}}],
            "containers": [container("c", &hooked)],
        }),
    );
    let log = || std::fs::read_to_string(directory.join("log")).expect("a hook has written");
    assert_eq!(log(), "started\n");
    pod.remove();
    assert_eq!(log(), "started\nstopping\n");
}

#[test]
fn init_containers_and_sidecars_run_in_their_order() {
    let cluster = Cluster::get();
    let with = |name: &str, script: &str, more: &Value| {
        let mut own = json!({
            "command": ["sh", "-c", script],
            "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            own[key] = value.clone();
        }
        container(name, &own)
    };
    let sidecar = "echo sidecar >> /data/log; trap 'exit 0' TERM; sleep 100000 & wait";
    let pod = Pod::create(
        &cluster,
        "init",
        &json!({
            "restartPolicy": "Never",
            "volumes": [{"name": "data", "emptyDir": {}}],
            "initContainers": [
                with("first", "echo first >> /data/log", &Value::Null),
                with("sidecar", sidecar, &json!({
                    "restartPolicy": "Always",
                    "startupProbe": probe(&json!({"exec": {"command": ["grep", "sidecar", "/data/log"]}})),
                })),
                with("second", "echo second >> /data/log", &Value::Null),
            ],
            "containers": [with("c", "cat /data/log", &Value::Null)],
        }),
    );
    pod.succeeded();
    assert_eq!(pod.logs(&["-c", "c"]), "first\nsidecar\nsecond");
    cluster.eventually("the sidecar to end", || pod.container("sidecar")["state"]["terminated"]["exitCode"] == 0);
}

#[test]
fn restarts_are_by_the_policy() {
    let cluster = Cluster::get();
    let ends = |code: u8| json!([container("c", &json!({"command": ["sh", "-c", format!("exit {code}")]}))]);
    let never = Pod::create(&cluster, "never", &json!({"restartPolicy": "Never", "containers": ends(4)}));
    let well = Pod::create(&cluster, "well", &json!({"restartPolicy": "OnFailure", "containers": ends(0)}));
    let ill = Pod::create(&cluster, "ill", &json!({"restartPolicy": "OnFailure", "containers": ends(5)}));
    cluster.eventually("a failure that stays", || never.object()["status"]["phase"] == "Failed");
    assert_eq!(never.container("c")["state"]["terminated"]["exitCode"], 4);
    well.succeeded();
    cluster.eventually("a restart", || ill.container("c")["restartCount"].as_u64() >= Some(1));
    assert_eq!((&never.container("c")["restartCount"], &well.container("c")["restartCount"]), (&json!(0), &json!(0)));
}

#[test]
fn a_container_without_memory_is_told_to_have_been_killed_for_it() {
    let cluster = Cluster::get();
    let hog = json!({
        "command": ["sh", "-c", "dd if=/dev/zero of=/dev/null bs=200M count=1"],
        "resources": {"limits": {"memory": "32Mi"}},
    });
    let pod = Pod::create(&cluster, "oom", &json!({"restartPolicy": "Never", "containers": [container("c", &hog)]}));
    cluster.eventually("the end of it", || pod.container("c")["state"]["terminated"]["reason"] == "OOMKilled");
}

#[test]
fn events_say_why_a_pod_did_not_start() {
    let cluster = Cluster::get();
    let without = json!({"image": "registry.k8s.io/pericarp/none:latest"});
    let pods = [
        (json!({"hostNetwork": true}), "cannot have hostNetwork"),
        (json!({"containers": [container("c", &without)]}), "registry.k8s.io/pericarp/none:latest"),
        (json!({"containers": [container("c", &json!({"command": ["/no/such"]}))]}), "/no/such"),
        (
            json!({
                "volumes": [{"name": "s", "hostPath": {"path": cluster.directory().join("pericarpd.sock")}}],
                "containers": [container("c", &json!({"volumeMounts": [{"name": "s", "mountPath": "/s"}]}))],
            }),
            "socket",
        ),
    ];
    for (index, (spec, words)) in pods.into_iter().enumerate() {
        let pod = Pod::create(&cluster, &format!("refused-{index}"), &spec);
        cluster.eventually(&format!("an event with {words:?}"), || {
            pod.events().lines().any(|line| line.starts_with("Failed") && line.contains(words))
        });
    }
}
