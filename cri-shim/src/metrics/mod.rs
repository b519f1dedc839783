//! What the daemon counts, in the OpenMetrics text format, for Prometheus or whoever reads it.
//!
//! ```text
//! calls, boots, pulls ──count──▶ [Metrics]  since the daemon began
//! pods, images, VMs ───look───▶ [snapshot]  as they are when somebody asks
//!                                   └──▶ [server]: GET /metrics
//! ```
//! Nothing here decides anything, and nobody who is counted waits for it. Every name of a label's value that comes from
//! outside is one of a known few, except for the names of pods that run.

mod boots;
pub(crate) mod cadvisor;
pub mod server;
mod snapshot;

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::image::Store;
use crate::pod::Pods;

/// Before every name.
const PREFIX: &str = "pericarp";

/// First bound of the histograms of times, in seconds, the factor to the next, and how many: up to 65 s.
const SHORTEST: f64 = 0.001;
const FACTOR: f64 = 2.0;
const BOUNDS: u16 = 17;

/// Of which a snapshot is told.
#[derive(Clone)]
pub struct Sources {
    /// Pods and their VMs.
    pub pods: Pods,
    /// Images.
    pub images: Store,
}

/// Where things are counted. Cheap to clone; every clone counts in the same place.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Counters>);

#[derive(Debug)]
struct Counters {
    registry: Registry,
    calls: Family<CallLabels, Counter>,
    call_seconds: Family<CallName, Histogram>,
    boots: Histogram,
    boot_phases: Family<PhaseLabels, Histogram>,
    pulls: Family<ResultLabels, Counter>,
    pull_seconds: Histogram,
}

/// One of a known few.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Word(&'static str);

impl EncodeLabelValue for Word {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.0.encode(encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    call: Word,
    code: Word,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallName {
    call: Word,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabels {
    phase: Word,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: Word,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    version: Word,
}

fn times() -> Histogram {
    Histogram::new(exponential_buckets(SHORTEST, FACTOR, BOUNDS))
}

impl Default for Metrics {
    fn default() -> Self {
        let mut counters = Counters {
            registry: Registry::with_prefix(PREFIX),
            calls: Family::default(),
            call_seconds: Family::new_with_constructor(times),
            boots: times(),
            boot_phases: Family::new_with_constructor(times),
            pulls: Family::default(),
            pull_seconds: times(),
        };
        let registry = &mut counters.registry;
        // The format's own suffixes, `_total` and `_info`, are added when it is written.
        registry.register("cri_calls", "Calls of the CRI by name and gRPC code", counters.calls.clone());
        let seconds = "Time from a call of the CRI to its answer; of streams, to the first part";
        registry.register("cri_call_seconds", seconds, counters.call_seconds.clone());
        let boots = "Time from a pod's being asked for to its guest's being configured";
        registry.register("boot_seconds", boots, counters.boots.clone());
        let phases = "Time that each phase of a pod's start took; network_attached goes on beside the others";
        registry.register("boot_phase_seconds", phases, counters.boot_phases.clone());
        registry.register("image_pulls", "Pulls of images by result", counters.pulls.clone());
        let seconds = "Time from a pull's being asked for to its end, of images already there too";
        registry.register("image_pull_seconds", seconds, counters.pull_seconds.clone());
        let build = Info::new(BuildLabels { version: Word(env!("CARGO_PKG_VERSION")) });
        registry.register("build", "This program", build);
        Self(Arc::new(counters))
    }
}

impl Metrics {
    /// A call has been answered, or has been given up.
    pub(crate) fn called(&self, call: &'static str, code: &'static str, took: Duration) {
        self.0.calls.get_or_create(&CallLabels { call: Word(call), code: Word(code) }).inc();
        self.0.call_seconds.get_or_create(&CallName { call: Word(call) }).observe(took.as_secs_f64());
    }

    /// A pull has ended. `result` is one of a known few.
    pub(crate) fn pulled(&self, result: &'static str, took: Duration) {
        self.0.pulls.get_or_create(&ResultLabels { result: Word(result) }).inc();
        self.0.pull_seconds.observe(took.as_secs_f64());
    }

    /// All there is to tell.
    async fn text(&self, sources: &Sources) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode_registry(&mut text, &self.0.registry)?;
        encode_registry(&mut text, &snapshot::take(sources).await)?;
        encode_eof(&mut text)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_told() {
        let metrics = Metrics::default();
        metrics.called("Version", "OK", Duration::from_millis(3));
        metrics.clone().called("Version", "OK", Duration::from_millis(3));
        metrics.pulled("not_found", Duration::ZERO);
        let mut text = String::new();
        encode_registry(&mut text, &metrics.0.registry).expect("text");
        for line in [
            "pericarp_cri_calls_total{call=\"Version\",code=\"OK\"} 2",
            "pericarp_cri_call_seconds_bucket{le=\"0.004\",call=\"Version\"} 2",
            "pericarp_image_pulls_total{result=\"not_found\"} 1",
            "pericarp_boot_seconds_count 0",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} in {text}");
        }
    }
}
