//! The gate in every order in which threads can take their steps (loom).

mod sync {
    pub(super) use loom::sync::{Condvar, Mutex, MutexGuard};
}
#[path = "gate.rs"]
#[expect(clippy::duplicate_mod, reason = "the same code with loom's locks")]
mod gate;

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::{Arc, Notify};
use loom::thread;

use self::gate::{Gate, Phase};

/// A CPU without a guest.
struct Cpu {
    /// The signal that ends `KVM_RUN`, or keeps it from beginning.
    kick: Notify,
    in_guest: AtomicBool,
}

impl Cpu {
    fn new() -> Self {
        Self { kick: Notify::new(), in_guest: AtomicBool::new(false) }
    }

    /// The loop of `Vcpu::work`.
    fn work(&self, gate: &Gate) {
        loop {
            self.in_guest.store(true, Ordering::SeqCst);
            self.kick.wait();
            self.in_guest.store(false, Ordering::SeqCst);
            if !gate.pass() {
                break;
            }
        }
    }
}

fn model(cpus: usize, main: impl Fn(&Gate, &[Arc<Cpu>]) + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(move || {
        let gate = Arc::new(Gate::new());
        let cpus: Vec<_> = (0..cpus).map(|_| Arc::new(Cpu::new())).collect();
        let start = |cpu: &Arc<Cpu>| {
            let (cpu, gate) = (Arc::clone(cpu), Arc::clone(&gate));
            thread::spawn(move || cpu.work(&gate))
        };
        let threads: Vec<_> = cpus.iter().map(start).collect();
        main(&gate, &cpus);
        set(&gate, &cpus, Phase::End);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

fn set(gate: &Gate, cpus: &[Arc<Cpu>], phase: Phase) {
    gate.set(phase);
    cpus.iter().for_each(|cpu| cpu.kick.notify());
}

fn pause(gate: &Gate, cpus: &[Arc<Cpu>]) {
    set(gate, cpus, Phase::Pause);
    assert!(gate.wait_for(cpus.len()));
    assert!(!cpus.iter().any(|cpu| cpu.in_guest.load(Ordering::SeqCst)), "a CPU runs while all are paused");
}

#[test]
fn no_cpu_runs_while_all_are_paused() {
    model(2, pause);
}

#[test]
fn a_pause_right_after_another_is_one_too() {
    model(1, |gate, cpus| {
        pause(gate, cpus);
        // Nobody is kicked: they wait for the gate.
        gate.set(Phase::Run);
        pause(gate, cpus);
    });
}

#[test]
fn cpus_that_are_to_end_do() {
    model(2, |_, _| {});
}
