//! CreateContainer: from `ContainerConfig`, over its image's defaults, to [`ContainerSpec`].

use std::path::{Component, Path, PathBuf};

use super::pod::{check_namespaces, user_mappings, users};
use super::process::process;
use super::resources::resources;
use super::security::{check_apparmor, check_selinux, paths};
use super::{invalid, required, signal};
use crate::cri::proto::{
    ContainerConfig, Device, ImageSpec, LinuxContainerSecurityContext, Mount, MountPropagation, NamespaceMode,
    NamespaceOption, Signal,
};
use crate::error::{Error, Result};
use crate::image::{Image, ImageConfig};
use crate::spec::{ContainerSpec, DeviceSpec, MountSource, MountSpec, PidNamespace, PodSpec, Rootfs};

/// `image` is the one that the configuration names; `find_image` finds others, for mounts.
pub(in crate::cri) fn container_spec(
    config: ContainerConfig,
    pod: &PodSpec,
    image: &Image,
    find_image: impl Fn(&str) -> Option<Image>,
) -> Result<ContainerSpec> {
    if config.windows.is_some() {
        return Err(invalid("this runtime runs Linux containers only: remove the windows section"));
    }
    if let Some(device) = config.cdi_devices.first() {
        return Err(invalid(format_args!("CDI device {:?}: devices of the node are not supported", device.name)));
    }
    let metadata = required(config.metadata.clone(), "metadata")?;
    if metadata.name.is_empty() {
        return Err(invalid("the container's metadata has no name"));
    }
    let linux = config.linux.clone().unwrap_or_default();
    let context: LinuxContainerSecurityContext = linux.security_context.unwrap_or_default();
    let namespaces = context.namespace_options.clone().unwrap_or_default();
    check_namespaces(&namespaces)?;
    if namespaces.userns_options.is_some() && users(&namespaces)? != pod.users {
        return Err(invalid("the container's user namespace is not its pod's: a pod has one for all its containers"));
    }
    check_apparmor(&context)?;
    check_selinux(context.selinux_options.as_ref())?;
    let (masked_paths, readonly_paths) = paths(&context);
    Ok(ContainerSpec {
        name: metadata.name,
        attempt: metadata.attempt,
        process: process(&config, &context, &image.config, pod.hostname())?,
        rootfs: Rootfs::Image(image.id.clone()),
        image_name: config.image.as_ref().map(asked_name).unwrap_or_default(),
        read_only_rootfs: context.readonly_rootfs,
        stop_signal: stop_signal(config.stop_signal(), &image.config)?,
        mounts: config.mounts.into_iter().map(|mount| self::mount(mount, pod, &find_image)).collect::<Result<_>>()?,
        devices: config.devices.into_iter().map(device).collect(),
        labels: config.labels.into_iter().collect(),
        annotations: config.annotations.into_iter().collect(),
        resources: resources(linux.resources.unwrap_or_default())?,
        log_path: log_path(&config.log_path)?,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        pid_namespace: pid_namespace(&namespaces),
        privileged: context.privileged,
        masked_paths,
        readonly_paths,
    })
}

/// The kubelet sends the id that a pull gave it, and beside it the name that its user wrote.
fn asked_name(image: &ImageSpec) -> String {
    if image.user_specified_image.is_empty() { image.image.clone() } else { image.user_specified_image.clone() }
}

fn pid_namespace(namespaces: &NamespaceOption) -> PidNamespace {
    match namespaces.pid() {
        NamespaceMode::Pod => PidNamespace::Pod,
        NamespaceMode::Container => PidNamespace::Container,
        NamespaceMode::Node => {
            tracing::warn!("hostPID shows a container the guest's processes; no pod sees the host's");
            PidNamespace::Node
        }
        NamespaceMode::Target => PidNamespace::Target(namespaces.target_id.clone()),
    }
}

fn stop_signal(asked: Signal, image: &ImageConfig) -> Result<i32> {
    let (name, whose) = match (asked, image.stop_signal.as_str()) {
        (Signal::RuntimeDefault, "") => return Ok(libc::SIGTERM),
        (Signal::RuntimeDefault, name) => (name, "the image's"),
        (asked, _) => (asked.as_str_name(), "the"),
    };
    signal::number(name).ok_or_else(|| invalid(format_args!("{whose} stop signal {name:?} is no signal")))
}

fn mount(mount: Mount, pod: &PodSpec, find_image: impl Fn(&str) -> Option<Image>) -> Result<MountSpec> {
    let path = &mount.container_path;
    let refuse = |what: &str| Err(invalid(format_args!("mount at {path}: {what}")));
    if !Path::new(path).is_absolute() {
        return refuse("the path in the container is not absolute");
    }
    if mount.propagation() == MountPropagation::PropagationBidirectional {
        return refuse("mounts of a guest cannot propagate to the host: use mountPropagation None or HostToContainer");
    }
    // The CRI's own conditions (Mount.recursive_read_only).
    if mount.recursive_read_only && !(mount.readonly && mount.propagation() == MountPropagation::PropagationPrivate) {
        return refuse("recursiveReadOnly needs readOnly: true and mountPropagation: None");
    }
    let mapped = !(mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty());
    let the_pods = |users| pod.users.as_ref() == Some(&users);
    if mapped && !user_mappings(&mount.uid_mappings, &mount.gid_mappings).is_ok_and(the_pods) {
        return refuse("its owners are mapped otherwise than by the pod's user namespace");
    }
    let host_to_container = mount.propagation() == MountPropagation::PropagationHostToContainer;
    let source = match mount.image {
        Some(_) if !is_inside(&mount.image_sub_path) => {
            return refuse(&format!("subPath {:?} is no relative path without '..'", mount.image_sub_path));
        }
        Some(image) => match find_image(&image.image) {
            Some(found) => MountSource::Image(found.id),
            None => {
                let text = format!("mount at {path}: image {:?} is not on this node: pull it first", image.image);
                return Err(Error::NotFound(text));
            }
        },
        None if !mount.image_sub_path.is_empty() => return refuse("it has an image's subPath but no image"),
        None if mount.host_path.is_empty() => return refuse("it has neither host_path nor image"),
        None => MountSource::Host(PathBuf::from(&mount.host_path)),
    };
    Ok(MountSpec {
        host_to_container,
        destination: mount.container_path,
        // An image can only be read, whatever is asked for.
        read_only: mount.readonly || matches!(source, MountSource::Image(_)),
        source,
        image_sub_path: mount.image_sub_path,
        recursive_read_only: mount.recursive_read_only,
        mapped,
    })
}

/// Whether a path leads down from where it begins, or nowhere.
fn is_inside(path: &str) -> bool {
    Path::new(path).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

fn device(device: Device) -> DeviceSpec {
    let Device { container_path, host_path, permissions } = device;
    DeviceSpec { container_path, host_path, permissions }
}

/// Below the pod's log directory, which the kubelet made and reads.
fn log_path(text: &str) -> Result<PathBuf> {
    let path = Path::new(text);
    if path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
        Ok(path.to_owned())
    } else {
        Err(invalid(format_args!("log path {text:?} is not a path below the pod's log directory")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::proto::{ContainerMetadata, IdMapping, LinuxContainerConfig, UserNamespace};
    use crate::spec::PodIdentity;

    fn pod() -> PodSpec {
        PodSpec { identity: PodIdentity { name: "web".into(), ..Default::default() }, ..Default::default() }
    }

    fn image() -> Image {
        Image {
            id: "sha256:1".into(),
            tags: Vec::new(),
            digests: Vec::new(),
            size: 0,
            config: ImageConfig { cmd: vec!["/run".into()], stop_signal: "SIGQUIT".into(), ..Default::default() },
            disks: Vec::new(),
            verity: None,
            pinned: false,
        }
    }

    fn config() -> ContainerConfig {
        ContainerConfig {
            metadata: Some(ContainerMetadata { name: "c".into(), attempt: 1 }),
            image: Some(ImageSpec { image: "busybox".into(), ..Default::default() }),
            log_path: "c/0.log".into(),
            ..Default::default()
        }
    }

    fn spec(config: ContainerConfig) -> Result<ContainerSpec> {
        container_spec(config, &pod(), &image(), |name| (name == "data").then(image))
    }

    fn with_mount(mount: Mount) -> Result<ContainerSpec> {
        spec(ContainerConfig { mounts: vec![mount], ..config() })
    }

    #[test]
    fn a_plain_container_takes_the_images_defaults() {
        let spec = spec(config()).expect("valid");
        assert_eq!(spec.process.args, ["/run"]);
        assert!(spec.process.env.contains(&"HOSTNAME=web".to_owned()));
        assert_eq!(spec.rootfs, Rootfs::Image("sha256:1".into()));
        assert_eq!(spec.image_name, "busybox");
        assert_eq!(spec.stop_signal, libc::SIGQUIT);
        assert_eq!(spec.pid_namespace, PidNamespace::Pod);
        assert!(spec.masked_paths.contains(&"/proc/kcore".to_owned()));
        assert_eq!(spec.log_path, Path::new("c/0.log"));
        let asked = ContainerConfig { stop_signal: Signal::Sigusr1.into(), ..config() };
        assert_eq!(tests::spec(asked).expect("valid").stop_signal, libc::SIGUSR1);
    }

    #[test]
    fn namespaces() {
        let with = |options: NamespaceOption| {
            let context = LinuxContainerSecurityContext { namespace_options: Some(options), ..Default::default() };
            let linux = LinuxContainerConfig { security_context: Some(context), ..Default::default() };
            spec(ContainerConfig { linux: Some(linux), ..config() })
        };
        let mut target = NamespaceOption { target_id: "abc".into(), ..Default::default() };
        target.set_pid(NamespaceMode::Target);
        assert_eq!(with(target).expect("valid").pid_namespace, PidNamespace::Target("abc".into()));
        let users = |mode: NamespaceMode| {
            let users = UserNamespace { mode: mode.into(), ..Default::default() };
            NamespaceOption { userns_options: Some(users), ..Default::default() }
        };
        assert!(with(users(NamespaceMode::Node)).is_ok(), "its pod's");
        assert!(with(users(NamespaceMode::Pod)).is_err());
        let mut host = NamespaceOption::default();
        host.set_network(NamespaceMode::Node);
        assert!(with(host).expect_err("refused").to_string().contains("hostNetwork"));
    }

    #[test]
    fn mounts() {
        let host =
            Mount { container_path: "/data".into(), host_path: "/srv".into(), readonly: true, ..Default::default() };
        let spec = with_mount(host.clone()).expect("valid");
        assert_eq!(spec.mounts[0].source, MountSource::Host("/srv".into()));
        assert!(spec.mounts[0].read_only && !spec.mounts[0].recursive_read_only);
        let recursive = with_mount(Mount { recursive_read_only: true, ..host.clone() }).expect("valid");
        assert!(recursive.mounts[0].recursive_read_only);
        let image = |name: &str| Some(ImageSpec { image: name.into(), ..Default::default() });
        let volume = Mount { host_path: String::new(), image: image("data"), ..host.clone() };
        assert_eq!(with_mount(volume).expect("valid").mounts[0].source, MountSource::Image("sha256:1".into()));
        for (bad, word) in [
            (Mount { image: image("none"), ..host.clone() }, "pull it"),
            (Mount { image: image("data"), image_sub_path: "x/../../y".into(), ..host.clone() }, "subPath"),
            (Mount { image: image("data"), image_sub_path: "/x".into(), ..host.clone() }, "subPath"),
            (Mount { image_sub_path: "x".into(), ..host.clone() }, "no image"),
            (Mount { container_path: "data".into(), ..host.clone() }, "absolute"),
            (Mount { host_path: String::new(), ..host.clone() }, "neither"),
            (Mount { uid_mappings: vec![IdMapping::default()], ..host.clone() }, "user namespace"),
            (Mount { recursive_read_only: true, readonly: false, ..host.clone() }, "recursiveReadOnly"),
            (
                Mount {
                    recursive_read_only: true,
                    propagation: MountPropagation::PropagationHostToContainer.into(),
                    ..host.clone()
                },
                "recursiveReadOnly",
            ),
            (Mount { propagation: MountPropagation::PropagationBidirectional.into(), ..host }, "propagate"),
        ] {
            let error = with_mount(bad).expect_err(word).to_string();
            assert!(error.contains(word) && error.contains("data"), "{error}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(spec(ContainerConfig { metadata: None, ..config() }).is_err());
        for path in ["/etc/passwd", "../x", "a/../../x"] {
            assert!(spec(ContainerConfig { log_path: path.into(), ..config() }).is_err(), "{path}");
        }
        assert!(spec(ContainerConfig { log_path: String::new(), ..config() }).is_ok());
    }
}
