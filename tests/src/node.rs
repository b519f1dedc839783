//! A node: Debian's registry and CNI plugins, our daemon, and unmodified `crictl` to drive it.

use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::Inventory;

/// The installed tree, from this crate.
pub(crate) const ROOT: &str = "../target/root";

/// Longest wait for anything that is bound to happen, in the lab.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at something that may have happened.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Looks until `done` says yes; panics with `what` if it never does.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited {} s in vain for: {what}", PATIENCE.as_secs());
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Memory of a process, in KiB (proc(5), `VmRSS`).
pub fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a process has a size");
    line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).expect("a number of KiB")
}

/// How a program ended and what it said.
#[derive(Debug)]
pub struct Call {
    /// The command line, for messages.
    pub command: String,
    /// Exit code, −1 if a signal ended it.
    pub code: i32,
    /// Standard output without the white space around it.
    pub stdout: String,
    /// Standard error without the white space around it.
    pub stderr: String,
}

impl Call {
    fn new(command: String, output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        let code = output.status.code().unwrap_or(-1);
        Self { command, code, stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }

    /// The standard output of a call that must have worked.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.code == 0, "`{}` gave {}:\n{}\n{}", self.command, self.code, self.stdout, self.stderr);
        self.stdout
    }

    /// The standard error of a call that must have failed.
    #[track_caller]
    pub fn refused(self) -> String {
        assert!(self.code != 0, "`{}` worked:\n{}", self.command, self.stdout);
        self.stderr
    }

    /// The standard output, of a call that must have worked, as JSON.
    #[track_caller]
    pub fn json(self) -> Value {
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
    }
}

/// What a test's node has otherwise than the others.
#[derive(Debug)]
pub struct Settings {
    /// Lines of the configuration before its sections.
    pub keys: String,
    /// The image store.
    pub image_dir: PathBuf,
    /// URL before every registry.
    pub mirror: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            keys: String::new(),
            image_dir: "/var/lib/pericarp/images".into(),
            mirror: "http://127.0.0.1:5000".into(),
        }
    }
}

impl Settings {
    /// Writes the configurations of the daemon and of its network into a directory, for the programs installed below `root`.
    pub(crate) fn write(&self, directory: &Path, root: &Path) {
        let cni = directory.join("cni");
        fs::create_dir_all(&cni).expect("the test's directory is writable");
        let conflist = root.join("etc/cni/net.d/10-pericarp.conflist");
        fs::copy(conflist, cni.join("10-pericarp.conflist")).expect("the conflist is installed");
        let mut config = format!(
            "socket = \"{run}/pericarpd.sock\"\nstate_dir = \"{run}/state\"\nimage_dir = \"{images}\"\n{keys}\n\
             vmm = \"{root}/usr/lib/pericarp/pericarp-vmm\"\nkernel = \"{root}/usr/lib/pericarp/vmlinux\"\n\
             initrd = \"{root}/usr/lib/pericarp/initrd\"\n\n[cni]\nconf_dir = \"{run}/cni\"\nbin_dirs = [\"/usr/lib/cni\"]\n",
            run = directory.display(),
            root = root.display(),
            images = self.image_dir.display(),
            keys = self.keys,
        );
        for host in ["registry.k8s.io", "gcr.io", "k8s.gcr.io", "docker.io"] {
            config.push_str(&format!("\n[[registry]]\nhost = \"{host}\"\nmirrors = [\"{}\"]\n", self.mirror));
        }
        fs::write(directory.join("pericarp.toml"), config).expect("the test's directory is writable");
    }
}

/// A node under test. Dropping it ends the daemon and, first, every pod.
#[derive(Debug)]
pub struct Node {
    directory: PathBuf,
    daemon: Option<Child>,
    crictl: PathBuf,
    root: PathBuf,
    image_dir: PathBuf,
}

impl Node {
    /// Starts the registry if it does not run, and the daemon.
    pub fn start() -> Self {
        Self::start_with(&Settings::default())
    }

    /// As [`Node::start`], with settings of the test's own.
    pub fn start_with(settings: &Settings) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(ROOT);
        Self::start_from(root.canonicalize().expect("`make test-lab` has filled target/root"), settings)
    }

    /// As [`Node::start`], of an earlier release.
    pub fn start_previous() -> Self {
        let root = run(&mut Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/previous"))).ok();
        Self::start_from(root.into(), &Settings::default())
    }

    /// From the next start of the daemon on, this is the current release.
    pub fn upgrade(&mut self) {
        self.root = Path::new(env!("CARGO_MANIFEST_DIR")).join(ROOT).canonicalize().expect("target/root is filled");
        self.configure(&Settings::default());
    }

    fn start_from(root: PathBuf, settings: &Settings) -> Self {
        assert!(std::env::var_os("LAB").is_some(), "this test needs the lab: run it by `make test-lab`");
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        run(Command::new(here.join("lab/registry")).arg("start")).ok();
        let tools = run(Command::new(here.join("lab/go-tools")).args(["crictl"])).ok();
        let tools = tools.lines().last().expect("go-tools prints a directory").to_owned();
        let directory = PathBuf::from("/run/pericarp-test");
        fs::create_dir_all(directory.join("log")).expect("/run is writable");
        let crictl = Path::new(&tools).join("crictl");
        let mut node = Self { directory, daemon: None, crictl, root, image_dir: settings.image_dir.clone() };
        node.configure(settings);
        node.start_daemon();
        node
    }

    fn configure(&self, settings: &Settings) {
        settings.write(&self.directory, &self.root);
    }

    /// Where all of the test's own files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The daemon's configuration file.
    pub fn config(&self) -> PathBuf {
        self.directory.join("pericarp.toml")
    }

    /// The installed program of that name.
    pub fn program(&self, name: &str) -> PathBuf {
        self.root.join("usr/bin").join(name)
    }

    /// Where containers' logs go.
    pub fn log_directory(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("pericarpd.sock")
    }

    /// A `pericarp` to run, with this node's configuration.
    pub fn pericarp_command(&self) -> Command {
        let mut command = Command::new(self.program("pericarp"));
        command.arg("--config").arg(self.config());
        command
    }

    /// Runs `pericarp`.
    pub fn pericarp<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Call {
        run(self.pericarp_command().args(arguments))
    }

    /// Starts the daemon and waits until it answers.
    pub fn start_daemon(&mut self) {
        self.spawn_daemon(&mut Command::new(self.program("pericarpd")));
    }

    /// Starts a daemon that ends itself, as by SIGKILL, once it comes to `point`.
    pub fn start_doomed_daemon(&mut self, point: &str) {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/kill-points/pericarpd");
        self.spawn_daemon(Command::new(program).env("PERICARP_KILL_POINT", point));
    }

    /// Whether the daemon has been killed by SIGKILL; waits for it.
    pub fn daemon_was_killed(&mut self) -> bool {
        let mut daemon = self.daemon.take().expect("the daemon was started");
        let mut ended = None;
        wait_until("pericarpd to end", || {
            ended = daemon.try_wait().expect("it is our child");
            ended.is_some()
        });
        ended.and_then(|status| status.signal()) == Some(Signal::SIGKILL as i32)
    }

    fn spawn_daemon(&mut self, command: &mut Command) {
        let log = fs::File::options().append(true).create(true).open(self.directory.join("pericarpd.log"));
        let log = log.expect("the test's directory is writable");
        let daemon = command
            .arg("--config")
            .arg(self.config())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor is to be had"))
            .stderr(log)
            .spawn()
            .expect("pericarpd is installed");
        self.daemon = Some(daemon);
        wait_until("pericarpd to answer", || {
            let ended = self.daemon.as_mut().and_then(|daemon| daemon.try_wait().ok().flatten());
            assert!(ended.is_none(), "pericarpd ended: {ended:?}\n{}", self.daemon_log());
            self.crictl(["version"]).code == 0
        });
    }

    /// The daemon's process.
    pub fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().expect("the daemon runs").id()
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().expect("the daemon runs");
        daemon.kill().expect("it is our child");
        daemon.wait().expect("it is our child");
    }

    /// What the daemon wrote.
    pub fn daemon_log(&self) -> String {
        fs::read_to_string(self.directory.join("pericarpd.log")).unwrap_or_default()
    }

    /// Runs `crictl`.
    pub fn crictl<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Call {
        run(self.crictl_command().args(arguments))
    }

    /// A `crictl` to run otherwise, pointed at this node.
    pub fn crictl_command(&self) -> Command {
        crictl_at(&self.crictl, &self.socket())
    }

    /// A pod's configuration file, `more` merged into it.
    pub fn pod_config(&self, name: &str, more: &Value) -> PathBuf {
        // As the kubelet does.
        fs::create_dir_all(self.log_directory().join(name)).expect("/run is writable");
        let config = json!({
            "metadata": {"name": name, "namespace": "test", "uid": format!("uid-{name}"), "attempt": 0},
            "log_directory": self.log_directory().join(name),
            "linux": {},
        });
        self.write(&format!("pod-{name}.json"), config, more)
    }

    /// A container's configuration file, `more` merged into it.
    pub fn container_config(&self, name: &str, image: &str, command: &[&str], more: &Value) -> PathBuf {
        let config = json!({
            "metadata": {"name": name, "attempt": 0},
            "image": {"image": image},
            "command": command,
            "log_path": format!("{name}.log"),
            "linux": {},
        });
        self.write(&format!("container-{name}.json"), config, more)
    }

    fn write(&self, name: &str, mut config: Value, more: &Value) -> PathBuf {
        merge(&mut config, more);
        let path = self.directory.join(name);
        fs::write(&path, config.to_string()).expect("the test's directory is writable");
        path
    }

    /// Runs a pod and returns its id.
    #[track_caller]
    pub fn run_pod(&self, name: &str, more: &Value) -> String {
        let config = self.pod_config(name, more);
        self.crictl(["runp", config.to_str().expect("a plain path")]).ok()
    }

    /// Creates and starts a container in a pod of [`Node::run_pod`] and returns its id.
    #[track_caller]
    pub fn run_container(&self, pod: &str, pod_name: &str, name: &str, image: &str, command: &[&str]) -> String {
        let pod_config = self.directory.join(format!("pod-{pod_name}.json"));
        let config = self.container_config(name, image, command, &Value::Null);
        let path = |path: &Path| path.to_str().expect("a plain path").to_owned();
        let id = self.crictl(["create", "--no-pull", pod, &path(&config), &path(&pod_config)]).ok();
        self.crictl(["start", &id]).ok();
        id
    }

    /// `crictl inspectp`.
    #[track_caller]
    pub fn inspect_pod(&self, pod: &str) -> Value {
        self.crictl(["inspectp", pod]).json()
    }

    /// `crictl inspect`.
    #[track_caller]
    pub fn inspect_container(&self, container: &str) -> Value {
        self.crictl(["inspect", container]).json()
    }

    /// The pod's VMM.
    #[track_caller]
    pub fn vmm_pid(&self, pod: &str) -> Pid {
        let inspected = self.pericarp(["inspect", "-o", "json", pod]).json();
        let pid = inspected["vmm_pid"].as_i64().unwrap_or_else(|| panic!("no vmm_pid in {inspected}"));
        Pid::from_raw(i32::try_from(pid).expect("a pid"))
    }

    /// A container's log file.
    pub fn log(&self, pod_name: &str, container_name: &str) -> String {
        fs::read_to_string(self.log_directory().join(pod_name).join(format!("{container_name}.log")))
            .unwrap_or_default()
    }

    /// Everything that pods could leave behind here; images stay.
    pub fn inventory(&self) -> Inventory {
        Inventory::take(&[&self.directory.join("state")])
    }

    /// As [`Node::inventory`], and the image store's files.
    pub fn inventory_with_images(&self) -> Inventory {
        Inventory::take(&[&self.directory.join("state"), &self.image_dir])
    }

    /// Stops and removes a pod.
    #[track_caller]
    pub fn remove_pod(&self, pod: &str) {
        self.crictl(["stopp", pod]).ok();
        self.crictl(["rmp", pod]).ok();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show_end("pericarpd", &self.daemon_log(), 60);
        }
        let _ = self.crictl(["rmp", "--all", "--force"]);
        if let Some(mut daemon) = self.daemon.take() {
            if let Ok(pid) = i32::try_from(daemon.id()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
            }
            let _ = daemon.wait();
        }
    }
}

/// A `crictl` that asks whoever listens on a socket, and looks for no configuration.
pub(crate) fn crictl_at(crictl: &Path, socket: &Path) -> Command {
    let endpoint = format!("unix://{}", socket.display());
    let mut command = Command::new(crictl);
    command.args(["--config", "/dev/null", "--timeout", "240s"]);
    command.args(["--runtime-endpoint", &endpoint, "--image-endpoint", &endpoint]);
    command
}

/// Shows the last lines of a log, each with whose it is, to whoever reads of a failed test.
pub(crate) fn show_end(whose: &str, log: &str, lines: usize) {
    let tail = log.lines().rev().take(lines).collect::<Vec<_>>();
    let mut stderr = std::io::stderr().lock();
    for line in tail.iter().rev() {
        let _ = writeln!(stderr, "{whose}: {line}");
    }
}

/// Runs a program to its end.
pub(crate) fn run(command: &mut Command) -> Call {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line = words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("`{line}`: {error}"));
    Call::new(line, &output)
}

pub(crate) fn merge(into: &mut Value, more: &Value) {
    match (into, more) {
        (_, Value::Null) => {}
        (Value::Object(into), Value::Object(more)) => {
            for (key, value) in more {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (into, more) => *into = more.clone(),
    }
}
