//! The spawner itself: one thread, no file system, no network. It waits for a request or for a child's end.
//!
//! At its start it moves into namespaces of its own (mount, network, IPC, UTS) with an empty read-only root. Each VMM gets
//! all of these anew and a user namespace in which nobody is root, so that it reaches neither a file nor an interface of
//! the host nor another VMM. A file server, which acts for owners of the host's files, gets a mount and a network namespace.
//!
//! A network namespace costs more than all the others together, so it is made ahead: the spawner moves into a new one when
//! it has nothing to do, leaves it to its next child, and makes one for the child only if it has not come to that. One that
//! has started one VMM need not start another: a shim's never does.
#![expect(unsafe_code, reason = "clone3, execveat and what a child does between them")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::process::exit;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{chdir, pipe2, pivot_root, setsid};
use vmm_control::wire;

use super::IDLE_MS;
use super::message::{Ended, Kind, LIMITS, Report, Request, Task};
use super::volumes;

/// Any directory that every host has; in our own mount namespace the empty root is mounted over it.
const ROOT_AT: &str = "/proc";

/// Descriptors are moved above this before they are put where the program wants them.
const ABOVE_TARGETS: RawFd = 256;

/// clone(2); the libc crate's constant is cut to 32 bits.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Those of a VMM besides its network namespace. Its user namespace has no mapping: whatever it may do there, it is nobody.
const OWN_NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWUSER
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWNS)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);

/// What the next child gets of namespaces.
struct Namespaces {
    /// What a VMM gets besides a network namespace.
    vmm: CloneFlags,
    network: Network,
    /// VMMs that were asked for.
    vmms: u64,
}

/// The network namespace that the spawner is in.
#[derive(PartialEq, Eq)]
enum Network {
    /// Nobody else is: it is the next child's.
    Ahead,
    /// It is a child's.
    Taken,
    /// The same, and the host refuses another.
    Refused,
}

impl Namespaces {
    /// Those of a child that is about to be made.
    fn take(&mut self, kind: Kind) -> CloneFlags {
        let own = match kind {
            Kind::Vmm => {
                self.vmms += 1;
                self.vmm
            }
            Kind::FileServer => CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS,
        };
        match std::mem::replace(&mut self.network, Network::Taken) {
            Network::Ahead => own,
            Network::Taken | Network::Refused => own | CloneFlags::CLONE_NEWNET,
        }
    }

    /// How long to wait for something to do before [`Self::make_ahead`].
    fn patience(&self) -> PollTimeout {
        let wanted = self.network == Network::Taken && self.vmms > 1;
        if wanted { PollTimeout::from(IDLE_MS) } else { PollTimeout::NONE }
    }

    /// Moves the spawner into a network namespace for the next child.
    fn make_ahead(&mut self) {
        self.network = match unshare(CloneFlags::CLONE_NEWNET) {
            Ok(()) => Network::Ahead,
            Err(error) => {
                eprintln!("pericarp spawner: no network namespace ahead of the next VMM: {error}");
                Network::Refused
            }
        };
    }
}

/// A child that runs.
struct Running {
    pid: u32,
    pidfd: OwnedFd,
}

/// Never returns: ends when the daemon does.
pub(super) fn main(socket: &OwnedFd) -> ! {
    let done = isolate().map_err(|error| format!("cannot isolate itself (is it root?): {error}"));
    let done = done.and_then(|()| {
        let namespaces = Namespaces { vmm: vmm_namespaces(), network: Network::Ahead, vmms: 0 };
        serve(socket, namespaces).map_err(|error| error.to_string())
    });
    let code = match done {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("pericarp spawner: {error}");
            1
        }
    };
    exit(code)
}

/// Leaves the terminal's session and the host's namespaces for an empty read-only root.
fn isolate() -> nix::Result<()> {
    setsid()?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
    const NONE: Option<&str> = None;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("none"), ROOT_AT, Some("tmpfs"), flags, Some("size=4k,mode=0555"))?;
    chdir(ROOT_AT)?;
    volumes::make_place(".")?;
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    mount(NONE, "/", NONE, flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, NONE)
}

/// Those that a VMM gets besides its network namespace: all of its own, but for the user namespace where the host allows none
/// (`user.max_user_namespaces`).
fn vmm_namespaces() -> CloneFlags {
    match clone_into(None, OWN_NAMESPACES) {
        // SAFETY: ends this process without running what the parent registered for its own exit.
        Ok(None) => unsafe { libc::_exit(0) },
        Ok(Some(child)) => {
            let _ = reap(&child);
            OWN_NAMESPACES
        }
        Err(error) => {
            eprintln!("pericarp spawner: VMMs have no user namespace of their own, which the host refuses: {error}");
            OWN_NAMESPACES.difference(CloneFlags::CLONE_NEWUSER)
        }
    }
}

fn serve(socket: &OwnedFd, mut namespaces: Namespaces) -> io::Result<()> {
    let mut running: Vec<Running> = Vec::new();
    loop {
        let Some((asked, ended)) = wait(socket, &running, namespaces.patience())? else {
            namespaces.make_ahead();
            continue;
        };
        for index in ended.into_iter().rev() {
            let child = running.swap_remove(index);
            let ended = reap(&child)?;
            tell(socket, &Report::Ended { pid: child.pid, ended }, &[])?;
        }
        if asked {
            let Some((request, fds)) = wire::recv::<Request>(socket.as_fd(), LIMITS)? else { return Ok(()) };
            let id = request.id;
            match carry_out(request.task, fds, &mut namespaces) {
                Ok(Some(child)) => {
                    tell(socket, &Report::Started { id, pid: child.pid }, &[child.pidfd.as_raw_fd()])?;
                    running.push(child);
                }
                Ok(None) => tell(socket, &Report::Done { id }, &[])?,
                Err(reason) => tell(socket, &Report::Failed { id, reason }, &[])?,
            }
        }
    }
}

/// Does what is asked for; a process if that is what comes of it.
fn carry_out(task: Task, fds: Vec<OwnedFd>, namespaces: &mut Namespaces) -> Result<Option<Running>, String> {
    match task {
        Task::Start { kind, targets } => spawn(kind, namespaces.take(kind), &targets, fds).map(Some),
        Task::Attach { share, directory } => volumes::attach(fds, share, directory).map(|()| None),
        Task::Detach { share } => volumes::detach(fds, share).map(|()| None),
    }
}

/// A daemon that has just died is found out at the next receive.
fn tell(socket: &OwnedFd, report: &Report, fds: &[RawFd]) -> io::Result<()> {
    match wire::send(socket.as_fd(), LIMITS, report, fds) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Waits until there is a request or an end: whether the socket is readable, and which children have ended. `None` if there is
/// neither for so long.
fn wait(socket: &OwnedFd, running: &[Running], patience: PollTimeout) -> io::Result<Option<(bool, Vec<usize>)>> {
    let fds = std::iter::once(socket.as_fd()).chain(running.iter().map(|child| child.pidfd.as_fd()));
    let mut polled: Vec<PollFd<'_>> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    loop {
        match poll(&mut polled, patience) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(0) => return Ok(None),
            Ok(_) => break,
        }
    }
    let mut ready = polled.iter().map(|fd| fd.any().unwrap_or(true));
    let asked = ready.next().unwrap_or(false);
    Ok(Some((asked, ready.enumerate().filter_map(|(index, ended)| ended.then_some(index)).collect())))
}

fn reap(child: &Running) -> io::Result<Ended> {
    match waitid(Id::PIDFd(child.pidfd.as_fd()), WaitPidFlag::WEXITED)? {
        WaitStatus::Exited(_, code) => Ok(Ended::Exited(code)),
        WaitStatus::Signaled(_, signal, _) => Ok(Ended::Killed(signal as i32)),
        other => Err(io::Error::other(format!("a child that has ended is {other:?}"))),
    }
}

/// Starts a process in its cgroup; returns once its program is loaded.
fn spawn(kind: Kind, namespaces: CloneFlags, targets: &[RawFd], fds: Vec<OwnedFd>) -> Result<Running, String> {
    let mut fds = fds.into_iter();
    let (Some(binary), Some(cgroup)) = (fds.next(), fds.next()) else { return Err("no binary or cgroup given".into()) };
    let binary = move_up(binary)?;
    let given = fds.map(move_up).collect::<Result<Vec<_>, String>>()?;
    if given.len() != targets.len() || targets.iter().any(|target| !(0..ABOVE_TARGETS).contains(target)) {
        return Err("descriptors and their numbers do not match".into());
    }
    let (failed, fails) = pipe2(OFlag::O_CLOEXEC).map_err(|error| format!("pipe: {error}"))?;
    // Only one writing end may stay open, or its closing would not be seen.
    let fails = move_up(fails)?;
    match clone_into(Some(cgroup.as_fd()), namespaces)
        .map_err(|error| format!("clone3 into the pod's cgroup: {error}"))?
    {
        None => {
            let error = become_program(kind, &binary, &given, targets);
            // The only reader is the spawner; there is nobody else to tell.
            let _ = nix::unistd::write(&fails, &(error as i32).to_le_bytes());
            // SAFETY: ends this process without running what the parent registered for its own exit.
            unsafe { libc::_exit(127) }
        }
        Some(child) => {
            drop(fails);
            started(child, &failed)
        }
    }
}

/// Out of the way of the numbers that the program wants.
fn move_up(fd: impl AsFd) -> Result<OwnedFd, String> {
    let moved = fcntl(fd.as_fd(), FcntlArg::F_DUPFD_CLOEXEC(ABOVE_TARGETS)).map_err(|error| format!("dup: {error}"))?;
    // SAFETY: fcntl has just made this descriptor and nobody else holds it.
    Ok(unsafe { OwnedFd::from_raw_fd(moved) })
}

/// Learns from the child's pipe whether its program was loaded.
fn started(child: Running, failed: &OwnedFd) -> Result<Running, String> {
    let mut word = [0; 4];
    match nix::unistd::read(failed, &mut word) {
        // Closed by execveat(2).
        Ok(0) => Ok(child),
        result => {
            let reason = result.map(|_| Errno::from_raw(i32::from_le_bytes(word))).unwrap_or_else(|error| error);
            let _ = reap(&child);
            Err(format!("{reason} (is the program there, and statically linked?)"))
        }
    }
}

/// fork(2), but straight into a cgroup and namespaces, with a pidfd. `None` in the child.
fn clone_into(cgroup: Option<BorrowedFd<'_>>, namespaces: CloneFlags) -> nix::Result<Option<Running>> {
    let mut pidfd: RawFd = -1;
    // SAFETY: all zeroes is a valid clone_args (clone(2)).
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = libc::CLONE_PIDFD as u64 | namespaces.bits() as u64;
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: args is valid for its length, and pidfd outlives the call. This process has one thread, and without
    // CLONE_VM the child has a copy of its memory, so both may go on as after fork(2).
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match u32::try_from(pid) {
        Err(_) => Err(Errno::last()),
        Ok(0) => Ok(None),
        // SAFETY: clone3 has just made this descriptor and nobody else holds it.
        Ok(pid) => Ok(Some(Running { pid, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } })),
    }
}

/// In the child: puts the descriptors where they belong and becomes the program. Returns only on failure.
fn become_program(kind: Kind, binary: &OwnedFd, given: &[OwnedFd], targets: &[RawFd]) -> Errno {
    // A session of its own, so that a signal of the daemon's terminal does not reach it.
    if let Err(error) = setsid() {
        return error;
    }
    if kind == Kind::FileServer
        && let Err(error) = volumes::prepare()
    {
        return error;
    }
    for (fd, target) in given.iter().zip(targets) {
        // SAFETY: every target is below ABOVE_TARGETS and every source above, so no source is overwritten; what a
        // target replaces belongs to this process, which will not use it again.
        if unsafe { libc::dup2(fd.as_raw_fd(), *target) } < 0 {
            return Errno::last();
        }
    }
    let last = targets.iter().copied().max().unwrap_or(2).max(2);
    // SAFETY: marks, for execveat, all that is not a target; nothing is closed under an owner before that.
    let marked = unsafe { libc::close_range(last as u32 + 1, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
    if marked < 0 {
        return Errno::last();
    }
    exec(kind, binary)
}

fn exec(kind: Kind, binary: &OwnedFd) -> Errno {
    let name = match kind {
        Kind::Vmm => c"pericarp-vmm",
        Kind::FileServer => c"pericarp-fs",
    };
    let argv = [name.as_ptr(), std::ptr::null()];
    let envp: [*const libc::c_char; 1] = [std::ptr::null()];
    // SAFETY: argv and envp end with a null and their strings with NUL; the path is empty, so binary is run.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            binary.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    Errno::last()
}
