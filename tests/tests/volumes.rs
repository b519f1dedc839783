//! Directories and files of the host that containers share with it, by virtio-fs.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pericarp_tests::{Node, image, wait_until};
use serde_json::{Value, json};

/// A directory of the host that only root may enter, as a kubelet's volumes are.
struct Volume(PathBuf);

impl Volume {
    fn new(node: &Node, name: &str) -> Self {
        let path = node.directory().join("volumes").join(name);
        fs::create_dir_all(&path).expect("/run is writable");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("it is ours");
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.file(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn text(&self) -> &str {
        self.0.to_str().expect("a plain path")
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn mount_host(arguments: &[&str]) {
    let done = Command::new(arguments[0]).args(&arguments[1..]).status().expect("it is installed");
    assert!(done.success(), "{arguments:?}");
}

/// A pod with one container that sleeps.
struct Shared<'n> {
    node: &'n Node,
    pod: String,
    container: String,
}

impl<'n> Shared<'n> {
    #[track_caller]
    fn start(node: &'n Node, name: &str, mounts: &Value) -> Self {
        let pod = node.run_pod(name, &json!({}));
        let container = Self::create(node, &pod, name, "c", mounts);
        node.crictl(["start", &container]).ok();
        Self { node, pod, container }
    }

    #[track_caller]
    fn create(node: &Node, pod: &str, pod_name: &str, name: &str, mounts: &Value) -> String {
        let pod_config = node.pod_config(pod_name, &json!({}));
        let config = node.container_config(name, image::BUSYBOX, &["sleep", "1000"], &json!({"mounts": mounts}));
        let path = |path: &Path| path.to_str().expect("a plain path").to_owned();
        node.crictl(["create", "--no-pull", pod, &path(&config), &path(&pod_config)]).ok()
    }

    #[track_caller]
    fn run(&self, script: &str) -> String {
        self.node.crictl(["exec", "--sync", &self.container, "sh", "-c", script]).ok()
    }

    #[track_caller]
    fn fails(&self, script: &str) -> String {
        self.node.crictl(["exec", "--sync", &self.container, "sh", "-c", script]).refused()
    }

    /// Its `pericarp-fs`, of which the test's pods have one at a time.
    fn server(&self) -> Option<Pid> {
        fs::read_dir("/proc").expect("proc is mounted").flatten().find_map(|entry| {
            let command = fs::read_to_string(entry.path().join("cmdline")).ok()?;
            let pid = entry.file_name().to_str()?.parse().ok()?;
            command.starts_with("pericarp-fs").then_some(Pid::from_raw(pid))
        })
    }
}

fn pulled() -> Node {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    // A first pod makes the bridge and its chains, which stay.
    let pod = node.run_pod("first", &json!({}));
    node.remove_pod(&pod);
    node
}

#[test]
fn a_writable_directory_is_one_on_both_sides() {
    let node = pulled();
    let volume = Volume::new(&node, "rw");
    fs::write(volume.file("from-host"), "hello\n").expect("writes");
    let before = node.inventory();
    // The image has no program that locks: the host's own is taken, by a loader and libraries of its own.
    let mounts = json!([
        {"container_path": "/data", "host_path": volume.text()},
        {"container_path": "/host/flock", "host_path": "/usr/bin/flock", "readonly": true},
        {"container_path": "/host/ld.so", "host_path": "/lib64/ld-linux-x86-64.so.2", "readonly": true},
        {"container_path": "/host/lib", "host_path": "/lib/x86_64-linux-gnu", "readonly": true},
    ]);
    let shared = Shared::start(&node, "rw", &mounts);
    assert_eq!(shared.run("cat /data/from-host"), "hello");
    shared.run("echo back > /data/from-guest && mkdir -p /data/a/b && mv /data/from-guest /data/a/b/moved");
    assert_eq!(volume.read("a/b/moved"), "back\n");
    // The host changes what the guest has read: it may keep nothing.
    fs::write(volume.file("from-host"), "hello again\n").expect("writes");
    assert_eq!(shared.run("cat /data/from-host"), "hello again");
    fs::rename(volume.file("a/b"), volume.file("c")).expect("renames");
    assert_eq!(shared.run("cat /data/c/moved"), "back");
    shared.fails("ls /data/a/b");
    shared.run("ln /data/c/moved /data/hard && ln -s c/moved /data/soft && echo more >> /data/soft");
    assert_eq!(volume.read("hard"), "back\nmore\n");
    assert_eq!(fs::metadata(volume.file("hard")).expect("there").nlink(), 2);
    // Owners and modes are the guest's process' own.
    shared.run("touch /data/owned && chown 1234:4321 /data/owned && chmod 640 /data/owned");
    let owned = fs::metadata(volume.file("owned")).expect("there");
    assert_eq!((owned.uid(), owned.gid(), owned.mode() & 0o7777), (1234, 4321, 0o640));
    shared.run("dd if=/dev/urandom of=/data/large bs=1M count=8 2>/dev/null && sha256sum < /data/large > /data/sum");
    let sum = Command::new("sh").arg("-c").arg("sha256sum < large").current_dir(&volume.0).output().expect("runs");
    assert_eq!(volume.read("sum").as_bytes(), sum.stdout);
    // A lock in a container is one on the host.
    fs::write(volume.file("locked"), "").expect("writes");
    let lock = fs::File::open(volume.file("locked")).expect("opens");
    lock.lock().expect("nobody has it");
    let flock = "/host/ld.so --library-path /host/lib /host/flock";
    let refused = shared.fails(&format!("{flock} --conflict-exit-code 77 -n /data/locked true"));
    assert!(refused.contains("exited with 77"), "{refused}");
    lock.unlock().expect("it is ours");
    shared.run(&format!("{flock} /data/locked true"));
    shared.run("rm -r /data/c /data/large");
    assert!(!volume.file("c").exists());
    assert!(shared.server().is_some());
    node.crictl(["stop", "--timeout", "0", &shared.container]).ok();
    node.crictl(["rm", &shared.container]).ok();
    node.remove_pod(&shared.pod);
    node.inventory().assert_same_as(&before);
}

#[test]
fn files_read_only_ones_and_links_are_what_they_are_on_the_host() {
    let node = pulled();
    let volume = Volume::new(&node, "kinds");
    let other = Volume::new(&node, "other");
    fs::write(volume.file("log"), "").expect("writes");
    fs::write(other.file("x"), "behind a link\n").expect("writes");
    symlink(&other.0, volume.file("link")).expect("links");
    // Too much to be copied into the guest.
    let large = Volume::new(&node, "large");
    fs::write(large.file("big"), vec![b'x'; 3 << 20]).expect("writes");
    let path = |path: PathBuf| path.to_str().expect("a plain path").to_owned();
    let mounts = json!([
        {"container_path": "/dev/termination-log", "host_path": path(volume.file("log"))},
        {"container_path": "/linked", "host_path": path(volume.file("link"))},
        {"container_path": "/large", "host_path": large.text(), "readonly": true},
    ]);
    let shared = Shared::start(&node, "kinds", &mounts);
    shared.run("echo the end > /dev/termination-log");
    assert_eq!(volume.read("log"), "the end\n");
    assert_eq!(shared.run("cat /linked/x"), "behind a link");
    shared.run("echo new > /linked/y");
    assert_eq!(other.read("y"), "new\n");
    assert_eq!(shared.run("wc -c < /large/big"), (3 << 20).to_string());
    for attack in ["touch /large/new", "echo > /large/big", "rm /large/big", "chmod 777 /large/big", "mkdir /large/d"] {
        let refused = shared.fails(attack);
        assert!(refused.contains("Read-only file system"), "{attack}: {refused}");
    }
    // What a link in a volume points to is looked for in the container, never on the host.
    shared.run("ln -s /run/pericarp-test/pericarp.toml /linked/trap");
    assert!(shared.fails("cat /linked/trap").contains("No such file"));
    node.remove_pod(&shared.pod);
}

#[test]
fn mounts_of_the_host_show_only_where_they_were_asked_for() {
    let node = pulled();
    let volume = Volume::new(&node, "mounts");
    mount_host(&["mount", "--bind", volume.text(), volume.text()]);
    mount_host(&["mount", "--make-shared", volume.text()]);
    fs::create_dir(volume.file("early")).expect("makes");
    fs::create_dir(volume.file("late")).expect("makes");
    let (early, late) = (format!("{}/early", volume.text()), format!("{}/late", volume.text()));
    mount_host(&["mount", "-t", "tmpfs", "early", &early]);
    let mounts = json!([
        {"container_path": "/private", "host_path": volume.text()},
        {"container_path": "/follows", "host_path": volume.text(), "propagation": 1},
        {"container_path": "/top", "host_path": volume.text(), "readonly": true},
        {"container_path": "/all", "host_path": volume.text(), "readonly": true, "recursive_read_only": true},
    ]);
    let shared = Shared::start(&node, "mounts", &mounts);
    shared.run("echo in > /top/early/file");
    assert_eq!(fs::read_to_string(volume.file("early/file")).expect("reads"), "in\n");
    assert!(shared.fails("echo > /top/file").contains("Read-only"));
    assert!(shared.fails("echo > /all/early/file").contains("Read-only"));
    mount_host(&["mount", "-t", "tmpfs", "late", &late]);
    fs::write(volume.file("late/file"), "followed\n").expect("writes");
    assert_eq!(shared.run("cat /follows/late/file"), "followed");
    shared.fails("cat /private/late/file");
    node.remove_pod(&shared.pod);
    for point in [&late, &early, volume.text()] {
        mount_host(&["umount", point]);
    }
}

#[test]
fn shared_directories_outlive_the_daemon_and_leave_with_their_container() {
    let mut node = pulled();
    let volume = Volume::new(&node, "kill");
    let before = node.inventory();
    let mounts = json!([{"container_path": "/data", "host_path": volume.text()}]);
    let pod = {
        let shared = Shared::start(&node, "kill", &mounts);
        shared.run("echo one > /data/one");
        shared.pod
    };
    node.kill_daemon();
    node.start_daemon();
    let container = Shared::create(&node, &pod, "kill", "second", &mounts);
    node.crictl(["start", &container]).ok();
    let shared = Shared { node: &node, pod, container };
    assert_eq!(shared.run("cat /data/one"), "one");
    let server = shared.server().expect("it runs");
    let table = || fs::read_to_string(format!("/proc/{server}/mountinfo")).expect("it runs");
    assert_eq!(table().matches("/shared/").count(), 2, "{}", table());
    let open = || fs::read_dir(format!("/proc/{server}/fd")).expect("it runs").count();
    let with_both = open();
    node.crictl(["stop", "--timeout", "0", &shared.container]).ok();
    node.crictl(["rm", &shared.container]).ok();
    assert_eq!(table().matches("/shared/").count(), 1, "{}", table());
    wait_until("the file server to let go of it", || open() < with_both);
    node.remove_pod(&shared.pod);
    node.inventory().assert_same_as(&before);
}

#[test]
fn a_file_server_that_dies_is_an_error_and_no_hang() {
    let node = pulled();
    let volume = Volume::new(&node, "dies");
    let before = node.inventory();
    let mounts = json!([{"container_path": "/data", "host_path": volume.text()}]);
    let shared = Shared::start(&node, "dies", &mounts);
    shared.run("echo one > /data/one");
    kill(shared.server().expect("it runs"), Signal::SIGKILL).expect("it runs");
    wait_until("the file server to be gone", || shared.server().is_none());
    let refused = shared.fails("cat /data/one");
    assert!(refused.contains("Input/output error"), "{refused}");
    assert_eq!(shared.run("echo the pod lives"), "the pod lives");
    // The next container gets a new one.
    let container = Shared::create(&node, &shared.pod, "dies", "next", &mounts);
    node.crictl(["start", &container]).ok();
    let next = Shared { node: &node, pod: shared.pod, container };
    assert_eq!(next.run("cat /data/one"), "one");
    node.remove_pod(&next.pod);
    node.inventory().assert_same_as(&before);
}

#[test]
fn what_cannot_be_shared_is_refused_with_the_reason() {
    let node = pulled();
    let pod = node.run_pod("refused", &json!({}));
    let volume = Volume::new(&node, "refused");
    let _socket = std::os::unix::net::UnixListener::bind(volume.file("socket")).expect("binds");
    let socket = volume.file("socket");
    for (host_path, word) in [(socket.to_str().expect("plain"), "socket"), ("/no/such/path", "does not exist")] {
        let pod_config = node.pod_config("refused", &json!({}));
        let mounts = json!({"mounts": [{"container_path": "/data", "host_path": host_path}]});
        let config = node.container_config("c", image::BUSYBOX, &["sleep", "1000"], &mounts);
        let path = |path: &Path| path.to_str().expect("a plain path").to_owned();
        let refused = node.crictl(["create", "--no-pull", &pod, &path(&config), &path(&pod_config)]).refused();
        assert!(refused.contains(word) && refused.contains("/data"), "{refused}");
    }
    node.remove_pod(&pod);
}

#[test]
fn memory_is_the_guests_and_counts_against_its_containers() {
    let node = pulled();
    // As a kubelet makes them: the volume, and a directory of it for a subPath.
    let volume = Volume::new(&node, "kubernetes.io~empty-dir");
    let (whole, part) = (volume.file("cache"), volume.file("part"));
    let text = |path: &Path| path.to_str().expect("a plain path").to_owned();
    for path in [&whole, &part] {
        fs::create_dir(path).expect("the test's directory is writable");
    }
    mount_host(&["mount", "-t", "tmpfs", "-o", "size=48m,mode=1777", "tmpfs", &text(&whole)]);
    fs::create_dir(whole.join("a")).expect("a tmpfs is writable");
    mount_host(&["mount", "--bind", &text(&whole.join("a")), &text(&part)]);
    let mounts = json!([{"container_path": "/cache", "host_path": text(&whole)}]);
    let first = Shared::start(&node, "memory", &mounts);
    assert_eq!(first.run("stat -c %a /cache; mkdir -p /cache/a; echo kept > /cache/a/file"), "1777");
    assert!(first.run("df -k /cache").contains(" 49152 "), "{}", first.run("df -k /cache"));
    // Another container of the pod has a directory of it, and the host has nothing.
    let mounts = json!([{"container_path": "/part", "host_path": text(&part)}]);
    let second = Shared::create(&node, &first.pod, "memory", "second", &mounts);
    node.crictl(["start", &second]).ok();
    assert_eq!(node.crictl(["exec", "--sync", &second, "cat", "/part/file"]).ok(), "kept");
    assert!(!whole.join("a/file").exists(), "it is on the host");
    let said = &node.inspect_container(&second)["status"]["mounts"];
    assert_eq!((&said[0]["containerPath"], &said[0]["hostPath"]), (&json!("/part"), &json!(text(&part))), "{said}");

    // What a container keeps there is its own memory.
    let config = json!({
        "mounts": [{"container_path": "/cache", "host_path": text(&whole)}],
        "linux": {"resources": {"memory_limit_in_bytes": 24 << 20}},
    });
    let command = ["dd", "if=/dev/zero", "of=/cache/large", "bs=1M", "count=40"];
    let config = node.container_config("hog", image::BUSYBOX, &command, &config);
    let pod_config = node.pod_config("memory", &json!({}));
    let hog = node.crictl(["create", "--no-pull", &first.pod, &text(&config), &text(&pod_config)]).ok();
    node.crictl(["start", &hog]).ok();
    wait_until("the container to be killed", || node.inspect_container(&hog)["status"]["state"] == "CONTAINER_EXITED");
    assert_eq!(node.inspect_container(&hog)["status"]["reason"], "OOMKilled");
    // A volume that is full is full.
    let full = first.fails("dd if=/dev/zero of=/cache/more bs=1M count=60");
    assert!(full.contains("No space left on device"), "{full}");
    node.remove_pod(&first.pod);
    for path in [&part, &whole] {
        mount_host(&["umount", &text(path)]);
    }
}
