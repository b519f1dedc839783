//! The life of a pod, as `crictl` sees it.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use pericarp_tests::{Node, Settings, image, wait_until};
use serde_json::json;

fn http_get(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn host_kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").expect("proc is mounted").trim().to_owned()
}

#[test]
fn two_containers_share_a_kernel_that_is_not_the_hosts() {
    let node = Node::start();
    for image in [image::BUSYBOX, image::NGINX] {
        node.crictl(["pull", image]).ok();
    }
    // A first pod makes the bridge and its chains, which stay.
    let pod = node.run_pod("first", &json!({}));
    node.remove_pod(&pod);
    let before = node.inventory();

    let pod = node.run_pod("two", &json!({"hostname": "two-host"}));
    let server = node.run_container(&pod, "two", "web", image::NGINX, &[]);
    let client = node.run_container(&pod, "two", "client", image::BUSYBOX, &["sleep", "1000"]);

    let kernel = node.crictl(["exec", "--sync", &client, "uname", "-r"]).ok();
    assert_ne!(kernel, host_kernel());
    assert_eq!(node.crictl(["exec", "--sync", &server, "uname", "-r"]).ok(), kernel);
    assert_eq!(node.crictl(["exec", "--sync", &client, "hostname"]).ok(), "two-host");

    let page = node.crictl(["exec", "--sync", &client, "wget", "-q", "-O", "-", "http://localhost/"]).ok();
    assert!(page.contains("nginx"), "{page}");
    let ip = node.inspect_pod(&pod)["status"]["network"]["ip"].as_str().expect("a pod has an address").to_owned();
    assert!(http_get(&format!("{ip}:80")).expect("the pod answers the host").contains("nginx"));
    node.crictl(["exec", "--sync", &client, "wget", "-q", "-O", "-", &format!("http://{ip}/")]).ok();
    wait_until("nginx's access log", || node.log("two", "web").contains("GET /"));

    let both = node.crictl(["exec", "--sync", &client, "sh", "-c", "echo out; echo err >&2"]);
    // crictl shows both streams of an ExecSync on its standard output, one after the other.
    assert!(both.stdout.starts_with("out") && both.stdout.ends_with("err"), "{both:?}");
    let failed = node.crictl(["exec", "--sync", &client, "sh", "-c", "echo why >&2; exit 7"]).refused();
    assert!(failed.contains("exited with 7: why"), "{failed}");

    node.crictl(["stop", "--timeout", "5", &client]).ok();
    assert_eq!(node.inspect_container(&client)["status"]["state"], "CONTAINER_EXITED");
    node.remove_pod(&pod);
    node.inventory().assert_same_as(&before);
}

#[test]
fn a_pod_reaches_the_host() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("out", &json!({}));
    let container = node.run_container(&pod, "out", "client", image::BUSYBOX, &["sleep", "1000"]);
    let gateway = node
        .crictl(["exec", "--sync", &container, "sh", "-c", "ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'"])
        .ok();
    let listener = TcpListener::bind((gateway.as_str(), 0)).expect("the bridge's address is the host's");
    let port = listener.local_addr().expect("bound").port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the pod connects");
        stream.write_all(b"from the host\n").expect("the pod listens");
    });
    let heard = node.crictl(["exec", "--sync", &container, "nc", "-w", "10", &gateway, &port.to_string()]).ok();
    assert_eq!(heard, "from the host");
    server.join().expect("the server ends");
    let v6 =
        node.crictl(["exec", "--sync", &container, "ip", "-6", "addr", "show", "dev", "eth0", "scope", "global"]).ok();
    assert!(v6.contains("inet6"), "{v6}");
    node.remove_pod(&pod);
}

#[test]
fn a_pods_network_is_as_slow_as_it_is_said_to_be() {
    const PER_S: u64 = 256 << 10;
    const BYTES: u64 = 2 * PER_S;
    // Without what passes at once: a tenth of a second's worth, and a packet, which is paid for afterwards.
    let least = Duration::from_millis(1900).saturating_sub(Duration::from_millis(1000 * (64 << 10) / PER_S));
    let keys = format!("net_bytes_per_s = {PER_S}\n");
    let node = Node::start_with(&Settings { keys, ..Settings::default() });
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("slow", &json!({}));
    let container = node.run_container(&pod, "slow", "c", image::BUSYBOX, &["sleep", "1000"]);
    let script = "ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'";
    let gateway = node.crictl(["exec", "--sync", &container, "sh", "-c", script]).ok();
    let listener = TcpListener::bind((gateway.as_str(), 0)).expect("the bridge's address is the host's");
    let port = listener.local_addr().expect("bound").port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the pod connects");
        let mut bytes = vec![0; usize::try_from(BYTES).expect("it is small")];
        stream.read_exact(&mut bytes).expect("the pod sends");
        stream.write_all(&bytes).expect("the pod receives");
    });
    let script = format!("head -c {BYTES} /dev/zero | nc -w 60 {gateway} {port} | wc -c");
    let began = Instant::now();
    assert_eq!(node.crictl(["exec", "--sync", &container, "sh", "-c", &script]).ok(), BYTES.to_string());
    let took = began.elapsed();
    assert!(took >= 2 * least, "both ways in {took:?}");
    server.join().expect("the server ends");
    node.remove_pod(&pod);
}

#[test]
fn logs_are_in_the_kubelets_format() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("logs", &json!({}));
    let script =
        "echo one; printf two >&2; i=0; while [ $i -lt 300 ]; do echo line-$i; i=$((i+1)); done; exec sleep 1000";
    node.run_container(&pod, "logs", "talker", image::BUSYBOX, &["sh", "-c", script]);
    wait_until("the last line", || node.log("logs", "talker").contains("line-299"));
    let log = node.log("logs", "talker");
    for line in log.lines() {
        let mut words = line.splitn(4, ' ');
        let time = words.next().expect("a time");
        assert!(time.len() == 35 || time.ends_with('Z'), "{line}");
        assert!(matches!(words.next(), Some("stdout" | "stderr")), "{line}");
        assert!(matches!(words.next(), Some("F" | "P")), "{line}");
        assert!(words.next().is_some(), "{line}");
    }
    for number in 0..300 {
        assert_eq!(log.lines().filter(|line| line.ends_with(&format!(" line-{number}"))).count(), 1, "line-{number}");
    }
    node.remove_pod(&pod);
}

/// Numbers at the ends of a log's lines, those of other lines left out.
fn ticks(path: &Path) -> Vec<u32> {
    let log = fs::read_to_string(path).unwrap_or_default();
    log.split_inclusive('\n').filter_map(|line| line.trim_end().rsplit_once(" F tick-")?.1.parse().ok()).collect()
}

#[test]
fn a_log_that_is_rotated_goes_on_in_the_new_file() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("rotated", &json!({}));
    let script = "i=0; while :; do echo tick-$i; i=$((i+1)); sleep 0.05; done";
    let container = node.run_container(&pod, "rotated", "talker", image::BUSYBOX, &["sh", "-c", script]);
    let log = node.log_directory().join("rotated/talker.log");
    let rotated = log.with_extension("log.1");
    wait_until("the first lines", || ticks(&log).len() > 5);
    // As the kubelet does: rename, then ReopenContainerLog.
    fs::rename(&log, &rotated).expect("the log is there");
    let before = ticks(&rotated).len();
    wait_until("more lines in the renamed file, which is still the log", || ticks(&rotated).len() > before);
    assert!(!log.exists());
    node.crictl(["logs", "--reopen", &container]).ok();
    wait_until("lines in the new file", || ticks(&log).len() > 5);
    let (old, new) = (ticks(&rotated), ticks(&log));
    wait_until("yet more lines in the new file", || ticks(&log).len() > new.len() + 5);
    assert_eq!(ticks(&rotated), old, "nothing is written to the old file any more");
    let all: Vec<u32> = old.into_iter().chain(ticks(&log)).collect();
    assert!(all.iter().copied().eq(0..u32::try_from(all.len()).expect("few")), "each line once, in order: {all:?}");
    node.crictl(["stop", "--timeout", "0", &container]).ok();
    let refused = node.crictl(["logs", "--reopen", "no-such-container"]).refused();
    assert!(refused.contains("NotFound"), "{refused}");
    node.remove_pod(&pod);
}

#[test]
fn stop_asks_first_and_kills_after_the_grace_period() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("stop", &json!({}));
    let polite = node.run_container(
        &pod,
        "stop",
        "polite",
        image::BUSYBOX,
        &["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done"],
    );
    let deaf = node.run_container(
        &pod,
        "stop",
        "deaf",
        image::BUSYBOX,
        &["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"],
    );
    node.crictl(["stop", "--timeout", "30", &polite]).ok();
    assert_eq!(node.inspect_container(&polite)["status"]["exitCode"], 3);
    node.crictl(["stop", "--timeout", "1", &deaf]).ok();
    assert_eq!(node.inspect_container(&deaf)["status"]["exitCode"], 137);
    // All four are idempotent (CRI: StopPodSandbox, RemovePodSandbox, StopContainer, RemoveContainer).
    node.crictl(["stop", &deaf]).ok();
    node.crictl(["rm", &deaf]).ok();
    node.remove_pod(&pod);
}

#[test]
fn exec_that_outlives_its_timeout_is_killed() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("late", &json!({}));
    let container = node.run_container(&pod, "late", "c", image::BUSYBOX, &["sleep", "1000"]);
    let message = node.crictl(["exec", "--sync", "--timeout", "1", &container, "sleep", "777"]).refused();
    assert!(message.to_lowercase().contains("deadline") || message.to_lowercase().contains("timed out"), "{message}");
    wait_until("the process to be gone", || {
        !node.crictl(["exec", "--sync", &container, "ps"]).ok().contains("sleep 777")
    });
    node.remove_pod(&pod);
}
