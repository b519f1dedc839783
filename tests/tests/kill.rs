//! Kill anything, anywhere: nothing leaks, nothing lies.

use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use pericarp_tests::{Node, image, wait_until};
use serde_json::json;

/// How soon a dead VMM must show, with room for a `crictl` process in the lab.
const NOTICED: Duration = Duration::from_secs(3);

/// How soon one that hangs must show: a heartbeat that is not answered.
const HANG_NOTICED: Duration = Duration::from_secs(30);

fn assert_dead(node: &Node, pod: &str, container: &str, word: &str) {
    let since = Instant::now();
    wait_until("the pod to be NotReady", || node.inspect_pod(pod)["status"]["state"] == "SANDBOX_NOTREADY");
    assert!(since.elapsed() < NOTICED, "noticed after {:?}", since.elapsed());
    let status = &node.inspect_container(container)["status"];
    assert_eq!(status["state"], "CONTAINER_EXITED", "{status}");
    assert_ne!(status["exitCode"], 0, "{status}");
    assert_ne!(status["reason"], "Completed", "{status}");
    let message = status["message"].as_str().unwrap_or_default();
    assert!(message.contains(word), "{word:?} is not in {message:?}");
}

#[test]
fn a_killed_vmm_is_told_with_its_reason() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let before = node.inventory();
    let pod = node.run_pod("killed", &json!({}));
    let container = node.run_container(&pod, "killed", "c", image::BUSYBOX, &["sleep", "1000"]);
    kill(node.vmm_pid(&pod), Signal::SIGKILL).expect("the VMM runs");
    assert_dead(&node, &pod, &container, "signal 9");
    node.remove_pod(&pod);
    let after = node.inventory();
    assert!(!after.difference(&before).contains("pericarp"), "{}", after.difference(&before));
}

#[test]
fn a_guest_panic_is_told_with_the_kernels_last_lines() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("panic", &json!({}));
    let config = node.container_config(
        "c",
        image::BUSYBOX,
        &["sleep", "1000"],
        &json!({"linux": {"security_context": {"privileged": true}}}),
    );
    let pod_config = node.pod_config("panic", &json!({}));
    let path = |path: &std::path::Path| path.to_str().expect("a plain path").to_owned();
    let container = node.crictl(["create", "--no-pull", &pod, &path(&config), &path(&pod_config)]).ok();
    node.crictl(["start", &container]).ok();
    node.crictl(["exec", "--sync", &container, "sh", "-c", "echo c > /proc/sysrq-trigger"]).refused();
    assert_dead(&node, &pod, &container, "sysrq triggered crash");
    node.remove_pod(&pod);
}

#[test]
fn a_daemon_killed_between_calls_finds_everything_again() {
    let mut node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let first = node.run_pod("first", &json!({}));
    node.remove_pod(&first);
    let before = node.inventory();
    let pod = node.run_pod("stays", &json!({}));
    let talker = "i=0; while :; do echo tick-$i; i=$((i+1)); sleep 0.2; done";
    let container = node.run_container(&pod, "stays", "c", image::BUSYBOX, &["sh", "-c", talker]);
    let short = node.run_container(&pod, "stays", "short", image::BUSYBOX, &["sh", "-c", "sleep 4; exit 5"]);
    let vmm = node.vmm_pid(&pod);
    node.kill_daemon();
    let seen = node.log("stays", "c").lines().count();
    wait_until("the log to go on without a daemon", || node.log("stays", "c").lines().count() > seen + 30);
    node.start_daemon();
    assert_eq!(node.vmm_pid(&pod), vmm);
    assert_eq!(node.crictl(["pods", "-q"]).ok().lines().count(), 1);
    assert_eq!(node.crictl(["ps", "-aq"]).ok().lines().count(), 2);
    assert_eq!(node.crictl(["exec", "--sync", &container, "echo", "still"]).ok(), "still");
    wait_until("the exit that nobody saw", || node.inspect_container(&short)["status"]["state"] == "CONTAINER_EXITED");
    assert_eq!(node.inspect_container(&short)["status"]["exitCode"], 5);
    let log = node.log("stays", "c");
    for (number, line) in log.lines().enumerate() {
        assert!(line.ends_with(&format!("tick-{number}")), "line {number} is {line}");
    }
    node.remove_pod(&pod);
    node.inventory().assert_same_as(&before);
}

#[test]
fn a_vmm_that_died_without_a_daemon_is_told_truly() {
    let mut node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("lost", &json!({}));
    let container = node.run_container(&pod, "lost", "c", image::BUSYBOX, &["sleep", "1000"]);
    let vmm = node.vmm_pid(&pod);
    node.kill_daemon();
    kill(vmm, Signal::SIGKILL).expect("the VMM runs");
    node.start_daemon();
    assert_dead(&node, &pod, &container, "killed");
    node.remove_pod(&pod);
}

#[test]
fn an_exec_in_flight_dies_with_the_daemon() {
    let mut node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("exec", &json!({}));
    let container = node.run_container(&pod, "exec", "c", image::BUSYBOX, &["sleep", "1000"]);
    let mut crictl = node.crictl_command();
    crictl.args(["exec", "--sync", &container, "sleep", "777"]).stdout(Stdio::null()).stderr(Stdio::piped());
    let exec = crictl.spawn().expect("crictl runs");
    wait_until("the exec to run", || node.crictl(["exec", "--sync", &container, "ps"]).ok().contains("sleep 777"));
    node.kill_daemon();
    let ended = exec.wait_with_output().expect("crictl runs");
    assert!(!ended.status.success());
    node.start_daemon();
    wait_until("the process to be gone", || {
        !node.crictl(["exec", "--sync", &container, "ps"]).ok().contains("sleep 777")
    });
    node.remove_pod(&pod);
}

#[test]
fn a_daemon_killed_during_calls_leaves_no_orphan() {
    let mut node = Node::start();
    let first = node.run_pod("first", &json!({}));
    node.remove_pod(&first);
    let before = node.inventory();
    // From before the record to after the answer, in the lab's time.
    for delay_ms in [5, 30, 80, 150, 300, 600, 1000, 1600] {
        let config = node.pod_config("cut", &json!({}));
        let mut crictl = node.crictl_command();
        let call =
            crictl.arg("runp").arg(config).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("crictl runs");
        // Not synchronisation: the delay is what is being varied.
        std::thread::sleep(Duration::from_millis(delay_ms));
        node.kill_daemon();
        call.wait_with_output().expect("crictl runs");
        node.start_daemon();
        for pod in node.crictl(["pods", "-q"]).ok().lines() {
            node.remove_pod(pod);
        }
        node.inventory().assert_same_as(&before);
    }
}

#[test]
fn a_pod_that_hangs_is_not_ready_and_can_be_removed() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let first = node.run_pod("first", &json!({}));
    node.remove_pod(&first);
    let before = node.inventory();
    let pod = node.run_pod("hangs", &json!({}));
    let container = node.run_container(&pod, "hangs", "c", image::BUSYBOX, &["sleep", "1000"]);
    let vmm = node.vmm_pid(&pod);
    let state = || node.inspect_pod(&pod)["status"]["state"].clone();
    kill(vmm, Signal::SIGSTOP).expect("the VMM runs");
    let since = Instant::now();
    wait_until("the pod to be NotReady", || state() == "SANDBOX_NOTREADY");
    assert!(since.elapsed() < HANG_NOTICED, "noticed after {:?}", since.elapsed());
    let refused = node.crictl(["exec", "--sync", &container, "true"]).refused();
    assert!(!refused.contains("panic"), "{refused}");
    // It comes back, with all that it had.
    kill(vmm, Signal::SIGCONT).expect("the VMM is there");
    wait_until("the pod to be Ready again", || state() == "SANDBOX_READY");
    assert_eq!(node.crictl(["exec", "--sync", &container, "echo", "back"]).ok(), "back");
    kill(vmm, Signal::SIGSTOP).expect("the VMM runs");
    wait_until("the pod to be NotReady", || state() == "SANDBOX_NOTREADY");
    node.remove_pod(&pod);
    node.inventory().assert_same_as(&before);
}
