//! From OCI specifications to what the core is asked for.

use std::fs;
use std::path::Path;

use containerd_shim_protos::types::mount::Mount;

use super::bundle::{Bundle, Role};
use super::oci;
use crate::error::{Error, Result};
use crate::spec::{
    Capabilities, ContainerSpec, DeviceSpec, IdMapping, MountSource, MountSpec, NetworkSource, PidNamespace,
    PodIdentity, PodSpec, ProcessSpec, Resources, Rootfs, UserMappings,
};
use crate::{defaults, seccomp, snapshot};

/// Of annotations that containerd's CRI gives a sandbox.
const ANNOTATION: &str = "io.kubernetes.cri.sandbox-";

/// File systems that every container in a guest has anyway.
const STANDARD: [&str; 6] = ["proc", "sysfs", "cgroup", "cgroup2", "mqueue", "devpts"];

/// AppArmor profiles that containers have without asking.
const DEFAULT_PROFILES: [&str; 4] = ["unconfined", "cri-containerd.apparmor.d", "nerdctl-default", "docker-default"];

fn invalid(text: impl std::fmt::Display) -> Error {
    Error::InvalidArgument(text.to_string())
}

/// The pod that a sandbox or a container alone stands for.
pub(super) fn pod_spec(bundle: &Bundle, id: &str) -> Result<PodSpec> {
    let oci::Spec { hostname, linux, annotations, .. } = &bundle.spec;
    let note = |name: &str| annotations.get(&format!("{ANNOTATION}{name}")).cloned().unwrap_or_default();
    let name = Some(note("name")).filter(|name| !name.is_empty()).unwrap_or_else(|| id.to_owned());
    let asked = match bundle.role() {
        // Its own limits are those of a process that there is none of.
        Role::Sandbox => Resources {
            memory_limit: note("memory").parse().ok().filter(|&bytes| bytes > 0),
            cpu_period: note("cpu-period").parse().ok().filter(|&period| period > 0),
            cpu_quota: note("cpu-quota").parse().ok().filter(|&quota| quota > 0),
            cpu_shares: note("cpu-shares").parse().ok().filter(|&shares| shares > 0),
            ..Resources::default()
        },
        Role::Alone | Role::Member => resources(&linux.resources),
    };
    Ok(PodSpec {
        identity: PodIdentity { name, namespace: note("namespace"), uid: note("uid"), attempt: 0 },
        annotations: annotations.clone(),
        hostname: if hostname.is_empty() { hosts_name() } else { hostname.clone() },
        sysctls: linux.sysctl.clone(),
        cgroup_parent: cgroup_parent(&linux.cgroups_path),
        resources: asked,
        // Those that want it say so one by one.
        share_pid_namespace: true,
        network: network(&linux.namespaces)?,
        users: users(linux)?,
        ..PodSpec::default()
    })
}

/// What a container that names none has with other runtimes, and what containerd writes into its `/etc/hostname`.
fn hosts_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// The group in which the container's would be.
fn cgroup_parent(path: &str) -> String {
    // SLICE:PREFIX:NAME is systemd's way, which the core refuses in its own words.
    if let Some((slice, _)) = path.split_once(':') {
        return slice.to_owned();
    }
    match Path::new(path).parent() {
        Some(parent) if parent != Path::new("/") && parent != Path::new("") => parent.display().to_string(),
        _ => String::new(),
    }
}

fn network(namespaces: &[oci::Namespace]) -> Result<NetworkSource> {
    let refusal = |what: &str| {
        invalid(format_args!(
            "a pod in a virtual machine of its own cannot have {what}: remove it, or give the pod another runtime"
        ))
    };
    let find = |kind: &str| namespaces.iter().find(|namespace| namespace.kind == kind);
    if find("ipc").is_none() {
        return Err(refusal("hostIPC"));
    }
    match find("network") {
        None => Err(refusal("hostNetwork")),
        Some(namespace) if namespace.path.as_os_str().is_empty() => Ok(NetworkSource::None),
        Some(namespace) => Ok(NetworkSource::Netns(namespace.path.clone())),
    }
}

/// The user namespace of the pod, which is one of its guest. It has a root, to whom what is made for containers belongs.
fn users(linux: &oci::Linux) -> Result<Option<UserMappings>> {
    let mappings = |list: &[oci::IdMapping]| {
        let one =
            |one: &oci::IdMapping| IdMapping { container_id: one.container_id, host_id: one.host_id, length: one.size };
        list.iter().map(one).collect()
    };
    let users = UserMappings { uids: mappings(&linux.uids), gids: mappings(&linux.gids) };
    if users == UserMappings::default() {
        return Ok(None);
    }
    let has_root = |list: &[IdMapping]| list.iter().any(|one| one.container_id == 0 && one.length > 0);
    if !(has_root(&users.uids) && has_root(&users.gids)) {
        return Err(invalid("the user namespace maps no root: uidMappings and gidMappings are to map container ID 0"));
    }
    Ok(Some(users))
}

/// What a snapshot consists of.
pub(super) fn mounts(asked: &[Mount]) -> Vec<snapshot::Mount> {
    let mount =
        |Mount { type_, source, target, options, .. }: Mount| snapshot::Mount { kind: type_, source, target, options };
    asked.iter().cloned().map(mount).collect()
}

/// What no guest has, and what a container that counts on it shall not run without.
fn refuse_host_things(spec: &oci::Spec, process: &oci::Process) -> Result<()> {
    let profile = process.apparmor_profile.as_str();
    let asked = if !profile.is_empty() && !DEFAULT_PROFILES.contains(&profile) {
        format!("the AppArmor profile {profile:?}: its kernel has no AppArmor")
    } else if spec.hooks.values().any(|hooks| !hooks.is_empty()) {
        "hooks, such as those of CDI devices: they are programs of the host".to_owned()
    } else if spec.linux.resources.huge_pages.iter().any(|pages| pages.limit > 0) {
        "huge pages of the host".to_owned()
    } else {
        return Ok(());
    };
    Err(invalid(format_args!(
        "a container in a virtual machine cannot have {asked}; remove it, or give the pod another runtime"
    )))
}

/// A container; `pod_pid` is the process that the pod's sandbox was said to be.
pub(super) fn container_spec(bundle: &Bundle, id: &str, rootfs: Rootfs, pod_pid: u32) -> Result<ContainerSpec> {
    let oci::Spec { process: asked, root, mounts, linux, annotations, .. } = &bundle.spec;
    let asked = asked.as_ref().ok_or_else(|| invalid("the container's config.json names no process"))?;
    refuse_host_things(&bundle.spec, asked)?;
    let privileged = is_privileged(&bundle.spec);
    let mut process = process(asked);
    if let Some(profile) = &linux.seccomp {
        process.seccomp = seccomp::json_filter(profile)?;
    }
    Ok(ContainerSpec {
        name: annotations.get("io.kubernetes.cri.container-name").cloned().unwrap_or_else(|| id.to_owned()),
        annotations: annotations.clone(),
        rootfs,
        image_name: annotations.get("io.kubernetes.cri.image-name").cloned().unwrap_or_default(),
        read_only_rootfs: root.readonly,
        process,
        mounts: mounts.iter().filter_map(|mount| self::mount(mount, linux).transpose()).collect::<Result<_>>()?,
        devices: devices(linux, privileged),
        resources: resources(&linux.resources),
        pid_namespace: pid_namespace(&linux.namespaces, pod_pid)?,
        privileged,
        masked_paths: linux.masked_paths.clone(),
        readonly_paths: linux.readonly_paths.clone(),
        stop_signal: libc::SIGTERM,
        ..ContainerSpec::default()
    })
}

/// A specification does not say so, but what it makes of it: every capability, nothing masked, and a /sys that can be
/// written.
fn is_privileged(spec: &oci::Spec) -> bool {
    let bounding = spec.process.as_ref().map(|process| process.capabilities.bounding.as_slice()).unwrap_or_default();
    let sys = spec.mounts.iter().find(|mount| mount.destination == "/sys");
    let all = ["CAP_SYS_ADMIN", "CAP_SYS_MODULE", "CAP_SYS_RAWIO"];
    all.iter().all(|name| bounding.iter().any(|bound| bound == name))
        && spec.linux.masked_paths.is_empty()
        && sys.is_some_and(|mount| !mount.options.iter().any(|option| option == "ro"))
}

/// A process, a container's own or one beside it.
pub(super) fn process(asked: &oci::Process) -> ProcessSpec {
    let oci::Process { user, capabilities, .. } = asked;
    ProcessSpec {
        args: asked.args.clone(),
        env: asked.env.clone(),
        cwd: asked.cwd.clone(),
        user: user.uid.to_string(),
        gid: Some(user.gid),
        supplemental_groups: user.additional_gids.clone(),
        merge_image_groups: false,
        terminal: asked.terminal,
        capabilities: Capabilities {
            bounding: known(&capabilities.bounding),
            permitted: known(&capabilities.permitted),
            inheritable: known(&capabilities.inheritable),
            ambient: known(&capabilities.ambient),
        },
        no_new_privileges: asked.no_new_privileges,
        rlimits: asked.rlimits.iter().map(|limit| (limit.name.clone(), limit.soft, limit.hard)).collect(),
        oom_score_adj: asked.oom_score_adj.unwrap_or(0),
        seccomp: Vec::new(),
    }
}

/// Those that a guest has: a host with a newer kernel may have more.
fn known(names: &[String]) -> Vec<String> {
    let all = defaults::all_capabilities().bounding;
    names.iter().filter(|name| all.contains(name)).cloned().collect()
}

/// One of the host's process table cannot be had; the guest's is what comes near it.
fn pid_namespace(namespaces: &[oci::Namespace], pod_pid: u32) -> Result<PidNamespace> {
    let Some(namespace) = namespaces.iter().find(|namespace| namespace.kind == "pid") else {
        return Ok(PidNamespace::Node);
    };
    if namespace.path.as_os_str().is_empty() {
        return Ok(PidNamespace::Container);
    }
    if namespace.path == Path::new(&format!("/proc/{pod_pid}/ns/pid")) {
        return Ok(PidNamespace::Pod);
    }
    Err(invalid(format_args!("{} is the PID namespace of another pod", namespace.path.display())))
}

fn mount(asked: &oci::Mount, linux: &oci::Linux) -> Result<Option<MountSpec>> {
    let oci::Mount { destination, kind, source, options, uids, gids } = asked;
    let has = |name: &str| options.iter().any(|option| option == name);
    let source = match kind.as_str() {
        kind if STANDARD.contains(&kind) => return Ok(None),
        "tmpfs" if destination == "/dev" || destination == "/dev/shm" => return Ok(None),
        "tmpfs" => tmpfs(options),
        // What containerd makes for its pods' containers to share, which the guest has itself.
        _ if destination == "/dev/shm" && is_shm(source) => return Ok(None),
        _ if has("bind") || has("rbind") || kind == "bind" => MountSource::Host(source.clone()),
        _ => {
            return Err(invalid(format_args!("mount at {destination}: {kind:?} is not a kind that a guest can mount")));
        }
    };
    if has("shared") || has("rshared") {
        return Err(invalid(format_args!(
            "mount at {destination}: mounts of a guest cannot propagate to the host: use mountPropagation None or HostToContainer"
        )));
    }
    let mapped = !(uids.is_empty() && gids.is_empty());
    if mapped && (uids, gids) != (&linux.uids, &linux.gids) {
        return Err(invalid(format_args!(
            "mount at {destination}: its owners are mapped otherwise than by the container's user namespace"
        )));
    }
    Ok(Some(MountSpec {
        destination: destination.clone(),
        source,
        image_sub_path: String::new(),
        read_only: has("ro") || has("rro"),
        recursive_read_only: has("rro"),
        mapped,
        host_to_container: has("slave") || has("rslave"),
    }))
}

fn is_shm(source: &Path) -> bool {
    let sandboxes = source.parent().and_then(Path::parent);
    source.ends_with("shm") && sandboxes.is_some_and(|path| path.ends_with("sandboxes"))
}

fn tmpfs(options: &[String]) -> MountSource {
    let option = |name: &str| options.iter().find_map(|option| option.strip_prefix(name)?.strip_prefix('='));
    let mode = option("mode").and_then(|mode| u32::from_str_radix(mode, 8).ok()).unwrap_or(0);
    MountSource::Tmpfs { size: option("size").and_then(bytes).unwrap_or(0), mode }
}

/// A size as tmpfs(5) has it.
fn bytes(text: &str) -> Option<u64> {
    let (number, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (text.get(..text.len().checked_sub(1)?)?, 10),
        b'm' | b'M' => (text.get(..text.len().checked_sub(1)?)?, 20),
        b'g' | b'G' => (text.get(..text.len().checked_sub(1)?)?, 30),
        _ => (text, 0),
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Block devices of the host, by their numbers, and what the guest has under the names asked for. The devices that a
/// privileged container is given because the host has them are not the guest's.
fn devices(linux: &oci::Linux, privileged: bool) -> Vec<DeviceSpec> {
    let spec = |device: &oci::Device| {
        let host_path = match device.kind.as_str() {
            "b" => host_device(device)?,
            _ => device.path.clone(),
        };
        let of_the_host = privileged && host_path == device.path;
        let (container_path, permissions) = (device.path.clone(), access(linux, device));
        (!of_the_host).then_some(DeviceSpec { container_path, host_path, permissions })
    };
    linux.devices.iter().filter_map(spec).collect()
}

/// Where the host has the block device of that number (sysfs, `uevent`).
fn host_device(device: &oci::Device) -> Option<String> {
    let uevent = fs::read_to_string(format!("/sys/dev/block/{}:{}/uevent", device.major, device.minor)).ok()?;
    uevent.lines().find_map(|line| line.strip_prefix("DEVNAME=").map(|name| format!("/dev/{name}")))
}

fn access(linux: &oci::Linux, device: &oci::Device) -> String {
    let same = |rule: &&oci::DeviceRule| {
        rule.allow
            && rule.kind == device.kind
            && (rule.major, rule.minor) == (Some(device.major), Some(device.minor))
            && !rule.access.is_empty()
    };
    linux.resources.devices.iter().rev().find(same).map_or_else(|| "rwm".to_owned(), |rule| rule.access.clone())
}

/// Limits, for a container or an update; what is not positive is none.
pub(super) fn resources(asked: &oci::Resources) -> Resources {
    let bytes = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok()).filter(|&value| value > 0);
    Resources {
        cpu_period: asked.cpu.period.filter(|&period| period > 0),
        cpu_quota: asked.cpu.quota.filter(|&quota| quota > 0),
        cpu_shares: asked.cpu.shares.filter(|&shares| shares > 0),
        memory_limit: bytes(asked.memory.limit),
        memory_swap_limit: bytes(asked.memory.swap),
        oom_score_adj: None,
        cpuset_cpus: asked.cpu.cpus.clone(),
        cpuset_mems: asked.cpu.mems.clone(),
        pids_limit: bytes(asked.pids.as_ref().and_then(|pids| pids.limit)),
        unified: asked.unified.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn bundle(text: serde_json::Value) -> Bundle {
        Bundle { path: PathBuf::from("/run/x"), spec: serde_json::from_value(text).expect("valid") }
    }

    fn root() -> Rootfs {
        Rootfs::Directory { path: "/r".into(), mapped: false }
    }

    fn namespaces(network: &str) -> serde_json::Value {
        serde_json::json!([{"type": "pid"}, {"type": "ipc"}, {"type": "network", "path": network}])
    }

    #[test]
    fn a_sandbox_is_a_pod_with_the_limits_of_its_annotations() {
        let sandbox = bundle(serde_json::json!({
            "hostname": "web",
            "annotations": {
                "io.kubernetes.cri.container-type": "sandbox",
                "io.kubernetes.cri.sandbox-name": "web-1",
                "io.kubernetes.cri.sandbox-memory": "104857600",
                "io.kubernetes.cri.sandbox-cpu-quota": "-1",
            },
            "linux": {
                "cgroupsPath": "/kubepods/burstable/pod1/abc",
                "resources": {"memory": {"limit": 5}},
                "sysctl": {"net.core.somaxconn": "7"},
                "namespaces": namespaces("/run/netns/n"),
            },
        }));
        let spec = pod_spec(&sandbox, "abc").expect("converts");
        assert_eq!((spec.identity.name.as_str(), spec.hostname.as_str()), ("web-1", "web"));
        assert_eq!((spec.resources.memory_limit, spec.resources.cpu_quota), (Some(100 << 20), None));
        assert_eq!(spec.network, NetworkSource::Netns("/run/netns/n".into()));
        assert_eq!(spec.cgroup_parent, "/kubepods/burstable/pod1");
    }

    #[test]
    fn namespaces_of_the_host_are_refused() {
        for kinds in [["pid", "ipc"], ["pid", "network"]] {
            let namespaces = kinds.map(|kind| serde_json::json!({"type": kind}));
            let alone = bundle(serde_json::json!({"linux": {"namespaces": namespaces}}));
            assert!(matches!(pod_spec(&alone, "x"), Err(Error::InvalidArgument(_))), "{kinds:?}");
        }
        assert_eq!(cgroup_parent("/default/x"), "/default");
        assert_eq!(cgroup_parent("kubepods-pod1.slice:cri-containerd:x"), "kubepods-pod1.slice");
        assert_eq!((cgroup_parent("/x"), cgroup_parent("")), (String::new(), String::new()));
    }

    #[test]
    fn what_every_guest_has_is_left_out_of_mounts() {
        let linux = oci::Linux::default();
        let mount = |text: serde_json::Value| mount(&serde_json::from_value(text).expect("valid"), &linux);
        let none = [
            serde_json::json!({"destination": "/proc", "type": "proc", "source": "proc"}),
            serde_json::json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["size=65536k"]}),
            serde_json::json!({"destination": "/dev/shm", "type": "bind", "source": "/run/x/sandboxes/abc/shm", "options": ["rbind", "ro"]}),
        ];
        for text in none {
            assert_eq!(mount(text.clone()), Ok(None), "{text}");
        }
        let shared = mount(
            serde_json::json!({"destination": "/d", "type": "bind", "source": "/s", "options": ["rbind", "rslave", "ro"]}),
        );
        let shared = shared.expect("converts").expect("is one");
        assert!(shared.read_only && shared.host_to_container && !shared.recursive_read_only);
        let tmp = mount(serde_json::json!({"destination": "/t", "type": "tmpfs", "options": ["size=64m", "mode=700"]}));
        assert_eq!(tmp.expect("converts").expect("is one").source, MountSource::Tmpfs { size: 64 << 20, mode: 0o700 });
        let both = mount(
            serde_json::json!({"destination": "/d", "type": "bind", "source": "/s", "options": ["rbind", "rshared"]}),
        );
        assert!(matches!(both, Err(Error::InvalidArgument(_))));
        assert!(mount(serde_json::json!({"destination": "/d", "type": "nfs", "source": "/s"})).is_err());
    }

    #[test]
    fn a_user_namespace_is_the_pods_and_that_of_its_mounts() {
        let mapping = |host: u32| serde_json::json!([{"containerID": 0, "hostID": host, "size": 65536}]);
        let text = serde_json::json!({
            "linux": {"namespaces": namespaces(""), "uidMappings": mapping(70_000), "gidMappings": mapping(70_000)},
        });
        let users = pod_spec(&bundle(text.clone()), "x").expect("converts").users.expect("has some");
        let expected = vec![IdMapping { container_id: 0, host_id: 70_000, length: 65536 }];
        assert_eq!((users.uids, users.gids), (expected.clone(), expected));
        let mut without_root = text.clone();
        without_root["linux"]["uidMappings"][0]["containerID"] = 1.into();
        assert!(matches!(pod_spec(&bundle(without_root), "x"), Err(Error::InvalidArgument(_))));
        let linux = bundle(text).spec.linux;
        let mapped = |host: u32| {
            let text = serde_json::json!({"destination": "/d", "type": "bind", "source": "/s", "options": ["rbind"],
                "uidMappings": mapping(host), "gidMappings": mapping(host)});
            mount(&serde_json::from_value(text).expect("valid"), &linux)
        };
        assert!(mapped(70_000).expect("converts").expect("is one").mapped);
        assert!(matches!(mapped(80_000), Err(Error::InvalidArgument(_))));
    }

    #[test]
    fn what_only_the_host_has_is_refused_and_not_dropped() {
        let convert = |more: serde_json::Value| {
            let mut text = serde_json::json!({"process": {"args": ["sh"], "cwd": "/"}, "linux": {}});
            for (key, value) in more.as_object().into_iter().flatten() {
                text[key] = value.clone();
            }
            container_spec(&bundle(text), "x", root(), 42).map(drop)
        };
        let pages = |limit: u64| serde_json::json!({"linux": {"resources": {"hugepageLimits": [{"pageSize": "2MB", "limit": limit}]}}});
        let profile = |name: &str| serde_json::json!({"process": {"args": ["sh"], "apparmorProfile": name}});
        for (more, word) in [
            (profile("mine"), "mine"),
            (serde_json::json!({"hooks": {"createRuntime": [{"path": "/bin/x"}]}}), "hooks"),
            (pages(1), "huge pages"),
        ] {
            assert!(convert(more).expect_err(word).to_string().contains(word));
        }
        for more in [profile("cri-containerd.apparmor.d"), serde_json::json!({"hooks": {"poststop": []}}), pages(0)] {
            assert_eq!(convert(more), Ok(()));
        }
    }

    #[test]
    fn a_privileged_container_is_known_by_what_it_may() {
        let caps = defaults::all_capabilities().bounding;
        let spec = |sys: &str| {
            bundle(serde_json::json!({
                "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 7, "gid": 8}, "capabilities": {"bounding": caps}},
                "mounts": [{"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [sys]}],
                "linux": {"namespaces": [{"type": "pid", "path": "/proc/42/ns/pid"}]},
            }))
        };
        let convert = |bundle: &Bundle, pid| container_spec(bundle, "x", root(), pid);
        let open = convert(&spec("rw"), 42).expect("converts");
        assert!(open.privileged && open.pid_namespace == PidNamespace::Pod);
        assert_eq!((open.process.user.as_str(), open.process.gid), ("7", Some(8)));
        assert!(!convert(&spec("ro"), 42).expect("converts").privileged);
        assert!(convert(&spec("ro"), 43).is_err(), "the namespace of another pod");
    }
}
