//! A whole Kubernetes of one node whose only runtime is our daemon: etcd of Debian's, all else from Kubernetes' own sources,
//! unmodified. It is brought up once per lab.

mod api;
mod config;
mod dns;
mod outside;
mod pod;
mod service;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::node::{Call, ROOT, Settings, run, wait_until};
use crate::{Inventory, image};
use service::Service;

pub use outside::Outside;
pub use pod::{Pod, container};

/// The one node, and its addresses.
const NODE: &str = "node1";
const ADDRESS: &str = "10.9.0.1";
const ADDRESS_V6: &str = "fd00:10:9::1";

/// Longest wait for what a cluster is to come to by itself: its parts share the lab's one processor.
const PATIENCE: Duration = Duration::from_secs(300);

/// Between two looks, each of which costs a kubectl.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// What kubectl is told of it.
const WAIT: &str = "--timeout=300s";

/// Programs built by tests/lab/go-tools.
const TOOLS: [&str; 8] = [
    "kubelet",
    "kube-apiserver",
    "kube-scheduler",
    "kube-controller-manager",
    "kube-proxy",
    "kubectl",
    "kubeadm",
    "coredns",
];

/// Where kubectl's proxy to the API listens.
const PROXY: &str = "127.0.0.1:8001";

const KUBECONFIG: &str = "/etc/kubernetes/super-admin.conf";

/// The cluster. One test at a time has it.
#[derive(Debug)]
pub struct Cluster {
    directory: PathBuf,
    tools: PathBuf,
    crictl: PathBuf,
    root: PathBuf,
}

impl Cluster {
    /// The lab's cluster, brought up by whoever asks first.
    pub fn get() -> MutexGuard<'static, Self> {
        static CLUSTER: OnceLock<Mutex<Cluster>> = OnceLock::new();
        // A test that failed has left the cluster as it is; the others use it all the same.
        CLUSTER.get_or_init(|| Mutex::new(Self::find_or_start())).lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A kubelet without an API server, which runs what the manifests in [`Cluster::manifests`] say.
    pub fn kubelet_alone() -> Self {
        let node = Self::with_tools(&["kubelet"]);
        node.start_runtime();
        fs::create_dir_all(node.manifests()).expect("the directory is writable");
        let config = json!({
            "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
            "authorization": {"mode": "AlwaysAllow"},
            "staticPodPath": node.manifests(),
        });
        node.write("kubelet.yaml", &config::kubelet(&node.socket(), &config));
        node.service("kubelet-alone").start();
        node
    }

    /// Where a kubelet alone looks for its pods.
    pub fn manifests(&self) -> PathBuf {
        self.directory.join("manifests")
    }

    fn find_or_start() -> Self {
        let cluster = Self::with_tools(&TOOLS);
        let up = cluster.directory.join("cluster-is-up");
        if !up.exists() {
            cluster.start();
            fs::write(up, "").expect("the directory is writable");
        }
        cluster
    }

    fn with_tools(names: &[&str]) -> Self {
        assert!(std::env::var_os("LAB").is_some(), "this test needs the lab: run it by `make test-kubernetes`");
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let tools = |names: &[&str]| {
            let printed = run(Command::new(here.join("lab/go-tools")).args(names)).ok();
            PathBuf::from(printed.lines().last().expect("go-tools prints a directory"))
        };
        Self {
            directory: "/run/pericarp-test".into(),
            tools: tools(names),
            crictl: tools(&["crictl"]).join("crictl"),
            root: here.join(ROOT).canonicalize().expect("`make test-kubernetes` has filled target/root"),
        }
    }

    /// The daemon, with a registry, a link to the outside, and images.
    fn start_runtime(&self) {
        fs::create_dir_all(&self.directory).expect("/run is writable");
        Self::keep_state();
        Outside::connect();
        fs::write("/etc/hosts", format!("127.0.0.1 localhost\n{ADDRESS} {NODE}\n")).expect("the lab's own");
        let registry = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/registry");
        run(Command::new(registry).arg("start")).ok();
        Settings::default().write(&self.directory, &self.root);
        self.service("pericarpd").start();
        wait_until("pericarpd to answer", || self.crictl(["version"]).code == 0);
        for image in [image::BUSYBOX, image::NGINX, image::WEB, image::CLIENT] {
            self.crictl(["pull", image]).ok();
        }
    }

    fn start(&self) {
        let begun = Instant::now();
        let step = |name: &str| eprintln!("cluster: {name} after {} s", begun.elapsed().as_secs());
        self.start_runtime();
        step("images");
        self.service("etcd").start();
        // A node that boots again has been made before.
        let new = !Path::new(KUBECONFIG).exists();
        if new {
            self.make_certificates();
            step("certificates");
        }
        self.service("kube-apiserver").start();
        // Not by kubectl, whose start costs the lab more than the server has.
        let ready = format!("https://{ADDRESS}:6443/readyz");
        self.eventually("the API server to be ready", || {
            run(Command::new("curl").args(["-sk", &ready])).stdout == "ok"
        });
        step("API server");
        self.service("kubectl-proxy").start();
        if new {
            // As kubeadm's bootstrap does: logs and exec go through it.
            let role = ["--clusterrole=system:kubelet-api-admin", "--user=kube-apiserver-kubelet-client"];
            self.kubectl(["create", "clusterrolebinding", "apiserver-kubelet", role[0], role[1]]).ok();
        }
        self.service("kube-controller-manager").start();
        self.service("kube-scheduler").start();
        self.configure_kubelet(&Value::Null);
        self.service("kubelet").start();
        self.write("proxy.yaml", &config::proxy());
        self.service("kube-proxy").start();
        self.node_ready();
        step("node ready");
        let class = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/runtimeclass.yaml");
        self.kubectl(["apply", "-f", class.to_str().expect("a plain path")]).ok();
        let account = "/api/v1/namespaces/default/serviceaccounts/default";
        self.eventually("pods to be let in", || !self.at(account).is_null());
    }

    fn make_certificates(&self) {
        let file = self.write("kubeadm.yaml", &config::kubeadm(&self.socket()));
        for phase in ["certs", "kubeconfig"] {
            let mut kubeadm = Command::new(self.tools.join("kubeadm"));
            run(kubeadm.args(["init", "phase", phase, "all", "--config", &file])).ok();
        }
    }

    /// Puts what a node keeps when it is switched off onto the lab's disk, if it has one.
    fn keep_state() {
        let Some(disk) = std::env::var_os("LAB_DISK") else { return };
        let at = Path::new("/run/disk");
        fs::create_dir_all(at).expect("/run is writable");
        run(Command::new("mount").args(["-o", "loop"]).arg(disk).arg(at)).ok();
        for directory in [
            "/etc/kubernetes",
            "/var/lib/etcd",
            "/var/lib/kubelet",
            "/var/lib/pericarp",
            "/var/lib/cni",
            "/var/log/pods",
        ] {
            let kept = at.join(directory.trim_start_matches('/'));
            fs::create_dir_all(&kept).expect("the disk is writable");
            fs::create_dir_all(directory).expect("the lab's own");
            run(Command::new("mount").arg("--bind").arg(&kept).arg(directory)).ok();
        }
    }

    /// A program of the node.
    fn service(&self, name: &'static str) -> Service {
        let file = |name: &str| self.directory.join(name);
        let (program, arguments) = match name {
            "pericarpd" => (
                self.root.join("usr/bin/pericarpd"),
                vec!["--config".to_owned(), file("pericarp.toml").display().to_string()],
            ),
            "etcd" => ("etcd".into(), config::etcd()),
            "kube-apiserver" => (self.tools.join(name), config::apiserver()),
            "kube-controller-manager" => (self.tools.join(name), config::controller_manager()),
            "kube-scheduler" => (self.tools.join(name), config::scheduler()),
            "kubelet" => (self.tools.join(name), config::kubelet_arguments(&file("kubelet.yaml"))),
            "kubelet-alone" => {
                (self.tools.join("kubelet"), vec![format!("--config={}", file("kubelet.yaml").display())])
            }
            "kubectl-proxy" => {
                let arguments =
                    ["proxy", "--kubeconfig", KUBECONFIG, "--port", PROXY.rsplit(':').next().unwrap_or_default()];
                (self.tools.join("kubectl"), arguments.map(str::to_owned).to_vec())
            }
            "kube-proxy" => (self.tools.join(name), vec![format!("--config={}", file("proxy.yaml").display())]),
            _ => panic!("{name}: no such program"),
        };
        Service::new(name, &self.directory, program, arguments)
    }

    fn configure_kubelet(&self, more: &Value) {
        let mut config = config::kubelet_authentication();
        crate::node::merge(&mut config, more);
        self.write("kubelet.yaml", &config::kubelet(&self.socket(), &config));
    }

    /// Starts the kubelet anew, with more in its configuration than its defaults.
    pub fn restart_kubelet_with(&self, more: &Value) {
        self.configure_kubelet(more);
        self.restart(&["kubelet"]);
    }

    /// Kills programs (`kubelet`, `pericarpd`), all at once, and starts them again; returns when the node is ready again.
    pub fn restart(&self, names: &[&'static str]) {
        let services: Vec<Service> = names.iter().map(|name| self.service(name)).collect();
        services.iter().for_each(|service| service.end(Signal::SIGKILL));
        // A heartbeat from before would tell nothing.
        let path = format!("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{NODE}");
        let lease = || self.at(&path)["spec"]["renewTime"].clone();
        let before = lease();
        services.iter().for_each(Service::start);
        wait_until("pericarpd to answer", || self.crictl(["version"]).code == 0);
        self.eventually("the kubelet to say that it lives", || ![&before, &Value::Null].contains(&&lease()));
        self.node_ready();
    }

    #[track_caller]
    fn node_ready(&self) {
        self.eventually("the node to be ready", || is_ready(&self.at(&format!("/api/v1/nodes/{NODE}"))["status"]));
    }

    /// Where the test's own files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("pericarpd.sock")
    }

    /// Writes a file of the cluster's and returns its path.
    pub fn write(&self, name: &str, text: &str) -> String {
        let path = self.directory.join(name);
        fs::write(&path, text).expect("the directory is writable");
        path.to_str().expect("a plain path").to_owned()
    }

    /// Ends what runs on the node, but for pods, and writes everything to the disk.
    pub fn switch_off(&self) {
        for name in [
            "kubectl-proxy",
            "kubelet",
            "kube-proxy",
            "kube-scheduler",
            "kube-controller-manager",
            "kube-apiserver",
            "etcd",
        ] {
            self.service(name).end(Signal::SIGTERM);
        }
        run(&mut Command::new("sync")).ok();
    }

    /// As [`Cluster::eventually`], where there is nobody to be asked why it does not.
    #[track_caller]
    pub fn wait_for(&self, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            let log = |name| self.service(name).log_tail(20);
            let goes_on = self.service("kubelet-alone").runs() && Instant::now() < deadline;
            assert!(goes_on, "in vain: {what}\n{}{}", log("kubelet-alone"), log("pericarpd"));
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Looks until `done` says yes; panics if it never does, with what the kubelet and the daemon said last.
    #[track_caller]
    pub fn eventually(&self, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            assert!(
                Instant::now() < deadline,
                "waited {} s in vain for: {what}\n{}",
                PATIENCE.as_secs(),
                self.what_happened()
            );
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Events and logs, for a message.
    fn what_happened(&self) -> String {
        let events = self.kubectl(["get", "events", "--sort-by=.lastTimestamp"]).stdout;
        let first = events.lines().count().saturating_sub(20);
        let events: String = events.lines().skip(first).map(|line| format!("{line}\n")).collect();
        ["kubelet", "pericarpd"].iter().fold(events, |text, name| text + &self.service(name).log_tail(15))
    }

    /// A `kubectl` to run otherwise.
    pub fn kubectl_command(&self) -> Command {
        let mut command = Command::new(self.tools.join("kubectl"));
        command.args(["--kubeconfig", KUBECONFIG]);
        command
    }

    /// Runs `kubectl`.
    pub fn kubectl<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Call {
        run(self.kubectl_command().args(arguments))
    }

    /// Runs `crictl`.
    pub fn crictl<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Call {
        let endpoint = format!("unix://{}", self.socket().display());
        let mut command = Command::new(&self.crictl);
        command.args(["--config", "/dev/null", "--timeout", "240s", "--runtime-endpoint", &endpoint]);
        command.args(["--image-endpoint", &endpoint]);
        run(command.args(arguments))
    }

    /// Everything that pods could leave behind here; images stay.
    pub fn inventory(&self) -> Inventory {
        Inventory::take(&[&self.directory.join("state")])
    }
}

/// Whether the status of a node or pod says that it is ready.
fn is_ready(status: &Value) -> bool {
    let ready = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
    status["conditions"].as_array().into_iter().flatten().any(ready)
}
