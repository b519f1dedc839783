//! What the kernel allows itself by the memory that it booted with, set anew for what the pod is to have: a guest boots
//! with little and is given the rest while it runs.

use std::fs;

use nix::sys::resource::{Resource, setrlimit};

use crate::configure::sysctl_path;
use crate::kmsg;

const KIB_PER_MIB: u64 = 1 << 10;
const PAGES_PER_MIB: u64 = 1 << 8;

/// Limits of a machine with so much memory, by the kernel's own rules.
fn limits(mib: u64) -> [(&'static str, String); 8] {
    // fork_init: an eighth of memory for thread stacks of 16 KiB.
    let threads = threads(mib);
    // files_maxfiles_init: a tenth of memory, a KiB for each.
    let files = (mib * KIB_PER_MIB / 10).max(8192);
    // tcp_init_mem and udp_init: of pages, of a sixteenth and an eighth of memory.
    let triple = |pages: u64| format!("{} {} {}", pages / 4 * 3, pages, pages / 4 * 6);
    // tcp_init: buffers of at most a 128th of memory.
    let share = mib * KIB_PER_MIB * 1024 / 128;
    // inotify_user_setup, eventpoll_init: a hundredth and a 25th of memory, about a KiB and 160 bytes for each.
    let (watches, polled) = ((mib * 10).clamp(8192, 1 << 20), mib * KIB_PER_MIB * 1024 / 25 / 160);
    [
        ("kernel.threads-max", threads.to_string()),
        ("fs.file-max", files.to_string()),
        ("net.ipv4.tcp_mem", triple(mib * PAGES_PER_MIB / 16)),
        ("net.ipv4.udp_mem", triple(mib * PAGES_PER_MIB / 8)),
        ("net.ipv4.tcp_wmem", format!("4096 16384 {}", share.clamp(65_536, 4 << 20))),
        ("net.ipv4.tcp_rmem", format!("4096 131072 {}", share.clamp(131_072, 6 << 20))),
        ("fs.inotify.max_user_watches", watches.to_string()),
        ("fs.epoll.max_user_watches", polled.to_string()),
    ]
}

fn threads(mib: u64) -> u64 {
    (mib * KIB_PER_MIB / (16 * 8)).clamp(20, 1 << 22)
}

/// Sets them for so many MiB, but for those that the pod set itself; 0 leaves them. One that the kernel refuses is told of.
pub(crate) fn allow(mib: u32, own: &[String]) {
    if mib == 0 {
        return;
    }
    for (name, value) in limits(mib.into()).into_iter().filter(|(name, _)| !own.iter().any(|key| same(key, name))) {
        if let Err(error) = sysctl_path(name).and_then(|path| fs::write(path, &value)) {
            kmsg::say(&format!("cannot set {name} to {value}: {error}"));
        }
    }
    // Of users other than root, as fork_init does it.
    let most = threads(mib.into()) / 2;
    if let Err(error) = setrlimit(Resource::RLIMIT_NPROC, most, most) {
        kmsg::say(&format!("cannot allow {most} processes: {error}"));
    }
}

fn same(one: &str, other: &str) -> bool {
    matches!((sysctl_path(one), sysctl_path(other)), (Ok(one), Ok(other)) if one == other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_those_of_a_machine_that_booted_with_all_of_it() {
        let value = |mib, name| limits(mib).into_iter().find(|(key, _)| *key == name).expect("is there").1;
        assert_eq!(value(512, "kernel.threads-max"), "4096");
        assert_eq!(value(65_536, "kernel.threads-max"), "524288");
        assert_eq!(value(1024, "net.ipv4.tcp_mem"), "12288 16384 24576");
        assert_eq!(value(512, "net.ipv4.tcp_rmem"), "4096 131072 4194304");
        assert_eq!(value(65_536, "net.ipv4.tcp_rmem"), "4096 131072 6291456");
        assert_eq!(value(96, "fs.file-max"), "9830");
    }

    #[test]
    fn a_sysctl_is_the_same_however_it_is_spelled() {
        assert!(same("net/ipv4/tcp_mem", "net.ipv4.tcp_mem") && !same("net.ipv4.udp_mem", "net.ipv4.tcp_mem"));
    }
}
