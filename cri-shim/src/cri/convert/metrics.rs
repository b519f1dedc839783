//! Metrics of pods in the CRI's words.

use crate::cri::proto::{ContainerMetrics, Metric, MetricDescriptor, MetricType, PodSandboxMetrics, UInt64Value};
use crate::metrics::cadvisor::{self, Descriptor, Kind, Sample};
use crate::pod::{PodStatus, PodUsage};

pub(in crate::cri) fn metric_descriptors() -> Vec<MetricDescriptor> {
    let descriptor = |Descriptor { name, help, labels }: Descriptor| MetricDescriptor {
        name: name.to_owned(),
        help: help.to_owned(),
        label_keys: labels.into_iter().map(str::to_owned).collect(),
    };
    cadvisor::descriptors().into_iter().map(descriptor).collect()
}

/// One pod's and its running containers'.
pub(in crate::cri) fn pod_metrics(pod: &PodStatus, usage: &PodUsage) -> PodSandboxMetrics {
    let told = cadvisor::pod_metrics(pod, usage);
    let metrics = |samples: Vec<Sample>| samples.into_iter().map(|sample| metric(sample, told.at_ns)).collect();
    let container = |(container_id, samples)| ContainerMetrics { container_id, metrics: metrics(samples) };
    PodSandboxMetrics {
        pod_sandbox_id: pod.id.clone(),
        metrics: metrics(told.pod),
        container_metrics: told.containers.into_iter().map(container).collect(),
    }
}

fn metric(sample: Sample, timestamp: i64) -> Metric {
    let kind = match sample.kind {
        Kind::Counter => MetricType::Counter,
        Kind::Gauge => MetricType::Gauge,
    };
    Metric {
        name: sample.name.to_owned(),
        timestamp,
        metric_type: kind.into(),
        label_values: sample.labels,
        value: Some(UInt64Value { value: sample.value }),
    }
}
