//! The virtual machine monitor of one pod. `main.rs` tells the story of a boot; the modules are its chapters, in
//! this order.
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

use std::fmt::Display;
use std::io::{self, Write};

pub mod config;
pub mod events;
pub mod notes;

pub mod acpi;
pub mod console;
pub mod cpu;
pub mod filter;
pub mod jail;
pub mod kvm;
pub mod loader;
pub mod memory;
pub mod mptable;

pub mod bus;
pub mod ioapic;
pub mod pci;
pub mod serial;
pub mod slots;
pub mod vcpu;
pub mod virtio;

pub mod control;
pub mod counters;
pub mod machine;
pub mod room;

/// Writes a line to the log. On a full disk it is lost, where `eprintln!` would panic and take the guest with it.
pub fn complain(text: impl Display) {
    let _ = writeln!(io::stderr(), "pericarp-vmm: {text}");
}

/// An error and all its causes in one line.
pub fn describe(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}
