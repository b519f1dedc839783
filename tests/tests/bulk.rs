//! Much of everything: sessions, bytes, lines, kills. What takes long is cut down unless `PERICARP_BULK=whole`.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use pericarp_tests::{Node, image, resident_kib, wait_until};
use serde_json::json;

/// Both of crictl's.
const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

/// Sessions at once in one container.
const SESSIONS: usize = 64;

/// Growth of the daemon or the VMM that is put down to their allocators, while they pass on what does not fit in it.
const GROWTH_KIB: u64 = 8192;

/// What all buffers between a command and a client that does not read may hold together.
const BUFFERED: usize = 16 << 20;

/// Bytes that a command writes between two counts.
const CHUNK: usize = 64 << 10;

/// `whole`, or `part` where the whole was not asked for.
fn amount<T>(whole: T, part: T) -> T {
    if std::env::var("PERICARP_BULK").is_ok_and(|value| value == "whole") { whole } else { part }
}

/// Bytes that no wrong order, lost piece or repeated one would leave as they are.
struct Noise(u64);

impl Read for Noise {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        for byte in into.iter_mut() {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = self.0.to_be_bytes()[0];
        }
        Ok(into.len())
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Killed {
    fn stdin(&mut self) -> ChildStdin {
        self.0.stdin.take().expect("piped")
    }

    fn stdout(&mut self) -> ChildStdout {
        self.0.stdout.take().expect("piped")
    }
}

fn exec(node: &Node, transport: &str, container: &str, command: &[&str]) -> Killed {
    let mut crictl = node.crictl_command();
    crictl.args(["exec", "-i", "--transport", transport, container]).args(command);
    Killed(crictl.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("crictl is installed"))
}

/// A node with a pod of that name and a container in it that waits.
fn waiting(name: &str) -> (Node, String, String) {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod(name, &json!({}));
    let container = node.run_container(&pod, name, "c", image::BUSYBOX, &["sleep", "10000"]);
    (node, pod, container)
}

#[test]
fn many_sessions_at_once_have_each_their_own() {
    let (node, pod, container) = waiting("sessions");
    for transport in TRANSPORTS {
        let mut sessions: Vec<_> = (0..SESSIONS)
            .map(|_| exec(&node, transport, &container, &["sh", "-c", "read word; echo $word; read end; true"]))
            .collect();
        // All of them are there before the first one ends.
        let mut inputs: Vec<_> = sessions.iter_mut().map(Killed::stdin).collect();
        for (number, input) in inputs.iter_mut().enumerate() {
            writeln!(input, "session-{number}").expect("crictl reads");
        }
        for (number, session) in sessions.iter_mut().enumerate() {
            let mut line = String::new();
            BufReader::new(session.stdout()).read_line(&mut line).expect("text");
            assert_eq!(line.trim(), format!("session-{number}"), "{transport}");
        }
        drop(inputs);
        for mut session in sessions {
            session.0.wait().expect("it is our child");
        }
        let shells = || node.crictl(["exec", "--sync", &container, "ps"]).ok().matches("read word").count();
        wait_until("the sessions' commands to be gone", || shells() == 0);
    }
    node.remove_pod(&pod);
}

#[test]
fn a_large_copy_goes_both_ways_in_little_memory() {
    let bytes: u64 = amount(1 << 30, 32 << 20);
    let (node, pod, container) = waiting("copy");
    let vmm = u32::try_from(node.vmm_pid(&pod).as_raw()).expect("a pid");
    for transport in TRANSPORTS {
        let mut cat = exec(&node, transport, &container, &["cat"]);
        let (mut input, output) = (cat.stdin(), cat.stdout());
        let sizes = || [resident_kib(node.daemon_pid()), resident_kib(vmm)];
        let before = sizes();
        let mut largest = before;
        std::thread::scope(|scope| {
            scope.spawn(move || std::io::copy(&mut Noise(1).take(bytes), &mut input).expect("crictl reads"));
            let mut output = BufReader::with_capacity(1 << 20, output);
            let (mut expected, mut seen) = (Noise(1), 0);
            let mut wanted = vec![0; 1 << 20];
            loop {
                let got = output.fill_buf().expect("crictl writes");
                if got.is_empty() {
                    break;
                }
                let wanted = &mut wanted[..got.len()];
                expected.read_exact(wanted).expect("no end");
                assert!(got == wanted, "{transport}: other bytes after {seen}");
                seen += got.len() as u64;
                let count = got.len();
                output.consume(count);
                for (largest, now) in largest.iter_mut().zip(sizes()) {
                    *largest = now.max(*largest);
                }
            }
            assert_eq!(seen, bytes, "{transport}");
        });
        println!("{transport}: {bytes} bytes both ways; daemon and VMM {before:?} → at most {largest:?} KiB");
        // The guest's own pages are the VMM's too, and are the guest's business.
        assert!(largest[0] <= before[0] + GROWTH_KIB, "the daemon: {before:?} → {largest:?} KiB");
    }
    node.remove_pod(&pod);
}

#[test]
fn a_client_that_does_not_read_holds_its_command_back() {
    let (node, pod, container) = waiting("slow");
    let talk = format!("n=0; while head -c {CHUNK} /dev/zero; do n=$((n+1)); echo $n > /count; done");
    for transport in TRANSPORTS {
        let mut talker = exec(&node, transport, &container, &["sh", "-c", &talk]);
        let count = || {
            let said = node.crictl(["exec", "--sync", &container, "sh", "-c", "cat /count || echo 0"]).ok();
            said.parse::<usize>().unwrap_or(0)
        };
        let mut before = 0;
        wait_until("the command to be held back", || {
            // Each look is a whole exec, in which a command that is not held back writes a lot.
            let now = count();
            let held = now > 0 && now == before;
            before = now;
            held
        });
        assert!(before * CHUNK <= BUFFERED, "{transport}: {before} times {CHUNK} bytes are held somewhere");
        let mut some = vec![0; BUFFERED + CHUNK];
        talker.stdout().read_exact(&mut some).expect("it goes on");
        assert!(count() > before, "{transport}");
        drop(talker);
        node.crictl(["exec", "--sync", &container, "rm", "-f", "/count"]).ok();
    }
    node.remove_pod(&pod);
}

#[test]
fn a_huge_log_is_whole() {
    let lines: usize = amount(10_000_000, 300_000);
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("log", &json!({}));
    let count = lines.to_string();
    let container = node.run_container(&pod, "log", "c", image::BUSYBOX, &["seq", &count]);
    let limit = Duration::from_secs(amount(3000, 120));
    let deadline = std::time::Instant::now() + limit;
    while node.inspect_container(&container)["status"]["state"] != "CONTAINER_EXITED" {
        assert!(std::time::Instant::now() < deadline, "{lines} lines take more than {limit:?}");
    }
    let log = BufReader::new(File::open(node.log_directory().join("log/c.log")).expect("there is a log"));
    let mut seen = 0;
    for line in log.lines() {
        seen += 1;
        let line = line.expect("text");
        assert_eq!(line.rsplit(' ').next(), Some(seen.to_string().as_str()), "{line}");
        assert!(line.contains(" stdout F "), "{line}");
    }
    assert_eq!(seen, lines);
    node.remove_pod(&pod);
}

#[test]
fn a_container_over_its_limit_is_killed_every_time_and_its_sibling_never() {
    let times = amount(100, 10);
    let (node, pod, sibling) = waiting("oom");
    let more = json!({"linux": {"resources": {"memory_limit_in_bytes": 32 << 20}}});
    for time in 1..=times {
        let config =
            node.container_config("hog", image::BUSYBOX, &["dd", "if=/dev/zero", "of=/dev/null", "bs=100M"], &more);
        let pod_config = node.pod_config("oom", &json!({}));
        let path = |path: &std::path::Path| path.to_str().expect("a plain path").to_owned();
        let hog = node.crictl(["create", "--no-pull", &pod, &path(&config), &path(&pod_config)]).ok();
        node.crictl(["start", &hog]).ok();
        wait_until("the container to be killed", || {
            node.inspect_container(&hog)["status"]["state"] == "CONTAINER_EXITED"
        });
        let status = &node.inspect_container(&hog)["status"];
        assert_eq!(
            (&status["exitCode"], &status["reason"]),
            (&json!(137), &json!("OOMKilled")),
            "time {time}: {status}"
        );
        node.crictl(["rm", &hog]).ok();
    }
    assert_eq!(node.inspect_container(&sibling)["status"]["state"], "CONTAINER_RUNNING");
    assert_eq!(node.inspect_pod(&pod)["status"]["state"], "SANDBOX_READY");
    node.remove_pod(&pod);
}
