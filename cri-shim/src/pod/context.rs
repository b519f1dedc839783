//! What all pods share: choices, the spawner, images, networks, and what the host has.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread::available_parallelism;

use tokio::sync::Semaphore;

use super::CoreConfig;
use super::events::Events;
use super::size::Host;
use super::watcher::Watcher;
use crate::cgroup;
use crate::error::{Error, IoContext, Result};
use crate::image::Store;
use crate::network::{Network, NetworkError};
use crate::scratch;
use crate::spawner;
use crate::vmm::Cause;

/// Held while a process works in a state directory.
const LOCK: &str = "pods.lock";

/// How many pods may boot at a time for each CPU of the host, and at least: more would only slow each other down
/// until the last ones are over their limit.
const BOOTS_PER_CPU: usize = 2;
const LEAST_BOOTS: usize = 4;

/// What all pods share.
pub(super) struct Context {
    pub(super) config: CoreConfig,
    pub(super) spawner: spawner::Client,
    pub(super) images: Store,
    pub(super) network: Network,
    pub(super) template: PathBuf,
    pub(super) host: Host,
    /// Told of all that happens.
    pub(super) events: Events,
    /// Tells of changes in directories of the host.
    pub(super) watcher: Watcher,
    /// Taken by each pod that boots.
    pub(super) boots: Semaphore,
    /// How often VMs have ended, by why.
    ends: Mutex<BTreeMap<&'static str, u64>>,
    _lock: File,
}

impl Context {
    /// Makes the directories, the cgroup and the template that every pod needs, and claims the state directory.
    pub(super) fn new(config: CoreConfig, spawner: spawner::Client, images: Store, network: Network) -> Result<Self> {
        for directory in [&config.pods_dir(), &config.scratch_dir] {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
            made.doing(|| format!("creating {}", directory.display()))?;
        }
        let lock = claim(&config.state_dir)?;
        cgroup::create_path(&config.cgroup_root, &config.cgroup_parent)?;
        let template = scratch::template(&config.scratch_dir, config.scratch_bytes)?;
        let host = host()?;
        let boots = Semaphore::new(host.cpus.saturating_mul(BOOTS_PER_CPU).max(LEAST_BOOTS));
        let (events, watcher) = (Events::new(), Watcher::new()?);
        let ends = Mutex::default();
        Ok(Self { host, events, watcher, boots, ends, config, spawner, images, network, template, _lock: lock })
    }

    /// Counts the end of a VM, and says why it ended. A VMM that was killed leaves no word, but its cgroup may tell why.
    pub(super) fn ended(&self, mut cause: Cause, leaf: &str) -> String {
        if cause.is_unexplained() && cgroup::oom_kills(&self.config.cgroup_root, leaf) > 0 {
            cause = Cause::out_of_memory();
        }
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let count = ends.entry(cause.kind).or_default();
        *count = count.saturating_add(1);
        cause.text
    }

    /// How often VMs have ended since the daemon began, by why.
    pub(super) fn ends(&self) -> BTreeMap<&'static str, u64> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Two processes with one state directory would undo each other's pods.
fn claim(state_dir: &Path) -> Result<File> {
    let path = state_dir.join(LOCK);
    let file = File::options().create(true).append(true).open(&path).doing(|| format!("opening {}", path.display()))?;
    file.try_lock().map_err(|_| {
        Error::FailedPrecondition(format!(
            "another process works in {}: stop it, or give this one a state directory of its own",
            state_dir.display()
        ))
    })?;
    Ok(file)
}

fn host() -> Result<Host> {
    let text = fs::read_to_string("/proc/meminfo").doing(|| "reading /proc/meminfo")?;
    let kib =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok());
    let kib = kib.ok_or_else(|| Error::Internal("/proc/meminfo has no MemTotal".into()))?;
    Ok(Host { memory_bytes: kib.saturating_mul(1024), cpus: available_parallelism().map_or(1, usize::from) })
}

/// Runs what waits for the kernel or a disk where it holds up nobody else.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Error::Internal(format!("a task of the runtime failed: {error}"))))
}

impl From<NetworkError> for Error {
    fn from(error: NetworkError) -> Self {
        let text = chain(&error);
        match error {
            NetworkError::Cni(_) | NetworkError::NoInterface | NetworkError::NoEthernet => {
                Self::Unavailable(format!("the pod's network: {text}"))
            }
            NetworkError::BadId(_) => Self::InvalidArgument(text),
            NetworkError::Netlink { .. } => Self::Internal(format!("the pod's network: {text}")),
            NetworkError::Io { action, cause } => Self::io(format_args!("cannot {action}"), &cause),
        }
    }
}

/// An error with what is behind it, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_has_one_owner() {
        let dir = tempfile::tempdir().expect("a directory");
        let held = claim(dir.path()).expect("is free");
        assert!(matches!(claim(dir.path()), Err(Error::FailedPrecondition(_))));
        drop(held);
        assert!(claim(dir.path()).is_ok());
    }

    #[test]
    fn this_host_has_something() {
        let host = host().expect("proc is mounted");
        assert!(host.memory_bytes > 1 << 20 && host.cpus >= 1);
    }
}
