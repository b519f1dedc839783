//! What daemon and spawner say to each other.

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};
use vmm_control::wire::Limits;

/// Of a packet in either direction.
pub(super) const LIMITS: Limits = Limits { bytes: 16 << 10, fds: 32 };

/// Asks for a process; beside it the binary, the cgroup, and a descriptor for each target.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) id: u64,
    /// The numbers that the process will know its descriptors by.
    pub(super) targets: Vec<RawFd>,
}

/// What the spawner tells.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Report {
    /// A pidfd is beside it.
    Started { id: u64, pid: u32 },
    /// There is no process.
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
