//! Where a pod's state is on the host. It names files and knows nothing of what is in them.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::{IoContext, Result};

/// The directory of one pod's state, and the names in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodDir(PathBuf);

impl PodDir {
    /// That directory.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A path to a name in the directory that fits a socket address however deep the directory is (unix(7) allows
    /// 107 bytes); good while the descriptor is held.
    pub fn reach(&self, name: &Path) -> Result<(OwnedFd, PathBuf)> {
        let directory = File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(&self.0);
        let directory = OwnedFd::from(directory.doing(|| format!("opening {}", self.0.display()))?);
        let path = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string());
        Ok((directory, path.join(name.file_name().unwrap_or_default())))
    }

    /// What may exist of the pod, and what is known of it.
    pub fn record(&self) -> PathBuf {
        self.0.join("record.json")
    }

    /// Host side of the guest's vsock.
    pub fn vsock(&self) -> PathBuf {
        self.0.join("vsock.sock")
    }

    /// The VMM's control socket.
    pub fn control(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    /// The VMM's events, one JSON object a line.
    pub fn events(&self) -> PathBuf {
        self.0.join("events")
    }

    /// What the process that serves shared directories wrote to its standard error.
    pub fn file_server_log(&self) -> PathBuf {
        self.0.join("fs.log")
    }

    /// What the VMM wrote to its standard error.
    pub fn vmm_log(&self) -> PathBuf {
        self.0.join("vmm.log")
    }
}
