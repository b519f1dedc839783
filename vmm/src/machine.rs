//! The running VM: one thread that hears what the others have to tell, obeys the control socket and decides.
//!
//! ```text
//! Booting ──agent dials──▶ Running        Booting, Running ──pause──▶ Paused ──resume──▶ as before
//!    └──────────┴── guest ends, Shutdown, SIGTERM, fault ──▶ Ended
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use kvm_ioctls::VmFd;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use thiserror::Error;
use vmm_control::{Command, EventKind, Extent, Reply, ShutdownReason, State, exit};
use vmm_sys_util::epoll::EventSet;

use crate::bus::Bus;
use crate::config::{DiskSetup, NetSetup};
use crate::console::{self, Follower, TAIL_BYTES};
use crate::control::Server;
use crate::counters::Counters;
use crate::describe;
use crate::events::Events;
use crate::memory::{GuestRam, MIB};
use crate::notes::{End, Note, Notes, Notifier, now};
use crate::room::Room;
use crate::vcpu::Cpus;
use crate::virtio::counters::Snapshot;
use crate::virtio::device::{Backend, DeviceInfo};
use crate::virtio::poller::{Poller, Wait};
use crate::virtio::transport::{TransportError, VirtioPci};
use crate::virtio::{balloon, blk, fs, mem, net, vsock};

const NOTES: u64 = 0;
const SIGNALS: u64 = 1;
const LISTENER: u64 = 2;
const FIRST_CONNECTION: u64 = 16;

/// Most clients that wait for the guest's memory at once.
const MOST_WAITING: usize = 16;

/// Why a device cannot be had.
#[derive(Debug, Error)]
pub enum DeviceSetupError {
    /// A disk's configuration.
    #[error("a disk is refused")]
    Disk(#[from] blk::DiskError),
    /// A tap.
    #[error("a tap is refused")]
    Tap(#[from] net::TapError),
    /// A shared directory.
    #[error("a shared directory is refused")]
    Fs(#[from] fs::FsError),
    /// The bus.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A size of memory.
    #[error(transparent)]
    Memory(#[from] mem::RequestError),
}

impl DeviceSetupError {
    /// The code to exit with.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Disk(_) => exit::BAD_CONFIG,
            Self::Tap(_) | Self::Fs(_) => exit::BAD_FD,
            Self::Transport(_) | Self::Memory(_) => exit::INTERNAL,
        }
    }
}

/// The devices of a VM, and how to reach those that take commands or count.
pub struct Devices {
    bus: Arc<Bus>,
    vm: Arc<VmFd>,
    ram: GuestRam,
    notifier: Notifier,
    disks: Vec<blk::Handle>,
    nets: usize,
    shares: usize,
    /// Once there is one, with its place on the bus.
    mem: Option<(usize, mem::Handle)>,
    balloon: bool,
    vsock: Option<vsock::Handle>,
    meters: Vec<(String, Meter)>,
}

type Meter = Box<dyn Fn() -> Snapshot>;

impl Devices {
    /// No devices yet.
    pub fn new(bus: Arc<Bus>, vm: Arc<VmFd>, ram: GuestRam, notifier: Notifier) -> Self {
        Self {
            bus,
            vm,
            ram,
            notifier,
            disks: Vec::new(),
            nets: 0,
            shares: 0,
            mem: None,
            balloon: false,
            vsock: None,
            meters: Vec::new(),
        }
    }

    /// Plugs in the vsock.
    pub fn add_vsock(&mut self, listener: OwnedFd) -> Result<(), DeviceSetupError> {
        let notifier = self.notifier.clone();
        let ready = move || notifier.tell(Note::AgentConnected);
        let (info, backend, handle) = vsock::device(listener.into(), ready).map_err(TransportError::from)?;
        self.vsock = Some(handle.clone());
        self.plug(info, Box::new(backend), Box::new(move || handle.counters())).map(drop)
    }

    /// Plugs in a disk.
    pub fn add_disk(&mut self, disk: DiskSetup, ring: Option<blk::Ring>) -> Result<(), DeviceSetupError> {
        let name = format!("disk{}", self.disks.len());
        let (info, backend, handle) = blk::device(name, disk, ring)?;
        self.disks.push(handle.clone());
        self.plug(info, Box::new(backend), Box::new(move || handle.counters())).map(drop)
    }

    /// Plugs in a network interface.
    pub fn add_net(&mut self, setup: NetSetup) -> Result<(), DeviceSetupError> {
        let (info, backend, counters) = net::device(format!("net{}", self.nets), setup)?;
        self.nets += 1;
        self.plug(info, Box::new(backend), Box::new(move || counters.snapshot())).map(drop)
    }

    /// Plugs in a shared directory.
    pub fn add_fs(&mut self, tag: &str, server: OwnedFd) -> Result<(), DeviceSetupError> {
        let (info, backend, counters) = fs::device(format!("fs{}", self.shares), tag, server)?;
        self.shares += 1;
        self.plug(info, Box::new(backend), Box::new(move || counters.snapshot())).map(drop)
    }

    /// Asks the guest to have so much memory beyond what it booted with; the devices for that are plugged in with the
    /// first call.
    fn set_memory(&mut self, mib: u32) -> Result<(), DeviceSetupError> {
        if !self.balloon {
            let (info, backend, counters) = balloon::device();
            self.plug(info, Box::new(backend), Box::new(move || counters.snapshot()))?;
            self.balloon = true;
        }
        if self.mem.is_none() && self.ram.room.1 > 0 {
            let notifier = self.notifier.clone();
            let settled = move || notifier.tell(Note::MemorySettled);
            let room = Room::new(Arc::clone(&self.vm), &self.ram);
            let (info, backend, handle) =
                mem::device(self.ram.room, Box::new(room), settled).map_err(TransportError::from)?;
            let ours = handle.clone();
            let slot = self.plug(info, Box::new(backend), Box::new(move || handle.counters()))?;
            self.mem = Some((slot, ours));
        }
        match &self.mem {
            Some((slot, handle)) => {
                handle.request(u64::from(mib) * MIB)?;
                self.bus.pci().with(*slot, |device, _| device.config_changed());
                Ok(())
            }
            None if mib == 0 => Ok(()),
            None => Err(mem::RequestError::Refused.into()),
        }
    }

    /// What the guest has beyond what it booted with.
    fn memory(&self) -> Result<mem::Plugged, DeviceSetupError> {
        match &self.mem {
            Some((_, handle)) => Ok(handle.look()?),
            None => Ok(mem::Plugged { bytes: 0, settled: true }),
        }
    }

    fn plug(&mut self, info: DeviceInfo, backend: Box<dyn Backend>, meter: Meter) -> Result<usize, DeviceSetupError> {
        let (name, memory, notifier) = (info.name.clone(), Arc::clone(&self.ram.memory), self.notifier.clone());
        let make = |place, irqs: &mut _| VirtioPci::new(info, backend, place, irqs, memory, notifier);
        let slot = self.bus.pci().plug::<TransportError>(make)?;
        self.meters.push((name, meter));
        Ok(slot)
    }

    /// What each device has counted, under its name.
    fn counters(&self) -> impl Iterator<Item = (String, u64)> {
        self.meters.iter().flat_map(|(device, meter)| {
            meter().into_iter().map(move |(name, count)| (format!("{device}.{name}"), count))
        })
    }
}

/// A running VM.
pub struct Machine<'e> {
    devices: Devices,
    follower: Follower,
    cpus: Cpus,
    counters: Counters,
    events: &'e mut Events,
    server: Server,
    /// Clients that wait for the guest's memory to be as asked for.
    waiting_for_memory: Vec<u64>,
    state: State,
    /// State to which [`Command::Resume`] leads.
    before_pause: State,
    booted: bool,
}

impl<'e> Machine<'e> {
    /// Takes over a VM whose CPUs have just started.
    pub fn new(
        devices: Devices,
        cpus: Cpus,
        counters: Counters,
        events: &'e mut Events,
        control: Option<OwnedFd>,
    ) -> Self {
        Self {
            follower: Follower::default(),
            devices,
            cpus,
            counters,
            events,
            server: Server::new(control, FIRST_CONNECTION),
            waiting_for_memory: Vec::new(),
            state: State::Booting,
            before_pause: State::Booting,
            booted: false,
        }
    }

    /// Serves the VM until it is over; returns the code to exit with.
    pub fn serve(mut self, notes: &Notes, signals: &Signals) -> i32 {
        let reason = self
            .wait_for_end(notes, signals)
            .unwrap_or_else(|error| ShutdownReason::Fault { message: describe(&error) });
        self.state = State::Ended;
        self.cpus.end();
        self.devices.bus.pci().stop();
        let code = exit_code(&reason);
        self.record(EventKind::Shutdown { reason });
        code
    }

    fn wait_for_end(&mut self, notes: &Notes, signals: &Signals) -> io::Result<ShutdownReason> {
        let mut poller = Poller::new()?;
        poller.add(&*notes.wake, EventSet::IN, NOTES)?;
        poller.add(&signals.0.as_raw_fd(), EventSet::IN, SIGNALS)?;
        self.server.listen(&poller, LISTENER)?;
        loop {
            for (token, ready) in poller.wait(Wait::Block)? {
                let end = match token {
                    NOTES => self.hear(notes),
                    SIGNALS => Some(ShutdownReason::Requested),
                    LISTENER => self.server.accept(&poller).map(|()| None)?,
                    _ => self.serve_client(token, ready),
                };
                if let Some(reason) = end {
                    return Ok(reason);
                }
            }
            self.server.watch(&poller)?;
        }
    }

    /// Hears what the other threads have to tell.
    fn hear(&mut self, notes: &Notes) -> Option<ShutdownReason> {
        notes.acknowledge();
        while let Some((at, note)) = notes.next() {
            match note {
                Note::DeviceStarted if self.booted => {}
                Note::DeviceStarted => {
                    self.booted = true;
                    self.record_at(at, EventKind::Booted);
                }
                Note::AgentConnected => {
                    self.record_at(at, EventKind::AgentConnected);
                    let state = if self.state == State::Paused { &mut self.before_pause } else { &mut self.state };
                    *state = State::Running;
                }
                Note::MemorySettled => self.answer_memory(),
                Note::DeviceStopped { slot } => self.devices.bus.pci().with(slot, VirtioPci::finish_reset),
                Note::DeviceFailed { slot, device, reason } => {
                    let mut told = false;
                    self.devices.bus.pci().with(slot, |device, _| told = device.needs_reset());
                    if told {
                        self.record_at(at, EventKind::DeviceNeedsReset { device, reason });
                    }
                }
                Note::Ended(end) => return Some(self.explain(end)),
            }
        }
        None
    }

    /// Why the guest ended, from how it ended and what its kernel left in the ring.
    fn explain(&mut self, end: End) -> ShutdownReason {
        match end {
            End::PowerOff => ShutdownReason::GuestPoweroff,
            End::Reset if console::has_panic(&self.devices.ram.memory) => {
                let tail = console::tail(&self.devices.ram.memory, TAIL_BYTES);
                self.record(EventKind::GuestPanic { console: String::from_utf8_lossy(&tail).into_owned() });
                ShutdownReason::GuestPanic
            }
            End::Reset => ShutdownReason::GuestReset,
            End::Fault(_) if console::has_panic(&self.devices.ram.memory) => self.explain(End::Reset),
            End::Fault(message) => ShutdownReason::Fault { message },
        }
    }

    fn serve_client(&mut self, token: u64, ready: EventSet) -> Option<ShutdownReason> {
        if ready.contains(EventSet::OUT) {
            self.server.flush(token);
        }
        if !ready.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR) {
            return None;
        }
        let (command, fds) = self.server.receive(token)?;
        match command {
            Command::Shutdown => {
                self.server.send(token, Reply::Done);
                return Some(ShutdownReason::Requested);
            }
            Command::Subscribe => self.server.subscribe(token, self.events.past()),
            Command::AwaitMemory => {
                // The first to have come is the first to be forgotten.
                let many = self.waiting_for_memory.len() >= MOST_WAITING;
                self.waiting_for_memory.drain(..usize::from(many));
                self.waiting_for_memory.push(token);
                self.answer_memory();
            }
            command => {
                let reply = self.obey(&command, fds).unwrap_or_else(|reason| Reply::Refused { reason });
                self.server.send(token, reply);
            }
        }
        None
    }

    fn obey(&mut self, command: &Command, fds: Vec<OwnedFd>) -> Result<Reply, String> {
        match *command {
            Command::State => return Ok(Reply::State(self.state)),
            Command::Counters => {
                let mut counters = self.counters.snapshot();
                counters.extend(self.devices.counters());
                return Ok(Reply::Counters(counters));
            }
            Command::Console { from } => {
                let (next, text) = self.follower.read(&self.devices.ram.memory, from);
                return Ok(Reply::Console { next, text });
            }
            Command::Pause => self.pause()?,
            Command::Resume => self.resume()?,
            Command::AddDisk(extent) => self.add_extent(extent, one(fds)?.into())?,
            Command::RemoveDisk { first_sector } => {
                self.pod_disk()?.remove(first_sector).map_err(|error| describe(&error))?;
            }
            Command::AddFs { ref tag } => {
                self.devices.add_fs(tag, one(fds)?).map_err(|error| describe(&error))?;
            }
            Command::SetMemory { mib } => self.devices.set_memory(mib).map_err(|error| describe(&error))?,
            Command::Memory => return self.devices.memory().map(memory_reply).map_err(|error| describe(&error)),
            Command::SetSink { port } => {
                self.vsock()?.set_sink(port, one(fds)?.into()).map_err(|error| describe(&error))?;
            }
            Command::RemoveSink { port } => self.vsock()?.remove_sink(port).map_err(|error| describe(&error))?,
            Command::Shutdown | Command::Subscribe | Command::AwaitMemory => {
                return Err("not to be answered here".into());
            }
        }
        Ok(Reply::Done)
    }

    /// Answers those who wait for the guest's memory, if it is as asked for. One that has gone away hears nothing; tokens
    /// are never used again.
    fn answer_memory(&mut self) {
        let reply = match self.devices.memory() {
            Ok(plugged) if !plugged.settled => return,
            Ok(plugged) => memory_reply(plugged),
            Err(error) => Reply::Refused { reason: describe(&error) },
        };
        for token in self.waiting_for_memory.drain(..) {
            self.server.send(token, reply.clone());
        }
    }

    fn pause(&mut self) -> Result<(), String> {
        if self.state == State::Paused {
            return Ok(());
        }
        if !self.cpus.pause() {
            self.cpus.resume();
            return Err("a virtual CPU does not stop; look at the host's load, then try again".into());
        }
        self.before_pause = self.state;
        self.state = State::Paused;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), String> {
        if self.state != State::Paused {
            return Err("the VM is not paused".into());
        }
        self.state = self.before_pause;
        self.cpus.resume();
        Ok(())
    }

    fn pod_disk(&self) -> Result<&blk::Handle, String> {
        self.devices.disks.first().ok_or_else(|| "the VM has no pod disk: name one in its configuration".into())
    }

    fn add_extent(&self, extent: Extent, file: File) -> Result<(), String> {
        self.pod_disk()?.add(extent, file).map_err(|error| describe(&error))
    }

    fn vsock(&self) -> Result<&vsock::Handle, String> {
        self.devices.vsock.as_ref().ok_or_else(|| "the VM has no vsock: name one in its configuration".into())
    }

    fn record(&mut self, kind: EventKind) {
        self.record_at(now(), kind);
    }

    fn record_at(&mut self, at: u64, kind: EventKind) {
        self.server.publish(self.events.record_at(at, self.counters.exits(), kind));
    }
}

/// Signals that ask the VM to end; blocked in every thread that starts later, and read from a descriptor.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks them in this thread.
    pub fn new() -> io::Result<Self> {
        let termination: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
        termination.thread_block()?;
        Ok(Self(SignalFd::with_flags(&termination, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?))
    }
}

fn one(fds: Vec<OwnedFd>) -> Result<OwnedFd, String> {
    let [fd] = <[OwnedFd; 1]>::try_from(fds)
        .map_err(|fds| format!("{} descriptors came beside the command, it takes 1", fds.len()))?;
    Ok(fd)
}

fn memory_reply(plugged: mem::Plugged) -> Reply {
    Reply::Memory { mib: u32::try_from(plugged.bytes / MIB).unwrap_or(u32::MAX) }
}

fn exit_code(reason: &ShutdownReason) -> i32 {
    match reason {
        ShutdownReason::GuestPoweroff | ShutdownReason::Requested => exit::ENDED,
        ShutdownReason::GuestReset => exit::GUEST_RESET,
        ShutdownReason::GuestPanic => exit::GUEST_PANIC,
        ShutdownReason::Fault { .. } => exit::GUEST_FAULT,
        ShutdownReason::ForbiddenSyscall { .. } => exit::FORBIDDEN_SYSCALL,
    }
}
