//! What pods may use, what they do use, and who decides when there is too little.

use std::fs;

use pericarp_tests::{Cluster, Pod, container, wait_until};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// What a pod of the class takes beyond its containers' requests (deploy/runtimeclass.yaml).
fn overhead_mib(cluster: &Cluster) -> u64 {
    let text = cluster.object("runtimeclass", "pericarp")["overhead"]["podFixed"]["memory"].clone();
    text.as_str().and_then(|text| text.strip_suffix("Mi")?.parse().ok()).unwrap_or_else(|| panic!("{text}"))
}

fn limited(memory: &str, cpu: &str) -> Value {
    json!({"resources": {"limits": {"memory": memory, "cpu": cpu}}})
}

fn cgroup_number(pod: &Pod, below: &str, file: &str) -> u64 {
    let path = format!("/sys/fs/cgroup{below}/pod{}/{file}", pod.uid());
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    text.trim().parse().unwrap_or_else(|_| panic!("{path}: {text}"))
}

#[test]
fn quality_of_service_decides_the_cgroup() {
    let cluster = Cluster::get();
    let guaranteed = container("c", &limited("64Mi", "100m"));
    let burstable = container("c", &json!({"resources": {"requests": {"memory": "16Mi"}}}));
    for (name, below, containers) in [
        ("qos-guaranteed", "/kubepods", json!([guaranteed])),
        ("qos-burstable", "/kubepods/burstable", json!([burstable])),
        ("qos-besteffort", "/kubepods/besteffort", json!([container("c", &Value::Null)])),
    ] {
        let pod = Pod::run(&cluster, name, &json!({"containers": containers}));
        let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", pod.vmm_pid())).expect("it runs");
        let expected = format!("0::{below}/pod{}/pericarp-", pod.uid());
        assert!(cgroup.starts_with(&expected), "{cgroup} is not {expected}");
        if name == "qos-guaranteed" {
            assert_eq!(cgroup_number(&pod, below, "memory.max"), (64 + overhead_mib(&cluster)) * MIB);
        }
    }
}

#[test]
fn the_overhead_of_the_class_is_no_less_than_what_a_pod_takes() {
    let cluster = Cluster::get();
    let pod = Pod::run(&cluster, "overhead", &json!({"containers": [container("c", &limited("64Mi", "100m"))]}));
    // A pod that uses all of its limit, and page cache beside it: of a hole, since what is written is the host's memory in a lab whose
    // files are all there.
    let used = "dd if=/dev/zero of=/hole bs=1M count=0 seek=200 2>/dev/null; cat /hole >/dev/null; dd if=/dev/zero of=/dev/null bs=56M count=4 2>/dev/null";
    pod.sh(used);
    let number = |text: &str, name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {text}"));
        line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).expect("a number")
    };
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", pod.vmm_pid())).expect("it runs");
    let text = |file: &str| {
        fs::read_to_string(format!("/sys/fs/cgroup/kubepods/pod{}/{file}", pod.uid())).expect("the kubelet has made it")
    };
    let of = |name: &str| number(&text("memory.stat"), name) / MIB;
    let promised = 64 + overhead_mib(&cluster);
    eprintln!(
        "VMM's PSS {} MiB; anonymous {} MiB, kernel {} MiB, page cache {} MiB, of {promised} MiB",
        number(&rollup, "Pss:") >> 10,
        of("anon "),
        of("kernel "),
        of("file "),
    );
    assert!(of("anon ") + of("kernel ") <= promised - 4, "no room is left: {}", text("memory.stat"));
    assert_eq!(number(&text("memory.events"), "oom_kill "), 0);
    assert_eq!(pod.container("c")["restartCount"], 0);
    pod.sh("true");
}

#[test]
fn quotas_count_the_overhead() {
    let cluster = Cluster::get();
    cluster.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "quota"}}));
    cluster
        .eventually("pods to be let in", || !cluster.at("/api/v1/namespaces/quota/serviceaccounts/default").is_null());
    let over = overhead_mib(&cluster);
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "quota", "namespace": "quota"},
        "spec": {"hard": {"requests.memory": format!("{}Mi", 100 + over)}},
    }));
    let pod = |name: &str, memory: &str| {
        cluster.try_apply(&json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "quota"},
            "spec": {"runtimeClassName": "pericarp", "containers": [container("c", &limited(memory, "10m"))]},
        }))
    };
    let used =
        || cluster.at("/api/v1/namespaces/quota/resourcequotas/quota")["status"]["used"]["requests.memory"].clone();
    cluster.eventually("the quota to be counted", || !used().is_null());
    let refused = pod("large", "101Mi").expect_err("it is too large by 1 MiB");
    assert!(refused.contains("exceeded quota"), "{refused}");
    pod("fits", "100Mi").expect("it fits");
    cluster.eventually("the pod to be counted", || used() == format!("{}Mi", 100 + over));
    cluster.delete("namespace", "quota");
}

#[test]
fn limits_change_in_place() {
    let cluster = Cluster::get();
    let pod = Pod::run(&cluster, "resize", &json!({"containers": [container("c", &limited("64Mi", "200m"))]}));
    let limits = "cat /sys/fs/cgroup/memory.max; cut -d' ' -f1 /sys/fs/cgroup/cpu.max";
    assert_eq!(pod.sh(limits), format!("{}\n20000", 64 * MIB));
    for (memory, cpu, quota) in [(192, "400m", 40_000), (96, "300m", 30_000)] {
        let patch = json!({"spec": {"containers": [
            {"name": "c", "resources": {
                "limits": {"memory": format!("{memory}Mi"), "cpu": cpu}, "requests": {"memory": format!("{memory}Mi"), "cpu": cpu},
            }},
        ]}});
        cluster.kubectl(["patch", "pod", "resize", "--subresource", "resize", "--patch", &patch.to_string()]).ok();
        cluster.eventually("the new limits to hold", || pod.sh(limits) == format!("{}\n{quota}", memory * MIB));
        cluster.eventually("the new limits to be told", || {
            pod.container("c")["resources"]["limits"]["memory"] == format!("{memory}Mi")
        });
        if memory == 192 {
            pod.sh("dd if=/dev/zero of=/dev/null bs=150M count=1");
        }
    }
    let promised = 96 + overhead_mib(&cluster);
    assert_eq!(cgroup_number(&pod, "/kubepods", "memory.max"), promised * MIB);
    assert_eq!(pod.container("c")["restartCount"], 0);
}

#[test]
fn limits_of_a_pod_as_a_whole() {
    let cluster = Cluster::get();
    let pod = Pod::run(
        &cluster,
        "whole",
        &json!({
            "resources": {"limits": {"memory": "80Mi", "cpu": "500m"}},
            "containers": [container("c", &Value::Null), container("d", &Value::Null)],
        }),
    );
    assert_eq!(cgroup_number(&pod, "/kubepods", "memory.max"), (80 + overhead_mib(&cluster)) * MIB);
    // Together they have no more than the pod.
    let killed = pod.exec("dd if=/dev/zero of=/dev/null bs=100M count=1");
    assert_eq!(killed.code, 137, "{}", killed.stderr);
    assert_eq!(pod.sh("echo lives"), "lives");
}

#[test]
fn a_hog_does_not_starve_its_neighbour() {
    let cluster = Cluster::get();
    let burn = "while :; do :; done";
    let burns = |cpu: &str| {
        let burning = json!({"command": ["sh", "-c", burn], "resources": {"requests": {"cpu": cpu}}});
        json!({"terminationGracePeriodSeconds": 0, "containers": [container("c", &burning)]})
    };
    let small = Pod::run(&cluster, "share-100", &burns("50m"));
    let large = Pod::run(&cluster, "share-300", &burns("250m"));
    let usage = |pod: &Pod| {
        let path = format!("/sys/fs/cgroup/kubepods/burstable/pod{}/cpu.stat", pod.uid());
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        text.split_whitespace().nth(1).and_then(|word| word.parse::<f64>().ok()).expect("microseconds")
    };
    let before = (usage(&small), usage(&large));
    let since = std::time::Instant::now();
    wait_until("20 s of rivalry", || since.elapsed().as_secs() >= 20);
    let (small_used, large_used) = (usage(&small) - before.0, usage(&large) - before.1);
    let weight = |pod: &Pod| cgroup_number(pod, "/kubepods/burstable", "cpu.weight") as f64;
    let (ratio, promised) = (large_used / small_used, weight(&large) / weight(&small));
    eprintln!("{large_used:.0} µs against {small_used:.0} µs: {ratio:.2} to one, by weights {promised:.2}");
    assert!(promised > 1.5 && (0.75..1.33).contains(&(ratio / promised)), "{ratio}");
}

/// The pod's entry of `/stats/summary`.
fn summary(cluster: &Cluster, pod: &str) -> Value {
    let summary = cluster.at("/api/v1/nodes/node1/proxy/stats/summary");
    let pods = summary["pods"].as_array().cloned().unwrap_or_default();
    pods.into_iter().find(|entry| entry["podRef"]["name"] == pod).unwrap_or(Value::Null)
}

fn tells_usage(cluster: &Cluster, pod: &str, more: &[&str]) {
    let told = |pointer: &str| summary(cluster, pod).pointer(pointer).and_then(Value::as_u64) > Some(0);
    for pointer in [
        "/cpu/usageCoreNanoSeconds",
        "/memory/workingSetBytes",
        "/containers/0/cpu/usageCoreNanoSeconds",
        "/containers/0/memory/workingSetBytes",
        "/containers/0/rootfs/usedBytes",
        "/ephemeral-storage/usedBytes",
    ]
    .iter()
    .chain(more)
    {
        cluster.eventually(&format!("{pointer} to be told"), || told(pointer));
    }
}

#[test]
fn stats_summary_by_the_kubelets_defaults() {
    let cluster = Cluster::get();
    let pod = Pod::run(&cluster, "summary", &json!({}));
    pod.sh("echo something > /file");
    // Traffic is cAdvisor's there, which looks into no runtime's pods but those of Docker, containerd and CRI-O.
    tells_usage(&cluster, &pod.name, &[]);
}

#[test]
fn stats_summary_from_the_cri() {
    let cluster = Cluster::get();
    cluster.restart_kubelet_with(&json!({"featureGates": {"PodAndContainerStatsFromCRI": true}}));
    let pod = Pod::run(&cluster, "summary-cri", &json!({}));
    pod.sh("echo something > /file");
    tells_usage(&cluster, &pod.name, &["/network/rxBytes"]);
    let metrics = cluster.kubectl(["get", "--raw", "/api/v1/nodes/node1/proxy/metrics/cadvisor"]).ok();
    let line = "container_memory_working_set_bytes{container=\"c\"";
    assert!(metrics.lines().any(|of| of.starts_with(line) && of.contains("summary-cri")), "no {line}");
    drop(pod);
    cluster.restart_kubelet_with(&Value::Null);
}

#[test]
fn too_much_ephemeral_storage_evicts() {
    let cluster = Cluster::get();
    let limits = json!({"resources": {"limits": {"ephemeral-storage": "10Mi"}}});
    let pod = Pod::run(&cluster, "storage", &json!({"containers": [container("c", &limits)]}));
    let beside = Pod::run(&cluster, "storage-beside", &json!({"containers": [container("c", &limits)]}));
    // The pod may be evicted before the command has ended.
    let _outcome = pod.exec("dd if=/dev/zero of=/large bs=1M count=40 2>/dev/null; sync");
    cluster.eventually("the eviction", || pod.object()["status"]["reason"] == "Evicted");
    let message = pod.object()["status"]["message"].clone();
    assert!(message.as_str().is_some_and(|text| text.contains("ephemeral")), "{message}");
    assert_eq!(beside.object()["status"]["phase"], "Running");
}

#[test]
fn too_little_memory_evicts_who_took_it() {
    let cluster = Cluster::get();
    let modest = Pod::run(&cluster, "modest", &json!({"containers": [container("c", &limited("64Mi", "100m"))]}));
    let available = || {
        let summary = cluster.at("/api/v1/nodes/node1/proxy/stats/summary");
        summary["node"]["memory"]["availableBytes"].as_u64().unwrap_or_else(|| panic!("{}", summary["node"])) / MIB
    };
    let least = available() - 300;
    cluster.restart_kubelet_with(&json!({
        "evictionHard": {"memory.available": format!("{least}Mi")},
        "evictionPressureTransitionPeriod": "5s",
    }));
    // Memory that a container keeps for itself: a volume of the guest's memory.
    let fill = json!({
        "command": ["sh", "-c", "dd if=/dev/urandom of=/memory/fill bs=1M count=400; sleep 100000"],
        "volumeMounts": [{"name": "memory", "mountPath": "/memory"}],
    });
    let greedy = Pod::create(
        &cluster,
        "greedy",
        &json!({
            "volumes": [{"name": "memory", "emptyDir": {"medium": "Memory"}}],
            "containers": [container("c", &fill)],
        }),
    );
    cluster.eventually("the eviction", || greedy.object()["status"]["reason"] == "Evicted");
    assert_eq!(modest.object()["status"]["phase"], "Running");
    greedy.remove();
    cluster.restart_kubelet_with(&Value::Null);
    cluster.eventually("the pressure to be over", || {
        let conditions = cluster.object("node", "node1")["status"]["conditions"].clone();
        let of_memory = conditions.as_array().into_iter().flatten().find(|one| one["type"] == "MemoryPressure");
        of_memory.is_some_and(|condition| condition["status"] == "False")
    });
}
