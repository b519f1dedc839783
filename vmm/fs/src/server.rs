//! From a message to its answer.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use rustix::io::{Errno, Result};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::abi::{self, InHeader, InitIn, InitOut, feature, opcode};
use crate::body::Body;
use crate::handle::Handles;
use crate::inode::Nodes;
use crate::lock::{MOST_WAITING, Owners, Waiting};
use crate::reply::{MESSAGE_BYTES, Reply};

/// Most data in one READ or WRITE.
pub(crate) const DATA_BYTES: usize = 128 << 10;

/// Requests that the guest sends without waiting for them (read-ahead, writing back), and at how many it slows down.
const MOST_BACKGROUND: u16 = 64;
const CONGESTED: u16 = 48;

/// What we ask for, of what the guest offers. Nothing is cached beyond what an attribute just fetched proves: no
/// writing back later, no keeping of names and attributes, since the host changes files at any time.
const FEATURES: u32 = feature::ASYNC_READ
    | feature::POSIX_LOCKS
    | feature::FLOCK_LOCKS
    | feature::BIG_WRITES
    | feature::AUTO_INVAL_DATA
    | feature::ASYNC_DIO
    | feature::PARALLEL_DIROPS
    | feature::HANDLE_KILLPRIV_V2
    | feature::INIT_EXT;
const FEATURES2: u32 = feature::ALLOW_IDMAP;

/// Who asks, about which node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) node: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// One guest's view of the shared directory. Several threads serve it.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) nodes: Nodes,
    pub(crate) handles: Handles,
    pub(crate) owners: Owners,
    /// To [`crate::lock::answer_waiting`].
    pub(crate) waits: SyncSender<Waiting>,
}

impl Server {
    /// Serves what is beneath `root`, opened with O_PATH. Also returns where requests arrive that wait for a lock.
    pub(crate) fn new(root: OwnedFd) -> Result<(Self, Receiver<Waiting>)> {
        let (waits, arrivals) = sync_channel(MOST_WAITING);
        let (handles, owners) = (Handles::default(), Owners::default());
        Ok((Self { nodes: Nodes::new(root)?, handles, owners, waits }, arrivals))
    }

    /// Lets go of volumes that are not mounted any more.
    pub(crate) fn drop_unmounted(&self) -> Result<()> {
        let shares = self.nodes.shares()?;
        self.handles.keep(&shares);
        self.nodes.keep(&shares);
        self.owners.keep(&self.nodes);
        Ok(())
    }

    /// Answers messages until the other end closes.
    pub(crate) fn serve(&self, socket: &OwnedFd) {
        let (mut message, mut reply) = (vec![0; MESSAGE_BYTES], Reply::default());
        loop {
            let length = match recv(socket, message.as_mut_slice(), RecvFlags::empty()) {
                Ok((0, _)) => return,
                Ok((length, _)) => length,
                Err(Errno::INTR) => continue,
                Err(_) => return,
            };
            let Some(answer) = self.answer(message.get(..length).unwrap_or_default(), &mut reply) else { continue };
            while let Err(error) = send(socket, answer, SendFlags::NOSIGNAL) {
                if error != Errno::INTR {
                    return;
                }
            }
        }
    }

    /// The answer to one message; `None` if nobody waits for one.
    pub(crate) fn answer<'r>(&self, message: &[u8], reply: &'r mut Reply) -> Option<&'r [u8]> {
        let mut body = Body(message);
        // The VMM has checked that there is a header.
        let header: InHeader = body.take().ok()?;
        let call = Call { node: header.nodeid, uid: header.uid, gid: header.gid };
        reply.clear();
        let outcome = match header.opcode {
            opcode::FORGET => return self.forget(&call, body).err().and(None),
            opcode::BATCH_FORGET => return self.forget_many(body).err().and(None),
            opcode::INTERRUPT => return None,
            opcode::SETLKW => match self.wait_for_lock(&call, body, header.unique) {
                Ok(false) => return None,
                done => done.map(drop),
            },
            other => self.carry_out(other, &call, body, reply),
        };
        Some(reply.finish(header.unique, outcome))
    }

    fn carry_out(&self, what: u32, call: &Call, body: Body<'_>, reply: &mut Reply) -> Result<()> {
        match what {
            opcode::INIT => self.init(body, reply),
            opcode::DESTROY => {
                self.forget_all();
                Ok(())
            }
            opcode::LOOKUP => self.lookup(call, body, reply),
            opcode::GETATTR => self.getattr(call, reply),
            opcode::SETATTR => self.setattr(call, body, reply),
            opcode::READLINK => self.readlink(call, reply),
            opcode::SYMLINK => self.symlink(call, body, reply),
            opcode::MKNOD => self.mknod(call, body, reply),
            opcode::MKDIR => self.mkdir(call, body, reply),
            opcode::UNLINK => self.unlink(call, body, false),
            opcode::RMDIR => self.unlink(call, body, true),
            opcode::RENAME => self.rename(call, body),
            opcode::RENAME2 => self.rename2(call, body),
            opcode::LINK => self.link(call, body, reply),
            opcode::CREATE => self.create(call, body, reply),
            opcode::OPEN | opcode::OPENDIR => self.open(call, body, reply),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(body),
            opcode::FLUSH => self.flush(call, body),
            opcode::GETLK => self.get_lock(call, body, reply),
            opcode::SETLK => self.set_lock(call, body),
            opcode::READ => self.read(body, reply),
            opcode::READDIR => self.readdir(body, reply),
            opcode::WRITE => self.write(body, reply),
            opcode::FSYNC | opcode::FSYNCDIR => self.fsync(body),
            opcode::FALLOCATE => self.fallocate(body),
            opcode::LSEEK => self.lseek(body, reply),
            opcode::COPY_FILE_RANGE => self.copy_range(body, reply),
            opcode::STATFS => self.statfs(call, reply),
            opcode::SETXATTR => self.setxattr(call, body),
            opcode::GETXATTR => self.getxattr(call, body, reply),
            opcode::LISTXATTR => self.listxattr(call, body, reply),
            opcode::REMOVEXATTR => self.removexattr(call, body),
            // The guest's kernel takes this for a feature that is not there, and does not ask again.
            _ => Err(Errno::NOSYS),
        }
    }

    /// A kernel mounts the directory: whatever an earlier one knew is void.
    fn init(&self, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let asked: InitIn = body.take()?;
        if asked.major != abi::VERSION {
            return Err(Errno::PROTO);
        }
        self.forget_all();
        reply.put(&InitOut {
            major: abi::VERSION,
            minor: abi::MINOR,
            max_readahead: asked.max_readahead,
            flags: FEATURES & asked.flags,
            flags2: FEATURES2 & asked.flags2,
            max_background: MOST_BACKGROUND,
            congestion_threshold: CONGESTED,
            max_write: u32::try_from(DATA_BYTES).unwrap_or(u32::MAX),
            time_gran: 1,
            ..InitOut::default()
        });
        Ok(())
    }

    fn forget_all(&self) {
        self.owners.clear();
        self.handles.clear();
        self.nodes.clear();
    }
}
