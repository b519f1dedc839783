//! The filters of the List calls: what is set must match, what is not set matches all.

use std::collections::{BTreeMap, HashMap};

use super::status::{container_state, pod_state};
use crate::cri::proto::{ContainerFilter, PodSandboxFilter};
use crate::pod::{ContainerStatus, PodStatus};

pub(in crate::cri) fn pod_matches(filter: Option<&PodSandboxFilter>, pod: &PodStatus) -> bool {
    filter.is_none_or(|filter| {
        pod.id.starts_with(&filter.id)
            && filter.state.as_ref().is_none_or(|state| state.state() == pod_state(pod.state))
            && labels_match(&filter.label_selector, &pod.spec.labels)
    })
}

pub(in crate::cri) fn container_matches(filter: Option<&ContainerFilter>, container: &ContainerStatus) -> bool {
    filter.is_none_or(|filter| {
        container.id.starts_with(&filter.id)
            && container.pod_id.starts_with(&filter.pod_sandbox_id)
            && filter.state.as_ref().is_none_or(|state| state.state() == container_state(container.state))
            && labels_match(&filter.label_selector, &container.spec.labels)
    })
}

pub(super) fn labels_match(selector: &HashMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(name, value)| labels.get(name) == Some(value))
}
