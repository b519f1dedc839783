//! How large a pod's VM is, and can become. One rule, here and nowhere else.

use serde::{Deserialize, Serialize};
use vmm_control::MOST_QUEUES;

use crate::error::{Error, Result};
use crate::pod::CoreConfig;
use crate::spec::PodSpec;

/// Guest memory is a multiple of this, so that all of it can be huge pages.
const GRAIN_BYTES: u64 = 2 << 20;
const GRAIN_MIB: u32 = 2;

/// The least memory that a guest runs in, in MiB.
const LEAST_MIB: u32 = 96;

/// The most virtual CPUs that a VMM gives a guest.
const MOST_VCPUS: u8 = 64;

/// The most memory that a VMM plugs, in MiB.
const MOST_ROOM_MIB: u32 = 1 << 20;

/// A CFS period where none is named, in µs (the kernel's default).
const DEFAULT_PERIOD: u64 = 100_000;

/// Guest memory at boot, in MiB, at most: the rest is plugged once the agent is there, so that every pod boots as fast as
/// a small one.
const BOOT_MIB: u32 = 256;

/// What is plugged at most is a multiple of this, in MiB: what KVM maps at a time, and Linux adds.
const ROOM_GRAIN_MIB: u32 = 128;

/// What a pod is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) memory_mib: u32,
    pub(crate) vcpus: u8,
}

impl Size {
    /// As far as a VM can have it: a container's limit may promise more than there is.
    pub(crate) fn at_most(self, frame: Frame) -> Self {
        Self { memory_mib: self.memory_mib.min(frame.most_mib()), vcpus: self.vcpus.min(frame.vcpus) }
    }
}

/// How a VM is made, which stays for its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Frame {
    /// Guest memory at boot, in MiB.
    pub(crate) boot_mib: u32,
    /// Guest memory that can be plugged, in MiB.
    pub(crate) room_mib: u32,
    /// Virtual CPUs, of which some may be down.
    pub(crate) vcpus: u8,
    /// Queues of the pod disk, and pairs of queues of the NIC: one for each CPU that it starts with, so that they need not wait for
    /// one another.
    #[serde(default = "one")]
    pub(crate) queues: u8,
}

fn one() -> u8 {
    1
}

/// What the host has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host {
    pub(crate) memory_bytes: u64,
    pub(crate) cpus: usize,
}

/// The size that a pod is to have.
///
/// Memory: the pod's memory limit (the sum of its containers') plus the configured guest overhead, rounded up to
/// 2 MiB, at least 96 MiB and at most what the host has, since a limit may promise more than there is. A pod without
/// a limit gets the configured default: its guest cannot use the whole host as a process could. If the limits of its
/// containers, which `containers` are in sum, come to more than either, that counts.
///
/// Virtual CPUs: the pod's CPU limit, quota by period, rounded up; without one the configured default. Never more
/// than the host's CPUs, or than the configuration says, or 64.
pub(crate) fn size(spec: &PodSpec, containers: u64, config: &CoreConfig, host: Host) -> Result<Size> {
    let for_limit = |limit: u64| {
        let wanted = limit.saturating_add(u64::from(config.guest_overhead_mib) << 20);
        let rounded = wanted.min(host.memory_bytes).next_multiple_of(GRAIN_BYTES);
        u32::try_from(rounded >> 20)
            .map_err(|_| Error::InvalidArgument(format!("a memory limit of {limit} bytes is more than a VM can have")))
    };
    let of_pod = match spec.resources.memory_limit.filter(|limit| *limit > 0) {
        None => config.default_memory_mib.next_multiple_of(GRAIN_MIB),
        Some(limit) => for_limit(limit)?,
    };
    let of_containers = if containers > 0 { for_limit(containers)? } else { 0 };
    let vcpus = match quota(spec) {
        None => config.default_vcpus,
        Some((quota, period)) => u8::try_from(quota.div_ceil(period)).unwrap_or(MOST_VCPUS),
    };
    let most = u8::try_from(host.cpus).unwrap_or(MOST_VCPUS).max(config.max_vcpus).clamp(1, MOST_VCPUS);
    Ok(Size { memory_mib: of_pod.max(of_containers).max(LEAST_MIB), vcpus: vcpus.clamp(1, most) })
}

/// How the VM of a pod is made that starts with `size`.
pub(crate) fn frame(size: Size, config: &CoreConfig, host: Host) -> Frame {
    let boot_mib = size.memory_mib.min(BOOT_MIB);
    let of_host = u32::try_from(host.memory_bytes >> 20).unwrap_or(u32::MAX);
    let most_mib = if config.max_memory_mib > 0 { config.max_memory_mib } else { of_host };
    let room_mib = most_mib.max(size.memory_mib).saturating_sub(boot_mib).min(MOST_ROOM_MIB);
    let twice = size.vcpus.saturating_mul(2).min(u8::try_from(host.cpus).unwrap_or(MOST_VCPUS));
    let most_vcpus = if config.max_vcpus > 0 { config.max_vcpus } else { twice };
    Frame {
        boot_mib,
        room_mib: room_mib.next_multiple_of(ROOM_GRAIN_MIB),
        vcpus: most_vcpus.min(MOST_VCPUS).max(size.vcpus),
        queues: size.vcpus.min(MOST_QUEUES),
    }
}

impl Frame {
    /// What is to be plugged of a pod's memory, in MiB.
    pub(crate) fn plugged_mib(self, memory_mib: u32) -> u32 {
        memory_mib.saturating_sub(self.boot_mib)
    }

    /// The most memory that a VM can have, in MiB.
    fn most_mib(self) -> u32 {
        self.boot_mib.saturating_add(self.room_mib)
    }

    /// Whether a VM that was made so can have a size.
    pub(crate) fn holds(self, size: Size) -> Result<()> {
        let most_mib = self.most_mib();
        if size.memory_mib > most_mib || size.vcpus > self.vcpus {
            return Err(Error::ResourceExhausted(format!(
                "the pod's VM can have {most_mib} MiB and {} CPUs, and would need {} MiB and {} CPUs for that: make the \
                 pod anew, and set max_memory_mib and max_vcpus in the configuration for pods that grow",
                self.vcpus, size.memory_mib, size.vcpus
            )));
        }
        Ok(())
    }
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
        size(&spec, 0, &CoreConfig::default(), HOST).expect("fits")
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
    fn containers_that_ask_for_more_than_their_pod_get_it() {
        let of = |pod: Option<u64>, containers| {
            let resources = Resources { memory_limit: pod, ..Resources::default() };
            let spec = PodSpec { resources, ..PodSpec::default() };
            size(&spec, containers, &CoreConfig::default(), HOST).expect("fits").memory_mib
        };
        assert_eq!(of(None, 100 << 20), 512);
        assert_eq!(of(None, 1 << 30), 1024 + 64);
        assert_eq!(of(Some(256 << 20), 1 << 30), 1024 + 64);
        assert_eq!(of(Some(2 << 30), 1 << 30), 2048 + 64);
    }

    #[test]
    fn every_pod_boots_small_and_has_room_to_grow() {
        let config = CoreConfig::default();
        let made = |memory_mib, vcpus| frame(Size { memory_mib, vcpus }, &config, HOST);
        assert_eq!(made(96, 1), Frame { boot_mib: 96, room_mib: 16_384, vcpus: 2, queues: 1 });
        assert_eq!(made(512, 3), Frame { boot_mib: 256, room_mib: 16_128, vcpus: 4, queues: 3 });
        assert_eq!(made(512, 4).plugged_mib(512), 256);
        assert_eq!((made(96, 1).plugged_mib(96), made(96, 1).plugged_mib(64)), (0, 0));
        let config = CoreConfig { max_memory_mib: 300, max_vcpus: 6, ..config };
        let tight = frame(Size { memory_mib: 200, vcpus: 1 }, &config, HOST);
        assert_eq!(tight, Frame { boot_mib: 200, room_mib: 128, vcpus: 6, queues: 1 });
        let large = frame(Size { memory_mib: 1000, vcpus: 8 }, &config, HOST);
        assert_eq!(large, Frame { boot_mib: 256, room_mib: 768, vcpus: 8, queues: 8 }, "what it starts with it has");
    }

    #[test]
    fn a_vm_holds_what_it_was_made_for() {
        let frame = Frame { boot_mib: 256, room_mib: 256, vcpus: 2, queues: 1 };
        let has = Size { memory_mib: 512, vcpus: 2 };
        assert!(frame.holds(has).is_ok() && frame.holds(Size { memory_mib: 96, vcpus: 1 }).is_ok());
        assert_eq!(Size { memory_mib: 1024, vcpus: 1 }.at_most(frame), Size { memory_mib: 512, vcpus: 1 });
        for more in [Size { memory_mib: 514, ..has }, Size { vcpus: 3, ..has }] {
            let refused = frame.holds(more);
            assert!(matches!(refused, Err(Error::ResourceExhausted(text)) if text.contains("make the pod anew")));
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
