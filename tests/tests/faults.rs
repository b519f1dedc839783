//! A host that fails under a pod: its disk, its memory. The pod is told, or ended with the true reason, and nothing else happens.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pericarp_tests::{Node, Settings, image, wait_until};
use serde_json::json;

const BYTES: u64 = 16 << 20;

/// What a slow disk takes for each read.
const DELAY: Duration = Duration::from_millis(500);

/// Those that read from it at once: as many as a shell has descriptors of one digit for, from 3 on.
const LAST_READER: u32 = 9;
const READERS: u32 = LAST_READER - 2;

/// A disk of the host's that can be made to fail or be slow: a device mapper's over a loop device.
struct Failing {
    device: String,
    name: &'static str,
}

impl Failing {
    fn new(name: &'static str, file: &Path) -> Self {
        File::create(file).and_then(|file| file.set_len(BYTES)).expect("the test's directory is writable");
        let device = run(&["losetup", "--find", "--show", file.to_str().expect("a plain path")]);
        let failing = Self { device, name };
        run(&["dmsetup", "create", name, "--table", &failing.table("linear")]);
        failing
    }

    fn table(&self, target: &str) -> String {
        match target {
            "linear" => format!("0 {} linear {} 0", BYTES / 512, self.device),
            // Reads take as long, writes no time.
            "delay" => {
                format!("0 {} delay {} 0 {} {} 0 0", BYTES / 512, self.device, DELAY.as_millis(), self.device)
            }
            _ => format!("0 {} error", BYTES / 512),
        }
    }

    /// What it does from now on.
    fn become_one(&self, target: &str) {
        run(&["dmsetup", "suspend", "--noflush", self.name]);
        run(&["dmsetup", "load", self.name, "--table", &self.table(target)]);
        run(&["dmsetup", "resume", self.name]);
    }

    fn path(&self) -> String {
        // The name below /dev/mapper is a link where udev is, and nothing where it is not.
        format!("/dev/dm-{}", run(&["dmsetup", "info", "--columns", "--noheadings", "--options", "minor", self.name]))
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        let _ = Command::new("dmsetup").args(["remove", "--force", "--retry", self.name]).output();
        let _ = Command::new("losetup").args(["--detach", &self.device]).output();
    }
}

fn run(arguments: &[&str]) -> String {
    let done = Command::new(arguments[0]).args(&arguments[1..]).output().expect("it is installed");
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).trim().to_owned()
}

/// A container that has the disk as /dev/data.
fn with_disk(node: &Node, pod: &str, name: &str, disk: &Failing) -> String {
    let devices = json!([{"container_path": "/dev/data", "host_path": disk.path(), "permissions": "mrw"}]);
    let config = node.container_config("c", image::BUSYBOX, &["sleep", "1000"], &json!({"devices": devices}));
    let pod_config = node.pod_config(name, &json!({}));
    let path = |path: &PathBuf| path.to_str().expect("a plain path").to_owned();
    let container = node.crictl(["create", "--no-pull", pod, &path(&config), &path(&pod_config)]).ok();
    node.crictl(["start", &container]).ok();
    container
}

#[test]
fn a_disk_that_fails_is_an_error_in_the_guest_and_nothing_more() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let disk = Failing::new("pericarp-failing", &node.directory().join("failing"));
    let pod = node.run_pod("failing", &json!({}));
    let container = with_disk(&node, &pod, "failing", &disk);
    let exec = |script: &str| node.crictl(["exec", "--sync", &container, "sh", "-c", script]);
    let write = "dd if=/dev/zero of=/dev/data bs=4096 count=16 conv=fsync 2>&1";
    exec(write).ok();
    disk.become_one("error");
    let said = exec(&format!("{write}; echo code $?")).ok();
    assert!(said.contains("Input/output error") && said.contains("code 1"), "{said}");
    // The rest of the pod does not notice, and the disk is there again when it is there again.
    exec("echo still > /tmp/here && sync && cat /tmp/here").ok();
    disk.become_one("linear");
    exec(write).ok();
    node.remove_pod(&pod);
}

#[test]
fn a_slow_disk_is_waited_for_by_each_reader_alone() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let disk = Failing::new("pericarp-slow", &node.directory().join("slow"));
    disk.become_one("delay");
    let pod = node.run_pod("slow", &json!({}));
    let container = with_disk(&node, &pod, "slow", &disk);
    // Each reads a place of its own, so that no cache has it. They go there beforehand: lseek(2) waits for those that read.
    let script = format!(
        "now() {{ cut -d' ' -f1 /proc/uptime | tr -d .; }}; \
         for n in $(seq 3 {LAST_READER}); do eval \"exec $n</dev/data\"; dd bs=4096 skip=$((n * 200)) count=0 <&$n 2>/dev/null; done; \
         begin=$(now); for n in $(seq 3 {LAST_READER}); do dd of=/dev/null bs=4096 count=1 <&$n 2>/dev/null & done; wait; \
         echo $(($(now) - begin))"
    );
    let said = node.crictl(["exec", "--sync", &container, "sh", "-c", &script]).ok();
    let hundredths: u64 = said.trim().parse().unwrap_or_else(|_| panic!("a number: {said}"));
    let took = Duration::from_millis(hundredths * 10);
    println!("{READERS} reads of a disk that takes {DELAY:?} for each: {took:?}");
    assert!(took >= DELAY, "the disk is slow: {took:?}");
    assert!(took < DELAY * READERS / 2, "not one after the other: {took:?}");
    node.remove_pod(&pod);
}

#[test]
fn a_pod_that_has_more_than_its_cgroup_allows_is_ended_with_the_reason() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let before = node.inventory();
    let pod = node.run_pod("greedy", &json!({}));
    let container = node.run_container(&pod, "greedy", "c", image::BUSYBOX, &["sleep", "1000"]);
    let vmm = node.vmm_pid(&pod).as_raw();
    let cgroup = fs::read_to_string(format!("/proc/{vmm}/cgroup")).expect("the VMM runs");
    let leaf = cgroup.lines().find_map(|line| line.strip_prefix("0::")).expect("cgroup v2");
    let leaf = Path::new("/sys/fs/cgroup").join(leaf.trim().trim_start_matches('/'));
    // Less than it has; where the kernel can, it would rather swap.
    let _ = fs::write(leaf.join("memory.swap.max"), "0");
    fs::write(leaf.join("memory.max"), "8M").expect("a cgroup with a memory controller");
    wait_until("the pod to be NotReady", || node.inspect_pod(&pod)["status"]["state"] == "SANDBOX_NOTREADY");
    let status = &node.inspect_container(&container)["status"];
    let message = status["message"].as_str().unwrap_or_default();
    assert!(message.contains("out of memory"), "{status}");
    node.remove_pod(&pod);
    let after = node.inventory();
    assert!(!after.difference(&before).contains("pericarp"), "{}", after.difference(&before));
}

/// A file system in memory, so small that it is soon full.
struct Small(&'static str);

impl Small {
    fn mount(at: &'static str, mib: u32) -> Self {
        fs::create_dir_all(at).expect("/run is writable");
        run(&["mount", "-t", "tmpfs", "-o", &format!("size={mib}m"), "small", at]);
        Self(at)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy", self.0]).output();
    }
}

#[test]
fn a_host_without_room_for_what_pods_write_fails_their_writes() {
    let scratch = Small::mount("/run/pericarp-small", 48);
    let node = Node::start_with(&Settings { keys: format!("scratch_dir = \"{}\"", scratch.0), ..Settings::default() });
    node.crictl(["pull", image::BUSYBOX]).ok();
    let before = node.inventory();
    let start = |name: &str| {
        let pod = node.run_pod(name, &json!({}));
        let container = node.run_container(&pod, name, "c", image::BUSYBOX, &["sleep", "1000"]);
        (pod, container)
    };
    let (modest, greedy) = (start("modest"), start("greedy"));
    let fill = "dd if=/dev/zero of=/fill bs=1M count=200 conv=fsync 2>&1; echo code $?";
    let said = node.crictl(["exec", "--sync", &greedy.1, "sh", "-c", fill]).ok();
    assert!(said.contains("code 1"), "{said}");
    for (_, container) in [&modest, &greedy] {
        assert_eq!(node.crictl(["exec", "--sync", container, "echo", "lives"]).ok().trim(), "lives");
    }
    // What the one took, the other has again.
    node.remove_pod(&greedy.0);
    let write = "dd if=/dev/zero of=/file bs=1M count=8 conv=fsync 2>&1";
    node.crictl(["exec", "--sync", &modest.1, "sh", "-c", write]).ok();
    node.remove_pod(&modest.0);
    let after = node.inventory();
    assert!(after == before, "{}", after.difference(&before));
}

#[test]
fn a_daemon_without_descriptors_refuses_and_recovers() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("first", &json!({}));
    let before = node.inventory();
    let daemon = node.daemon_pid().to_string();
    let open = || fs::read_dir(format!("/proc/{daemon}/fd")).expect("the daemon runs").count();
    let limit = |most: usize| run(&["prlimit", "--pid", &daemon, &format!("--nofile={most}:")]);
    let config = node.pod_config("second", &json!({}));
    let path = config.to_str().expect("a plain path");
    // Enough to be asked and not to carry it out.
    limit(open() + 6);
    let refused = node.crictl(["runp", path]).refused();
    assert!(refused.contains("ResourceExhausted") && refused.contains("Too many open files"), "{refused}");
    // Not even enough to be asked.
    limit(4);
    node.crictl(["--timeout", "2s", "version"]).refused();
    limit(1024);
    wait_until("the daemon to answer again", || node.crictl(["version"]).code == 0);
    let after = node.inventory();
    assert!(after == before, "{}", after.difference(&before));
    let second = node.crictl(["runp", path]).ok();
    node.remove_pod(second.trim());
    node.remove_pod(&pod);
}
