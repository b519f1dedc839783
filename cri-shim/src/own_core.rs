//! A core of a process's own, beside the daemon's: a state directory that a lock marks as in use. If the process is
//! killed, whoever claims the directory next finds its pods again.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::clock;
use crate::config::Config;
use crate::error::{Error, IoContext, Result};
use crate::image::Store;
use crate::network::{Network, NetworkConfig};
use crate::pod::{CoreConfig, Pods};
use crate::scratch;
use crate::spawner::Spawner;

/// Where cores of `pericarp run` are, below the daemon's state directory.
pub(crate) const RUN: &str = "run";

/// Where cores of containerd shims are.
pub(crate) const CONTAINERD: &str = "containerd";

/// Begins the name of a directory that is not locked yet.
const NEW: &str = ".new-";

/// Directory of all cores of a kind.
pub(crate) fn directory(config: &Config, kind: &str) -> PathBuf {
    config.core.state_dir.join(kind)
}

/// A core's configuration, and the lock that keeps others off its directory while this lives.
#[derive(Debug)]
pub(crate) struct OwnCore {
    pub(crate) config: CoreConfig,
    _lock: File,
}

impl OwnCore {
    /// Takes over the directory of a process that was killed, or makes one.
    pub(crate) fn claim_any(config: &Config, kind: &str) -> Result<Self> {
        let all = directory(config, kind);
        fs::create_dir_all(&all).doing(|| format!("making {} (run as root)", all.display()))?;
        let listing = || format!("listing {}", all.display());
        let left = fs::read_dir(&all).doing(listing)?.flatten().map(|entry| entry.path()).filter(|path| !is_new(path));
        for directory in left {
            if let Some(lock) = lock(&directory)? {
                return Self::at(config, kind, &directory, lock);
            }
        }
        // No other process has this name, and one of an earlier process that had this number was not free.
        let fresh = all.join(format!("{NEW}{}", std::process::id()));
        fs::create_dir_all(&fresh).doing(|| format!("making {}", fresh.display()))?;
        let missing = || Error::Internal("a directory of this process alone is locked".into());
        let lock = lock(&fresh)?.ok_or_else(missing)?;
        let number = clock::realtime_ns();
        let directory = all.join(format!("{}-{number}", std::process::id()));
        // Others see it from here on, and find it locked.
        fs::rename(&fresh, &directory).doing(|| format!("making {}", directory.display()))?;
        Self::at(config, kind, &directory, lock)
    }

    /// Makes the directory of that name, or takes it over from a process that was killed; `None` if another has it.
    pub(crate) fn claim(config: &Config, kind: &str, name: &str) -> Result<Option<Self>> {
        let directory = directory(config, kind).join(name);
        fs::create_dir_all(&directory).doing(|| format!("making {} (run as root)", directory.display()))?;
        lock(&directory)?.map(|lock| Self::at(config, kind, &directory, lock)).transpose()
    }

    fn at(config: &Config, kind: &str, directory: &Path, lock: File) -> Result<Self> {
        let shared = &config.core;
        let name = Path::new(directory.file_name().unwrap_or_default());
        let scratch_dir = shared.scratch_dir.join(kind).join(name);
        fs::create_dir_all(&scratch_dir).doing(|| format!("making {}", scratch_dir.display()))?;
        // Made once for all, since that takes longer than all the rest.
        let template = scratch::template(&shared.scratch_dir, shared.scratch_bytes)?;
        let linked = fs::hard_link(&template, scratch_dir.join(template.file_name().unwrap_or_default()));
        linked
            .or_else(|error| if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) })
            .doing(|| format!("linking {}", template.display()))?;
        let config = CoreConfig {
            state_dir: directory.to_owned(),
            scratch_dir,
            // Each sweeps what is in its own, the daemon and all others.
            cgroup_parent: format!("{}/{kind}/{}", shared.cgroup_parent.trim_end_matches('/'), name.display()),
            ..shared.clone()
        };
        Ok(Self { config, _lock: lock })
    }

    /// Opens the core. What a process that was killed has left of pods is removed, since nobody needs it any more.
    pub(crate) async fn open(&self, config: &Config, images: Store, spawner: Spawner) -> Result<Pods> {
        let network = NetworkConfig { state_dir: self.config.state_dir.clone(), ..config.network() };
        let pods = Pods::open(self.config.clone(), spawner, images, Network::new(network)).await?;
        for pod in pods.pods() {
            pods.kill_pod(&pod.id).await?;
            pods.remove_pod(&pod.id).await?;
        }
        Ok(pods)
    }

    /// Removes all that is in the core, and the core. If that fails its records stay, by which who claims it next tries again.
    pub(crate) async fn close(self, pods: Pods) -> Result<()> {
        for pod in pods.pods() {
            pods.remove_pod(&pod.id).await?;
        }
        drop(pods);
        self.release();
        Ok(())
    }

    /// Removes the directories, of which nothing is needed any more.
    fn release(self) {
        // Best effort: who claims it next takes over what cannot be removed now.
        let _ = fs::remove_dir(self.config.cgroup_root.join(self.config.cgroup_parent.trim_start_matches('/')));
        let _ = fs::remove_dir_all(&self.config.scratch_dir);
        let _ = fs::remove_dir_all(&self.config.state_dir);
    }
}

fn is_new(path: &Path) -> bool {
    path.file_name().and_then(OsStr::to_str).is_none_or(|name| name.starts_with(NEW))
}

/// Locks a directory; `None` if another process has it, or has just removed it.
fn lock(directory: &Path) -> Result<Option<File>> {
    let path = directory.join("lock");
    let lock = match File::create(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        lock => lock.doing(|| format!("opening {}", path.display()))?,
    };
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(error).doing(|| format!("locking {}", path.display())),
    }
    let own = lock.metadata().doing(|| format!("looking at {}", path.display()))?.ino();
    let same = fs::metadata(&path).ok().map(|data| data.ino()) == Some(own);
    Ok(same.then_some(lock))
}
