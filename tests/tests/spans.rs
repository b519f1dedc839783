//! Spans of calls, as Jaeger gets them: crictl traces its calls, the daemon's spans hang below its own.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use pericarp_tests::{Node, Settings, wait_until};
use serde_json::{Value, json};

/// Where Jaeger takes spans, and where it is asked for them.
const COLLECTOR: &str = "127.0.0.1:4317";
const QUERIES: &str = "http://127.0.0.1:16686/api/traces";

/// A call's name, of which its client's span has a part.
const RUN: &str = "runtime.v1.RuntimeService/RunPodSandbox";

/// Phases that every start has.
const PHASES: [&str; 4] = ["kernel_booted", "agent_ready", "network_attached", "configured"];

struct Jaeger(Child);

impl Jaeger {
    fn start(node: &Node) -> Self {
        let log = File::create(node.directory().join("jaeger.log")).expect("the test's directory is writable");
        let built = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/lab/go-tools")).arg("all-in-one").output();
        let built = String::from_utf8(built.expect("go-tools runs").stdout).expect("text");
        let directory = built.lines().last().expect("go-tools prints a directory");
        let mut jaeger = Command::new(Path::new(directory).join("all-in-one"));
        jaeger.args(["--collector.otlp.grpc.host-port", COLLECTOR]).stdin(Stdio::null()).stdout(Stdio::null());
        Self(jaeger.stderr(log).spawn().expect("it was just built"))
    }

    /// The daemon's spans of traces that have one of this name.
    fn spans(name: &str) -> Option<Vec<Value>> {
        let query = format!("{QUERIES}?service=pericarpd&operation={}", name.replace('/', "%2F"));
        let output = Command::new("curl").args(["--silent", "--fail", &query]).output().expect("curl is installed");
        let answer: Value = serde_json::from_slice(&output.stdout).ok()?;
        let traces = answer["data"].as_array()?;
        Some(traces.iter().filter_map(|trace| trace["spans"].as_array()).flatten().cloned().collect())
    }
}

impl Drop for Jaeger {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

fn named<'a>(spans: &'a [Value], name: &str) -> Option<&'a Value> {
    spans.iter().find(|span| span["operationName"] == name)
}

fn tag<'a>(span: &'a Value, key: &str) -> Option<&'a Value> {
    span["tags"].as_array()?.iter().find(|tag| tag["key"] == key).map(|tag| &tag["value"])
}

#[test]
fn a_traced_call_is_a_span_below_its_clients_and_a_pods_start_shows_its_phases() {
    let keys = format!("tracing.collector = \"http://{COLLECTOR}\"");
    let node = Node::start_with(&Settings { keys, ..Settings::default() });
    let _jaeger = Jaeger::start(&node);
    let config = node.directory().join("pod.json");
    let pod = json!({"metadata": {"name": "traced", "namespace": "spans", "uid": "u1"}, "linux": {}});
    fs::write(&config, pod.to_string()).expect("the test's directory is writable");
    let tracing =
        ["--enable-tracing", "--tracing-endpoint", COLLECTOR, "--tracing-sampling-rate-per-million", "1000000"];
    // Not traced: nobody is told of it.
    node.crictl(["version"]).ok();
    let id = node.crictl(tracing.into_iter().chain(["runp", config.to_str().expect("a plain path")])).ok();
    let mut spans = Vec::new();
    wait_until("Jaeger to have the pod's start", || {
        spans = Jaeger::spans(RUN).unwrap_or_default();
        PHASES.iter().all(|phase| named(&spans, phase).is_some())
    });
    let run = spans.iter().find(|span| tag(span, "k8s.pod.name").is_some()).expect("the daemon's own span");
    assert_eq!(tag(run, "k8s.namespace.name"), Some(&json!("spans")), "{run}");
    assert_eq!(tag(run, "rpc.grpc.status_code"), Some(&json!(0)), "{run}");
    let parent = &run["references"][0]["spanID"];
    assert!(spans.iter().any(|span| span["spanID"] == *parent), "the client's span {parent} is above it: {spans:?}");
    let time = |span: &Value, key: &str| span[key].as_u64().expect("microseconds");
    let (begun, took) = (time(run, "startTime"), time(run, "duration"));
    for phase in PHASES {
        let span = named(&spans, phase).expect("waited for");
        assert_eq!(span["references"][0]["spanID"], run["spanID"], "{span}");
        let (at, length) = (time(span, "startTime"), time(span, "duration"));
        assert!(
            at >= begun && at + length <= begun + took,
            "{phase} lies outside of the call: {at}+{length}, {begun}+{took}"
        );
    }
    assert!(named(&spans, "runtime.v1.RuntimeService/Version").is_none(), "only what is traced is told");
    node.crictl(["rmp", "--force", id.trim()]).ok();
}
