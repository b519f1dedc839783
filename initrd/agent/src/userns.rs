//! The pod's user namespace: made once, joined by the processes of all its containers, and what owners are told by.
//!
//! Container processes are root of it and nobody in the guest. Their root file systems and the files they are given
//! are shown with owners mapped (mount_setattr(2), `MOUNT_ATTR_IDMAP`), so that images stay as they are.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects)]

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use agent_protocol::v1;
use thiserror::Error;

use crate::sys::{self, Fork};

/// Whom the kernel shows where an owner has no number.
const NOBODY: u32 = 65_534;

/// Why there is no user namespace.
#[derive(Debug, Error)]
#[error("cannot make the user namespace: {0}")]
pub(crate) struct UserSpaceError(#[from] io::Error);

/// The namespace and its mappings.
#[derive(Debug)]
pub(crate) struct UserSpace {
    namespace: OwnedFd,
    uids: Vec<v1::IdMapping>,
    gids: Vec<v1::IdMapping>,
}

impl UserSpace {
    /// The kernel checks the mappings.
    pub(crate) fn new(asked: &v1::UserNamespace) -> Result<Self, UserSpaceError> {
        let (pid, pidfd) = match sys::fork(libc::CLONE_NEWUSER, None)? {
            Fork::Parent(pid, pidfd) => (pid, pidfd),
            Fork::Child => loop {
                nix::unistd::pause();
            },
        };
        let made = || -> io::Result<OwnedFd> {
            fs::write(format!("/proc/{pid}/uid_map"), lines(&asked.uids))?;
            fs::write(format!("/proc/{pid}/gid_map"), lines(&asked.gids))?;
            Ok(fs::File::open(format!("/proc/{pid}/ns/user"))?.into())
        };
        let namespace = made();
        // The descriptor keeps the namespace from here on.
        sys::pidfd_signal(pidfd.as_fd(), libc::SIGKILL)?;
        Ok(Self { namespace: namespace?, uids: asked.uids.clone(), gids: asked.gids.clone() })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// The guest's numbers for an owner in a container.
    pub(crate) fn outside(&self, uid: u32, gid: u32) -> (u32, u32) {
        (outside(&self.uids, uid), outside(&self.gids, gid))
    }
}

/// user_namespaces(7): first number inside, first outside, how many.
fn lines(mappings: &[v1::IdMapping]) -> String {
    let line = |one: &v1::IdMapping| format!("{} {} {}\n", one.container_id, one.host_id, one.length);
    mappings.iter().map(line).collect()
}

fn outside(mappings: &[v1::IdMapping], inside: u32) -> u32 {
    let found = mappings.iter().find_map(|one| {
        let offset = inside.checked_sub(one.container_id).filter(|&offset| offset < one.length)?;
        one.host_id.checked_add(offset)
    });
    found.unwrap_or(NOBODY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_mapped_and_strangers_are_nobody() {
        let mappings = [
            v1::IdMapping { container_id: 0, host_id: 1000, length: 10 },
            v1::IdMapping { container_id: 100, host_id: u32::MAX, length: 2 },
        ];
        assert_eq!(
            [0, 9, 10, 99, 100, 101].map(|id| outside(&mappings, id)),
            [1000, 1009, NOBODY, NOBODY, u32::MAX, NOBODY]
        );
        assert_eq!(lines(&mappings[..1]), "0 1000 10\n");
    }
}
