//! Many pods: at once, and one after the other.

use std::fs;

use pericarp_tests::{Client, Node};
use serde_json::json;

const AT_ONCE: usize = 10;
const IN_TURN: usize = 100;

/// After which the daemon has allocated what it keeps.
const WARM_UP: usize = 5;

/// Growth of the daemon that is put down to its allocator, over [`IN_TURN`] pods.
const GROWTH_KIB: u64 = 4096;

fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the daemon runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a process has a size");
    line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).expect("a number of KiB")
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("the daemon runs").count()
}

#[test]
fn ten_pods_start_at_once() {
    let node = Node::start();
    let first = node.run_pod("first", &json!({}));
    node.remove_pod(&first);
    let before = node.inventory();
    let starting: Vec<_> = (0..AT_ONCE)
        .map(|number| {
            let config = node.pod_config(&format!("many-{number}"), &json!({}));
            let mut crictl = node.crictl_command();
            crictl.arg("runp").arg(config).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
            crictl.spawn().expect("crictl runs")
        })
        .collect();
    let pods: Vec<_> = starting
        .into_iter()
        .map(|crictl| {
            let output = crictl.wait_with_output().expect("crictl runs");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        })
        .collect();
    let addresses: std::collections::BTreeSet<_> =
        pods.iter().map(|pod| node.inspect_pod(pod)["status"]["network"]["ip"].to_string()).collect();
    assert_eq!(addresses.len(), AT_ONCE, "{addresses:?}");
    for pod in &pods {
        node.remove_pod(pod);
    }
    node.inventory().assert_same_as(&before);
}

#[test]
fn a_hundred_pods_in_turn_leave_the_daemon_as_it_was() {
    let node = Node::start();
    let mut client = Client::connect(&node.socket());
    let mut turn = |number: usize| {
        let pod = client.run_pod(&format!("turn-{number}"));
        client.remove_pod(&pod);
    };
    (0..WARM_UP).for_each(&mut turn);
    let before = node.inventory();
    let (memory, open) = (resident_kib(node.daemon_pid()), descriptors(node.daemon_pid()));
    (0..IN_TURN).for_each(turn);
    let (memory_after, open_after) = (resident_kib(node.daemon_pid()), descriptors(node.daemon_pid()));
    println!("daemon: {memory} → {memory_after} KiB, {open} → {open_after} descriptors over {IN_TURN} pods");
    assert!(open_after <= open + 2, "{open} → {open_after} descriptors");
    assert!(memory_after <= memory + GROWTH_KIB, "{memory} → {memory_after} KiB");
    node.inventory().assert_same_as(&before);
}
