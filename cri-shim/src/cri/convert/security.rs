//! Security contexts: capabilities, seccomp and paths that containers do not see.

use std::collections::BTreeSet;
use std::path::Path;

use super::invalid;
use crate::cri::proto::security_profile::ProfileType;
use crate::cri::proto::{Capability, LinuxContainerSecurityContext, SeLinuxOption, SecurityProfile};
use crate::error::Result;
use crate::spec::Capabilities;

/// Every capability of Linux 6.12, in the order of their numbers (capabilities(7)).
const ALL: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// What a container has that asks for nothing, as with every runtime since docker.
const DEFAULT: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// Hidden from a container that does not say what to hide.
const MASKED_PATHS: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];

/// Read-only for a container that does not say what is.
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// How a name stands for all of them in add and drop lists.
const EVERY: &str = "ALL";

pub(crate) fn capabilities(context: &LinuxContainerSecurityContext) -> Result<Capabilities> {
    let all = || ALL.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    if context.privileged {
        return Ok(Capabilities { bounding: all(), permitted: all(), ..Capabilities::default() });
    }
    let Capability { add_capabilities, drop_capabilities, add_ambient_capabilities } =
        context.capabilities.clone().unwrap_or_default();
    let add = names(&add_capabilities)?;
    let drop = names(&drop_capabilities)?;
    let ambient = names(&add_ambient_capabilities)?;
    let mut set: BTreeSet<&str> = DEFAULT.into();
    // Whole sets first, so that "drop ALL, add X" and "add ALL, drop X" both leave what they say.
    if add.contains(EVERY) {
        set.extend(ALL);
    }
    if drop.contains(EVERY) {
        set.clear();
    }
    set.extend(add.iter().chain(&ambient).map(String::as_str).filter(|&name| name != EVERY));
    set.retain(|&name| !drop.contains(name));
    let list = |set: &BTreeSet<&str>| ALL.iter().filter(|name| set.contains(*name)).map(|&n| n.to_owned()).collect();
    let ambient = ambient.iter().map(String::as_str).filter(|name| set.contains(name)).collect();
    Ok(Capabilities {
        bounding: list(&set),
        permitted: list(&set),
        // The kernel lets only inheritable ones be ambient; no other needs to be (CVE-2022-24769).
        inheritable: list(&ambient),
        ambient: list(&ambient),
    })
}

/// Kubernetes writes `NET_ADMIN`, some clients `CAP_NET_ADMIN` or lower case.
fn names(list: &[String]) -> Result<BTreeSet<String>> {
    let name = |text: &String| {
        let upper = text.to_ascii_uppercase();
        let name = if upper == EVERY || upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
        if name == EVERY || ALL.contains(&name.as_str()) {
            Ok(name)
        } else {
            Err(invalid(format_args!("there is no capability {text:?}")))
        }
    };
    list.iter().map(name).collect()
}

/// What older clients write before the name of a profile.
const LOCALHOST: &str = "localhost/";

/// A profile in the words of a field that newer clients leave empty.
fn legacy_profile(text: &str) -> Option<SecurityProfile> {
    let profile_type = match text {
        "" => return None,
        "runtime/default" | "docker/default" => ProfileType::RuntimeDefault,
        "unconfined" => ProfileType::Unconfined,
        _ => ProfileType::Localhost,
    };
    Some(SecurityProfile { profile_type: profile_type.into(), localhost_ref: text.to_owned() })
}

/// A compiled filter; empty is unconfined.
pub(super) fn seccomp(context: &LinuxContainerSecurityContext) -> Result<Vec<u8>> {
    let legacy = || legacy_profile(&context.seccomp_profile_path);
    let Some(profile) = context.seccomp.clone().or_else(legacy) else { return Ok(Vec::new()) };
    match profile.profile_type() {
        ProfileType::Unconfined => Ok(Vec::new()),
        // A privileged container is confined by its kernel alone.
        _ if context.privileged => Ok(Vec::new()),
        ProfileType::RuntimeDefault => Ok(crate::seccomp::default_filter(&capabilities(context)?.permitted)?),
        ProfileType::Localhost => {
            let reference = profile.localhost_ref.as_str();
            crate::seccomp::local_filter(Path::new(reference.strip_prefix(LOCALHOST).unwrap_or(reference)))
        }
    }
}

/// The guest kernel has no AppArmor, so a profile of the node cannot be honoured; the default one is none.
pub(super) fn check_apparmor(context: &LinuxContainerSecurityContext) -> Result<()> {
    let local = |profile: &SecurityProfile| profile.profile_type() == ProfileType::Localhost;
    let legacy = || legacy_profile(&context.apparmor_profile);
    match context.apparmor.clone().or_else(legacy).filter(local) {
        Some(profile) => Err(invalid(format_args!(
            "AppArmor profile {:?}: the guest kernel has no AppArmor; remove the profile",
            profile.localhost_ref
        ))),
        None => Ok(()),
    }
}

/// The guest kernel has no SELinux either.
pub(super) fn check_selinux(options: Option<&SeLinuxOption>) -> Result<()> {
    match options {
        Some(SeLinuxOption { user, role, r#type, level })
            if [user, role, r#type, level].iter().any(|part| !part.is_empty()) =>
        {
            Err(invalid(format_args!(
                "SELinux label {user}:{role}:{type}:{level}: the guest kernel has no SELinux; remove seLinuxOptions"
            )))
        }
        _ => Ok(()),
    }
}

/// Paths masked and paths read-only. An empty list is one that was not given.
pub(crate) fn paths(context: &LinuxContainerSecurityContext) -> (Vec<String>, Vec<String>) {
    let or = |given: &[String], default: &[&str]| match given {
        [] => default.iter().map(|&path| path.to_owned()).collect(),
        given => given.to_vec(),
    };
    if context.privileged {
        return (Vec::new(), Vec::new());
    }
    (or(&context.masked_paths, &MASKED_PATHS), or(&context.readonly_paths, &READONLY_PATHS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(add: &[&str], drop: &[&str], ambient: &[&str]) -> LinuxContainerSecurityContext {
        let owned = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect();
        let capabilities = Capability {
            add_capabilities: owned(add),
            drop_capabilities: owned(drop),
            add_ambient_capabilities: owned(ambient),
        };
        LinuxContainerSecurityContext { capabilities: Some(capabilities), ..Default::default() }
    }

    #[test]
    fn capabilities_are_added_and_dropped() {
        let permitted = |add: &[&str], drop: &[&str]| capabilities(&context(add, drop, &[])).expect("valid").permitted;
        assert_eq!(permitted(&[], &[]).len(), DEFAULT.len());
        assert!(permitted(&["NET_ADMIN"], &[]).contains(&"CAP_NET_ADMIN".to_owned()));
        assert!(!permitted(&[], &["cap_chown"]).contains(&"CAP_CHOWN".to_owned()));
        assert_eq!(permitted(&["SYS_PTRACE"], &["ALL"]), ["CAP_SYS_PTRACE"]);
        assert_eq!(permitted(&["ALL"], &["SYS_ADMIN"]).len(), ALL.len() - 1);
        assert!(capabilities(&context(&["NOTHING"], &[], &[])).is_err());
    }

    #[test]
    fn only_ambient_ones_are_inheritable() {
        let set = capabilities(&context(&[], &["ALL"], &["NET_BIND_SERVICE"])).expect("valid");
        assert_eq!(set.ambient, ["CAP_NET_BIND_SERVICE"]);
        assert_eq!(set.inheritable, set.ambient);
        assert_eq!(set.bounding, set.ambient);
        assert!(capabilities(&context(&["NET_ADMIN"], &[], &[])).expect("valid").inheritable.is_empty());
    }

    #[test]
    fn a_privileged_container_has_everything_and_hides_nothing() {
        let context = LinuxContainerSecurityContext { privileged: true, ..context(&[], &["ALL"], &[]) };
        assert_eq!(capabilities(&context).expect("valid").permitted.len(), ALL.len());
        assert_eq!(paths(&context), (Vec::new(), Vec::new()));
    }

    #[test]
    fn a_profile_that_cannot_be_had_is_refused() {
        let local = || SecurityProfile { profile_type: ProfileType::Localhost.into(), localhost_ref: "mine".into() };
        let seccomp_local = LinuxContainerSecurityContext { seccomp: Some(local()), ..Default::default() };
        assert!(seccomp(&seccomp_local).expect_err("refused").to_string().contains("mine"));
        let apparmor = LinuxContainerSecurityContext { apparmor: Some(local()), ..Default::default() };
        assert!(check_apparmor(&apparmor).is_err());
        assert!(check_apparmor(&LinuxContainerSecurityContext::default()).is_ok());
    }

    #[test]
    fn older_fields_mean_the_same() {
        let seccomp_of = |path: &str| {
            let context = LinuxContainerSecurityContext { seccomp_profile_path: path.into(), ..Default::default() };
            seccomp(&context)
        };
        assert_eq!(seccomp_of("unconfined"), Ok(Vec::new()));
        assert!(!seccomp_of("runtime/default").expect("valid").is_empty());
        assert!(seccomp_of("localhost//nonexistent").expect_err("refused").to_string().contains("/nonexistent"));
        let apparmor_of = |name: &str| {
            check_apparmor(&LinuxContainerSecurityContext { apparmor_profile: name.into(), ..Default::default() })
        };
        assert!(apparmor_of("localhost/mine").is_err());
        assert!(apparmor_of("runtime/default").is_ok());
    }

    #[test]
    fn a_label_that_nobody_would_enforce_is_refused() {
        let label = SeLinuxOption { level: "s0:c1".into(), ..Default::default() };
        assert!(check_selinux(Some(&label)).expect_err("refused").to_string().contains("s0:c1"));
        assert!(check_selinux(Some(&SeLinuxOption::default())).is_ok());
        assert!(check_selinux(None).is_ok());
    }

    #[test]
    fn the_default_profile_is_a_filter_and_none_is_none() {
        let default = SecurityProfile { profile_type: ProfileType::RuntimeDefault.into(), ..Default::default() };
        let context = LinuxContainerSecurityContext { seccomp: Some(default), ..Default::default() };
        assert!(!seccomp(&context).expect("valid").is_empty());
        assert!(seccomp(&LinuxContainerSecurityContext::default()).expect("valid").is_empty());
    }
}
