//! Logs, and what people do in a pod: exec, attach, cp, port-forward, debug.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use pericarp_tests::{Cluster, Pod, Terminal, container, image};
use serde_json::json;

/// A program that ends with its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn script(text: &str) -> serde_json::Value {
    json!({"containers": [container("c", &json!({"command": ["sh", "-c", text]}))]})
}

#[test]
fn exec_gives_output_and_exit_code() {
    let cluster = Cluster::get();
    let pod = Pod::run(&cluster, "exec", &json!({}));
    assert_eq!(pod.sh("echo hello"), "hello");
    let ended = pod.exec("echo bad >&2; exit 7");
    assert_eq!(ended.code, 7, "{}", ended.stderr);
    assert!(ended.stderr.contains("bad"), "{}", ended.stderr);
}

#[test]
fn exec_has_a_terminal() {
    let cluster = Cluster::get();
    let pod = Pod::run(&cluster, "terminal", &json!({}));
    let mut command = cluster.kubectl_command();
    command.args(["exec", "-it", &pod.name, "-c", "c", "--", "sh"]);
    let mut terminal = Terminal::run(&command, 33, 77);
    terminal.type_in("stty size; echo $((40 + 2)); exit 5\n");
    assert_eq!(terminal.wait().code(), Some(5), "{}", terminal.screen());
    let screen = terminal.screen();
    assert!(screen.contains("33 77") && screen.contains("42"), "{screen}");
}

#[test]
fn logs_are_followed_to_their_end() {
    let cluster = Cluster::get();
    let mut spec = script("for i in 1 2 3 4 5; do echo line $i; sleep 1; done");
    spec["restartPolicy"] = json!("Never");
    let pod = Pod::create(&cluster, "follow", &spec);
    cluster.eventually("a first line", || cluster.kubectl(["logs", "follow"]).stdout.contains("line 1"));
    assert_eq!(pod.logs(&["-f"]), "line 1\nline 2\nline 3\nline 4\nline 5");
    assert_eq!(pod.logs(&["--tail=1"]), "line 5");
    pod.succeeded();
}

#[test]
fn logs_of_the_container_before_are_kept() {
    let cluster = Cluster::get();
    let pod =
        Pod::create(&cluster, "previous", &script("echo $(cat /proc/uptime | cut -d. -f1); echo ended >&2; exit 3"));
    cluster.eventually("a restart", || pod.container("c")["restartCount"].as_u64() >= Some(1));
    // The kubelet keeps the last that has ended, which until the first back-off may change faster than the API is told.
    let previous = || cluster.kubectl(["logs", &pod.name, "--previous"]).stdout;
    cluster.eventually("the log of the container before", || previous().ends_with("ended"));
    assert_eq!(pod.container("c")["lastState"]["terminated"]["exitCode"], 3);
    cluster.eventually("a back-off", || pod.events().contains("BackOff: Back-off restarting failed container"));
}

#[test]
fn attach_talks_to_what_runs() {
    let cluster = Cluster::get();
    let mut spec = script("while read line; do echo got $line; done; echo over");
    spec["containers"][0]["stdin"] = json!(true);
    spec["containers"][0]["stdinOnce"] = json!(true);
    spec["restartPolicy"] = json!("Never");
    let pod = Pod::run(&cluster, "attach", &spec);
    let mut command = cluster.kubectl_command();
    command.args(["attach", "-i", &pod.name]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut attached = command.spawn().expect("kubectl runs");
    attached.stdin.take().expect("it is piped").write_all(b"one\ntwo\n").expect("it listens");
    let output = attached.wait_with_output().expect("it is our child");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("got one\ngot two\nover"), "{text}");
    pod.succeeded();
}

#[test]
fn cp_goes_both_ways() {
    let cluster = Cluster::get();
    let pod = Pod::run(&cluster, "cp", &json!({}));
    let file = cluster.write("to-copy", &"0123456789abcdef".repeat(10_000));
    cluster.kubectl(["cp", &file, "cp:/tmp/there"]).ok();
    assert_eq!(pod.sh("wc -c < /tmp/there"), "160000");
    let back = cluster.write("copied", "");
    cluster.kubectl(["cp", "cp:/tmp/there", &back]).ok();
    assert_eq!(fs::read(&file).expect("it is there"), fs::read(&back).expect("it is there"));
}

#[test]
fn port_forward_reaches_the_pod() {
    let cluster = Cluster::get();
    let ready = json!({"tcpSocket": {"port": 80}, "periodSeconds": 1});
    let web = container("c", &json!({"image": image::NGINX, "readinessProbe": ready}));
    let pod = Pod::run(&cluster, "forward", &json!({"containers": [web]}));
    let mut command = cluster.kubectl_command();
    command.args(["port-forward", &format!("pod/{}", pod.name), ":80"]).stdout(Stdio::piped());
    let mut forward = Running(command.spawn().expect("kubectl runs"));
    let mut lines = BufReader::new(forward.0.stdout.take().expect("it is piped")).lines();
    let line = lines.next().expect("it says where").expect("text");
    let address = line.split_whitespace().nth(2).expect("an address");
    let got =
        Command::new("curl").args(["-sf", "--max-time", "60", &format!("http://{address}/")]).output().expect("runs");
    assert!(String::from_utf8_lossy(&got.stdout).contains("Welcome to nginx!"), "{line}");
}

#[test]
fn debug_adds_a_container_to_a_pod_that_runs() {
    let cluster = Cluster::get();
    let pod = Pod::run(&cluster, "debugged", &json!({}));
    let image = format!("--image={}", image::BUSYBOX);
    let look = "ps; ls /proc/1/root/bin/sh && echo looked; sleep 1000";
    let args = [
        "debug",
        "debugged",
        &image,
        "-c",
        "look",
        "--target=c",
        "--profile=sysadmin",
        "--attach=false",
        "--",
        "sh",
        "-c",
        look,
    ];
    cluster.kubectl(args).ok();
    cluster.eventually("the debugger to look", || pod.logs(&["-c", "look"]).contains("looked"));
    let log = pod.logs(&["-c", "look"]);
    assert!(log.contains("sleep 100000"), "the target's processes are not seen: {log}");
    assert_eq!(pod.container("c")["restartCount"], 0);
}
