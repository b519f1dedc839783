//! How long pods took to start: each one's timeline, looked at once it runs.

use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;

use super::{Metrics, PhaseLabels, Word};
use crate::pod::{EventKind, Moment, Phase, Pods, phases, whole};

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
        for phase in phases(moments) {
            self.0.boot_phases.get_or_create(&PhaseLabels { phase: Word(phase.name) }).observe(seconds(phase));
        }
        if let Some(whole) = whole(moments) {
            self.0.boots.observe(seconds(whole));
        }
    }
}

fn seconds(phase: Phase) -> f64 {
    Duration::from_nanos(phase.to_ns.saturating_sub(phase.from_ns)).as_secs_f64()
}
