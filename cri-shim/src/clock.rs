//! The host's clocks, as the numbers that records and messages hold.

use nix::time::{ClockId, clock_gettime};

/// `CLOCK_REALTIME` in nanoseconds.
pub(crate) fn realtime_ns() -> i64 {
    now(ClockId::CLOCK_REALTIME)
}

/// `CLOCK_BOOTTIME` in nanoseconds, as the VMM stamps its events.
pub(crate) fn boottime_ns() -> u64 {
    u64::try_from(now(ClockId::CLOCK_BOOTTIME)).unwrap_or(0)
}

fn now(clock: ClockId) -> i64 {
    // Both clocks exist on every Linux that runs VMs.
    clock_gettime(clock).map_or(0, |time| time.tv_sec().saturating_mul(1_000_000_000).saturating_add(time.tv_nsec()))
}
