//! What daemon and spawner say to each other.

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};
use vmm_control::wire::Limits;

/// Of a packet in either direction.
pub(super) const LIMITS: Limits = Limits { bytes: 16 << 10, fds: 32 };

/// Asks for something to be done; descriptors are beside it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) id: u64,
    pub(super) task: Task,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Task {
    /// Start a process. Beside it the binary, the cgroup, and a descriptor for each target.
    Start {
        kind: Kind,
        /// The numbers that the process will know its descriptors by.
        targets: Vec<RawFd>,
    },
    /// Mount a volume where a file server sees it. Beside it the server's pidfd and the mount, attached nowhere.
    Attach { share: u32, directory: bool },
    /// Undo that. Beside it the server's pidfd.
    Detach { share: u32 },
}

/// What a process is, and so what it finds around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// `pericarp-vmm`: an empty root.
    Vmm,
    /// `pericarp-fs`: a mount namespace of its own, in which volumes can be attached.
    FileServer,
}

/// What the spawner tells.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Report {
    /// A pidfd is beside it.
    Started { id: u64, pid: u32 },
    /// A volume is attached or detached.
    Done { id: u64 },
    /// It was not done.
    Failed { id: u64, reason: String },
    /// A process started earlier has ended.
    Ended { pid: u32, ended: Ended },
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}
