//! What a guest has flushed is on the disk: the host's disk writes down each write and flush in its order, and is made anew as it
//! was at each flush.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use pericarp_tests::{Entry, LoggedDisk, Node, image};
use serde_json::json;

const BYTES: u64 = 32 << 20;

/// Files that are written, each durable before the next is begun.
const FILES: u32 = 6;

fn content(number: u32) -> String {
    format!("the content of file {number}\n").repeat(2000)
}

#[test]
fn at_each_flush_the_disk_is_whole_and_has_what_was_durable() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let file = node.directory().join("logged");
    File::create(&file).and_then(|file| file.set_len(BYTES)).expect("the test's directory is writable");
    check(Command::new("mkfs.ext4").arg("-q").arg(&file), 0);
    let before = node.directory().join("before");
    fs::copy(&file, &before).expect("there is room");
    let disk = LoggedDisk::new("pericarp-flush", &file);

    let privileged = json!({"linux": {"security_context": {"privileged": true}}});
    let pod = node.run_pod("flush", &privileged);
    let devices = json!([{"container_path": "/dev/data", "host_path": disk.device(), "permissions": "mrw"}]);
    let more = json!({"devices": devices, "linux": {"security_context": {"privileged": true}}});
    let config = node.container_config("c", image::BUSYBOX, &["sleep", "1000"], &more);
    let pod_config = node.pod_config("flush", &privileged);
    let path = |path: &Path| path.to_str().expect("a plain path").to_owned();
    let container = node.crictl(["create", "--no-pull", &pod, &path(&config), &path(&pod_config)]).ok();
    node.crictl(["start", &container]).ok();
    let sh = |script: &str| node.crictl(["exec", "--sync", &container, "sh", "-c", script]).ok();
    sh("mkdir /mnt; mount -t ext4 /dev/data /mnt");
    for number in 0..FILES {
        let line = format!("the content of file {number}");
        // The page before the last file is written again too, so that there is always something that is not durable yet.
        sh(&format!(
            "yes '{line}' | head -n 2000 | dd of=/mnt/{number} conv=fsync 2>/dev/null; echo later > /mnt/later"
        ));
        disk.mark();
    }
    node.remove_pod(&pod);

    let entries = disk.entries();
    let flushes = entries.iter().filter(|entry| **entry == Entry::Flush).count();
    assert!(flushes >= usize::try_from(FILES).expect("fits"), "{flushes} flushes");
    replay(&before, &entries, &node.directory().join("replayed"));
}

/// Makes the disk anew, and looks at it at each flush.
fn replay(before: &Path, entries: &[Entry], look: &Path) {
    let disk = OpenOptions::new().read(true).write(true).open(before).expect("opens");
    let mut durable = 0;
    for entry in entries {
        match entry {
            Entry::Write(at, data) => disk.write_all_at(data, *at).expect("writes"),
            Entry::Discard(at, bytes) => {
                disk.write_all_at(&vec![0; usize::try_from(*bytes).expect("fits")], *at).expect("writes");
            }
            Entry::Mark => durable += 1,
            Entry::Flush => {
                fs::copy(before, look).expect("there is room");
                inspect(look, durable);
            }
        }
    }
    assert_eq!(durable, FILES);
}

/// As after a loss of power: the journal first, then nothing may be wrong, and each file that was durable is there.
fn inspect(disk: &Path, durable: u32) {
    check(Command::new("e2fsck").args(["-y", "-E", "journal_only"]).arg(disk), 1);
    check(Command::new("e2fsck").args(["-f", "-n"]).arg(disk), 0);
    for number in 0..durable {
        let said = check(Command::new("debugfs").arg("-R").arg(format!("cat /{number}")).arg(disk), 0);
        assert!(said == content(number), "file {number} of {durable}: {} bytes", said.len());
    }
}

/// Runs a program whose exit code may be at most `most`.
fn check(command: &mut Command, most: i32) -> String {
    let done = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    let code = done.status.code();
    let fine = code.is_some_and(|code| code <= most);
    assert!(fine, "{command:?} gave {code:?}: {said}{}", String::from_utf8_lossy(&done.stderr));
    said
}
