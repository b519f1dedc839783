//! The seam between a VMM and whoever runs it: the configuration it reads once, the commands it obeys,
//! the events it leaves behind, and the codes it exits with.
//!
//! A VMM opens nothing. Every file, socket and tap reaches it as an inherited descriptor named in [`Config`],
//! or beside a [`Command`] on the control socket. This crate holds data and its encoding; it never touches KVM.

mod client;
mod event;
pub mod exit;
pub mod wire;

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

pub use client::{Client, ClientError};
pub use event::{Event, EventKind, ShutdownReason, last_event, read_events};

/// Version of [`Config`]; a VMM refuses any other.
pub const CONFIG_VERSION: u32 = 1;

/// Bytes in a sector, the unit of every disk address (virtio 1.2 §5.2).
pub const SECTOR_BYTES: u64 = 512;

/// Capacity of the pod disk in bytes. It is an address space, not storage: extents appear in it while the guest
/// runs, so adding one needs neither a new device nor a change of capacity.
pub const POD_DISK_BYTES: u64 = 1 << 44;

/// Most queues of a disk, and pairs of queues of a network interface.
pub const MOST_QUEUES: u8 = 8;

/// vsock port on the host that the agent dials once, when it listens: the VMM answers with a reset and an
/// [`EventKind::AgentConnected`]. Connections asked for earlier wait until then.
pub const READY_PORT: u32 = 1024;

/// Context identifier of the guest on its virtio-vsock. Each VM has its own device, so all use the same.
pub const GUEST_CID: u64 = 3;

/// What a VMM is, read as one JSON document from its standard input until end of file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Must be [`CONFIG_VERSION`].
    pub version: u32,
    /// An open `/dev/kvm`.
    pub kvm: RawFd,
    /// The kernel: an uncompressed ELF `vmlinux` or a bzImage.
    pub kernel: RawFd,
    /// The initial RAM disk.
    pub initrd: Option<RawFd>,
    /// Appended to the machine's own kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Virtual CPUs, 1 to 64.
    pub vcpus: u8,
    /// Guest memory in MiB, at least 32.
    pub memory_mib: u32,
    /// Room for guest memory beyond that, plugged by [`Command::SetMemory`], in MiB: a multiple of 128. It costs nothing
    /// until it is used.
    #[serde(default)]
    pub room_mib: u32,
    /// Where the guest's console goes.
    #[serde(default)]
    pub console: Console,
    /// Block devices present at boot. The first is the pod disk: the one that [`Command::AddDisk`] adds to.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Network interfaces present at boot.
    #[serde(default)]
    pub nets: Vec<Net>,
    /// The vsock device's host side.
    #[serde(default)]
    pub vsock: Option<Vsock>,
    /// A listening `SOCK_SEQPACKET` unix socket for [`Command`]s.
    #[serde(default)]
    pub control: Option<RawFd>,
    /// A file open for appending that receives one [`Event`] per line.
    #[serde(default)]
    pub events: Option<RawFd>,
}

/// Where the guest's console goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Console {
    /// A ramoops region in guest memory: no exit per byte, readable by [`Command::Console`] and after a panic.
    #[default]
    Ring,
    /// An 8250 serial port on standard output, input from the descriptor if there is one.
    Serial {
        /// Bytes typed to the guest.
        input: Option<RawFd>,
    },
}

/// A virtio-blk device whose extents map to host files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Size that the guest sees: [`POD_DISK_BYTES`] for the pod disk; a multiple of [`SECTOR_BYTES`].
    pub capacity_bytes: u64,
    /// Queues for requests, 1 to [`MOST_QUEUES`], so that as many of the guest's CPUs need not wait for one another.
    #[serde(default = "one")]
    pub queues: u8,
    /// Extents present at boot; they may not overlap. Sectors outside every extent answer with I/O errors.
    #[serde(default)]
    pub extents: Vec<Extent>,
    /// How much the guest may do with it: requests of any kind, and bytes read and written.
    #[serde(default)]
    pub limits: Limits,
}

fn one() -> u8 {
    1
}

/// How much may be done with a device in a second, on average; what is 0 is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Requests, or packets.
    pub operations_per_s: u64,
    /// Bytes.
    pub bytes_per_s: u64,
}

/// A run of a disk's sectors that is backed by a host file from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// First sector on the disk; a multiple of 8, so that pages of the file are pages of the disk.
    pub first_sector: u64,
    /// Length in sectors; a multiple of 8.
    pub sectors: u64,
    /// Whether writes are refused with an I/O error.
    pub read_only: bool,
    /// The file. In [`Command::AddDisk`] it rides beside the command and this is ignored.
    #[serde(default)]
    pub file: RawFd,
}

/// A network interface backed by a tap with `IFF_VNET_HDR`, `IFF_TAP` and `IFF_NO_PI`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// The tap: a descriptor for each pair of queues, 1 to [`MOST_QUEUES`]; several if it has `IFF_MULTI_QUEUE`.
    pub taps: Vec<RawFd>,
    /// The address the device announces; the agent may give the interface another.
    pub mac: [u8; 6],
    /// How much the guest may receive, and how much it may send; a packet's bytes are those of its frame.
    #[serde(default)]
    pub limits: Limits,
}

/// Host side of the vsock device.
///
/// A client connects to the listening socket, sends `CONNECT <port>\n` and, once the guest has accepted, reads
/// `OK <host port>\n`; bytes then flow both ways. A refused connection is closed without a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// A listening unix stream socket.
    pub listener: RawFd,
}

/// A request on the control socket: one packet, its descriptors beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Answers [`Reply::State`].
    State,
    /// Answers [`Reply::Counters`].
    Counters,
    /// Answers [`Reply::Console`]: what the guest printed from byte `from` of its console on.
    Console {
        /// Count of bytes already seen.
        from: u64,
    },
    /// Stops every vCPU; devices stay.
    Pause,
    /// Undoes [`Command::Pause`].
    Resume,
    /// Ends the VM at once: the agent has already been asked, or does not answer.
    Shutdown,
    /// Maps a file into the pod disk; one descriptor.
    AddDisk(Extent),
    /// Takes an extent out of the pod disk, by its first sector, and closes its file.
    RemoveDisk {
        /// [`Extent::first_sector`] of an extent added before.
        first_sector: u64,
    },
    /// Plugs a shared directory; one descriptor: a `SOCK_SEQPACKET` socket, each of whose packets is one FUSE message,
    /// to the process that serves it. The guest sees it after a PCI rescan.
    AddFs {
        /// What the guest mounts it by; 1 to 36 bytes.
        tag: String,
    },
    /// Asks the guest to have so much memory beyond what it booted with. The first such command also plugs in the device
    /// for it, if the VM has room, and the one by which a guest gives back what it does not use; the guest sees both
    /// after a PCI rescan.
    SetMemory {
        /// MiB, a multiple of 2 and at most [`Config::room_mib`].
        mib: u32,
    },
    /// Answers [`Reply::Memory`] at once.
    Memory,
    /// Answers [`Reply::Memory`] once the guest has as much as [`Command::SetMemory`] asked for, which may be never.
    AwaitMemory,
    /// Appends what the guest sends to host port `port` to a file; one descriptor. Given again for the same port,
    /// the new file replaces the old one at the next line end, which is how logs rotate.
    SetSink {
        /// A host port above [`READY_PORT`].
        port: u32,
    },
    /// Closes a sink.
    RemoveSink {
        /// The port given to [`Command::SetSink`].
        port: u32,
    },
    /// Sends every event so far and from now on as [`Reply::Event`] on this connection.
    Subscribe,
}

/// An answer on the control socket: one packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The command was carried out.
    Done,
    /// The command was refused; nothing changed.
    Refused {
        /// Why, and what to do about it.
        reason: String,
    },
    /// To [`Command::State`].
    State(State),
    /// To [`Command::Counters`]: name → count since the VMM started.
    Counters(BTreeMap<String, u64>),
    /// To [`Command::Console`].
    Console {
        /// Position in the console after `text`, for the next call.
        next: u64,
        /// Console bytes, lossily decoded; older ones may have been overwritten.
        text: String,
    },
    /// To [`Command::Memory`] and [`Command::AwaitMemory`].
    Memory {
        /// What the guest has beyond what it booted with, in MiB.
        mib: u32,
    },
    /// After [`Command::Subscribe`], unasked.
    Event(Event),
}

/// The life of a VM: `Booting → Running ⇄ Paused → Ended`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// vCPUs run; the agent has not dialled yet.
    Booting,
    /// The agent has dialled.
    Running,
    /// vCPUs are stopped.
    Paused,
    /// The guest is over; the process is about to exit.
    Ended,
}
