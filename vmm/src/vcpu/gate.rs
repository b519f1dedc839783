//! What holds virtual CPUs between two entries into the guest: the main thread changes it, their threads obey.
//!
//! ```text
//! Run ──set──▶ Pause ──set──▶ Run        any ──set──▶ End, for good
//! ```
//!
//! Its locks are those of the module above, so that the tests can take loom's, under which they see every order of steps.

use std::sync::PoisonError;
use std::time::Duration;

use super::sync::{Condvar, Mutex, MutexGuard};

/// Longest wait for one more virtual CPU to stop; each is either in `KVM_RUN` or in one short access.
const PATIENCE: Duration = Duration::from_secs(5);

/// What virtual CPUs may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Run,
    Pause,
    End,
}

#[derive(Debug)]
struct Held {
    phase: Phase,
    /// CPUs that have stopped.
    count: usize,
}

#[derive(Debug)]
pub(super) struct Gate {
    held: Mutex<Held>,
    changed: Condvar,
}

impl Gate {
    /// Open.
    pub(super) fn new() -> Self {
        Self { held: Mutex::new(Held { phase: Phase::Run, count: 0 }), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Each CPU has to be kicked after this.
    pub(super) fn set(&self, phase: Phase) {
        self.lock().phase = phase;
        self.changed.notify_all();
    }

    /// Called by a CPU that was kicked: waits while the gate is closed; false if the CPU must leave.
    pub(super) fn pass(&self) -> bool {
        let mut held = self.lock();
        if held.phase == Phase::Run {
            return true;
        }
        held.count = held.count.saturating_add(1);
        self.changed.notify_all();
        while held.phase == Phase::Pause {
            held = self.changed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        let run = held.phase == Phase::Run;
        if run {
            held.count = held.count.saturating_sub(1);
        }
        run
    }

    /// Waits until `cpus` of them have stopped; false if they do not in time.
    pub(super) fn wait_for(&self, cpus: usize) -> bool {
        let mut held = self.lock();
        let mut patient = true;
        while patient && held.count < cpus {
            let waited = self.changed.wait_timeout(held, PATIENCE).unwrap_or_else(PoisonError::into_inner);
            patient = !waited.1.timed_out();
            held = waited.0;
        }
        held.count >= cpus
    }
}
