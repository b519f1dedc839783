//! PCI: configuration space, MSI-X, interrupts, and where the functions on the one bus lie.

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

pub mod config;
pub mod irq;
pub mod msix;

use thiserror::Error;

/// Devices that a bus takes.
pub const SLOTS: usize = 32;
/// A page of the configuration space, a BAR.
pub const PAGE: u64 = 4096;

/// Why a device cannot be plugged in.
#[derive(Debug, Error)]
pub enum PciError {
    /// No slot is free.
    #[error("the VM has {SLOTS} devices already, which is the most there can be")]
    Full,
}

/// Where a device lies.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Its device number.
    pub slot: usize,
    /// Its BAR for registers.
    pub registers: u64,
    /// Its BAR for notifications.
    pub doorbells: u64,
}
