//! What pods use, asked of all of them at once: one that does not answer in time is left out, not waited for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures_util::future::join_all;
use tonic::Status;

use super::proto::{ContainerStats, ContainerStatsFilter, PodSandboxMetrics, PodSandboxStats, PodSandboxStatsFilter};
use super::{Node, convert};
use crate::pod::{PodState, PodStatus, PodUsage};

pub(super) async fn container(node: &Node, id: &str) -> Result<ContainerStats, Status> {
    let container = node.pods.container(id)?;
    let usage = match convert::container_stats_match(None, &container) {
        true => Some(node.pods.usage(&container.pod_id).await?),
        false => None,
    };
    Ok(convert::container_stats(&container, usage.as_ref()))
}

pub(super) async fn containers(node: &Node, filter: Option<&ContainerStatsFilter>) -> Vec<ContainerStats> {
    let mut containers = node.pods.containers();
    containers.retain(|container| convert::container_stats_match(filter, container));
    let pods: BTreeSet<&str> = containers.iter().map(|container| container.pod_id.as_str()).collect();
    let usages: BTreeMap<String, PodUsage> = usages(node, pods.into_iter().map(str::to_owned)).await.collect();
    let known = containers.iter().filter_map(|container| Some((container, usages.get(&container.pod_id)?)));
    known.map(|(container, usage)| convert::container_stats(container, Some(usage))).collect()
}

pub(super) async fn pod(node: &Node, id: &str) -> Result<PodSandboxStats, Status> {
    let pod = node.pods.pod(id)?;
    Ok(convert::pod_stats(&pod, &node.pods.usage(&pod.id).await?))
}

pub(super) async fn pods(node: &Node, filter: Option<&PodSandboxStatsFilter>) -> Vec<PodSandboxStats> {
    let told = ready(node, |pod| convert::pod_stats_match(filter, pod)).await;
    told.iter().map(|(pod, usage)| convert::pod_stats(pod, usage)).collect()
}

/// Of pods that are ready, as cAdvisor would tell it.
pub(super) async fn metrics(node: &Node) -> Vec<PodSandboxMetrics> {
    ready(node, |_| true).await.iter().map(|(pod, usage)| convert::pod_metrics(pod, usage)).collect()
}

/// Pods that are ready, with what they use; those that do not answer are left out.
async fn ready(node: &Node, wanted: impl Fn(&PodStatus) -> bool) -> Vec<(Arc<PodStatus>, PodUsage)> {
    let matching = |pod: &Arc<PodStatus>| pod.state == PodState::Ready && wanted(pod);
    let pods: BTreeMap<_, _> = node.pods.pods().into_iter().filter(matching).map(|pod| (pod.id.clone(), pod)).collect();
    let told = usages(node, pods.keys().cloned()).await;
    told.filter_map(|(id, usage)| Some((Arc::clone(pods.get(&id)?), usage))).collect()
}

async fn usages(node: &Node, pods: impl Iterator<Item = String>) -> impl Iterator<Item = (String, PodUsage)> {
    let asked = pods.map(|id| async move {
        let usage = node.pods.usage(&id).await;
        if let Err(error) = &usage {
            tracing::debug!(pod = id, %error, "a pod does not tell what it uses");
        }
        Some((id, usage.ok()?))
    });
    join_all(asked).await.into_iter().flatten()
}
