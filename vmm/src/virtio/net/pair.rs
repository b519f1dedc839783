//! A pair of queues and its tap: packets to the guest and from it, in batches, in turn.

use std::fs::File;

use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::control::{Change, Control};
use super::late::Late;
use super::receive::Receiver;
use super::{BATCH, Counters, HEADER_BYTES, PACKET_BYTES, frame};
use crate::virtio::buffers::{Buffers, gather};
use crate::virtio::device::{ActiveQueue, DeviceError};
use crate::virtio::limit::SharedLimit;
use crate::virtio::pace::Pace;
use crate::virtio::poller::{Poller, Wait};

const STOP: u64 = 0;
const TAP: u64 = 1;
const RX_KICK: u64 = 2;
const TX_KICK: u64 = 3;
const CONTROL_KICK: u64 = 4;

pub(super) struct Pair<'m> {
    memory: &'m GuestMemoryMmap,
    receiver: Receiver<'m>,
    tx: &'m mut ActiveQueue,
    /// The pace of what is sent.
    pace: Pace,
    /// What the driver has not been told of it.
    late: Late,
    tap: &'m File,
    /// Of what is sent.
    limit: &'m SharedLimit,
    counters: &'m Counters,
    /// What the packet at hand consists of.
    readable: Buffers<'m>,
    writable: Buffers<'m>,
}

impl<'m> Pair<'m> {
    /// `merge`: the driver takes a packet in several chains.
    pub(super) fn new(
        memory: &'m GuestMemoryMmap,
        queues: &'m mut [ActiveQueue],
        tap: &'m File,
        [received, sent]: &'m [SharedLimit; 2],
        counters: &'m Counters,
        merge: bool,
    ) -> Result<Self, DeviceError> {
        let [rx, tx] = queues else {
            return Err(DeviceError::Driver("a network interface needs its two queues"));
        };
        let (receiver, readable, writable) =
            (Receiver::new(memory, rx, received, merge), Buffers::new(memory), Buffers::new(memory));
        Ok(Self {
            memory,
            receiver,
            tx,
            pace: Pace::default(),
            late: Late::default(),
            tap,
            limit: sent,
            counters,
            readable,
            writable,
        })
    }

    /// Serves both queues, and the control queue beside them, until one of `stops` is readable or the driver wants a change.
    pub(super) fn serve<'c>(
        mut self,
        stops: &[&EventFd],
        control: Option<&mut Control<'c>>,
    ) -> Result<Option<Change<'c>>, DeviceError> {
        let outcome = self.work(stops, control);
        self.receiver.give_back();
        outcome
    }

    fn work<'c>(
        &mut self,
        stops: &[&EventFd],
        mut control: Option<&mut Control<'c>>,
    ) -> Result<Option<Change<'c>>, DeviceError> {
        let mut poller = Poller::new()?;
        stops.iter().try_for_each(|stop| poller.add(*stop, EventSet::IN, STOP))?;
        poller.add(self.receiver.kick(), EventSet::IN, RX_KICK)?;
        poller.add(&self.tx.kick, EventSet::IN, TX_KICK)?;
        // Edge by edge: the receiver remembers that there is something, also while the guest has no room for it.
        poller.add(self.tap, EventSet::IN | EventSet::EDGE_TRIGGERED, TAP)?;
        if let Some(control) = &control {
            poller.add(control.kick(), EventSet::IN, CONTROL_KICK)?;
        }
        let (mut sending, mut commanded) = (Wait::Poll, true);
        loop {
            if std::mem::take(&mut commanded)
                && let Some(control) = &mut control
                && let Some(change) = control.serve()?
            {
                return Ok(Some(change));
            }
            let told = self.receiver.serve(self.tap, self.counters)? && self.receiver.vector() == self.tx.vector;
            self.late.end(self.tx, self.memory, told)?;
            if sending != Wait::Block {
                sending = self.send()?;
            }
            let wait = sending.sooner(self.receiver.wait()).sooner(self.late.patience());
            for (token, events) in poller.wait(wait)? {
                match token {
                    STOP => return Ok(None),
                    TAP => self.receiver.tap_is_ready(events),
                    RX_KICK => self.receiver.kicked(),
                    TX_KICK => {
                        let _count = self.tx.kick.read();
                        sending = Wait::Poll;
                    }
                    _ => commanded = true,
                }
            }
        }
    }

    /// Sends a batch of the guest's packets; says when there may be more.
    fn send(&mut self) -> Result<Wait, DeviceError> {
        let mut turns = 0..BATCH;
        let (mut packets, mut bytes, mut wait, mut lingers) = (0_usize, 0_usize, Wait::Poll, None);
        while wait == Wait::Poll && turns.next().is_some() {
            if let Some(millis) = self.limit.delay() {
                wait = Wait::Millis(millis);
                continue;
            }
            let Some(chain) = self.tx.pop(self.memory)? else {
                lingers = self.pace.lingers();
                if lingers.is_some() {
                    break;
                }
                let more = self.tx.queue.enable_notification(self.memory)?;
                wait = if more { Wait::Poll } else { Wait::Block };
                continue;
            };
            self.pace.take();
            let head = chain.head_index();
            self.readable.clear();
            self.writable.clear();
            gather(chain, &mut self.readable, &mut self.writable)?;
            self.transmit();
            self.tx.complete(self.memory, head, 0)?;
            (packets, bytes) = (packets.saturating_add(1), bytes.saturating_add(self.readable.len()));
        }
        self.late.tell(self.tx, self.memory, packets, bytes)?;
        self.pace.linger(lingers);
        Ok(wait)
    }

    /// Gives one packet to the tap. One that is malformed, or that the tap refuses, is dropped.
    fn transmit(&mut self) {
        let len = self.readable.len();
        self.limit.charge(frame(len));
        let sent = (HEADER_BYTES..=PACKET_BYTES).contains(&len) && self.readable.send(0..len, self.tap).is_ok();
        if sent {
            self.counters.sent_packets.add(1);
            self.counters.sent_bytes.add(u64::try_from(frame(len)).unwrap_or(u64::MAX));
        } else {
            self.counters.dropped_packets.add(1);
        }
    }
}
