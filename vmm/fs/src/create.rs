//! Making files, directories, links and pipes, as the guest's process that asks for them.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::ffi::CStr;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, mkdirat, mknodat, openat, symlinkat};
use rustix::io::{Errno, Result};

use crate::abi::{CreateIn, MkdirIn, MknodIn, OpenOut};
use crate::attributes::entry;
use crate::body::Body;
use crate::credentials::Acting;
use crate::file::open_flags;
use crate::inode::{Key, Node, status_of};
use crate::reply::Reply;
use crate::server::{Call, Server};

impl Server {
    /// A directory in which something is to be made.
    fn place(&self, call: &Call) -> Result<Arc<Node>> {
        let parent = self.nodes.directory(call.node)?;
        parent.for_change()?;
        Ok(parent)
    }

    fn put_made(&self, parent: &Arc<Node>, name: &CStr, reply: &mut Reply) -> Result<()> {
        let (node, status) = self.nodes.find(parent, name)?;
        reply.put(&entry(&node, &status));
        Ok(())
    }

    pub(crate) fn mkdir(&self, call: &Call, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let asked: MkdirIn = body.take()?;
        let (name, parent) = (body.name()?, self.place(call)?);
        let acting = Acting::new(call.uid, call.gid)?;
        mkdirat(&parent.path, name, Mode::from_raw_mode(asked.mode))?;
        drop(acting);
        self.put_made(&parent, name, reply)
    }

    /// No device: what a device's number means is another thing on the host.
    pub(crate) fn mknod(&self, call: &Call, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let asked: MknodIn = body.take()?;
        let kind = FileType::from_raw_mode(asked.mode);
        if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
            return Err(Errno::PERM);
        }
        let (name, parent) = (body.name()?, self.place(call)?);
        let acting = Acting::new(call.uid, call.gid)?;
        mknodat(&parent.path, name, kind, Mode::from_raw_mode(asked.mode), 0)?;
        drop(acting);
        self.put_made(&parent, name, reply)
    }

    pub(crate) fn symlink(&self, call: &Call, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let (name, target) = (body.name()?, body.text()?);
        let parent = self.place(call)?;
        let acting = Acting::new(call.uid, call.gid)?;
        symlinkat(target, &parent.path, name)?;
        drop(acting);
        self.put_made(&parent, name, reply)
    }

    /// Makes a file and opens it. One that is there already was not when the guest looked, which has not checked
    /// whether the caller may open it: then the guest looks again.
    pub(crate) fn create(&self, call: &Call, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let asked: CreateIn = body.take()?;
        let (name, parent) = (body.name()?, self.place(call)?);
        let exclusive = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
        let acting = Acting::new(call.uid, call.gid)?;
        let file = openat(&parent.path, name, open_flags(asked.flags) | exclusive, Mode::from_raw_mode(asked.mode));
        drop(acting);
        let asked_new = OFlags::from_bits_retain(asked.flags).contains(OFlags::EXCL);
        let file = file.map_err(|error| if error == Errno::EXIST && !asked_new { Errno::STALE } else { error })?;
        let (node, status) = self.nodes.find(&parent, name)?;
        let opened = match Key::of(&status_of(&file)?) == Key::of(&status) {
            true => self.handles.add(file, node.share),
            false => Err(Errno::STALE),
        };
        let fh = opened.inspect_err(|_| self.nodes.forget(node.id, 1))?;
        reply.put(&entry(&node, &status));
        reply.put(&OpenOut { fh, ..OpenOut::default() });
        Ok(())
    }
}
