//! The small process that alone starts VMMs and file servers and enters their namespaces, and the daemon's end of the socket to it.
//!
//! The daemon forks it before it has a second thread, because fork and threads do not mix; so it must be the first
//! thing in `main`. It owns no state that matters: if the daemon dies it ends, and the VMMs live on.

mod message;
mod process;
mod volumes;

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{ForkResult, fork};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use vmm_control::wire;

use crate::error::{Error, IoContext, Result};
use crate::watched::watch;
use message::{LIMITS, Report, Request, Task};

pub use message::{Ended, Kind};

/// How long the spawner is asked for nothing, in milliseconds, before it makes a network namespace for the next VMM: the last one has
/// its guest up by then.
pub const IDLE_MS: u8 = 100;

/// Requests that may wait for the spawner.
const QUEUE: usize = 64;

/// The forked process, not yet spoken to.
#[derive(Debug)]
pub struct Spawner {
    socket: OwnedFd,
}

impl Spawner {
    /// Forks the spawner. Call it first in `main`: it refuses to fork a process that has other threads already.
    pub fn fork() -> Result<Self> {
        let threads = fs::read_dir("/proc/self/task").doing(|| "counting this process's threads")?.count();
        if threads != 1 {
            return Err(Error::Internal(format!("the spawner must be forked before any thread: there are {threads}")));
        }
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .doing(|| "socketpair")?;
        match start(theirs)? {
            None => Ok(Self { socket: ours }),
            Some(theirs) => {
                drop(ours);
                process::main(&theirs)
            }
        }
    }

    /// Begins to speak to it; needs a tokio runtime.
    pub fn connect(self) -> Result<Client> {
        nix::fcntl::fcntl(&self.socket, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))
            .doing(|| "the spawner's socket")?;
        let socket = watch(self.socket).doing(|| "the spawner's socket")?;
        let (jobs, inbox) = mpsc::channel(QUEUE);
        tokio::spawn(Conversation { socket, next_id: 0, waiting: HashMap::new(), running: HashMap::new() }.run(inbox));
        Ok(Client { jobs })
    }
}

#[expect(unsafe_code, reason = "fork")]
fn start(theirs: OwnedFd) -> Result<Option<OwnedFd>> {
    // SAFETY: this process has one thread (checked by the caller), so the child may do all that the parent may.
    match unsafe { fork() }.doing(|| "forking the spawner")? {
        ForkResult::Parent { .. } => Ok(None),
        ForkResult::Child => Ok(Some(theirs)),
    }
}

/// A program to start.
#[derive(Debug)]
pub struct Program {
    /// What it is.
    pub kind: Kind,
    /// The opened binary.
    pub binary: OwnedFd,
    /// The opened cgroup it starts in.
    pub cgroup: OwnedFd,
    /// Its descriptors by number, 0 to 2 among them.
    pub fds: Vec<(RawFd, OwnedFd)>,
}

/// A program that was started.
#[derive(Debug)]
pub struct Child {
    /// Its process id on the host.
    pub pid: u32,
    /// A pidfd: readable once it has ended.
    pub pidfd: OwnedFd,
    /// How it ended; fails if the spawner ends first.
    pub ended: oneshot::Receiver<Ended>,
}

struct Job {
    task: Task,
    fds: Vec<OwnedFd>,
    answer: oneshot::Sender<Result<Outcome>>,
}

/// What comes of a job that was done.
enum Outcome {
    Child(Child),
    Done,
}

/// The daemon's end. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    jobs: mpsc::Sender<Job>,
}

impl Client {
    /// Whether there is still a spawner to ask.
    #[must_use]
    pub fn alive(&self) -> bool {
        !self.jobs.is_closed()
    }

    /// Starts a program.
    pub async fn spawn(&self, program: Program) -> Result<Child> {
        let Program { kind, binary, cgroup, fds } = program;
        let targets = fds.iter().map(|(number, _)| *number).collect();
        let fds = [binary, cgroup].into_iter().chain(fds.into_iter().map(|(_, fd)| fd)).collect();
        match self.ask(Task::Start { kind, targets }, fds).await? {
            Outcome::Child(child) => Ok(child),
            Outcome::Done => Err(Error::Internal("the spawner started nothing".into())),
        }
    }

    /// Mounts what `mount` holds as volume `share` of the file server that `server` is a pidfd of.
    pub async fn attach(&self, server: OwnedFd, share: u32, mount: OwnedFd, directory: bool) -> Result<()> {
        self.ask(Task::Attach { share, directory }, vec![server, mount]).await.map(drop)
    }

    /// Takes volume `share` from a file server; one that is not there is no error.
    pub async fn detach(&self, server: OwnedFd, share: u32) -> Result<()> {
        self.ask(Task::Detach { share }, vec![server]).await.map(drop)
    }

    async fn ask(&self, task: Task, fds: Vec<OwnedFd>) -> Result<Outcome> {
        let gone = || Error::Unavailable("the spawner has ended: restart pericarpd".into());
        let (answer, result) = oneshot::channel();
        self.jobs.send(Job { task, fds, answer }).await.map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }
}

/// The task that owns the socket.
struct Conversation {
    socket: AsyncFd<OwnedFd>,
    next_id: u64,
    waiting: HashMap<u64, oneshot::Sender<Result<Outcome>>>,
    running: HashMap<u32, oneshot::Sender<Ended>>,
}

impl Conversation {
    async fn run(mut self, mut inbox: mpsc::Receiver<Job>) {
        loop {
            tokio::select! {
                job = inbox.recv() => match job {
                    Some(job) => self.request(job).await,
                    None => return,
                },
                report = receive(&self.socket) => match report {
                    Ok(Some((report, fds))) => self.report(report, fds),
                    Ok(None) => return tracing::error!("the spawner has ended"),
                    Err(error) => return tracing::error!(%error, "the spawner's socket failed"),
                },
            }
        }
    }

    async fn request(&mut self, job: Job) {
        let Job { task, fds, answer } = job;
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        let request = Request { id, task };
        let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let send = |socket: &OwnedFd| wire::send(socket.as_fd(), LIMITS, &request, &numbers);
        match self.socket.async_io(Interest::WRITABLE, send).await {
            Ok(()) => drop(self.waiting.insert(id, answer)),
            Err(error) => drop(answer.send(Err(Error::io("asking the spawner", &error)))),
        }
    }

    fn report(&mut self, report: Report, fds: Vec<OwnedFd>) {
        match report {
            Report::Started { id, pid } => {
                let (Some(pidfd), Some(answer)) = (fds.into_iter().next(), self.waiting.remove(&id)) else { return };
                let (sender, ended) = oneshot::channel();
                self.running.insert(pid, sender);
                // A caller that has gone away finds the process by its cgroup.
                let _ = answer.send(Ok(Outcome::Child(Child { pid, pidfd, ended })));
            }
            Report::Done { id } => {
                let _ = self.waiting.remove(&id).map(|answer| answer.send(Ok(Outcome::Done)));
            }
            Report::Failed { id, reason } => {
                let Some(answer) = self.waiting.remove(&id) else { return };
                let _ = answer.send(Err(Error::Internal(format!("the spawner: {reason}"))));
            }
            Report::Ended { pid, ended } => {
                // Nobody may be waiting any more.
                let _ = self.running.remove(&pid).map(|sender| sender.send(ended));
            }
        }
    }
}

async fn receive(socket: &AsyncFd<OwnedFd>) -> std::io::Result<Option<(Report, Vec<OwnedFd>)>> {
    socket.async_io(Interest::READABLE, |socket| wire::recv(socket.as_fd(), LIMITS)).await
}
