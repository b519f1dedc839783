//! The node side of Pericarp: pods, images and networks, and the doors through which they are asked for.

mod agent;
mod audit;
mod cgroup;
pub mod cli;
mod clock;
pub mod config;
mod control;
pub mod cri;
mod defaults;
pub mod error;
pub mod image;
mod kill_point;
pub mod metrics;
mod mount_table;
pub mod network;
mod own_core;
pub mod pod;
pub mod pod_dir;
mod process;
mod random;
mod record;
mod scratch;
pub mod seccomp;
pub mod shim;
mod snapshot;
pub mod spans;
pub mod spawner;
pub mod spec;
pub mod streaming;
mod undo;
mod vmm;
mod volume;
mod watched;

pub use agent::{Session, SessionOutput, SessionReader, SessionWriter};
pub use error::{Error, Result};
