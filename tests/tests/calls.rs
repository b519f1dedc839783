//! Calls that `crictl` and critest do not make, as a kubelet makes them.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cri_shim::cri::proto::{
    ContainerConfig, ContainerMetadata, ContainerStatsRequest, CreateContainerRequest, ImageSpec,
    LinuxContainerResources, ListMetricDescriptorsRequest, ListPodSandboxMetricsRequest, Metric, PodSandboxMetrics,
    UpdatePodSandboxResourcesRequest,
};
use pericarp_tests::{Client, Node, Terminal, image, status_of, wait_until};
use serde_json::json;
use tonic::{Code, Status};

const MIB: i64 = 1 << 20;

/// A command that has this much memory at once, in busybox's words.
const HUNDRED_MIB: [&str; 4] = ["dd", "if=/dev/zero", "of=/dev/null", "bs=100M"];

fn metrics(client: &mut Client) -> Vec<PodSandboxMetrics> {
    let request = ListPodSandboxMetricsRequest {};
    client.ask(async |cri| cri.list_pod_sandbox_metrics(request).await).expect("answers").into_inner().pod_metrics
}

fn value(metrics: &[Metric], name: &str) -> u64 {
    let metric = metrics.iter().find(|metric| metric.name == name).unwrap_or_else(|| panic!("no {name}: {metrics:?}"));
    metric.value.expect("a metric has a value").value
}

#[test]
fn metrics_are_cadvisors_and_the_guests() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let mut client = Client::connect(&node.socket());
    let request = ListMetricDescriptorsRequest {};
    let descriptors = client.ask(async |cri| cri.list_metric_descriptors(request).await).expect("answers").into_inner();
    let keys: BTreeMap<_, _> =
        descriptors.descriptors.into_iter().map(|found| (found.name, found.label_keys)).collect();
    assert!(metrics(&mut client).is_empty(), "no pods, no metrics");

    let pod = node.run_pod("measured", &json!({}));
    let busy = "yes >/dev/null & sleep 1000";
    let container = node.run_container(&pod, "measured", "busy", image::BUSYBOX, &["sh", "-c", busy]);
    let mut of_container = Vec::new();
    wait_until("two seconds of CPU time", || {
        let mut pods = metrics(&mut client);
        assert_eq!((pods.len(), pods[0].pod_sandbox_id.as_str()), (1, pod.as_str()));
        let metrics = pods.remove(0);
        for metric in metrics.metrics.iter().chain(metrics.container_metrics.iter().flat_map(|of| &of.metrics)) {
            assert_eq!(metric.label_values.len(), keys[&metric.name].len(), "{metric:?}");
        }
        assert!(metrics.metrics.iter().any(|metric| metric.name == "container_network_receive_bytes_total"));
        let of = metrics.container_metrics.into_iter().find(|of| of.container_id == container);
        of_container = of.expect("the container runs").metrics;
        value(&of_container, "container_cpu_usage_seconds_total") >= 2
    });
    let find = |name: &str| of_container.iter().find(|metric| metric.name == name).expect("is there");
    let labels = &find("container_memory_rss").label_values;
    assert_eq!((labels[0].as_str(), labels[4].as_str(), labels[5].as_str()), ("busy", "test", "measured"));
    assert_eq!(value(&of_container, "container_processes"), 2, "yes, and sleep in place of the shell");
    assert!((1..64 << 20).contains(&value(&of_container, "container_memory_working_set_bytes")));
    assert_eq!(value(&of_container, "container_oom_events_total"), 0);

    let info = &node.inspect_pod(&pod)["info"];
    assert!(info["vmm_pid"].as_u64().is_some_and(|pid| pid > 0), "{info}");
    let moments: Vec<&str> =
        info["timeline"].as_array().expect("a list").iter().filter_map(|it| it["name"].as_str()).collect();
    let place =
        |name: &str| moments.iter().position(|moment| *moment == name).unwrap_or_else(|| panic!("{name}: {info}"));
    assert!(place("spawned") < place("kernel_booted") && place("kernel_booted") < place("configured"), "{moments:?}");
    let disks = info["disks"].as_array().expect("a list");
    assert_eq!((disks.len(), disks[0]["image"].is_null(), disks[1]["image"].is_string()), (2, true, true), "{info}");
    node.remove_pod(&pod);
}

fn create_request(pod: &str, name: &str) -> CreateContainerRequest {
    let config = ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(ImageSpec { image: image::BUSYBOX.into(), ..Default::default() }),
        command: vec!["sleep".into(), "1000".into()],
        ..Default::default()
    };
    CreateContainerRequest { pod_sandbox_id: pod.into(), config: Some(config), sandbox_config: None }
}

#[test]
fn a_container_whose_client_has_gone_away_is_not_there() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("left", &json!({}));
    let all = || node.crictl(["ps", "--all", "--quiet"]).ok();
    let mut late = 0;
    // Some before it has begun, some in the middle, perhaps one that is in time.
    for deadline in [1, 5, 15, 30, 60, 90, 120, 200] {
        let request = create_request(&pod, "lonely");
        let method = "runtime.v1.RuntimeService/CreateContainer";
        match status_of(&node.socket(), method, &request, Duration::from_millis(deadline)).code() {
            Code::DeadlineExceeded => {
                late += 1;
                wait_until("the container that nobody knows to be gone", || all().is_empty());
            }
            Code::Ok => drop(node.crictl(["rm", "--force", &all()]).ok()),
            other => panic!("{deadline} ms: {other}"),
        }
    }
    println!("{late} of 8 were late");
    assert!(late >= 2, "only {late} were late");
    let container = node.run_container(&pod, "left", "lonely", image::BUSYBOX, &["sleep", "1000"]);
    assert_eq!(all(), container);
    node.remove_pod(&pod);
}

fn resize(client: &mut Client, pod: &str, memory: i64, quota: i64) -> Result<(), Status> {
    let resources = LinuxContainerResources {
        memory_limit_in_bytes: memory,
        cpu_quota: quota,
        cpu_period: 100_000,
        ..Default::default()
    };
    let resources = Some(resources);
    let request = UpdatePodSandboxResourcesRequest { pod_sandbox_id: pod.into(), overhead: None, resources };
    client.ask(async |cri| cri.update_pod_sandbox_resources(request).await).map(drop)
}

#[test]
fn a_pods_limits_change_while_it_runs() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let mut client = Client::connect(&node.socket());
    let limits = json!({"linux": {"resources": {"memory_limit_in_bytes": 256 * MIB, "cpu_quota": 100_000}}});
    let pod = node.run_pod("resized", &limits);
    let container = node.run_container(&pod, "resized", "c", image::BUSYBOX, &["sleep", "1000"]);
    let uses_memory = || {
        let command = [&["exec", "--sync", &container][..], &HUNDRED_MIB, &["count=1"]].concat();
        node.crictl(command).code == 0
    };
    assert!(uses_memory());
    resize(&mut client, &pod, 64 * MIB, 50_000).expect("it fits");
    assert!(!uses_memory(), "it is over the new limit");
    resize(&mut client, &pod, 200 * MIB, 50_000).expect("it fits");
    assert!(uses_memory());

    let too_little = resize(&mut client, &pod, 4096, 0).expect_err("more is in use");
    assert_eq!(too_little.code(), Code::FailedPrecondition, "{too_little}");
    let nobody = resize(&mut client, "nobody", MIB, 0).expect_err("there is no such pod");
    assert_eq!(nobody.code(), Code::NotFound, "{nobody}");
    assert!(uses_memory(), "what is refused changes nothing");
    node.remove_pod(&pod);
}

#[test]
fn root_of_a_user_namespace_owns_its_container_and_nothing_else() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let mapping = json!([{"container_id": 0, "host_id": 70_000, "length": 65_536}]);
    let users = json!({"pid": 1, "userns_options": {"mode": 0, "uids": mapping, "gids": mapping}});
    let context = json!({"linux": {"security_context": {"namespace_options": users}}});
    let pod = node.run_pod("mapped", &context);
    let files = node.directory().join("mapped-files");
    fs::create_dir_all(&files).expect("the test's directory is writable");
    fs::write(files.join("key"), "value").expect("the test's directory is writable");
    fs::set_permissions(files.join("key"), Permissions::from_mode(0o600)).expect("it is ours");
    let mount = json!({"container_path": "/files", "host_path": files, "readonly": true,
                       "uidMappings": mapping, "gidMappings": mapping});
    let more = json!({"mounts": [mount], "linux": {"security_context": {"namespace_options": users}}});
    let config = node.container_config("c", image::BUSYBOX, &["sleep", "1000"], &more);
    let path = |path: &Path| path.to_str().expect("a plain path").to_owned();
    let pod_config = node.pod_config("mapped", &context);
    let container = node.crictl(["create", "--no-pull", &pod, &path(&config), &path(&pod_config)]).ok();
    node.crictl(["start", &container]).ok();
    let run = |script: &str| node.crictl(["exec", "--sync", &container, "sh", "-c", script]).ok();

    assert_eq!(run("cat /proc/self/uid_map").split_whitespace().collect::<Vec<_>>(), ["0", "70000", "65536"]);
    assert_eq!(run("cat /proc/1/gid_map"), run("cat /proc/self/gid_map"), "the container's own process has it too");
    let owner = |path: &str| run(&format!("stat -c '%u:%g' {path}"));
    for path in ["/", "/bin/busybox", "/dev", "/dev/null", "/etc/hosts", "/files/key", "/proc/1/status"] {
        assert_eq!(owner(path), "0:0", "{path}");
    }
    assert_eq!(owner("/proc/sys/kernel"), "65534:65534", "the guest's root is nobody here");
    assert_eq!(run("cat /files/key"), "value");
    // What it writes, changes and gives away is its own.
    assert_eq!(run("mkdir -p /new/dir && chown 33:33 /new/dir && stat -c %u:%g /new /new/dir"), "0:0\n33:33");
    run("chown 1:2 /bin/busybox && test $(stat -c %u:%g /bin/busybox) = 1:2");
    // Ports below 1024, as in a network namespace of its own.
    run("nc -l -p 80 </dev/null >/dev/null & sleep 1; netstat -ltn | grep -q ':80 '; kill $!");
    // Its terminals are its own too.
    let mut exec = node.crictl_command();
    exec.args(["exec", "-it", &container, "sh", "-c", "stat -c owner=%u:%g $(tty); echo open >/dev/tty"]);
    let mut terminal = Terminal::run(&exec, 24, 80);
    terminal.wait_for("owner=0:5", 1);
    terminal.wait_for("open", 1);
    assert!(terminal.wait().success(), "{}", terminal.screen());
    node.crictl(["exec", "--sync", &container, "sh", "-c", "umount /proc"]).refused();
    node.crictl(["exec", "--sync", &container, "sh", "-c", "hostname other"]).refused();
    node.remove_pod(&pod);
}

/// Exchanges the files of a volume as a kubelet does.
fn exchange(volume: &Path, version: &str, keys: &[(&str, &str)]) {
    let data = volume.join(format!("..{version}"));
    fs::create_dir_all(&data).expect("the test's directory is writable");
    for (key, value) in keys {
        fs::write(data.join(key), value).expect("the test's directory is writable");
    }
    let old = fs::read_link(volume.join("..data")).ok();
    symlink(format!("..{version}"), volume.join("..data_tmp")).expect("the test's directory is writable");
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).expect("the test's directory is writable");
    for (key, _) in keys {
        let link = volume.join(key);
        if fs::symlink_metadata(&link).is_err() {
            symlink(format!("..data/{key}"), link).expect("the test's directory is writable");
        }
    }
    if let Some(old) = old {
        fs::remove_dir_all(volume.join(old)).expect("the test's directory is writable");
    }
}

/// Nanoseconds of a log line's time within its day.
fn logged_at(line: &str) -> u64 {
    let time = line.split(['T', 'Z']).nth(1).expect("a log line begins with a time");
    let (seconds, fraction) = time.split_once('.').expect("nanoseconds");
    let seconds = seconds.split(':').fold(0, |sum, part| sum * 60 + part.parse::<u64>().expect("a number"));
    seconds * 1_000_000_000 + fraction.parse::<u64>().expect("a number")
}

fn now_in_day() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later");
    u64::try_from(now.as_nanos() % (86_400 * 1_000_000_000)).expect("a day is short")
}

#[test]
fn a_volumes_new_files_reach_containers_within_a_second() {
    /// Says each new value, and what a reader must never see.
    const WATCHER: &str = "while :; do n=$(cat /config/key 2>/dev/null || echo MISSING); \
                           [ \"$n\" = \"$v\" ] || echo \"$n\"; v=$n; sleep 0.02; done";
    let mut node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let volume = node.directory().join("volume");
    exchange(&volume, "v1", &[("key", "one"), ("old", "x")]);
    let pod = node.run_pod("config", &json!({}));
    let mount = json!({"mounts": [{"container_path": "/config", "host_path": volume, "readonly": true}]});
    let config = node.container_config("c", image::BUSYBOX, &["sh", "-c", WATCHER], &mount);
    let path = |path: &Path| path.to_str().expect("a plain path").to_owned();
    let pod_config = node.directory().join("pod-config.json");
    let container = node.crictl(["create", "--no-pull", &pod, &path(&config), &path(&pod_config)]).ok();
    node.crictl(["start", &container]).ok();
    wait_until("the first value", || node.log("config", "c").contains(" one"));

    let said = |node: &Node, value: &str| {
        wait_until(value, || node.log("config", "c").contains(&format!(" {value}")));
        let log = node.log("config", "c");
        logged_at(log.lines().find(|line| line.ends_with(&format!(" {value}"))).expect("it is there"))
    };
    let mut exchanged = now_in_day();
    exchange(&volume, "v2", &[("key", "two"), ("new", "y")]);
    let late = said(&node, "two").saturating_sub(exchanged);
    println!("new files after {} ms", late / 1_000_000);
    assert!(late < 1_000_000_000, "after {late} ns");
    let run = |node: &Node, script: &str| node.crictl(["exec", "--sync", &container, "sh", "-c", script]).ok();
    assert_eq!(run(&node, "readlink /config/..data; cat /config/new"), "..v2\ny");
    let listed = run(&node, "ls -A /config");
    assert!(!listed.contains("..v1") && listed.contains("..v2"), "{listed}");

    // A daemon that starts anew goes on, and brings what it has missed.
    node.kill_daemon();
    exchange(&volume, "v3", &[("key", "three"), ("new", "y")]);
    node.start_daemon();
    said(&node, "three");
    exchanged = now_in_day();
    exchange(&volume, "v4", &[("key", "four"), ("new", "y")]);
    let late = said(&node, "four").saturating_sub(exchanged);
    println!("new files after {} ms with a new daemon", late / 1_000_000);
    assert!(late < 1_000_000_000, "after {late} ns");
    assert!(
        !node.log("config", "c").contains("MISSING"),
        "a file was missing for a moment: {}",
        node.log("config", "c")
    );
    node.crictl(["exec", "--sync", &container, "touch", "/config/x"]).refused();
    node.remove_pod(&pod);
}

#[test]
fn what_a_container_writes_is_counted() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let mut client = Client::connect(&node.socket());
    let pod = node.run_pod("writer", &json!({}));
    let container = node.run_container(&pod, "writer", "c", image::BUSYBOX, &["sleep", "1000"]);
    let mut layer = || {
        let request = ContainerStatsRequest { container_id: container.clone() };
        let stats = client.ask(async |cri| cri.container_stats(request).await).expect("answers").into_inner().stats;
        let layer = stats.and_then(|stats| stats.writable_layer).expect("it is counted");
        let directory = layer.fs_id.expect("it is somewhere").mountpoint;
        assert!(fs::metadata(&directory).is_ok_and(|found| found.is_dir()), "{directory}");
        (layer.used_bytes.expect("bytes").value, layer.inodes_used.expect("inodes").value)
    };
    let run = |script: &str| node.crictl(["exec", "--sync", &container, "sh", "-c", script]).ok();
    let (empty_bytes, empty_inodes) = layer();
    // 8 MiB under two names, a hole of 1 GiB, 300 files in directories of their own.
    run("dd if=/dev/urandom of=/data bs=1M count=8; ln /data /again; truncate -s 1G /hole");
    run("i=0; while [ $i -lt 300 ]; do mkdir -p /d/$i && : >/d/$i/f; i=$((i+1)); done");
    let written = Instant::now();
    let (least, most) = (8 << 20, (8 << 20) + (2 << 20));
    wait_until("the count of what was written", || {
        let (bytes, inodes) = layer();
        let (bytes, inodes) = (bytes - empty_bytes, inodes - empty_inodes);
        (least..most).contains(&bytes) && inodes == 2 + 1 + 600
    });
    println!("counted after {:?}", written.elapsed());
    assert!(written.elapsed() < Duration::from_secs(10));
    run("rm -r /d /hole /again /data");
    wait_until("the count of what is left", || layer().1 <= empty_inodes + 5);
    node.remove_pod(&pod);
}
