//! How a process gets from the agent's fork to the program asked for.
//!
//! The agent has one thread, so the child is an ordinary program: it enters its namespaces and file systems, reports,
//! waits for the word to go on, gives up its privileges in the order that still lets it take the next step, and
//! becomes the program. Over the status channel it sends [`Report`]s; that the channel then closes by itself
//! (close-on-exec) means that the program runs.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use agent_protocol::v1;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Pid, Uid, chdir, fchown, setsid};
use prost::Message;
use thiserror::Error;

use crate::plan::ProcessPlan;
use crate::rootfs::{self, Root, RootError};
use crate::sys::{self, Fork};
use crate::userns::UserSpace;
use crate::users::{Databases, Identity, UserError};

/// Exit status of a process that never became its program, as shells have it.
const NOT_STARTED: i32 = 127;

/// Where the child keeps its end of the status channel.
const STATUS_FD: RawFd = 3;

/// Descriptors below this number are places of [`lay_out`].
const PLACES: RawFd = 8;

/// Longest report in bytes.
const REPORT_BYTES: usize = 4096;

/// Most supplementary groups that a report tells of, so that it stays whole.
const REPORTED_GROUPS: usize = 512;

/// Open files at first, unless the plan says otherwise: few, because some programs walk through all that may be open.
/// A process may raise it as far as the agent's own limit.
const OPEN_FILES: u64 = 1024;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the child says before it is the program.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Report {
    /// All is set up.
    Ready {
        /// The number of its terminal's master in the child, if it has one.
        terminal: Option<RawFd>,
        /// Who the program will run as.
        user: v1::Created,
    },
    /// It has given up.
    Failed {
        /// The fault is in what was asked for.
        cannot_exec: bool,
        text: String,
    },
}

impl Report {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = match self {
            Self::Ready { terminal, user } => {
                [&[0], terminal.unwrap_or(-1).to_ne_bytes().as_slice(), &user.encode_to_vec()].concat()
            }
            Self::Failed { cannot_exec, text } => [&[1 + u8::from(*cannot_exec)], text.as_bytes()].concat(),
        };
        bytes.truncate(REPORT_BYTES);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (&kind, rest) = bytes.split_first()?;
        match kind {
            0 => {
                let (number, user) = rest.split_first_chunk()?;
                let number = RawFd::from_ne_bytes(*number);
                let user = v1::Created::decode(user).ok()?;
                Some(Self::Ready { terminal: (number >= 0).then_some(number), user })
            }
            1 | 2 => {
                let text = String::from_utf8_lossy(rest).into_owned();
                Some(Self::Failed { cannot_exec: kind == 2, text })
            }
            _ => None,
        }
    }

    /// Next report of a child; `None` once it is the program, or dead.
    pub(crate) fn receive(status: &OwnedFd) -> nix::Result<Option<Self>> {
        let mut bytes = [0; REPORT_BYTES];
        let count = recv(status.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT)?;
        Ok(bytes.get(..count).and_then(Self::decode))
    }
}

/// Why a process could not be started.
#[derive(Debug, Error)]
pub(crate) enum ProcessError {
    /// A step that should not fail.
    #[error("cannot {0}: {1}")]
    Step(&'static str, #[source] io::Error),
    /// See [`RootError`].
    #[error(transparent)]
    Root(#[from] RootError),
    /// See [`UserError`].
    #[error(transparent)]
    User(#[from] UserError),
    /// The program, worded as runc words it.
    #[error("exec: {0:?}: {1}")]
    Program(String, String),
    /// The directory is not there, or the user may not enter it.
    #[error("chdir to the working directory {0:?}: {1}")]
    Directory(String, #[source] io::Error),
}

impl ProcessError {
    fn report(&self) -> Report {
        let cannot_exec = matches!(self, Self::User(_) | Self::Program(..) | Self::Directory(..));
        Report::Failed { cannot_exec, text: self.to_string() }
    }
}

/// In what surroundings a process runs.
#[derive(Debug)]
pub(crate) enum Surroundings<'a> {
    /// A new container's.
    New(&'a Root),
    /// Those of the container whose first process this is.
    Of(BorrowedFd<'a>),
}

/// Whose process table it sees.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PidSpace<'a> {
    /// A new one.
    New,
    /// The agent's.
    Agent,
    /// That of the process behind this pidfd.
    Of(BorrowedFd<'a>),
}

/// A process to start.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    pub(crate) plan: &'a ProcessPlan,
    pub(crate) surroundings: Surroundings<'a>,
    /// The user namespace it joins; `None` leaves it in the guest's.
    pub(crate) users: Option<&'a UserSpace>,
    pub(crate) pid_space: PidSpace<'a>,
    pub(crate) cgroup: BorrowedFd<'a>,
    /// Standard input, output and error.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
}

/// A process that is on its way.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
    /// Does not block.
    pub(crate) status: OwnedFd,
}

fn step<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> ProcessError {
    move |error| ProcessError::Step(what, error.into())
}

impl Job<'_> {
    /// Forks the process, which then sets itself up.
    pub(crate) fn start(&self) -> Result<Started, ProcessError> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).map_err(step("make a channel"))?;
        let namespaces = match (&self.surroundings, self.pid_space) {
            (Surroundings::New(_), PidSpace::New) => libc::CLONE_NEWNS | libc::CLONE_NEWPID,
            (Surroundings::New(_), _) => libc::CLONE_NEWNS,
            (Surroundings::Of(_), _) => 0,
        };
        let forked = within(self.pid_space, || sys::fork(namespaces, Some(self.cgroup)));
        match forked.map_err(step("start a process"))? {
            Fork::Parent(pid, pidfd) => Ok(Started { pid, pidfd, status: ours }),
            Fork::Child => self.live(&theirs),
        }
    }

    /// The child, to its end.
    fn live(&self, status: &OwnedFd) -> ! {
        let stdio = self.stdio.map(|fd| fd.as_raw_fd());
        let target = match &self.surroundings {
            Surroundings::New(_) => None,
            Surroundings::Of(pidfd) => Some(pidfd.as_raw_fd()),
        };
        let users = self.users.map(|users| users.fd().as_raw_fd());
        let laid_out = lay_out(stdio, status.as_raw_fd(), [target, users]);
        let status = sys::adopt(STATUS_FD);
        let failed = laid_out.and_then(|[target, users]| self.become_program(&status, target, users.as_ref()));
        if let Err(error) = failed {
            // If nobody listens any more, the exit status still tells.
            let _ = send(status.as_raw_fd(), &error.report().encode(), MsgFlags::MSG_NOSIGNAL);
        }
        sys::exit_now(NOT_STARTED)
    }

    /// Returns only an error.
    fn become_program(
        &self,
        status: &OwnedFd,
        target: Option<OwnedFd>,
        users: Option<&OwnedFd>,
    ) -> Result<(), ProcessError> {
        setsid().map_err(step("start a session"))?;
        sys::set_dumpable(false).map_err(step("hide from the container"))?;
        sys::reset_signals();
        fs::write("/proc/self/oom_score_adj", self.plan.oom_score_adj.to_string())
            .map_err(step("set the OOM score"))?;
        self.enter(target, users)?;
        let (identity, environment) = self.identify()?;
        let program = self.find(&environment)?;
        let terminal = if self.plan.terminal { Some(self.open_terminal()?) } else { None };
        let master = terminal.as_ref().map(|(master, _)| master.as_raw_fd());
        let groups = identity.groups.iter().copied().take(REPORTED_GROUPS).collect();
        let user = v1::Created { uid: identity.uid, gid: identity.gid, groups };
        let ready = Report::Ready { terminal: master, user };
        send(status.as_raw_fd(), &ready.encode(), MsgFlags::MSG_NOSIGNAL).map_err(step("report to the agent"))?;
        wait_for_go(status)?;
        if let Some((_, terminal)) = &terminal {
            take_terminal(terminal).map_err(step("take the terminal"))?;
        }
        self.give_up_privileges(&identity, users)?;
        Err(self.execute(&program, &environment))
    }

    fn enter(&self, target: Option<OwnedFd>, users: Option<&OwnedFd>) -> Result<(), ProcessError> {
        match (&self.surroundings, target) {
            (Surroundings::New(root), _) => {
                // Only now, because the cgroup at the time of the fork was still the agent's.
                unshare(CloneFlags::CLONE_NEWCGROUP).map_err(step("make a cgroup namespace"))?;
                Ok(root.enter(users.map(AsFd::as_fd))?)
            }
            (Surroundings::Of(_), Some(target)) => setns(target, CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP)
                .map_err(step("enter the container")),
            (Surroundings::Of(_), None) => Ok(()),
        }
    }

    /// Who it runs as, and its whole environment.
    fn identify(&self) -> Result<(Identity, Vec<String>), ProcessError> {
        let identity = Databases::read().identify(&self.plan.user)?;
        let mut environment = self.plan.env.clone();
        let home = identity.home.as_deref().filter(|home| !home.is_empty()).unwrap_or("/");
        let host = nix::unistd::gethostname().unwrap_or_default();
        let host = host.to_string_lossy();
        let mut defaults = vec![("PATH", DEFAULT_PATH), ("HOME", home), ("HOSTNAME", &host)];
        if self.plan.terminal {
            defaults.push(("TERM", "xterm"));
        }
        for (name, value) in defaults {
            if variable(&environment, name).is_none() {
                environment.push(format!("{name}={value}"));
            }
        }
        Ok((identity, environment))
    }

    /// The program's path. The working directory is entered on the way, because a name may be relative to it.
    fn find(&self, environment: &[String]) -> Result<PathBuf, ProcessError> {
        let cwd = self.plan.cwd.as_str();
        match chdir(cwd) {
            // Root may be shut out where the user is not; it is tried again as that user.
            Ok(()) | Err(nix::Error::EACCES) => {}
            Err(error) => return Err(ProcessError::Directory(cwd.to_owned(), error.into())),
        }
        let name = self.plan.args.first().map(String::as_str).unwrap_or_default();
        let path = variable(environment, "PATH").unwrap_or_default();
        find_program(name, path).map_err(|text| ProcessError::Program(name.to_owned(), text))
    }

    fn open_terminal(&self) -> Result<(OwnedFd, OwnedFd), ProcessError> {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let master = open("/dev/ptmx", flags, Mode::empty()).map_err(step("open /dev/ptmx"))?;
        let terminal = sys::open_terminal(master.as_fd()).map_err(step("open a terminal"))?;
        if let Surroundings::New(root) = &self.surroundings {
            rootfs::bind_console(&terminal, root.owners)?;
        }
        Ok((master, terminal))
    }

    /// Makes the container's users this process's own: root of them, and nobody in the guest. Mounts get an owner that is
    /// one of them too, and those that are there can no longer be taken apart (mount_namespaces(7), "Restrictions").
    fn join(&self, users: &OwnedFd) -> Result<(), ProcessError> {
        setns(users, CloneFlags::CLONE_NEWUSER).map_err(step("join the user namespace"))?;
        match self.surroundings {
            Surroundings::New(_) => unshare(CloneFlags::CLONE_NEWNS).map_err(step("make a mount namespace")),
            Surroundings::Of(_) => Ok(()),
        }
    }

    fn give_up_privileges(&self, identity: &Identity, users: Option<&OwnedFd>) -> Result<(), ProcessError> {
        let plan = self.plan;
        let uid = self.users.map_or(identity.uid, |users| users.outside(identity.uid, identity.gid).0);
        for fd in [0, 1, 2] {
            own_stdio(fd, uid).map_err(step("hand over the standard streams"))?;
        }
        if !plan.rlimits.iter().any(|(resource, ..)| *resource == Resource::RLIMIT_NOFILE) {
            let limited = getrlimit(Resource::RLIMIT_NOFILE)
                .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES.min(hard), hard));
            limited.map_err(step("limit open files"))?;
        }
        for &(resource, soft, hard) in &plan.rlimits {
            setrlimit(resource, soft, hard).map_err(step("set a resource limit"))?;
        }
        if let Some(users) = users {
            self.join(users)?;
        }
        let confine = || sys::install_seccomp(&plan.seccomp).map_err(step("install the seccomp filter"));
        // Without no_new_privs a filter needs CAP_SYS_ADMIN, which may be gone a few lines on.
        if !plan.seccomp.is_empty() && !plan.no_new_privileges {
            confine()?;
        }
        plan.capabilities.bound().map_err(step("bound the capabilities"))?;
        sys::keep_capabilities().map_err(step("keep the capabilities"))?;
        sys::set_groups(&identity.groups).map_err(step("set the groups"))?;
        sys::set_ids(identity.uid, identity.gid).map_err(step("change the user"))?;
        plan.capabilities.apply().map_err(step("set the capabilities"))?;
        chdir(plan.cwd.as_str()).map_err(|error| ProcessError::Directory(plan.cwd.clone(), error.into()))?;
        if plan.no_new_privileges {
            sys::no_new_privileges().map_err(step("set no_new_privs"))?;
            if !plan.seccomp.is_empty() {
                confine()?;
            }
        }
        Ok(())
    }

    fn execute(&self, program: &Path, environment: &[String]) -> ProcessError {
        let strings = |list: &[String]| list.iter().map(|text| CString::new(text.as_str())).collect::<Result<_, _>>();
        let prepared = || -> Result<(CString, Vec<CString>, Vec<CString>), std::ffi::NulError> {
            Ok((CString::new(program.as_os_str().as_bytes())?, strings(&self.plan.args)?, strings(environment)?))
        };
        let error = match prepared() {
            Ok((path, arguments, environment)) => sys::execute(&path, &arguments, &environment),
            Err(error) => error.into(),
        };
        let text = match error.raw_os_error() {
            Some(libc::ENOENT) => "no such file or directory (is its interpreter in the image?)".to_owned(),
            Some(libc::EACCES) => "permission denied".to_owned(),
            Some(libc::ENOEXEC) => "exec format error".to_owned(),
            _ => error.to_string(),
        };
        ProcessError::Program(program.display().to_string(), text)
    }
}

/// Runs `fork` so that its child is in the process table wanted. The agent has one thread, so nobody else forks
/// meanwhile.
fn within(space: PidSpace<'_>, fork: impl FnOnce() -> io::Result<Fork>) -> io::Result<Fork> {
    let PidSpace::Of(target) = space else { return fork() };
    let own = fs::File::open("/proc/self/ns/pid")?;
    setns(target, CloneFlags::CLONE_NEWPID)?;
    let forked = fork();
    if !matches!(forked, Ok(Fork::Child)) {
        let back = setns(own, CloneFlags::CLONE_NEWPID);
        assert!(back.is_ok(), "a process can always return to its own PID namespace");
    }
    forked
}

/// Places standard streams, the status channel and what `others` there are, and closes all else: what the agent holds
/// for other containers must not stay open here.
fn lay_out<const N: usize>(
    stdio: [RawFd; 3],
    status: RawFd,
    others: [Option<RawFd>; N],
) -> Result<[Option<OwnedFd>; N], ProcessError> {
    let sources: Vec<RawFd> = stdio.into_iter().chain([status]).chain(others.into_iter().flatten()).collect();
    let failed = step("lay out descriptors");
    // First out of the way of each other, then into place.
    let away: Vec<RawFd> =
        sources.iter().map(|&fd| sys::dup_above(fd, PLACES)).collect::<Result<_, _>>().map_err(&failed)?;
    for (place, &fd) in (0..).zip(&away) {
        sys::dup_to(fd, place, place < STATUS_FD).map_err(&failed)?;
    }
    let kept = RawFd::try_from(sources.len()).unwrap_or(RawFd::MAX);
    sys::close_from(kept).map_err(&failed)?;
    let mut places = STATUS_FD + 1..;
    Ok(others.map(|other| other.and_then(|_| places.next()).map(sys::adopt)))
}

/// Any message means "go"; the end means that the agent has given this process up.
fn wait_for_go(status: &OwnedFd) -> Result<(), ProcessError> {
    let mut word = [0; 1];
    loop {
        match recv(status.as_raw_fd(), &mut word, MsgFlags::empty()) {
            Ok(0) => sys::exit_now(NOT_STARTED),
            Ok(_) => return Ok(()),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(step("wait for the agent")(error)),
        }
    }
}

/// Lets a process that reported [`Report::Ready`] go on.
pub(crate) fn say_go(status: &OwnedFd) -> nix::Result<()> {
    send(status.as_raw_fd(), b"g", MsgFlags::MSG_NOSIGNAL).map(drop)
}

fn take_terminal(terminal: &OwnedFd) -> io::Result<()> {
    sys::set_controlling_terminal(terminal.as_fd())?;
    (0..3).try_for_each(|number| sys::dup_to(terminal.as_raw_fd(), number, true))
}

/// A process that is not root can then open its own /dev/stdout, as many do for their logs.
fn own_stdio(fd: RawFd, uid: u32) -> io::Result<()> {
    let stream = std::mem::ManuallyDrop::new(sys::adopt(fd));
    let status = nix::sys::stat::fstat(&*stream)?;
    let kind = status.st_mode & libc::S_IFMT;
    let terminal = kind == libc::S_IFCHR && nix::sys::stat::major(status.st_rdev) == 136;
    if kind == libc::S_IFIFO || terminal {
        fchown(&*stream, Some(Uid::from_raw(uid)), None::<Gid>)?;
    }
    Ok(())
}

fn variable<'a>(environment: &'a [String], name: &str) -> Option<&'a str> {
    // The last one wins, as it would for a program that reads them in order.
    environment.iter().rev().find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))
}

/// execvp(3)'s search, with words for why it found nothing.
fn find_program(name: &str, path: &str) -> Result<PathBuf, String> {
    if name.contains('/') {
        return executable(Path::new(name)).map(|()| PathBuf::from(name)).map_err(|error| match error {
            libc::EACCES => "permission denied".to_owned(),
            libc::EISDIR => "is a directory".to_owned(),
            _ => format!("stat {name}: no such file or directory"),
        });
    }
    let candidates = path.split(':').map(|directory| Path::new(if directory.is_empty() { "." } else { directory }));
    let found = candidates.map(|directory| directory.join(name)).find(|path| executable(path).is_ok());
    found.filter(|_| !name.is_empty()).ok_or_else(|| "executable file not found in $PATH".to_owned())
}

fn executable(path: &Path) -> Result<(), i32> {
    let metadata = fs::metadata(path).map_err(|error| error.raw_os_error().unwrap_or(libc::ENOENT))?;
    if metadata.is_dir() {
        Err(libc::EISDIR)
    } else if metadata.permissions().mode() & 0o111 == 0 {
        Err(libc::EACCES)
    } else {
        Ok(())
    }
}

/// Starts PID 1 of the process table that all containers of the pod share. It does nothing but reap what is orphaned
/// there, and has neither files nor privileges.
pub(crate) fn start_pod_reaper() -> io::Result<(Pid, OwnedFd)> {
    match sys::fork(libc::CLONE_NEWPID, None)? {
        Fork::Parent(pid, pidfd) => Ok((pid, pidfd)),
        Fork::Child => {
            let alone = || -> io::Result<()> {
                sys::close_from(0)?;
                sys::set_dumpable(false)?;
                nix::unistd::chroot(crate::mounts::EMPTY)?;
                chdir("/")?;
                sys::set_capabilities(0, 0, 0)
            };
            if alone().is_err() {
                sys::exit_now(1);
            }
            let child = nix::sys::signal::SigSet::from(nix::sys::signal::Signal::SIGCHLD);
            loop {
                // SIGCHLD is blocked since the agent's start, so none is lost between the two calls.
                while sys::reap().is_some() {}
                let _ = child.wait();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_survive_the_channel() {
        for report in [
            Report::Ready { terminal: None, user: v1::Created::default() },
            Report::Ready { terminal: Some(7), user: v1::Created { uid: 1, gid: 2, groups: vec![3, 70_000] } },
            Report::Failed { cannot_exec: true, text: "exec: x".into() },
            Report::Failed { cannot_exec: false, text: String::new() },
        ] {
            assert_eq!(Report::decode(&report.encode()), Some(report));
        }
        assert_eq!(Report::decode(&[]), None);
        assert_eq!(Report::decode(&[0, 1]), None);
        assert_eq!(Report::decode(&[9]), None);
        let long = Report::Failed { cannot_exec: false, text: "x".repeat(REPORT_BYTES * 2) };
        assert_eq!(long.encode().len(), REPORT_BYTES);
    }

    #[test]
    fn programs_are_found_as_execvp_finds_them() {
        assert_eq!(find_program("sh", "/nowhere::/bin"), Ok(PathBuf::from("/bin/sh")));
        assert_eq!(find_program("/bin/sh", ""), Ok(PathBuf::from("/bin/sh")));
        assert_eq!(find_program("no-such", "/bin"), Err("executable file not found in $PATH".into()));
        assert_eq!(find_program("", "/bin"), Err("executable file not found in $PATH".into()));
        assert_eq!(find_program("/no/such", ""), Err("stat /no/such: no such file or directory".into()));
        assert_eq!(find_program("/etc/passwd", ""), Err("permission denied".into()));
        assert_eq!(find_program("/etc", ""), Err("is a directory".into()));
    }

    #[test]
    fn the_last_of_two_variables_counts() {
        let environment = ["A=1", "AB=2", "A=3"].map(str::to_owned);
        assert_eq!(variable(&environment, "A"), Some("3"));
        assert_eq!(variable(&environment, "B"), None);
    }
}
