//! Processes of a pod that outlive the daemon: told apart from later ones of the same number.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

/// A process, told from any later one of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessRecord {
    /// On the host.
    pub pid: u32,
    /// Clock ticks from boot to its start (proc(5), field 22 of stat).
    pub start_time: u64,
}

/// A pidfd of a process, `None` if it has ended.
pub(crate) fn find(id: ProcessRecord) -> nix::Result<Option<OwnedFd>> {
    let pidfd = match pidfd_open(id.pid) {
        Ok(pidfd) => pidfd,
        Err(Errno::ESRCH | Errno::EINVAL) => return Ok(None),
        Err(error) => return Err(error),
    };
    // Checked after the pidfd is open: from here on the number cannot pass to another process unseen.
    if start_time(id.pid) != Some(id.start_time) {
        return Ok(None);
    }
    // One that has ended and waits to be reaped has its number still.
    let ended = poll(&mut [PollFd::new(std::os::fd::AsFd::as_fd(&pidfd), PollFlags::POLLIN)], PollTimeout::ZERO)? > 0;
    Ok((!ended).then_some(pidfd))
}

/// Sends a signal; one that has ended is left alone.
pub(crate) fn signal(pidfd: &OwnedFd, signal: libc::c_int) -> nix::Result<()> {
    #[expect(unsafe_code, reason = "nix has no pidfd_send_signal")]
    // SAFETY: the descriptor is open; a null siginfo means that of kill(2) (pidfd_send_signal(2)).
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<u8>(), 0) };
    match Errno::result(result) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error),
    }
}

#[expect(unsafe_code, reason = "nix has no pidfd_open")]
fn pidfd_open(pid: u32) -> nix::Result<OwnedFd> {
    // SAFETY: takes two integers (pidfd_open(2)).
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor and nobody else holds it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// When a process was started: field 22 of its stat (proc(5)), counted from behind the name, which may hold anything.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_found_by_number_and_start() {
        let pid = std::process::id();
        let start = start_time(pid).expect("proc is mounted");
        assert!(start > 0);
        assert!(pidfd_open(pid).expect("it runs").as_raw_fd() > 2);
        assert_eq!(start_time(u32::MAX), None);
    }

    #[test]
    fn a_process_that_has_ended_is_not_found() {
        let mut child = std::process::Command::new("true").spawn().expect("starts");
        let pid = child.id();
        let start_time = start_time(pid).expect("it is not reaped yet");
        let id = ProcessRecord { pid, start_time };
        assert!(find(ProcessRecord { start_time: start_time + 1, ..id }).expect("looks").is_none());
        let pidfd = pidfd_open(pid).expect("it is not reaped yet");
        poll(&mut [PollFd::new(std::os::fd::AsFd::as_fd(&pidfd), PollFlags::POLLIN)], PollTimeout::NONE)
            .expect("polls");
        assert!(find(id).expect("looks").is_none(), "a zombie");
        child.wait().expect("it is our child");
        assert!(find(id).expect("looks").is_none());
    }
}
