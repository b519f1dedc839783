//! `LinuxContainerResources` and [`Resources`], whose difference is that one writes 0 for "not specified".

use crate::cri::proto::LinuxContainerResources;
use crate::error::Result;
use crate::spec::Resources;

use super::invalid;

pub(in crate::cri) fn resources(wire: LinuxContainerResources) -> Result<Resources> {
    let oom_score_adj = match i32::try_from(wire.oom_score_adj) {
        Ok(adjustment @ -1000..=1000) => Some(adjustment).filter(|&adjustment| adjustment != 0),
        _ => return Err(invalid(format_args!("oom_score_adj {} is not within -1000 and 1000", wire.oom_score_adj))),
    };
    // The kubelet names every page size of the host, with 0 for what the container does not ask for.
    if let Some(huge) = wire.hugepage_limits.iter().find(|huge| huge.limit > 0) {
        let size = &huge.page_size;
        return Err(invalid(format_args!("huge pages of {size}: guests have none; remove hugepages-{size}")));
    }
    Ok(Resources {
        cpu_period: positive("cpu_period", wire.cpu_period)?,
        // A negative quota is none.
        cpu_quota: Some(wire.cpu_quota).filter(|&quota| quota > 0),
        cpu_shares: positive("cpu_shares", wire.cpu_shares)?,
        memory_limit: positive("memory_limit_in_bytes", wire.memory_limit_in_bytes)?,
        // −1 is unlimited swap, as no limit is.
        memory_swap_limit: u64::try_from(wire.memory_swap_limit_in_bytes).ok().filter(|&limit| limit > 0),
        oom_score_adj,
        cpuset_cpus: wire.cpuset_cpus,
        cpuset_mems: wire.cpuset_mems,
        pids_limit: None,
        unified: wire.unified.into_iter().collect(),
    })
}

fn positive(name: &str, value: i64) -> Result<Option<u64>> {
    let value = u64::try_from(value).map_err(|_| invalid(format_args!("{name} {value} is negative")))?;
    Ok(Some(value).filter(|&value| value > 0))
}

/// For ContainerStatus, from which the kubelet reads what was applied.
pub(super) fn wire_resources(resources: &Resources) -> LinuxContainerResources {
    let number = |value: Option<u64>| value.and_then(|value| i64::try_from(value).ok()).unwrap_or(0);
    LinuxContainerResources {
        cpu_period: number(resources.cpu_period),
        cpu_quota: resources.cpu_quota.unwrap_or(0),
        cpu_shares: number(resources.cpu_shares),
        memory_limit_in_bytes: number(resources.memory_limit),
        oom_score_adj: resources.oom_score_adj.unwrap_or(0).into(),
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        hugepage_limits: Vec::new(),
        unified: resources.unified.clone().into_iter().collect(),
        memory_swap_limit_in_bytes: number(resources.memory_swap_limit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::proto::HugepageLimit;

    #[test]
    fn limits_survive_a_round_trip() {
        let wire = LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 1 << 28,
            oom_score_adj: -997,
            cpuset_cpus: "0-1".into(),
            unified: [("memory.high".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        assert_eq!(wire_resources(&resources(wire.clone()).expect("valid")), wire);
        assert_eq!(resources(LinuxContainerResources::default()).expect("valid"), Resources::default());
    }

    #[test]
    fn nonsense_is_refused() {
        let negative = LinuxContainerResources { memory_limit_in_bytes: -1, ..Default::default() };
        assert!(resources(negative).is_err());
        let adjustment = LinuxContainerResources { oom_score_adj: 1001, ..Default::default() };
        assert!(resources(adjustment).is_err());
        let huge = |limit| LinuxContainerResources {
            hugepage_limits: vec![HugepageLimit { page_size: "2Mi".into(), limit }],
            ..Default::default()
        };
        assert!(resources(huge(1)).expect_err("refused").to_string().contains("2Mi"));
        assert!(resources(huge(0)).is_ok());
        let quota = LinuxContainerResources { cpu_quota: -1, ..Default::default() };
        assert_eq!(resources(quota).expect("valid").cpu_quota, None);
    }
}
