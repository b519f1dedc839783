//! Names in directories: finding, removing and moving them. Making them is [`crate::create`]'s.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use rustix::fs::{AtFlags, RenameFlags, linkat, readlinkat, renameat_with, unlinkat};
use rustix::io::{Errno, Result};

use crate::abi::{BatchForgetIn, ForgetIn, ForgetOne, LinkIn, Rename2In, RenameIn};
use crate::attributes::entry;
use crate::body::Body;
use crate::reply::Reply;
use crate::server::{Call, Server};

impl Server {
    pub(crate) fn lookup(&self, call: &Call, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let name = body.name()?;
        let (node, status) = self.nodes.find(&self.nodes.directory(call.node)?, name)?;
        reply.put(&entry(&node, &status));
        Ok(())
    }

    pub(crate) fn forget(&self, call: &Call, mut body: Body<'_>) -> Result<()> {
        let asked: ForgetIn = body.take()?;
        self.nodes.forget(call.node, asked.nlookup);
        Ok(())
    }

    pub(crate) fn forget_many(&self, mut body: Body<'_>) -> Result<()> {
        let asked: BatchForgetIn = body.take()?;
        for _ in 0..asked.count {
            let one: ForgetOne = body.take()?;
            self.nodes.forget(one.nodeid, one.nlookup);
        }
        Ok(())
    }

    pub(crate) fn readlink(&self, call: &Call, reply: &mut Reply) -> Result<()> {
        let target = readlinkat(&self.nodes.get(call.node)?.path, c"", Vec::new())?;
        reply.put_bytes(target.as_bytes());
        Ok(())
    }

    pub(crate) fn unlink(&self, call: &Call, mut body: Body<'_>, directory: bool) -> Result<()> {
        let name = body.name()?;
        let parent = self.nodes.directory(call.node)?;
        unlinkat(&parent.for_change()?.path, name, if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() })
    }

    pub(crate) fn rename(&self, call: &Call, mut body: Body<'_>) -> Result<()> {
        let asked: RenameIn = body.take()?;
        self.rename_with(call, asked.newdir, RenameFlags::empty(), body)
    }

    pub(crate) fn rename2(&self, call: &Call, mut body: Body<'_>) -> Result<()> {
        let asked: Rename2In = body.take()?;
        let flags = RenameFlags::from_bits(asked.flags).ok_or(Errno::INVAL)?;
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Errno::INVAL);
        }
        self.rename_with(call, asked.newdir, flags, body)
    }

    fn rename_with(&self, call: &Call, new_parent: u64, flags: RenameFlags, mut body: Body<'_>) -> Result<()> {
        let (old_name, new_name) = (body.name()?, body.name()?);
        let (old, new) = (self.nodes.directory(call.node)?, self.nodes.directory(new_parent)?);
        renameat_with(&old.for_change()?.path, old_name, &new.for_change()?.path, new_name, flags)?;
        self.nodes.moved(&new, new_name);
        if flags.contains(RenameFlags::EXCHANGE) {
            self.nodes.moved(&old, old_name);
        }
        Ok(())
    }

    /// By name, like an open; what was linked by mistake is taken back.
    pub(crate) fn link(&self, call: &Call, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let asked: LinkIn = body.take()?;
        let name = body.name()?;
        let (node, parent) = (self.nodes.get(asked.oldnodeid)?, self.nodes.directory(call.node)?);
        let (old_parent, old_name) = node.place()?;
        linkat(&old_parent.path, &old_name, &parent.for_change()?.path, name, AtFlags::empty())?;
        let (found, status) = self.nodes.find(&parent, name)?;
        if found.id != node.id {
            self.nodes.forget(found.id, 1);
            unlinkat(&parent.path, name, AtFlags::empty())?;
            return Err(Errno::STALE);
        }
        reply.put(&entry(&found, &status));
        Ok(())
    }
}
