//! Locks that processes of the guest hold on files, which are the host's own: they hold between containers, pods and
//! the host itself.
//!
//! A lock of flock(2) belongs to the open file. One of fcntl(2) belongs to a process, which the guest calls its owner:
//! each owner has a descriptor of its own of a node, by which the host tells owners apart (F_OFD_SETLK).
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::arithmetic_side_effects,
    clippy::panic
)]
#![expect(unsafe_code, reason = "F_OFD_SETLK and F_OFD_GETLK")]

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::{Errno, Result};
use rustix::net::{SendFlags, send};

use crate::abi::{FileLock, LK_FLOCK, LkIn};
use crate::body::Body;
use crate::handle::Handle;
use crate::inode::{Node, Nodes, lock};
use crate::reply::Reply;
use crate::server::{Call, Server};

/// Most owners of locks at a time, each of which holds a descriptor.
const MOST_OWNERS: usize = 50_000;

/// Most requests that wait for a lock.
pub(crate) const MOST_WAITING: usize = 256;

/// How long a request waits before it is answered with EINTR. virtio-fs has no way to say that a process is to be
/// killed, and as long as there is no answer it cannot be.
const PATIENCE: Duration = Duration::from_secs(5);

/// Between two looks whether a lock is free.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Descriptors of owners by node and owner.
#[derive(Debug, Default)]
pub(crate) struct Owners(Mutex<HashMap<(u64, u64), Arc<Handle>>>);

impl Owners {
    /// One of the owner's own, opened to write if it can be, which an exclusive lock needs; of a file without a name
    /// there is only the one that is open.
    fn get(&self, node: &Node, owner: u64, open: Arc<Handle>) -> Result<Arc<Handle>> {
        let key = (node.id, owner);
        if let Some(handle) = lock(&self.0).get(&key) {
            return Ok(Arc::clone(handle));
        }
        let opened = node.open(OFlags::RDWR).or_else(|_| node.open(OFlags::RDONLY));
        let handle = opened.map_or(open, |file| Arc::new(Handle::new(file, node.share)));
        let mut owners = lock(&self.0);
        if owners.len() >= MOST_OWNERS {
            return Err(Errno::NOLCK);
        }
        Ok(Arc::clone(owners.entry(key).or_insert(handle)))
    }

    /// Gives up all that an owner holds on a node, as any close by a process does.
    pub(crate) fn release(&self, node: u64, owner: u64) {
        let gone = lock(&self.0).remove(&(node, owner));
        if let Some(handle) = gone {
            let all = FileLock { start: 0, end: u64::MAX, kind: UNLOCK, pid: 0 };
            // Closing it does the same, unless it is the guest's own.
            let _ = record_lock(&handle.file, libc::F_OFD_SETLK, all);
        }
    }

    /// Gives up what is held in volumes that are not mounted any more.
    pub(crate) fn keep(&self, nodes: &Nodes) {
        let gone: Vec<_> = lock(&self.0).extract_if(|(node, _), _| nodes.get(*node).is_err()).collect();
        drop(gone);
    }

    pub(crate) fn clear(&self) {
        let gone = std::mem::take(&mut *lock(&self.0));
        drop(gone);
    }
}

const UNLOCK: u32 = libc::F_UNLCK.cast_unsigned();

/// A lock to be tried.
#[derive(Debug)]
enum Attempt {
    OfFile(Arc<Handle>, FlockOperation),
    OfRange(Arc<Handle>, FileLock),
}

impl Attempt {
    fn make(&self) -> Result<()> {
        match self {
            Self::OfFile(handle, operation) => flock(&handle.file, *operation),
            Self::OfRange(handle, range) => record_lock(&handle.file, libc::F_OFD_SETLK, *range).map(drop),
        }
    }
}

/// A request for a lock that somebody else holds.
#[derive(Debug)]
pub(crate) struct Waiting {
    unique: u64,
    attempt: Attempt,
    until: Instant,
}

impl Server {
    pub(crate) fn get_lock(&self, call: &Call, mut body: Body<'_>, reply: &mut Reply) -> Result<()> {
        let asked: LkIn = body.take()?;
        let (node, open) = (self.nodes.get(call.node)?, self.handles.get(asked.fh)?);
        let handle = self.owners.get(&node, asked.owner, open)?;
        reply.put(&record_lock(&handle.file, libc::F_OFD_GETLK, asked.lk)?);
        Ok(())
    }

    pub(crate) fn set_lock(&self, call: &Call, body: Body<'_>) -> Result<()> {
        self.attempt(call, body)?.make()
    }

    /// As [`Server::set_lock`], but waits if somebody else holds it: then false, and [`answer_waiting`] answers.
    pub(crate) fn wait_for_lock(&self, call: &Call, body: Body<'_>, unique: u64) -> Result<bool> {
        let attempt = self.attempt(call, body)?;
        match attempt.make() {
            Err(Errno::AGAIN | Errno::ACCESS) => {
                let until = Instant::now().checked_add(PATIENCE).ok_or(Errno::NOLCK)?;
                self.waits.try_send(Waiting { unique, attempt, until }).map_err(|_| Errno::NOLCK)?;
                Ok(false)
            }
            done => done.map(|()| true),
        }
    }

    fn attempt(&self, call: &Call, mut body: Body<'_>) -> Result<Attempt> {
        let asked: LkIn = body.take()?;
        let open = self.handles.get(asked.fh)?;
        if asked.lk_flags & LK_FLOCK != 0 {
            let operation = match i32::try_from(asked.lk.kind) {
                Ok(libc::F_RDLCK) => FlockOperation::NonBlockingLockShared,
                Ok(libc::F_WRLCK) => FlockOperation::NonBlockingLockExclusive,
                Ok(libc::F_UNLCK) => FlockOperation::NonBlockingUnlock,
                _ => return Err(Errno::INVAL),
            };
            return Ok(Attempt::OfFile(open, operation));
        }
        let handle = self.owners.get(&*self.nodes.get(call.node)?, asked.owner, open)?;
        Ok(Attempt::OfRange(handle, asked.lk))
    }
}

/// Answers requests that wait for a lock, until no server is left to send any.
pub(crate) fn answer_waiting(socket: &OwnedFd, arrivals: &Receiver<Waiting>) {
    let mut waiting: Vec<Waiting> = Vec::new();
    let mut reply = Reply::default();
    loop {
        let arrived = if waiting.is_empty() {
            arrivals.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            arrivals.recv_timeout(LOOK_AGAIN)
        };
        match arrived {
            Ok(request) => waiting.push(request),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        waiting.retain(|request| {
            let outcome = match request.attempt.make() {
                Err(Errno::AGAIN | Errno::ACCESS) if Instant::now() < request.until => return true,
                Err(Errno::AGAIN | Errno::ACCESS) => Err(Errno::INTR),
                done => done,
            };
            reply.clear();
            // If the VMM has gone, so has who waited.
            let _ = send(socket, reply.finish(request.unique, outcome), SendFlags::NOSIGNAL);
            false
        });
    }
}

/// fcntl(2) with a lock that belongs to the open file description; what it says of the lock.
fn record_lock(file: &OwnedFd, command: libc::c_int, asked: FileLock) -> Result<FileLock> {
    /// The last byte there can be: a lock up to there has no end.
    const LAST: u64 = i64::MAX.cast_unsigned();
    let start = i64::try_from(asked.start).map_err(|_| Errno::INVAL)?;
    let length = match asked.end {
        LAST.. => 0,
        end => {
            let length = end.checked_sub(asked.start).and_then(|length| length.checked_add(1));
            length.and_then(|length| i64::try_from(length).ok()).ok_or(Errno::INVAL)?
        }
    };
    let mut range = libc::flock {
        l_type: i16::try_from(asked.kind).map_err(|_| Errno::INVAL)?,
        l_whence: i16::try_from(libc::SEEK_SET).map_err(|_| Errno::INVAL)?,
        l_start: start,
        l_len: length,
        l_pid: 0,
    };
    // SAFETY: an open descriptor, and a structure that lives past the call (fcntl(2)).
    if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut range) } < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    let start = u64::try_from(range.l_start).map_err(|_| Errno::IO)?;
    let end = match u64::try_from(range.l_len).map_err(|_| Errno::IO)? {
        0 => LAST,
        length => start.saturating_add(length).saturating_sub(1),
    };
    let kind = u32::try_from(range.l_type).map_err(|_| Errno::IO)?;
    Ok(FileLock { start, end, kind, pid: 0 })
}
