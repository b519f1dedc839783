//! What an operator sees of a node: metrics by a real Prometheus, the audit, and whose lines are in the log.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use pericarp_tests::{Node, Settings, image, wait_until};
use serde_json::{Value, json};

/// Where the daemon under test tells its metrics, and where Prometheus listens.
const METRICS: &str = "127.0.0.1:9617";
const PROMETHEUS: &str = "127.0.0.1:9090";

/// The board for people.
const BOARD: &str = include_str!("../../docs/grafana.json");

fn observed() -> Node {
    Node::start_with(&Settings { keys: format!("metrics.listen = \"{METRICS}\""), ..Settings::default() })
}

/// The body of an answer of HTTP.
fn get(url: &str, parameters: &[(&str, &str)]) -> Option<String> {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--fail-with-body", "--max-time", "20", "--get", url]);
    for (name, value) in parameters {
        curl.arg("--data-urlencode").arg(format!("{name}={value}"));
    }
    let output = curl.output().expect("curl is installed");
    output.status.success().then(|| String::from_utf8(output.stdout).expect("text"))
}

/// Debian's Prometheus, reading one daemon every second.
struct Prometheus(Child);

impl Prometheus {
    fn start(directory: &Path) -> Self {
        let config = directory.join("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s}}\n\
             scrape_configs:\n- job_name: pericarp\n  static_configs: [{{targets: ['{METRICS}']}}]\n"
        );
        fs::write(&config, text).expect("the test's directory is writable");
        let log = fs::File::create(directory.join("prometheus.log")).expect("the test's directory is writable");
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", directory.join("prometheus").display()))
            .arg(format!("--web.listen-address={PROMETHEUS}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("Debian's prometheus is installed (tests/lab/prepare)");
        Self(child)
    }

    /// What a query gives now.
    fn query(&self, query: &str) -> Option<Vec<Value>> {
        let text = get(&format!("http://{PROMETHEUS}/api/v1/query"), &[("query", query)])?;
        let answer: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(answer["status"], "success", "{query}: {answer}");
        answer["data"]["result"].as_array().cloned()
    }

    /// Waits until a query gives one series of this value.
    #[track_caller]
    fn wait_for(&self, query: &str, value: &str) {
        let mut last = None;
        let mut holds = || {
            last = self.query(query);
            let one = last.as_deref().and_then(|series| (series.len() == 1).then(|| series[0]["value"][1].clone()));
            one.is_some_and(|found| found == value)
        };
        wait_until(&format!("{query} to be {value}"), &mut holds);
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

#[test]
fn prometheus_reads_the_metrics_and_the_board_asks_for_those_there_are() {
    let node = observed();
    let prometheus = Prometheus::start(node.directory());
    node.crictl(["pull", image::BUSYBOX]).ok();
    node.crictl(["pull", "registry.k8s.io/there/is:none"]).refused();
    node.crictl(["start", "nothing"]).refused();
    let pod = node.run_pod("seen", &json!({}));
    let container = node.run_container(&pod, "seen", "c", image::BUSYBOX, &["sleep", "1000"]);
    prometheus.wait_for("up{job=\"pericarp\"}", "1");
    prometheus.wait_for("pericarp_pods{state=\"ready\"}", "1");
    prometheus.wait_for("pericarp_pods{state=\"not_ready\"}", "0");
    prometheus.wait_for("pericarp_containers{state=\"running\"}", "1");
    prometheus.wait_for("pericarp_image_pulls_total{result=\"done\"}", "1");
    prometheus.wait_for("pericarp_image_pulls_total{result=\"not_found\"}", "1");
    prometheus.wait_for("pericarp_cri_calls_total{call=\"StartContainer\",code=\"OK\"}", "1");
    prometheus.wait_for("pericarp_cri_calls_total{call=\"StartContainer\",code=\"NotFound\"}", "1");
    prometheus.wait_for("pericarp_boot_seconds_count", "1");
    for phase in ["prepared", "spawned", "kernel_booted", "agent_ready", "network_attached", "configured"] {
        prometheus.wait_for(&format!("pericarp_boot_phase_seconds_count{{phase=\"{phase}\"}}"), "1");
    }
    // A boot is as long as its phases one after the other, the plugins' aside: within what rounding and overlap leave.
    let whole = "pericarp_boot_seconds_sum >= bool on() max(pericarp_boot_phase_seconds_sum)";
    prometheus.wait_for(whole, "1");
    prometheus.wait_for("pericarp_guest_cpus", "1");
    prometheus.wait_for("pericarp_vm_exits_total{namespace=\"test\",pod=\"seen\"} > bool 100", "1");
    prometheus.wait_for("pericarp_images", "1");
    let stored = node.crictl(["imagefsinfo"]).json();
    let used = stored["status"]["imageFilesystems"][0]["usedBytes"]["value"].as_str().expect("a number").to_owned();
    prometheus.wait_for("pericarp_image_store_bytes", &used);

    // While everything that the board shows has happened but a VM's end.
    assert!(node.crictl(["stopp", &pod]).code == 0);
    prometheus.wait_for("pericarp_vm_ends_total{cause=\"guest_poweroff\"}", "1");
    prometheus.wait_for("pericarp_pods{state=\"ready\"}", "0");
    let again = node.run_pod("again", &json!({}));
    let text = get(&format!("http://{METRICS}/metrics"), &[]).expect("the daemon answers");
    board_fits(&prometheus, &text);
    node.remove_pod(&again);
    node.crictl(["rmp", &pod]).ok();
    assert!(!container.is_empty());

    let refused = |path: &str| get(&format!("http://{METRICS}{path}"), &[]).is_none();
    assert!(refused("/") && refused("/metrics/x"), "there is only /metrics");
}

/// Every metric that the board names is told, and Prometheus understands each of its queries.
fn board_fits(prometheus: &Prometheus, text: &str) {
    let board: Value = serde_json::from_str(BOARD).expect("JSON");
    let panels = board["panels"].as_array().expect("panels");
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().expect("targets"));
    let queries: Vec<&str> = targets.map(|target| target["expr"].as_str().expect("a query")).collect();
    let told: BTreeSet<&str> =
        text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split(['{', ' ']).next()).collect();
    assert!(told.len() > 15, "{text}");
    let mut named = BTreeSet::new();
    for query in &queries {
        let words = query.split(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '_'));
        named.extend(words.filter(|word| word.starts_with("pericarp_")));
        let query = query.replace("$node", ".*").replace("$__rate_interval", "1m");
        assert!(prometheus.query(&query).is_some(), "Prometheus refuses {query}");
    }
    let missing: Vec<_> = named.difference(&told).collect();
    assert!(named.len() > 12 && missing.is_empty(), "the board asks for {missing:?}: {text}");
}

/// Lines of the log that hold every one of `words`.
fn lines(node: &Node, words: &[&str]) -> Vec<String> {
    let log = node.daemon_log();
    log.lines().filter(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned).collect()
}

#[test]
fn every_change_is_written_down_with_who_asked_for_it() {
    let node = observed();
    node.crictl(["pull", image::BUSYBOX]).ok();
    let pod = node.run_pod("audited", &json!({}));
    let container = node.run_container(&pod, "audited", "worker", image::BUSYBOX, &["true"]);
    wait_until("the container's end", || !lines(&node, &["container exited", &container]).is_empty());
    node.crictl(["stop", "feedfeed"]).ok();
    node.crictl(["start", "feedfeed"]).refused();
    node.crictl(["exec", "--sync", &container, "echo", "a-secret"]).refused();
    node.remove_pod(&pod);

    let whose =
        ["audit:", "uid=0", " pid=", "namespace=\"test\"", "pod=\"audited\"", "pod_uid=\"uid-audited\"", " ms="];
    let once = |call: &str, code: &str, more: &[&str]| {
        let (call, code) = (format!("call=\"{call}\""), format!("code=\"{code}\""));
        let found = lines(&node, &[&whose[..], &[&call, &code], more].concat());
        assert_eq!(found.len(), 1, "{call} {more:?}: {found:?}\n{}", node.daemon_log());
    };
    let (pod_id, container_id) = (format!("pod_id=\"{pod}\""), format!("container_id=\"{container}\""));
    once("RunPodSandbox", "OK", &[&pod_id]);
    once("CreateContainer", "OK", &[&pod_id, &container_id, "container=\"worker\"", image::BUSYBOX]);
    once("StartContainer", "OK", &[&pod_id, &container_id, "container=\"worker\""]);
    once("ExecSync", "FailedPrecondition", &[&container_id]);
    once("StopPodSandbox", "OK", &[&pod_id]);
    once("RemovePodSandbox", "OK", &[&pod_id]);
    assert_eq!(lines(&node, &["audit:", "PullImage", "\"OK\"", "uid=0", image::BUSYBOX]).len(), 1);
    assert_eq!(lines(&node, &["audit:", "StartContainer", "\"NotFound\"", "container_id=\"feedfeed\""]).len(), 1);
    assert_eq!(lines(&node, &["audit:", "StopContainer", "\"OK\"", "container_id=\"feedfeed\""]).len(), 1);
    for reads in ["call=\"List", "call=\"Version", "Status\""] {
        assert!(lines(&node, &["audit:", reads]).is_empty(), "reading changes nothing: {reads}");
    }
    assert!(lines(&node, &["a-secret"]).is_empty(), "commands are nobody's business");

    // What happens to a pod by itself is told with its name.
    let named = "pod{namespace=\"test\" name=\"audited\"}";
    for event in ["container exited", "the VM has been stopped"] {
        assert_eq!(lines(&node, &[event, named]).len(), 1, "{event}: {}", node.daemon_log());
    }
}
