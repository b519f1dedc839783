//! Whether a pod could be run now, found by looking and not by remembering.

use std::fs::{File, OpenOptions};

use super::Node;
use super::proto::{RuntimeCondition, RuntimeStatus};

/// Names that the kubelet looks for (CRI `RuntimeCondition.type`).
const RUNTIME_READY: &str = "RuntimeReady";
const NETWORK_READY: &str = "NetworkReady";

pub(super) fn conditions(node: &Node) -> RuntimeStatus {
    let runtime = condition(RUNTIME_READY, "HostLacks", runtime(node));
    let network = node.network.status().map_err(|error| error.to_string());
    RuntimeStatus { conditions: vec![runtime, condition(NETWORK_READY, "NetworkPluginNotReady", network)] }
}

fn condition(name: &str, reason: &str, result: Result<(), String>) -> RuntimeCondition {
    let status = result.is_ok();
    let message = result.err().unwrap_or_default();
    let reason = if status { String::new() } else { reason.to_owned() };
    RuntimeCondition { r#type: name.to_owned(), status, reason, message }
}

fn runtime(node: &Node) -> Result<(), String> {
    let config = node.pods.config();
    if !node.pods.spawner_alive() {
        return Err("the process that starts VMMs has ended: restart pericarpd".to_owned());
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|error| format!("/dev/kvm cannot be opened ({error}): `pericarp check` says what this host lacks"))?;
    for (what, path) in [("kernel", &config.kernel), ("initrd", &config.initrd), ("VMM", &config.vmm)] {
        File::open(path).map_err(|error| format!("the {what} {} cannot be read: {error}", path.display()))?;
    }
    Ok(())
}
