//! Programs of the node that die: pods go on, and nothing is left of those that are removed afterwards.

use pericarp_tests::{Cluster, Pod, wait_until};
use serde_json::json;

fn pods_outlive(name: &str, programs: &[&'static str]) {
    let cluster = Cluster::get();
    // A first pod makes what stays: the bridge, the kubelet's own cgroups.
    Pod::run(&cluster, &format!("{name}-first"), &json!({})).remove();
    let before = settled(&cluster);
    let pod = Pod::run(&cluster, name, &json!({}));
    let boot_id = pod.sh("cat /proc/sys/kernel/random/boot_id");
    let container = pod.container("c");
    cluster.restart(programs);
    pod.ready();
    assert_eq!(pod.sh("cat /proc/sys/kernel/random/boot_id"), boot_id);
    let after = pod.container("c");
    for field in ["containerID", "restartCount"] {
        assert_eq!(after[field], container[field]);
    }
    pod.remove();
    let mut now = settled(&cluster);
    wait_until(&format!("the node to be as it was:\n{}", now.difference(&before)), || {
        now = cluster.inventory();
        now == before
    });
}

/// What there is once pods of earlier tests are gone.
fn settled(cluster: &Cluster) -> pericarp_tests::Inventory {
    let mut last = None;
    cluster.eventually("earlier pods and their cgroups to be gone", || {
        let below =
            ["/sys/fs/cgroup/kubepods", "/sys/fs/cgroup/kubepods/burstable", "/sys/fs/cgroup/kubepods/besteffort"];
        let entries = below.iter().filter_map(|path| std::fs::read_dir(path).ok()).flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let cgroups: Vec<_> = names.filter(|name| name.starts_with("pod")).collect();
        // The DNS server is of another namespace, and stays.
        let pods = |more: &[&str]| cluster.crictl(["pods", "-q"].iter().chain(more).copied()).ok().lines().count();
        let (ours, all) = (pods(&["--namespace", "default"]), pods(&[]));
        let settled = ours == 0 && cgroups.len() == all;
        let now = Some((ours, all, cgroups));
        if last != now {
            println!("pods of these tests, all pods, cgroups: {now:?}");
            last = now;
        }
        settled
    });
    cluster.inventory()
}

#[test]
fn pods_outlive_the_kubelet() {
    pods_outlive("kubelet-dies", &["kubelet"]);
}

#[test]
fn pods_outlive_the_runtime() {
    pods_outlive("runtime-dies", &["pericarpd"]);
}

#[test]
fn pods_outlive_both_at_once() {
    pods_outlive("both-die", &["pericarpd", "kubelet"]);
}

#[test]
fn a_vm_that_dies_is_started_again() {
    let cluster = Cluster::get();
    let pod = Pod::run(&cluster, "vm-dies", &json!({}));
    let boot_id = pod.sh("cat /proc/sys/kernel/random/boot_id");
    nix::sys::signal::kill(pod.vmm_pid(), nix::sys::signal::Signal::SIGKILL).expect("it runs");
    cluster.eventually("a restart", || pod.container("c")["restartCount"] == 1);
    pod.ready();
    assert_ne!(pod.sh("cat /proc/sys/kernel/random/boot_id"), boot_id);
}
