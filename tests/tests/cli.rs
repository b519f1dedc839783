//! The command line, as people and their scripts use it.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pericarp_tests::{Inventory, Node, Terminal, image, wait_until};
use serde_json::{Value, json};

/// Exit code of `pericarp run` and `exec` for what is not the command's doing.
const OURS: i32 = 125;

/// Longer than any pipe or window on the way.
const LONG_BYTES: usize = 3 << 20;

/// A node on which everything that stays after a first pod is there: an image, a bridge and its chains.
fn node() -> (Node, Inventory) {
    static FIRST: Once = Once::new();
    let node = Node::start();
    FIRST.call_once(|| drop(node.pericarp(["run", image::BUSYBOX, "true"]).ok()));
    let before = inventory(&node);
    (node, before)
}

/// A node's inventory, and what runs keep in places of their own.
fn inventory(node: &Node) -> Inventory {
    Inventory::take(&[&node.directory().join("state"), Path::new("/var/lib/pericarp/scratch/run")])
}

#[track_caller]
fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).expect("a pid")), signal).expect("it runs");
}

/// Starts `pericarp` with its output piped.
fn start(node: &Node, arguments: &[&str]) -> Child {
    let mut command = node.pericarp_command();
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("pericarp is installed")
}

/// Reads a program's output until it holds `text`.
#[track_caller]
fn read_until(child: &mut Child, text: &str) {
    let output = child.stdout.as_mut().expect("it is piped");
    let (mut read, mut chunk) = (String::new(), [0; 256]);
    while !read.contains(text) {
        let count = output.read(&mut chunk).expect("it is a pipe");
        assert!(count > 0, "{text:?} did not come, but {read:?}");
        read.push_str(&String::from_utf8_lossy(&chunk[..count]));
    }
}

#[test]
fn run_passes_output_and_exit_code_on() {
    let (node, before) = node();
    let ran = node.pericarp(["run", image::BUSYBOX, "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (7, "out", "err"));
    let shown = node
        .pericarp([
            "run",
            "-e",
            "X=1",
            "-w",
            "/tmp",
            "--name",
            "asked",
            image::BUSYBOX,
            "sh",
            "-c",
            "echo $X $PWD; hostname; id -u",
        ])
        .ok();
    assert_eq!(shown.lines().collect::<Vec<_>>(), ["1 /tmp", "asked", "0"]);
    let document = node.pericarp(["run", "-o", "json", image::BUSYBOX, "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(document.code, 7);
    let document: Value = serde_json::from_str(&document.stdout).expect("a document");
    assert_eq!(document, json!({"exit_code": 7, "stdout": "out\n", "stderr": "err\n"}));
    inventory(&node).assert_same_as(&before);
}

#[test]
fn run_says_what_it_cannot_do() {
    let (node, before) = node();
    let missing = node.pericarp(["run", "registry.k8s.io/no-such-image:1"]);
    assert_eq!(missing.code, OURS);
    assert!(missing.stderr.contains("no-such-image") && missing.stderr.contains("check the name"), "{missing:?}");
    let command = node.pericarp(["run", image::BUSYBOX, "no-such-command"]);
    assert_eq!(command.code, OURS);
    assert!(command.stderr.contains("no-such-command"), "{command:?}");
    let file = node.pericarp(["run", "/no/such/file"]);
    assert_eq!(file.code, OURS);
    assert!(file.stderr.contains("/no/such/file"), "{file:?}");
    inventory(&node).assert_same_as(&before);
}

#[test]
fn run_takes_what_is_piped_and_gives_it_back() {
    let (node, before) = node();
    let text: Vec<u8> = (0..LONG_BYTES).map(|at| b'a' + u8::try_from(at % 23).expect("small")).collect();
    let mut cat = start(&node, &["run", "-i", image::BUSYBOX, "cat"]);
    let mut stdin = cat.stdin.take().expect("it is piped");
    let written = text.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&written));
    let output = cat.wait_with_output().expect("pericarp runs");
    writer.join().expect("no panic").expect("all is taken");
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout == text, "{} of {LONG_BYTES} bytes came back", output.stdout.len());
    // A command that takes nothing ends all the same.
    let mut deaf = start(&node, &["run", "-i", image::BUSYBOX, "sh", "-c", "exec <&-; sleep 1; exit 4"]);
    let mut stdin = deaf.stdin.take().expect("it is piped");
    let writer = std::thread::spawn(move || stdin.write_all(&text));
    assert_eq!(deaf.wait().expect("pericarp runs").code(), Some(4));
    drop(writer.join().expect("no panic"));
    inventory(&node).assert_same_as(&before);
}

#[test]
fn runs_side_by_side_leave_each_other_alone() {
    let (node, before) = node();
    let runs: Vec<_> = (3..6)
        .map(|code| (code, start(&node, &["run", image::BUSYBOX, "sh", "-c", &format!("exit {code}")])))
        .collect();
    for (code, run) in runs {
        let output = run.wait_with_output().expect("pericarp runs");
        assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
    }
    inventory(&node).assert_same_as(&before);
}

#[test]
fn signals_reach_what_runs() {
    let (node, before) = node();
    let script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.1; done";
    let mut handled = start(&node, &["run", image::BUSYBOX, "sh", "-c", script]);
    read_until(&mut handled, "ready");
    signal(&handled, Signal::SIGINT);
    read_until(&mut handled, "caught");
    assert_eq!(handled.wait().expect("pericarp runs").code(), Some(9));
    let mut plain = start(&node, &["run", image::BUSYBOX, "sh", "-c", "echo ready; exec sleep 1000"]);
    read_until(&mut plain, "ready");
    signal(&plain, Signal::SIGTERM);
    assert_eq!(plain.wait().expect("pericarp runs").code(), Some(128 + 15));
    // While its pod still boots.
    let mut early = start(&node, &["run", image::BUSYBOX, "sleep", "1000"]);
    wait_until("the pod's record", || inventory(&node).difference(&before).contains("record.json"));
    signal(&early, Signal::SIGINT);
    assert_eq!(early.wait().expect("pericarp runs").code(), Some(128 + 2));
    inventory(&node).assert_same_as(&before);
}

#[test]
fn a_run_that_was_killed_is_cleaned_up_by_the_next() {
    let (node, before) = node();
    let mut killed = start(&node, &["run", image::BUSYBOX, "sh", "-c", "echo ready; exec sleep 1000"]);
    read_until(&mut killed, "ready");
    killed.kill().expect("it runs");
    killed.wait().expect("pericarp ran");
    assert_eq!(node.pericarp(["ps", "-o", "json"]).json().as_array().map(Vec::len), Some(1));
    node.pericarp(["run", image::BUSYBOX, "true"]).ok();
    inventory(&node).assert_same_as(&before);
}

#[test]
fn a_terminal_is_the_containers() {
    let (node, before) = node();
    let mut command = node.pericarp_command();
    command.args(["run", "-it", image::BUSYBOX, "sh"]);
    let mut terminal = Terminal::run(&command, 40, 100);
    let settings = terminal.settings();
    terminal.wait_for("# ", 1);
    terminal.type_in("stty size; tty\r");
    terminal.wait_for("40 100", 1);
    terminal.wait_for("/dev/pts/", 1);
    terminal.resize(50, 132);
    terminal.type_in("for i in $(seq 100); do [ \"$(stty size)\" = '50 132' ] && break; sleep 0.1; done; stty size\r");
    terminal.wait_for("50 132\r\n", 1);
    // Ctrl-C is the foreground's, not ours.
    terminal.type_in("echo be''gun; sleep 1000; echo code-$?\r");
    terminal.wait_for("begun", 1);
    terminal.type_in("\x03");
    terminal.type_in("echo sti''ll\r");
    terminal.wait_for("still", 1);
    terminal.type_in("exit 3\r");
    assert_eq!(terminal.wait().code(), Some(3), "{}", terminal.screen());
    assert_eq!(terminal.settings(), settings, "the terminal is put back");
    drop(terminal);
    inventory(&node).assert_same_as(&before);
}

#[test]
fn a_pull_shows_how_far_it_is() {
    let (node, before) = node();
    node.crictl(["rmi", image::NGINX]);
    let mut command = node.pericarp_command();
    command.args(["run", image::NGINX, "nginx", "-v"]);
    let mut terminal = Terminal::run(&command, 24, 120);
    assert!(terminal.wait().success(), "{}", terminal.screen());
    terminal.wait_for("nginx/", 1);
    let screen = terminal.screen();
    let bar = screen.split('\r').find(|line| line.contains(image::NGINX) && line.contains("iB/"));
    assert!(bar.is_some(), "no bar in {screen:?}");
    drop(terminal);
    inventory(&node).assert_same_as(&before);
}

/// The directory of an image's OCI layout.
fn layout(name: &str) -> PathBuf {
    let images = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/images")).output().expect("it runs");
    let directory = String::from_utf8(images.stdout).expect("a path");
    Path::new(directory.lines().last().expect("a line")).join("layouts").join(name)
}

#[test]
fn run_takes_layouts_and_archives() {
    let (node, before) = node();
    for name in ["pericarp_hard-links_latest", "pericarp_hard-docker_latest"] {
        let layout = layout(name);
        let from_layout = node.pericarp(["run", layout.to_str().expect("a plain path"), "/check"]).ok();
        assert_eq!(from_layout, "ok", "{name}");
    }
    let archive = tempfile::tempdir().expect("a directory");
    let archive = archive.path().join("image.tar");
    let layout = layout("pericarp_hard-whiteouts_latest");
    let tar = Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&layout).arg(".").status();
    assert!(tar.expect("tar is installed").success());
    let from_archive = node.pericarp(["run", archive.to_str().expect("a plain path"), "/check"]).ok();
    assert_eq!(from_archive, "ok");
    inventory(&node).assert_same_as(&before);
}

#[test]
fn a_pod_can_be_looked_into() {
    let (node, _) = node();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("seen", &json!({}));
    let script = "echo to-out; echo to-err >&2; printf part; exec sleep 1000";
    let container = node.run_container(&pod, "seen", "c", image::BUSYBOX, &["sh", "-c", script]);

    let table = node.pericarp(["ps"]).ok();
    assert!(table.lines().any(|line| line.contains("seen") && line.contains("running")), "{table}");
    let pods = node.pericarp(["ps", "-o", "json"]).json();
    assert_eq!(pods[0]["id"], pod.as_str());
    assert!(pods[0]["containers"][&container].is_object(), "{pods}");

    let inspected = node.pericarp(["inspect", "-o", "json", "seen"]).json();
    let timeline = inspected["timeline"].as_array().expect("a timeline");
    for phase in ["asked_for", "begun", "spawned", "vmm: booted", "vmm: agent_connected", "agent_ready", "configured"] {
        let found = timeline.iter().find(|moment| moment["name"] == phase);
        let moment = found.unwrap_or_else(|| panic!("no {phase} in {timeline:?}"));
        assert!(moment["since_first_ms"].is_f64() && moment["took_ms"].is_f64(), "{moment}");
    }
    let connected = timeline.iter().find(|moment| moment["name"] == "vmm: agent_connected").expect("looked at above");
    assert!(connected["exits"].as_u64().is_some_and(|exits| exits > 10), "{connected}");
    assert!(inspected["vmm_pid"].is_u64() && inspected["counters"].is_object(), "{inspected}");
    let shown = node.pericarp(["inspect", &pod[..12]]).ok();
    for word in ["agent_ready", "EXITS", "TOOK (ms)", "Kernel"] {
        assert!(shown.contains(word), "{word} is not in {shown}");
    }
    let console = node.pericarp(["console", "-o", "json", "seen"]).json();
    assert!(console["text"].is_string() && console["next"].is_u64(), "{console}");
    let text = console["text"].as_str().unwrap_or_default().trim();
    assert_eq!(node.pericarp(["console", "seen"]).ok().lines().next(), text.lines().next());

    wait_until("the log", || node.log("seen", "c").contains("to-err"));
    let logs = node.pericarp(["logs", "c"]);
    assert!(logs.stdout.contains("to-out") && !logs.stdout.contains("to-err"), "{logs:?}");
    assert!(logs.stderr.contains("to-err"), "{logs:?}");
    let document = node.pericarp(["logs", "-o", "json", "c"]).ok();
    let lines: Vec<Value> =
        document.lines().map(|line| serde_json::from_str(line).expect("a document a line")).collect();
    assert!(lines.iter().any(|line| line["text"] == "to-err" && line["stream"] == "stderr"), "{document}");

    let failed = node.pericarp(["exec", "c", "sh", "-c", "echo said; exit 6"]);
    assert_eq!((failed.code, failed.stdout.as_str()), (6, "said"));
    assert!(node.pericarp(["exec", "c", "sh", "-c", "echo $PATH"]).ok().contains("/bin"));
    let document = node.pericarp(["exec", "-o", "json", "c", "sh", "-c", "echo err >&2; exit 6"]);
    let document: Value = serde_json::from_str(&document.stdout).expect("a document");
    assert_eq!(document, json!({"exit_code": 6, "stdout": "", "stderr": "err\n"}));
    let mut cat = start(&node, &["exec", "-i", "c", "cat"]);
    cat.stdin.take().expect("it is piped").write_all(b"typed").expect("it takes input");
    assert_eq!(cat.wait_with_output().expect("pericarp runs").stdout, b"typed");

    assert_eq!(node.pericarp(["rm", "-o", "json", "seen"]).json(), json!([pod]));
    assert_eq!(node.pericarp(["ps", "-o", "json"]).json(), json!([]));
    for lost in [["inspect", "seen"], ["console", "seen"], ["logs", "c"], ["rm", "seen"]] {
        let refused = node.pericarp(lost);
        assert!(refused.code == 1 && refused.stderr.contains("`pericarp ps` shows"), "{refused:?}");
    }
}

#[test]
fn a_run_can_be_looked_into_by_others() {
    let (node, before) = node();
    let mut run = start(&node, &["run", "--name", "front", image::BUSYBOX, "sh", "-c", "echo ready; exec sleep 1000"]);
    read_until(&mut run, "ready");
    assert_eq!(node.pericarp(["exec", "main", "hostname"]).ok(), "front");
    assert!(node.pericarp(["inspect", "front"]).ok().contains("agent_ready"));
    assert!(node.pericarp(["rm", "front"]).refused().contains("pericarp run"));
    signal(&run, Signal::SIGTERM);
    assert_eq!(run.wait().expect("pericarp runs").code(), Some(128 + 15));
    inventory(&node).assert_same_as(&before);
}

#[test]
fn check_says_what_is_lacking_and_what_to_do() {
    let node = Node::start();
    let good = node.pericarp(["check"]);
    assert_eq!(good.code, 0, "{good:?}");
    assert!(good.stdout.contains("KVM") && !good.stdout.contains("LACKING"), "{good:?}");
    // A host without devices but the one that every program needs.
    let without = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec \"$@\"";
    let program = node.program("pericarp");
    let check = |config: &Path, arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", without, "sh"]).arg(&program).arg("--config").arg(config).arg("check");
        let output = command.args(arguments).output().expect("util-linux is installed");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, shown) = check(&node.config(), &[]);
    assert_eq!(code, Some(1), "{shown}");
    let line = |name: &str| shown.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
    assert!(line("KVM").contains("LACKING") && line("KVM").contains("modprobe kvm_"), "{shown}");
    assert!(line("tun").contains("LACKING") && line("tun").contains("modprobe tun"), "{shown}");
    assert!(line("guest kernel").contains(" ok "), "{shown}");
    let odd = node.directory().join("odd.toml");
    fs::write(&odd, "kernel = \"/no/such/vmlinux\"\n[cni]\nbin_dirs = [\"/no/such\"]\n").expect("the test's directory");
    let (code, document) = check(&odd, &["-o", "json"]);
    assert_eq!(code, Some(1));
    let findings: Value = serde_json::from_str(&document).expect("a document");
    for (what, fix) in [("guest kernel", "make install"), ("CNI plugins", "apt-get install")] {
        let finding = findings.as_array().expect("a list").iter().find(|finding| finding["what"] == what);
        let finding = finding.unwrap_or_else(|| panic!("nothing on {what} in {findings}"));
        assert!(finding["ok"] == false && finding["fix"].as_str().is_some_and(|text| text.contains(fix)), "{finding}");
    }
}

#[test]
fn version_names_both_programs_and_the_kernel() {
    let node = Node::start();
    let document = node.pericarp(["version", "-o", "json"]).json();
    let release = document["guest_kernel"]["release"].as_str().expect("a version");
    assert!(release.starts_with("6.12.") && document["pericarp"].is_string(), "{document}");
    let shown = node.pericarp(["version"]).ok();
    assert!(shown.contains(release), "{shown}");
    assert_eq!(node.pericarp(["run", image::BUSYBOX, "uname", "-r"]).ok(), release);
}
