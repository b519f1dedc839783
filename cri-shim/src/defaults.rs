//! What a container is given that says nothing about it: environment, capabilities, hidden and read-only paths; and
//! what becomes of them where it does.
//!
//! Every door gives the same answer. Nothing here knows whose words asked for it.

use std::collections::BTreeSet;

use crate::error::{Error, Result};
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

/// For images that set none.
pub(crate) const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a terminal of a container is taken for.
const TERM: &str = "TERM=xterm";

/// How a name stands for all of them in a list.
const EVERY: &str = "ALL";

/// Capabilities to add to the default ones, to take from them, and to keep over execve(2) besides; a name may be
/// written as in capabilities(7), without its `CAP_`, or `ALL`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    pub(crate) add: Vec<String>,
    pub(crate) drop: Vec<String>,
    pub(crate) ambient: Vec<String>,
}

/// Those of a privileged container: all of the guest's.
pub(crate) fn all_capabilities() -> Capabilities {
    let all = || owned(&ALL);
    Capabilities { bounding: all(), permitted: all(), ..Capabilities::default() }
}

/// Those of a container that is not.
pub(crate) fn capabilities(changes: &Changes) -> Result<Capabilities> {
    let (add, drop, ambient) = (names(&changes.add)?, names(&changes.drop)?, names(&changes.ambient)?);
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
            Err(Error::InvalidArgument(format!("there is no capability {text:?}")))
        }
    };
    list.iter().map(name).collect()
}

/// Later settings of a name replace earlier ones: ours, the image's, the container's.
pub(crate) fn env(image: &[String], asked: &[String], hostname: &str, terminal: bool) -> Vec<String> {
    let mut env: Vec<String> = vec![PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if terminal {
        env.push(TERM.to_owned());
    }
    let name = |pair: &str| pair.split('=').next().unwrap_or_default().to_owned();
    for pair in image.iter().chain(asked) {
        match env.iter_mut().find(|known| name(known) == name(pair)) {
            Some(known) => known.clone_from(pair),
            None => env.push(pair.clone()),
        }
    }
    env
}

/// Paths that a container does not see.
pub(crate) fn masked_paths() -> Vec<String> {
    owned(&MASKED_PATHS)
}

/// Paths that a container cannot write to.
pub(crate) fn readonly_paths() -> Vec<String> {
    owned(&READONLY_PATHS)
}

fn owned(list: &[&str]) -> Vec<String> {
    list.iter().map(|&text| text.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(add: &[&str], drop: &[&str], ambient: &[&str]) -> Changes {
        Changes { add: owned(add), drop: owned(drop), ambient: owned(ambient) }
    }

    #[test]
    fn capabilities_are_added_and_dropped() {
        let permitted = |add: &[&str], drop: &[&str]| capabilities(&changes(add, drop, &[])).expect("valid").permitted;
        assert_eq!(permitted(&[], &[]).len(), DEFAULT.len());
        assert!(permitted(&["NET_ADMIN"], &[]).contains(&"CAP_NET_ADMIN".to_owned()));
        assert!(!permitted(&[], &["cap_chown"]).contains(&"CAP_CHOWN".to_owned()));
        assert_eq!(permitted(&["SYS_PTRACE"], &["ALL"]), ["CAP_SYS_PTRACE"]);
        assert_eq!(permitted(&["ALL"], &["SYS_ADMIN"]).len(), ALL.len() - 1);
        assert!(capabilities(&changes(&["NOTHING"], &[], &[])).is_err());
    }

    #[test]
    fn only_ambient_ones_are_inheritable() {
        let set = capabilities(&changes(&[], &["ALL"], &["NET_BIND_SERVICE"])).expect("valid");
        assert_eq!(set.ambient, ["CAP_NET_BIND_SERVICE"]);
        assert_eq!(set.inheritable, set.ambient);
        assert_eq!(set.bounding, set.ambient);
        assert!(capabilities(&changes(&["NET_ADMIN"], &[], &[])).expect("valid").inheritable.is_empty());
    }

    #[test]
    fn a_privileged_container_has_everything() {
        assert_eq!(all_capabilities().permitted.len(), ALL.len());
    }
}
