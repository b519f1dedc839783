//! A process that the agent started, a container's first or an exec's, from its fork to its last byte of output.
//!
//! ```text
//! Preparing ──ready──▶ Ready ──go──▶ Starting ──runs──▶ Running
//!     └───────────────────┴─────────────┴──────ends────────┴──▶ Ended
//! ```

use std::os::fd::{AsFd, OwnedFd};

use agent_protocol::v1;
use nix::sys::epoll::EpollFlags;
use nix::unistd::Pid;

use crate::cgroup::Cgroup;
use crate::poll::{Part, Poll, Token, Watched};
use crate::process::{Report, Started, say_go};
use crate::stdio::Stdio;
use crate::sys;

/// Whose process it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Container(String),
    Session(u32),
}

/// How far a process has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Preparing,
    Ready,
    Starting,
    Running,
    Ended(v1::Exit),
}

/// What a process has just told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// It waits for the word to go on.
    Ready(v1::Created),
    /// It has become its program.
    Running,
    /// It never will.
    Failed { cannot_exec: bool, text: String },
}

/// A process and its streams.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) owner: Owner,
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
    pub(crate) phase: Phase,
    pub(crate) stdio: Stdio,
    status: Option<Watched<OwnedFd>>,
    /// An exec's container and cgroup.
    exec: Option<(String, Cgroup)>,
}

impl Task {
    pub(crate) fn new(poll: &Poll, number: u32, owner: Owner, started: Started, stdio: Stdio) -> std::io::Result<Self> {
        let mut status = Watched::new(started.status, Token::Task(number, Part::Status));
        status.want(poll, EpollFlags::EPOLLIN)?;
        let phase = Phase::Preparing;
        Ok(Self { owner, pid: started.pid, pidfd: started.pidfd, phase, stdio, status: Some(status), exec: None })
    }

    /// An exec's process, in its cgroup below that of `container`.
    pub(crate) fn in_cgroup(mut self, container: &str, cgroup: Cgroup) -> Self {
        self.exec = Some((container.to_owned(), cgroup));
        self
    }

    /// Kills an exec's process and all that it has started.
    pub(crate) fn kill_exec(&self) {
        if let Some((_, cgroup)) = &self.exec {
            // It fails only if the cgroup is gone, and then so are they.
            drop(cgroup.kill());
        }
    }

    /// The container of an exec.
    pub(crate) fn exec_in(&self) -> Option<&str> {
        self.exec.as_ref().map(|(container, _)| container.as_str())
    }

    /// What the status channel says, if anything.
    pub(crate) fn news(&mut self) -> Option<News> {
        let report = match Report::receive(self.status.as_ref()?.get()) {
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return None,
            other => other.ok().flatten(),
        };
        let failed = |text: &str| News::Failed { cannot_exec: false, text: text.to_owned() };
        let news = match (report, self.phase) {
            (Some(Report::Ready { terminal, user }), Phase::Preparing) => match self.adopt_terminal(terminal) {
                Ok(()) => {
                    self.phase = Phase::Ready;
                    return Some(News::Ready(user));
                }
                Err(error) => failed(&format!("cannot take over the terminal: {error}")),
            },
            (Some(Report::Failed { cannot_exec, text }), _) => News::Failed { cannot_exec, text },
            (None, Phase::Starting) => {
                self.phase = Phase::Running;
                News::Running
            }
            _ => failed("the process ended while it was set up"),
        };
        self.status = None;
        Some(news)
    }

    fn adopt_terminal(&mut self, number: Option<i32>) -> std::io::Result<()> {
        match number {
            Some(number) => self.stdio.set_terminal(sys::pidfd_getfd(self.pidfd.as_fd(), number)?),
            None => Ok(()),
        }
    }

    /// Lets a process that is ready become its program.
    pub(crate) fn go(&mut self) {
        self.phase = Phase::Starting;
        if let Some(status) = &self.status {
            // If it has died meanwhile, its end tells.
            let _ = say_go(status.get());
        }
    }

    /// Sends a signal to this process alone.
    pub(crate) fn signal(&self, signal: i32) -> std::io::Result<()> {
        sys::pidfd_signal(self.pidfd.as_fd(), signal)
    }

    /// Whether what it writes is its program's.
    pub(crate) fn talks(&self) -> bool {
        matches!(self.phase, Phase::Running | Phase::Ended(_))
    }

    /// Whether it is its program, and not yet at its end.
    pub(crate) fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    pub(crate) fn exit(&self) -> Option<v1::Exit> {
        match self.phase {
            Phase::Ended(exit) => Some(exit),
            _ => None,
        }
    }
}

/// How a process ended, as shells count it, from wait(2)'s status.
pub(crate) fn exit_of(status: i32) -> v1::Exit {
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        return v1::Exit { code: signal.saturating_add(128), signal, oom_killed: false };
    }
    v1::Exit { code: libc::WEXITSTATUS(status), signal: 0, oom_killed: false }
}
