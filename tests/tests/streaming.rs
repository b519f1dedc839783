//! Exec, attach and port-forward with unmodified crictl, over SPDY and over websockets.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use pericarp_tests::{Node, image, wait_until};
use serde_json::json;

/// Both of crictl's.
const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

/// More than all the buffers on the way hold together.
const MUCH: usize = 4 << 20;

/// Connections at once through one forwarded port.
const CONNECTIONS: usize = 8;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Gives a program input while it writes output, both of any size.
fn run(command: &mut Command, input: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program is installed");
    let mut stdin = child.stdin.take().expect("piped");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A program that ends early does not read all.
            let _ = stdin.write_all(input);
        });
        child.wait_with_output().expect("it is our child")
    })
}

fn exec(node: &Node, transport: &str, options: &[&str], container: &str, command: &[&str]) -> Command {
    let mut crictl = node.crictl_command();
    crictl.args(["exec", "--transport", transport]).args(options).arg(container).args(command);
    crictl
}

/// The command line for a shell.
fn quoted(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"))).collect::<Vec<_>>().join(" ")
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_command_has_its_streams_and_its_exit_code() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("exec", &json!({}));
    let container = node.run_container(&pod, "exec", "c", image::BUSYBOX, &["sleep", "1000"]);
    // No pattern that a wrong order or a lost piece would leave as it is.
    let mut state = 1_u32;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(MUCH)
    .collect();
    for transport in TRANSPORTS {
        let both = run(&mut exec(&node, transport, &[], &container, &["sh", "-c", "echo out; echo err >&2"]), b"");
        assert_eq!((text(&both.stdout), text(&both.stderr)), ("out\n".into(), "err\n".into()), "{transport}");
        let failed = run(&mut exec(&node, transport, &[], &container, &["sh", "-c", "exit 7"]), b"");
        assert!(!failed.status.success() && text(&failed.stderr).contains("exit code 7"), "{transport}: {failed:?}");
        let missing = run(&mut exec(&node, transport, &[], &container, &["no-such-program"]), b"");
        assert!(text(&missing.stderr).contains("no-such-program"), "{transport}: {missing:?}");
        let counted = run(&mut exec(&node, transport, &["-i"], &container, &["wc", "-c"]), &noise);
        assert_eq!(text(&counted.stdout).trim(), MUCH.to_string(), "{transport}: {}", text(&counted.stderr));
        let copied = run(&mut exec(&node, transport, &["-i"], &container, &["cat"]), &noise);
        assert!(copied.stdout == noise, "{transport}: {} of {MUCH} bytes came back", copied.stdout.len());
    }
    node.remove_pod(&pod);
}

#[test]
fn a_terminal_has_the_clients_size() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("tty", &json!({}));
    let container = node.run_container(&pod, "tty", "c", image::BUSYBOX, &["sleep", "1000"]);
    let command = "until [ \"$(stty size)\" = '33 121' ]; do sleep 0.1; done; tty; exit 3";
    for transport in TRANSPORTS {
        let crictl = exec(&node, transport, &["-it"], &container, &["sh", "-c", command]);
        let mut script = Command::new("timeout");
        let line = format!("stty rows 33 cols 121; {}", quoted(&crictl));
        script.args(["60", "script", "-qec", &line, "/dev/null"]);
        let said = text(&run(&mut script, b"").stdout);
        assert!(said.contains("/dev/pts/") && said.contains("exit code 3"), "{transport}: {said}");
    }
    node.remove_pod(&pod);
}

#[test]
fn an_attached_shell_listens_and_ends_with_its_input() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("attach", &json!({}));
    for transport in TRANSPORTS {
        let more = json!({"stdin": true, "stdin_once": true, "command": ["sh"]});
        let config = node.container_config(transport, image::BUSYBOX, &[], &more);
        let pod_config = node.pod_config("attach", &json!({}));
        let path = |path: &std::path::Path| path.to_str().expect("a plain path").to_owned();
        let container = node.crictl(["create", "--no-pull", &pod, &path(&config), &path(&pod_config)]).ok();
        node.crictl(["start", &container]).ok();
        let mut crictl = node.crictl_command();
        crictl.args(["attach", "--transport", transport, "-i", &container]);
        let said = run(&mut crictl, b"echo hello; echo oops >&2\n");
        assert_eq!((text(&said.stdout), text(&said.stderr)), ("hello\n".into(), "oops\n".into()), "{transport}");
        wait_until("the shell's end", || node.inspect_container(&container)["status"]["state"] == "CONTAINER_EXITED");
        wait_until("what it said in its log", || node.log("attach", transport).contains("hello"));
    }
    node.remove_pod(&pod);
}

fn http_get(port: u16) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("crictl listens");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a socket");
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("crictl reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("crictl writes");
    answer
}

#[test]
fn ports_of_the_guests_loopback_are_reached() {
    let node = Node::start();
    node.crictl(["pull", image::NGINX]).ok();
    let pod = node.run_pod("ports", &json!({}));
    let web = node.run_container(&pod, "ports", "web", image::NGINX, &[]);
    let ask = ["exec", "--sync", &web, "wget", "-q", "-O", "-", "http://127.0.0.1/"];
    wait_until("the server", || node.crictl(ask).code == 0);
    for transport in TRANSPORTS {
        let mut crictl = node.crictl_command();
        crictl.args(["port-forward", "--transport", transport, &pod, ":80", ":81"]);
        let mut crictl = crictl.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("crictl is installed");
        let mut stderr = crictl.stderr.take().expect("piped");
        let mut crictl = Killed(crictl);
        let mut lines = BufReader::new(crictl.0.stdout.take().expect("piped")).lines();
        // "Forwarding from 127.0.0.1:40001 -> 80", and the same again for IPv6.
        let mut port_of = |target: &str| {
            let line = lines
                .by_ref()
                .map(|line| line.expect("text"))
                .find(|line| line.contains("127.0.0.1") && line.ends_with(target))
                .expect("crictl says where it listens");
            let port = line.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next()).expect("a port");
            port.parse::<u16>().expect("a port")
        };
        let (open, closed) = (port_of(" 80"), port_of(" 81"));
        std::thread::scope(|scope| {
            for _ in 0..CONNECTIONS {
                scope.spawn(|| assert!(http_get(open).contains("Welcome to nginx"), "{transport}"));
            }
        });
        // The client gives up all of it after one connection that fails.
        let _ = TcpStream::connect(("127.0.0.1", closed)).and_then(|mut stream| stream.write_all(b"hello"));
        let mut said = String::new();
        stderr.read_to_string(&mut said).expect("text");
        assert!(said.contains("Connection refused") && said.contains(" 81"), "{transport}: {said}");
    }
    node.remove_pod(&pod);
}

#[test]
fn a_client_that_vanishes_takes_its_command_along() {
    let node = Node::start();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("gone", &json!({}));
    let container = node.run_container(&pod, "gone", "c", image::BUSYBOX, &["sleep", "1000"]);
    let sleeps = |node: &Node| node.crictl(["exec", "--sync", &container, "ps"]).ok().contains("sleep 777");
    for transport in TRANSPORTS {
        let mut crictl = exec(&node, transport, &["-i"], &container, &["sleep", "777"]);
        let client = Killed(crictl.stdin(Stdio::piped()).spawn().expect("crictl is installed"));
        wait_until("the command to run", || sleeps(&node));
        drop(client);
        wait_until("the command to be gone", || !sleeps(&node));
    }
    node.remove_pod(&pod);
}
