//! Volumes as block devices (volumeMode Block): a block device of the host is one in the container.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use pericarp_tests::{Call, Node, Settings, image};
use serde_json::{Value, json};

const BYTES: u64 = 16 << 20;

/// Where the container is to have it.
const DEVICE: &str = "/dev/data";

/// A loop device of the host and the file behind it.
struct Loop {
    file: PathBuf,
    device: String,
}

impl Loop {
    fn new(node: &Node) -> Self {
        let file = node.directory().join("disk");
        File::create(&file).and_then(|file| file.set_len(BYTES)).expect("the test's directory is writable");
        let device = host(&["losetup", "--find", "--show", file.to_str().expect("a plain path")]);
        Self { file, device }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
        let _ = fs::remove_file(&self.file);
    }
}

fn host(arguments: &[&str]) -> String {
    let done = Command::new(arguments[0]).args(&arguments[1..]).output().expect("it is installed");
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).trim().to_owned()
}

/// Tries to create a container that has the device.
fn create(node: &Node, pod: &str, pod_name: &str, name: &str, device: &str, permissions: &str) -> Call {
    let devices = json!([{"container_path": DEVICE, "host_path": device, "permissions": permissions}]);
    let config = node.container_config(name, image::BUSYBOX, &["sleep", "1000"], &json!({"devices": devices}));
    let pod_config = node.pod_config(pod_name, &Value::Null);
    let path = |path: &PathBuf| path.to_str().expect("a plain path").to_owned();
    node.crictl(["create", "--no-pull", pod, &path(&config), &path(&pod_config)])
}

fn start(node: &Node, pod: &str, pod_name: &str, name: &str, device: &str, permissions: &str) -> String {
    let container = create(node, pod, pod_name, name, device, permissions).ok();
    node.crictl(["start", &container]).ok();
    container
}

fn sh<'a>(container: &'a str, script: &'a str) -> [&'a str; 6] {
    ["exec", "--sync", container, "sh", "-c", script]
}

#[test]
fn a_block_device_is_one_on_both_sides() {
    let mut node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let disk = Loop::new(&node);
    let pod = node.run_pod("block", &json!({}));
    let container = start(&node, &pod, "block", "c", &disk.device, "mrw");
    assert_eq!(node.crictl(sh(&container, "wc -c < /dev/data")).ok(), BYTES.to_string());
    // Written through to the host's device by fsync, where the host reads it past its own cache.
    let write = "printf written | dd of=/dev/data bs=4096 seek=100 conv=fsync,notrunc 2>&1";
    node.crictl(sh(&container, write)).ok();
    let mut found = [0; 7];
    File::open(&disk.file).and_then(|file| file.read_exact_at(&mut found, 409_600)).expect("the file is there");
    assert_eq!(&found, b"written");
    // The other containers of the pod do not have it, and the host cannot use it meanwhile.
    let other = node.run_container(&pod, "block", "other", image::BUSYBOX, &["sleep", "1000"]);
    node.crictl(sh(&other, "test -e /dev/data")).refused();
    let mounted = Command::new("mkfs.ext4").arg("-q").arg(&disk.device).output().expect("e2fsprogs is installed");
    assert!(!mounted.status.success(), "the host uses a device that a pod has");

    // It outlives the daemon, is shared within the pod, and is given back with its last container.
    node.kill_daemon();
    node.start_daemon();
    let second = start(&node, &pod, "block", "second", &disk.device, "mrw");
    let read = "dd if=/dev/data bs=4096 skip=100 count=1 2>/dev/null | head -c 7";
    assert_eq!(node.crictl(sh(&second, read)).ok(), "written");
    node.crictl(["rm", "--force", &container]).ok();
    assert_eq!(node.crictl(sh(&second, read)).ok(), "written");
    node.crictl(["rm", "--force", &second]).ok();
    host(&["mkfs.ext4", "-q", "-F", &disk.device]);
    node.remove_pod(&pod);
}

#[test]
fn a_block_device_that_is_read_only_stays_as_it_is() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let disk = Loop::new(&node);
    let pod = node.run_pod("still", &json!({}));
    // All of the guest's devices are open to a privileged container, so that only the VMM can refuse it.
    let devices = json!([{"container_path": DEVICE, "host_path": disk.device, "permissions": "r"}]);
    let more = json!({"devices": devices, "linux": {"security_context": {"privileged": true}}});
    let config = node.container_config("c", image::BUSYBOX, &["sleep", "1000"], &more);
    let pod_config = node.pod_config("still", &json!({"linux": {"security_context": {"privileged": true}}}));
    let path = |path: &PathBuf| path.to_str().expect("a plain path").to_owned();
    let container = node.crictl(["create", "--no-pull", &pod, &path(&config), &path(&pod_config)]).ok();
    node.crictl(["start", &container]).ok();
    let refused = node.crictl(sh(&container, "dd if=/dev/zero of=/dev/data bs=4096 count=1 conv=fsync")).refused();
    assert!(refused.contains("I/O error") || refused.contains("Input/output error"), "{refused}");
    node.remove_pod(&pod);
}

#[test]
fn a_block_device_in_use_is_refused_with_the_reason() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let disk = Loop::new(&node);
    host(&["mkfs.ext4", "-q", &disk.device]);
    let place = node.directory().join("mounted");
    fs::create_dir_all(&place).expect("the test's directory is writable");
    let place = place.to_str().expect("a plain path");
    host(&["mount", &disk.device, place]);
    let pod = node.run_pod("busy", &json!({}));
    let said = create(&node, &pod, "busy", "c", &disk.device, "mrw").refused();
    host(&["umount", place]);
    assert!(said.contains(&disk.device) && said.contains("is mounted or in use: unmount it"), "{said}");
    let had = start(&node, &pod, "busy", "had", &disk.device, "mrw");
    let second = node.run_pod("second", &json!({}));
    let said = create(&node, &second, "second", "c", &disk.device, "mrw").refused();
    assert!(said.contains("stop the pod that has it"), "{said}");
    node.crictl(["rm", "--force", &had]).ok();
    create(&node, &second, "second", "c", &disk.device, "mrw").ok();
    for pod in [pod, second] {
        node.remove_pod(&pod);
    }
}

#[test]
fn a_pods_disk_is_as_slow_as_it_is_said_to_be() {
    const PER_S: u64 = 40;
    let keys = format!("disk_requests_per_s = {PER_S}\n");
    let node = Node::start_with(&Settings { keys, ..Settings::default() });
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("slow", &Value::Null);
    let container = node.run_container(&pod, "slow", "c", image::BUSYBOX, &["sleep", "1000"]);
    let requests = || {
        let inspected = node.pericarp(["inspect", "-o", "json", &pod]).json();
        inspected["counters"]["disk0.requests"].as_u64().unwrap_or_else(|| panic!("{inspected}"))
    };
    // Each write waits until it is on the disk.
    let (before, began) = (requests(), Instant::now());
    node.crictl(sh(&container, "for i in $(seq 40); do echo $i > /file; sync; done")).ok();
    let (made, took) = (requests() - before, began.elapsed());
    assert!(made >= 40, "{made}");
    let paid = Duration::from_millis((made - 1) * 1000 / PER_S).saturating_sub(Duration::from_millis(100));
    assert!(took >= paid, "{made} requests in {took:?}");
    node.remove_pod(&pod);
}
