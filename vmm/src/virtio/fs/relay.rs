//! One driver's requests on their way to the server, and the answers on their way back.
//!
//! ```text
//! pop → copy, number → send ┐                 receive → copy into the chain that waits → complete
//!        no room: wait ◀────┘                  no such chain: its driver has gone
//! ```

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::as_conversions,
        clippy::arithmetic_side_effects,
        clippy::panic
    )
)]

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recvmsg, sendmsg};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::Fs;
use super::message::{ANSWER_HEADER, MESSAGE_BYTES, REQUEST_HEADER, failure, is_whole, number, set_number};
use crate::virtio::buffers::{Buffers, gather};
use crate::virtio::device::{Active, ActiveQueue, DeviceError};
use crate::virtio::poller::{Poller, Wait};

/// Most requests that wait for their answer. A driver that keeps to the rules never has more than its queues' entries.
const MOST_WAITING: usize = 256;

/// Most requests taken, and answers received, before stop is looked at again.
const BATCH: usize = 64;

const STOP: u64 = 0;
const SERVER: u64 = 1;
const FIRST_QUEUE: u64 = 2;

/// A request that the server has.
struct Waiting<'m> {
    queue: usize,
    head: u16,
    /// The number that the guest gave it.
    number: u64,
    answer: Buffers<'m>,
}

pub(super) struct Relay<'a> {
    fs: &'a mut Fs,
    memory: &'a GuestMemoryMmap,
    queues: &'a mut [ActiveQueue],
    waiting: BTreeMap<u64, Waiting<'a>>,
    readable: Buffers<'a>,
    outgoing: Vec<u8>,
    /// How much of `outgoing` the server had no room for.
    unsent: Option<usize>,
    incoming: Vec<u8>,
    /// The queues on which something was completed since the driver was last told.
    news: Vec<bool>,
}

impl<'a> Relay<'a> {
    pub(super) fn new(fs: &'a mut Fs, active: &'a mut Active) -> Result<Self, DeviceError> {
        if active.queues.len() < super::QUEUE_SIZES.len() {
            return Err(DeviceError::Driver("a shared directory needs its two queues"));
        }
        let memory = &*active.memory;
        let news = vec![false; active.queues.len()];
        Ok(Self {
            fs,
            memory,
            queues: &mut active.queues,
            waiting: BTreeMap::new(),
            readable: Buffers::new(memory),
            outgoing: vec![0; MESSAGE_BYTES],
            unsent: None,
            incoming: vec![0; MESSAGE_BYTES],
            news,
        })
    }

    /// Until `stop`; what waits then is the next driver's no more, and its answers are dropped.
    pub(super) fn serve(mut self, stop: &EventFd) -> Result<(), DeviceError> {
        let mut poller = Poller::new()?;
        poller.add(stop, EventSet::IN, STOP)?;
        for (token, queue) in (FIRST_QUEUE..).zip(self.queues.iter()) {
            poller.add(&queue.kick, EventSet::IN, token)?;
        }
        if let Some(server) = &self.fs.server {
            poller.add(server, EventSet::IN, SERVER)?;
        }
        loop {
            // First of all, for requests may have come before this thread watched for them.
            let more = self.take_all()?;
            self.tell()?;
            if let Some(server) = &self.fs.server {
                let room = if self.unsent.is_some() { EventSet::OUT } else { EventSet::empty() };
                poller.modify(server, EventSet::IN | room, SERVER)?;
            }
            for (token, _) in poller.wait(if more { Wait::Poll } else { Wait::Block })? {
                match token {
                    STOP => return Ok(()),
                    SERVER => self.receive()?,
                    _ => self.kicked(token),
                }
            }
        }
    }

    fn kicked(&self, token: u64) {
        let index = usize::try_from(token.saturating_sub(FIRST_QUEUE)).unwrap_or(usize::MAX);
        if let Some(queue) = self.queues.get(index) {
            let _count = queue.kick.read();
        }
    }

    /// Takes a batch from each queue; whether there is more that can be taken now.
    fn take_all(&mut self) -> Result<bool, DeviceError> {
        self.flush()?;
        let mut more = false;
        for index in 0..self.queues.len() {
            let mut turns = 0..BATCH;
            let mut rest = true;
            while rest && turns.next().is_some() {
                rest = self.take(index)?;
            }
            more |= rest;
        }
        Ok(more)
    }

    /// Takes one request; whether there may be another.
    fn take(&mut self, index: usize) -> Result<bool, DeviceError> {
        // The server's next word, or its room, goes on with it.
        if self.unsent.is_some() || self.waiting.len() >= MOST_WAITING {
            return Ok(false);
        }
        let Some(queue) = self.queues.get_mut(index).filter(|queue| queue.queue.ready()) else { return Ok(false) };
        let Some(chain) = queue.pop(self.memory)? else {
            // Looks again after asking for a notification: a request may have slipped in between (§2.7.10).
            return Ok(queue.queue.enable_notification(self.memory)?);
        };
        let head = chain.head_index();
        let mut answer = Buffers::empty(self.memory);
        self.readable.clear();
        gather(chain, &mut self.readable, &mut answer)?;
        self.forward(Waiting { queue: index, head, number: 0, answer })?;
        Ok(true)
    }

    /// Sends the request in `readable` to the server.
    fn forward(&mut self, mut request: Waiting<'a>) -> Result<(), DeviceError> {
        let length = self.readable.len();
        let message = self.outgoing.get_mut(..length).unwrap_or_default();
        self.readable.read_at(0, message);
        request.number = number(message);
        if !is_whole(message, REQUEST_HEADER) {
            self.fs.counters.refused.add(1);
            return self.fail(request, libc::EINVAL);
        }
        if self.fs.server.is_none() {
            return self.fail(request, libc::EIO);
        }
        let id = self.fs.next_id;
        self.fs.next_id = id.wrapping_add(1);
        set_number(message, id);
        self.fs.counters.requests.add(1);
        self.fs.counters.from_guest_bytes.add(u64::try_from(length).unwrap_or(u64::MAX));
        if request.answer.is_empty() {
            // FORGET and its like: nobody answers them.
            self.complete(request.queue, request.head, 0)?;
        } else {
            self.waiting.insert(id, request);
        }
        self.unsent = Some(length);
        self.flush()
    }

    /// Sends what the server had no room for.
    fn flush(&mut self) -> Result<(), DeviceError> {
        let (Some(length), Some(server)) = (self.unsent, &self.fs.server) else { return Ok(()) };
        let message = self.outgoing.get(..length).unwrap_or_default();
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        match sendmsg::<()>(server.as_raw_fd(), &[IoSlice::new(message)], &[], flags, None) {
            Ok(_) => self.unsent = None,
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(error) => return self.lose(&format!("sending to the server: {error}")),
        }
        Ok(())
    }

    /// Takes the server's answers.
    fn receive(&mut self) -> Result<(), DeviceError> {
        for _ in 0..BATCH {
            let Some(server) = &self.fs.server else { return Ok(()) };
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
            let mut parts = [IoSliceMut::new(&mut self.incoming)];
            match recvmsg::<()>(server.as_raw_fd(), &mut parts, None, flags).map(|packet| packet.bytes) {
                Ok(0) => return self.lose("the server has ended"),
                Ok(length) => self.answer(length)?,
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
                Err(error) => return self.lose(&format!("receiving from the server: {error}")),
            }
        }
        Ok(())
    }

    /// Gives the guest the answer that is in `incoming`.
    fn answer(&mut self, length: usize) -> Result<(), DeviceError> {
        // With MSG_TRUNC the length is that of the packet, which may be longer than the buffer.
        let message = self.incoming.get_mut(..length).unwrap_or_default();
        if !is_whole(message, ANSWER_HEADER) {
            return self.lose("the server's answer has no true header");
        }
        let Some(mut request) = self.waiting.remove(&number(message)) else { return Ok(()) };
        set_number(message, request.number);
        if length > request.answer.len() {
            self.fs.counters.failed.add(1);
            return self.fail(request, libc::EIO);
        }
        request.answer.write_at(0, message);
        self.fs.counters.to_guest_bytes.add(u64::try_from(length).unwrap_or(u64::MAX));
        self.complete(request.queue, request.head, length)
    }

    /// The server is no more: all that waits for it fails, and all that comes.
    fn lose(&mut self, why: &str) -> Result<(), DeviceError> {
        self.fs.hang_up(why);
        self.unsent = None;
        while let Some((_, request)) = self.waiting.pop_first() {
            self.fail(request, libc::EIO)?;
        }
        self.tell()
    }

    /// Answers a request in the server's place.
    fn fail(&mut self, mut request: Waiting<'a>, errno: i32) -> Result<(), DeviceError> {
        self.fs.counters.failed.add(1);
        let written = request.answer.write_at(0, &failure(request.number, errno));
        self.complete(request.queue, request.head, if written { ANSWER_HEADER } else { 0 })
    }

    fn complete(&mut self, index: usize, head: u16, written: usize) -> Result<(), DeviceError> {
        if let (Some(queue), Some(news)) = (self.queues.get_mut(index), self.news.get_mut(index)) {
            queue.complete(self.memory, head, written)?;
            *news = true;
        }
        Ok(())
    }

    /// Tells the driver of what is complete.
    fn tell(&mut self) -> Result<(), DeviceError> {
        for (queue, news) in self.queues.iter_mut().zip(&mut self.news) {
            if std::mem::take(news) {
                queue.signal_used(self.memory)?;
            }
        }
        Ok(())
    }
}
