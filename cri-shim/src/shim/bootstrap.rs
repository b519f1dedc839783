//! What containerd says to the `start` action on standard input, and the answer in the way that it understands.
//!
//! containerd ≥ 2.3 sends parameters and takes a message. Older ones send the runtime's options alone, name the rest by
//! flags and the environment, and take a bare address, which stands for the second version of the task API.

use std::io::{IsTerminal, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use sha2::{Digest, Sha256};

use super::arguments::Arguments;

/// Where containerd listens for events.
pub(super) const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// Where sockets of shims are if nobody says otherwise; paths of sockets must be short.
const SOCKETS: &str = "/run/containerd/s";

/// Most bytes that are read.
const INPUT_BYTES: u64 = 10 << 20;

/// The task API of containerd ≥ 2.0, of which the second version is the same but for its name.
const TASK_VERSION: i32 = 3;

/// Options of a runtime that has none of its own (`containerd.runtimeoptions.v1.Options`).
#[derive(Clone, PartialEq, prost::Message)]
struct RuntimeOptions {
    #[prost(string, tag = "2")]
    config_path: String,
}

/// What was said.
#[derive(Debug)]
pub(super) struct Bootstrap {
    /// Where containerd listens for events.
    pub(super) ttrpc_address: String,
    /// The configuration that the runtime's options name.
    pub(super) config: Option<String>,
    sockets: String,
    is_message: bool,
}

impl Bootstrap {
    pub(super) fn read(arguments: &Arguments) -> Result<Self> {
        let stdin = std::io::stdin();
        let mut input = Vec::new();
        if !stdin.is_terminal() {
            stdin.lock().take(INPUT_BYTES).read_to_end(&mut input).context("reading standard input")?;
        }
        let environment = std::env::var(TTRPC_ADDRESS).unwrap_or_default();
        Self::parse(&input, arguments, environment)
    }

    fn parse(input: &[u8], arguments: &Arguments, environment: String) -> Result<Self> {
        let ours =
            |params: &BootstrapParams| params.instance_id == arguments.id && params.namespace == arguments.namespace;
        let params = BootstrapParams::parse_from_bytes(input).ok().filter(ours);
        let parsed = match params {
            Some(params) => Self {
                config: params.extensions.iter().filter_map(|extension| extension.value.as_ref()).find_map(config_path),
                ttrpc_address: params.containerd_ttrpc_address,
                sockets: params.socket_dir.filter(|path| !path.is_empty()).unwrap_or_else(|| SOCKETS.into()),
                is_message: true,
            },
            None => Self {
                config: Any::parse_from_bytes(input).ok().as_ref().and_then(config_path),
                ttrpc_address: environment,
                sockets: SOCKETS.into(),
                is_message: false,
            },
        };
        if parsed.ttrpc_address.is_empty() {
            bail!("containerd has not said where it listens for events ({TTRPC_ADDRESS})");
        }
        Ok(parsed)
    }

    /// The path of a pod's socket.
    pub(super) fn socket(&self, arguments: &Arguments, pod: &str) -> String {
        let name = Path::new(&arguments.address).join(&arguments.namespace).join(pod);
        let digest = Sha256::digest(name.as_os_str().as_encoded_bytes());
        let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{}/{name}", self.sockets.trim_end_matches('/'))
    }

    pub(super) fn answer(&self, address: &str) -> Result<()> {
        let bytes = if self.is_message {
            let (version, address, protocol) = (TASK_VERSION, address.to_owned(), "ttrpc".to_owned());
            BootstrapResult { version, address, protocol, ..BootstrapResult::default() }.write_to_bytes()?
        } else {
            address.as_bytes().to_vec()
        };
        let mut stdout = std::io::stdout();
        stdout.write_all(&bytes).and_then(|()| stdout.flush()).context("answering containerd")
    }
}

fn config_path(options: &Any) -> Option<String> {
    let name = options.type_url.rsplit('/').next()?;
    let options = (name == "runtimeoptions.v1.Options" || name == "containerd.runtimeoptions.v1.Options")
        .then(|| <RuntimeOptions as prost::Message>::decode(options.value.as_slice()).ok())??;
    Some(options.config_path).filter(|path| !path.is_empty())
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::Extension;

    use super::*;

    fn arguments() -> Arguments {
        let (namespace, id, address) = ("k8s.io".into(), "c".into(), "/run/c.sock".into());
        Arguments { namespace, id, address, ..Arguments::default() }
    }

    fn options() -> Any {
        let value = prost::Message::encode_to_vec(&RuntimeOptions { config_path: "/etc/x.toml".into() });
        Any { type_url: "containerd.runtimeoptions.v1.Options".into(), value, ..Any::default() }
    }

    #[test]
    fn an_old_containerd_sends_options_alone() {
        let read = Bootstrap::parse(&options().write_to_bytes().expect("encodes"), &arguments(), "/t".into());
        let read = read.expect("parses");
        assert!(!read.is_message && read.ttrpc_address == "/t" && read.config.as_deref() == Some("/etc/x.toml"));
        let empty = Bootstrap::parse(&[], &arguments(), "/t".into()).expect("parses");
        assert!(!empty.is_message && empty.config.is_none());
        assert!(Bootstrap::parse(&[], &arguments(), String::new()).is_err());
    }

    #[test]
    fn a_new_containerd_sends_all() {
        let extension = Extension { value: Some(options()).into(), ..Extension::default() };
        let params = BootstrapParams {
            instance_id: "c".into(),
            namespace: "k8s.io".into(),
            containerd_ttrpc_address: "/t".into(),
            socket_dir: Some("/run/s/".into()),
            extensions: vec![extension],
            ..BootstrapParams::default()
        };
        let read = Bootstrap::parse(&params.write_to_bytes().expect("encodes"), &arguments(), String::new());
        let read = read.expect("parses");
        assert!(read.is_message && read.config.as_deref() == Some("/etc/x.toml"));
        let socket = read.socket(&arguments(), "c");
        assert!(socket.starts_with("/run/s/") && socket.len() == 64 + "/run/s/".len());
        assert_ne!(socket, read.socket(&arguments(), "d"));
    }
}
