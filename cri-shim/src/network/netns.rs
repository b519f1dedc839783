//! Network namespaces that outlive the daemon, each a bind mount of its handle on a file.
//!
//! Only a thread made for it ever enters one: no other thread of the daemon leaves the host's namespace.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use super::{NetworkError, netlink};

/// The handle of the calling thread's network namespace (namespaces(7)).
const OWN_NETNS: &str = "/proc/thread-self/ns/net";

/// Whether new interfaces of the calling thread's namespace look for others that have their addresses (ip-sysctl).
const ACCEPT_DAD: &str = "/proc/sys/net/ipv6/conf/default/accept_dad";

/// A network namespace that has a name in the file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netns {
    path: PathBuf,
}

impl Netns {
    /// A namespace that somebody else made and removes.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where its handle is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn create(dir: &Path, name: &str) -> Result<Self, NetworkError> {
        let path = dir.join(name);
        let describe = |e| NetworkError::io(format!("create the network namespace {}", path.display()), e);
        fs::create_dir_all(dir).map_err(describe)?;
        File::create_new(&path).map_err(describe)?;
        let made = in_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(Some(OWN_NETNS), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            no_duplicate_detection()?;
            netlink::loopback_up()
        });
        if let Err(error) = made {
            // The namespace is of no use; a failure to take it back is found again by its file.
            let _ = Self::remove(dir, name);
            return Err(describe(error));
        }
        Ok(Self { path })
    }

    pub(super) fn find(dir: &Path, name: &str) -> Option<Self> {
        let path = dir.join(name);
        path.exists().then_some(Self { path })
    }

    pub(super) fn remove(dir: &Path, name: &str) -> Result<(), NetworkError> {
        let path = dir.join(name);
        let describe = |e| NetworkError::io(format!("remove the network namespace {}", path.display()), e);
        loop {
            match umount2(&path, MntFlags::MNT_DETACH) {
                Ok(()) => {}
                // Not mounted (any more), or not even there.
                Err(Errno::EINVAL | Errno::ENOENT) => break,
                Err(errno) => return Err(describe(errno.into())),
            }
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(describe(error)),
            _ => Ok(()),
        }
    }

    /// Runs `work` on a thread of its own inside the namespace.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetworkError> {
        in_thread(|| {
            setns(File::open(&self.path)?, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        })
        .map_err(|e| NetworkError::io(format!("enter the network namespace {}", self.path.display()), e))
    }
}

/// Turns off IPv6 duplicate address detection for interfaces to come in the calling thread's namespace. Plugins would
/// wait a second or more for it, although it is the guest that will use the address and speaks for it.
fn no_duplicate_detection() -> io::Result<()> {
    match fs::write(ACCEPT_DAD, "0") {
        // A host without IPv6 has nothing to detect.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}
