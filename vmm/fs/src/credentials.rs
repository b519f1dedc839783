//! Who makes a file: the guest's process, by this thread's file system ids, so that the file is its from the first
//! moment and the host's rules on groups hold.
//!
//! Permissions are the guest kernel's business (virtio-fs mounts with `default_permissions`); giving up root's id would
//! take the capabilities away that let this process act for users it knows nothing of, so they are raised again.
#![expect(unsafe_code, reason = "setfsuid and setfsgid")]

use rustix::io::{Errno, Result};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

/// What ownership needs, and all that this process keeps.
pub(crate) const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID);

const ROOT: u32 = 0;

/// Takes every other capability from this thread and those it starts.
pub(crate) fn keep_few() -> Result<()> {
    raise(CAPABILITIES)
}

fn raise(set: CapabilitySet) -> Result<()> {
    set_capabilities(None, CapabilitySets { effective: set, permitted: set, inheritable: CapabilitySet::empty() })
}

/// This thread makes files as another user while it lives.
pub(crate) struct Acting(());

impl Acting {
    pub(crate) fn new(uid: u32, gid: u32) -> Result<Self> {
        // An id of -1 asks for the present one and would leave the file root's.
        if uid == u32::MAX || gid == u32::MAX {
            return Err(Errno::INVAL);
        }
        set(uid, gid);
        // Its destructor undoes the line above if this fails.
        let acting = Self(());
        if uid != ROOT {
            raise(CAPABILITIES)?;
        }
        Ok(acting)
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        set(ROOT, ROOT);
    }
}

fn set(uid: u32, gid: u32) {
    // SAFETY: each takes an integer, changes this thread alone, and if refused changes nothing (setfsuid(2)).
    unsafe {
        libc::syscall(libc::SYS_setfsgid, gid);
        libc::syscall(libc::SYS_setfsuid, uid);
    }
}
