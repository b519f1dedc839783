//! What there is at the moment that somebody asks: nothing to keep up, so nothing that could be out of date.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::{PREFIX, Sources, Word};
use crate::pod::{ContainerState, PodState, PodStatus};

/// Longest wait for one VMM's counters. A VMM that hangs is missing from the answer, which comes all the same.
const VMM_LIMIT: Duration = Duration::from_secs(1);

/// VMMs asked at a time.
const AT_ONCE: usize = 32;

/// KVM's own count of a guest's exits, as the VMM calls it, and what the exits that reached the VMM begin with.
const ALL_EXITS: &str = "kvm.exits";
const VMM_EXIT: &str = "exit.";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: Word,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CauseLabels {
    cause: Word,
}

/// The id too, since a name may be given anew before its last owner is gone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PodLabels {
    namespace: String,
    pod: String,
    id: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ExitLabels {
    namespace: String,
    pod: String,
    id: String,
    reason: String,
}

/// Looks at everything once.
pub(super) async fn take(sources: &Sources) -> Registry {
    let mut registry = Registry::with_prefix(PREFIX);
    let pods = sources.pods.pods();
    count_pods(&mut registry, &pods);
    count_ends(&mut registry, sources.pods.vm_ends());
    count_exits(&mut registry, sources, &pods).await;
    count_images(&mut registry, sources).await;
    registry
}

fn count_pods(registry: &mut Registry, pods: &[Arc<PodStatus>]) {
    let (by_state, containers) = (Family::<StateLabels, Gauge>::default(), Family::<StateLabels, Gauge>::default());
    let state = |word| StateLabels { state: Word(word) };
    // Those of which there are none too: what is missing cannot be compared with.
    for word in ["ready", "not_ready"] {
        drop(by_state.get_or_create(&state(word)));
    }
    for word in ["created", "running", "exited"] {
        drop(containers.get_or_create(&state(word)));
    }
    let (mut memory_mib, mut vcpus) = (0_i64, 0_i64);
    for pod in pods {
        let word = match pod.state {
            PodState::Ready => "ready",
            PodState::NotReady => "not_ready",
        };
        by_state.get_or_create(&state(word)).inc();
        for container in pod.containers.values() {
            let word = match container.state {
                ContainerState::Created => "created",
                ContainerState::Running => "running",
                ContainerState::Exited => "exited",
            };
            containers.get_or_create(&state(word)).inc();
        }
        if pod.vmm_pid.is_some() {
            memory_mib = memory_mib.saturating_add(pod.memory_mib.into());
            vcpus = vcpus.saturating_add(pod.vcpus.into());
        }
    }
    registry.register("pods", "Pods by state", by_state);
    registry.register("containers", "Containers by state", containers);
    let gauge = |value: i64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(value);
        gauge
    };
    let memory = "Memory of the VMs that run, as their guests see it";
    registry.register("guest_memory_bytes", memory, gauge(memory_mib.saturating_mul(1 << 20)));
    registry.register("guest_cpus", "Virtual CPUs of the VMs that run", gauge(vcpus));
}

fn count_ends(registry: &mut Registry, ends: BTreeMap<&'static str, u64>) {
    let family = Family::<CauseLabels, Counter>::default();
    for (cause, count) in ends {
        family.get_or_create(&CauseLabels { cause: Word(cause) }).inc_by(count);
    }
    registry.register(
        "vm_ends",
        "VMs that have ended, by why; guest_poweroff is how a pod that is stopped ends",
        family,
    );
}

async fn count_exits(registry: &mut Registry, sources: &Sources, pods: &[Arc<PodStatus>]) {
    let running: Vec<_> = pods.iter().filter(|pod| pod.vmm_pid.is_some()).cloned().collect();
    let ask = |pod: Arc<PodStatus>| async move {
        let counters = tokio::time::timeout(VMM_LIMIT, sources.pods.counters(&pod.id)).await;
        counters.ok().and_then(Result::ok).map(|counters| (pod, counters))
    };
    let answers: Vec<_> = stream::iter(running).map(ask).buffer_unordered(AT_ONCE).collect().await;
    let (all, of_vmm) = (Family::<PodLabels, Counter>::default(), Family::<ExitLabels, Counter>::default());
    for (pod, counters) in answers.into_iter().flatten() {
        let (namespace, name) = (pod.spec.identity.namespace.clone(), pod.spec.identity.name.clone());
        for (counter, count) in counters {
            let (namespace, pod, id) = (namespace.clone(), name.clone(), pod.id.clone());
            if counter == ALL_EXITS {
                all.get_or_create(&PodLabels { namespace, pod, id }).inc_by(count);
            } else if let Some(reason) = counter.strip_prefix(VMM_EXIT) {
                let reason = reason.to_owned();
                of_vmm.get_or_create(&ExitLabels { namespace, pod, id, reason }).inc_by(count);
            }
        }
    }
    registry.register("vm_exits", "Exits of each guest that runs, as KVM counts them", all);
    let text = "Exits that KVM left to the VMM, by reason";
    registry.register("vmm_exits", text, of_vmm);
}

async fn count_images(registry: &mut Registry, sources: &Sources) {
    let images = sources.images.clone();
    // Files are looked at.
    let looked = tokio::task::spawn_blocking(move || Some((images.list().ok()?.len(), images.fs_info().ok()?))).await;
    let Some((count, usage)) = looked.ok().flatten() else { return };
    let gauge = |value: u64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        gauge
    };
    registry.register("images", "Images in the store", gauge(u64::try_from(count).unwrap_or(u64::MAX)));
    registry.register("image_store_bytes", "Bytes that the image store takes on its disk", gauge(usage.used_bytes));
    registry.register("image_store_files", "Files of the image store", gauge(usage.used_inodes));
}
