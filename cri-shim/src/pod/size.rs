//! How large a pod's VM is. One rule, here and nowhere else.

use crate::error::{Error, Result};
use crate::pod::CoreConfig;
use crate::spec::PodSpec;

/// Guest memory is a multiple of this, so that all of it can be huge pages.
const GRAIN_BYTES: u64 = 2 << 20;

/// The least memory that a guest runs in, in MiB.
const LEAST_MIB: u32 = 96;

/// The most virtual CPUs that a VMM gives a guest.
const MOST_VCPUS: u8 = 64;

/// A CFS period where none is named, in µs (the kernel's default).
const DEFAULT_PERIOD: u64 = 100_000;

/// What a VM is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) memory_mib: u32,
    pub(crate) vcpus: u8,
}

/// What the host has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host {
    pub(crate) memory_bytes: u64,
    pub(crate) cpus: usize,
}

/// The size of a pod's VM.
///
/// Memory: the pod's memory limit (the sum of its containers') plus the configured guest overhead, rounded up to
/// 2 MiB, at least 96 MiB and at most what the host has, since a limit may promise more than there is. A pod without
/// a limit gets the configured default: its guest cannot use the whole host as a process could.
///
/// Virtual CPUs: the pod's CPU limit, quota by period, rounded up; without one the configured default. Never more
/// than the host's CPUs, or 64.
pub(crate) fn size(spec: &PodSpec, config: &CoreConfig, host: Host) -> Result<Size> {
    let memory_mib = match spec.resources.memory_limit.filter(|limit| *limit > 0) {
        None => config.default_memory_mib,
        Some(limit) => {
            let wanted = limit.saturating_add(u64::from(config.guest_overhead_mib) << 20);
            let rounded = wanted.min(host.memory_bytes).next_multiple_of(GRAIN_BYTES);
            u32::try_from(rounded >> 20).map_err(|_| {
                Error::InvalidArgument(format!("a memory limit of {limit} bytes is more than a VM can have"))
            })?
        }
    };
    let vcpus = match quota(spec) {
        None => config.default_vcpus,
        Some((quota, period)) => u8::try_from(quota.div_ceil(period)).unwrap_or(MOST_VCPUS),
    };
    let most = u8::try_from(host.cpus).unwrap_or(MOST_VCPUS).clamp(1, MOST_VCPUS);
    Ok(Size { memory_mib: memory_mib.max(LEAST_MIB), vcpus: vcpus.clamp(1, most) })
}

/// Whether a VM of size `has` is large enough where one of size `wants` would be made.
pub(crate) fn fits(wants: Size, has: Size) -> Result<()> {
    if wants.memory_mib > has.memory_mib || wants.vcpus > has.vcpus {
        return Err(Error::ResourceExhausted(format!(
            "the pod's VM has {} MiB and {} CPUs, and would need {} MiB and {} CPUs for that: make the pod anew",
            has.memory_mib, has.vcpus, wants.memory_mib, wants.vcpus
        )));
    }
    Ok(())
}

/// CFS quota and period of a pod's CPU limit, in µs; `None` without a limit.
pub(crate) fn quota(spec: &PodSpec) -> Option<(u64, u64)> {
    let quota = spec.resources.cpu_quota.and_then(|quota| u64::try_from(quota).ok()).filter(|quota| *quota > 0)?;
    let period = spec.resources.cpu_period.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD);
    Some((quota, period))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Resources;

    const HOST: Host = Host { memory_bytes: 16 << 30, cpus: 4 };

    fn sized(resources: Resources) -> Size {
        let spec = PodSpec { resources, ..PodSpec::default() };
        size(&spec, &CoreConfig::default(), HOST).expect("fits")
    }

    fn memory(limit: u64) -> u32 {
        sized(Resources { memory_limit: Some(limit), ..Resources::default() }).memory_mib
    }

    fn cpus(quota: i64, period: Option<u64>) -> u8 {
        sized(Resources { cpu_quota: Some(quota), cpu_period: period, ..Resources::default() }).vcpus
    }

    #[test]
    fn a_pod_without_limits_gets_the_default() {
        assert_eq!(sized(Resources::default()), Size { memory_mib: 512, vcpus: 1 });
        assert_eq!(memory(0), 512);
        assert_eq!(cpus(-1, None), 1);
        assert_eq!(cpus(0, None), 1);
    }

    #[test]
    fn memory_is_limit_and_overhead_in_whole_huge_pages() {
        assert_eq!(memory(256 << 20), 256 + 64);
        assert_eq!(memory((256 << 20) + 1), 256 + 64 + 2);
        assert_eq!(memory(1), 96, "the least a guest runs in");
        assert_eq!(memory(1 << 40), 16 << 10, "all of the host");
        assert_eq!(memory(u64::MAX), 16 << 10);
    }

    #[test]
    fn a_vm_keeps_its_size() {
        let has = Size { memory_mib: 512, vcpus: 2 };
        assert!(fits(has, has).is_ok() && fits(Size { memory_mib: 96, vcpus: 1 }, has).is_ok());
        for more in [Size { memory_mib: 514, ..has }, Size { vcpus: 3, ..has }] {
            assert!(
                matches!(fits(more, has), Err(Error::ResourceExhausted(text)) if text.contains("make the pod anew"))
            );
        }
    }

    #[test]
    fn cpus_are_quota_by_period_rounded_up() {
        assert_eq!(cpus(50_000, None), 1);
        assert_eq!(cpus(100_001, None), 2);
        assert_eq!(cpus(30_000, Some(10_000)), 3);
        assert_eq!(cpus(i64::MAX, Some(1)), 4, "no more than the host has");
        assert_eq!(cpus(100_000, Some(0)), 1);
    }
}
