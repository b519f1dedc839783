//! An 8250 on standard output for kernels that have no better console: foreign ones, and debugging.
//!
//! It exits per byte, which is why a pod has none.

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

use std::fs::File;
use std::io::{self, Read, Stdout};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Most bytes taken from the keyboard at once; the 8250's queue takes as many.
const KEYS: usize = 16;

/// Signals the interrupt.
#[derive(Debug)]
pub struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The port, shared by the virtual CPUs and the thread that types.
#[derive(Clone)]
pub struct Port(Arc<Mutex<Serial<Interrupt, NoEvents, Stdout>>>);

impl Port {
    /// A port, and the eventfd of its interrupt.
    pub fn new() -> io::Result<(Self, EventFd)> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let serial = Serial::new(Interrupt(event.try_clone()?), io::stdout());
        Ok((Self(Arc::new(Mutex::new(serial))), event))
    }

    /// The guest reads a register.
    pub fn read(&self, register: u8) -> u8 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read(register)
    }

    /// The guest writes a register. A byte that standard output does not take is lost, as on a line nobody listens to.
    pub fn write(&self, register: u8, value: u8) {
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).write(register, value);
    }

    /// Types what comes from `input` until it ends.
    pub fn type_from(&self, mut input: File) -> io::Result<()> {
        let port = self.clone();
        let thread = move || {
            let mut keys = [0; KEYS];
            while let Ok(count @ 1..) = input.read(&mut keys) {
                let mut left = keys.get(..count).unwrap_or_default();
                while !left.is_empty() {
                    let taken = port.0.lock().unwrap_or_else(PoisonError::into_inner).enqueue_raw_bytes(left);
                    left = left.get(taken.unwrap_or(left.len())..).unwrap_or_default();
                    if !left.is_empty() {
                        // The guest is slower than whoever types.
                        thread::yield_now();
                    }
                }
            }
        };
        thread::Builder::new().name("keyboard".into()).spawn(thread).map(drop)
    }
}
