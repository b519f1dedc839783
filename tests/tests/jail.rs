//! What a VMM can see and do, looked at from outside while a pod runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use pericarp_tests::{Node, image, resident_kib, wait_until};
use pericarp_vmm::jail::{ALLOWED, ARGUED};
use serde_json::json;

/// Calls that stay allowed although no pod of this test need make them, and when one is made.
const SELDOM: [(i64, &str); 8] = [
    (libc::SYS_fdatasync, "where the host has no io_uring"),
    (libc::SYS_clock_gettime, "where the kernel's vDSO cannot read the clock"),
    (libc::SYS_shutdown, "when one direction of a stream ends before the other, as of a forwarded port"),
    (libc::SYS_sched_yield, "when two threads meet in a channel"),
    (libc::SYS_restart_syscall, "after SIGCONT, by a wait that has an end"),
    (libc::SYS_rt_sigreturn, "when a CPU is kicked that runs: where it is stopped for a moment, or others end the VM"),
    (libc::SYS_exit, "when a thread ends before the process does"),
    (libc::SYS_munmap, "when the C library gives back the stacks of many threads that have ended"),
];

/// Namespaces that no VMM shares with the host.
const NAMESPACES: [&str; 6] = ["user", "mnt", "pid", "net", "ipc", "uts"];

fn proc(pid: i32, name: &str) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join(name)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
}

/// The value of a line of `/proc/PID/status`.
fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
}

#[test]
fn a_vmm_sees_no_file_of_the_host_and_has_no_privilege() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("jailed", &json!({}));
    // Images, logs and sessions have been opened by now.
    let container = node.run_container(&pod, "jailed", "c", image::BUSYBOX, &["sleep", "1000"]);
    node.crictl(["exec", "--sync", &container, "true"]).ok();
    let vmm = node.vmm_pid(&pod).as_raw();

    // The root that every child of the spawner gets has a place for volumes, which is a file server's alone to use.
    assert_eq!(names(&proc(vmm, "root")), ["shared"], "its root has files");
    assert_eq!(names(&proc(vmm, "root/shared")), Vec::<String>::new(), "its root has files");
    assert_eq!(fs::read_link(proc(vmm, "cwd")).expect("a directory"), Path::new("/"));
    let mounts = read(&proc(vmm, "mountinfo"));
    assert_eq!(mounts.lines().count(), 1, "more than its root is mounted: {mounts}");
    assert!(
        mounts.split(' ').nth(5).is_some_and(|options| options.split(',').any(|option| option == "ro")),
        "{mounts}"
    );
    let host = namespaces(std::process::id() as i32);
    for namespace in namespaces(vmm) {
        assert!(!host.contains(&namespace), "{} is the host's", namespace.display());
    }
    let links = read(&proc(vmm, "net/dev"));
    assert!(links.lines().skip(2).all(|line| line.trim_start().starts_with("lo:")), "{links}");

    let tasks = names(&proc(vmm, "task"));
    assert!(tasks.len() > 3, "its threads: {tasks:?}");
    for task in tasks {
        let status = read(&proc(vmm, "task").join(&task).join("status"));
        for (name, value) in [("NoNewPrivs", "1"), ("Seccomp", "2")] {
            assert_eq!(field(&status, name), value, "{name} of thread {task}");
        }
        for name in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(&status, name), "0000000000000000", "{name} of thread {task}");
        }
    }
    let limits = read(&proc(vmm, "limits"));
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("a limit");
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");

    // No directory is among its descriptors, so nothing can be opened beneath one.
    let opened: BTreeSet<_> = names(&proc(vmm, "fd"))
        .iter()
        .map(|fd| proc(vmm, "fd").join(fd))
        .filter(|fd| fs::metadata(fd).is_ok_and(|file| file.is_dir()))
        .map(|fd| fs::read_link(fd).expect("a descriptor"))
        .collect();
    assert!(opened.is_empty(), "open directories: {opened:?}");
    node.remove_pod(&pod);
}

fn namespaces(pid: i32) -> Vec<PathBuf> {
    NAMESPACES.iter().map(|name| fs::read_link(proc(pid, "ns").join(name)).expect("a namespace")).collect()
}

#[test]
fn no_vmm_shares_a_namespace_with_another() {
    let node = Node::start();
    // One gets the network namespace that was made ahead; the other comes at the same time.
    let pods = ["first", "second"];
    let mut pods = std::thread::scope(|scope| {
        let starts = pods.map(|name| scope.spawn(|| node.run_pod(name, &json!({}))));
        starts.map(|start| start.join().expect("a pod")).to_vec()
    });
    let daemon = node.daemon_pid().to_string();
    let children = read(&Path::new("/proc").join(&daemon).join("task").join(&daemon).join("children"));
    let spawner: i32 = children.split_whitespace().next().expect("a spawner").parse().expect("a process id");
    let vmm = |pod: &String| namespaces(node.vmm_pid(pod).as_raw());
    wait_until("the spawner to have moved out of the VMMs' namespaces", || {
        let own = namespaces(spawner);
        pods.iter().map(vmm).all(|vmm| vmm.iter().all(|namespace| !own.contains(namespace)))
    });
    pods.push(node.run_pod("third", &json!({})));

    let all: Vec<_> = pods.iter().flat_map(vmm).collect();
    let different: BTreeSet<_> = all.iter().collect();
    assert_eq!(different.len(), pods.len() * NAMESPACES.len(), "{all:?}");
    for pod in &pods {
        node.remove_pod(pod);
    }
}

/// The lab kernel's trace of system calls.
struct Trace;

const TRACEFS: &str = "/sys/kernel/tracing";

impl Trace {
    /// Of what `process` starts from now on.
    fn start(process: &str) -> Self {
        for (name, value) in [
            ("tracing_on", "0"),
            ("trace", ""),
            ("buffer_size_kb", "65536"),
            ("options/event-fork", "1"),
            ("set_event_pid", process),
            ("events/raw_syscalls/sys_enter/enable", "1"),
            ("tracing_on", "1"),
        ] {
            set(name, value);
        }
        Self
    }

    /// Calls by thread, in order.
    fn stop(self) -> BTreeMap<i32, Vec<i64>> {
        set("tracing_on", "0");
        let text = read(&Path::new(TRACEFS).join("trace"));
        let mut calls = BTreeMap::<i32, Vec<i64>>::new();
        // `vcpu0-812     [000] .....    12.345684: sys_enter: NR 16 (3, ae80, 0, 0, 0, 0)`; a name may hold dashes.
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((head, call)) = line.split_once(": sys_enter: NR ") else { continue };
            let thread = head.split(" [").next().and_then(|thread| thread.trim_end().rsplit('-').next());
            let number = call.split(' ').next();
            let parse = |text: Option<&str>| text.and_then(|text| text.parse::<i64>().ok());
            let (Some(thread), Some(number)) = (parse(thread), parse(number)) else { panic!("{line}") };
            calls.entry(i32::try_from(thread).expect("a process")).or_default().push(number);
        }
        calls
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        for (name, value) in [("tracing_on", "0"), ("events/raw_syscalls/sys_enter/enable", "0"), ("set_event_pid", "")]
        {
            set(name, value);
        }
    }
}

fn set(name: &str, value: &str) {
    fs::write(Path::new(TRACEFS).join(name), value).unwrap_or_else(|error| panic!("{name}: {error}"));
}

#[test]
fn each_call_that_is_allowed_is_made() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let daemon = node.daemon_pid();
    let spawner = read(Path::new(&format!("/proc/{daemon}/task/{daemon}/children"))).trim().to_owned();
    let disk = node.directory().join("disk");
    File::create(&disk).and_then(|file| file.set_len(16 << 20)).expect("the test's directory is writable");
    let device = Command::new("losetup").args(["--find", "--show"]).arg(&disk).output().expect("is installed").stdout;
    let device = String::from_utf8(device).expect("a name").trim().to_owned();
    let shared = node.directory().join("shared");
    fs::create_dir_all(shared.join("below")).expect("the test's directory is writable");

    let trace = Trace::start(&spawner);
    let pod = node.run_pod("traced", &json!({}));
    let vmm = node.vmm_pid(&pod).as_raw();
    let more = json!({
        "devices": [{"container_path": "/dev/data", "host_path": device, "permissions": "mrw"}],
        "mounts": [{"container_path": "/shared", "host_path": shared}],
        "log_path": "traced.log",
    });
    let config = node.container_config("c", image::BUSYBOX, &["sh", "-c", "echo hello; sleep 1000"], &more);
    let pod_config = node.pod_config("traced", &json!({}));
    let path = |path: &PathBuf| path.to_str().expect("a plain path").to_owned();
    let container = node.crictl(["create", "--no-pull", &pod, &path(&config), &path(&pod_config)]).ok();
    node.crictl(["start", &container]).ok();
    let sh = |script: &str| node.crictl(["exec", "--sync", &container, "sh", "-c", script]).ok();
    sh("echo written > /shared/file && cat /shared/file");
    sh("dd if=/dev/zero of=/dev/data bs=4096 count=8 conv=fsync && blkdiscard /dev/data");
    // What is freed goes back to the host.
    let small = resident_kib(vmm.unsigned_abs());
    sh("dd if=/dev/zero of=/dev/shm/large bs=1M count=48");
    wait_until("the guest to use memory", || resident_kib(vmm.unsigned_abs()) > small + (32 << 10));
    let large = resident_kib(vmm.unsigned_abs());
    sh("rm /dev/shm/large");
    wait_until("it to come back", || resident_kib(vmm.unsigned_abs()) + (32 << 10) < large);
    let threads: BTreeSet<i32> = names(&proc(vmm, "task")).iter().map(|task| task.parse().expect("a number")).collect();
    node.remove_pod(&pod);
    let mut calls = trace.stop();
    Command::new("losetup").args(["--detach", &device]).status().expect("is installed");

    // What the first thread did before it had its filter does not count.
    let first = calls.get_mut(&vmm).expect("the VMM was traced");
    let filtered = first.iter().position(|call| *call == libc::SYS_seccomp).expect("it has a filter");
    first.drain(..=filtered);
    let made: BTreeSet<i64> =
        calls.iter().filter(|(thread, _)| threads.contains(thread)).flat_map(|(_, calls)| calls).copied().collect();
    let allowed: BTreeSet<i64> = ALLOWED.iter().chain(&ARGUED).copied().collect();
    let seldom: BTreeSet<i64> = SELDOM.iter().map(|(call, _)| *call).collect();
    println!("{} calls are allowed, {} were made", allowed.len(), made.len());
    assert!(made.is_subset(&allowed), "made and not allowed: {:?}", made.difference(&allowed));
    let unused: Vec<_> = allowed.iter().filter(|call| !made.contains(call) && !seldom.contains(call)).collect();
    assert!(unused.is_empty(), "allowed and never made: {unused:?}");
    assert!(seldom.is_subset(&allowed), "{seldom:?}");
}
