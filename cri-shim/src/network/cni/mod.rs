//! The runtime's side of CNI, which is a protocol of environment, standard input and output (CNI spec 1.0 §2 to §4).
//!
//! What plugins were asked for is on disk before the first of them runs, so that DEL can be asked of the same
//! plugins with the same words whatever became of ADD or of the daemon. Each plugin's standard input is a file on
//! which the daemon holds a lock; a plugin inherits the lock with the file, so a DEL after a crash waits for an ADD
//! that is still going on.

mod args;
mod config;
mod exec;
mod record;

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::{Cidr, INTERFACE};
use crate::spec::{Dns, PodSpec};
use config::{ConfList, Plugin};
use record::{Record, Session};

/// Longest that one plugin may take.
const PLUGIN_LIMIT: Duration = Duration::from_secs(120);

/// What can go wrong between the runtime and the plugins.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// There is nothing to configure a network with.
    #[error("no valid CNI network configuration in {}: {reason}", dir.display())]
    NoConfiguration {
        /// Where it was looked for.
        dir: PathBuf,
        /// What was found instead.
        reason: String,
    },
    /// A configuration names a plugin that is not installed.
    #[error(
        "the CNI plugin {plugin:?} of network {network:?} is not in {searched}: install it or change the network configuration"
    )]
    NoPlugin {
        /// Name of the network.
        network: String,
        /// Name of the plugin.
        plugin: String,
        /// Directories, separated by commas.
        searched: String,
    },
    /// The pod carries something that CNI cannot say.
    #[error("{0}")]
    BadRequest(String),
    /// The pod has been attached before.
    #[error("pod {0} has a network already")]
    AlreadyAttached(String),
    /// A plugin said no.
    #[error("the CNI plugin {plugin:?} of network {network:?} failed to {command}: {reason}")]
    Plugin {
        /// Name of the network.
        network: String,
        /// Name of the plugin.
        plugin: String,
        /// `ADD` or `DEL`.
        command: &'static str,
        /// Its own words.
        reason: String,
    },
    /// A file or process of ours failed.
    #[error("cannot {action}: {cause}")]
    Io {
        /// What was tried.
        action: String,
        /// Why it failed.
        cause: io::Error,
    },
}

impl CniError {
    fn io(action: impl Into<String>, cause: io::Error) -> Self {
        Self::Io { action: action.into(), cause }
    }
}

/// Runs plugins and remembers what for.
#[derive(Clone, Debug)]
pub(super) struct Cni {
    conf_dir: PathBuf,
    bin_dirs: Vec<PathBuf>,
    state_dir: PathBuf,
}

/// What the runtime keeps of a result (CNI spec 1.0 §5).
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Added {
    pub(super) ips: Vec<IpAddr>,
    pub(super) dns: Dns,
}

impl Cni {
    pub(super) fn new(conf_dir: PathBuf, bin_dirs: Vec<PathBuf>, state_dir: PathBuf) -> Self {
        Self { conf_dir, bin_dirs, state_dir }
    }

    pub(super) fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    pub(super) fn status(&self) -> Result<(), CniError> {
        let list = config::load(&self.conf_dir)?;
        list.plugins.iter().try_for_each(|plugin| self.find(&list, plugin).map(drop))
    }

    pub(super) fn configuration(&self) -> Result<Value, CniError> {
        Ok(config::load(&self.conf_dir)?.to_json())
    }

    /// ADD, each plugin with the result of the one before (CNI spec 1.0 §3, "Lifecycle & Ordering").
    pub(super) async fn add(&self, pod_id: &str, pod: &PodSpec, netns: &Path) -> Result<Added, CniError> {
        let list = config::load(&self.conf_dir)?;
        let mut record = Record {
            netns: netns.to_owned(),
            args: args::cni_args(pod_id, pod)?,
            capabilities: args::capabilities(pod)?,
            list,
            added: 0,
            result: None,
        };
        let mut session = Session::begin(&self.state_dir, pod_id, &record)?;
        for plugin in record.list.plugins.clone() {
            let output = self.run(&mut session, "ADD", pod_id, &record, &plugin).await?;
            let result: Value = serde_json::from_slice(&output).map_err(|e| CniError::Plugin {
                network: record.list.name.clone(),
                plugin: plugin.kind.clone(),
                command: "ADD",
                reason: format!("its result is not JSON: {e}"),
            })?;
            record.result = Some(result);
            record.added = record.added.saturating_add(1);
            session.save(&record)?;
        }
        let result = record.result.as_ref().unwrap_or(&Value::Null);
        read_result(result).map_err(|reason| {
            let last = record.list.plugins.last().map(|plugin| plugin.kind.clone()).unwrap_or_default();
            CniError::Plugin { network: record.list.name.clone(), plugin: last, command: "ADD", reason }
        })
    }

    /// DEL, last plugin first, each with the last result of ADD; what is kept is forgotten once all have agreed.
    ///
    /// A plugin whose own ADD did not succeed is asked too, but may refuse: a configuration that it cannot read
    /// fails both ways, and would otherwise never be got rid of.
    pub(super) async fn del(&self, pod_id: &str) -> Result<(), CniError> {
        let Some((mut session, record)) = Session::resume(&self.state_dir, pod_id, PLUGIN_LIMIT).await? else {
            return Ok(());
        };
        for (index, plugin) in record.list.plugins.iter().enumerate().rev() {
            match self.run(&mut session, "DEL", pod_id, &record, plugin).await {
                Err(error) if index < record.added => return Err(error),
                Err(error) => tracing::warn!(pod = pod_id, %error, "a plugin whose ADD failed refuses DEL too"),
                Ok(_) => {}
            }
        }
        session.end()
    }

    async fn run(
        &self,
        session: &mut Session,
        command: &'static str,
        pod_id: &str,
        record: &Record,
        plugin: &Plugin,
    ) -> Result<Vec<u8>, CniError> {
        let failed = |reason| CniError::Plugin {
            network: record.list.name.clone(),
            plugin: plugin.kind.clone(),
            command,
            reason,
        };
        // A namespace that is gone (the host was restarted) is named by nothing (CNI spec 1.0 §2, DEL).
        let netns = if record.netns.exists() { record.netns.as_path() } else { Path::new("") };
        let mut process = tokio::process::Command::new(self.find(&record.list, plugin)?);
        process
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", pod_id)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_ARGS", &record.args)
            .env("CNI_PATH", std::env::join_paths(&self.bin_dirs).map_err(|e| failed(e.to_string()))?)
            .stdin(session.input(&record.conf(plugin))?);
        exec::run(process, PLUGIN_LIMIT).await.map_err(failed)
    }

    fn find(&self, list: &ConfList, plugin: &Plugin) -> Result<PathBuf, CniError> {
        let found = self.bin_dirs.iter().map(|dir| dir.join(&plugin.kind)).find(|path| path.is_file());
        found.ok_or_else(|| CniError::NoPlugin {
            network: list.name.clone(),
            plugin: plugin.kind.clone(),
            searched: self.bin_dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", "),
        })
    }
}

/// Takes the pod's own addresses, in order, and its name servers out of a result.
fn read_result(result: &Value) -> Result<Added, String> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Wire {
        interfaces: Vec<WireInterface>,
        ips: Vec<WireIp>,
        dns: WireDns,
    }
    #[derive(Deserialize)]
    struct WireInterface {
        #[serde(default)]
        sandbox: String,
    }
    #[derive(Deserialize)]
    struct WireIp {
        address: Cidr,
        interface: Option<usize>,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct WireDns {
        nameservers: Vec<String>,
        search: Vec<String>,
        options: Vec<String>,
    }

    let wire = Wire::deserialize(result).map_err(|e| format!("its result cannot be read: {e}"))?;
    let in_pod = |ip: &WireIp| match ip.interface {
        None => true,
        Some(index) => wire.interfaces.get(index).is_some_and(|interface| !interface.sandbox.is_empty()),
    };
    Ok(Added {
        ips: wire.ips.iter().filter(|ip| in_pod(ip)).map(|ip| ip.address.address).collect(),
        dns: Dns { servers: wire.dns.nameservers, searches: wire.dns.search, options: wire.dns.options },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_result_gives_the_pods_own_addresses_in_order() {
        let result = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "cni0"}, {"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/x"}],
            "ips": [
                {"address": "fd00::5/64", "interface": 2, "gateway": "fd00::1"},
                {"address": "10.88.0.5/16", "interface": 2},
                {"address": "192.0.2.1/32", "interface": 0},
                {"address": "192.0.2.2/32"},
            ],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dns": {"nameservers": ["10.0.0.10"], "search": ["a.b"], "options": ["ndots:5"]},
        });
        let added = read_result(&result).expect("valid");
        let ips: Vec<String> = added.ips.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["fd00::5", "10.88.0.5", "192.0.2.2"]);
        assert_eq!(added.dns.servers, ["10.0.0.10"]);
        assert_eq!(added.dns.options, ["ndots:5"]);
    }

    #[test]
    fn a_result_without_addresses_is_a_result() {
        assert_eq!(read_result(&json!({"cniVersion": "1.0.0"})), Ok(Added::default()));
        assert!(read_result(&json!({"ips": [{"address": "nonsense"}]})).is_err());
        assert!(read_result(&json!("ok")).is_err());
        assert_eq!(
            read_result(&json!({"ips": [{"address": "10.0.0.1/8", "interface": 7}]})).map(|a| a.ips),
            Ok(Vec::new())
        );
    }
}
