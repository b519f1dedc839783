//! A disk at work between two resets: from a chain of descriptors to its answer.

use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::Counters;
use super::disk::{Disk, Job};
use super::flight::{Flight, Flights, Ring};
use super::request::{Request, RequestError, status_offset, status_ok};
use crate::virtio::buffers::{Buffers, gather};
use crate::virtio::device::{ActiveQueue, DeviceError};
use crate::virtio::limit::Limit;
use crate::virtio::pace::Pace;
use crate::virtio::poller::{Poller, Wait};

/// Most requests taken before the driver hears of answers, and stop and questions are looked at again.
const BATCH: usize = 32;

pub(super) struct Service<'a, 'm> {
    pub(super) disk: &'a mut Disk,
    counters: &'a Counters,
    limit: &'a mut Limit,
    queues: Vec<Queue<'a>>,
    /// The queue whose turn it is.
    turn: usize,
    memory: &'m GuestMemoryMmap,
    flights: Flights<'m>,
    /// What the request at hand brings along.
    readable: Buffers<'m>,
    pace: Pace,
}

/// A queue of requests.
struct Queue<'a> {
    active: &'a mut ActiveQueue,
    /// There are answers that the driver has not been told of.
    answered: bool,
}

impl<'a, 'm> Service<'a, 'm> {
    pub(super) fn new(
        disk: &'a mut Disk,
        counters: &'a Counters,
        limit: &'a mut Limit,
        queues: Vec<&'a mut ActiveQueue>,
        memory: &'m GuestMemoryMmap,
        flights: Flights<'m>,
    ) -> Self {
        let (readable, pace) = (Buffers::new(memory), Pace::default());
        let queues = queues.into_iter().map(|active| Queue { active, answered: false }).collect();
        Self { disk, counters, limit, queues, turn: 0, memory, flights, readable, pace }
    }

    /// Has `poller` watch for what [`Service::serve`] is to be called for; the kicks are `kick` and the tokens after it.
    pub(super) fn watch(&self, poller: &Poller, landed: u64, kick: u64) -> Result<(), DeviceError> {
        for (token, queue) in (kick..).zip(&self.queues) {
            poller.add(&queue.active.kick, EventSet::IN, token)?;
        }
        self.flights.watched().map_or(Ok(()), |ring| poller.add(&ring, EventSet::IN, landed))?;
        Ok(())
    }

    /// The driver has notified a queue.
    pub(super) fn kicked(&self, queue: u64) {
        let queue = usize::try_from(queue).ok().and_then(|queue| self.queues.get(queue));
        drop(queue.map(|queue| queue.active.kick.read()));
    }

    /// Takes a batch of requests, and answers those and what has landed; tells whether there are more.
    pub(super) fn serve(&mut self) -> Result<Wait, DeviceError> {
        self.land()?;
        let (mut turns, mut lingers) = (0..BATCH, None);
        let mut wait = Wait::Poll;
        while wait == Wait::Poll && turns.next().is_some() {
            if let Some(millis) = self.limit.delay() {
                wait = Wait::Millis(millis);
            } else if let Some((queue, chain)) = self.next()? {
                self.take(queue, chain)?;
            } else {
                lingers = self.pace.lingers();
                if lingers.is_some() {
                    break;
                }
                // Looks again after asking for a notification: a request may have slipped in between (§2.7.10).
                let mut more = false;
                for queue in &mut self.queues {
                    more |= queue.active.queue.enable_notification(self.memory)?;
                }
                wait = if more { Wait::Poll } else { Wait::Block };
            }
        }
        self.flights.submit()?;
        self.tell()?;
        // Of those that come meanwhile the next round takes many together.
        self.pace.linger(lingers);
        Ok(wait)
    }

    /// Waits for all that is under way, and answers it.
    pub(super) fn settle(&mut self) -> Result<(), DeviceError> {
        while !self.flights.is_empty() {
            self.flights.wait()?;
            self.land()?;
        }
        self.tell()
    }

    /// Ends with nothing under way.
    pub(super) fn into_ring(self) -> Option<Ring> {
        self.flights.into_ring()
    }

    /// The next request of the first queue that has any, and which queue that is; each has its turn.
    fn next(&mut self) -> Result<Option<(usize, DescriptorChain<&'m GuestMemoryMmap>)>, DeviceError> {
        for number in (self.turn..self.queues.len()).chain(0..self.turn) {
            let Some(queue) = self.queues.get_mut(number) else { continue };
            if let Some(chain) = queue.active.pop(self.memory)? {
                self.turn = number.saturating_add(1);
                return Ok(Some((number, chain)));
            }
        }
        Ok(None)
    }

    /// Begins the request in a chain.
    fn take(&mut self, queue: usize, chain: DescriptorChain<&'m GuestMemoryMmap>) -> Result<(), DeviceError> {
        let head = chain.head_index();
        let mut writable = self.flights.buffers();
        self.readable.clear();
        gather(chain, &mut self.readable, &mut writable)?;
        status_offset(&writable)?;
        self.pace.take();
        self.counters.requests.add(1);
        let request = Request::parse(&self.readable, &writable, self.disk.capacity());
        let moves = request.as_ref().map_or((0, 0), Request::moves);
        self.limit.charge(moves.0.saturating_add(moves.1));
        let job = request.and_then(|request| self.disk.begin(request, &mut self.readable, &mut writable));
        let mut flight = Flight { queue, head, job: Job::Done, moves, writable };
        match job {
            Ok(job) => {
                flight.job = job;
                self.go_on(flight)
            }
            Err(error) => self.finish(flight, &Err(error)),
        }
    }

    fn go_on(&mut self, mut flight: Flight<'m>) -> Result<(), DeviceError> {
        match self.disk.advance(&mut flight.job, &mut flight.writable, self.flights.can_take()) {
            Ok(Some(operation)) => {
                self.counters.set_aside.add(1);
                Ok(self.flights.launch(flight, operation)?)
            }
            Ok(None) => self.finish(flight, &Ok(())),
            Err(error) => self.finish(flight, &Err(error)),
        }
    }

    /// Goes on with what has landed.
    fn land(&mut self) -> Result<(), DeviceError> {
        while let Some((mut flight, result)) = self.flights.landed() {
            match self.disk.arrived(&mut flight.job, result, &mut flight.writable) {
                Ok(()) => self.go_on(flight)?,
                Err(error) => self.finish(flight, &Err(error))?,
            }
        }
        Ok(())
    }

    /// Writes a request's status and gives its chain back.
    fn finish(&mut self, flight: Flight<'m>, result: &Result<(), RequestError>) -> Result<(), DeviceError> {
        let Flight { queue, head, moves: (filled, sent), mut writable, .. } = flight;
        let status_at = status_offset(&writable)?;
        let (status, filled) = match result {
            Ok(()) => {
                self.counters.read_bytes.add(u64::try_from(filled).unwrap_or(u64::MAX));
                self.counters.written_bytes.add(u64::try_from(sent).unwrap_or(u64::MAX));
                (status_ok(), filled)
            }
            Err(error) => {
                self.counters.errors.add(1);
                (error.status(), 0)
            }
        };
        writable.write_at(status_at, &[status]);
        // Only what was written from the first byte on counts (virtio 1.2 §2.7.8.2).
        let written = if filled == status_at { filled.saturating_add(1) } else { filled };
        if let Some(queue) = self.queues.get_mut(queue) {
            queue.active.complete(self.memory, head, written)?;
            queue.answered = true;
        }
        self.flights.done(writable);
        Ok(())
    }

    /// Tells the driver of answers.
    fn tell(&mut self) -> Result<(), DeviceError> {
        for queue in &mut self.queues {
            if std::mem::take(&mut queue.answered) {
                queue.active.signal_used(self.memory)?;
            }
        }
        Ok(())
    }
}
