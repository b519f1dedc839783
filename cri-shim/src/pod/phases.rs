//! The phases of a pod's start, read from its timeline.

use super::Moment;

/// The moments of a start in their order, the first of which begins it. Each other one ends a phase of its name.
const MOMENTS: [&str; 11] = [
    "asked_for",
    "begun",
    "prepared",
    "spawned",
    "vmm_started",
    "vmm_configured",
    "kernel_loaded",
    "kernel_booted",
    "agent_connected",
    "agent_ready",
    "configured",
];

/// The plugins' phase goes on beside those of the guest, from this moment on, and the last one waits for both.
const NETWORK: &str = "network_attached";
const NETWORK_BEGINS: &str = "spawned";
const LAST: &str = "configured";

/// A part of a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    /// The moment that ends it.
    pub name: &'static str,
    /// `CLOCK_BOOTTIME` in nanoseconds.
    pub from_ns: u64,
    /// The same clock, not before `from_ns`.
    pub to_ns: u64,
}

/// The whole of a start, if it came to its end.
#[must_use]
pub fn whole(moments: &[Moment]) -> Option<Phase> {
    let (from_ns, to_ns) = at(moments, MOMENTS[0]).zip(at(moments, LAST))?;
    Some(Phase { name: LAST, from_ns, to_ns: to_ns.max(from_ns) })
}

/// Each phase that is known.
#[must_use]
pub fn phases(moments: &[Moment]) -> Vec<Phase> {
    let network = at(moments, NETWORK);
    let attached = at(moments, NETWORK_BEGINS).zip(network);
    let mut phases: Vec<_> = attached.into_iter().map(|(from, to)| phase(NETWORK, from, to)).collect();
    let mut before: Option<u64> = None;
    for name in MOMENTS {
        let Some(now) = at(moments, name) else { continue };
        if name == LAST {
            before = before.max(network);
        }
        phases.extend(before.map(|before| phase(name, before, now)));
        // The VMM may run before the spawner's word of it has arrived.
        before = before.max(Some(now));
    }
    phases
}

fn phase(name: &'static str, from_ns: u64, to_ns: u64) -> Phase {
    Phase { name, from_ns, to_ns: to_ns.max(from_ns) }
}

fn at(moments: &[Moment], name: &str) -> Option<u64> {
    moments.iter().find(|moment| moment.name == name).map(|moment| moment.at_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_has_its_own_time() {
        let moment = |(name, at_ns): &(&str, u64)| Moment { name: (*name).into(), at_ns: *at_ns };
        let moments: Vec<_> = [
            ("asked_for", 10),
            ("begun", 20),
            ("vmm_started", 35),
            ("spawned", 40),
            ("kernel_booted", 100),
            ("agent_ready", 150),
            ("network_attached", 400),
            ("configured", 500),
            ("shutdown", 9000),
        ]
        .iter()
        .map(moment)
        .collect();
        let expected = [
            ("network_attached", 40, 400),
            ("begun", 10, 20),
            ("spawned", 20, 40),
            ("vmm_started", 40, 40),
            ("kernel_booted", 40, 100),
            ("agent_ready", 100, 150),
            ("configured", 400, 500),
        ];
        assert_eq!(phases(&moments), expected.map(|(name, from, to)| phase(name, from, to)));
        assert_eq!(whole(&moments), Some(phase("configured", 10, 500)));
        assert!(phases(&[]).is_empty());
        assert_eq!(whole(&moments[1..]), None);
    }
}
