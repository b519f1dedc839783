//! From what a caller asked for to what the agent is told. Pure translation.

use std::collections::HashMap;

use agent_protocol::v1;

use crate::error::{Error, Result};
use crate::network::{Attachment, INTERFACE};
use crate::pod::files;
use crate::pod::share::ROOT;
use crate::record::{ContainerRecord, DiskRecord, Record};
use crate::spec::{
    ContainerSpec, Dns, IdMapping, MemoryVolume, MountSource, PidNamespace, PodSpec, ProcessSpec, Resources, Rootfs,
    UserMappings,
};

/// The guest's NIC, of which there is one.
const NIC: u32 = 0;

/// What one pod's guest is told first.
pub(super) fn configure(record: &Record, attachment: &Attachment, realtime_ns: u64, seed: Vec<u8>) -> v1::Configure {
    let spec = &record.spec;
    v1::Configure {
        hostname: spec.hostname().into(),
        realtime_ns,
        seed,
        sysctls: sysctls(spec),
        interfaces: interface(attachment).into_iter().collect(),
        routes: attachment.routes.iter().map(route).collect(),
        neighbours: attachment.neighbours.iter().map(neighbour).collect(),
        scratch: record.disks.iter().find(|disk| disk.image.is_none()).map(range),
        shm_bytes: 0,
        share_pid_namespace: spec.share_pid_namespace,
        user_namespace: spec.users.as_ref().map(user_namespace),
        cpus: record.vcpus.into(),
        rescan: true,
        memory_mib: record.memory_mib,
    }
}

/// What root of a user namespace may do in a network namespace that is its own, it may in the guest's, which is the
/// pod's alone: listen on every port, and send pings.
const OF_OWN_NETWORK: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

/// As a kubelet sets it on its node: programs ask for more memory than they use, and its limits are the cgroups'.
const OVERCOMMIT: (&str, &str) = ("vm.overcommit_memory", "1");

fn sysctls(spec: &PodSpec) -> HashMap<String, String> {
    let defaults = OF_OWN_NETWORK.into_iter().filter(|_| spec.users.is_some()).chain([OVERCOMMIT]);
    let defaults = defaults.map(|(name, value)| (name.to_owned(), value.to_owned()));
    defaults.chain(spec.sysctls.clone()).collect()
}

fn user_namespace(users: &UserMappings) -> v1::UserNamespace {
    let mappings = |list: &[IdMapping]| {
        let mapping =
            |&IdMapping { container_id, host_id, length }: &IdMapping| v1::IdMapping { container_id, host_id, length };
        list.iter().map(mapping).collect()
    };
    v1::UserNamespace { uids: mappings(&users.uids), gids: mappings(&users.gids) }
}

fn interface(attachment: &Attachment) -> Option<v1::Interface> {
    let interface = &attachment.interface;
    (!interface.name.is_empty()).then(|| v1::Interface {
        index: NIC,
        name: interface.name.clone(),
        mac: interface.mac.to_vec(),
        mtu: interface.mtu,
        addresses: interface.addresses.iter().map(ToString::to_string).collect(),
    })
}

fn route(route: &crate::network::Route) -> v1::Route {
    let address = |address: Option<std::net::IpAddr>| address.map(|address| address.to_string()).unwrap_or_default();
    v1::Route {
        destination: if route.destination.prefix == 0 { String::new() } else { route.destination.to_string() },
        gateway: address(route.gateway),
        interface: INTERFACE.into(),
        mtu: route.mtu.unwrap_or(0),
        priority: route.priority,
        on_link: route.on_link,
        source: address(route.source),
    }
}

fn neighbour(neighbour: &crate::network::Neighbour) -> v1::Neighbour {
    v1::Neighbour { interface: INTERFACE.into(), address: neighbour.address.to_string(), mac: neighbour.mac.to_vec() }
}

/// An extent as the agent knows it.
pub(super) fn range(disk: &DiskRecord) -> v1::DiskRange {
    let verity =
        disk.verity.as_ref().map(|verity| v1::Verity { root: verity.root.bytes(), data_blocks: verity.data_blocks });
    v1::DiskRange { first_sector: disk.first_sector, sectors: disk.sectors, verity }
}

/// The range of an image that has been mapped for the pod.
fn image_range(record: &Record, image: &str) -> Result<v1::DiskRange> {
    let disk = record.disks.iter().find(|disk| disk.image.as_deref() == Some(image));
    disk.map(range).ok_or_else(|| Error::Internal(format!("image {image} is not on the pod's disk")))
}

/// What the agent makes a container of. Reads the host files that the container is given copies of.
pub(super) fn create_container(record: &Record, id: &str, container: &ContainerRecord) -> Result<v1::CreateContainer> {
    let spec = &container.spec;
    let (pid_namespace, pid_target) = pid_namespace(&spec.pid_namespace);
    Ok(v1::CreateContainer {
        id: id.into(),
        rootfs: Some(rootfs(record, container)?),
        process: Some(process(&spec.process)),
        mounts: mounts(record, container)?,
        resources: Some(resources(&spec.resources)),
        stdio: Some(v1::Stdio {
            log_port: container.log.as_ref().map_or(0, |log| log.port),
            stdin: spec.stdin,
            stdin_once: spec.stdin_once,
        }),
        pid_namespace: pid_namespace.into(),
        pid_target,
        masked_paths: spec.masked_paths.clone(),
        readonly_paths: spec.readonly_paths.clone(),
        devices: spec.devices.iter().map(|asked| device(record, container, asked)).collect(),
        privileged: spec.privileged,
    })
}

fn rootfs(record: &Record, container: &ContainerRecord) -> Result<v1::Rootfs> {
    let mut rootfs = v1::Rootfs { read_only: container.spec.read_only_rootfs, ..v1::Rootfs::default() };
    let missing = || Error::Internal("the container's root file system is not there".into());
    match &container.spec.rootfs {
        Rootfs::Image(image) => rootfs.layers.push(image_range(record, image)?),
        Rootfs::Directory { mapped, .. } => {
            rootfs.mapped = *mapped;
            rootfs.shared = Some(shared(record, *container.shares.get(ROOT).ok_or_else(missing)?)?);
        }
        Rootfs::Disk(_) => {
            let first_sector = container.volumes.get(ROOT).ok_or_else(missing)?;
            let disk = record.disks.iter().find(|disk| disk.first_sector == *first_sector);
            rootfs.disk = Some(range(disk.ok_or_else(missing)?));
        }
    }
    Ok(rootfs)
}

fn pid_namespace(asked: &PidNamespace) -> (v1::PidNamespace, String) {
    match asked {
        PidNamespace::Container => (v1::PidNamespace::Container, String::new()),
        PidNamespace::Pod => (v1::PidNamespace::Pod, String::new()),
        PidNamespace::Node => (v1::PidNamespace::Node, String::new()),
        PidNamespace::Target(id) => (v1::PidNamespace::Target, id.clone()),
    }
}

pub(super) fn process(process: &ProcessSpec) -> v1::Process {
    let capabilities = &process.capabilities;
    v1::Process {
        args: process.args.clone(),
        env: process.env.clone(),
        cwd: process.cwd.clone(),
        user: Some(v1::User {
            name: process.user.clone(),
            gid: process.gid,
            supplemental_groups: process.supplemental_groups.clone(),
            merge_image_groups: process.merge_image_groups,
        }),
        terminal: process.terminal,
        capabilities: Some(v1::Capabilities {
            bounding: capabilities.bounding.clone(),
            effective: capabilities.permitted.clone(),
            permitted: capabilities.permitted.clone(),
            inheritable: capabilities.inheritable.clone(),
            ambient: capabilities.ambient.clone(),
        }),
        no_new_privileges: process.no_new_privileges,
        rlimits: process.rlimits.iter().map(rlimit).collect(),
        oom_score_adj: process.oom_score_adj,
        seccomp: process.seccomp.clone(),
    }
}

fn rlimit((name, soft, hard): &(String, u64, u64)) -> v1::Rlimit {
    v1::Rlimit { name: name.clone(), soft: *soft, hard: *hard }
}

fn device(record: &Record, container: &ContainerRecord, device: &crate::spec::DeviceSpec) -> v1::Device {
    let first_sector = container.volumes.get(&device.container_path);
    let volume = record.disks.iter().find(|disk| Some(&disk.first_sector) == first_sector);
    v1::Device {
        path: device.container_path.clone(),
        guest_path: device.host_path.clone(),
        access: device.permissions.clone(),
        disk: volume.map(range),
    }
}

/// What is not limited is left as it is.
pub(super) fn resources(resources: &Resources) -> v1::Resources {
    v1::Resources {
        memory_limit: resources.memory_limit.unwrap_or(0),
        memory_swap_limit: resources.memory_swap_limit.unwrap_or(0),
        cpu_shares: resources.cpu_shares.unwrap_or(0),
        cpu_quota: resources.cpu_quota.unwrap_or(0),
        cpu_period: resources.cpu_period.unwrap_or(0),
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        pids_limit: resources.pids_limit.unwrap_or(0),
        unified: resources.unified.clone().into_iter().collect(),
    }
}

/// A process beside a container's own: as that, with other arguments and terminal. What is left out the agent takes
/// from the container.
pub(crate) fn exec_process(spec: &ContainerSpec, args: Vec<String>, terminal: bool) -> v1::Process {
    let (env, cwd) = (spec.process.env.clone(), spec.process.cwd.clone());
    v1::Process { args, env, cwd, terminal, ..v1::Process::default() }
}

/// The container's mounts, those asked for and the files every container has, outer ones first.
fn mounts(record: &Record, container: &ContainerRecord) -> Result<Vec<v1::Mount>> {
    let spec = &container.spec;
    let mut mounts = standard_files(record)
        .into_iter()
        .filter(|(path, _)| !spec.mounts.iter().any(|mount| mount.destination.trim_end_matches('/') == *path))
        .map(|(path, text)| v1::Mount {
            destination: path.into(),
            source: Some(v1::mount::Source::Files(files::text(text))),
            read_only: spec.read_only_rootfs,
            mapped: true,
            image_sub_path: String::new(),
        })
        .collect::<Vec<_>>();
    for mount in &spec.mounts {
        let destination = mount.destination.clone();
        let source = match &mount.source {
            MountSource::Host(path) => match container.shares.get(&destination) {
                Some(share) => v1::mount::Source::Shared(shared(record, *share)?),
                None => files::snapshot(path)
                    .map(v1::mount::Source::Files)
                    .map_err(|error| error.context(format_args!("mount {destination}")))?,
            },
            MountSource::Memory(volume) => v1::mount::Source::Memory(memory(volume)),
            MountSource::Tmpfs { size, mode } => v1::mount::Source::Tmpfs(v1::Tmpfs { size_bytes: *size, mode: *mode }),
            MountSource::Image(image) => v1::mount::Source::Image(image_range(record, image)?),
        };
        // A shared directory refuses writes on the host, where what is mounted below it may do otherwise.
        let read_only = mount.read_only && !container.shares.contains_key(&destination);
        let (mapped, image_sub_path) = (mount.mapped, mount.image_sub_path.clone());
        mounts.push(v1::Mount { destination, source: Some(source), read_only, mapped, image_sub_path });
    }
    mounts.sort_by_key(|mount| mount.destination.split('/').filter(|name| !name.is_empty()).count());
    Ok(mounts)
}

fn memory(volume: &MemoryVolume) -> v1::PodMemory {
    let MemoryVolume { host_path: _, name, size, mode, uid, gid, sub_path } = volume.clone();
    v1::PodMemory { name, size_bytes: size, mode, uid, gid, sub_path }
}

/// A volume of the pod's file server.
fn shared(record: &Record, share: u32) -> Result<v1::Shared> {
    let missing = || Error::Internal("the pod has no file server".into());
    let tag = record.file_server.as_ref().ok_or_else(missing)?.tag.clone();
    Ok(v1::Shared { tag, path: share.to_string() })
}

/// Files that every container of a pod is given unless it mounts its own.
fn standard_files(record: &Record) -> [(&'static str, String); 3] {
    let name = record.spec.hostname();
    let mut hosts = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for address in record.attachment.iter().flat_map(|attachment| &attachment.ips) {
        hosts.push_str(&format!("{address}\t{name}\n"));
    }
    [("/etc/hosts", hosts), ("/etc/hostname", format!("{name}\n")), ("/etc/resolv.conf", resolv_conf(record))]
}

/// What the pod names, else what the network's plugins gave, else the host's own.
fn resolv_conf(record: &Record) -> String {
    let given = |dns: &&Dns| !(dns.servers.is_empty() && dns.searches.is_empty() && dns.options.is_empty());
    let attached = record.attachment.as_ref().map(|attachment| &attachment.dns);
    match record.spec.dns.as_ref().filter(given).or(attached.filter(given)) {
        Some(dns) => resolv_text(dns),
        None => std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
    }
}

/// resolv.conf(5).
fn resolv_text(dns: &Dns) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::*;
    use crate::record::tests::record;
    use crate::spec::MountSpec;

    fn container(mounts: &[(&str, MountSource)]) -> ContainerRecord {
        let mounts = mounts.iter().map(|(destination, source)| MountSpec {
            destination: (*destination).into(),
            source: source.clone(),
            image_sub_path: String::new(),
            read_only: true,
            recursive_read_only: false,
            mapped: false,
            host_to_container: false,
        });
        let spec = Arc::new(ContainerSpec { mounts: mounts.collect(), ..ContainerSpec::default() });
        ContainerRecord { spec, shares: BTreeMap::new(), ..record().containers["c"].clone() }
    }

    #[test]
    fn outer_mounts_come_first_and_a_container_may_bring_its_own_files() {
        let tmpfs = MountSource::Tmpfs { size: 0, mode: 0o755 };
        let container = container(&[("/a/b/c", tmpfs.clone()), ("/a", tmpfs.clone()), ("/etc/hosts/", tmpfs)]);
        let mounts = mounts(&record(), &container).expect("translates");
        let order = mounts.iter().map(|mount| mount.destination.as_str()).collect::<Vec<_>>();
        assert_eq!(order, ["/a", "/etc/hostname", "/etc/resolv.conf", "/etc/hosts/", "/a/b/c"]);
    }

    #[test]
    fn name_resolution_is_the_pods_before_the_networks() {
        let mut record = record();
        let dns = |server: &str| Dns { servers: vec![server.into()], ..Dns::default() };
        record.attachment = Some(Attachment { dns: dns("10.0.0.1"), ..Attachment::default() });
        assert_eq!(resolv_conf(&record), "nameserver 10.0.0.1\n");
        record.spec = Arc::new(PodSpec { dns: Some(Dns::default()), ..PodSpec::default() });
        assert_eq!(resolv_conf(&record), "nameserver 10.0.0.1\n", "an empty one says nothing");
        let full = Dns {
            servers: vec!["1.1.1.1".into()],
            searches: vec!["a".into(), "b".into()],
            options: vec!["x:1".into()],
        };
        record.spec = Arc::new(PodSpec { dns: Some(full), ..PodSpec::default() });
        assert_eq!(resolv_conf(&record), "search a b\nnameserver 1.1.1.1\noptions x:1\n");
    }

    #[test]
    fn a_user_namespace_keeps_its_network_usable() {
        let named = ("net.ipv4.ping_group_range".to_owned(), "1 0".to_owned());
        let plain = PodSpec { sysctls: [named.clone()].into(), ..PodSpec::default() };
        let overcommit = (OVERCOMMIT.0.to_owned(), OVERCOMMIT.1.to_owned());
        assert_eq!(sysctls(&plain), [named.clone(), overcommit].into());
        let own = sysctls(&PodSpec { users: Some(UserMappings::default()), ..plain });
        assert_eq!((own.len(), own.get(&named.0)), (3, Some(&named.1)), "what the pod names holds");
    }

    #[test]
    fn an_image_that_is_not_mapped_is_an_error() {
        let source = MountSource::Image("sha256:1".into());
        assert!(mounts(&record(), &container(&[("/a", source)])).is_err());
    }
}
