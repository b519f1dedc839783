//! How long pods took to start: each one's timeline, looked at once it runs.

use tokio::sync::broadcast::error::RecvError;

use super::{Metrics, PhaseLabels, Word};
use crate::pod::{EventKind, Moment, Pods};

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

impl Metrics {
    /// Looks at every pod that starts, for as long as the runtime does.
    pub fn watch_boots(&self, pods: Pods) {
        let (metrics, mut events) = (self.clone(), pods.events());
        tokio::spawn(async move {
            loop {
                match events.recv().await {
                    Ok(event) if event.kind == EventKind::Started && event.id == event.pod.id => {
                        // A pod that is gone already has no timeline.
                        if let Ok(moments) = pods.timeline(&event.id).await {
                            metrics.booted(&moments);
                        }
                    }
                    Ok(_) => {}
                    Err(RecvError::Lagged(missed)) => tracing::warn!(missed, "boots may be missing from the metrics"),
                    Err(RecvError::Closed) => return,
                }
            }
        });
    }

    fn booted(&self, moments: &[Moment]) {
        for (phase, seconds) in phases(moments) {
            self.0.boot_phases.get_or_create(&PhaseLabels { phase: Word(phase) }).observe(seconds);
        }
        if let (Some(begin), Some(end)) = (at(moments, "asked_for"), at(moments, LAST)) {
            self.0.boots.observe(seconds(begin, end));
        }
    }
}

fn at(moments: &[Moment], name: &str) -> Option<u64> {
    moments.iter().find(|moment| moment.name == name).map(|moment| moment.at_ns)
}

fn seconds(from: u64, to: u64) -> f64 {
    std::time::Duration::from_nanos(to.saturating_sub(from)).as_secs_f64()
}

/// What each phase took that is known.
fn phases(moments: &[Moment]) -> Vec<(&'static str, f64)> {
    let mut phases = Vec::new();
    let network = at(moments, NETWORK);
    if let (Some(begin), Some(end)) = (at(moments, NETWORK_BEGINS), network) {
        phases.push((NETWORK, seconds(begin, end)));
    }
    let mut before: Option<u64> = None;
    for name in MOMENTS {
        let Some(now) = at(moments, name) else { continue };
        if name == LAST {
            before = before.max(network);
        }
        if let Some(before) = before {
            phases.push((name, seconds(before, now)));
        }
        // The VMM may run before the spawner's word of it has arrived.
        before = before.max(Some(now));
    }
    phases
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_has_its_own_time() {
        let moment = |(name, at_ms): &(&str, u64)| Moment { name: (*name).into(), at_ns: at_ms * 1_000_000 };
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
        let phases: Vec<_> = phases(&moments).into_iter().map(|(name, time)| (name, (time * 1e3).round())).collect();
        let expected = [
            ("network_attached", 360.0),
            ("begun", 10.0),
            ("spawned", 20.0),
            ("vmm_started", 0.0),
            ("kernel_booted", 60.0),
            ("agent_ready", 50.0),
            ("configured", 100.0),
        ];
        assert_eq!(phases, expected);
        assert!(super::phases(&[]).is_empty());
    }
}
