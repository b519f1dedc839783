//! RunPodSandbox: from `PodSandboxConfig` to [`PodSpec`].

use std::path::PathBuf;

use super::resources::resources;
use super::security::check_selinux;
use super::{invalid, required};
use crate::cri::proto::{
    DnsConfig, IdMapping as WireMapping, LinuxPodSandboxConfig, NamespaceMode, NamespaceOption, PodSandboxConfig,
    PodSandboxMetadata, PortMapping as WirePort, Protocol,
};
use crate::error::Result;
use crate::spec::{Dns, IdMapping, NetworkSource, PodIdentity, PodSpec, PortMapping, UserMappings};

/// `known` is the one handler there is, beside the empty name.
pub(in crate::cri) fn pod_spec(config: PodSandboxConfig, handler: &str, known: &str) -> Result<PodSpec> {
    if !handler.is_empty() && handler != known {
        return Err(invalid(format_args!(
            "there is no runtime handler {handler:?}, only {known:?}: correct the runtime class"
        )));
    }
    if config.windows.is_some() {
        return Err(invalid("this runtime runs Linux pods only: remove the windows section"));
    }
    let metadata = required(config.metadata, "metadata")?;
    if metadata.name.is_empty() {
        return Err(invalid("the pod's metadata has no name"));
    }
    let linux = config.linux.unwrap_or_default();
    check_selinux(linux.security_context.as_ref().and_then(|context| context.selinux_options.as_ref()))?;
    let namespaces = linux.security_context.as_ref().and_then(|context| context.namespace_options.clone());
    let namespaces = namespaces.unwrap_or_default();
    check_namespaces(&namespaces)?;
    let users = users(&namespaces)?;
    let LinuxPodSandboxConfig { cgroup_parent, sysctls, overhead, resources: limits, .. } = linux;
    Ok(PodSpec {
        identity: identity(&metadata),
        labels: config.labels.into_iter().collect(),
        annotations: config.annotations.into_iter().collect(),
        handler: handler.to_owned(),
        hostname: config.hostname,
        log_directory: (!config.log_directory.is_empty()).then(|| PathBuf::from(config.log_directory)),
        dns: config.dns_config.and_then(dns),
        port_mappings: config.port_mappings.iter().map(port_mapping).collect::<Result<_>>()?,
        sysctls: sysctls.into_iter().collect(),
        cgroup_parent,
        resources: resources(limits.unwrap_or_default())?,
        overhead: resources(overhead.unwrap_or_default())?,
        share_pid_namespace: namespaces.pid() == NamespaceMode::Pod,
        network: NetworkSource::Cni,
        users,
    })
}

/// Who the pod is.
pub(in crate::cri) fn identity(metadata: &PodSandboxMetadata) -> PodIdentity {
    let PodSandboxMetadata { name, uid, namespace, attempt } = metadata.clone();
    PodIdentity { name, namespace, uid, attempt }
}

/// Refuses the host's namespaces that a guest cannot have. The host's processes (hostPID) become the guest's own.
pub(super) fn check_namespaces(namespaces: &NamespaceOption) -> Result<()> {
    let refuse = |what: &str| {
        Err(invalid(format_args!(
            "a pod in a virtual machine of its own cannot have {what}: remove it, or give the pod another runtime class"
        )))
    };
    if namespaces.network() == NamespaceMode::Node {
        return refuse("hostNetwork");
    }
    if namespaces.ipc() == NamespaceMode::Node {
        return refuse("hostIPC");
    }
    Ok(())
}

/// The user namespace asked for; `None` is the guest's own, which no other pod shares either.
pub(super) fn users(namespaces: &NamespaceOption) -> Result<Option<UserMappings>> {
    let Some(asked) = &namespaces.userns_options else { return Ok(None) };
    match asked.mode() {
        NamespaceMode::Node => Ok(None),
        NamespaceMode::Pod => user_mappings(&asked.uids, &asked.gids).map(Some),
        NamespaceMode::Container | NamespaceMode::Target => {
            Err(invalid("a user namespace is a pod's: its mode is POD (hostUsers: false) or NODE (hostUsers: true)"))
        }
    }
}

/// One run each of users and groups, from 0 on, as the kubelet gives it and the CRI's runtimes take it.
pub(super) fn user_mappings(uids: &[WireMapping], gids: &[WireMapping]) -> Result<UserMappings> {
    let one = |what: &str, list: &[WireMapping]| match list {
        [WireMapping { host_id, container_id: 0, length }] if *length > 0 && host_id.checked_add(*length).is_some() => {
            Ok(vec![IdMapping { container_id: 0, host_id: *host_id, length: *length }])
        }
        [WireMapping { host_id, container_id, length }] => Err(invalid(format_args!(
            "mapping of {what} {container_id} to {host_id}, {length} of them: it must begin at 0 in the container and fit"
        ))),
        _ => Err(invalid(format_args!("a user namespace has one mapping of {what}, not {}", list.len()))),
    };
    Ok(UserMappings { uids: one("users", uids)?, gids: one("groups", gids)? })
}

/// Without a single line there is nothing to say, and the host's own resolv.conf is used.
fn dns(config: DnsConfig) -> Option<Dns> {
    let DnsConfig { servers, searches, options } = config;
    let empty = servers.is_empty() && searches.is_empty() && options.is_empty();
    (!empty).then_some(Dns { servers, searches, options })
}

fn port_mapping(port: &WirePort) -> Result<PortMapping> {
    let protocol = match port.protocol() {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    };
    let number = |port: i32| u16::try_from(port).map_err(|_| invalid(format_args!("{port} is not a port number")));
    let host_ip = match port.host_ip.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| invalid(format_args!("host_ip {text:?} is not an IP address")))?),
    };
    Ok(PortMapping {
        protocol: protocol.to_owned(),
        container_port: number(port.container_port)?,
        host_port: number(port.host_port)?,
        host_ip,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::proto::{LinuxContainerResources, LinuxSandboxSecurityContext, PodSandboxMetadata, UserNamespace};
    use crate::error::Error;

    fn config() -> PodSandboxConfig {
        let metadata = PodSandboxMetadata { name: "web".into(), namespace: "ns".into(), uid: "u".into(), attempt: 2 };
        PodSandboxConfig { metadata: Some(metadata), ..PodSandboxConfig::default() }
    }

    fn with_namespaces(set: impl FnOnce(&mut NamespaceOption)) -> PodSandboxConfig {
        let mut options = NamespaceOption::default();
        set(&mut options);
        let context = LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        let linux = LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
        PodSandboxConfig { linux: Some(linux), ..config() }
    }

    fn refusal(config: PodSandboxConfig) -> String {
        match pod_spec(config, "", "pericarp") {
            Err(Error::InvalidArgument(text)) => text,
            other => panic!("not refused: {other:?}"),
        }
    }

    #[test]
    fn a_plain_pod_keeps_what_it_says() {
        let mut config = config();
        config.log_directory = "/var/log/pods/web".into();
        config.labels.insert("a".into(), "b".into());
        config.port_mappings =
            vec![WirePort { protocol: 1, container_port: 53, host_port: 5353, ..Default::default() }];
        let limits = LinuxContainerResources { memory_limit_in_bytes: 1 << 30, ..Default::default() };
        config.linux = Some(LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/pod1".into(),
            resources: Some(limits),
            ..Default::default()
        });
        let spec = pod_spec(config, "pericarp", "pericarp").expect("valid");
        assert_eq!((spec.identity.name.as_str(), spec.identity.attempt), ("web", 2));
        assert_eq!(spec.log_directory, Some("/var/log/pods/web".into()));
        let port = &spec.port_mappings[0];
        assert_eq!((port.protocol.as_str(), port.host_port, port.container_port), ("udp", 5353, 53));
        assert_eq!(spec.resources.memory_limit, Some(1 << 30));
        assert_eq!(spec.cgroup_parent, "/kubepods/pod1");
        // An absent NamespaceOption has its zero value, which is POD.
        assert!(spec.share_pid_namespace);
        assert_eq!(spec.dns, None);
    }

    #[test]
    fn what_no_vm_can_have_is_refused_with_advice() {
        let network = refusal(with_namespaces(|n| n.set_network(NamespaceMode::Node)));
        assert!(network.contains("hostNetwork") && network.contains("runtime class"), "{network}");
        assert!(refusal(with_namespaces(|n| n.set_ipc(NamespaceMode::Node))).contains("hostIPC"));
        let host_pid = pod_spec(with_namespaces(|n| n.set_pid(NamespaceMode::Node)), "", "pericarp").expect("valid");
        assert!(!host_pid.share_pid_namespace);
    }

    #[test]
    fn a_user_namespace_has_one_mapping_that_begins_at_root() {
        let mapping = |container_id, host_id, length| WireMapping { container_id, host_id, length };
        let with = |mode: NamespaceMode, list: &[WireMapping]| {
            let users = UserNamespace { mode: mode.into(), uids: list.to_vec(), gids: list.to_vec() };
            with_namespaces(|n| n.userns_options = Some(users))
        };
        let good = mapping(0, 1000, 100_000);
        let spec = pod_spec(with(NamespaceMode::Pod, &[good]), "", "pericarp").expect("valid");
        let expected = vec![IdMapping { container_id: 0, host_id: 1000, length: 100_000 }];
        assert_eq!(spec.users, Some(UserMappings { uids: expected.clone(), gids: expected }));
        let node = pod_spec(with(NamespaceMode::Node, &[]), "", "pericarp").expect("valid");
        assert_eq!(node.users, None);
        let bad: [&[WireMapping]; 5] =
            [&[], &[good, good], &[mapping(1, 1000, 9)], &[mapping(0, 1000, 0)], &[mapping(0, u32::MAX, 2)]];
        for list in bad {
            assert!(refusal(with(NamespaceMode::Pod, list)).contains("mapping"), "{list:?}");
        }
        for mode in [NamespaceMode::Container, NamespaceMode::Target] {
            assert!(refusal(with(mode, &[good])).contains("hostUsers"), "{mode:?}");
        }
    }

    #[test]
    fn an_unknown_handler_is_refused_with_the_known_one() {
        let error = pod_spec(config(), "runc", "pericarp").expect_err("unknown").to_string();
        assert!(error.contains("runc") && error.contains("pericarp"), "{error}");
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(refusal(PodSandboxConfig::default()).contains("metadata"));
        let mut bad = config();
        bad.port_mappings = vec![WirePort { host_port: 70_000, ..Default::default() }];
        assert!(refusal(bad).contains("70000"));
        let mut bad = config();
        bad.port_mappings = vec![WirePort { host_ip: "nowhere".into(), ..Default::default() }];
        assert!(refusal(bad).contains("nowhere"));
    }
}
