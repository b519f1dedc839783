//! The parts of an OCI runtime specification (config.json) that mean something to a pod in a virtual machine.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

/// All of it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Spec {
    pub(super) process: Option<Process>,
    pub(super) root: Root,
    pub(super) hostname: String,
    pub(super) mounts: Vec<Mount>,
    pub(super) linux: Linux,
    pub(super) annotations: BTreeMap<String, String>,
    /// By when they are to run.
    pub(super) hooks: BTreeMap<String, Vec<serde_json::Value>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Root {
    pub(super) path: PathBuf,
    pub(super) readonly: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Process {
    pub(super) terminal: bool,
    pub(super) user: User,
    pub(super) args: Vec<String>,
    pub(super) env: Vec<String>,
    pub(super) cwd: String,
    pub(super) capabilities: Capabilities,
    pub(super) rlimits: Vec<Rlimit>,
    pub(super) no_new_privileges: bool,
    pub(super) oom_score_adj: Option<i32>,
    pub(super) apparmor_profile: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) additional_gids: Vec<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Capabilities {
    pub(super) bounding: Vec<String>,
    pub(super) permitted: Vec<String>,
    pub(super) inheritable: Vec<String>,
    pub(super) ambient: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Rlimit {
    #[serde(rename = "type")]
    pub(super) name: String,
    pub(super) soft: u64,
    pub(super) hard: u64,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub(super) struct IdMapping {
    #[serde(rename = "containerID")]
    pub(super) container_id: u32,
    #[serde(rename = "hostID")]
    pub(super) host_id: u32,
    pub(super) size: u32,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Mount {
    pub(super) destination: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) source: PathBuf,
    pub(super) options: Vec<String>,
    #[serde(rename = "uidMappings")]
    pub(super) uids: Vec<IdMapping>,
    #[serde(rename = "gidMappings")]
    pub(super) gids: Vec<IdMapping>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Linux {
    #[serde(rename = "uidMappings")]
    pub(super) uids: Vec<IdMapping>,
    #[serde(rename = "gidMappings")]
    pub(super) gids: Vec<IdMapping>,
    pub(super) sysctl: BTreeMap<String, String>,
    pub(super) resources: Resources,
    pub(super) cgroups_path: String,
    pub(super) namespaces: Vec<Namespace>,
    pub(super) devices: Vec<Device>,
    pub(super) seccomp: Option<serde_json::Value>,
    pub(super) masked_paths: Vec<String>,
    pub(super) readonly_paths: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Namespace {
    #[serde(rename = "type")]
    pub(super) kind: String,
    /// Empty is a new one.
    #[serde(default)]
    pub(super) path: PathBuf,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Device {
    pub(super) path: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) major: i64,
    pub(super) minor: i64,
}

/// Also what an update brings (LinuxResources).
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Resources {
    #[serde(rename = "hugepageLimits")]
    pub(super) huge_pages: Vec<HugePages>,
    pub(super) devices: Vec<DeviceRule>,
    pub(super) memory: Memory,
    pub(super) cpu: Cpu,
    pub(super) pids: Option<Pids>,
    pub(super) unified: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct DeviceRule {
    pub(super) allow: bool,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) major: Option<i64>,
    pub(super) minor: Option<i64>,
    pub(super) access: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct HugePages {
    pub(super) limit: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Memory {
    pub(super) limit: Option<i64>,
    pub(super) swap: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Cpu {
    pub(super) shares: Option<u64>,
    pub(super) quota: Option<i64>,
    pub(super) period: Option<u64>,
    pub(super) cpus: String,
    pub(super) mems: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Pids {
    pub(super) limit: Option<i64>,
}
