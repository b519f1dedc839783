//! The one configuration file of the node's programs. `deploy/pericarp.toml` documents each key with its default.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tonic::transport::Endpoint;

use crate::image::{HostConfig, RegistryConfig, StoreConfig};
use crate::network::NetworkConfig;
use crate::pod::CoreConfig;

/// Where the file is if nobody says otherwise.
pub const DEFAULT_PATH: &str = "/etc/pericarp/pericarp.toml";

/// Everything that can be configured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Unix socket of the CRI.
    pub socket: PathBuf,
    /// The runtime handler that RuntimeClasses name.
    pub handler: String,
    /// What is logged: a level, or levels by module.
    pub log: String,
    /// The image store.
    pub image_dir: PathBuf,
    /// Most MiB that an image may have unpacked.
    pub image_max_mib: u64,
    /// File that says which images may be pulled; empty lets all in.
    pub image_policy: PathBuf,
    /// A registry that sends nothing for so long counts as stalled.
    pub registry_stall_seconds: u64,
    /// Where networks come from.
    pub cni: CniConfig,
    /// What can be read of the daemon's counters.
    pub metrics: MetricsConfig,
    /// Who is told of calls that are traced.
    pub tracing: TracingConfig,
    /// How registries are reached that need more than their name.
    #[serde(rename = "registry")]
    pub registries: Vec<Registry>,
    /// Pods, and the programs that run them.
    #[serde(flatten)]
    pub core: CoreConfig,
}

/// Where networks come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CniConfig {
    /// Directory of network configurations; the lexically first valid one is used.
    pub conf_dir: PathBuf,
    /// Directories of plugins, searched in order.
    pub bin_dirs: Vec<PathBuf>,
}

/// What can be read of the daemon's counters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsConfig {
    /// Address and port of HTTP; empty for none.
    pub listen: String,
}

/// Who is told of calls that are traced.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TracingConfig {
    /// URL of a collector of OpenTelemetry's; empty for none.
    pub collector: String,
}

/// A registry that needs more than its name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Registry {
    /// With its port if it has one, as images' names have it.
    pub host: String,
    /// URLs tried in this order before the registry itself.
    pub mirrors: Vec<String>,
    /// Without TLS.
    pub plain_http: bool,
    /// PEM file of CA certificates trusted beside the system's.
    pub ca_file: Option<PathBuf>,
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is not there, or not ours to read.
    #[error("cannot read the configuration {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// It says something that means nothing.
    #[error("the configuration {} is wrong: {cause}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        cause: String,
    },
}

impl Default for Config {
    fn default() -> Self {
        let store = StoreConfig::default();
        Self {
            socket: "/run/pericarp/pericarpd.sock".into(),
            handler: "pericarp".into(),
            log: "info".into(),
            image_dir: "/var/lib/pericarp/images".into(),
            image_max_mib: store.max_unpacked_mib,
            image_policy: PathBuf::new(),
            registry_stall_seconds: store.registries.stall_seconds,
            cni: CniConfig::default(),
            metrics: MetricsConfig::default(),
            tracing: TracingConfig::default(),
            registries: Vec::new(),
            core: CoreConfig::default(),
        }
    }
}

impl Default for CniConfig {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            // Where CNI projects install theirs, and where Debian's package does.
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
        }
    }
}

impl Config {
    /// Reads a file; what it leaves out has its default.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|cause| ConfigError::Read { path: path.to_owned(), cause })?;
        Self::parse(&text).map_err(|cause| ConfigError::Parse { path: path.to_owned(), cause })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        for path in config.paths() {
            if !path.is_absolute() {
                return Err(format!("{} is not an absolute path", path.display()));
            }
        }
        // Kubernetes takes this ending for another runtime's socket.
        if config.socket.ends_with("run/crio/crio.sock") {
            return Err(format!("socket {} is CRI-O's name: choose another", config.socket.display()));
        }
        if config.handler.is_empty() {
            return Err("handler is empty".to_owned());
        }
        config.metrics.address()?;
        config.tracing.endpoint()?;
        Ok(config)
    }

    fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        let core = &self.core;
        let own = [&self.socket, &self.image_dir, &self.cni.conf_dir, &core.state_dir, &core.scratch_dir];
        let policy = Some(&self.image_policy).filter(|path| !path.as_os_str().is_empty());
        own.into_iter()
            .chain(policy)
            .chain([&core.vmm, &core.kernel, &core.initrd, &core.cgroup_root])
            .chain(&self.cni.bin_dirs)
    }

    /// For [`crate::network::Network`].
    #[must_use]
    pub fn network(&self) -> NetworkConfig {
        NetworkConfig {
            conf_dir: self.cni.conf_dir.clone(),
            bin_dirs: self.cni.bin_dirs.clone(),
            state_dir: self.core.state_dir.clone(),
        }
    }

    /// For [`crate::image::Store`].
    #[must_use]
    pub fn store(&self) -> StoreConfig {
        let host = |registry: &Registry| {
            let Registry { host, mirrors, plain_http, ca_file } = registry.clone();
            (host, HostConfig { mirrors, plain_http, ca_file })
        };
        let hosts: BTreeMap<_, _> = self.registries.iter().map(host).collect();
        let registries = RegistryConfig { stall_seconds: self.registry_stall_seconds, hosts };
        let policy = Some(self.image_policy.clone()).filter(|path| !path.as_os_str().is_empty());
        StoreConfig { max_unpacked_mib: self.image_max_mib, registries, policy }
    }
}

impl MetricsConfig {
    /// Where to listen, if anywhere.
    pub fn address(&self) -> Result<Option<SocketAddr>, String> {
        if self.listen.is_empty() {
            return Ok(None);
        }
        let wrong =
            |_| format!("metrics.listen {:?} is no address: write IP:PORT, such as 127.0.0.1:9617", self.listen);
        self.listen.parse().map(Some).map_err(wrong)
    }
}

impl TracingConfig {
    /// The collector, if there is one.
    pub fn endpoint(&self) -> Result<Option<Endpoint>, String> {
        if self.collector.is_empty() {
            return Ok(None);
        }
        let wrong = || {
            format!(
                "tracing.collector {:?} is no URL: write http://HOST:PORT, such as http://127.0.0.1:4317",
                self.collector
            )
        };
        // TLS is for networks; a node's collector is on the node.
        let plain = self.collector.starts_with("http://");
        Endpoint::from_shared(self.collector.clone()).ok().filter(|_| plain).map(Some).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENTED: &str = include_str!("../../deploy/pericarp.toml");

    #[test]
    fn the_documented_file_is_the_default_and_names_every_key() {
        assert_eq!(Config::parse(DOCUMENTED), Ok(Config::default()));
        let keys = |table: &toml::Table| {
            let nested = |(key, value): (&String, &toml::Value)| match value {
                toml::Value::Table(table) => table.keys().map(|inner| format!("{key}.{inner}")).collect(),
                _ => vec![key.clone()],
            };
            table.iter().flat_map(nested).collect::<std::collections::BTreeSet<_>>()
        };
        let documented: toml::Table = toml::from_str(DOCUMENTED).expect("valid");
        let mut all = toml::Table::try_from(Config::default()).expect("serializable");
        all.remove("registry");
        assert_eq!(keys(&documented), keys(&all));
        // Registries have no default; the example in the comments must be right all the same.
        let example: String = DOCUMENTED
            .lines()
            .skip_while(|line| !line.starts_with("# [[registry]]"))
            .map(|line| format!("{}\n", line.trim_start_matches("# ")))
            .collect();
        let registries = Config::parse(&example).expect("valid").registries;
        assert!(registries.iter().any(|registry| registry.ca_file.is_some() && !registry.mirrors.is_empty()));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, word) in [
            ("sokcet = \"/run/x\"", "sokcet"),
            ("[cni]\nbin_dir = \"/x\"", "bin_dir"),
            ("[[registry]]\nhots = \"x\"", "hots"),
            ("default_vcpus = \"two\"", "two"),
            ("vmm = \"pericarp-vmm\"", "absolute"),
            ("socket = \"/var/run/crio/crio.sock\"", "CRI-O"),
            ("handler = \"\"", "handler"),
            ("[metrics]\nlisten = \"9617\"", "127.0.0.1:9617"),
            ("[tracing]\ncollector = \"https://there:4317\"", "http://127.0.0.1:4317"),
        ] {
            let error = Config::parse(text).expect_err(text);
            assert!(error.contains(word), "{text}: {error}");
        }
        let missing = Config::load(Path::new("/nonexistent.toml")).expect_err("missing").to_string();
        assert!(missing.contains("/nonexistent.toml"), "{missing}");
    }

    #[test]
    fn registries_reach_the_store() {
        let text =
            "registry_stall_seconds = 5\n[[registry]]\nhost = \"docker.io\"\nmirrors = [\"http://127.0.0.1:5000\"]";
        let store = Config::parse(text).expect("valid").store();
        assert_eq!(store.registries.stall_seconds, 5);
        assert_eq!(store.registries.hosts["docker.io"].mirrors, ["http://127.0.0.1:5000"]);
    }
}
