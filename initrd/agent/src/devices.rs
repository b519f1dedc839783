//! Which device nodes a container has, and the filter on its cgroup that keeps it from opening any other.
//!
//! A container may hold `CAP_MKNOD` and make a node of the pod disk; without the filter it could then read and
//! write what belongs to its neighbours.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use agent_protocol::v1;
use nix::sys::stat::{major, minor};
use thiserror::Error;

/// Why a device cannot be given.
#[derive(Debug, Error)]
pub(crate) enum DeviceError {
    /// Not there, or no device.
    #[error("the guest has no device {0}")]
    Missing(String),
    /// Letters other than `r`, `w`, `m`.
    #[error("{0:?} is no device access: use some of the letters r, w and m")]
    Access(String),
}

/// A node below a container's `/dev`, or elsewhere if so asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) path: PathBuf,
    /// Type and permissions, as in `st_mode`.
    pub(crate) mode: u32,
    pub(crate) device: u64,
}

/// Every container's nodes (OCI runtime specification, config-linux, default devices).
const STANDARD: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// Deepest directory below `/dev` that is looked into.
const DEPTH: usize = 4;

/// What a program may do with a device; the bits of `access` are those of `linux/bpf.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    block: bool,
    major: Option<u64>,
    minor: Option<u64>,
    access: i32,
}

const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ANY: i32 = MKNOD | READ | WRITE;

/// The devices of one container.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Devices {
    pub(crate) nodes: Vec<Node>,
    /// What may be opened; `None` is everything.
    pub(crate) rules: Option<Vec<Rule>>,
}

impl Devices {
    /// The standard ones and those of the guest that are asked for; all of the guest's for a privileged container.
    pub(crate) fn plan(asked: &[v1::Device], privileged: bool) -> Result<Self, DeviceError> {
        let mut nodes: Vec<Node> = STANDARD
            .iter()
            .map(|&(name, major, minor)| Node {
                path: Path::new("/dev").join(name),
                mode: libc::S_IFCHR | 0o666,
                device: nix::sys::stat::makedev(major, minor),
            })
            .collect();
        if privileged {
            collect(Path::new("/dev"), DEPTH, &mut nodes);
        }
        let mut devices = Self { nodes, rules: (!privileged).then(standard_rules) };
        for device in asked.iter().filter(|device| device.disk.is_none()) {
            devices.give(device, Path::new(&device.guest_path))?;
        }
        Ok(devices)
    }

    /// Adds the guest's device at `guest_path`, under the name and with the access that `device` says.
    pub(crate) fn give(&mut self, device: &v1::Device, guest_path: &Path) -> Result<(), DeviceError> {
        let missing = || DeviceError::Missing(guest_path.display().to_string());
        let node = node(guest_path).ok_or_else(missing)?;
        let rule = Rule {
            block: node.mode & libc::S_IFMT == libc::S_IFBLK,
            major: Some(major(node.device)),
            minor: Some(minor(node.device)),
            access: access(&device.access)?,
        };
        self.rules.iter_mut().for_each(|rules| rules.push(rule));
        let path = PathBuf::from(&device.path);
        self.nodes.retain(|each| each.path != path);
        self.nodes.push(Node { path, ..node });
        Ok(())
    }
}

fn access(letters: &str) -> Result<i32, DeviceError> {
    letters.chars().try_fold(0, |set, letter| match letter {
        'r' => Ok(set | READ),
        'w' => Ok(set | WRITE),
        'm' => Ok(set | MKNOD),
        _ => Err(DeviceError::Access(letters.to_owned())),
    })
}

/// The node at `path`, if it is one.
fn node(path: &Path) -> Option<Node> {
    let metadata = fs::metadata(path).ok()?;
    let kind = metadata.file_type();
    let is_device = kind.is_char_device() || kind.is_block_device();
    is_device.then(|| Node { path: path.to_owned(), mode: metadata.mode(), device: metadata.rdev() })
}

/// Every node below a directory but the terminals, which each container has of its own.
fn collect(directory: &Path, depth: usize, into: &mut Vec<Node>) {
    let Some(deeper) = depth.checked_sub(1) else { return };
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let (path, kind) = (entry.path(), entry.file_type());
        let own = ["/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/ptmx", "/dev/console"];
        if own.iter().any(|each| path == Path::new(each)) || into.iter().any(|each| each.path == path) {
            continue;
        }
        match kind {
            Ok(kind) if kind.is_dir() => collect(&path, deeper, into),
            Ok(kind) if kind.is_char_device() || kind.is_block_device() => into.extend(node(&path)),
            _ => {}
        }
    }
}

fn standard_rules() -> Vec<Rule> {
    let char_rule = |major, minor| Rule { block: false, major: Some(major), minor, access: ANY };
    let make_any = |block| Rule { block, major: None, minor: None, access: MKNOD };
    let mut rules: Vec<Rule> = STANDARD.iter().map(|&(_, major, minor)| char_rule(major, Some(minor))).collect();
    // /dev/ptmx and the terminals behind it.
    rules.extend([char_rule(5, Some(2)), char_rule(136, None), make_any(false), make_any(true)]);
    rules
}

// eBPF: opcode 8 bits, destination and source register 4 bits each, jump 16 bits, constant 32 bits.

fn instruction(opcode: u64, destination: u64, source: u64, jump: i16, constant: i32) -> u64 {
    opcode
        | destination << 8
        | source << 12
        | u64::from(jump.cast_unsigned()) << 16
        | u64::from(constant.cast_unsigned()) << 32
}

const LOAD_WORD: u64 = 0x61;
const MOVE: u64 = 0xbf;
const MOVE_CONSTANT: u64 = 0xb7;
const AND_CONSTANT: u64 = 0x57;
const SHIFT_RIGHT_CONSTANT: u64 = 0x77;
const JUMP_UNLESS_EQUAL: u64 = 0x55;
const EXIT: u64 = 0x95;

/// A program over `struct bpf_cgroup_dev_ctx` that returns 1 for what a rule allows and 0 for the rest.
///
/// r2 = kind (1 block, 2 character), r3 = access asked for, r4 = major, r5 = minor, r6 = scratch.
fn program(rules: &[Rule]) -> Vec<u64> {
    let mut code = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(MOVE, 3, 2, 0, 0),
        instruction(AND_CONSTANT, 2, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT_CONSTANT, 3, 0, 0, 16),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules {
        // Each test jumps past the rest of its rule; the jump is patched once that length is known.
        let mut tests = vec![vec![(JUMP_UNLESS_EQUAL, 2, if rule.block { 1 } else { 2 })]];
        if rule.access != ANY {
            tests.push(vec![(MOVE, 6, 3), (AND_CONSTANT, 6, !rule.access & ANY), (JUMP_UNLESS_EQUAL, 6, 0)]);
        }
        let number = |number: u64| i32::try_from(number).unwrap_or(i32::MAX);
        tests.extend(rule.major.map(|major| vec![(JUMP_UNLESS_EQUAL, 4, number(major))]));
        tests.extend(rule.minor.map(|minor| vec![(JUMP_UNLESS_EQUAL, 5, number(minor))]));
        let steps: Vec<_> = tests.into_iter().flatten().collect();
        let length = steps.len();
        for (place, (opcode, register, constant)) in steps.into_iter().enumerate() {
            // Two instructions follow the tests: set the result and leave.
            let past = i16::try_from(length.saturating_sub(place).saturating_add(1)).unwrap_or(i16::MAX);
            code.push(match opcode {
                JUMP_UNLESS_EQUAL => instruction(opcode, register, 0, past, constant),
                MOVE => instruction(opcode, register, 3, 0, 0),
                _ => instruction(opcode, register, 0, 0, constant),
            });
        }
        code.extend([instruction(MOVE_CONSTANT, 0, 0, 0, 1), instruction(EXIT, 0, 0, 0, 0)]);
    }
    code.extend([instruction(MOVE_CONSTANT, 0, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)]);
    code
}

/// Binds the filter to a container's cgroup.
pub(crate) fn confine(cgroup: &crate::cgroup::Cgroup, devices: &Devices) -> io::Result<()> {
    match &devices.rules {
        Some(rules) => crate::sys::attach_device_filter(cgroup.fd(), &program(rules)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would, for the instructions used here.
    fn run(code: &[u64], block: bool, access: i32, major: u64, minor: u64) -> bool {
        let kind = if block { 1 } else { 2 };
        let context = [kind | u64::from(access.cast_unsigned()) << 16, major, minor];
        let (mut registers, mut at) = ([0u64; 11], 0usize);
        loop {
            let word = code[at];
            let (opcode, to, from) = (word & 0xff, (word >> 8 & 15) as usize, (word >> 12 & 15) as usize);
            let (jump, constant) = ((word >> 16) as i16, i64::from((word >> 32) as i32) as u64);
            at += 1;
            match opcode {
                LOAD_WORD => registers[to] = context[jump as usize / 4],
                MOVE => registers[to] = registers[from],
                MOVE_CONSTANT => registers[to] = constant,
                AND_CONSTANT => registers[to] &= constant,
                SHIFT_RIGHT_CONSTANT => registers[to] >>= constant,
                JUMP_UNLESS_EQUAL => at += if registers[to] == constant { 0 } else { jump as usize },
                EXIT => return registers[0] == 1,
                other => panic!("opcode {other:#x}"),
            }
        }
    }

    #[test]
    fn only_the_standard_devices_can_be_opened() {
        let code = program(&standard_rules());
        for (_, major, minor) in STANDARD {
            assert!(run(&code, false, ANY, major, minor));
            assert!(!run(&code, true, READ, major, minor), "a block device of the same number");
        }
        assert!(run(&code, false, READ | WRITE, 136, 12) && run(&code, false, READ, 5, 2));
        for (block, major, minor) in [(true, 254, 0), (true, 254, 1), (false, 1, 1), (false, 1, 11), (false, 10, 200)] {
            assert!(run(&code, block, MKNOD, major, minor), "making a node is harmless");
            assert!(!run(&code, block, READ, major, minor) && !run(&code, block, WRITE | MKNOD, major, minor));
        }
    }

    #[test]
    fn a_device_asked_for_opens_only_as_asked() {
        let asked =
            v1::Device { path: "/dev/x".into(), guest_path: "/dev/null".into(), access: "r".into(), disk: None };
        let mut devices = Devices::plan(&[asked], false).expect("planned");
        let node = devices.nodes.pop().expect("a node");
        assert_eq!((node.path.as_path(), node.device), (Path::new("/dev/x"), nix::sys::stat::makedev(1, 3)));
        let rule = Rule { block: false, major: Some(10), minor: Some(229), access: READ };
        let code = program(&[rule]);
        assert!(run(&code, false, READ, 10, 229));
        assert!(!run(&code, false, WRITE, 10, 229) && !run(&code, false, READ | WRITE, 10, 229));
        assert!(!run(&code, false, READ, 10, 228));
    }

    #[test]
    fn what_is_no_device_is_refused() {
        for path in ["/etc/passwd", "/dev/not-there", "/dev"] {
            let asked = v1::Device { path: "/dev/x".into(), guest_path: path.into(), access: "rw".into(), disk: None };
            assert!(matches!(Devices::plan(&[asked], false), Err(DeviceError::Missing(_))), "{path}");
        }
        assert!(matches!(access("rx"), Err(DeviceError::Access(_))));
    }
}
