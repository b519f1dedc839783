//! A host that fails under a pod: its disk, its memory. The pod is told, or ended with the true reason, and nothing else happens.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use pericarp_tests::{Node, image, wait_until};
use serde_json::json;

const BYTES: u64 = 16 << 20;

/// A disk of the host's that can be made to fail: a device mapper's over a loop device.
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
            _ => format!("0 {} error", BYTES / 512),
        }
    }

    /// Whether it fails from now on.
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

#[test]
fn a_disk_that_fails_is_an_error_in_the_guest_and_nothing_more() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let disk = Failing::new("pericarp-failing", &node.directory().join("failing"));
    let pod = node.run_pod("failing", &json!({}));
    let devices = json!([{"container_path": "/dev/data", "host_path": disk.path(), "permissions": "mrw"}]);
    let config = node.container_config("c", image::BUSYBOX, &["sleep", "1000"], &json!({"devices": devices}));
    let pod_config = node.pod_config("failing", &json!({}));
    let path = |path: &PathBuf| path.to_str().expect("a plain path").to_owned();
    let container = node.crictl(["create", "--no-pull", &pod, &path(&config), &path(&pod_config)]).ok();
    node.crictl(["start", &container]).ok();
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
