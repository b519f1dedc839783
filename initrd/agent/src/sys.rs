//! The system calls that no crate wraps, one function each, and nothing else.
//!
//! The rest of the agent is safe code. Nothing here decides anything or keeps any state.

#![expect(unsafe_code, reason = "raw system calls")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_long, c_uint, c_ulong, c_void, pid_t};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::Pid;

fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn raw_fd(result: c_long) -> io::Result<RawFd> {
    RawFd::try_from(check(result)?).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))
}

/// A descriptor that a system call has just made.
fn new_fd(result: c_long) -> io::Result<OwnedFd> {
    let fd = raw_fd(result)?;
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Which side of a fork this is.
pub(crate) enum Fork {
    /// The new process.
    Child,
    /// The old one, with the new one's pid and pidfd.
    Parent(Pid, OwnedFd),
}

/// Forks into `cgroup` (if given) with the namespaces of `flags` new.
///
/// The caller has no other thread, so that the child may go on as an ordinary program.
pub(crate) fn fork(flags: c_int, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Fork> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain data for which zero means "not used".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    let into_cgroup = if cgroup.is_some() { CLONE_INTO_CGROUP } else { 0 };
    args.flags = u64::from(flags.cast_unsigned()) | u64::from(libc::CLONE_PIDFD.cast_unsigned()) | into_cgroup;
    args.pidfd = std::ptr::from_mut(&mut pidfd).expose_provenance() as u64;
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    args.cgroup = cgroup.map_or(0, |fd| u64::from(fd.as_raw_fd().cast_unsigned()));
    // SAFETY: no CLONE_VM, so the child has its own copy of everything; there is one thread, so no lock is held by
    // another; `args` and `pidfd` live past the call.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) })?;
    if pid == 0 {
        return Ok(Fork::Child);
    }
    let pid = pid_t::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))?;
    Ok(Fork::Parent(Pid::from_raw(pid), new_fd(c_long::from(pidfd))?))
}

/// Of `linux/sched.h`; libc has it in a type that cannot hold it.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// Copies descriptor `fd` of the process behind `pidfd`.
pub(crate) fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: plain integers.
    new_fd(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })
}

/// Sends a signal to the process behind `pidfd`.
pub(crate) fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: c_int) -> io::Result<()> {
    let none = std::ptr::null::<c_void>();
    // SAFETY: a null siginfo is allowed.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0) }).map(drop)
}

/// kill(2), for any signal there is.
pub(crate) fn kill(pid: pid_t, signal: c_int) -> io::Result<()> {
    // SAFETY: plain integers.
    check(c_long::from(unsafe { libc::kill(pid, signal) })).map(drop)
}

/// Takes leave of one child that has ended: its pid and wait(2)'s status. `None` if there is none.
pub(crate) fn reap() -> Option<(Pid, c_int)> {
    let mut status: c_int = 0;
    // SAFETY: writes one int, which lives past the call.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG | libc::__WALL) };
    (pid > 0).then(|| (Pid::from_raw(pid), status))
}

/// Closes every descriptor from `first` on.
pub(crate) fn close_from(first: RawFd) -> io::Result<()> {
    // SAFETY: only called in a child that from then on uses none of them (it never drops what owned them).
    check(unsafe { libc::syscall(libc::SYS_close_range, first, c_uint::MAX, 0) }).map(drop)
}

/// Makes `fd` also be descriptor `number`, inherited over execve(2) or not.
pub(crate) fn dup_to(fd: RawFd, number: RawFd, inherited: bool) -> io::Result<()> {
    if fd == number {
        let flags = if inherited { 0 } else { libc::FD_CLOEXEC };
        // SAFETY: plain integers.
        return check(c_long::from(unsafe { libc::fcntl(fd, libc::F_SETFD, flags) })).map(drop);
    }
    let flags = if inherited { 0 } else { libc::O_CLOEXEC };
    // SAFETY: only called in a child, on numbers that it no longer uses for anything else.
    check(c_long::from(unsafe { libc::dup3(fd, number, flags) })).map(drop)
}

/// A copy of `fd` with a free number of `least` or more.
pub(crate) fn dup_above(fd: RawFd, least: RawFd) -> io::Result<RawFd> {
    // SAFETY: plain integers; the copy is a number that nothing owned before.
    raw_fd(c_long::from(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, least) }))
}

/// A descriptor by its number, for a child that has laid its descriptors out with [`dup_to`].
pub(crate) fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller has just placed it there with `dup_to` and no other owner is ever dropped in that process.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Copies the mount at `path` into a mount that is attached nowhere.
pub(crate) fn clone_mount(path: &CStr) -> io::Result<OwnedFd> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_RECURSIVE.cast_unsigned();
    // SAFETY: a C string that lives past the call.
    new_fd(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })
}

/// As [`clone_mount`], of what a descriptor is open on.
pub(crate) fn clone_open(of: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::OPEN_TREE_CLONE
        | libc::OPEN_TREE_CLOEXEC
        | libc::AT_RECURSIVE.cast_unsigned()
        | libc::AT_EMPTY_PATH.cast_unsigned();
    // SAFETY: a C string that lives past the call.
    new_fd(unsafe { libc::syscall(libc::SYS_open_tree, of.as_raw_fd(), c"".as_ptr(), flags) })
}

/// Attaches a mount made by [`clone_mount`] at `path`.
pub(crate) fn attach_mount(mount: BorrowedFd<'_>, path: &CStr) -> io::Result<()> {
    let (from, flags) = (c"".as_ptr(), libc::MOVE_MOUNT_F_EMPTY_PATH);
    // SAFETY: C strings that live past the call.
    let result =
        unsafe { libc::syscall(libc::SYS_move_mount, mount.as_raw_fd(), from, libc::AT_FDCWD, path.as_ptr(), flags) };
    check(result).map(drop)
}

/// Makes every mount of the tree behind `mount` refuse writes.
pub(crate) fn mount_read_only(mount: BorrowedFd<'_>) -> io::Result<()> {
    set_attributes(mount, libc::MOUNT_ATTR_RDONLY, 0)
}

/// Makes every mount of the tree behind `mount` refuse writes and executions.
pub(crate) fn mount_for_reading(mount: BorrowedFd<'_>) -> io::Result<()> {
    set_attributes(mount, libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOEXEC, 0)
}

/// Makes every mount of the tree behind `mount`, which is attached nowhere, show owners as those of a user namespace.
pub(crate) fn map_owners(mount: BorrowedFd<'_>, users: BorrowedFd<'_>) -> io::Result<()> {
    set_attributes(mount, libc::MOUNT_ATTR_IDMAP, u64::from(users.as_raw_fd().cast_unsigned()))
}

fn set_attributes(mount: BorrowedFd<'_>, attr_set: u64, userns_fd: u64) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set, attr_clr: 0, propagation: 0, userns_fd };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the structure lives past the call and its size is passed with it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    check(result).map(drop)
}

#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    number: c_int,
    names: [u8; 128],
}

#[repr(C)]
struct BlkpgArgument {
    operation: c_int,
    flags: c_int,
    length: c_int,
    data: *mut BlkpgPartition,
}

const BLKPG: c_ulong = 0x1269;
const BLKPG_ADD_PARTITION: c_int = 1;
const BLKPG_DEL_PARTITION: c_int = 2;

fn blkpg(disk: BorrowedFd<'_>, operation: c_int, number: i32, start: i64, length: i64) -> io::Result<()> {
    let mut partition = BlkpgPartition { start, length, number, names: [0; 128] };
    let size = c_int::try_from(size_of::<BlkpgPartition>()).unwrap_or(0);
    let mut argument = BlkpgArgument { operation, flags: 0, length: size, data: &raw mut partition };
    // SAFETY: both structures have the kernel's layout (linux/blkpg.h) and live past the call.
    check(c_long::from(unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw mut argument) })).map(drop)
}

/// Makes `length` bytes from `start` of a disk its partition `number`.
pub(crate) fn add_partition(disk: BorrowedFd<'_>, number: i32, start: i64, length: i64) -> io::Result<()> {
    blkpg(disk, BLKPG_ADD_PARTITION, number, start, length)
}

/// Takes partition `number` away; `EBUSY` while something uses it.
pub(crate) fn delete_partition(disk: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    blkpg(disk, BLKPG_DEL_PARTITION, number, 0, 0)
}

/// Something that the kernel's device mapper is to do with a device of a name (linux/dm-ioctl.h).
#[derive(Clone, Copy, Debug)]
pub(crate) enum DeviceMapper<'a> {
    /// Makes one without contents.
    Create,
    /// Gives it one read-only target, of so many sectors.
    Load { sectors: u64, target: &'a str, table: &'a str },
    /// Makes what was loaded live.
    Resume,
    /// Removes it, once nobody uses it any more.
    Remove,
}

const DM_DEV_CREATE: c_ulong = 0xc138_fd03;
const DM_DEV_REMOVE: c_ulong = 0xc138_fd04;
const DM_DEV_SUSPEND: c_ulong = 0xc138_fd06;
const DM_TABLE_LOAD: c_ulong = 0xc138_fd09;
const DM_READONLY_FLAG: u32 = 1 << 0;
const DM_DEFERRED_REMOVE: u32 = 1 << 17;

/// The lengths of `struct dm_ioctl`'s name and of its end (uuid and padding), and of `struct dm_target_spec`'s type.
const DM_NAME_LEN: usize = 128;
const DM_END_LEN: usize = 136;
const DM_MAX_TYPE_NAME: usize = 16;

/// Longest table that [`device_mapper`] takes, its end in bytes of zero included.
const DM_TABLE_BYTES: usize = 512;

/// `struct dm_ioctl` with one `struct dm_target_spec` and its table behind it.
#[repr(C)]
struct DmRequest {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; DM_NAME_LEN],
    end: [u8; DM_END_LEN],
    sector_start: u64,
    length: u64,
    status: i32,
    next: u32,
    target_type: [u8; DM_MAX_TYPE_NAME],
    table: [u8; DM_TABLE_BYTES],
}

/// `struct dm_ioctl` alone.
const DM_IOCTL_BYTES: u32 = 312;

/// Copies a text and the zero behind it; an error if it does not fit.
fn copy_text(to: &mut [u8], text: &str) -> io::Result<()> {
    let place = to.get_mut(..text.len()).filter(|_| !text.contains('\0'));
    place.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(text.as_bytes());
    // There is room for the zero, which is there already.
    if text.len() < to.len() { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// Has the device mapper behind `control` do something with the device `name`; the device's minor number.
pub(crate) fn device_mapper(control: BorrowedFd<'_>, name: &str, order: DeviceMapper<'_>) -> io::Result<u32> {
    let size = u32::try_from(size_of::<DmRequest>()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the structure is plain data for which zero means "not used".
    let mut request: DmRequest = unsafe { std::mem::zeroed() };
    (request.version, request.data_size, request.data_start) = ([4, 0, 0], size, DM_IOCTL_BYTES);
    copy_text(&mut request.name, name)?;
    let command = match order {
        DeviceMapper::Create => DM_DEV_CREATE,
        DeviceMapper::Load { sectors, target, table } => {
            (request.flags, request.target_count, request.length) = (DM_READONLY_FLAG, 1, sectors);
            copy_text(&mut request.target_type, target)?;
            copy_text(&mut request.table, table)?;
            DM_TABLE_LOAD
        }
        DeviceMapper::Resume => DM_DEV_SUSPEND,
        DeviceMapper::Remove => {
            request.flags = DM_DEFERRED_REMOVE;
            DM_DEV_REMOVE
        }
    };
    // SAFETY: the structure has the kernel's layout, its own size is in it, and it lives past the call.
    check(c_long::from(unsafe { libc::ioctl(control.as_raw_fd(), command, &raw mut request) }))?;
    // As huge_encode_dev of linux/kdev_t.h packs it.
    u32::try_from((request.dev & 0xff) | ((request.dev >> 12) & 0x000f_ff00)).map_err(io::Error::other)
}

/// Most bytes that [`add_entropy`] takes at once.
pub(crate) const ENTROPY_BYTES: usize = 512;

#[repr(C)]
struct RandPoolInfo {
    entropy_bits: c_int,
    size: c_int,
    bytes: [u8; ENTROPY_BYTES],
}

const RNDADDENTROPY: c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: c_ulong = 0x5207;

/// Feeds `seed` (at most [`ENTROPY_BYTES`]) to the random pool, credits it, and reseeds what numbers are drawn from.
pub(crate) fn add_entropy(random: BorrowedFd<'_>, seed: &[u8]) -> io::Result<()> {
    let mut info = RandPoolInfo { entropy_bits: 0, size: 0, bytes: [0; ENTROPY_BYTES] };
    for (to, from) in info.bytes.iter_mut().zip(seed) {
        *to = *from;
    }
    info.size = c_int::try_from(seed.len().min(ENTROPY_BYTES)).unwrap_or(0);
    info.entropy_bits = info.size.saturating_mul(8);
    // SAFETY: the layout of `struct rand_pool_info` (linux/random.h) with its bytes behind it; it lives past the call.
    check(c_long::from(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw mut info) }))?;
    // SAFETY: takes no argument.
    check(c_long::from(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) })).map(drop)
}

/// `struct ethtool_channels` (linux/ethtool.h).
#[repr(C)]
#[derive(Default)]
struct EthtoolChannels {
    command: u32,
    /// Most of those that receive, send, do something else, and do both.
    most: [u32; 4],
    /// How many are in use.
    used: [u32; 4],
}

const ETHTOOL_GCHANNELS: u32 = 0x3c;
const ETHTOOL_SCHANNELS: u32 = 0x3d;
/// Where those are that receive and send.
const COMBINED: usize = 3;

/// Has a network interface use so many pairs of queues, or all that it has.
pub(crate) fn set_channels(interface: &str, wanted: u32) -> io::Result<()> {
    let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut channels = EthtoolChannels { command: ETHTOOL_GCHANNELS, ..EthtoolChannels::default() };
    ethtool(socket.as_fd(), interface, &mut channels)?;
    let wanted = wanted.min(channels.most[COMBINED]);
    if channels.used[COMBINED] == wanted {
        return Ok(());
    }
    channels.command = ETHTOOL_SCHANNELS;
    channels.used[COMBINED] = wanted;
    ethtool(socket.as_fd(), interface, &mut channels)
}

fn ethtool(socket: BorrowedFd<'_>, interface: &str, channels: &mut EthtoolChannels) -> io::Result<()> {
    // SAFETY: all zeroes is a valid ifreq, which holds integers, byte arrays and a pointer that is set next.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(channels).cast();
    // SAFETY: SIOCETHTOOL reads an ifreq whose name is terminated, and reads and writes what that points to: for the commands above a
    // struct ethtool_channels, which lives past the call.
    check(c_long::from(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) })).map(drop)
}

/// Bytes that a read of `fd` would find now.
pub(crate) fn readable_bytes(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: c_int = 0;
    // SAFETY: FIONREAD writes one int, which lives past the call.
    check(c_long::from(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut bytes) }))?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// Opens the terminal whose other end is `master`, after unlocking it.
pub(crate) fn open_terminal(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let unlocked: c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int, which lives past the call.
    check(c_long::from(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) }))?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open(2) flags by value and returns a new descriptor.
    new_fd(c_long::from(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) }))
}

/// Makes `terminal` the controlling terminal of the calling session leader.
pub(crate) fn set_controlling_terminal(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: plain integers.
    check(c_long::from(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) })).map(drop)
}

/// Sets a terminal's size.
pub(crate) fn set_window_size(terminal: BorrowedFd<'_>, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which lives past the call.
    check(c_long::from(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })).map(drop)
}

/// Where a terminal's foreground process group is; signals typed at it go there.
pub(crate) fn foreground_group(terminal: BorrowedFd<'_>) -> io::Result<Pid> {
    let mut group: pid_t = 0;
    // SAFETY: TIOCGPGRP writes one pid_t, which lives past the call.
    check(c_long::from(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGPGRP, &raw mut group) }))?;
    Ok(Pid::from_raw(group))
}

/// prctl(2) with integer arguments.
fn prctl(option: c_int, argument: c_ulong) -> io::Result<()> {
    let zero: c_ulong = 0;
    // SAFETY: none of the options used here takes a pointer.
    check(c_long::from(unsafe { libc::prctl(option, argument, zero, zero, zero) })).map(drop)
}

/// Whether other processes may look into this one (until the next execve).
pub(crate) fn set_dumpable(dumpable: bool) -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, c_ulong::from(dumpable))
}

/// Makes what this thread creates from here on belong to a user and a group, all that it may do left to it (setfsuid(2), and
/// capabilities(7) of `SECBIT_NO_SETUID_FIXUP`).
pub(crate) fn create_as((uid, gid): (u32, u32)) -> io::Result<()> {
    prctl(libc::PR_SET_SECUREBITS, libc::SECBIT_NO_SETUID_FIXUP.try_into().unwrap_or_default())?;
    nix::unistd::setfsgid(gid.into());
    nix::unistd::setfsuid(uid.into());
    prctl(libc::PR_SET_SECUREBITS, 0)
}

/// Keeps the permitted capabilities over the next setuid.
pub(crate) fn keep_capabilities() -> io::Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, 1)
}

/// No execve gives more privileges from here on.
pub(crate) fn no_new_privileges() -> io::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1)
}

/// Whether capability number `capability` is in the bounding set.
pub(crate) fn is_bounding(capability: u8) -> bool {
    // SAFETY: plain integers.
    unsafe { libc::prctl(libc::PR_CAPBSET_READ, c_ulong::from(capability)) == 1 }
}

/// Takes capability number `capability` out of the bounding set.
pub(crate) fn drop_bounding(capability: u8) -> io::Result<()> {
    prctl(libc::PR_CAPBSET_DROP, c_ulong::from(capability))
}

/// Puts capability number `capability` into the ambient set.
pub(crate) fn raise_ambient(capability: u8) -> io::Result<()> {
    let (raise, zero): (c_ulong, c_ulong) = (2, 0); // PR_CAP_AMBIENT_RAISE
    // SAFETY: plain integers.
    let result = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, c_ulong::from(capability), zero, zero) };
    check(c_long::from(result)).map(drop)
}

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: c_int,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Sets the calling process's effective, permitted and inheritable sets, bit N being capability N.
pub(crate) fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let header = CapabilityHeader { version: LINUX_CAPABILITY_VERSION_3, pid: 0 };
    let half = |shift: u32| {
        let word = |set: u64| u32::try_from((set >> shift) & u64::from(u32::MAX)).unwrap_or(0);
        CapabilityData { effective: word(effective), permitted: word(permitted), inheritable: word(inheritable) }
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 of the interface reads one header and two data words, which live past the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) }).map(drop)
}

/// One instruction of classic BPF is this long.
pub(crate) const FILTER_INSTRUCTION_BYTES: usize = 8;

/// Installs a seccomp filter given as the bytes of its instructions.
pub(crate) fn install_seccomp(program: &[u8]) -> io::Result<()> {
    let instructions: Vec<libc::sock_filter> = program
        .as_chunks::<FILTER_INSTRUCTION_BYTES>()
        .0
        .iter()
        .map(|&[c0, c1, jt, jf, k0, k1, k2, k3]| libc::sock_filter {
            code: u16::from_le_bytes([c0, c1]),
            jt,
            jf,
            k: u32::from_le_bytes([k0, k1, k2, k3]),
        })
        .collect();
    let length = u16::try_from(instructions.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let filter = libc::sock_fprog { len: length, filter: instructions.as_ptr().cast_mut() };
    // SAFETY: the kernel reads `length` instructions and checks the program; both live past the call.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter) };
    check(result).map(drop)
}

const BPF_PROG_LOAD: c_int = 5;
const BPF_PROG_ATTACH: c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;

/// The part of `union bpf_attr` that loading a program needs.
#[repr(C)]
#[derive(Default)]
struct BpfLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// The part of `union bpf_attr` that attaching one needs.
#[repr(C)]
struct BpfAttach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

fn address<T>(of: *const T) -> u64 {
    of.expose_provenance() as u64
}

/// Loads a device filter (eBPF instructions) and binds it to a cgroup for good.
pub(crate) fn attach_device_filter(cgroup: BorrowedFd<'_>, program: &[u64]) -> io::Result<()> {
    let load = BpfLoad {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?,
        instructions: address(program.as_ptr()),
        license: address(c"Apache-2.0".as_ptr()),
        ..BpfLoad::default()
    };
    // SAFETY: the attribute, the instructions and the licence live past the call; the kernel verifies the program.
    let loaded = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<BpfLoad>()) };
    let program = new_fd(loaded)?;
    let attach = BpfAttach {
        target: cgroup.as_raw_fd().cast_unsigned(),
        program: program.as_fd().as_raw_fd().cast_unsigned(),
        attach_type: BPF_CGROUP_DEVICE,
        flags: 0,
    };
    // SAFETY: the attribute lives past the call.
    check(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<BpfAttach>()) }).map(drop)
}

/// Sets every signal back to its default and unblocks all: what a new program expects.
pub(crate) fn reset_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: setting a default disposition runs no code; those that cannot be set are refused.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: the set is initialised by sigemptyset before it is read.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Replaces the program; returns only if that failed.
pub(crate) fn execute(path: &CStr, arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|text| text.as_ptr()).chain(std::iter::once(std::ptr::null())).collect()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: both arrays end in null and point to C strings that live past the call.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Ends this process at once, running nothing on the way out.
pub(crate) fn exit_now(code: c_int) -> ! {
    // SAFETY: never returns.
    unsafe { libc::_exit(code) }
}

/// The supplementary groups of this process.
pub(crate) fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: pointer and length are of one slice.
    check(c_long::from(unsafe { libc::setgroups(groups.len(), groups.as_ptr()) })).map(drop)
}

/// Real, effective and saved group, then user, by the bare system calls (this process has one thread).
pub(crate) fn set_ids(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: plain integers.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: plain integers.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) }).map(drop)
}
