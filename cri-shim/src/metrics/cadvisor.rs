//! What pods use, under the names that cAdvisor gives it, for whoever asks for metrics of pods by the CRI.
//!
//! A kubelet with PodAndContainerStatsFromCRI serves them as /metrics/cadvisor. Values are whole numbers there (CRI
//! `Metric.value`), so what is named in seconds is in whole seconds. What the guest's kernel does not count by
//! container (open files, sockets, times of disks) is left out, not made up.

use std::sync::Arc;

use crate::pod::{ContainerState, PodStatus, PodUsage, Traffic, Transfers, Usage};
use crate::spec::ContainerSpec;

/// Labels that every metric begins with, as cAdvisor has them in a kubelet.
const LABELS: [&str; 6] = ["container", "id", "image", "name", "namespace", "pod"];

/// What stands for a container in metrics of the pod as a whole.
const POD: &str = "POD";

/// What stands for a device where a writable layer is meant.
const WRITABLE_LAYER: &str = "scratch";

const NS_PER_SECOND: u64 = 1_000_000_000;

/// Whether a metric only ever grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Counter,
    Gauge,
}

/// A metric before it has a value.
#[derive(Debug)]
pub(crate) struct Descriptor {
    pub(crate) name: &'static str,
    pub(crate) help: &'static str,
    pub(crate) labels: Vec<&'static str>,
}

/// A value of a metric.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// In the order of the descriptor's.
    pub(crate) labels: Vec<String>,
    pub(crate) value: u64,
}

/// What is told of a pod, at one moment.
#[derive(Debug)]
pub(crate) struct PodMetrics {
    /// `CLOCK_REALTIME` in nanoseconds.
    pub(crate) at_ns: i64,
    /// Of the pod as a whole.
    pub(crate) pod: Vec<Sample>,
    /// Of its running containers, by their ids.
    pub(crate) containers: Vec<(String, Vec<Sample>)>,
}

/// A value, and labels beyond those that all have.
type Samples = Vec<(Vec<String>, u64)>;

/// A metric: name, help, labels of its own, and how it is read.
struct Entry<T: ?Sized> {
    name: &'static str,
    help: &'static str,
    labels: &'static [&'static str],
    kind: Kind,
    read: fn(&T) -> Samples,
}

const fn counter<T: ?Sized>(name: &'static str, help: &'static str, read: fn(&T) -> Samples) -> Entry<T> {
    Entry { name, help, labels: &[], kind: Kind::Counter, read }
}

const fn gauge<T: ?Sized>(name: &'static str, help: &'static str, read: fn(&T) -> Samples) -> Entry<T> {
    Entry { name, help, labels: &[], kind: Kind::Gauge, read }
}

const fn labelled<T: ?Sized>(entry: &Entry<T>, labels: &'static [&'static str]) -> Entry<T> {
    Entry { labels, name: entry.name, help: entry.help, kind: entry.kind, read: entry.read }
}

/// A container and what it uses.
struct Seen {
    spec: Arc<ContainerSpec>,
    started_at_ns: i64,
    usage: Usage,
    at_ns: i64,
}

fn one(value: Option<u64>) -> Samples {
    value.map(|value| (Vec::new(), value)).into_iter().collect()
}

fn seconds(ns: Option<u64>) -> Samples {
    one(ns.map(|ns| ns / NS_PER_SECOND))
}

fn since_epoch(ns: i64) -> Samples {
    one(u64::try_from(ns).ok().map(|ns| ns / NS_PER_SECOND))
}

/// By block device, with its name of old: the guest has one disk.
fn by_device(usage: &Usage, value: fn(&Transfers) -> u64) -> Samples {
    usage.transfers.iter().map(|(device, transfers)| (vec![device.clone()], value(transfers))).collect()
}

fn device_usage(usage: &Usage) -> Samples {
    let by_operation = usage.transfers.iter().flat_map(|(device, transfers)| {
        let (major, minor) = device.split_once(':').unwrap_or((device, ""));
        [("Read", transfers.read_bytes), ("Write", transfers.written_bytes)]
            .map(|(operation, bytes)| ([device, major, minor, operation].map(str::to_owned).to_vec(), bytes))
    });
    by_operation.collect()
}

fn failures(usage: &Usage) -> Samples {
    let of = |kind: &str, value: Option<u64>| {
        let labels = [kind, "container"].map(str::to_owned).to_vec();
        value.map(|value| (labels, value))
    };
    [of("pgfault", usage.faults), of("pgmajfault", usage.major_faults)].into_iter().flatten().collect()
}

const CONTAINER: &[Entry<Seen>] = &[
    labelled(
        &counter("container_blkio_device_usage_total", "Bytes read and written by block device.", |s| {
            device_usage(&s.usage)
        }),
        &["device", "major", "minor", "operation"],
    ),
    counter("container_cpu_cfs_periods_total", "Periods of the CPU limit in which something ran.", |s| {
        one(s.usage.throttling.periods)
    }),
    counter("container_cpu_cfs_throttled_periods_total", "Periods in which the CPU limit was reached.", |s| {
        one(s.usage.throttling.throttled_periods)
    }),
    counter("container_cpu_cfs_throttled_seconds_total", "Time held up by the CPU limit.", |s| {
        seconds(s.usage.throttling.throttled_ns)
    }),
    counter("container_cpu_system_seconds_total", "CPU time of the kernel.", |s| seconds(s.usage.cpu_system_ns)),
    labelled(
        &counter("container_cpu_usage_seconds_total", "CPU time.", |s| {
            s.usage.cpu_ns.map(|ns| (vec!["total".to_owned()], ns / NS_PER_SECOND)).into_iter().collect()
        }),
        &["cpu"],
    ),
    counter("container_cpu_user_seconds_total", "CPU time of programs.", |s| seconds(s.usage.cpu_user_ns)),
    labelled(
        &counter("container_fs_reads_bytes_total", "Bytes read.", |s| by_device(&s.usage, |t| t.read_bytes)),
        &["device"],
    ),
    labelled(&counter("container_fs_reads_total", "Reads.", |s| by_device(&s.usage, |t| t.reads)), &["device"]),
    labelled(
        &gauge("container_fs_usage_bytes", "Bytes allocated in the writable layer.", |s| {
            s.usage.layer.map(|layer| (vec![WRITABLE_LAYER.to_owned()], layer.bytes)).into_iter().collect()
        }),
        &["device"],
    ),
    labelled(
        &counter("container_fs_writes_bytes_total", "Bytes written.", |s| by_device(&s.usage, |t| t.written_bytes)),
        &["device"],
    ),
    labelled(&counter("container_fs_writes_total", "Writes.", |s| by_device(&s.usage, |t| t.writes)), &["device"]),
    gauge("container_last_seen", "When the container was last looked at.", |s| since_epoch(s.at_ns)),
    gauge("container_memory_cache", "Bytes of page cache.", |s| one(s.usage.cache)),
    counter("container_memory_failcnt", "How often the memory limit was reached.", |s| one(s.usage.limit_hits)),
    labelled(
        &counter("container_memory_failures_total", "Page faults.", |s| failures(&s.usage)),
        &["failure_type", "scope"],
    ),
    gauge("container_memory_kernel_usage", "Bytes of the kernel's own memory.", |s| one(s.usage.kernel)),
    gauge("container_memory_mapped_file", "Bytes of mapped files.", |s| one(s.usage.mapped_files)),
    gauge("container_memory_max_usage_bytes", "The most bytes of memory ever used.", |s| one(s.usage.peak)),
    gauge("container_memory_rss", "Bytes of anonymous memory.", |s| one(s.usage.rss)),
    gauge("container_memory_swap", "Bytes of swap.", |s| one(Some(s.usage.swap.unwrap_or(0)))),
    gauge("container_memory_usage_bytes", "Bytes of memory, page cache included.", |s| one(s.usage.memory)),
    gauge("container_memory_working_set_bytes", "Bytes of memory that are in use.", |s| one(s.usage.working_set)),
    counter("container_oom_events_total", "Processes killed for want of memory.", |s| one(s.usage.oom_kills)),
    gauge("container_processes", "Processes, without those of execs.", |s| one(s.usage.own_processes)),
    gauge("container_spec_cpu_period", "Period of the CPU limit in µs.", |s| one(s.spec.resources.cpu_period)),
    gauge("container_spec_cpu_quota", "CPU time in each period in µs.", |s| {
        one(s.spec.resources.cpu_quota.and_then(|quota| u64::try_from(quota).ok()))
    }),
    gauge("container_spec_cpu_shares", "Weight of the container.", |s| one(s.spec.resources.cpu_shares)),
    gauge("container_spec_memory_limit_bytes", "Memory limit, 0 if there is none.", |s| {
        one(Some(s.usage.memory_limit.unwrap_or(0)))
    }),
    gauge("container_spec_memory_reservation_limit_bytes", "Soft memory limit: there is none.", |_| one(Some(0))),
    gauge("container_spec_memory_swap_limit_bytes", "Swap limit, 0 if there is none.", |s| {
        one(Some(s.usage.swap_limit.unwrap_or(0)))
    }),
    gauge("container_start_time_seconds", "When the container was started.", |s| since_epoch(s.started_at_ns)),
    gauge("container_threads", "Processes and threads.", |s| one(s.usage.processes)),
    gauge("container_threads_max", "Most of them, 0 if there is no limit.", |s| {
        one(Some(s.usage.processes_limit.unwrap_or(0)))
    }),
];

const INTERFACE: &[&str] = &["interface"];

const fn interface(name: &'static str, help: &'static str, read: fn(&[Traffic]) -> Samples) -> Entry<[Traffic]> {
    labelled(&counter(name, help, read), INTERFACE)
}

fn by_interface(traffic: &[Traffic], value: fn(&Traffic) -> u64) -> Samples {
    traffic.iter().map(|traffic| (vec![traffic.interface.clone()], value(traffic))).collect()
}

const NETWORK: &[Entry<[Traffic]>] = &[
    interface("container_network_receive_bytes_total", "Bytes received.", |t| by_interface(t, |t| t.rx_bytes)),
    interface("container_network_receive_errors_total", "Errors of receiving.", |t| by_interface(t, |t| t.rx_errors)),
    interface("container_network_receive_packets_dropped_total", "Packets dropped on their way in.", |t| {
        by_interface(t, |t| t.rx_dropped)
    }),
    interface("container_network_receive_packets_total", "Packets received.", |t| by_interface(t, |t| t.rx_packets)),
    interface("container_network_transmit_bytes_total", "Bytes sent.", |t| by_interface(t, |t| t.tx_bytes)),
    interface("container_network_transmit_errors_total", "Errors of sending.", |t| by_interface(t, |t| t.tx_errors)),
    interface("container_network_transmit_packets_dropped_total", "Packets dropped on their way out.", |t| {
        by_interface(t, |t| t.tx_dropped)
    }),
    interface("container_network_transmit_packets_total", "Packets sent.", |t| by_interface(t, |t| t.tx_packets)),
];

fn descriptor<T: ?Sized>(entry: &Entry<T>) -> Descriptor {
    let labels = LABELS.iter().chain(entry.labels).copied().collect();
    Descriptor { name: entry.name, help: entry.help, labels }
}

/// All that may be told.
pub(crate) fn descriptors() -> Vec<Descriptor> {
    CONTAINER.iter().map(descriptor).chain(NETWORK.iter().map(descriptor)).collect()
}

/// One pod's and its running containers'.
pub(crate) fn pod_metrics(pod: &PodStatus, usage: &PodUsage) -> PodMetrics {
    let labels = labels(pod, [POD, &pod.id, "", &pod.id]);
    let running = pod.containers.values().filter(|container| container.state == ContainerState::Running);
    let seen = running.filter_map(|container| {
        let (spec, started_at_ns) = (Arc::clone(&container.spec), container.started_at_ns);
        let seen =
            Seen { spec, started_at_ns, usage: usage.containers.get(&container.id)?.clone(), at_ns: usage.at_ns };
        Some((container.id.clone(), container_metrics(pod, &container.id, &seen)))
    });
    PodMetrics {
        at_ns: usage.at_ns,
        pod: NETWORK.iter().flat_map(|entry| samples(entry, &usage.traffic, &labels)).collect(),
        containers: seen.collect(),
    }
}

fn container_metrics(pod: &PodStatus, id: &str, seen: &Seen) -> Vec<Sample> {
    let labels = labels(pod, [&seen.spec.name, id, &seen.spec.image_name, id]);
    CONTAINER.iter().flat_map(|entry| samples(entry, seen, &labels)).collect()
}

/// Values of [`LABELS`]; `own` are the first four.
fn labels(pod: &PodStatus, own: [&str; 4]) -> Vec<String> {
    let identity = &pod.spec.identity;
    own.into_iter().chain([identity.namespace.as_str(), &identity.name]).map(str::to_owned).collect()
}

fn samples<T: ?Sized>(entry: &Entry<T>, of: &T, labels: &[String]) -> Vec<Sample> {
    let sample = |(own, value): (Vec<String>, u64)| Sample {
        name: entry.name,
        kind: entry.kind,
        labels: [labels, &own].concat(),
        value,
    };
    (entry.read)(of).into_iter().map(sample).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::pod::{ContainerStatus, PodState};
    use crate::spec::{PodIdentity, PodSpec};

    fn container() -> ContainerStatus {
        ContainerStatus {
            id: "c1".into(),
            pod_id: "p1".into(),
            spec: Arc::new(ContainerSpec { name: "web".into(), image_name: "nginx".into(), ..Default::default() }),
            state: ContainerState::Running,
            created_at_ns: 0,
            started_at_ns: 7_000_000_000,
            finished_at_ns: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            image_id: String::new(),
            log_path: Default::default(),
            user: None,
        }
    }

    fn pod() -> PodStatus {
        let identity = PodIdentity { name: "front".into(), namespace: "shop".into(), ..Default::default() };
        PodStatus {
            id: "p1".into(),
            spec: Arc::new(PodSpec { identity, ..Default::default() }),
            state: PodState::Ready,
            created_at_ns: 0,
            message: String::new(),
            ips: Vec::new(),
            netns: None,
            guest_kernel: String::new(),
            vmm_pid: None,
            memory_mib: 0,
            vcpus: 1,
            cgroup: String::new(),
            disks: Vec::new(),
            moments: Vec::new(),
            containers: BTreeMap::from([("c1".into(), container())]),
        }
    }

    fn usage() -> PodUsage {
        let transfers = BTreeMap::from([("254:0".into(), Transfers { read_bytes: 4096, ..Default::default() })]);
        let container = Usage { cpu_ns: Some(2_500_000_000), transfers, faults: Some(9), ..Default::default() };
        let traffic = vec![Traffic { interface: "eth0".into(), rx_bytes: 10, ..Default::default() }];
        let containers = BTreeMap::from([("c1".into(), container)]);
        PodUsage { at_ns: 9_000_000_000, containers, traffic, ..Default::default() }
    }

    #[test]
    fn every_metric_fits_its_descriptor_and_no_two_are_the_same() {
        let keys: BTreeMap<&str, usize> =
            descriptors().into_iter().map(|found| (found.name, found.labels.len())).collect();
        assert_eq!(keys.len(), CONTAINER.len() + NETWORK.len(), "names are unique");
        let told = pod_metrics(&pod(), &usage());
        let all: Vec<&Sample> = told.containers.iter().flat_map(|(_, samples)| samples).chain(&told.pod).collect();
        for sample in &all {
            assert_eq!(keys.get(sample.name), Some(&sample.labels.len()), "{}", sample.name);
        }
        let distinct: BTreeSet<_> = all.iter().map(|sample| (sample.name, &sample.labels)).collect();
        assert_eq!(distinct.len(), all.len(), "a kubelet refuses two of one name and labels");
    }

    #[test]
    fn values_are_the_guests() {
        let told = pod_metrics(&pod(), &usage());
        let find = |name: &str| {
            let all = told.containers.iter().flat_map(|(_, samples)| samples).chain(&told.pod);
            all.filter(|sample| sample.name == name).cloned().collect::<Vec<_>>()
        };
        let cpu = find("container_cpu_usage_seconds_total");
        assert_eq!(cpu[0].value, 2);
        assert_eq!(cpu[0].labels, ["web", "c1", "nginx", "c1", "shop", "front", "total"]);
        assert_eq!(find("container_fs_reads_bytes_total")[0].labels.last().expect("a device"), "254:0");
        assert_eq!(find("container_network_receive_bytes_total")[0].labels[0], POD);
        assert_eq!(find("container_start_time_seconds")[0].value, 7);
        assert!(find("container_cpu_user_seconds_total").is_empty(), "what is not known is not told");
    }
}
