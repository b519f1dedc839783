//! A new daemon takes over the pods of an earlier one, whose VMMs, agents and kernels go on.

use pericarp_tests::{Node, image, wait_until};
use serde_json::json;

#[test]
fn pods_of_an_earlier_release_go_on_and_end_under_a_new_daemon() {
    let mut node = Node::start_previous();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let first = node.run_pod("first", &json!({}));
    node.remove_pod(&first);
    let before = node.inventory();
    let old = node.run_pod("old", &json!({}));
    let talk = "i=0; while :; do echo tick-$i; i=$((i+1)); sleep 0.2; done";
    let talker = node.run_container(&old, "old", "talker", image::BUSYBOX, &["sh", "-c", talk]);
    let brief = node.run_container(&old, "old", "brief", image::BUSYBOX, &["sh", "-c", "sleep 3; exit 5"]);
    let vmm = node.vmm_pid(&old);
    node.kill_daemon();
    let seen = node.log("old", "talker").lines().count();
    node.upgrade();
    node.start_daemon();

    assert_eq!(node.vmm_pid(&old), vmm);
    assert_eq!(node.inspect_pod(&old)["status"]["state"], "SANDBOX_READY");
    assert_eq!(node.crictl(["exec", "--sync", &talker, "echo", "still"]).ok(), "still");
    wait_until("the log to go on", || node.log("old", "talker").lines().count() > seen + 10);
    wait_until("the exit of a container", || node.inspect_container(&brief)["status"]["state"] == "CONTAINER_EXITED");
    assert_eq!(node.inspect_container(&brief)["status"]["exitCode"], 5);
    // What is new is new in the old pod too, as far as its agent goes; and new pods are the new release's.
    let later = node.run_container(&old, "old", "later", image::BUSYBOX, &["sleep", "1000"]);
    assert_eq!(node.crictl(["exec", "--sync", &later, "echo", "here"]).ok(), "here");
    assert!(node.crictl(["stats", "-o", "json", &talker]).ok().contains("talker"));
    let new = node.run_pod("new", &json!({}));
    let fresh = node.run_container(&new, "new", "fresh", image::BUSYBOX, &["sleep", "1000"]);
    assert_eq!(node.crictl(["exec", "--sync", &fresh, "echo", "new"]).ok(), "new");
    for pod in [old, new] {
        node.remove_pod(&pod);
    }
    node.inventory().assert_same_as(&before);
}
