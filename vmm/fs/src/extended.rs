//! Extended attributes, of files and directories alone: to others no descriptor leads but by /proc.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use rustix::fs::{
    OFlags, XattrFlags, fgetxattr, fgetxattr_query, flistxattr, flistxattr_query, fremovexattr, fsetxattr,
};
use rustix::io::{Errno, Result};

use crate::abi::{GetxattrIn, GetxattrOut, SetxattrIn};
use crate::body::Body;
use crate::reply::Reply;
use crate::server::{Call, DATA_BYTES, Server};

impl Server {
    pub(crate) fn setxattr(&self, call: &Call, mut body: Body<'_>) -> Result<()> {
        let asked: SetxattrIn = body.take()?;
        let name = body.text()?;
        let flags = XattrFlags::from_bits(asked.flags).ok_or(Errno::INVAL)?;
        if u32::try_from(body.0.len()) != Ok(asked.size) {
            return Err(Errno::INVAL);
        }
        let node = self.nodes.get(call.node)?;
        fsetxattr(node.for_change()?.open(OFlags::RDONLY)?, name, body.0, flags)
    }

    pub(crate) fn getxattr(&self, call: &Call, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let asked: GetxattrIn = body.take()?;
        let name = body.text()?;
        let file = self.nodes.get(call.node)?.open(OFlags::RDONLY)?;
        put_value(asked.size, reply, || fgetxattr_query(&file, name), |buffer| fgetxattr(&file, name, buffer))
    }

    pub(crate) fn listxattr(&self, call: &Call, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let asked: GetxattrIn = body.take()?;
        let file = self.nodes.get(call.node)?.open(OFlags::RDONLY)?;
        put_value(asked.size, reply, || flistxattr_query(&file), |buffer| flistxattr(&file, buffer))
    }

    pub(crate) fn removexattr(&self, call: &Call, mut body: Body<'_>) -> Result<()> {
        let name = body.text()?;
        let node = self.nodes.get(call.node)?;
        fremovexattr(node.for_change()?.open(OFlags::RDONLY)?, name)
    }
}

/// The bytes if the guest has room for them, their count if it asks for no more.
fn put_value(
    size: u32,
    reply: &mut Reply,
    count: impl FnOnce() -> Result<usize>,
    read: impl FnOnce(&mut [u8]) -> Result<usize>,
) -> Result<()> {
    if size == 0 {
        let size = u32::try_from(count()?).map_err(|_| Errno::TOOBIG)?;
        reply.put(&GetxattrOut { size, padding: 0 });
        return Ok(());
    }
    let size = usize::try_from(size).ok().filter(|size| *size <= DATA_BYTES).ok_or(Errno::TOOBIG)?;
    reply.fill(size, read)
}
