//! `pericarp-vmm`: one virtual machine, from a configuration on standard input to an exit code that says how it ended.
#![deny(clippy::print_stderr, clippy::print_stdout)]
#![no_main]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::sys::signal::{SigHandler, Signal, signal};
use pericarp_vmm::bus::Bus;
use pericarp_vmm::config::{self, ConfigError, Setup};
use pericarp_vmm::counters::{Counters, Stats};
use pericarp_vmm::events::Events;
use pericarp_vmm::jail::{self, JailError};
use pericarp_vmm::kvm::{Host, KvmError};
use pericarp_vmm::loader::{self, Image, LoadError};
use pericarp_vmm::machine::{DeviceSetupError, Devices, Machine, Signals};
use pericarp_vmm::memory::{self, GuestRam, MemoryError};
use pericarp_vmm::notes::{self, Notes};
use pericarp_vmm::pci::irq::Irqs;
use pericarp_vmm::serial::Port;
use pericarp_vmm::slots::Slots;
use pericarp_vmm::vcpu::{self, Cpus};
use pericarp_vmm::virtio::blk;
use pericarp_vmm::{acpi, complain, console, cpu, describe, kvm, mptable};
use thiserror::Error;
use vmm_control::{Console, EventKind, ShutdownReason, exit};

/// Why no guest came to run.
#[derive(Debug, Error)]
enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error(transparent)]
    Device(#[from] DeviceSetupError),
    #[error("the host refuses")]
    Host(#[from] io::Error),
}

impl StartError {
    fn exit_code(&self) -> i32 {
        match self {
            Self::Config(error) => error.exit_code(),
            Self::Kvm(error) => error.exit_code(),
            Self::Load(_) => exit::BAD_KERNEL,
            Self::Device(error) => error.exit_code(),
            Self::Memory(_) | Self::Jail(_) | Self::Host(_) => exit::INTERNAL,
        }
    }
}

/// Called by the C library. Rust's own start would have each thread set up a stack for the signal of a stack that overflows, by some
/// system calls that nothing else here needs. What it does besides is done here.
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "the C library's name for it, and a signal's disposition")]
extern "C" fn main() -> std::ffi::c_int {
    let started = notes::now();
    // SAFETY: no handler is installed.
    let ignored = unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) };
    let code =
        ignored.map_err(|error| StartError::Host(error.into())).and_then(|_| run(started)).unwrap_or_else(|error| {
            complain(describe(&error));
            error.exit_code()
        });
    std::process::exit(code);
}

fn run(started: u64) -> Result<i32, StartError> {
    let mut setup = config::read(io::stdin().lock())?;
    let mut events = Events::new(setup.events.take());
    events.record_at(started, None, EventKind::Started);
    events.record(EventKind::Configured);
    boot(setup, &mut events).inspect_err(|error| {
        let message = describe(error);
        events.record(EventKind::Shutdown { reason: ShutdownReason::Fault { message } });
    })
}

fn boot(setup: Setup, events: &mut Events) -> Result<i32, StartError> {
    // The machine: interrupt controllers and memory.
    let serial = matches!(setup.console, Console::Serial { .. });
    let host = Host::new(setup.kvm)?;
    let vm = host.create_vm()?;
    let ram = GuestRam::new(&vm, setup.memory_mib, setup.room_mib)?;
    let window = memory::read_only_window(&vm)?;

    // What the guest finds in memory, and its CPUs at the kernel's entry.
    cpu::write_boot_tables(&ram.memory).map_err(LoadError::from)?;
    let acpi_root = acpi::write(&ram.memory, setup.vcpus, serial).map_err(LoadError::from)?;
    if serial {
        mptable::write(&ram.memory, setup.vcpus).map_err(LoadError::from)?;
    }
    let agent = setup.vsock.is_some();
    let command_line = command_line(&setup.cmdline, serial, agent, setup.room_mib > 0);
    let seed = loader::seed()?;
    let (kernel, initrd) = (setup.kernel, setup.initrd);
    let image = Image { kernel, initrd, command_line: &command_line, seed, cpuid_table: agent, acpi_root };
    let loaded = loader::load(&ram, image)?;
    let populated = loaded.pages.iter().all(|pages| ram.populate(pages.clone()));
    let vcpus = host.create_vcpus(&vm, &ram.memory, setup.vcpus, loaded.entry)?;
    let stats = vcpus.iter().map(Stats::open).chain([Stats::open(&*vm)]).filter_map(Result::ok).collect();

    let disks: Vec<_> = setup.disks.into_iter().map(|disk| (blk::Ring::new(disk.queues), disk)).collect();

    // Everything is open: from here on the guest's input reaches a process that can open nothing.
    let signals = Signals::new()?;
    vcpu::take_kicks()?;
    jail::enter(events.file().map(File::as_raw_fd))?;

    // The devices, each with its thread.
    let (notifier, notes) = Notes::new()?;
    let port = serial.then(|| open_serial(&vm, setup.keyboard)).transpose()?;
    let bus = Arc::new(Bus::new(Slots::new(window, Irqs::new(Arc::clone(&vm))), port));
    let mut devices = Devices::new(Arc::clone(&bus), Arc::clone(&vm), ram, notifier.clone());
    if let Some(listener) = setup.vsock {
        devices.add_vsock(listener)?;
    }
    for (ring, disk) in disks {
        devices.add_disk(disk, ring)?;
    }
    for net in setup.nets {
        devices.add_net(net)?;
    }
    // What is read before it is written would become a page of zeroes, and then small pages: memory comes first.
    if let (Some(first), true) = (vcpus.first(), populated) {
        kvm::map_ahead(first, memory::first_pages().chain(loaded.pages));
    }
    events.record(EventKind::Loaded);

    // The guest runs.
    let cpus = Cpus::start(vcpus, &bus, &notifier)?;
    let counters = Counters::new(stats, cpus.exits.clone());
    Ok(Machine::new(devices, cpus, counters, events, setup.control).serve(&notes, &signals))
}

/// A panic ends the guest at once. There is no PCI behind ports 0xcf8 and 0xcfc, so Linux need not look there for
/// devices with early quirks, two exits each. Its lock prefixes stay as they are with one CPU too: taking them out costs
/// 4 million instructions, and putting them back when a second one comes as many again.
///
/// The console is the ring, or the serial port of a machine that has one. The kernel of such a machine is anybody's: it is told
/// that there is one port, and to make none of BSD's 512 terminals, which nobody has used for twenty years and which a
/// small kernel spends a quarter of its boot on.
///
/// An agent brings up the CPUs beyond the first when it is ready, and is unpacked into a file system that can take the
/// initrd's pages as they are. Memory that is plugged is used at once; three parts in four of it at most for what can be
/// moved, and so given back, since the rest has to hold what the kernel itself keeps for it.
fn command_line(added: &str, serial: bool, agent: bool, room: bool) -> String {
    let console = if serial { "console=ttyS0 8250.nr_uarts=1 pty.legacy_count=0" } else { &console::parameters() };
    let agent = if agent { " maxcpus=1 rootfstype=ramfs" } else { "" };
    let plug = if room { " memhp_default_state=online memory_hotplug.online_policy=auto-movable" } else { "" };
    format!("panic=-1 pci=noearly noreplace-smp {console}{agent}{plug} {added}").trim_end().to_owned()
}

fn open_serial(vm: &kvm_ioctls::VmFd, keyboard: Option<File>) -> io::Result<Port> {
    let (port, interrupt) = Port::new()?;
    vm.register_irqfd(&interrupt, acpi::SERIAL_GSI)?;
    if let Some(keyboard) = keyboard {
        port.type_from(keyboard)?;
    }
    Ok(port)
}
