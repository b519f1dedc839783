//! What this shim is and can do, for containerd's `-info`.

use std::io::Write;

use anyhow::{Context, Result};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use serde_json::json;

use crate::defaults;

/// The runtime's name in containerd's configuration.
const NAME: &str = "io.containerd.pericarp.v2";

/// OCI runtime specification, features structure.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

pub(super) fn version() -> Result<()> {
    println!("containerd-shim-pericarp-v2 {}", env!("CARGO_PKG_VERSION"));
    Ok(())
}

pub(super) fn info() -> Result<()> {
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..RuntimeVersion::default() };
    let value = serde_json::to_vec(&features())?;
    let info = RuntimeInfo {
        name: NAME.into(),
        version: Some(version).into(),
        features: Some(Any { type_url: FEATURES.into(), value, ..Any::default() }).into(),
        ..RuntimeInfo::default()
    };
    std::io::stdout().write_all(&info.write_to_bytes()?).context("answering containerd")
}

fn features() -> serde_json::Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "mountOptions": ["bind", "nodev", "noexec", "nosuid", "private", "rbind", "ro", "rprivate", "rro", "rslave", "rw", "slave"],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "capabilities": defaults::all_capabilities().bounding,
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": ["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP"],
                "operators": ["SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"],
                "archs": ["SCMP_ARCH_X86_64"],
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}},
        },
    })
}
