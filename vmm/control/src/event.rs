//! What a VMM reports: one JSON line per event in a file it was handed, so that the last one outlives it.

use std::io::{self, BufRead, BufReader, Read};

use serde::{Deserialize, Serialize};

/// Something that happened to a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// `CLOCK_BOOTTIME` of the host in nanoseconds.
    pub at_ns: u64,
    /// Exits of the guest so far, as KVM counts them; `None` before there is a guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exits: Option<u64>,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// Kinds of [`Event`], in the order in which a VM that lives well sends them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// The VMM's `main` was entered.
    Started,
    /// The configuration was read and checked.
    Configured,
    /// Guest memory holds kernel and initrd, and vCPUs are about to run.
    Loaded,
    /// The guest kernel brought up its first virtio device.
    Booted,
    /// The agent dialled [`crate::READY_PORT`].
    AgentConnected,
    /// A device stopped because its guest driver broke the ring's rules (virtio 1.2 §2.1.1, DEVICE_NEEDS_RESET).
    DeviceNeedsReset {
        /// Name of the device, such as `net0`.
        device: String,
        /// The rule broken.
        reason: String,
    },
    /// The guest kernel panicked.
    GuestPanic {
        /// The last 16 KiB of its console, lossily decoded.
        console: String,
    },
    /// The VM is over; always the last event of a VMM that was not killed.
    Shutdown {
        /// Why.
        #[serde(flatten)]
        reason: ShutdownReason,
    },
}

/// Why a VM is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum ShutdownReason {
    /// The guest powered itself off.
    GuestPoweroff,
    /// The guest reset itself, and it was not a panic.
    GuestReset,
    /// The guest kernel panicked.
    GuestPanic,
    /// [`crate::Command::Shutdown`] or SIGTERM.
    Requested,
    /// The VMM could not go on.
    Fault {
        /// What it ran into.
        message: String,
    },
    /// The VMM made a system call that its filter refuses (seccomp(2), `SECCOMP_RET_TRAP`).
    ForbiddenSyscall {
        /// Name of the thread.
        thread: String,
        /// Number of the call.
        syscall: i64,
    },
}

/// Longest event line that is read back, in bytes: a console tail, escaped.
const LINE_LIMIT: u64 = 256 << 10;

/// Reads a file of events; a torn last line (the VMM was killed while writing) is left out.
pub fn read_events(file: impl Read) -> io::Result<Vec<Event>> {
    let mut reader = BufReader::new(file);
    let mut events = Vec::new();
    loop {
        let mut line = String::new();
        if reader.by_ref().take(LINE_LIMIT).read_line(&mut line)? == 0 {
            return Ok(events);
        }
        if let Ok(event) = serde_json::from_str(&line) {
            events.push(event);
        }
    }
}

/// The last event of a file, `None` if the VMM died before its first.
pub fn last_event(file: impl Read) -> io::Result<Option<Event>> {
    Ok(read_events(file)?.pop())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_survives_its_line() {
        let event = Event {
            at_ns: 7,
            exits: Some(9),
            kind: EventKind::Shutdown { reason: ShutdownReason::Fault { message: "a \"quoted\"\nline".into() } },
        };
        let line = serde_json::to_string(&event).expect("serializes");
        assert!(!line.contains('\n'));
        assert_eq!(last_event(line.as_bytes()).expect("reads"), Some(event));
    }

    #[test]
    fn a_torn_last_line_is_left_out() {
        let text = "{\"at_ns\":1,\"event\":\"started\"}\n{\"at_ns\":2,\"eve";
        let event = last_event(text.as_bytes()).expect("reads");
        assert_eq!(event, Some(Event { at_ns: 1, exits: None, kind: EventKind::Started }));
    }
}
