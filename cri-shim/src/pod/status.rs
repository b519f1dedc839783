//! What is known of pods and containers, as plain data: a snapshot costs a clone and waits for nobody.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::spec::{ContainerSpec, PodSpec};

/// Whether a pod can run containers (CRI PodSandboxState).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodState {
    /// Its VM runs and its agent answers.
    Ready,
    /// Stopped, died, or does not answer.
    NotReady,
}

/// One pod.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PodStatus {
    /// 64 hexadecimal digits.
    pub id: String,
    /// What was asked for.
    pub spec: Arc<PodSpec>,
    /// Whether it can run containers.
    pub state: PodState,
    /// `CLOCK_REALTIME` in nanoseconds.
    pub created_at_ns: i64,
    /// Why it is not ready, in one sentence; empty if it is.
    pub message: String,
    /// Primary address first.
    pub ips: Vec<IpAddr>,
    /// Its network namespace on the host, where the tap is.
    pub netns: Option<PathBuf>,
    /// `uname -r` of the guest.
    pub guest_kernel: String,
    /// The VMM process; `None` once it has ended.
    pub vmm_pid: Option<u32>,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// cgroup of the VMM, below the cgroup root.
    pub cgroup: String,
    /// What its disk shows.
    pub disks: Vec<PodDisk>,
    /// The moments of its start that the daemon saw.
    #[serde(skip)]
    pub moments: Vec<Moment>,
    /// Its containers by id.
    pub containers: BTreeMap<String, ContainerStatus>,
}

/// A part of a pod's disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PodDisk {
    /// On the host.
    pub file: PathBuf,
    /// The image it belongs to; `None` is where containers write.
    pub image: Option<String>,
}

/// Where a container is in its life (CRI ContainerState).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerState {
    /// Made, not started.
    Created,
    /// Its first process runs.
    Running,
    /// Its first process has ended.
    Exited,
}

/// One container.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ContainerStatus {
    /// 64 hexadecimal digits.
    pub id: String,
    /// Its pod.
    pub pod_id: String,
    /// What was asked for.
    pub spec: Arc<ContainerSpec>,
    /// Where it is in its life.
    pub state: ContainerState,
    /// `CLOCK_REALTIME` in nanoseconds.
    pub created_at_ns: i64,
    /// 0 before.
    pub started_at_ns: i64,
    /// 0 before.
    pub finished_at_ns: i64,
    /// Meaningful once exited: exit status, or 128 + signal.
    pub exit_code: i32,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `PodVMExited` …; empty before it exits.
    pub reason: String,
    /// More about the reason, for people.
    pub message: String,
    /// Id of its image.
    pub image_id: String,
    /// Its log file; empty if it has none.
    pub log_path: PathBuf,
    /// Who its first process runs as, if that is known.
    pub user: Option<ContainerUser>,
}

impl ContainerStatus {
    /// Ids of the images that its files come from.
    pub fn images(&self) -> impl Iterator<Item = &str> {
        self.spec.images()
    }
}

/// Who a process runs as, by number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerUser {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// What a command in a container said, and how it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOutput {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Exit status, or 128 + signal.
    pub exit_code: i32,
}

/// A moment on a pod's way to ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// What was done then, such as `spawned` or `agent_connected`.
    pub name: String,
    /// `CLOCK_BOOTTIME` in nanoseconds.
    pub at_ns: u64,
}
