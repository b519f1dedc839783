//! A pod's memory and CPUs grow and shrink while it runs, and what the guest does not use goes back to the host.

use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::{SystemTime, UNIX_EPOCH};

use cri_shim::cri::proto::{
    LinuxContainerResources, UpdateContainerResourcesRequest, UpdatePodSandboxResourcesRequest,
};
use nix::unistd::Pid;
use pericarp_tests::{Client, Node, Settings, image, wait_until};
use serde_json::{Value, json};
use tonic::{Code, Status};

const MIB: i64 = 1 << 20;

/// What is added to a pod's limit for its guest, and to that for its VMM (`guest_overhead_mib`, docs/architecture.md).
const OVERHEADS: [i64; 2] = [64 * MIB, 64 * MIB];

fn limits(memory: i64, quota: i64) -> Value {
    json!({"linux": {"resources": {"memory_limit_in_bytes": memory, "cpu_quota": quota, "cpu_period": 100_000}}})
}

fn resources(memory: i64, quota: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        memory_limit_in_bytes: memory,
        cpu_quota: quota,
        cpu_period: 100_000,
        ..Default::default()
    }
}

fn resize_pod(client: &mut Client, pod: &str, memory: i64, quota: i64) -> Result<(), Status> {
    let resources = Some(resources(memory, quota));
    let request = UpdatePodSandboxResourcesRequest { pod_sandbox_id: pod.into(), overhead: None, resources };
    client.ask(async |cri| cri.update_pod_sandbox_resources(request).await).map(drop)
}

fn resize_container(client: &mut Client, container: &str, memory: i64) -> Result<(), Status> {
    let request = UpdateContainerResourcesRequest {
        container_id: container.into(),
        linux: Some(resources(memory, 0)),
        ..Default::default()
    };
    client.ask(async |cri| cri.update_container_resources(request).await).map(drop)
}

/// A pod and its container, from outside and inside.
struct Rig<'n> {
    node: &'n Node,
    pod: String,
    container: String,
}

impl<'n> Rig<'n> {
    /// A pod whose only container sleeps.
    fn start(node: &'n Node, name: &str, pod: &Value, container: &Value) -> Self {
        let id = node.run_pod(name, pod);
        let config = node.container_config("c", image::BUSYBOX, &["sleep", "1000"], container);
        let pod_config = node.pod_config(name, pod);
        let [config, pod_config] = [config, pod_config].map(|path| path.to_str().expect("a plain path").to_owned());
        let container = node.crictl(["create", "--no-pull", &id, &config, &pod_config]).ok();
        node.crictl(["start", &container]).ok();
        Self { node, pod: id, container }
    }

    fn sh(&self, script: &str) -> String {
        self.node.crictl(["exec", "--sync", &self.container, "sh", "-c", script]).ok()
    }

    /// Whether a process can have so many MiB at once.
    fn can_use(&self, mib: i64) -> bool {
        let script = format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1");
        self.node.crictl(["exec", "--sync", &self.container, "sh", "-c", &script]).code == 0
    }

    /// Memory of the guest in MiB, as its kernel tells it.
    fn guest_mib(&self) -> i64 {
        let text = self.sh("grep MemTotal /proc/meminfo");
        let kib: i64 = text.split_whitespace().nth(1).expect("a number").parse().expect("a number");
        kib / 1024
    }

    fn cpus(&self) -> String {
        self.sh("grep -c ^processor /proc/cpuinfo")
    }

    /// Bytes that the host allows the VM.
    fn host_limit(&self) -> i64 {
        let file = format!("/sys/fs/cgroup/pericarp/pericarp-{}/memory.max", self.pod);
        fs::read_to_string(file).expect("the pod has a cgroup").trim().parse().expect("a number")
    }

    /// MiB that the VMM's process has, its guest's memory above all.
    fn host_mib(&self) -> i64 {
        mib_of(self.node.vmm_pid(&self.pod))
    }
}

fn mib_of(process: Pid) -> i64 {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).expect("the VMM runs");
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:")).expect("it has memory");
    line.split_whitespace().next().expect("a number").parse::<i64>().expect("a number") / 1024
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later").as_secs_f64()
}

fn host_limit(memory: i64) -> i64 {
    memory + OVERHEADS.iter().sum::<i64>()
}

/// A node that has the image, with `keys` added to its configuration, and a client of it.
fn node_with(keys: &str) -> (Node, Client) {
    let node = Node::start_with(&Settings { keys: keys.into(), ..Settings::default() });
    node.crictl(["pull", image::BUSYBOX]).ok();
    let client = Client::connect(&node.socket());
    (node, client)
}

#[test]
fn a_pods_memory_grows_and_shrinks_under_any_daemon() {
    let mut node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let mut client = Client::connect(&node.socket());
    let (small, large) = (256 * MIB, 1024 * MIB);
    let rig = Rig::start(&node, "grows", &limits(small, 100_000), &Value::Null);
    assert!((250..320).contains(&rig.guest_mib()), "{} MiB", rig.guest_mib());
    assert!(rig.can_use(150) && !rig.can_use(600));
    assert_eq!(rig.host_limit(), host_limit(small));

    resize_pod(&mut client, &rig.pod, large, 100_000).expect("the host has that");
    assert!((950..1088).contains(&rig.guest_mib()), "{} MiB", rig.guest_mib());
    assert_eq!(rig.host_limit(), host_limit(large));
    assert!(rig.can_use(600), "the workload has what the limit promises");

    let (pod, container) = (rig.pod.clone(), rig.container.clone());
    node.kill_daemon();
    node.start_daemon();
    let rig = Rig { node: &node, pod, container };
    let mut client = Client::connect(&node.socket());
    resize_pod(&mut client, &rig.pod, small, 100_000).expect("nothing uses it any more");
    println!("{} MiB in the guest, {} of the host's", rig.guest_mib(), rig.host_mib());
    assert!((250..320).contains(&rig.guest_mib()), "{} MiB", rig.guest_mib());
    assert_eq!(rig.host_limit(), host_limit(small));
    assert!(rig.host_mib() <= 320 + 16, "{} MiB", rig.host_mib());
    assert!(rig.can_use(150) && !rig.can_use(600));

    resize_pod(&mut client, &rig.pod, large, 100_000).expect("as before");
    assert!(rig.can_use(600));
    let too_little = resize_pod(&mut client, &rig.pod, 4096, 0).expect_err("more is in use");
    assert_eq!(too_little.code(), Code::FailedPrecondition, "{too_little}");
    assert!(rig.can_use(600), "what is refused changes nothing");
    node.remove_pod(&rig.pod);
}

#[test]
fn a_container_that_may_use_more_than_its_pod_has_makes_it_grow() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let mut client = Client::connect(&node.socket());
    let rig = Rig::start(&node, "asks", &json!({}), &limits(1024 * MIB, 0));
    assert!((950..1088).contains(&rig.guest_mib()), "{} MiB", rig.guest_mib());
    assert!(rig.can_use(700));
    resize_container(&mut client, &rig.container, 1536 * MIB).expect("the host has that");
    assert!((1400..1600).contains(&rig.guest_mib()), "{} MiB", rig.guest_mib());
    assert!(rig.can_use(1200));
    resize_container(&mut client, &rig.container, 128 * MIB).expect("nothing uses it any more");
    assert!((450..512).contains(&rig.guest_mib()), "the default of a pod: {} MiB", rig.guest_mib());
    assert!(rig.can_use(64) && !rig.can_use(200));
    node.remove_pod(&rig.pod);
}

#[test]
fn what_a_guest_frees_the_host_has_within_ten_seconds() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let rig = Rig::start(&node, "frees", &limits(1280 * MIB, 0), &Value::Null);
    let vmm = node.vmm_pid(&rig.pod);
    let before = mib_of(vmm);
    // 90 % of 1 GiB, freed when the process ends, which the guest says by its clock.
    let script = "dd if=/dev/zero of=/dev/null bs=922M count=1 2>/dev/null && date +%s";
    let mut exec = node.crictl_command();
    exec.args(["exec", "--sync", &rig.container, "sh", "-c", script]).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut exec = exec.spawn().expect("crictl is installed");
    let mut history = Vec::new();
    wait_until("the process to have its memory and to end", || {
        history.push((now(), mib_of(vmm)));
        exec.try_wait().expect("it is our child").is_some()
    });
    let freed_at: f64 =
        io::read_to_string(exec.stdout.take().expect("a pipe")).expect("text").trim().parse().expect("seconds");
    let peak = history.iter().map(|(_, mib)| *mib).max().expect("it was looked at");
    assert!(peak >= before + 900, "{before} MiB, then {peak}");
    wait_until("90 % of it to be the host's again", || {
        history.push((now(), mib_of(vmm)));
        mib_of(vmm) <= peak - 922 * 9 / 10
    });
    history.dedup_by_key(|(_, mib)| *mib);
    let by_time: Vec<_> = history.iter().map(|(at, mib)| format!("{:.1} s {mib}", at - freed_at)).collect();
    println!("MiB of the host's, from the second on in which 922 were freed: {}", by_time.join(", "));
    // Part of that second had passed.
    assert!(now() - freed_at < 11.0, "{by_time:?}");
    assert!(rig.can_use(922), "it can be used again");
    node.remove_pod(&rig.pod);
}

#[test]
fn cpus_come_and_go_with_the_limit() {
    let (node, mut client) = node_with("max_vcpus = 3");
    let rig = Rig::start(&node, "cpus", &limits(256 * MIB, 100_000), &Value::Null);
    assert_eq!(rig.cpus(), "1");
    for (quota, cpus) in [(250_000, "3"), (150_000, "2"), (50_000, "1"), (200_000, "2")] {
        resize_pod(&mut client, &rig.pod, 256 * MIB, quota).expect("the VM has them");
        assert_eq!(rig.cpus(), cpus, "{quota}");
    }
    node.remove_pod(&rig.pod);
}

#[test]
fn each_cpu_has_queues_of_disk_and_network() {
    const CONNECTIONS: usize = 64;
    let (node, mut client) = node_with("max_vcpus = 3");
    let rig = Rig::start(&node, "queues", &limits(256 * MIB, 300_000), &Value::Null);
    assert_eq!(rig.cpus(), "3");
    let queues = || rig.sh("ls /sys/class/net/eth0/queues");
    assert_eq!(queues(), "rx-0\nrx-1\nrx-2\ntx-0\ntx-1\ntx-2");
    assert_eq!(rig.sh("ls /sys/block/vda/mq"), "0\n1\n2");

    // Connections from outside, which the host spreads, and a file written on each CPU.
    rig.sh("mkdir /www; echo served > /www/index.html; httpd -p 80 -h /www");
    let ip = node.inspect_pod(&rig.pod)["status"]["network"]["ip"].as_str().expect("an address").to_owned();
    for _ in 0..CONNECTIONS {
        let mut connection = TcpStream::connect((ip.as_str(), 80)).expect("it serves");
        connection.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("it reads");
        let mut page = String::new();
        connection.read_to_string(&mut page).expect("it answers");
        assert!(page.ends_with("served\n"), "{page}");
    }
    for mask in [1, 2, 4] {
        rig.sh(&format!("taskset {mask} dd if=/dev/zero of=/file{mask} bs=64k count=4 conv=fsync"));
    }
    let interrupts = rig.sh("cat /proc/interrupts");
    for queue in ["input.0", "input.1", "input.2", "output.0", "output.1", "output.2", "req.0", "req.1", "req.2"] {
        let line = interrupts.lines().find(|line| line.ends_with(queue));
        let line = line.unwrap_or_else(|| panic!("no vector for {queue}: {interrupts}"));
        let count: u64 = line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()).sum();
        // A NIC interrupts for what it has sent only where the guest runs out of room.
        assert!(count > 0 || queue.starts_with("output"), "{queue} had nothing to do: {interrupts}");
    }

    resize_pod(&mut client, &rig.pod, 256 * MIB, 200_000).expect("the VM can");
    assert_eq!(queues(), "rx-0\nrx-1\ntx-0\ntx-1");
    assert_eq!(rig.sh("wget -q -O - http://localhost/"), "served");
    let mut connection = TcpStream::connect((ip.as_str(), 80)).expect("it still serves");
    connection.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("it reads");
    node.remove_pod(&rig.pod);
}

#[test]
fn a_pod_does_not_outgrow_what_the_host_allows() {
    let (node, mut client) = node_with("max_memory_mib = 640");
    let rig = Rig::start(&node, "bounded", &limits(256 * MIB, 0), &Value::Null);
    let too_much = resize_pod(&mut client, &rig.pod, 2048 * MIB, 0).expect_err("the configuration says so");
    assert_eq!(too_much.code(), Code::ResourceExhausted, "{too_much}");
    assert!(too_much.message().contains("max_memory_mib"), "{too_much}");
    assert_eq!(rig.host_limit(), host_limit(256 * MIB));
    assert!(rig.can_use(150), "what is refused changes nothing");
    resize_pod(&mut client, &rig.pod, 512 * MIB, 0).expect("it fits");
    assert!(rig.can_use(350));
    let nobody = resize_pod(&mut client, "nobody", MIB, 0).expect_err("there is no such pod");
    assert_eq!(nobody.code(), Code::NotFound, "{nobody}");
    node.remove_pod(&rig.pod);
}
