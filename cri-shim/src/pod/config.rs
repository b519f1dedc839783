//! What the core must be told of its host: paths, sizes and nothing else. The daemon's configuration file and the
//! command line both produce it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmm_control::Limits;

use crate::pod_dir::PodDir;

/// Paths and choices of the core. Every path is absolute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CoreConfig {
    /// Runtime state, lost at a reboot as the pods are: one directory per pod. Best on a tmpfs.
    pub state_dir: PathBuf,
    /// Writable layers of pods and the template they are copied from; on a disk, best one that can reflink.
    pub scratch_dir: PathBuf,
    /// Size in bytes of each pod's writable space; sparse.
    pub scratch_bytes: u64,
    /// The `pericarp-vmm` binary; statically linked, since it runs in an empty root.
    pub vmm: PathBuf,
    /// The guest kernel, an uncompressed ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The guest's initial RAM disk.
    pub initrd: PathBuf,
    /// Appended to the machine's own kernel command line.
    pub kernel_cmdline: String,
    /// Where cgroup v2 is mounted.
    pub cgroup_root: PathBuf,
    /// Below `cgroup_root`: where pods go that name no cgroup of their own.
    pub cgroup_parent: String,
    /// Guest memory in MiB of a pod without a memory limit.
    pub default_memory_mib: u32,
    /// Virtual CPUs of a pod without a CPU limit.
    pub default_vcpus: u8,
    /// Added to a pod's memory limit, in MiB: guest kernel, agent and page tables.
    pub guest_overhead_mib: u32,
    /// Guest memory in MiB that a pod can grow to while it runs; 0 is all that the host has. A pod that starts with more
    /// keeps it.
    pub max_memory_mib: u32,
    /// Virtual CPUs that a pod can grow to while it runs; 0 is twice what it starts with, as far as the host has them.
    pub max_vcpus: u8,
    /// Requests of a pod's disk in a second; 0 is as many as can be.
    pub disk_requests_per_s: u64,
    /// Bytes that a pod's disk reads and writes in a second; 0 is as many as can be.
    pub disk_bytes_per_s: u64,
    /// Packets that a pod receives in a second, and that it sends; 0 is as many as can be.
    pub net_packets_per_s: u64,
    /// Bytes that a pod receives in a second, and that it sends; 0 is as many as can be.
    pub net_bytes_per_s: u64,
}

impl Default for CoreConfig {
    fn default() -> Self {
        Self {
            state_dir: "/run/pericarp".into(),
            scratch_dir: "/var/lib/pericarp/scratch".into(),
            scratch_bytes: 10 << 30,
            vmm: "/usr/lib/pericarp/pericarp-vmm".into(),
            kernel: "/usr/lib/pericarp/vmlinux".into(),
            initrd: "/usr/lib/pericarp/initrd".into(),
            kernel_cmdline: String::new(),
            cgroup_root: "/sys/fs/cgroup".into(),
            cgroup_parent: "/pericarp".into(),
            default_memory_mib: 512,
            default_vcpus: 1,
            guest_overhead_mib: 64,
            max_memory_mib: 0,
            max_vcpus: 0,
            disk_requests_per_s: 0,
            disk_bytes_per_s: 0,
            net_packets_per_s: 0,
            net_bytes_per_s: 0,
        }
    }
}

impl CoreConfig {
    /// What a pod may do with its disk.
    pub fn disk_limits(&self) -> Limits {
        Limits { operations_per_s: self.disk_requests_per_s, bytes_per_s: self.disk_bytes_per_s }
    }

    /// What it may receive, and what it may send.
    pub fn net_limits(&self) -> Limits {
        Limits { operations_per_s: self.net_packets_per_s, bytes_per_s: self.net_bytes_per_s }
    }

    /// Directory of all pods' state.
    pub fn pods_dir(&self) -> PathBuf {
        self.state_dir.join("pods")
    }

    /// Where one pod keeps its state.
    pub fn pod_dir(&self, id: &str) -> PodDir {
        PodDir::new(self.pods_dir().join(id))
    }

    /// The `pericarp-fs` binary: beside the VMM's.
    pub fn file_server(&self) -> PathBuf {
        self.vmm.with_file_name("pericarp-fs")
    }

    /// A pod's writable space.
    pub fn scratch_file(&self, id: &str) -> PathBuf {
        self.scratch_dir.join(format!("{id}.ext4"))
    }
}
