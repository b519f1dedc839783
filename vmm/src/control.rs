//! The control socket: connections, their commands, and the events that their owners subscribed to.
//!
//! It owns the connections and decides nothing: what a command does is the machine's business. A client that does
//! not read what it asked for is cut off; nobody waits for it.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{SockFlag, accept4};
use vmm_control::{Command, Event, Reply, wire};
use vmm_sys_util::epoll::EventSet;

use crate::virtio::poller::Poller;

/// Most connections at once.
const MOST_CONNECTIONS: usize = 16;
/// Most packets waiting for one client.
const MOST_WAITING: usize = 512;

#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    waiting: VecDeque<Reply>,
    subscribed: bool,
}

/// The listening socket and its connections, each known by the poller's token.
#[derive(Debug)]
pub struct Server {
    listener: Option<OwnedFd>,
    connections: BTreeMap<u64, Connection>,
    next: u64,
}

impl Server {
    /// Serves `listener`, if there is one; connections take tokens from `first` on.
    pub fn new(listener: Option<OwnedFd>, first: u64) -> Self {
        Self { listener, connections: BTreeMap::new(), next: first }
    }

    /// Watches the listener.
    pub fn listen(&self, poller: &Poller, token: u64) -> io::Result<()> {
        self.listener.as_ref().map_or(Ok(()), |listener| poller.add(listener, EventSet::IN, token))
    }

    /// Takes one new connection.
    pub fn accept(&mut self, poller: &Poller) -> io::Result<()> {
        let Some(listener) = &self.listener else { return Ok(()) };
        let socket = match accept4(listener.as_raw_fd(), SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC) {
            // The client changed its mind.
            Err(Errno::EAGAIN | Errno::ECONNABORTED | Errno::EINTR) => return Ok(()),
            result => own(result?),
        };
        if self.connections.len() < MOST_CONNECTIONS {
            poller.add(&socket, EventSet::IN, self.next)?;
            self.connections.insert(self.next, Connection { socket, waiting: VecDeque::new(), subscribed: false });
            self.next += 1;
        }
        Ok(())
    }

    /// Takes one command from a connection; `None` if there is none to obey.
    pub fn receive(&mut self, token: u64) -> Option<(Command, Vec<OwnedFd>)> {
        let connection = self.connections.get(&token)?;
        match wire::recv(connection.socket.as_fd(), wire::CONTROL) {
            Ok(Some(packet)) => Some(packet),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                self.send(token, Reply::Refused { reason: format!("not a command: {error}") });
                None
            }
            Ok(None) | Err(_) => {
                self.connections.remove(&token);
                None
            }
        }
    }

    /// Sends a packet, now or when the client has room.
    pub fn send(&mut self, token: u64, reply: Reply) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        connection.waiting.push_back(reply);
        if connection.waiting.len() > MOST_WAITING || flush(connection).is_err() {
            self.connections.remove(&token);
        }
    }

    /// Sends what waits for a client that has room again.
    pub fn flush(&mut self, token: u64) {
        if self.connections.get_mut(&token).is_some_and(|connection| flush(connection).is_err()) {
            self.connections.remove(&token);
        }
    }

    /// Sends a client every event so far, and from now on each new one.
    pub fn subscribe(&mut self, token: u64, past: &[Event]) {
        if let Some(connection) = self.connections.get_mut(&token) {
            connection.subscribed = true;
        }
        self.send(token, Reply::Done);
        for event in past {
            self.send(token, Reply::Event(event.clone()));
        }
    }

    /// Sends an event to all who subscribed.
    pub fn publish(&mut self, event: &Event) {
        let subscribed = self.connections.iter().filter(|(_, connection)| connection.subscribed);
        let tokens: Vec<u64> = subscribed.map(|(token, _)| *token).collect();
        for token in tokens {
            self.send(token, Reply::Event(event.clone()));
        }
    }

    /// Watches each connection for what it waits for.
    pub fn watch(&self, poller: &Poller) -> io::Result<()> {
        for (token, connection) in &self.connections {
            let room = if connection.waiting.is_empty() { EventSet::empty() } else { EventSet::OUT };
            poller.modify(&connection.socket, EventSet::IN | room, *token)?;
        }
        Ok(())
    }
}

/// Sends until the client's buffer is full.
fn flush(connection: &mut Connection) -> io::Result<()> {
    while let Some(reply) = connection.waiting.front() {
        match wire::send(connection.socket.as_fd(), wire::CONTROL, reply, &[]) {
            Ok(()) => drop(connection.waiting.pop_front()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[expect(unsafe_code, reason = "a descriptor just accepted has no owner yet")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: accept4(2) has just made it for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
