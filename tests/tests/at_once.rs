//! Many pods at once.

use pericarp_tests::Node;
use serde_json::json;

const AT_ONCE: usize = 10;

#[test]
fn ten_pods_start_at_once() {
    let node = Node::start();
    let first = node.run_pod("first", &json!({}));
    node.remove_pod(&first);
    let before = node.inventory();
    let starting: Vec<_> = (0..AT_ONCE)
        .map(|number| {
            let config = node.pod_config(&format!("many-{number}"), &json!({}));
            let mut crictl = node.crictl_command();
            crictl.arg("runp").arg(config).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
            crictl.spawn().expect("crictl runs")
        })
        .collect();
    let pods: Vec<_> = starting
        .into_iter()
        .map(|crictl| {
            let output = crictl.wait_with_output().expect("crictl runs");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        })
        .collect();
    let addresses: std::collections::BTreeSet<_> =
        pods.iter().map(|pod| node.inspect_pod(pod)["status"]["network"]["ip"].to_string()).collect();
    assert_eq!(addresses.len(), AT_ONCE, "{addresses:?}");
    for pod in &pods {
        node.remove_pod(pod);
    }
    node.inventory().assert_same_as(&before);
}
