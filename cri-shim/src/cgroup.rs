//! The cgroup of each VMM: a leaf below the pod's own, made before the VMM and removed after it.
//!
//! cgroup v2 only, named as the kubelet's `cgroupfs` driver does. What is above a leaf belongs to others: controllers
//! are enabled on the way, nothing else is written there.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, IoContext, Result};

/// What the VMM may use beyond its guest's memory: its own, the kernel's for it, and page cache it is charged for.
pub(crate) const OVERHEAD_BYTES: u64 = 64 << 20;

/// Prefix of a leaf's name, before the pod's id.
const LEAF_PREFIX: &str = "pericarp-";

/// Controllers that a leaf should have; those the host lacks are done without.
const CONTROLLERS: [&str; 5] = ["cpu", "memory", "io", "pids", "cpuset"];

/// How long killed processes may take to be gone.
const EMPTY_LIMIT: Duration = Duration::from_secs(10);

/// Between two looks whether they are.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Limits of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Bytes of guest memory.
    pub guest_bytes: u64,
    /// CFS quota and period in µs.
    pub cpu: Option<(u64, u64)>,
}

/// The leaf of a pod, as a path below the cgroup root; `parent` is what the pod asked for, `own` where others go.
pub(crate) fn leaf(parent: &str, own: &str, id: &str) -> Result<String> {
    let parent = if parent.is_empty() { own } else { parent };
    if parent.split('/').any(|name| name.ends_with(".slice")) {
        return Err(Error::InvalidArgument(format!(
            "cgroup parent {parent} is a systemd slice: set the kubelet's cgroupDriver to cgroupfs"
        )));
    }
    if parent.split('/').any(|name| name == "..") || parent.contains('\0') {
        return Err(Error::InvalidArgument(format!("cgroup parent {parent} is not a path below the cgroup root")));
    }
    Ok(format!("/{}/{LEAF_PREFIX}{id}", parent.trim_matches('/')))
}

/// The pod whose leaf has this name.
pub(crate) fn pod_of(name: &str) -> Option<&str> {
    name.strip_prefix(LEAF_PREFIX)
}

/// Makes the groups on the way to `path` and enables controllers for what is below; `path` itself is made too.
pub(crate) fn create_path(root: &Path, path: &str) -> Result<PathBuf> {
    if !root.join("cgroup.controllers").exists() {
        return Err(Error::Unavailable(format!(
            "{} is no cgroup v2 hierarchy: boot with systemd.unified_cgroup_hierarchy=1 or mount one there",
            root.display()
        )));
    }
    let mut at = root.to_owned();
    for name in path.split('/').filter(|name| !name.is_empty()) {
        enable_controllers(&at);
        at.push(name);
        match fs::create_dir(&at) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::io(format_args!("creating cgroup {}", at.display()), &error));
            }
            _ => {}
        }
    }
    Ok(at)
}

/// Makes a leaf with its limits and opens it for clone3(2).
pub(crate) fn create(root: &Path, leaf: &str, limits: Limits) -> Result<OwnedFd> {
    create_path(root, leaf)?;
    limit_memory(root, leaf, limits.guest_bytes)?;
    if let Some(cpu) = limits.cpu {
        limit_cpu(root, leaf, cpu)?;
    }
    open(root, leaf)
}

/// Opens a leaf for clone3(2).
pub(crate) fn open(root: &Path, leaf: &str) -> Result<OwnedFd> {
    let at = root.join(leaf.trim_start_matches('/'));
    let directory = File::options().read(true).custom_flags(libc::O_DIRECTORY).open(&at);
    Ok(directory.doing(|| format!("opening cgroup {}", at.display()))?.into())
}

/// Sets what a leaf may use, by its guest's memory.
pub(crate) fn limit_memory(root: &Path, leaf: &str, guest_bytes: u64) -> Result<()> {
    let memory = guest_bytes.saturating_add(OVERHEAD_BYTES);
    set(&root.join(leaf.trim_start_matches('/')), "memory.max", &memory.to_string())
}

/// Sets a leaf's CFS quota and period in µs.
pub(crate) fn limit_cpu(root: &Path, leaf: &str, (quota, period): (u64, u64)) -> Result<()> {
    set(&root.join(leaf.trim_start_matches('/')), "cpu.max", &format!("{quota} {period}"))
}

/// How often the kernel has killed a process of a leaf because there was no memory for it.
pub(crate) fn oom_kills(root: &Path, leaf: &str) -> u64 {
    let events = fs::read_to_string(root.join(leaf.trim_start_matches('/')).join("memory.events")).unwrap_or_default();
    events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).unwrap_or(0)
}

/// Kills all that is in a leaf and removes it; one that is not there is no error.
pub(crate) async fn remove(root: &Path, leaf: &str) -> Result<()> {
    let at = root.join(leaf.trim_start_matches('/'));
    if !at.exists() {
        return Ok(());
    }
    let failed = |error: &io::Error| Error::io(format_args!("removing cgroup {}", at.display()), error);
    let since = Instant::now();
    loop {
        // Each time: a spawner whose daemon has died may be starting a VMM at this moment.
        match fs::write(at.join("cgroup.kill"), "1") {
            Err(error) if !is_gone(&error) => return Err(failed(&error)),
            _ => {}
        }
        match fs::remove_dir(&at) {
            Ok(()) => return Ok(()),
            Err(error) if is_gone(&error) => return Ok(()),
            // Killed processes leave the group when they have ended, which is soon.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && since.elapsed() < EMPTY_LIMIT => {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            Err(error) => return Err(failed(&error)),
        }
    }
}

/// A file of a group that is being removed answers ENODEV.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// Removes a leaf in which nothing runs; whether it did. One in use may be another runtime's of the same name.
pub(crate) fn remove_empty(root: &Path, leaf: &str) -> Result<bool> {
    let at = root.join(leaf.trim_start_matches('/'));
    match fs::remove_dir(&at) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(false),
        Err(error) => Err(Error::io(format_args!("removing cgroup {}", at.display()), &error)),
    }
}

/// One controller at a time, so that one the host lacks does not keep the others off; a group that holds processes
/// refuses (cgroup v2, "no internal processes"), and its children then go without.
fn enable_controllers(at: &Path) {
    let Ok(enabled) = fs::read_to_string(at.join("cgroup.subtree_control")) else { return };
    for controller in CONTROLLERS {
        if enabled.split_whitespace().any(|word| word == controller) {
            continue;
        }
        if let Err(error) = fs::write(at.join("cgroup.subtree_control"), format!("+{controller}")) {
            tracing::debug!(cgroup = %at.display(), controller, %error, "controller not enabled");
        }
    }
}

/// A limit whose controller is not there is not set: the group above holds the pod all the same.
fn set(at: &Path, file: &str, value: &str) -> Result<()> {
    match fs::write(at.join(file), value) {
        // cgroupfs makes no files: creating one is refused.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
            tracing::warn!(cgroup = %at.display(), file, "no such controller here, so no limit");
            Ok(())
        }
        result => result.doing(|| format!("writing {value} to {}/{file}", at.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leaf_is_below_what_was_asked_for() {
        assert_eq!(
            leaf("/kubepods/burstable/pod1", "/pericarp", "ab").expect("fits"),
            "/kubepods/burstable/pod1/pericarp-ab"
        );
        assert_eq!(leaf("", "/pericarp", "ab").expect("fits"), "/pericarp/pericarp-ab");
        assert_eq!(leaf("/", "/pericarp", "ab").expect("fits"), "//pericarp-ab");
        assert_eq!(pod_of("pericarp-ab"), Some("ab"));
    }

    #[test]
    fn slices_and_ways_out_are_refused() {
        for parent in ["kubepods-pod1.slice", "/kubepods.slice/kubepods-pod1.slice", "/../x", "/a\0b"] {
            assert!(matches!(leaf(parent, "/pericarp", "ab"), Err(Error::InvalidArgument(_))), "{parent}");
        }
    }

    #[test]
    fn a_directory_that_is_no_cgroup_is_told() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(matches!(create_path(dir.path(), "/a"), Err(Error::Unavailable(_))));
    }
}
