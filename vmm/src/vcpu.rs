//! The thread of one virtual CPU.
//!
//! ```text
//!          ┌──────────── Enter ◀────────────┐
//!          ▼                                │
//!     KVM_RUN ──exit──▶ handle ─────────────┤
//!          │                                │
//!          └─signal──▶ Hold ──gate opens────┘
//!                        └────gate ends──▶ Leave
//! ```
//!
//! A kick is a signal whose handler sets `immediate_exit`, so that one which comes just before `KVM_RUN` is not lost
//! (Documentation/virt/kvm/api.rst, 5. "The kvm_run structure"); KVM completes a pending access first.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::as_conversions,
        clippy::arithmetic_side_effects,
        clippy::panic
    )
)]
#![expect(unsafe_code, reason = "a signal handler reaches the kvm_run page of its thread")]

mod gate;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{self, Arc};
use std::thread::{Builder, JoinHandle};

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use self::gate::{Gate, Phase};
use crate::bus::Bus;
use crate::notes::{End, Note, Notifier};

/// The way an operating system resets a PC when all others fail, or what a fault in its fault handlers leads to.
const TRIPLE_FAULT: &str = "the guest's CPU shut down after a triple fault";

/// Exits that reached this process, by kind. One thread counts, any may read.
#[derive(Debug, Default)]
pub struct Exits {
    /// `in`.
    pub port_in: AtomicU64,
    /// `out`.
    pub port_out: AtomicU64,
    /// Reads of device memory.
    pub memory_read: AtomicU64,
    /// Writes to device memory.
    pub memory_write: AtomicU64,
    /// Kicks.
    pub interrupted: AtomicU64,
}

/// Has the signal handled that kicks a CPU's thread. Call before the first CPU starts.
pub fn take_kicks() -> io::Result<()> {
    Ok(register_signal_handler(SIGRTMIN(), kicked)?)
}

/// All virtual CPUs of a VM, running.
pub struct Cpus {
    threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
    /// Per CPU.
    pub exits: Vec<Arc<Exits>>,
}

impl Cpus {
    /// Starts a thread for each.
    pub fn start(fds: Vec<VcpuFd>, bus: &Arc<Bus>, notifier: &Notifier) -> io::Result<Self> {
        let mut cpus = Self { threads: Vec::new(), gate: Arc::new(Gate::new()), exits: Vec::new() };
        for (id, fd) in fds.into_iter().enumerate() {
            let exits = Arc::new(Exits::default());
            let (gate, bus, notifier) = (Arc::clone(&cpus.gate), Arc::clone(bus), notifier.clone());
            let vcpu = Vcpu { fd, gate, bus, exits: Arc::clone(&exits), notifier };
            cpus.threads.push(Builder::new().name(format!("vcpu{id}")).spawn(move || vcpu.work())?);
            cpus.exits.push(exits);
        }
        Ok(cpus)
    }

    /// Stops every CPU; false if one does not stop.
    pub fn pause(&self) -> bool {
        self.halt(Phase::Pause)
    }

    /// Lets them go on.
    pub fn resume(&self) {
        self.gate.set(Phase::Run);
    }

    /// Stops every CPU for good. One that is still in an access of its own does no harm: the process ends next.
    pub fn end(&self) {
        self.gate.set(Phase::End);
        self.kick();
    }

    fn halt(&self, phase: Phase) -> bool {
        self.gate.set(phase);
        self.kick();
        self.gate.wait_for(self.threads.len())
    }

    fn kick(&self) {
        for thread in &self.threads {
            // A thread that has left already needs no kick.
            let _ = thread.kill(SIGRTMIN());
        }
    }
}

thread_local! {
    /// `immediate_exit` of this thread's kvm_run page, null in a thread that has none.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer leads into the kvm_run page of this very thread, which stays mapped until the thread
        // has set the pointer back to null; only this thread writes to the byte, here and in `Vcpu::hold`.
        unsafe { flag.write_volatile(1) };
    }
}

/// What a CPU does next.
enum Next {
    Enter,
    Hold,
    Leave(End),
}

struct Vcpu {
    fd: VcpuFd,
    gate: Arc<Gate>,
    bus: Arc<Bus>,
    exits: Arc<Exits>,
    notifier: Notifier,
}

impl Vcpu {
    fn work(mut self) {
        IMMEDIATE_EXIT.set(&raw mut self.fd.get_kvm_run().immediate_exit);
        let end = loop {
            match self.enter() {
                Next::Enter => {}
                Next::Hold if self.hold() => {}
                Next::Hold => break None,
                Next::Leave(end) => break Some(end),
            }
        };
        IMMEDIATE_EXIT.set(ptr::null_mut());
        if let Some(end) = end {
            self.notifier.tell(Note::Ended(end));
        }
    }

    /// Runs the guest until its next exit, and handles that.
    fn enter(&mut self) -> Next {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) => return interrupted(error),
        };
        match exit {
            VcpuExit::MmioWrite(address, data) => {
                count(&self.exits.memory_write);
                self.bus.memory_write(address, data);
            }
            VcpuExit::MmioRead(address, data) => {
                count(&self.exits.memory_read);
                self.bus.memory_read(address, data);
            }
            VcpuExit::IoOut(port, data) => {
                count(&self.exits.port_out);
                if let Some(end) = self.bus.port_out(port, data) {
                    return Next::Leave(end);
                }
            }
            VcpuExit::IoIn(port, data) => {
                count(&self.exits.port_in);
                self.bus.port_in(port, data);
            }
            VcpuExit::Shutdown => return Next::Leave(End::Fault(TRIPLE_FAULT.to_owned())),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => return Next::Leave(End::PowerOff),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_CRASH, _) => {
                return Next::Leave(End::Reset);
            }
            VcpuExit::Intr => return Next::Hold,
            other => return Next::Leave(End::Fault(format!("KVM cannot run the guest: {other:?}"))),
        }
        Next::Enter
    }

    /// Obeys the gate; false if this CPU must leave.
    fn hold(&mut self) -> bool {
        count(&self.exits.interrupted);
        // Before the gate is looked at: a kick after that look sets it again.
        self.fd.set_kvm_immediate_exit(0);
        self.gate.pass()
    }
}

fn interrupted(error: kvm_ioctls::Error) -> Next {
    match error.errno() {
        libc::EINTR => Next::Hold,
        // A CPU that waited for the first one to start it has been started.
        libc::EAGAIN => Next::Enter,
        _ => Next::Leave(End::Fault(format!("KVM_RUN: {error}"))),
    }
}

fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}
