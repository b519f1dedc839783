//! A node whose container runtime is containerd, Debian's or a newer one, with our shim as one of its runtimes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::node::{Call, ROOT, crictl_at, run, show_end, wait_until};
use crate::{Inventory, image};

/// Which containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// Debian's 1.6.
    Debian,
    /// 2.4, built from its module.
    New,
}

/// The runtime's name, as containerd finds its shim by.
pub const RUNTIME: &str = "io.containerd.pericarp.v2";

/// Where the test's files are.
const DIRECTORY: &str = "/run/containerd-test";

/// Where CNI configurations, registries and logs are, whichever the release.
const SHARED: &str = "/run/containerd-test/shared";

/// What images are pulled from, by whatever name.
const REGISTRIES: [&str; 2] = ["registry.k8s.io", "docker.io"];

/// A containerd under test. Dropping it removes every pod and ends it.
#[derive(Debug)]
pub struct Containerd {
    release: Release,
    directory: PathBuf,
    root: PathBuf,
    tools: PathBuf,
    daemon: Option<Child>,
}

impl Containerd {
    /// Starts the registry if it does not run, and containerd, and pulls the images.
    pub fn start(release: Release) -> Self {
        assert!(std::env::var_os("LAB").is_some(), "this test needs the lab: run it by `make test-containerd`");
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        run(Command::new(here.join("lab/registry")).arg("start")).ok();
        let tools = run(Command::new(here.join("lab/go-tools")).args(["crictl", "containerd", "ctr"])).ok();
        let tools = PathBuf::from(tools.lines().last().expect("go-tools prints a directory"));
        let root = here.join(ROOT).canonicalize().expect("`make test-containerd` has filled target/root");
        let name = if release == Release::Debian { "1.6" } else { "2.4" };
        let directory = Path::new(DIRECTORY).join(name);
        fs::create_dir_all(directory.join("log")).expect("/run is writable");
        let mut node = Self { release, directory, root, tools, daemon: None };
        node.configure();
        node.start_daemon();
        if !node.ctr(["images", "ls", "-q"]).ok().lines().any(|line| line == image::BUSYBOX) {
            node.ctr(["images", "pull", "--hosts-dir", &node.certificates(), image::BUSYBOX]).ok();
        }
        // Of the CRI's pods, which have a namespace of their own in containerd.
        node.crictl(["pull", image::BUSYBOX]).ok();
        node
    }

    fn configure(&self) {
        for registry in REGISTRIES {
            let directory = Path::new(SHARED).join("certs.d").join(registry);
            fs::create_dir_all(&directory).expect("/run is writable");
            let hosts = "[host.\"http://127.0.0.1:5000\"]\ncapabilities = [\"pull\", \"resolve\"]\n";
            fs::write(directory.join("hosts.toml"), hosts).expect("/run is writable");
        }
        let cni = Path::new(SHARED).join("cni");
        fs::create_dir_all(&cni).expect("/run is writable");
        let conflist = self.root.join("etc/cni/net.d/10-pericarp.conflist");
        fs::copy(conflist, cni.join("10-pericarp.conflist")).expect("the conflist is installed");
        let lib = self.root.join("usr/lib/pericarp");
        let pericarp = format!(
            "state_dir = \"{run}/state\"\nimage_dir = \"/var/lib/pericarp/images\"\nvmm = \"{lib}/pericarp-vmm\"\n\
             kernel = \"{lib}/vmlinux\"\ninitrd = \"{lib}/initrd\"\n",
            run = self.directory.display(),
            lib = lib.display(),
        );
        fs::write(self.pericarp_config(), pericarp).expect("/run is writable");
        // The examples that users are given, with this node's places.
        let example = if self.release == Release::Debian { "containerd-1.6.toml" } else { "containerd-2.toml" };
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(example);
        let example = fs::read_to_string(example).expect("it is in the tree");
        let own = example
            .replace("registry.k8s.io/pause:3.10", image::SMALL)
            .replace("/etc/containerd/certs.d", &self.certificates())
            .replace("/etc/cni/net.d", &format!("{SHARED}/cni"))
            .replace("/opt/cni/bin", "/usr/lib/cni")
            .replace("/etc/pericarp/pericarp.toml", &self.pericarp_config().display().to_string());
        let places = format!(
            "root = \"/var/lib/containerd/{name}\"\nstate = \"{run}/containerd\"\n",
            name = self.directory.file_name().expect("it has a name").to_string_lossy(),
            run = self.directory.display(),
        );
        let (version, rest) = own.split_once("\n\n").expect("the version comes first");
        let block = match self.release {
            Release::Debian => String::new(),
            Release::New => self.blockfile(),
        };
        fs::write(self.directory.join("containerd.toml"), format!("{version}\n{places}\n{rest}\n{block}"))
            .expect("/run is writable");
    }

    /// The snapshotter whose snapshots are files with a file system, and an empty one to copy.
    fn blockfile(&self) -> String {
        let scratch = self.directory.join("scratch.ext4");
        let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&scratch).arg("64M").status();
        assert!(made.expect("e2fsprogs is installed").success());
        format!(
            "[plugins.\"io.containerd.snapshotter.v1.blockfile\"]\nroot_path = \"/var/lib/containerd/blockfile\"\n\
             scratch_file = \"{}\"\nfs_type = \"ext4\"\nmount_options = []\n",
            scratch.display()
        )
    }

    /// Where containerd reads how registries are reached.
    pub fn certificates(&self) -> String {
        format!("{SHARED}/certs.d")
    }

    fn pericarp_config(&self) -> PathBuf {
        self.directory.join("pericarp.toml")
    }

    /// Where all of the test's own files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("containerd.sock")
    }

    fn program(&self, name: &str) -> PathBuf {
        match self.release {
            Release::Debian => Path::new("/usr/bin").join(name),
            Release::New => self.tools.join(name),
        }
    }

    /// Starts containerd and waits until it answers.
    pub fn start_daemon(&mut self) {
        let log = fs::File::options().append(true).create(true).open(self.directory.join("containerd.log"));
        let log = log.expect("/run is writable");
        let path = std::env::var("PATH").unwrap_or_default();
        let daemon = Command::new(self.program("containerd"))
            .arg("--config")
            .arg(self.directory.join("containerd.toml"))
            .arg("--address")
            .arg(self.socket())
            // Where containerd finds the shim by its name, and by which `ctr` configures it.
            .env("PATH", format!("{}:{path}", self.root.join("usr/bin").display()))
            .env("PERICARP_CONFIG", self.pericarp_config())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor is to be had"))
            .stderr(log)
            .spawn()
            .expect("containerd is installed");
        self.daemon = Some(daemon);
        wait_until("containerd to answer", || {
            let ended = self.daemon.as_mut().and_then(|daemon| daemon.try_wait().ok().flatten());
            assert!(ended.is_none(), "containerd ended: {ended:?}\n{}", self.log());
            self.ctr(["version"]).code == 0 && self.crictl(["version"]).code == 0
        });
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().expect("containerd runs");
        daemon.kill().expect("it is our child");
        daemon.wait().expect("it is our child");
    }

    /// What containerd and the shims wrote.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("containerd.log")).unwrap_or_default()
    }

    /// A `ctr` to run, pointed at this node.
    pub fn ctr_command(&self) -> Command {
        let mut command = Command::new(self.program("ctr"));
        command.arg("--address").arg(self.socket());
        command
    }

    /// Runs `ctr`.
    pub fn ctr<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Call {
        run(self.ctr_command().args(arguments))
    }

    /// `ctr run` of busybox by our runtime: its options, the container's name, and its command.
    pub fn ctr_run<'a>(&self, options: &[&'a str], name: &'a str, command: &[&'a str]) -> Call {
        let words = ["run", "--rm", "--runtime", RUNTIME].into_iter().chain(options.iter().copied());
        self.ctr(words.chain([image::BUSYBOX, name]).chain(command.iter().copied()))
    }

    /// A `crictl` to run, pointed at this node.
    pub fn crictl_command(&self) -> Command {
        crictl_at(&self.tools.join("crictl"), &self.socket())
    }

    /// Runs `crictl`.
    pub fn crictl<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Call {
        run(self.crictl_command().args(arguments))
    }

    fn log_directory(&self, pod: &str) -> PathBuf {
        self.directory.join("log").join(pod)
    }

    /// Runs a pod by our handler and returns its id; `linux` is the section of that name.
    #[track_caller]
    pub fn run_pod(&self, name: &str, linux: &Value) -> String {
        fs::create_dir_all(self.log_directory(name)).expect("/run is writable");
        let config = json!({
            "metadata": {"name": name, "namespace": "test", "uid": format!("uid-{name}"), "attempt": 0},
            "log_directory": self.log_directory(name),
            "linux": linux,
        });
        let path = self.write(&format!("pod-{name}.json"), &config);
        self.crictl(["runp", "--runtime", "pericarp", &path]).ok()
    }

    /// Creates and starts a container in a pod of [`Containerd::run_pod`] and returns its id; `more` is added to its
    /// configuration.
    #[track_caller]
    pub fn run_container(&self, pod: &str, pod_name: &str, name: &str, command: &[&str], more: &Value) -> String {
        let mut config = json!({
            "metadata": {"name": name, "attempt": 0},
            "image": {"image": image::BUSYBOX},
            "command": command,
            "log_path": format!("{name}.log"),
            "linux": {},
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        let path = self.write(&format!("container-{name}.json"), &config);
        let pod_path = self.directory.join(format!("pod-{pod_name}.json")).display().to_string();
        let id = self.crictl(["create", "--no-pull", pod, &path, &pod_path]).ok();
        self.crictl(["start", &id]).ok();
        id
    }

    fn write(&self, name: &str, config: &Value) -> String {
        let path = self.directory.join(name);
        fs::write(&path, config.to_string()).expect("/run is writable");
        path.display().to_string()
    }

    /// `crictl inspect`, the part that is the container's status.
    #[track_caller]
    pub fn status(&self, container: &str) -> Value {
        self.crictl(["inspect", container]).json()["status"].clone()
    }

    /// Waits for a container's end and returns its status.
    #[track_caller]
    pub fn exited(&self, container: &str) -> Value {
        wait_until("the container to end", || self.status(container)["state"] == "CONTAINER_EXITED");
        self.status(container)
    }

    /// Process ids of this node's shims, one for each pod.
    pub fn shims(&self) -> Vec<i32> {
        let all = self.shim_processes();
        let parent = |pid: i32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse::<i32>().ok())
        };
        // What a shim has forked is no shim.
        all.iter().copied().filter(|&pid| parent(pid).is_none_or(|parent| !all.contains(&parent))).collect()
    }

    /// Process ids of the shims of this node and what they have forked.
    pub fn shim_processes(&self) -> Vec<i32> {
        let socket = self.socket().display().to_string();
        let is_shim = |words: &str| words.contains("containerd-shim-pericarp-v2") && words.contains(&socket);
        let entries = fs::read_dir("/proc").expect("proc is mounted").flatten();
        let pids = entries.filter_map(|entry| {
            let pid = entry.file_name().to_string_lossy().parse().ok()?;
            fs::read_to_string(entry.path().join("cmdline")).is_ok_and(|words| is_shim(&words)).then_some(pid)
        });
        pids.collect()
    }

    /// Everything that pods could leave behind here.
    pub fn inventory(&self) -> Inventory {
        let run = &self.directory;
        let shims = run.join("containerd/io.containerd.runtime.v2.task");
        Inventory::take(&[
            &run.join("state"),
            &shims,
            Path::new("/run/containerd/s"),
            Path::new("/var/lib/pericarp/scratch/containerd"),
        ])
    }

    /// Stops and removes a pod.
    #[track_caller]
    pub fn remove_pod(&self, pod: &str) {
        self.crictl(["stopp", pod]).ok();
        self.crictl(["rmp", pod]).ok();
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show_end("containerd", &self.log(), 80);
        }
        if self.daemon.is_some() {
            let _ = self.crictl(["rmp", "--all", "--force"]);
        }
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}
