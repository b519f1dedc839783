//! containerd with our shim as a runtime, each promise with Debian's containerd and with a newer one: single containers by
//! `ctr`, pods by unmodified `crictl` and the runtime handler.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Stdio};
use std::sync::Once;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pericarp_tests::{Containerd, Inventory, Node, RUNTIME, Release, image, wait_until};
use serde_json::{Value, json};

/// Exit code of what SIGKILL ended.
const KILLED: i64 = 137;

/// That of SIGTERM.
const TERMINATED: i64 = 143;

/// What containerd's CRI says of a task for whose end it could not wait, whatever the shim's `delete` answers.
const UNKNOWN: i64 = 255;

/// A node on which what the first pod leaves for good is there: a bridge, and cgroups of namespaces.
fn node(release: Release) -> (Containerd, Inventory) {
    static FIRST: [Once; 2] = [Once::new(), Once::new()];
    let node = Containerd::start(release);
    FIRST[usize::from(release == Release::New)].call_once(|| {
        node.ctr_run(&[], "first", &["true"]).ok();
        let pod = node.run_pod("first", &json!({}));
        node.remove_pod(&pod);
    });
    let before = settled(&node);
    (node, before)
}

/// The inventory once the shims have ended, which is a moment after containerd has let go of them.
fn settled(node: &Containerd) -> Inventory {
    wait_until("the shims to end", || node.shim_processes().is_empty());
    node.inventory()
}

fn host_kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").expect("proc is mounted").trim().to_owned()
}

fn a_single_container_runs_in_a_guest(release: Release) {
    let (node, before) = node(release);
    let ran = node.ctr_run(
        &["--env", "X=1"],
        "one",
        &["sh", "-c", "uname -r; echo $X; ls /proc/1/exe; echo err >&2; exit 7"],
    );
    let said = ran.stdout.lines().collect::<Vec<_>>();
    assert_eq!((ran.code, said.get(1), ran.stderr.as_str()), (7, Some(&"1"), "err"), "{ran:?}");
    assert_ne!(said[0], host_kernel(), "it has a kernel of its own");
    let missing = node.ctr_run(&[], "two", &["/no/such/program"]);
    assert!(missing.code != 0 && missing.stderr.contains("/no/such/program"), "{missing:?}");
    settled(&node).assert_same_as(&before);
}

fn input_is_passed_on_to_its_end(release: Release) {
    let (node, before) = node(release);
    let mut command = node.ctr_command();
    command.args(["run", "--rm", "--runtime", RUNTIME, image::BUSYBOX, "wc", "wc", "-c"]);
    let mut wc = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("ctr is installed");
    wc.stdin.take().expect("it is piped").write_all(&[b'x'; 300_000]).expect("all is taken");
    let output = wc.wait_with_output().expect("ctr runs");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "300000");
    settled(&node).assert_same_as(&before);
}

/// As nerdctl takes what its containers say.
fn a_program_takes_the_output(release: Release) {
    let (node, before) = node(release);
    let (program, log) = (node.directory().join("take-output"), node.directory().join("taken"));
    let script = format!(
        "#!/bin/sh\nexec >{}\necho \"$CONTAINER_NAMESPACE $CONTAINER_ID $*\"\nexec 5>&-\n/bin/cat <&3\n/bin/cat <&4\n",
        log.display(),
    );
    fs::write(&program, script).expect("/run is writable");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("it is ours");
    let uri = format!("binary://{}?level=a%20b", program.display());
    let ran = node.ctr_run(&["--log-uri", &uri], "taken", &["sh", "-c", "echo said; echo err >&2; exit 3"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (3, ""), "{ran:?}");
    // Which ends before the container is gone.
    assert_eq!(fs::read_to_string(&log).expect("it was written"), "default taken level a b\nsaid\nerr\n");
    let missing = node.ctr_run(&["--log-uri", "binary:///no/such/program"], "lost", &["true"]);
    assert!(missing.code != 0 && missing.stderr.contains("/no/such/program"), "{missing:?}");
    settled(&node).assert_same_as(&before);
}

fn what_is_written_is_in_the_snapshot(release: Release) {
    let (node, before) = node(release);
    let script = "cat /root/file 2>/dev/null; echo kept > /root/file";
    let first = node.ctr(["run", "--runtime", RUNTIME, image::BUSYBOX, "kept", "sh", "-c", script]).ok();
    let second = node.ctr(["task", "start", "kept"]).ok();
    assert_eq!((first.as_str(), second.as_str()), ("", "kept"));
    node.ctr(["containers", "rm", "kept"]).ok();
    settled(&node).assert_same_as(&before);
}

fn a_pod_runs_by_its_runtime_handler(release: Release) {
    let (node, before) = node(release);
    let pod = node.run_pod("web", &json!({"sysctls": {"net.core.somaxconn": "77"}}));
    let server = ["sh", "-c", "echo started; uname -r; echo page > /tmp/index.html; exec httpd -f -p 8080 -h /tmp"];
    let web = node.run_container(&pod, "web", "server", &server, &Value::Null);
    let other = node.run_container(&pod, "web", "client", &["sleep", "1000"], &Value::Null);
    let log = || fs::read_to_string(node.directory().join("log/web/server.log")).unwrap_or_default();
    wait_until("the log", || log().lines().count() >= 2);
    assert!(log().contains("stdout F started") && !log().contains(&host_kernel()), "{}", log());
    let exec = |container: &str, command: &[&str]| {
        node.crictl(["exec", "--sync", container].into_iter().chain(command.iter().copied()))
    };
    wait_until("the server", || exec(&other, &["wget", "-qO-", "http://127.0.0.1:8080/index.html"]).stdout == "page");
    assert_eq!(exec(&web, &["cat", "/proc/sys/net/core/somaxconn"]).ok(), "77");
    let failed = exec(&web, &["sh", "-c", "echo said; exit 3"]);
    assert!(failed.code != 0 && failed.stderr.contains("exited with 3"), "{failed:?}");
    // The host reaches it by the address that containerd's CNI gave.
    let address = node.crictl(["inspectp", &pod]).json()["status"]["network"]["ip"].as_str().expect("an IP").to_owned();
    let page = Command::new("curl").args(["-s", &format!("http://{address}:8080/index.html")]).output();
    assert_eq!(String::from_utf8_lossy(&page.expect("curl is installed").stdout).trim(), "page");
    let hosts = exec(&web, &["cat", "/etc/hosts", "/etc/resolv.conf"]).ok();
    assert!(hosts.contains("localhost"), "{hosts}");
    node.crictl(["stop", "--timeout", "2", &web]).ok();
    // crictl's pods share their processes, so that it is not PID 1 and hears of SIGTERM (pid_namespaces(7)).
    assert_eq!(node.exited(&web)["exitCode"], TERMINATED);
    node.crictl(["rm", "--force", &web]).ok();
    node.remove_pod(&pod);
    settled(&node).assert_same_as(&before);
}

fn exit_codes_are_told(release: Release) {
    let (node, before) = node(release);
    let pod = node.run_pod("codes", &json!({}));
    let code = |name: &str, command: &[&str]| {
        let id = node.run_container(&pod, "codes", name, command, &Value::Null);
        let status = node.exited(&id);
        (status["exitCode"].as_i64().expect("a number"), status["reason"].as_str().expect("a word").to_owned())
    };
    assert_eq!(code("good", &["true"]), (0, "Completed".into()));
    assert_eq!(code("bad", &["sh", "-c", "exit 3"]), (3, "Error".into()));
    node.remove_pod(&pod);
    settled(&node).assert_same_as(&before);
}

fn a_container_out_of_memory_is_told_of_before_its_end(release: Release) {
    let (node, before) = node(release);
    let log = node.directory().join("events");
    let file = fs::File::create(&log).expect("/run is writable");
    let mut events = node.ctr_command().args(["--namespace", "k8s.io", "events"]).stdout(file).spawn().expect("ctr");
    let pod = node.run_pod("hungry", &json!({}));
    let limit = json!({"linux": {"resources": {"memory_limit_in_bytes": 20 << 20}}});
    let eater = node.run_container(&pod, "hungry", "eater", &["sh", "-c", "exec tail /dev/zero"], &limit);
    let status = node.exited(&eater);
    assert_eq!((status["exitCode"].as_i64(), status["reason"].as_str()), (Some(KILLED), Some("OOMKilled")), "{status}");
    let seen = || fs::read_to_string(&log).unwrap_or_default();
    wait_until("the events", || seen().contains("/tasks/oom") && seen().contains("/tasks/exit"));
    let place = |topic: &str| seen().find(topic);
    assert!(place("/tasks/oom") < place("/tasks/exit"), "{}", seen());
    for topic in ["/tasks/create", "/tasks/start"] {
        assert!(seen().contains(topic), "{topic} in {}", seen());
    }
    node.remove_pod(&pod);
    events.kill().expect("it is our child");
    events.wait().expect("it is our child");
    settled(&node).assert_same_as(&before);
}

fn stats_are_those_of_the_guest(release: Release) {
    let (node, before) = node(release);
    let pod = node.run_pod("busy", &json!({}));
    let busy = ["sh", "-c", "x=$(head -c 8000000 /dev/zero | tr '\\0' x); while true; do :; done"];
    let id = node.run_container(&pod, "busy", "busy", &busy, &Value::Null);
    wait_until("CPU time and memory", || {
        let stats = node.crictl(["stats", "-o", "json", &id]).json();
        let number = |value: &Value| value["value"].as_str().and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        let one = &stats["stats"][0];
        number(&one["cpu"]["usageCoreNanoSeconds"]) > 100_000_000
            && number(&one["memory"]["workingSetBytes"]) > 8_000_000
    });
    node.remove_pod(&pod);
    settled(&node).assert_same_as(&before);
}

fn limits_change_while_it_runs(release: Release) {
    let (node, before) = node(release);
    let pod = node.run_pod("limits", &json!({}));
    let limit = json!({"linux": {"resources": {"memory_limit_in_bytes": 64 << 20}}});
    let id = node.run_container(&pod, "limits", "c", &["sleep", "1000"], &limit);
    let read = || node.crictl(["exec", "--sync", &id, "cat", "/sys/fs/cgroup/memory.max"]).ok();
    assert_eq!(read(), (64 << 20).to_string());
    node.crictl(["update", "--memory", &(96 << 20).to_string(), &id]).ok();
    assert_eq!(read(), (96 << 20).to_string());
    node.remove_pod(&pod);
    settled(&node).assert_same_as(&before);
}

fn a_task_is_paused_and_goes_on(release: Release) {
    let (node, before) = node(release);
    let mut command = node.ctr_command();
    command.args([
        "run",
        "--detach",
        "--runtime",
        RUNTIME,
        image::BUSYBOX,
        "tick",
        "sh",
        "-c",
        "while true; do date +%s > /tick; sleep 0.1; done",
    ]);
    assert!(command.status().expect("ctr is installed").success());
    let state = || {
        let table = node.ctr(["tasks", "ls"]).ok();
        table.lines().find(|line| line.starts_with("tick")).unwrap_or_default().to_owned()
    };
    assert!(state().contains("RUNNING"), "{}", state());
    node.ctr(["tasks", "pause", "tick"]).ok();
    assert!(state().contains("PAUSED"), "{}", state());
    node.ctr(["tasks", "resume", "tick"]).ok();
    assert!(state().contains("RUNNING"), "{}", state());
    let said = node.ctr(["tasks", "exec", "--exec-id", "e", "tick", "sh", "-c", "test -s /tick && echo alive; exit 4"]);
    assert_eq!((said.stdout.as_str(), said.code), ("alive", 4), "{said:?}");
    node.ctr(["tasks", "kill", "--signal", "SIGKILL", "tick"]).ok();
    wait_until("the task to end", || state().contains("STOPPED"));
    node.ctr(["tasks", "rm", "tick"]);
    node.ctr(["containers", "rm", "tick"]).ok();
    settled(&node).assert_same_as(&before);
}

fn host_directories_are_volumes(release: Release) {
    let (node, before) = node(release);
    let volume = node.directory().join("volume");
    fs::create_dir_all(&volume).expect("/run is writable");
    fs::write(volume.join("from-host"), "hello").expect("/run is writable");
    let pod = node.run_pod("files", &json!({}));
    let mounts = json!({"mounts": [{"host_path": volume, "container_path": "/data"}, {"host_path": volume, "container_path": "/read", "readonly": true}]});
    let id = node.run_container(&pod, "files", "c", &["sleep", "1000"], &mounts);
    let script = "cat /data/from-host; echo back > /data/from-guest; touch /read/x 2>/dev/null || echo refused";
    assert_eq!(node.crictl(["exec", "--sync", &id, "sh", "-c", script]).ok(), "hellorefused");
    assert_eq!(fs::read_to_string(volume.join("from-guest")).expect("it was written"), "back\n");
    node.remove_pod(&pod);
    settled(&node).assert_same_as(&before);
}

fn containerd_may_be_killed_and_finds_its_pods_again(release: Release) {
    let (mut node, before) = node(release);
    let pod = node.run_pod("stays", &json!({}));
    let id =
        node.run_container(&pod, "stays", "c", &["sh", "-c", "while true; do echo tick; sleep 1; done"], &Value::Null);
    let shims = node.shims();
    node.kill_daemon();
    node.start_daemon();
    assert_eq!(node.shims(), shims, "the shim is the same");
    assert_eq!(node.status(&id)["state"], "CONTAINER_RUNNING");
    assert_eq!(node.crictl(["exec", "--sync", &id, "echo", "here"]).ok(), "here");
    let lines = || fs::read_to_string(node.directory().join("log/stays/c.log")).unwrap_or_default().lines().count();
    let seen = lines();
    wait_until("the log to go on", || lines() > seen);
    node.crictl(["stop", "--timeout", "0", &id]).ok();
    assert_eq!(node.exited(&id)["exitCode"], KILLED);
    node.remove_pod(&pod);
    settled(&node).assert_same_as(&before);
}

fn a_killed_shim_leaves_nothing(release: Release) {
    let (node, before) = node(release);
    let pod = node.run_pod("orphan", &json!({}));
    let id = node.run_container(&pod, "orphan", "c", &["sleep", "1000"], &Value::Null);
    let shims = node.shims();
    assert_eq!(shims.len(), 1, "a pod has one shim for all its containers");
    kill(Pid::from_raw(shims[0]), Signal::SIGKILL).expect("it runs");
    let status = node.exited(&id);
    assert!([KILLED, UNKNOWN].map(Some).contains(&status["exitCode"].as_i64()), "{status}");
    wait_until("the sandbox to be known as gone", || {
        node.crictl(["inspectp", &pod]).json()["status"]["state"] == "SANDBOX_NOTREADY"
    });
    node.remove_pod(&pod);
    settled(&node).assert_same_as(&before);
}

fn a_vm_that_dies_ends_its_containers(release: Release) {
    let (node, before) = node(release);
    let pod = node.run_pod("mortal", &json!({}));
    let id = node.run_container(&pod, "mortal", "c", &["sleep", "1000"], &Value::Null);
    let pid = node.crictl(["inspectp", &pod]).json()["info"]["pid"].as_i64().expect("the VMM's pid");
    kill(Pid::from_raw(i32::try_from(pid).expect("a pid")), Signal::SIGKILL).expect("it runs");
    assert_eq!(node.exited(&id)["exitCode"], KILLED);
    node.remove_pod(&pod);
    settled(&node).assert_same_as(&before);
}

fn what_no_guest_can_have_is_refused_with_a_reason(release: Release) {
    let (node, before) = node(release);
    let host = node.ctr_run(&["--net-host"], "net", &["true"]);
    assert!(host.code != 0 && host.stderr.contains("hostNetwork"), "{host:?}");
    let profile = node.ctr_run(&["--apparmor-profile", "mine"], "profile", &["true"]);
    assert!(profile.code != 0 && profile.stderr.contains("no AppArmor"), "{profile:?}");
    settled(&node).assert_same_as(&before);
}

/// Its snapshot is one of which the owners were changed.
fn a_single_container_has_users_of_its_own(release: Release) {
    let (node, before) = node(release);
    let ids = "0:100000:65536";
    let script = "awk '{print $1, $2, $3}' /proc/self/uid_map; touch /bin/new; stat -c '%u %g' / /bin /bin/new";
    let ran = node.ctr_run(&["--uidmap", ids, "--gidmap", ids], "users", &["sh", "-c", script]).ok();
    assert_eq!(ran, "0 100000 65536\n0 0\n0 0\n0 0");
    settled(&node).assert_same_as(&before);
}

/// A port of localhost in the pod, by containerd's streaming server.
fn ports_are_forwarded(release: Release) {
    let (node, before) = node(release);
    let pod = node.run_pod("forward", &json!({}));
    let server = ["sh", "-c", "mkdir /www; echo page > /www/index.html; exec httpd -f -p 127.0.0.1:8080 -h /www"];
    let id = node.run_container(&pod, "forward", "server", &server, &Value::Null);
    let local = ["exec", "--sync", &id, "wget", "-qO-", "http://127.0.0.1:8080/index.html"];
    wait_until("the server", || node.crictl(local).stdout == "page");
    let mut forward = node.crictl_command();
    let mut forward = forward.args(["port-forward", &pod, "18080:8080"]).stdout(Stdio::null()).spawn().expect("crictl");
    let page = || {
        let output = Command::new("curl").args(["-s", "http://127.0.0.1:18080/index.html"]).output();
        String::from_utf8_lossy(&output.expect("curl is installed").stdout).trim().to_owned()
    };
    wait_until("the page", || page() == "page");
    forward.kill().expect("it is our child");
    forward.wait().expect("it is our child");
    node.remove_pod(&pod);
    settled(&node).assert_same_as(&before);
}

/// What a guest sees of its pod, each line a fact; which paths below `/proc` are masked or read-only says who asks.
const FACTS: &str = "uname -r; hostname; cat /etc/hostname; id -u; id -g; pwd; env | sort; \
    grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; cat /proc/self/limits; \
    awk '$2 !~ \"^/(proc/.*|sys/firmware)?$\" {print $2, $3}' /proc/self/mounts | sort; ls /dev | sort";

fn a_pod_is_the_same_through_all_three_doors(release: Release) {
    let (node, before) = node(release);
    let command = ["sh", "-c", FACTS];
    let text = |log: &str| {
        let lines = log.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap_or_default());
        lines.map(|line| format!("{line}\n")).collect::<String>()
    };
    let containerd = {
        let pod = node.run_pod("same", &json!({}));
        let id = node.run_container(&pod, "same", "c", &command, &Value::Null);
        node.exited(&id);
        let log = fs::read_to_string(node.directory().join("log/same/c.log")).expect("it has a log");
        node.remove_pod(&pod);
        text(&log)
    };
    let pericarpd = Node::start();
    let hostname = fs::read_to_string("/proc/sys/kernel/hostname").expect("proc is mounted").trim().to_owned();
    let cri = {
        pericarpd.crictl(["pull", image::BUSYBOX]).ok();
        // As containerd has it of pods that name none.
        let pod = pericarpd.run_pod("same", &json!({"hostname": hostname}));
        let id = pericarpd.run_container(&pod, "same", "c", image::BUSYBOX, &command);
        wait_until("the container to end", || {
            pericarpd.inspect_container(&id)["status"]["state"] == "CONTAINER_EXITED"
        });
        let log = pericarpd.log("same", "c");
        pericarpd.remove_pod(&pod);
        text(&log)
    };
    let line = pericarpd.pericarp(["run", "--name", &hostname, image::BUSYBOX, "sh", "-c", FACTS]).ok() + "\n";
    assert!(containerd.lines().count() > 40, "{containerd}");
    assert_eq!(containerd, cri, "containerd and the CRI");
    assert_eq!(line, cri, "the command line and the CRI");
    // The command line's own group of pods stays, as the daemon's does.
    let left = settled(&node).difference(&before);
    assert!(left.lines().all(|line| line.ends_with("/sys/fs/cgroup/pericarp/run")), "{left}");
}

/// Of a snapshotter that Debian's containerd does not have.
fn a_block_snapshot_is_a_disk_of_the_guest(release: Release) {
    let (node, before) = node(release);
    node.ctr([
        "images",
        "pull",
        "--local",
        "--snapshotter",
        "blockfile",
        "--hosts-dir",
        &node.certificates(),
        image::BUSYBOX,
    ])
    .ok();
    let script = "grep ' / ' /proc/self/mounts; echo x > /written; cat /written";
    let ran = node.ctr_run(&["--snapshotter", "blockfile"], "disk", &["sh", "-c", script]).ok();
    assert!(ran.contains("ext4") && ran.ends_with('x'), "{ran}");
    assert_eq!(settled(&node).difference(&before), "", "nothing is left");
}

/// As a kubelet asks for it where a pod has `hostUsers: false`, which Debian's containerd does not know.
fn a_pod_has_users_of_its_own(release: Release) {
    let (node, before) = node(release);
    let mapping = json!([{"host_id": 70_000, "container_id": 0, "length": 65_536}]);
    let users = json!({"userns_options": {"mode": 0, "uids": mapping, "gids": mapping}});
    let linux = json!({"security_context": {"namespace_options": users}});
    let pod = node.run_pod("users", &linux);
    let volume = node.directory().join("users-volume");
    fs::create_dir_all(&volume).expect("/run is writable");
    fs::write(volume.join("of-the-host"), "").expect("/run is writable");
    let mount =
        json!({"host_path": volume, "container_path": "/volume", "uidMappings": mapping, "gidMappings": mapping});
    let config = json!({"linux": linux, "mounts": [mount]});
    let script = "awk '{print $1, $2, $3}' /proc/self/uid_map; stat -c '%u %g' / /bin /volume/of-the-host
        touch /bin/new /volume/new; chown 33:34 /bin/new; stat -c '%u %g' /bin/new /volume/new";
    let id = node.run_container(&pod, "users", "c", &["sh", "-c", script], &config);
    let exit_code = node.exited(&id)["exitCode"].clone();
    let log = fs::read_to_string(node.directory().join("log/users/c.log")).expect("it has a log");
    assert_eq!(exit_code, 0, "{log}");
    let said: Vec<_> = log.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap_or_default()).collect();
    let expected = ["0 70000 65536", "0 0", "0 0", "0 0", "33 34", "0 0"];
    assert_eq!(said, expected, "owners are those of the namespace");
    let owner = fs::metadata(volume.join("new")).expect("the container made it").uid();
    assert_eq!(owner, 0, "a volume's files keep the owners that they have in the container");
    fs::remove_dir_all(&volume).expect("it is ours");
    node.remove_pod(&pod);
    settled(&node).assert_same_as(&before);
}

/// A test of each promise with a containerd.
macro_rules! promises {
    ($module:ident, $release:ident: $($promise:ident),* $(,)?) => {
        mod $module { $( #[test] fn $promise() { super::$promise(super::Release::$release); } )* }
    };
}

/// Each promise with each containerd.
macro_rules! promises_of_both {
    ($($promise:ident),* $(,)?) => {
        promises!(debian, Debian: $($promise),*);
        promises!(
            new, New: $($promise),*, a_block_snapshot_is_a_disk_of_the_guest, a_pod_has_users_of_its_own,
        );
    };
}

promises_of_both! {
    a_single_container_runs_in_a_guest,
    input_is_passed_on_to_its_end,
    a_program_takes_the_output,
    what_is_written_is_in_the_snapshot,
    a_pod_runs_by_its_runtime_handler,
    exit_codes_are_told,
    a_container_out_of_memory_is_told_of_before_its_end,
    stats_are_those_of_the_guest,
    limits_change_while_it_runs,
    a_task_is_paused_and_goes_on,
    host_directories_are_volumes,
    containerd_may_be_killed_and_finds_its_pods_again,
    a_killed_shim_leaves_nothing,
    a_vm_that_dies_ends_its_containers,
    what_no_guest_can_have_is_refused_with_a_reason,
    a_single_container_has_users_of_its_own,
    ports_are_forwarded,
    a_pod_is_the_same_through_all_three_doors,
}
