//! Volumes in a file server's mount namespace: the spawner's part, since only a process with one thread may enter one.
//!
//! A server sees one directory, [`SHARED`], a small file system in memory. Each volume is a mount in it by its number.
//! All of that ends with the server, whoever is left to clean up: no mount of it is ever in the host's table.
#![expect(unsafe_code, reason = "fork, and move_mount")]

use std::ffi::CString;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, mkdir, pipe2, unlink};

/// Where a file server finds its volumes.
const SHARED: &str = "/shared";

/// What the places of volumes may take: they have no contents of their own.
const OPTIONS: &str = "size=64k,nr_inodes=4096,mode=0755";

/// Makes the directory of volumes in the root that every child gets.
pub(super) fn make_place(root: &str) -> nix::Result<()> {
    mkdir(format!("{root}{SHARED}").as_str(), Mode::from_bits_truncate(0o555))
}

/// In a new server's own mount namespace, before it begins.
pub(super) fn prepare() -> nix::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("shared"), SHARED, Some("tmpfs"), flags, Some(OPTIONS))
}

/// Mounts a volume; beside the task its server's pidfd and the mount.
pub(super) fn attach(fds: Vec<OwnedFd>, share: u32, directory: bool) -> Result<(), String> {
    let [server, volume] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| "a server and a mount are needed".to_owned())?;
    let place = format!("{SHARED}/{share}");
    let done = inside(server.as_fd(), || {
        if directory {
            mkdir(place.as_str(), Mode::from_bits_truncate(0o755))?;
        } else {
            mknod(place.as_str(), SFlag::S_IFREG, Mode::from_bits_truncate(0o644), 0)?;
        }
        move_mount(volume.as_fd(), &place)
    });
    done.map_err(|error| format!("attaching a volume: {error}"))
}

/// Takes a volume away, also if it is in use, or is not there.
pub(super) fn detach(fds: Vec<OwnedFd>, share: u32) -> Result<(), String> {
    let [server] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| "a server is needed".to_owned())?;
    let place = format!("{SHARED}/{share}");
    let done = inside(server.as_fd(), || {
        match umount2(place.as_str(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // It is not there, or its place was made and nothing was mounted on it.
            Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => {}
            Err(error) => return Err(error),
        }
        match unlink(place.as_str()) {
            Err(Errno::EISDIR) => match fs::remove_dir(Path::new(&place)) {
                Err(error) if error.kind() != ErrorKind::NotFound => Err(Errno::EBUSY),
                _ => Ok(()),
            },
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(error) => Err(error),
        }
    });
    match done {
        // The server has ended, and its mounts with it.
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(format!("detaching a volume: {error}")),
    }
}

/// Does something in a server's mount namespace: in a child, which there is no way back from.
fn inside(server: BorrowedFd<'_>, work: impl FnOnce() -> nix::Result<()>) -> nix::Result<()> {
    let (told, tells) = pipe2(OFlag::O_CLOEXEC)?;
    // SAFETY: this process has one thread, so the child may do all that the parent may.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let done = setns(server, CloneFlags::CLONE_NEWNS).and_then(|()| work());
            let word = done.err().map_or(0, |error| error as i32);
            // The only reader is the parent; there is nobody else to tell.
            let _ = nix::unistd::write(&tells, &word.to_le_bytes());
            // SAFETY: ends this process without running what the parent registered for its own exit.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop(tells);
            let mut word = [0; 4];
            let read = nix::unistd::read(&told, &mut word);
            while matches!(waitpid(child, None), Err(Errno::EINTR) | Ok(WaitStatus::StillAlive)) {}
            match read? {
                4 => match i32::from_le_bytes(word) {
                    0 => Ok(()),
                    error => Err(Errno::from_raw(error)),
                },
                _ => Err(Errno::ECHILD),
            }
        }
    }
}

/// Attaches a mount that is attached nowhere.
fn move_mount(volume: BorrowedFd<'_>, place: &str) -> nix::Result<()> {
    let place = CString::new(place).map_err(|_| Errno::EINVAL)?;
    let (from, flags) = (c"".as_ptr(), libc::MOVE_MOUNT_F_EMPTY_PATH);
    // SAFETY: C strings that live past the call (move_mount(2)).
    let result =
        unsafe { libc::syscall(libc::SYS_move_mount, volume.as_raw_fd(), from, libc::AT_FDCWD, place.as_ptr(), flags) };
    Errno::result(result).map(drop)
}
