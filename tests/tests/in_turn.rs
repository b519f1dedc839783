//! Many pods, one after the other.

use std::fs;

use pericarp_tests::{Client, Node, resident_kib};

const IN_TURN: usize = 100;

/// After which the daemon has allocated what it keeps.
const WARM_UP: usize = 5;

/// Growth of the daemon that is put down to its allocator, over [`IN_TURN`] pods.
const GROWTH_KIB: u64 = 4096;

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("the daemon runs").count()
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
