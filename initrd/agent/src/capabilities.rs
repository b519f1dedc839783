//! Capability sets: names to bits, and giving up what a process may not have.

use std::io;

use agent_protocol::v1;

use crate::sys;

/// capabilities(7), by number.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Every capability there is.
const ALL: u64 = (1 << NAMES.len()) - 1;

/// The five sets; bit N is capability N.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sets {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

impl Sets {
    /// All that the agent has, as a privileged container's.
    pub(crate) fn all() -> Self {
        let all = numbers(ALL).filter(|&number| sys::is_bounding(number)).fold(0, |set, number| set | 1 << number);
        Self { bounding: all, effective: all, permitted: all, inheritable: 0, ambient: 0 }
    }

    /// From names; one that this kernel's capabilities(7) does not have is refused by name.
    pub(crate) fn parse(names: &v1::Capabilities) -> Result<Self, String> {
        Ok(Self {
            bounding: bits(&names.bounding)?,
            effective: bits(&names.effective)?,
            permitted: bits(&names.permitted)?,
            inheritable: bits(&names.inheritable)?,
            ambient: bits(&names.ambient)?,
        })
    }

    /// First half, while still root: limits what can ever be gained.
    pub(crate) fn bound(&self) -> io::Result<()> {
        for number in numbers(!self.bounding & ALL) {
            match sys::drop_bounding(number) {
                // A kernel older than the list above.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Second half, after the user has changed: the other four sets.
    pub(crate) fn apply(&self) -> io::Result<()> {
        sys::set_capabilities(self.effective, self.permitted, self.inheritable)?;
        numbers(self.ambient & self.permitted & self.inheritable).try_for_each(sys::raise_ambient)
    }
}

fn numbers(set: u64) -> impl Iterator<Item = u8> {
    (0..64u8).filter(move |&number| set >> number & 1 == 1)
}

fn bits(names: &[String]) -> Result<u64, String> {
    names.iter().try_fold(0, |set, name| {
        let bare = name.strip_prefix("CAP_").unwrap_or(name);
        let number = NAMES.iter().position(|&each| each == bare);
        number.map(|number| set | 1 << number).ok_or_else(|| format!("there is no capability {name}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_the_kernels_bits() {
        let set = |names: &[&str]| bits(&names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>());
        assert_eq!(set(&["CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"]), Ok(1 | 1 << 21 | 1 << 40));
        assert_eq!(set(&[]), Ok(0));
        assert!(set(&["CAP_FLY"]).is_err_and(|text| text.contains("CAP_FLY")));
        assert_eq!(ALL, 0x1ff_ffff_ffff);
    }
}
