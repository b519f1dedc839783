//! What is known of pods and containers, in the CRI's words.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use super::resources::wire_resources;
use super::signal;
use crate::cri::proto::{self, ImageSpec, NamespaceMode, NamespaceOption};
use crate::pod::{ContainerState, ContainerStatus, ContainerUser, Event, EventKind, PodState, PodStatus};
use crate::spec::{IdMapping, MemoryVolume, MountSource, MountSpec, UserMappings};

pub(super) fn pod_state(state: PodState) -> proto::PodSandboxState {
    match state {
        PodState::Ready => proto::PodSandboxState::SandboxReady,
        PodState::NotReady => proto::PodSandboxState::SandboxNotready,
    }
}

pub(super) fn container_state(state: ContainerState) -> proto::ContainerState {
    match state {
        ContainerState::Created => proto::ContainerState::ContainerCreated,
        ContainerState::Running => proto::ContainerState::ContainerRunning,
        ContainerState::Exited => proto::ContainerState::ContainerExited,
    }
}

/// One line of ListPodSandbox.
pub(in crate::cri) fn pod(pod: &PodStatus) -> proto::PodSandbox {
    proto::PodSandbox {
        id: pod.id.clone(),
        metadata: Some(pod_metadata(pod)),
        state: pod_state(pod.state).into(),
        created_at: pod.created_at_ns,
        labels: map(&pod.spec.labels),
        annotations: map(&pod.spec.annotations),
        runtime_handler: pod.spec.handler.clone(),
    }
}

pub(in crate::cri) fn pod_status(pod: &PodStatus) -> proto::PodSandboxStatus {
    let mut ips = pod.ips.iter().map(IpAddr::to_string);
    let network = proto::PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| proto::PodIp { ip }).collect(),
    };
    let pid = if pod.spec.share_pid_namespace { NamespaceMode::Pod } else { NamespaceMode::Container };
    let userns_options = pod.spec.users.as_ref().map(user_namespace);
    let options = NamespaceOption { pid: pid.into(), userns_options, ..NamespaceOption::default() };
    proto::PodSandboxStatus {
        id: pod.id.clone(),
        metadata: Some(pod_metadata(pod)),
        state: pod_state(pod.state).into(),
        created_at: pod.created_at_ns,
        network: Some(network),
        linux: Some(proto::LinuxPodSandboxStatus { namespaces: Some(proto::Namespace { options: Some(options) }) }),
        labels: map(&pod.spec.labels),
        annotations: map(&pod.spec.annotations),
        runtime_handler: pod.spec.handler.clone(),
    }
}

fn user_namespace(users: &UserMappings) -> proto::UserNamespace {
    let mappings = |list: &[IdMapping]| {
        let mapping = |&IdMapping { container_id, host_id, length }: &IdMapping| proto::IdMapping {
            host_id,
            container_id,
            length,
        };
        list.iter().map(mapping).collect()
    };
    let (uids, gids) = (mappings(&users.uids), mappings(&users.gids));
    proto::UserNamespace { mode: NamespaceMode::Pod.into(), uids, gids }
}

/// One line of ListContainers.
pub(in crate::cri) fn container(container: &ContainerStatus) -> proto::Container {
    proto::Container {
        id: container.id.clone(),
        pod_sandbox_id: container.pod_id.clone(),
        metadata: Some(container_metadata(container)),
        image: Some(image(container)),
        image_ref: container.image_id.clone(),
        state: container_state(container.state).into(),
        created_at: container.created_at_ns,
        labels: map(&container.spec.labels),
        annotations: map(&container.spec.annotations),
        image_id: container.image_id.clone(),
    }
}

pub(in crate::cri) fn container_status(container: &ContainerStatus) -> proto::ContainerStatus {
    let linux = Some(wire_resources(&container.spec.resources));
    proto::ContainerStatus {
        id: container.id.clone(),
        metadata: Some(container_metadata(container)),
        state: container_state(container.state).into(),
        created_at: container.created_at_ns,
        started_at: container.started_at_ns,
        finished_at: container.finished_at_ns,
        exit_code: container.exit_code,
        image: Some(image(container)),
        image_ref: container.image_id.clone(),
        reason: container.reason.clone(),
        message: container.message.clone(),
        labels: map(&container.spec.labels),
        annotations: map(&container.spec.annotations),
        mounts: container.spec.mounts.iter().map(mount).collect(),
        log_path: container.log_path.display().to_string(),
        resources: Some(proto::ContainerResources { linux, windows: None }),
        image_id: container.image_id.clone(),
        user: container.user.as_ref().map(user),
        stop_signal: signal::wire(container.spec.stop_signal).into(),
    }
}

pub(super) fn pod_metadata(pod: &PodStatus) -> proto::PodSandboxMetadata {
    let identity = pod.spec.identity.clone();
    proto::PodSandboxMetadata {
        name: identity.name,
        uid: identity.uid,
        namespace: identity.namespace,
        attempt: identity.attempt,
    }
}

pub(super) fn container_metadata(container: &ContainerStatus) -> proto::ContainerMetadata {
    proto::ContainerMetadata { name: container.spec.name.clone(), attempt: container.spec.attempt }
}

/// The primary group is one of the supplementary ones, as other runtimes have it.
fn user(user: &ContainerUser) -> proto::ContainerUser {
    let groups: BTreeSet<i64> = user.groups.iter().chain([&user.gid]).map(|&gid| gid.into()).collect();
    let linux = proto::LinuxContainerUser {
        uid: user.uid.into(),
        gid: user.gid.into(),
        supplemental_groups: groups.into_iter().collect(),
    };
    proto::ContainerUser { linux: Some(linux) }
}

pub(in crate::cri) fn event(event: &Event) -> proto::ContainerEventResponse {
    let kind = match event.kind {
        EventKind::Created => proto::ContainerEventType::ContainerCreatedEvent,
        EventKind::Started => proto::ContainerEventType::ContainerStartedEvent,
        EventKind::Stopped => proto::ContainerEventType::ContainerStoppedEvent,
        EventKind::Deleted => proto::ContainerEventType::ContainerDeletedEvent,
    };
    proto::ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: kind.into(),
        created_at: event.at_ns,
        pod_sandbox_status: Some(pod_status(&event.pod)),
        containers_statuses: event.pod.containers.values().map(container_status).collect(),
    }
}

fn image(container: &ContainerStatus) -> ImageSpec {
    let image = container.spec.image_name.clone();
    ImageSpec { user_specified_image: image.clone(), image, ..ImageSpec::default() }
}

fn mount(mount: &MountSpec) -> proto::Mount {
    let mut wire = proto::Mount {
        container_path: mount.destination.clone(),
        readonly: mount.read_only,
        recursive_read_only: mount.recursive_read_only,
        ..proto::Mount::default()
    };
    if mount.host_to_container {
        wire.set_propagation(proto::MountPropagation::PropagationHostToContainer);
    }
    match &mount.source {
        MountSource::Host(path) | MountSource::Memory(MemoryVolume { host_path: path, .. }) => {
            wire.host_path = path.display().to_string();
        }
        MountSource::Image(id) => {
            wire.image = Some(ImageSpec { image: id.clone(), image_ref: id.clone(), ..ImageSpec::default() });
            wire.image_sub_path.clone_from(&mount.image_sub_path);
        }
        MountSource::Tmpfs { .. } => {}
    }
    wire
}

pub(super) fn map(map: &std::collections::BTreeMap<String, String>) -> HashMap<String, String> {
    map.clone().into_iter().collect()
}
