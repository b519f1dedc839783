//! What pods and containers use, in the CRI's words.

use std::path::Path;

use super::status::{container_metadata, map, pod_metadata};
use crate::cri::proto::{
    ContainerAttributes, ContainerStats, ContainerStatsFilter, CpuUsage, FilesystemIdentifier, FilesystemUsage,
    IoUsage, LinuxPodSandboxStats, MemoryUsage, NetworkInterfaceUsage, NetworkUsage, PodSandboxAttributes,
    PodSandboxStats, PodSandboxStatsFilter, ProcessUsage, PsiData, PsiStats, SwapUsage, UInt64Value,
};
use crate::network::INTERFACE;
use crate::pod::{ContainerState, ContainerStatus, Layer, PodStatus, PodUsage, Pressure, Stall, Traffic, Usage};

use super::filter::labels_match;

pub(in crate::cri) fn pod_stats_match(filter: Option<&PodSandboxStatsFilter>, pod: &PodStatus) -> bool {
    filter.is_none_or(|filter| pod.id.starts_with(&filter.id) && labels_match(&filter.label_selector, &pod.spec.labels))
}

/// Only what runs uses anything.
pub(in crate::cri) fn container_stats_match(filter: Option<&ContainerStatsFilter>, of: &ContainerStatus) -> bool {
    of.state == ContainerState::Running
        && filter.is_none_or(|filter| {
            of.id.starts_with(&filter.id)
                && of.pod_id.starts_with(&filter.pod_sandbox_id)
                && labels_match(&filter.label_selector, &of.spec.labels)
        })
}

/// One container's, or its attributes alone if it does not run.
pub(in crate::cri) fn container_stats(container: &ContainerStatus, pod: Option<&PodUsage>) -> ContainerStats {
    let attributes = Some(ContainerAttributes {
        id: container.id.clone(),
        metadata: Some(container_metadata(container)),
        labels: map(&container.spec.labels),
        annotations: map(&container.spec.annotations),
    });
    let Some((pod, usage)) = pod.and_then(|pod| Some((pod, pod.containers.get(&container.id)?))) else {
        return ContainerStats { attributes, ..ContainerStats::default() };
    };
    ContainerStats {
        attributes,
        cpu: Some(cpu(usage, pod.at_ns)),
        memory: Some(memory(usage, pod.at_ns)),
        writable_layer: usage.layer.map(|layer| filesystem(layer, &pod.layers_directory)),
        swap: Some(swap(usage, pod.at_ns)),
        io: Some(io(usage, pod.at_ns)),
    }
}

pub(in crate::cri) fn pod_stats(pod: &PodStatus, usage: &PodUsage) -> PodSandboxStats {
    let attributes = PodSandboxAttributes {
        id: pod.id.clone(),
        metadata: Some(pod_metadata(pod)),
        labels: map(&pod.spec.labels),
        annotations: map(&pod.spec.annotations),
    };
    let containers = pod.containers.values().filter(|container| container_stats_match(None, container));
    let process_count = value(usage.pod.processes);
    let linux = LinuxPodSandboxStats {
        cpu: Some(cpu(&usage.pod, usage.at_ns)),
        memory: Some(memory(&usage.pod, usage.at_ns)),
        network: Some(network(usage)),
        process: Some(ProcessUsage { timestamp: usage.at_ns, process_count }),
        containers: containers.map(|container| container_stats(container, Some(usage))).collect(),
        io: Some(io(&usage.pod, usage.at_ns)),
    };
    PodSandboxStats { attributes: Some(attributes), linux: Some(linux), windows: None }
}

fn filesystem(layer: Layer, directory: &Path) -> FilesystemUsage {
    FilesystemUsage {
        timestamp: layer.at_ns,
        fs_id: Some(FilesystemIdentifier { mountpoint: directory.display().to_string() }),
        used_bytes: value(Some(layer.bytes)),
        inodes_used: value(Some(layer.inodes)),
    }
}

fn value(value: Option<u64>) -> Option<UInt64Value> {
    value.map(|value| UInt64Value { value })
}

fn cpu(usage: &Usage, timestamp: i64) -> CpuUsage {
    CpuUsage {
        timestamp,
        usage_core_nano_seconds: value(usage.cpu_ns),
        usage_nano_cores: value(usage.cpu_ns_per_second),
        psi: usage.cpu_pressure.map(psi),
    }
}

fn memory(usage: &Usage, timestamp: i64) -> MemoryUsage {
    let available = usage.memory_limit.zip(usage.working_set).map(|(limit, used)| limit.saturating_sub(used));
    MemoryUsage {
        timestamp,
        working_set_bytes: value(usage.working_set),
        available_bytes: value(available),
        usage_bytes: value(usage.memory),
        rss_bytes: value(usage.rss),
        page_faults: value(usage.faults),
        major_page_faults: value(usage.major_faults),
        psi: usage.memory_pressure.map(psi),
    }
}

fn swap(usage: &Usage, timestamp: i64) -> SwapUsage {
    let available = usage.swap_limit.zip(usage.swap).map(|(limit, used)| limit.saturating_sub(used));
    SwapUsage { timestamp, swap_available_bytes: value(available), swap_usage_bytes: value(usage.swap) }
}

fn io(usage: &Usage, timestamp: i64) -> IoUsage {
    IoUsage { timestamp, psi: usage.io_pressure.map(psi) }
}

fn network(usage: &PodUsage) -> NetworkUsage {
    let interfaces = usage.traffic.iter().filter(|traffic| traffic.interface != INTERFACE);
    NetworkUsage {
        timestamp: usage.at_ns,
        default_interface: usage.traffic.iter().find(|traffic| traffic.interface == INTERFACE).map(interface),
        interfaces: interfaces.map(interface).collect(),
    }
}

fn interface(traffic: &Traffic) -> NetworkInterfaceUsage {
    NetworkInterfaceUsage {
        name: traffic.interface.clone(),
        rx_bytes: value(Some(traffic.rx_bytes)),
        rx_errors: value(Some(traffic.rx_errors)),
        tx_bytes: value(Some(traffic.tx_bytes)),
        tx_errors: value(Some(traffic.tx_errors)),
    }
}

fn psi(pressure: Pressure) -> PsiStats {
    let data =
        |stall: Stall| PsiData { total: stall.total_ns, avg10: stall.avg10, avg60: stall.avg60, avg300: stall.avg300 };
    PsiStats { full: Some(data(pressure.full)), some: Some(data(pressure.some)) }
}
