//! One stream connection between a client on the host, or a sink, and the guest.
//!
//! ```text
//!  client said CONNECT          guest dialled a sink
//!          │                             │
//!     Requested ──RESPONSE──▶ Open ◀─────┘
//!          │                   │ we sent SHUTDOWN(both)       guest sent SHUTDOWN(both), we answer RST
//!          │                   ├──────────────▶ Closing                    │
//!          │ RST               │ RST               │ RST                   ▼
//!          └────────▶ gone ◀───┴───────────────────┘◀──client took all── Draining
//! ```
//!
//! It owns the client's socket and what that has not yet taken, at most what the guest was promised; it
//! never waits.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use nix::errno::Errno;
use vmm_sys_util::epoll::EventSet;

use super::burst::{BURST_BYTES, Burst};
use super::credit::Credit;
use super::packet::{Header, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::virtio::buffers::Buffers;

/// Bytes copied out of guest memory in one go when the client does not take them.
const CHUNK: usize = 4096;

/// What a connection is for on the host.
#[derive(Debug)]
pub(super) enum Endpoint {
    Client(UnixStream),
    /// The sink on the connection's host port.
    Sink,
}

/// See the module's picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Requested,
    Open,
    Closing,
    Draining,
}

/// The connection has to be reset.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Abort;

/// What a connection made of chains of the receive queue.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Produced {
    /// One packet or more.
    Packets,
    /// It has nothing to say after all.
    Nothing,
    /// The client broke off: the connection has to be reset.
    Abort,
}

/// Packets that are due to the guest, each at most once, whatever happens how often.
#[derive(Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: bool,
}

/// A connection. Its ports are the key it is kept under.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) endpoint: Endpoint,
    pub(super) phase: Phase,
    /// When the guest must have answered a REQUEST or a SHUTDOWN.
    pub(super) deadline: Option<Instant>,
    /// It stands in the line of those that have something to say.
    pub(super) queued: bool,
    /// The readiness that its epoll is asked for includes writing.
    pub(super) watches_output: bool,
    credit: Credit,
    due: Due,
    /// From the guest, not yet taken by the client.
    buffer: VecDeque<u8>,
    /// What the guest may still do; it says SHUTDOWN to give up either.
    guest_sends: bool,
    guest_receives: bool,
    /// What the client may still do.
    client_sends: bool,
    client_receives: bool,
    /// The client's socket may have something to read, as far as its epoll has told.
    readable: bool,
    /// The client's socket had more than there was room for when it was last read.
    flowing: bool,
    /// The client has closed one or both directions: reading on will find the end.
    ending: bool,
    /// Flags of the SHUTDOWNs that the guest has been sent.
    told_shutdown: u32,
    /// A CREDIT_REQUEST is sent once per drought.
    credit_asked: bool,
}

impl Connection {
    fn new(endpoint: Endpoint, phase: Phase, due: Due, promised: u32) -> Self {
        Self {
            endpoint,
            phase,
            deadline: None,
            queued: false,
            watches_output: false,
            credit: Credit::new(promised),
            due,
            buffer: VecDeque::new(),
            guest_sends: true,
            guest_receives: true,
            client_sends: true,
            client_receives: true,
            readable: false,
            flowing: false,
            ending: false,
            told_shutdown: 0,
            credit_asked: false,
        }
    }

    /// A client asks for a port of the guest, which is promised a buffer of so many bytes.
    pub(super) fn request(stream: UnixStream, promised: u32) -> Self {
        Self::new(Endpoint::Client(stream), Phase::Requested, Due { request: true, ..Due::default() }, promised)
    }

    /// The guest dialled a sink; it is promised a buffer of so many bytes.
    pub(super) fn accept_sink(header: &Header, promised: u32) -> Self {
        let due = Due { response: true, ..Due::default() };
        let mut connection = Self::new(Endpoint::Sink, Phase::Open, due, promised);
        // A fresh connection has sent nothing, so any credit but zero bytes read is a lie, and only hurts the liar.
        let _outcome = connection.credit.note(header);
        connection
    }

    /// Whether the guest knows of it: not before the REQUEST is sent, nor after it said that it is through.
    pub(super) fn known_to_guest(&self) -> bool {
        !self.due.request && self.phase != Phase::Draining
    }

    /// Takes the guest's credit, which every packet carries.
    pub(super) fn note_credit(&mut self, header: &Header) -> Result<(), Abort> {
        self.credit.note(header).map_err(|_| Abort)?;
        if self.credit.sendable() > 0 {
            self.credit_asked = false;
        }
        Ok(())
    }

    /// The guest accepted: tells the client.
    pub(super) fn accepted(&mut self, ports: Ports) {
        self.phase = Phase::Open;
        self.deadline = None;
        if let Endpoint::Client(stream) = &mut self.endpoint {
            // The socket's buffer is empty, so it takes the line whole, or the client is gone.
            let line = format!("OK {}\n", ports.host);
            if nix::unistd::write(stream, line.as_bytes()) != Ok(line.len()) {
                self.stop_receiving();
            }
        }
    }

    /// Takes data from the guest: as much as the client's socket does, the rest is kept.
    pub(super) fn take(&mut self, data: &mut Buffers<'_>, range: Range<usize>) -> Result<(), Abort> {
        self.count_received(range.len())?;
        let mut rest = range;
        if let Endpoint::Client(stream) = &self.endpoint
            && self.client_receives
            && self.buffer.is_empty()
            && !rest.is_empty()
        {
            match data.send(rest.clone(), stream) {
                Ok(count) => {
                    self.credit.forward(count);
                    rest.start = rest.start.saturating_add(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.stop_receiving(),
            }
        }
        if self.client_receives {
            self.keep(data, rest);
        } else {
            self.credit.forward(rest.len());
        }
        self.credit_due();
        Ok(())
    }

    /// Counts data that a sink has taken.
    pub(super) fn taken_by_sink(&mut self, len: usize) -> Result<(), Abort> {
        self.count_received(len)?;
        self.credit.forward(len);
        self.credit_due();
        Ok(())
    }

    fn count_received(&mut self, len: usize) -> Result<(), Abort> {
        if !self.guest_sends {
            return Err(Abort);
        }
        self.credit.receive(u32::try_from(len).map_err(|_| Abort)?).map_err(|_| Abort)
    }

    fn keep(&mut self, data: &Buffers<'_>, mut range: Range<usize>) {
        let mut bytes = [0; CHUNK];
        while !range.is_empty() {
            let chunk = bytes.get_mut(..range.len().min(CHUNK)).unwrap_or_default();
            data.read_at(range.start, chunk);
            self.buffer.extend(&*chunk);
            range.start = range.start.saturating_add(chunk.len());
        }
    }

    /// Gives the client what was kept for it.
    pub(super) fn flush(&mut self) {
        while let Endpoint::Client(stream) = &mut self.endpoint
            && !self.buffer.is_empty()
        {
            match nix::unistd::write(stream, self.buffer.as_slices().0) {
                Ok(0) => self.stop_receiving(),
                Ok(count) => {
                    self.buffer.drain(..count.min(self.buffer.len()));
                    self.credit.forward(count);
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(_) => self.stop_receiving(),
            }
        }
        if self.buffer.is_empty() {
            // Gives its memory back too: most connections never need any.
            self.buffer = VecDeque::new();
            self.end_output();
        }
        self.credit_due();
    }

    /// Tells the client that nothing more comes, once it has everything.
    fn end_output(&self) {
        if let Endpoint::Client(stream) = &self.endpoint
            && !self.guest_sends
            && self.buffer.is_empty()
        {
            // A client that is gone needs not be told.
            let _outcome = stream.shutdown(Shutdown::Write);
        }
    }

    fn credit_due(&mut self) {
        if self.phase != Phase::Draining && self.credit.update_due() {
            self.due.credit_update = true;
        }
    }

    /// The guest asks for our credit.
    pub(super) fn credit_requested(&mut self) {
        self.due.credit_update = true;
    }

    /// The client can take no more: what is kept for it goes, and the guest hears of it.
    fn stop_receiving(&mut self) {
        if self.client_receives {
            self.client_receives = false;
            self.credit.forward(self.buffer.len());
            self.buffer = VecDeque::new();
            self.due.shutdown = true;
        }
    }

    /// The guest gives up sending, receiving or both; returns whether that ends the connection on its side.
    pub(super) fn shut_down_by_guest(&mut self, flags: u32) -> bool {
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_sends = false;
            self.end_output();
        }
        if flags & SHUTDOWN_RECEIVE != 0 && self.guest_receives {
            self.guest_receives = false;
            if let Endpoint::Client(stream) = &self.endpoint {
                // The client's next write fails, as it should.
                let _outcome = stream.shutdown(Shutdown::Read);
            }
        }
        !self.guest_sends && !self.guest_receives
    }

    /// The guest is through with it; the client may still have something to take.
    pub(super) fn drain(&mut self) {
        self.phase = Phase::Draining;
        self.deadline = None;
        self.due = Due::default();
        self.guest_sends = false;
        self.guest_receives = false;
    }

    /// The guest said that it sends no more, in good order.
    pub(super) fn finished_sending(&self) -> bool {
        !self.guest_sends
    }

    /// Takes what the client's epoll tells.
    pub(super) fn ready(&mut self, events: EventSet) {
        self.readable |= events.contains(EventSet::IN);
        if events.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR) {
            self.ending = true;
            self.readable = true;
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            // Closed both ways: it takes nothing more; what it sent before is still read.
            self.stop_receiving();
        }
        if events.contains(EventSet::OUT) {
            self.flush();
        }
    }

    /// Whether the client's epoll has to tell when it takes data again.
    pub(super) fn wants_output(&self) -> bool {
        !self.buffer.is_empty()
    }

    fn wants_data(&self) -> bool {
        self.phase == Phase::Open && self.guest_receives && self.client_sends && self.readable
    }

    /// Whether there may be a packet for the guest.
    pub(super) fn has_packet(&self) -> bool {
        let due = &self.due;
        let control = due.request || due.response || due.credit_update || due.credit_request;
        match self.phase {
            Phase::Requested => due.request,
            Phase::Open => {
                control || due.shutdown || (self.wants_data() && (self.credit.sendable() > 0 || !self.credit_asked))
            }
            Phase::Closing => control,
            Phase::Draining => false,
        }
    }

    /// Whether it is likely to fill more than one chain.
    pub(super) fn is_flowing(&self) -> bool {
        self.flowing
    }

    /// Writes the next packets for the guest: one, but of a stream as many as there are chains.
    pub(super) fn produce(&mut self, ports: Ports, burst: &mut Burst<'_>) -> Produced {
        if self.due.request {
            self.due.request = false;
            return self.packet(ports, Op::Request, burst);
        }
        if self.due.response {
            self.due.response = false;
            return self.packet(ports, Op::Response, burst);
        }
        if self.wants_data() {
            if self.credit.sendable() > 0 {
                match self.data(ports, burst) {
                    Produced::Nothing => {}
                    other => return other,
                }
            } else if !self.credit_asked {
                self.credit_asked = true;
                self.due.credit_request = true;
            }
        }
        self.control(ports, burst)
    }

    fn control(&mut self, ports: Ports, burst: &mut Burst<'_>) -> Produced {
        if self.due.credit_request {
            self.due.credit_request = false;
            return self.packet(ports, Op::CreditRequest, burst);
        }
        if self.due.credit_update {
            return self.packet(ports, Op::CreditUpdate, burst);
        }
        if self.due.shutdown && self.phase == Phase::Open {
            self.due.shutdown = false;
            // What the guest does not want, the client does not send any more either.
            let sends = self.client_sends && self.guest_receives;
            let flags = if sends { 0 } else { SHUTDOWN_SEND } | if self.client_receives { 0 } else { SHUTDOWN_RECEIVE };
            if flags & !self.told_shutdown != 0 {
                self.told_shutdown |= flags;
                if self.told_shutdown == SHUTDOWN_BOTH {
                    self.phase = Phase::Closing;
                }
                let mut header = Header::new(ports, Op::Shutdown);
                header.flags = flags;
                return self.write(header, burst);
            }
        }
        Produced::Nothing
    }

    /// Reads from the client straight into the chains.
    fn data(&mut self, ports: Ports, burst: &mut Burst<'_>) -> Produced {
        let Endpoint::Client(stream) = &self.endpoint else { return Produced::Nothing };
        let credit = usize::try_from(self.credit.sendable()).unwrap_or(usize::MAX);
        let want = burst.payload().len().min(credit).min(BURST_BYTES);
        match burst.payload().receive(0..want, stream) {
            Ok(0) => {
                self.client_sends = false;
                self.due.shutdown = true;
                Produced::Nothing
            }
            Ok(count) => {
                // A stream that gave less than asked for is empty, unless it ends there (epoll(7), question 9).
                self.flowing = count == want;
                self.readable = self.flowing || self.ending;
                self.packets(ports, count, burst)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Produced::Nothing
            }
            Err(_) => Produced::Abort,
        }
    }

    /// Makes packets of so many bytes of payload, which are there already.
    fn packets(&mut self, ports: Ports, bytes: usize, burst: &mut Burst<'_>) -> Produced {
        let mut rest = bytes;
        while rest > 0
            && let Some(room) = burst.room()
        {
            let len = rest.min(room);
            rest = rest.saturating_sub(len);
            let mut header = Header::new(ports, Op::Data);
            header.len = u32::try_from(len).unwrap_or(u32::MAX);
            self.credit.send(header.len);
            self.write(header, burst);
        }
        Produced::Packets
    }

    fn packet(&mut self, ports: Ports, op: Op, burst: &mut Burst<'_>) -> Produced {
        self.write(Header::new(ports, op), burst)
    }

    fn write(&mut self, mut header: Header, burst: &mut Burst<'_>) -> Produced {
        // Every packet carries our credit, so none needs to follow for that alone.
        self.credit.stamp(&mut header);
        self.due.credit_update = false;
        burst.write(&header);
        Produced::Packets
    }

    /// Whether both sides are through with it.
    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Draining && self.buffer.is_empty()
    }
}
