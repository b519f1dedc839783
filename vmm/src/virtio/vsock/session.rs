//! The vsock device while a driver uses it: every connection, and the queues that serve them.
//!
//! The guest's packets are taken as long as each answer they call for has a place to wait; then the queue rests until
//! the guest has taken answers (virtio 1.2 §5.10.6.2). Connections that have something for the guest stand in line
//! and say one packet each in turn, or one burst of a stream.

use std::io;
use std::mem;
use std::time::{Duration, Instant};

use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_control::READY_PORT;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::burst::Burst;
use super::connection::{Connection, Endpoint, Phase, Produced};
use super::handshake::{Handshake, Progress};
use super::packet::{BadHeader, HEADER_BYTES, Header, Op, PORT_ANY, Ports, low_half};
use super::table::Table;
use super::{Question, Vsock};
use crate::virtio::buffers::{Buffers, gather};
use crate::virtio::device::{Active, ActiveQueue, DeviceError};
use crate::virtio::pace::{Pace, Way};
use crate::virtio::poller::{Poller, Wait};

/// Most resets waiting for the guest before its packets are left in their queue.
const RESETS: usize = 256;

/// Most packets from the guest, bursts for it, or clients accepted, before everything else has its turn.
const BATCH: usize = 64;

/// Pause before clients are accepted again after the host ran out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

// Tokens of what is not a connection: no connection has host port 0.
const STOP: u64 = 0;
const INBOX: u64 = 1;
const LISTENER: u64 = 2;
const RX_KICK: u64 = 3;
const TX_KICK: u64 = 4;

/// The client's events, edge by edge: what is ready is remembered in the connection, so that one that cannot go on
/// for want of credit or room does not wake the thread again and again.
const CLIENT_EVENTS: EventSet = EventSet::IN.union(EventSet::READ_HANG_UP).union(EventSet::EDGE_TRIGGERED);

pub(super) struct Session<'a> {
    device: &'a mut Vsock,
    memory: &'a GuestMemoryMmap,
    rx: &'a mut ActiveQueue,
    tx: &'a mut ActiveQueue,
    /// The guest's packet.
    readable: Buffers<'a>,
    writable: Buffers<'a>,
    /// Packets for the guest.
    burst: Burst<'a>,
    poller: Poller,
    table: Table,
    /// The agent has dialled, so clients may come.
    agent_ready: bool,
    /// The listener is watched.
    listening: bool,
    /// No client is accepted before.
    accept_again: Option<Instant>,
    /// The guest's packets wait to be looked at.
    tx_pending: bool,
    /// The pace of the guest's packets.
    tx_pace: Pace,
    /// The guest has no room for packets, and will say when it has.
    rx_starved: bool,
}

fn token(ports: Ports) -> u64 {
    u64::from(ports.host) << 32 | u64::from(ports.guest)
}

fn ports(token: u64) -> Ports {
    Ports { host: low_half(token >> 32), guest: low_half(token) }
}

/// The token of a client before its guest port is known.
fn handshake_ports(host: u32) -> Ports {
    Ports { host, guest: PORT_ANY }
}

impl<'a> Session<'a> {
    pub(super) fn new(device: &'a mut Vsock, active: &'a mut Active, stop: &'a EventFd) -> Result<Self, DeviceError> {
        let memory = &*active.memory;
        let [rx, tx, ..] = active.queues.as_mut_slice() else {
            return Err(DeviceError::Driver("vsock needs its three queues"));
        };
        let table = Table::new(device.patience);
        let poller = Poller::new()?;
        poller.add(stop, EventSet::IN, STOP)?;
        poller.add(&device.inbox, EventSet::IN, INBOX)?;
        poller.add(&rx.kick, EventSet::IN, RX_KICK)?;
        poller.add(&tx.kick, EventSet::IN, TX_KICK)?;
        Ok(Self {
            device,
            memory,
            rx,
            tx,
            readable: Buffers::new(memory),
            writable: Buffers::empty(memory),
            burst: Burst::new(memory),
            poller,
            table,
            agent_ready: false,
            listening: false,
            accept_again: None,
            // Packets may have come before this thread watched for them.
            tx_pending: true,
            tx_pace: Pace::default(),
            rx_starved: false,
        })
    }

    pub(super) fn serve(mut self) -> Result<(), DeviceError> {
        loop {
            let lingers = self.serve_tx()?;
            self.serve_rx()?;
            self.watch_listener()?;
            self.tx_pace.linger(lingers);
            for (token, events) in self.poller.wait(self.patience())? {
                match token {
                    STOP => return Ok(()),
                    INBOX => self.answer(),
                    LISTENER => self.accept()?,
                    RX_KICK => {
                        let _count = self.rx.kick.read();
                        self.rx_starved = false;
                    }
                    TX_KICK => {
                        let _count = self.tx.kick.read();
                        self.tx_pending = true;
                    }
                    client => self.client(ports(client), events)?,
                }
            }
            self.expire(Instant::now())?;
        }
    }

    /// How long the thread may sleep.
    fn patience(&self) -> Wait {
        let tx = self.tx_pending && self.table.resets.len() < RESETS;
        let rx = !self.rx_starved && self.table.has_packets();
        if tx || rx {
            return Wait::Poll;
        }
        let deadline = self.table.deadlines.waiting.front().map(|(at, _)| *at);
        match deadline.into_iter().chain(self.accept_again).min() {
            None => Wait::Block,
            Some(at) => {
                // Rounded up, so that the deadline has passed when the wait ends.
                let millis = at.saturating_duration_since(Instant::now()).as_millis().saturating_add(1);
                Wait::Millis(u16::try_from(millis).unwrap_or(u16::MAX))
            }
        }
    }

    fn answer(&mut self) {
        let Self { device, table, .. } = self;
        let Vsock { inbox, sinks, .. } = &mut **device;
        inbox.answer_all(|question| match question {
            Question::Set(port, file) => sinks.set(port, file),
            Question::Remove(port) => {
                sinks.remove(port)?;
                table.reset_all(port);
                Ok(())
            }
        });
    }

    // Clients.

    fn watch_listener(&mut self) -> io::Result<()> {
        let wanted = self.agent_ready && self.accept_again.is_none() && self.table.has_room();
        if wanted != self.listening {
            if wanted {
                self.poller.add(&self.device.listener, EventSet::IN, LISTENER)?;
            } else {
                self.poller.remove(&self.device.listener)?;
            }
            self.listening = wanted;
        }
        Ok(())
    }

    fn accept(&mut self) -> io::Result<()> {
        let mut turns = 0..BATCH;
        while turns.next().is_some() && self.table.has_room() {
            match self.device.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    let host = self.table.new_port();
                    self.poller.add(&stream, EventSet::IN, token(handshake_ports(host)))?;
                    self.table.deadlines.set(handshake_ports(host));
                    self.table.handshakes.insert(host, Handshake::new(stream));
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => break,
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => {
                        self.accept_again = Some(Instant::now().checked_add(ACCEPT_PAUSE).unwrap_or_else(Instant::now));
                        break;
                    }
                },
            }
        }
        Ok(())
    }

    fn client(&mut self, ports: Ports, events: EventSet) -> io::Result<()> {
        if ports.guest == PORT_ANY {
            return self.handshake(ports.host);
        }
        if let Some(connection) = self.table.connections.get_mut(&ports) {
            connection.ready(events);
            self.settle(ports)?;
        }
        Ok(())
    }

    fn handshake(&mut self, host: u32) -> io::Result<()> {
        let Some(handshake) = self.table.handshakes.get_mut(&host) else { return Ok(()) };
        match handshake.advance() {
            Progress::Waiting => {}
            Progress::Refused => {
                self.device.counters.refused.add(1);
                self.table.handshakes.remove(&host);
            }
            Progress::Port(guest) => {
                if let Some(handshake) = self.table.handshakes.remove(&host) {
                    let ports = Ports { host, guest };
                    self.poller.modify(&handshake.stream, CLIENT_EVENTS, token(ports))?;
                    let mut connection = Connection::request(handshake.stream, self.table.promise());
                    connection.deadline = Some(self.table.deadlines.set(ports));
                    self.table.connections.insert(ports, connection);
                    self.device.counters.connections.add(1);
                    self.settle(ports)?;
                }
            }
        }
        Ok(())
    }

    /// Brings the tables in line with what a connection has become.
    fn settle(&mut self, ports: Ports) -> io::Result<()> {
        let Some(connection) = self.table.connections.get_mut(&ports) else { return Ok(()) };
        if connection.is_over() {
            drop(self.remove(ports));
            return Ok(());
        }
        if let Endpoint::Client(stream) = &connection.endpoint
            && connection.wants_output() != connection.watches_output
        {
            connection.watches_output = connection.wants_output();
            let more = if connection.watches_output { EventSet::OUT } else { EventSet::empty() };
            self.poller.modify(stream, CLIENT_EVENTS | more, token(ports))?;
        }
        if connection.phase == Phase::Closing && connection.deadline.is_none() {
            connection.deadline = Some(self.table.deadlines.set(ports));
        }
        if connection.has_packet() && !mem::replace(&mut connection.queued, true) {
            self.table.line.push_back(ports);
        }
        Ok(())
    }

    fn expire(&mut self, now: Instant) -> io::Result<()> {
        if self.accept_again.is_some_and(|at| at <= now) {
            self.accept_again = None;
        }
        while let Some((at, ports)) = self.table.deadlines.waiting.pop_front_if(|(at, _)| *at <= now) {
            if ports.guest == PORT_ANY {
                if self.table.handshakes.remove(&ports.host).is_some() {
                    self.device.counters.refused.add(1);
                }
            } else if self.table.connections.get(&ports).is_some_and(|found| found.deadline == Some(at)) {
                self.abort(ports);
            }
        }
        Ok(())
    }

    /// Ends a connection at once, for the client and for the guest.
    fn abort(&mut self, ports: Ports) {
        if let Some(connection) = self.remove(ports) {
            self.device.counters.resets.add(1);
            if connection.known_to_guest() {
                self.table.resets.push_back(ports);
            }
        }
    }

    fn remove(&mut self, ports: Ports) -> Option<Connection> {
        let connection = self.table.connections.remove(&ports)?;
        if connection.queued {
            self.table.line.retain(|waiting| *waiting != ports);
        }
        if matches!(connection.endpoint, Endpoint::Sink)
            && let Some(sink) = self.device.sinks.get_mut(ports.host)
        {
            sink.closed();
        }
        Some(connection)
    }

    // From the guest.

    /// Takes a batch of packets; says how to let more come before looking again, if that is worth while.
    fn serve_tx(&mut self) -> Result<Option<Way>, DeviceError> {
        let mut turns = 0..BATCH;
        let (mut used, mut lingers) = (false, None);
        while self.tx_pending && self.table.resets.len() < RESETS && turns.next().is_some() {
            let Some(chain) = self.tx.pop(self.memory)? else {
                lingers = self.tx_pace.lingers();
                if lingers.is_some() {
                    break;
                }
                self.tx_pending = self.tx.queue.enable_notification(self.memory)?;
                continue;
            };
            let head = chain.head_index();
            self.readable.clear();
            self.writable.clear();
            gather(chain, &mut self.readable, &mut self.writable)?;
            self.packet()?;
            self.tx.complete(self.memory, head, 0)?;
            self.tx_pace.take();
            used = true;
        }
        if used {
            self.tx.signal_used(self.memory)?;
        }
        Ok(lingers)
    }

    /// Takes the packet in `readable`.
    fn packet(&mut self) -> Result<(), DeviceError> {
        let mut bytes = [0; HEADER_BYTES];
        if !self.readable.read_at(0, &mut bytes) {
            return Err(DeviceError::Driver("a vsock packet is shorter than its header"));
        }
        match Header::decode(&bytes) {
            Ok(header) => Ok(self.dispatch(&header)?),
            Err(BadHeader::Address | BadHeader::Type(_, Some(Op::Reset))) => Ok(()),
            Err(BadHeader::Type(ports, _)) => {
                self.table.resets.push_back(ports);
                Ok(())
            }
        }
    }

    fn dispatch(&mut self, header: &Header) -> io::Result<()> {
        let ports = header.ports;
        match self.table.connections.get(&ports).map(|connection| connection.phase) {
            Some(Phase::Requested | Phase::Open | Phase::Closing) => {
                if self.known(header) {
                    self.settle(ports)
                } else {
                    self.abort(ports);
                    Ok(())
                }
            }
            Some(Phase::Draining) | None => self.unknown(header),
        }
    }

    /// A packet of no connection.
    fn unknown(&mut self, header: &Header) -> io::Result<()> {
        let ports = header.ports;
        match header.op {
            // A reset is never answered by one.
            Some(Op::Reset) => return Ok(()),
            Some(Op::Request) if ports.host == READY_PORT => self.agent_dialled(),
            Some(Op::Request) if self.table.has_room() && !self.table.connections.contains_key(&ports) => {
                if let Some(sink) = self.device.sinks.get_mut(ports.host) {
                    sink.opened();
                    self.table.connections.insert(ports, Connection::accept_sink(header, self.table.promise()));
                    self.device.counters.connections.add(1);
                    return self.settle(ports);
                }
            }
            _ => {}
        }
        self.table.resets.push_back(ports);
        Ok(())
    }

    fn agent_dialled(&mut self) {
        if !mem::replace(&mut self.agent_ready, true) {
            (self.device.ready)();
        }
    }

    /// A packet of a connection; `false` if it breaks the rules.
    fn known(&mut self, header: &Header) -> bool {
        let ports = header.ports;
        let Some(connection) = self.table.connections.get_mut(&ports) else { return true };
        if header.op != Some(Op::Reset) && connection.note_credit(header).is_err() {
            return false;
        }
        match header.op {
            Some(Op::Response) if connection.phase == Phase::Requested && connection.known_to_guest() => {
                connection.accepted(ports);
                true
            }
            Some(Op::Reset) => {
                self.reset_by_guest(ports);
                true
            }
            _ if connection.phase == Phase::Requested => false,
            Some(Op::Data) => self.data(header),
            Some(Op::CreditUpdate) => true,
            Some(Op::CreditRequest) => {
                connection.credit_requested();
                true
            }
            Some(Op::Shutdown) => {
                if connection.shut_down_by_guest(header.flags) {
                    // The answer to a complete shutdown (virtio 1.2 §5.10.6.5).
                    self.table.resets.push_back(ports);
                    connection.drain();
                }
                true
            }
            Some(Op::Request | Op::Response) | None => false,
        }
    }

    fn data(&mut self, header: &Header) -> bool {
        let Some(connection) = self.table.connections.get_mut(&header.ports) else { return true };
        let len = usize::try_from(header.len).unwrap_or(usize::MAX);
        let range = HEADER_BYTES..HEADER_BYTES.saturating_add(len);
        if range.end > self.readable.len() {
            return false;
        }
        self.device.counters.from_guest_bytes.add(u64::from(header.len));
        match &connection.endpoint {
            Endpoint::Client(_) => connection.take(&mut self.readable, range).is_ok(),
            Endpoint::Sink => {
                if connection.taken_by_sink(len).is_err() {
                    return false;
                }
                if let Some(sink) = self.device.sinks.get_mut(header.ports.host) {
                    let dropped = sink.append(&mut self.readable, range);
                    self.device.counters.sink_dropped_bytes.add(u64::try_from(dropped).unwrap_or(u64::MAX));
                }
                true
            }
        }
    }

    fn reset_by_guest(&mut self, ports: Ports) {
        let Some(connection) = self.table.connections.get_mut(&ports) else { return };
        if connection.finished_sending() {
            connection.drain();
        } else if let Some(connection) = self.remove(ports)
            && connection.phase == Phase::Requested
        {
            self.device.counters.refused.add(1);
        }
    }

    // To the guest.

    fn serve_rx(&mut self) -> Result<(), DeviceError> {
        let mut turns = 0..BATCH;
        let before = self.rx.queue.next_used();
        while !self.rx_starved && self.table.has_packets() && turns.next().is_some() {
            if !self.burst.take(self.rx, self.memory, self.table.is_flowing())? {
                self.rx_starved = !self.rx.queue.enable_notification(self.memory)?;
                continue;
            }
            self.next_packets()?;
            if let Some(payload) = self.burst.give(self.rx, self.memory)? {
                self.device.counters.to_guest_bytes.add(u64::try_from(payload).unwrap_or(u64::MAX));
            }
        }
        if self.rx.queue.next_used() != before {
            self.rx.signal_used_since(self.memory, before)?;
        }
        Ok(())
    }

    /// Writes the next packets of whoever is first in line; none if nobody has any.
    fn next_packets(&mut self) -> io::Result<()> {
        if let Some(ports) = self.table.resets.pop_front() {
            self.burst.write(&Header::new(ports, Op::Reset));
            return Ok(());
        }
        while let Some(ports) = self.table.line.pop_front() {
            let Some(connection) = self.table.connections.get_mut(&ports) else { continue };
            connection.queued = false;
            match connection.produce(ports, &mut self.burst) {
                Produced::Packets => return self.settle(ports),
                Produced::Nothing => self.settle(ports)?,
                Produced::Abort => self.abort(ports),
            }
        }
        Ok(())
    }
}
