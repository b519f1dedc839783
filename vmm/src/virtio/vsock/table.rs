//! Who is connected, and who of them waits for what.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::credit::BUFFER_BYTES;
use super::handshake::Handshake;
use super::packet::{PORT_ANY, Ports};
use super::{CONNECTIONS, FIRST_CLIENT_PORT};

/// So many connections are promised a whole buffer, and those that come while there are as many a quarter of one: all of them together
/// make the VMM hold 81 MiB at most.
const WIDE_CONNECTIONS: usize = 64;

/// Connections and who of them waits for what.
pub(super) struct Table {
    pub(super) connections: BTreeMap<Ports, Connection>,
    /// Clients that have not named their port yet, by their host port, which is theirs alone for a very long time.
    pub(super) handshakes: BTreeMap<u32, Handshake>,
    /// Connections that have something for the guest, each once.
    pub(super) line: VecDeque<Ports>,
    /// Resets for connections that are not there any more or never were.
    pub(super) resets: VecDeque<Ports>,
    pub(super) deadlines: Deadlines,
    last_port: u32,
}

/// When the other side must have done its part. In order, as every deadline is `patience` after it was set; some have
/// become void since.
pub(super) struct Deadlines {
    patience: Duration,
    pub(super) waiting: VecDeque<(Instant, Ports)>,
}

impl Deadlines {
    /// From now on; returns when it ends.
    pub(super) fn set(&mut self, ports: Ports) -> Instant {
        let now = Instant::now();
        let at = now.checked_add(self.patience).unwrap_or(now);
        self.waiting.push_back((at, ports));
        at
    }
}

impl Table {
    /// Nobody; the other side always has as long as `patience`.
    pub(super) fn new(patience: Duration) -> Self {
        Self {
            connections: BTreeMap::new(),
            handshakes: BTreeMap::new(),
            line: VecDeque::new(),
            resets: VecDeque::new(),
            deadlines: Deadlines { patience, waiting: VecDeque::new() },
            last_port: 0,
        }
    }

    /// Whether there may be one more connection.
    pub(super) fn has_room(&self) -> bool {
        self.connections.len().saturating_add(self.handshakes.len()) < CONNECTIONS
    }

    /// The buffer that the guest is promised for one more connection.
    pub(super) fn promise(&self) -> u32 {
        if self.connections.len() < WIDE_CONNECTIONS { BUFFER_BYTES } else { BUFFER_BYTES / 4 }
    }

    /// Whether anybody may have something for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.line.is_empty() || !self.resets.is_empty()
    }

    /// Whether who is next is likely to fill more than one chain.
    pub(super) fn is_flowing(&self) -> bool {
        let first = self.line.front().and_then(|ports| self.connections.get(ports));
        self.resets.is_empty() && first.is_some_and(Connection::is_flowing)
    }

    /// A host port that no client has.
    pub(super) fn new_port(&mut self) -> u32 {
        loop {
            let next = self.last_port.wrapping_add(1);
            self.last_port = if (FIRST_CLIENT_PORT..PORT_ANY).contains(&next) { next } else { FIRST_CLIENT_PORT };
            let port = self.last_port;
            let taken = self.connections.keys().any(|ports| ports.host == port) || self.handshakes.contains_key(&port);
            if !taken {
                return port;
            }
        }
    }

    /// Resets every connection of a sink.
    pub(super) fn reset_all(&mut self, host: u32) {
        for (ports, _) in self.connections.extract_if(.., |ports, _| ports.host == host) {
            self.line.retain(|waiting| *waiting != ports);
            self.resets.push_back(ports);
        }
    }
}
