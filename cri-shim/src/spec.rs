//! What a caller asks of the core, as plain data: the CRI server, the command line and a containerd shim all speak it.
//!
//! Nothing here is checked; [`crate::pod`] refuses what it cannot honour with a reason.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A pod to run. The CRI's PodSandboxConfig, less what no runtime acts on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PodSpec {
    /// Name, namespace and uid as Kubernetes has them, and the attempt.
    pub identity: PodIdentity,
    /// Free labels, for filters.
    pub labels: BTreeMap<String, String>,
    /// Free annotations, kept as they are.
    pub annotations: BTreeMap<String, String>,
    /// The runtime handler asked for; empty means the default.
    pub handler: String,
    /// Empty means the pod's name.
    pub hostname: String,
    /// Directory of the containers' log files.
    pub log_directory: Option<PathBuf>,
    /// Lines of resolv.conf; `None` copies the host's.
    pub dns: Option<Dns>,
    /// Ports of the host that lead to the pod.
    pub port_mappings: Vec<PortMapping>,
    /// sysctl names to values, inside the guest.
    pub sysctls: BTreeMap<String, String>,
    /// Where the VMM's cgroup goes, such as `/kubepods/burstable/pod1234`; empty puts it under the daemon's own.
    pub cgroup_parent: String,
    /// What all containers of the pod may use together, from which the VM is sized.
    pub resources: Resources,
    /// What Kubernetes adds for the runtime itself (RuntimeClass overhead).
    pub overhead: Resources,
    /// The containers share one PID namespace.
    pub share_pid_namespace: bool,
    /// Where the network comes from.
    pub network: NetworkSource,
    /// The user namespace of all its containers; `None` leaves them the guest's.
    #[serde(default)]
    pub users: Option<UserMappings>,
}

/// What a user namespace maps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserMappings {
    /// Users.
    pub uids: Vec<IdMapping>,
    /// Groups.
    pub gids: Vec<IdMapping>,
}

/// A run of users or groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    /// First number in containers.
    pub container_id: u32,
    /// First number outside: in the guest, and on the host as owner of volumes.
    pub host_id: u32,
    /// How many.
    pub length: u32,
}

/// Longest name that a host takes by itself, in bytes: a DNS label, as the kubelet has it.
const HOSTNAME_BYTES: usize = 63;

impl ContainerSpec {
    /// Ids of the images that the container's files come from.
    pub fn images(&self) -> impl Iterator<Item = &str> {
        let root = match &self.rootfs {
            Rootfs::Image(root) => Some(root.as_str()),
            Rootfs::Directory { .. } | Rootfs::Disk(_) => None,
        };
        let mounted = self.mounts.iter().filter_map(|mount| match &mount.source {
            MountSource::Image(image) => Some(image.as_str()),
            _ => None,
        });
        root.into_iter().chain(mounted)
    }
}

impl PodSpec {
    /// The name the guest goes by: the one asked for, or as much of the pod's as a host can have.
    #[must_use]
    pub fn hostname(&self) -> &str {
        let (asked, name) = (self.hostname.as_str(), self.identity.name.as_str());
        if !asked.is_empty() {
            return asked;
        }
        name.get(..HOSTNAME_BYTES).map_or(name, |cut| cut.trim_end_matches(['-', '.']))
    }
}

/// Who a pod is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodIdentity {
    /// Pod name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes uid.
    pub uid: String,
    /// Grows each time the kubelet makes the sandbox anew.
    pub attempt: u32,
}

impl PodIdentity {
    /// What every line of the log carries that is written for the pod. At the highest level, so that no filter takes it off, and of no
    /// other span: what is done for one pod leads to more that is.
    pub(crate) fn span(&self) -> tracing::Span {
        tracing::error_span!(parent: None, "pod", namespace = self.namespace, name = self.name)
    }
}

/// Where a pod's network comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkSource {
    /// A network namespace of the pod's own, filled by the CNI plugins configured.
    #[default]
    Cni,
    /// A network namespace that somebody else has filled (containerd).
    Netns(PathBuf),
    /// Loopback only.
    None,
}

/// Name resolution of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// `nameserver` lines.
    pub servers: Vec<String>,
    /// The `search` line.
    pub searches: Vec<String>,
    /// The `options` line.
    pub options: Vec<String>,
}

/// A port of the host that leads to the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// In the pod.
    pub container_port: u16,
    /// On the host; 0 maps nothing.
    pub host_port: u16,
    /// Only on this address of the host.
    pub host_ip: Option<IpAddr>,
}

/// Limits of a pod or container; `None` means no limit asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Resources {
    /// CFS period in µs.
    pub cpu_period: Option<u64>,
    /// CFS quota in µs per period.
    pub cpu_quota: Option<i64>,
    /// Relative weight, 2 to 262144.
    pub cpu_shares: Option<u64>,
    /// Bytes.
    pub memory_limit: Option<u64>,
    /// Bytes, memory and swap together.
    pub memory_swap_limit: Option<u64>,
    /// −1000 to 1000.
    pub oom_score_adj: Option<i32>,
    /// CPU list such as `0-1`.
    pub cpuset_cpus: String,
    /// Node list.
    pub cpuset_mems: String,
    /// Most processes and threads.
    pub pids_limit: Option<u64>,
    /// cgroup v2 file names to contents.
    pub unified: BTreeMap<String, String>,
}

impl Resources {
    /// Takes over what `other` names.
    pub fn update(&mut self, other: &Self) {
        let Self { cpu_period, cpu_quota, cpu_shares, memory_limit, memory_swap_limit, oom_score_adj, .. } = other;
        self.cpu_period = cpu_period.or(self.cpu_period);
        self.cpu_quota = cpu_quota.or(self.cpu_quota);
        self.cpu_shares = cpu_shares.or(self.cpu_shares);
        self.memory_limit = memory_limit.or(self.memory_limit);
        self.memory_swap_limit = memory_swap_limit.or(self.memory_swap_limit);
        self.oom_score_adj = oom_score_adj.or(self.oom_score_adj);
        self.pids_limit = other.pids_limit.or(self.pids_limit);
        for (mine, theirs) in [(&mut self.cpuset_cpus, &other.cpuset_cpus), (&mut self.cpuset_mems, &other.cpuset_mems)]
        {
            if !theirs.is_empty() {
                mine.clone_from(theirs);
            }
        }
        self.unified.extend(other.unified.clone());
    }
}

/// A container to create in a pod: the subset of an OCI runtime specification that crosses into the guest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Kubernetes' name of the container.
    pub name: String,
    /// Grows each time the kubelet creates the container anew.
    pub attempt: u32,
    /// Free labels, for filters.
    pub labels: BTreeMap<String, String>,
    /// Free annotations, kept as they are.
    pub annotations: BTreeMap<String, String>,
    /// The root filesystem.
    pub rootfs: Rootfs,
    /// What the caller called the image; only ever shown.
    pub image_name: String,
    /// Whether the root filesystem refuses writes.
    pub read_only_rootfs: bool,
    /// What to run.
    pub process: ProcessSpec,
    /// Mounts beyond the standard ones.
    pub mounts: Vec<MountSpec>,
    /// Host devices asked for: path in the container and on the host, and `rwm`.
    pub devices: Vec<DeviceSpec>,
    /// Limits.
    pub resources: Resources,
    /// Relative to [`PodSpec::log_directory`]; empty means no log.
    pub log_path: PathBuf,
    /// Whether standard input stays open for attach.
    pub stdin: bool,
    /// Whether the first attach's end closes standard input.
    pub stdin_once: bool,
    /// Whose process table the container sees.
    pub pid_namespace: PidNamespace,
    /// All of the guest; nothing of the host.
    pub privileged: bool,
    /// Paths made invisible.
    pub masked_paths: Vec<String>,
    /// Paths made read-only.
    pub readonly_paths: Vec<String>,
    /// Signal that asks the container to stop, as a number.
    pub stop_signal: i32,
}

/// What a container's root filesystem is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rootfs {
    /// An image of the store, by its id (`sha256:…`).
    Image(String),
    /// A directory of the host, which takes what is written.
    Directory {
        /// Where it is.
        path: PathBuf,
        /// Owners are shown as those of the pod's user namespace; else they are those already.
        mapped: bool,
    },
    /// A file or block device of the host that holds an ext4 file system, which takes what is written.
    Disk(PathBuf),
}

impl Default for Rootfs {
    fn default() -> Self {
        Self::Image(String::new())
    }
}

/// A process to run, image defaults already merged in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// Program and arguments.
    pub args: Vec<String>,
    /// `KEY=value`.
    pub env: Vec<String>,
    /// Working directory; empty means `/`.
    pub cwd: String,
    /// As an image's config writes it: `user`, `uid`, `user:group` or `uid:gid`.
    pub user: String,
    /// Overrides the primary group.
    pub gid: Option<u32>,
    /// Groups beside the primary one.
    pub supplemental_groups: Vec<u32>,
    /// CRI SupplementalGroupsPolicy `Merge`.
    pub merge_image_groups: bool,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Capability sets.
    pub capabilities: Capabilities,
    /// prctl(2) `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privileges: bool,
    /// Resource limits by name, soft and hard.
    pub rlimits: Vec<(String, u64, u64)>,
    /// −1000 to 1000, inside the guest.
    pub oom_score_adj: i32,
    /// Compiled seccomp filter, 8 bytes an instruction; empty means unconfined.
    pub seccomp: Vec<u8>,
}

/// Capability sets, names as capabilities(7) spells them, with `CAP_`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Limits what the process can ever gain.
    pub bounding: Vec<String>,
    /// Effective and permitted sets.
    pub permitted: Vec<String>,
    /// Kept over execve(2) with file capabilities.
    pub inheritable: Vec<String>,
    /// Kept over execve(2) without them.
    pub ambient: Vec<String>,
}

/// A mount of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    /// Absolute path in the container.
    pub destination: String,
    /// What is mounted there.
    pub source: MountSource,
    /// Of an image: the directory or file in it that is mounted; empty means all of it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub image_sub_path: String,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Whether what is mounted below it refuses them too.
    #[serde(default)]
    pub recursive_read_only: bool,
    /// Whether its owners are numbers in the pod's user namespace.
    #[serde(default)]
    pub mapped: bool,
    /// Whether what is mounted on the host below a directory, after the container has begun, is seen in it too.
    #[serde(default)]
    pub host_to_container: bool,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountSource {
    /// A file or directory of the host.
    Host(PathBuf),
    /// Guest memory that the pod's containers share, in place of a tmpfs of the host.
    Memory(MemoryVolume),
    /// Guest memory; size in bytes, 0 for the kernel's default.
    Tmpfs {
        /// Bytes.
        size: u64,
        /// Permission bits.
        mode: u32,
    },
    /// An image of the store, by its id.
    Image(String),
}

/// A volume of memory, or a directory of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryVolume {
    /// What was asked for on the host.
    pub host_path: PathBuf,
    /// The volume's name, its own in the pod.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Of its root, as in `st_mode`.
    pub mode: u32,
    /// Owner of its root.
    pub uid: u32,
    /// Group of its root.
    pub gid: u32,
    /// Which directory or file of it; empty is all of it.
    pub sub_path: String,
}

/// A device of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// In the container.
    pub container_path: String,
    /// On the host.
    pub host_path: String,
    /// Any of `r`, `w`, `m`.
    pub permissions: String,
}

/// Whose process table a container sees (CRI NamespaceMode of `pid`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PidNamespace {
    /// Its own.
    #[default]
    Container,
    /// All containers of the pod.
    Pod,
    /// The guest's.
    Node,
    /// That of another container, by id.
    Target(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_pod_name_is_cut_to_a_host_name() {
        let hostname = |hostname: &str, name: &str| {
            let identity = PodIdentity { name: name.into(), ..Default::default() };
            PodSpec { hostname: hostname.into(), identity, ..Default::default() }.hostname().to_owned()
        };
        assert_eq!(hostname("", "web"), "web");
        assert_eq!(hostname("asked", "web"), "asked");
        assert_eq!(hostname("", &"a".repeat(253)), "a".repeat(63));
        assert_eq!(hostname("", &format!("{}-.-bbb", "a".repeat(60))), "a".repeat(60));
    }
}
