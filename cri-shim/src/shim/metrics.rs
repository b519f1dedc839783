//! What a container uses, as containerd reads it of a cgroup v2 (`io.containerd.cgroups.v2.Metrics`).

use containerd_shim_protos::cgroups_v2::metrics::{CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageFull};

use crate::pod::Usage;

const NS_PER_US: u64 = 1000;

/// What there is none of is 0, as in a kernel without the controller.
pub(super) fn metrics(usage: &Usage) -> Any {
    let us = |ns: Option<u64>| ns.unwrap_or(0) / NS_PER_US;
    let limit = |value: Option<u64>| value.unwrap_or(u64::MAX);
    let (memory, working_set) = (usage.memory.unwrap_or(0), usage.working_set.unwrap_or(0));
    let metrics = Metrics {
        pids: Some(PidsStat {
            current: usage.processes.unwrap_or(0),
            // 0 is no limit here.
            limit: usage.processes_limit.unwrap_or(0),
            ..PidsStat::default()
        })
        .into(),
        cpu: Some(CPUStat {
            usage_usec: us(usage.cpu_ns),
            user_usec: us(usage.cpu_user_ns),
            system_usec: us(usage.cpu_system_ns),
            nr_periods: usage.throttling.periods.unwrap_or(0),
            nr_throttled: usage.throttling.throttled_periods.unwrap_or(0),
            throttled_usec: us(usage.throttling.throttled_ns),
            ..CPUStat::default()
        })
        .into(),
        memory: Some(MemoryStat {
            anon: usage.rss.unwrap_or(0),
            file: usage.cache.unwrap_or(0),
            file_mapped: usage.mapped_files.unwrap_or(0),
            // From which the working set is counted back.
            inactive_file: memory.saturating_sub(working_set),
            pgfault: usage.faults.unwrap_or(0),
            pgmajfault: usage.major_faults.unwrap_or(0),
            usage: memory,
            usage_limit: limit(usage.memory_limit),
            max_usage: usage.peak.unwrap_or(0),
            swap_usage: usage.swap.unwrap_or(0),
            swap_limit: limit(usage.swap_limit),
            ..MemoryStat::default()
        })
        .into(),
        memory_events: Some(MemoryEvents {
            max: usage.limit_hits.unwrap_or(0),
            oom_kill: usage.oom_kills.unwrap_or(0),
            ..MemoryEvents::default()
        })
        .into(),
        ..Metrics::default()
    };
    let value = metrics.write_to_bytes().unwrap_or_default();
    Any { type_url: Metrics::descriptor().full_name().into(), value, ..Any::default() }
}
