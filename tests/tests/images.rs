//! What containers see of images: as volumes, whole or not at all, and for as long as they need them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use pericarp_tests::{Call, Node, Settings, image};
use serde_json::{Value, json};

/// Reads every file of the volume.
const READ_ALL: &str = "find /volume -type f -exec cat {} + >/dev/null";

/// A container whose volumes are images.
struct Mounted<'a> {
    node: &'a Node,
    pod: String,
    pod_name: &'a str,
}

impl<'a> Mounted<'a> {
    fn new(node: &'a Node, pod_name: &'a str) -> Self {
        Self { node, pod: node.run_pod(pod_name, &json!({})), pod_name }
    }

    fn create(&self, name: &str, mounts: &Value) -> Call {
        let config = self.node.container_config(name, image::BUSYBOX, &["sleep", "1000"], &json!({"mounts": mounts}));
        let pod_config = self.node.directory().join(format!("pod-{}.json", self.pod_name));
        let path = |path: &Path| path.to_str().expect("a plain path").to_owned();
        self.node.crictl(["create", "--no-pull", &self.pod, &path(&config), &path(&pod_config)])
    }

    #[track_caller]
    fn start(&self, name: &str, mounts: &Value) -> String {
        let id = self.create(name, mounts).ok();
        self.node.crictl(["start", &id]).ok();
        id
    }

    fn run(&self, container: &str, script: &str) -> Call {
        self.node.crictl(["exec", "--sync", container, "sh", "-c", script])
    }
}

fn volume(image: &str, sub_path: &str) -> Value {
    json!({"container_path": "/volume", "image": {"image": image}, "image_sub_path": sub_path, "readonly": true})
}

#[test]
fn an_image_is_a_volume() {
    let node = Node::start();
    for name in [image::BUSYBOX, image::NGINX] {
        node.crictl(["pull", name]).ok();
    }
    let pod = Mounted::new(&node, "volumes");
    let whole = pod.start("whole", &json!([volume(image::NGINX, "")]));
    pod.run(&whole, "test -x /volume/usr/sbin/nginx && test -d /volume/etc/nginx").ok();
    pod.run(&whole, READ_ALL).ok();
    let refused = pod.run(&whole, "echo x > /volume/etc/new").refused();
    assert!(refused.contains("Read-only"), "{refused}");
    // As Kubernetes has it: what is in such a volume is data.
    let refused = pod.run(&whole, "/volume/usr/sbin/nginx -v").refused();
    assert!(refused.contains("Permission denied"), "{refused}");

    let part = pod.start("part", &json!([volume(image::NGINX, "etc/nginx")]));
    pod.run(&part, "test -f /volume/nginx.conf && ! test -e /volume/etc").ok();
    let file = json!({"container_path": "/etc/web.conf", "image": {"image": image::NGINX},
                      "image_sub_path": "etc/nginx/nginx.conf", "readonly": true});
    let file = pod.start("file", &json!([file, volume(image::BUSYBOX, "bin")]));
    let inside = pod.run(&file, "cat /etc/web.conf").ok();
    assert_eq!(inside, pod.run(&part, "cat /volume/nginx.conf").ok());
    pod.run(&file, "cmp /volume/busybox /bin/busybox").ok();

    let mounts = &node.inspect_container(&part)["status"]["mounts"];
    let id = node.crictl(["images", "-q", "--no-trunc", image::NGINX]).ok();
    assert_eq!(
        (&mounts[0]["imageSubPath"], &mounts[0]["image"]["imageRef"]),
        (&json!("etc/nginx"), &json!(id)),
        "{mounts}"
    );
    assert_eq!(mounts[0]["readonly"], true, "{mounts}");

    for (sub_path, words) in [
        ("not/there", ["code = NotFound", "not/there"]),
        ("etc/nginx/nginx.conf/x", ["code = NotFound", "nginx.conf"]),
        ("../etc", ["code = InvalidArgument", "subPath"]),
        ("/etc", ["code = InvalidArgument", "subPath"]),
    ] {
        let refusal = pod.create("none", &json!([volume(image::NGINX, sub_path)])).refused();
        assert!(words.iter().all(|word| refusal.contains(word)), "{sub_path}: {refusal}");
    }
    let refusal = pod.create("none", &json!([volume("registry.k8s.io/not/pulled:1", "")])).refused();
    assert!(refusal.contains("code = NotFound") && refusal.contains("pull it first"), "{refusal}");
    assert_eq!(node.crictl(["ps", "--all", "--quiet"]).ok().lines().count(), 3, "what was refused left nothing");
    node.remove_pod(&pod.pod);
}

/// The disk of an image whose file is the larger one of two.
fn largest_disk(images: &Path) -> PathBuf {
    let disks = fs::read_dir(images.join("disks")).expect("the image store");
    let disks = disks.map(|entry| entry.expect("an entry").path());
    disks.max_by_key(|path| fs::metadata(path).expect("it is there").len()).expect("a disk")
}

/// Flips one bit of a block that holds something, from block `from` on.
fn damage(disk: &Path, from: u64) -> u64 {
    const BLOCK: u64 = 4096;
    let file = File::options().read(true).write(true).open(disk).expect("it is ours");
    let mut block = vec![0; 4096];
    let number = (from..).find(|number| {
        file.read_exact_at(&mut block, number * BLOCK).expect("the disk goes on");
        block.iter().any(|byte| *byte != 0)
    });
    let number = number.expect("a block with something in it");
    file.read_exact_at(&mut block, number * BLOCK).expect("it is there");
    block[1234] ^= 1;
    file.write_all_at(&block, number * BLOCK).expect("written");
    number
}

#[test]
fn a_changed_byte_of_an_image_is_an_error_and_nothing_else() {
    let images = PathBuf::from("/var/lib/pericarp/images-damaged");
    let node = Node::start_with(&Settings { image_dir: images.clone(), ..Settings::default() });
    for name in [image::BUSYBOX, image::NGINX] {
        node.crictl(["pull", name]).ok();
    }
    let disk = largest_disk(&images);
    let whole = fs::read(&disk).expect("it is there");
    let volumes = json!([volume(image::NGINX, "")]);
    let pod = Mounted::new(&node, "whole");
    pod.run(&pod.start("c", &volumes), READ_ALL).ok();
    node.remove_pod(&pod.pod);

    // In the middle of the files, then in the hashes of them, which are 1 of 128 blocks at the end.
    let blocks = u64::try_from(whole.len() / 4096).expect("a number");
    for (name, from) in [("data", blocks / 4), ("hashes", blocks - blocks / 200)] {
        let number = damage(&disk, from);
        let pod = Mounted::new(&node, name);
        let container = pod.start("c", &volumes);
        let error = pod.run(&container, READ_ALL).refused();
        assert!(error.contains("Input/output error"), "block {number}: {error}");
        let console = node.pericarp(["console", &pod.pod]).ok();
        assert!(console.contains("is corrupted"), "block {number}: {console}");
        // The pod lives on, and the rest of it is as it was.
        pod.run(&container, "echo still here && test -d /volume/etc/nginx").ok();
        node.remove_pod(&pod.pod);
        fs::write(&disk, &whole).expect("written");
    }
    let pod = Mounted::new(&node, "again");
    pod.run(&pod.start("c", &volumes), READ_ALL).ok();
    node.remove_pod(&pod.pod);
    drop(node);
    fs::remove_dir_all(&images).expect("it is ours");
}

#[test]
fn an_image_in_use_is_not_removed() {
    let node = Node::start();
    for name in [image::BUSYBOX, image::NGINX, image::SMALL] {
        node.crictl(["pull", name]).ok();
    }
    let pod = Mounted::new(&node, "user");
    let container = pod.start("c", &json!([volume(image::NGINX, "")]));
    for name in [image::BUSYBOX, image::NGINX] {
        let refusal = node.crictl(["rmi", name]).refused();
        assert!(refusal.contains("is used by container") && refusal.contains(&container), "{refusal}");
    }
    node.crictl(["rmi", image::SMALL]).ok();
    node.crictl(["stop", "--timeout", "0", &container]).ok();
    node.crictl(["rmi", image::NGINX]).refused();
    node.crictl(["rm", &container]).ok();
    node.crictl(["rmi", image::NGINX]).ok();
    assert_eq!(node.crictl(["images", "-q", image::NGINX]).ok(), "");
    node.remove_pod(&pod.pod);
}
