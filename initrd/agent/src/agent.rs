//! The one owner of all the agent's state, and the loop in which everything happens.
//!
//! One thread, no locks: each event is handled to its end before the next one is looked at. What takes long (a
//! process that sets itself up, a container that dies) is a state here and an event later, so that no container can
//! hold up the others. [`crate::server`] holds what the host asks, [`crate::session`] execs and attaches; this file
//! holds how processes come, talk and go.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use agent_protocol::v1::{self, from_agent, from_session, reply};
use nix::sys::epoll::EpollFlags;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;

use crate::census::Census;
use crate::container::{Asker, Container};
use crate::disk::Disk;
use crate::fault::Fault;
use crate::kmsg;
use crate::log::Stream;
use crate::poll::{Part, Poll, Token, Watched};
use crate::server::Peer;
use crate::session::Session;
use crate::sys;
use crate::task::{News, Owner, Phase, Task, exit_of};
use crate::time;
use crate::transport::{Transport, accept};
use crate::userns::UserSpace;

/// Pieces of output moved for one process before others have their turn.
const ROUNDS: usize = 16;

/// Everything.
pub(crate) struct Agent {
    pub(crate) poll: Poll,
    pub(crate) transport: Transport,
    pub(crate) disk: Disk,
    pub(crate) configured: bool,
    /// Names of those that the pod's configuration set.
    pub(crate) sysctls: Vec<String>,
    pub(crate) control: BTreeMap<u32, Peer>,
    pub(crate) sessions: BTreeMap<u32, Session>,
    pub(crate) tasks: BTreeMap<u32, Task>,
    pub(crate) containers: BTreeMap<String, Container>,
    /// PID 1 of the process table that containers share, once one of them wants it.
    pub(crate) pod_reaper: Option<(Pid, OwnedFd)>,
    pub(crate) census: Census,
    /// Who waits for it.
    pub(crate) waiting_for_stats: Vec<Asker>,
    /// Whose users the containers have; `None` is the guest's.
    pub(crate) users: Option<UserSpace>,
    last_number: u32,
    signals: Watched<SignalFd>,
    control_listener: Watched<OwnedFd>,
    session_listener: Watched<OwnedFd>,
}

impl Agent {
    /// Listens for the host and for the end of children.
    pub(crate) fn new(transport: Transport, disk: PathBuf) -> io::Result<Self> {
        let poll = Poll::new()?;
        let children = SigSet::from(Signal::SIGCHLD);
        children.thread_block()?;
        let signals = SignalFd::with_flags(&children, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let mut agent = Self {
            signals: Watched::new(signals, Token::Signals),
            control_listener: Watched::new(transport.listen(agent_protocol::CONTROL_PORT)?, Token::ControlListener),
            session_listener: Watched::new(transport.listen(agent_protocol::SESSION_PORT)?, Token::SessionListener),
            poll,
            transport,
            disk: Disk::new(disk),
            configured: false,
            sysctls: Vec::new(),
            control: BTreeMap::new(),
            sessions: BTreeMap::new(),
            tasks: BTreeMap::new(),
            containers: BTreeMap::new(),
            pod_reaper: None,
            census: Census::default(),
            waiting_for_stats: Vec::new(),
            users: None,
            last_number: 0,
        };
        agent.signals.want(&agent.poll, EpollFlags::EPOLLIN)?;
        agent.control_listener.want(&agent.poll, EpollFlags::EPOLLIN)?;
        agent.session_listener.want(&agent.poll, EpollFlags::EPOLLIN)?;
        Ok(agent)
    }

    /// A number that names something in [`Token`]s for good.
    pub(crate) fn next_number(&mut self) -> u32 {
        self.last_number = self.last_number.wrapping_add(1);
        self.last_number
    }

    /// Serves until the machine goes down.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        loop {
            for (token, events) in self.poll.wait(self.census.is_counting())? {
                self.handle(token, events);
            }
            self.census.step();
            self.answer_stats();
        }
    }

    fn handle(&mut self, token: Token, events: EpollFlags) {
        match token {
            Token::Signals => self.reap(),
            Token::ControlListener => self.accept_control(),
            Token::SessionListener => self.accept_session(),
            Token::Control(number) => self.control_event(number),
            Token::Session(number) => self.session_event(number, events),
            Token::Forward(number) => self.forward_event(number, events),
            Token::Task(number, Part::Status) => self.hear(number),
            Token::Task(number, _) => self.settle(number),
        }
    }

    fn accept_control(&mut self) {
        while let Some(stream) = accepted(self.control_listener.get()) {
            let number = self.next_number();
            match Peer::new(&self.poll, stream, number) {
                Ok(peer) => drop(self.control.insert(number, peer)),
                Err(error) => kmsg::say(&format!("cannot take a control connection: {error}")),
            }
        }
    }

    fn accept_session(&mut self) {
        while let Some(stream) = accepted(self.session_listener.get()) {
            let number = self.next_number();
            match Session::new(&self.poll, stream, number) {
                Ok(session) => drop(self.sessions.insert(number, session)),
                Err(error) => kmsg::say(&format!("cannot take a session connection: {error}")),
            }
        }
    }

    /// Takes leave of every process that has ended: ours, and the guest's orphans, of which nothing is known.
    fn reap(&mut self) {
        while matches!(self.signals.get().read_signal(), Ok(Some(_))) {}
        while let Some((pid, status)) = sys::reap() {
            let found = self.tasks.iter().find(|(_, task)| task.pid == pid && task.exit().is_none());
            if let Some((&number, _)) = found {
                self.task_ended(number, exit_of(status));
            } else if self.pod_reaper.as_ref().is_some_and(|(reaper, _)| *reaper == pid) {
                kmsg::say("the pod's shared PID namespace has ended");
                self.pod_reaper = None;
            }
        }
    }

    fn task_ended(&mut self, number: u32, mut exit: v1::Exit) {
        // What it said before it ended comes first.
        self.hear(number);
        self.hear(number);
        let Some(task) = self.tasks.get_mut(&number) else { return };
        if let Owner::Container(id) = &task.owner
            && let Some(container) = self.containers.get_mut(id)
        {
            exit.oom_killed = container.cgroup.oom_killed();
            // With the first process its container ends, even if others share its PID namespace.
            if container.cgroup.is_populated() {
                drop(container.cgroup.kill());
            }
            if let Err(error) = container.emptied.want(&self.poll, EpollFlags::EPOLLPRI) {
                kmsg::say(&format!("cannot watch the cgroup of {id}: {error}"));
            }
        } else {
            exit.oom_killed = false;
        }
        task.phase = Phase::Ended(exit);
        self.settle(number);
    }

    /// Listens to a process that is not its program yet.
    fn hear(&mut self, number: u32) {
        let Some(task) = self.tasks.get_mut(&number) else { return };
        let Some(news) = task.news() else { return };
        let owner = task.owner.clone();
        match owner {
            Owner::Container(id) => self.container_news(&id, news),
            Owner::Session(session) => self.exec_news(number, session, news),
        }
        self.settle(number);
    }

    fn container_news(&mut self, id: &str, news: News) {
        let Some(container) = self.containers.get_mut(id) else { return };
        match news {
            News::Ready(user) => {
                let asker = container.creating.take();
                self.answer(asker, Ok(reply::Result::Created(user)));
            }
            News::Running => {
                container.started_at_ns = time::now_ns();
                let asker = container.starting.take();
                self.answer(asker, Ok(reply::Result::Done(v1::Done {})));
            }
            News::Failed { cannot_exec, text } => {
                let fault = Fault::not_started(cannot_exec, text);
                if let Some(asker) = container.creating.take() {
                    // It never was a container: nothing of it stays.
                    drop(container.cgroup.kill());
                    container.removing = Some(asker);
                    container.refusal = Some(fault);
                } else {
                    let asker = container.starting.take();
                    self.answer(asker, Err(fault));
                }
            }
        }
    }

    /// Whether a process writes and everything that takes its output can take more.
    fn output_flows(&self, task: &Task) -> bool {
        let session_has_room = |number: &u32| self.sessions.get(number).is_none_or(Session::has_room);
        let room = match &task.owner {
            Owner::Session(session) => session_has_room(session),
            Owner::Container(id) => self
                .containers
                .get(id)
                .is_none_or(|container| container.log.has_room() && container.attached.iter().all(session_has_room)),
        };
        task.talks() && room
    }

    /// Brings one process's streams as far as they go now, and ends it if that was the end.
    pub(crate) fn settle(&mut self, number: u32) {
        self.end_if_empty(number);
        let Some(task) = self.tasks.get(&number) else { return };
        let owner = task.owner.clone();
        // What has been waiting goes first: it may be what there is no room for.
        self.flush_owner(&owner);
        for _ in 0..ROUNDS {
            let Some((stream, bytes)) = self.read_output(number) else { break };
            self.deliver(&owner, stream, bytes);
        }
        self.flush_owner(&owner);
        if let Some(task) = self.tasks.get_mut(&number) {
            task.stdio.write_input();
        }
        self.resume_sessions(number);
        self.watch(number);
        self.finish_if_done(number, &owner);
    }

    fn read_output(&mut self, number: u32) -> Option<(Stream, Vec<u8>)> {
        let flows = self.output_flows(self.tasks.get(&number)?);
        self.tasks.get_mut(&number).filter(|_| flows)?.stdio.read()
    }

    /// Only after the last flush of a turn, or there would be room that nothing waits for.
    fn watch(&mut self, number: u32) {
        let Some(flows) = self.tasks.get(&number).map(|task| self.output_flows(task)) else { return };
        if let Some(task) = self.tasks.get_mut(&number)
            && let Err(error) = task.stdio.watch(&self.poll, flows)
        {
            kmsg::say(&format!("cannot watch the streams of process {}: {error}", task.pid));
        }
    }

    /// Once nothing of an ended process's own is left that could write, only what is in its pipes is waited for.
    fn end_if_empty(&mut self, number: u32) {
        let Some(task) = self.tasks.get_mut(&number) else { return };
        if task.exit().is_none() {
            return;
        }
        let populated = match &task.owner {
            Owner::Container(id) => self.containers.get(id).is_some_and(|container| container.cgroup.is_populated()),
            Owner::Session(_) => false,
        };
        if !populated {
            task.stdio.process_ended();
        }
    }

    fn deliver(&mut self, owner: &Owner, stream: Stream, bytes: Vec<u8>) {
        let message = |bytes| match stream {
            Stream::Stdout => from_session::Message::Stdout(bytes),
            Stream::Stderr => from_session::Message::Stderr(bytes),
        };
        match owner {
            Owner::Session(session) => self.tell_session(*session, message(bytes)),
            Owner::Container(id) => {
                let Some(container) = self.containers.get_mut(id) else { return };
                container.log.push(stream, &bytes);
                for session in container.attached.clone() {
                    self.tell_session(session, message(bytes.clone()));
                }
            }
        }
    }

    fn flush_owner(&mut self, owner: &Owner) {
        let mut sessions = Vec::new();
        match owner {
            Owner::Session(session) => sessions.push(*session),
            Owner::Container(id) => {
                let Some(container) = self.containers.get_mut(id) else { return };
                container.log.flush(&self.poll);
                sessions.extend(&container.attached);
                if container.log.is_flushed() {
                    for asker in std::mem::take(&mut container.reopening) {
                        self.answer(Some(asker), Ok(reply::Result::Done(v1::Done {})));
                    }
                }
            }
        }
        for session in sessions {
            self.flush_session(session);
        }
    }

    fn finish_if_done(&mut self, number: u32, owner: &Owner) {
        let Some(task) = self.tasks.get(&number) else { return };
        let Some(exit) = task.exit().filter(|_| task.stdio.is_drained()) else { return };
        match owner {
            Owner::Session(session) => {
                let container = task.exec_in().and_then(|id| self.containers.get(id));
                if let Some(container) = container {
                    container.cgroup.sweep_execs();
                }
                self.tasks.remove(&number);
                self.session_over(*session, exit);
            }
            Owner::Container(id) => {
                let Some(container) = self.containers.get_mut(id) else { return };
                container.log.end();
                container.log.flush(&self.poll);
                if container.cgroup.is_populated() || !container.log.is_flushed() {
                    return;
                }
                self.tasks.remove(&number);
                self.container_finished(&id.clone(), exit);
            }
        }
    }

    fn container_finished(&mut self, id: &str, exit: v1::Exit) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let exited = v1::ContainerExited { id: id.to_owned(), exit: Some(exit), finished_at_ns: time::now_ns() };
        container.exited = Some(exited.clone());
        drop(container.emptied.want(&self.poll, EpollFlags::empty()));
        let (attached, removing) = (std::mem::take(&mut container.attached), container.removing.take());
        for session in attached {
            self.session_over(session, exit);
        }
        if self.containers.get(id).is_some_and(|container| container.refusal.is_none()) {
            self.broadcast(&from_agent::Message::ContainerExited(exited));
        }
        if let Some(asker) = removing {
            let removed = self.forget(id);
            self.answer(Some(asker), removed);
        }
    }

    /// Gives back all that a dead container holds.
    pub(crate) fn forget(&mut self, id: &str) -> Result<reply::Result, Fault> {
        let mut container = self.containers.remove(id).ok_or_else(|| Fault::no_container(id))?;
        container.holdings.release(&mut self.disk);
        let removed = container.cgroup.remove();
        match container.refusal.take() {
            Some(refusal) => Err(refusal),
            None => Ok(removed.map(|()| reply::Result::Done(v1::Done {}))?),
        }
    }

    /// Answers a request that had to wait.
    pub(crate) fn answer(&mut self, asker: Option<Asker>, result: Result<reply::Result, Fault>) {
        let Some(asker) = asker else { return };
        let result = result.unwrap_or_else(|fault| reply::Result::Error(fault.into()));
        let reply = v1::Reply { id: asker.request, result: Some(result) };
        self.tell_peer(asker.connection, &from_agent::Message::Reply(reply));
    }
}

fn accepted(listener: &OwnedFd) -> Option<OwnedFd> {
    accept(listener).unwrap_or_else(|error| {
        kmsg::say(&format!("cannot accept a connection: {error}"));
        None
    })
}
