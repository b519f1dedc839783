//! What is known of a node, and changing it.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, chownat, fchmod, fstatfs,
    ftruncate, makedev, utimensat,
};
use rustix::io::{Errno, Result};

use crate::abi::{Attr, AttrOut, EntryOut, SetattrIn, StatfsOut, change};
use crate::body::Body;
use crate::inode::{Node, status_of};
use crate::reply::Reply;
use crate::server::{Call, Server};

/// Set-user-ID, set-group-ID and execution by the group: with the last, the second is a privilege.
const SUID: u32 = 0o4000;
const SGID: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o010;
const PERMISSIONS: u32 = 0o7777;

/// In the guest's terms.
pub(crate) fn attr(status: &Statx) -> Attr {
    let seconds = |seconds: i64| seconds.cast_unsigned();
    Attr {
        ino: status.stx_ino,
        size: status.stx_size,
        blocks: status.stx_blocks,
        atime: seconds(status.stx_atime.tv_sec),
        mtime: seconds(status.stx_mtime.tv_sec),
        ctime: seconds(status.stx_ctime.tv_sec),
        atimensec: status.stx_atime.tv_nsec,
        mtimensec: status.stx_mtime.tv_nsec,
        ctimensec: status.stx_ctime.tv_nsec,
        mode: status.stx_mode.into(),
        nlink: status.stx_nlink,
        uid: status.stx_uid,
        gid: status.stx_gid,
        rdev: u32::try_from(makedev(status.stx_rdev_major, status.stx_rdev_minor)).unwrap_or(0),
        blksize: status.stx_blksize,
        flags: 0,
    }
}

/// A node the guest has found. It may keep neither name nor attributes: the host changes both as it likes.
pub(crate) fn entry(node: &Node, status: &Statx) -> EntryOut {
    EntryOut { nodeid: node.id, attr: attr(status), ..EntryOut::default() }
}

/// Takes from a file what execution as its owner or group would give, as a write by an ordinary user does.
pub(crate) fn kill_privileges(file: &OwnedFd) -> Result<()> {
    let mode = u32::from(status_of(file)?.stx_mode);
    let group = if mode & GROUP_EXECUTE != 0 { SGID } else { 0 };
    let lost = mode & (SUID | group);
    if lost == 0 { Ok(()) } else { fchmod(file, Mode::from_raw_mode(mode & PERMISSIONS & !lost)) }
}

impl Server {
    pub(crate) fn getattr(&self, call: &Call, reply: &mut Reply) -> Result<()> {
        self.put_attributes(&*self.nodes.get(call.node)?, reply)
    }

    fn put_attributes(&self, node: &Node, reply: &mut Reply) -> Result<()> {
        reply.put(&AttrOut { attr: attr(&node.status()?), ..AttrOut::default() });
        Ok(())
    }

    pub(crate) fn setattr(&self, call: &Call, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let asked: SetattrIn = body.take()?;
        let node = self.nodes.get(call.node)?;
        let has = |bit: u32| asked.valid & bit != 0;
        node.for_change()?;
        if has(change::MODE) {
            change_mode(&node, asked.mode & PERMISSIONS)?;
        }
        if has(change::UID | change::GID) {
            let uid = has(change::UID).then(|| Uid::from_raw(asked.uid));
            let gid = has(change::GID).then(|| Gid::from_raw(asked.gid));
            chownat(&node.path, c"", uid, gid, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if has(change::SIZE) {
            self.truncate(&node, &asked)?;
        }
        if has(change::ATIME | change::MTIME) {
            let time = |wanted, now, seconds: u64, nanoseconds: u32| Timespec {
                tv_sec: seconds.cast_signed(),
                tv_nsec: match (has(wanted), has(now)) {
                    (false, _) => UTIME_OMIT,
                    (true, true) => UTIME_NOW,
                    (true, false) => nanoseconds.into(),
                },
            };
            let times = Timestamps {
                last_access: time(change::ATIME, change::ATIME_NOW, asked.atime, asked.atimensec),
                last_modification: time(change::MTIME, change::MTIME_NOW, asked.mtime, asked.mtimensec),
            };
            utimensat(&node.path, c"", &times, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)?;
        }
        self.put_attributes(&node, reply)
    }

    fn truncate(&self, node: &Node, asked: &SetattrIn) -> Result<()> {
        let kills = asked.valid & change::KILL_SUIDGID != 0;
        let cut = |file: &OwnedFd| {
            ftruncate(file, asked.size)?;
            if kills { kill_privileges(file) } else { Ok(()) }
        };
        if asked.valid & change::FH != 0 {
            return cut(&self.handles.get(asked.fh)?.file);
        }
        cut(&node.open(OFlags::WRONLY)?)
    }

    pub(crate) fn statfs(&self, call: &Call, reply: &mut Reply) -> Result<()> {
        let found = fstatfs(&self.nodes.get(call.node)?.path)?;
        let small = |number: i64| u32::try_from(number).unwrap_or(u32::MAX);
        reply.put(&StatfsOut {
            blocks: found.f_blocks,
            bfree: found.f_bfree,
            bavail: found.f_bavail,
            files: found.f_files,
            ffree: found.f_ffree,
            bsize: small(found.f_bsize),
            namelen: small(found.f_namelen),
            frsize: small(found.f_frsize),
            ..StatfsOut::default()
        });
        Ok(())
    }
}

/// Of a node that is not open: fchmodat2(2), which Linux has since 6.6; before, a file or directory is opened for it.
fn change_mode(node: &Node, mode: u32) -> Result<()> {
    match fchmodat2(&node.path, mode) {
        Err(Errno::NOSYS) => fchmod(node.open(OFlags::RDONLY)?, Mode::from_raw_mode(mode)),
        done => done,
    }
}

#[expect(unsafe_code, reason = "fchmodat2 has no wrapper yet")]
fn fchmodat2(path: &OwnedFd, mode: u32) -> Result<()> {
    // SAFETY: an open descriptor, an empty C string and two integers (fchmodat2(2)).
    let done = unsafe {
        libc::syscall(libc::SYS_fchmodat2, path.as_fd().as_raw_fd(), c"".as_ptr(), mode, libc::AT_EMPTY_PATH)
    };
    if done == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}
