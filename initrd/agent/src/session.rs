//! Session connections: one exec, attach or forwarded port each.
//!
//! An exec's processes have a cgroup of their own, so that all of them can be killed when the connection closes early.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use agent_protocol::v1::{self, from_session, open, to_session};
use agent_protocol::{FrameError, agree};
use nix::sys::epoll::EpollFlags;

use crate::agent::Agent;
use crate::connection::Connection;
use crate::fault::Fault;
use crate::forward::{Forward, Phase};
use crate::kmsg;
use crate::poll::{Poll, Token};
use crate::process::{Job, PidSpace, Surroundings};
use crate::server::hello;
use crate::stdio::Stdio;
use crate::sys;
use crate::task::{News, Owner, Task};

/// Pieces of a forwarded port's output moved before others have their turn.
const ROUNDS: usize = 16;

/// How a forwarded connection ends that broke.
const BROKEN: v1::Exit = v1::Exit { code: 1, signal: 0, oom_killed: false };

/// How a forwarded connection ends whose server has.
const ENDED: v1::Exit = v1::Exit { code: 0, signal: 0, oom_killed: false };

/// What a session is for.
#[derive(Debug)]
enum Purpose {
    /// No hello yet.
    Greeting,
    /// No [`v1::Open`] yet.
    Opening,
    /// A process of its own.
    Exec { task: u32 },
    /// A container's first process.
    Attach { task: u32, container: String, stdin: bool },
    /// A connection to a port of the loopback.
    Forward(Forward),
    /// Everything has been said.
    Over,
}

/// A session connection.
#[derive(Debug)]
pub(crate) struct Session {
    connection: Connection,
    purpose: Purpose,
}

impl Session {
    /// Waits for the host's hello.
    pub(crate) fn new(poll: &Poll, stream: OwnedFd, number: u32) -> io::Result<Self> {
        let connection = Connection::new(poll, stream, Token::Session(number))?;
        Ok(Self { connection, purpose: Purpose::Greeting })
    }

    /// Whether the host reads as fast as the process writes.
    pub(crate) fn has_room(&self) -> bool {
        self.connection.has_room()
    }

    fn task(&self) -> Option<u32> {
        match &self.purpose {
            Purpose::Exec { task } | Purpose::Attach { task, .. } => Some(*task),
            _ => None,
        }
    }
}

impl Agent {
    /// Takes what a session connection brings, and sends what waits for it.
    pub(crate) fn session_event(&mut self, number: u32, events: EpollFlags) {
        let Some(session) = self.sessions.get_mut(&number) else { return };
        let open = if events.contains(EpollFlags::EPOLLIN) {
            session.connection.receive().unwrap_or(false)
        } else {
            !events.intersects(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR)
        };
        let task = session.task();
        if !open || self.session_messages(number).is_err() {
            return self.close_session(number);
        }
        self.flush_session(number);
        // Room in the connection is room for output.
        match task {
            Some(task) => self.settle(task),
            None => self.forward_event(number, EpollFlags::empty()),
        }
    }

    /// Handles every message that has come whole, as long as its process takes input.
    fn session_messages(&mut self, number: u32) -> Result<(), FrameError> {
        while let Some(session) = self.sessions.get_mut(&number) {
            match &mut session.purpose {
                Purpose::Greeting => {
                    let Some(theirs) = session.connection.next::<v1::Hello>()? else { break };
                    session.connection.send(&hello())?;
                    session.purpose = Purpose::Opening;
                    if let Err(error) = agree(theirs.version) {
                        drop(session.connection.flush(&self.poll));
                        return Err(error);
                    }
                }
                Purpose::Opening => {
                    let Some(open) = session.connection.next::<v1::Open>()? else { break };
                    if let Err(fault) = self.open_session(number, open) {
                        self.refuse_session(number, fault);
                    }
                }
                Purpose::Exec { task } | Purpose::Attach { task, .. } => {
                    let task = *task;
                    let room = self.tasks.get(&task).is_none_or(|task| task.stdio.has_input_room());
                    session.connection.pause(!room);
                    if !room {
                        break;
                    }
                    let Some(message) = session.connection.next::<v1::ToSession>()? else { break };
                    self.session_message(number, task, message);
                }
                Purpose::Forward(forward) => {
                    let room = forward.has_input_room();
                    session.connection.pause(!room);
                    if !room {
                        break;
                    }
                    match session.connection.next::<v1::ToSession>()?.map(|message| message.message) {
                        Some(Some(to_session::Message::Stdin(bytes))) => forward.push_input(&bytes),
                        Some(Some(to_session::Message::CloseStdin(_))) => forward.close_input(),
                        Some(_) => {}
                        None => break,
                    }
                    forward.write_input();
                }
                Purpose::Over => break,
            }
        }
        Ok(())
    }

    fn session_message(&mut self, number: u32, task: u32, message: v1::ToSession) {
        let Some(session) = self.sessions.get(&number) else { return };
        let attached = matches!(session.purpose, Purpose::Attach { .. });
        let stdin = !matches!(session.purpose, Purpose::Attach { stdin: false, .. });
        let Some(task) = self.tasks.get_mut(&task) else { return };
        match message.message {
            Some(to_session::Message::Stdin(bytes)) if stdin => {
                task.stdio.push_input(&bytes);
                task.stdio.write_input();
                drop(task.stdio.watch_input(&self.poll));
            }
            Some(to_session::Message::CloseStdin(_)) if stdin && !attached => {
                task.stdio.close_input();
                task.stdio.write_input();
            }
            Some(to_session::Message::CloseStdin(_)) => self.stdin_over(number),
            Some(to_session::Message::Resize(size)) => {
                let short = |length: u32| u16::try_from(length).unwrap_or(u16::MAX);
                if let Some(master) = task.stdio.master() {
                    drop(sys::set_window_size(master, short(size.columns), short(size.rows)));
                }
            }
            Some(to_session::Message::Signal(signal)) => {
                let sent = if attached { task.signal(signal) } else { signal_group(task, signal) };
                drop(sent);
            }
            _ => {}
        }
    }

    fn open_session(&mut self, number: u32, open: v1::Open) -> Result<(), Fault> {
        match open.kind {
            Some(open::Kind::Exec(exec)) => self.open_exec(number, &exec),
            Some(open::Kind::Attach(attach)) => self.open_attach(number, attach),
            Some(open::Kind::PortForward(forward)) => self.open_forward(number, forward.port),
            None => Err(Fault::new(v1::error::Kind::Invalid, "this version of the agent does not know the session")),
        }
    }

    fn open_exec(&mut self, number: u32, exec: &v1::Exec) -> Result<(), Fault> {
        let id = &exec.container_id;
        let task_number = self.next_number();
        let container = self.containers.get(id).ok_or_else(|| Fault::no_container(id))?;
        let target = self.tasks.get(&container.task).filter(|task| task.is_running());
        let target = target.ok_or_else(|| Fault::wrong_state(format!("container {id} is not running")))?;
        let process = exec.process.as_ref();
        let process = process.ok_or_else(|| Fault::new(v1::error::Kind::Invalid, "the process is missing"))?;
        let plan = container.process.for_exec(process)?;
        let (stdio, ends) =
            if plan.terminal { Stdio::terminal(task_number)? } else { Stdio::pipes(task_number, exec.stdin)? };
        let cgroup = container.cgroup.for_exec(task_number)?;
        let pidfd = target.pidfd.as_fd();
        let job = Job {
            plan: &plan,
            surroundings: Surroundings::Of(pidfd),
            users: self.users.as_ref(),
            pid_space: PidSpace::Of(pidfd),
            cgroup: cgroup.fd(),
            stdio: ends.fds(),
        };
        let owner = Owner::Session(number);
        let started = job
            .start()
            .map_err(Fault::from)
            .and_then(|started| Ok(Task::new(&self.poll, task_number, owner, started, stdio)?));
        match started {
            Ok(task) => drop(self.tasks.insert(task_number, task.in_cgroup(id, cgroup))),
            Err(fault) => {
                drop(cgroup.remove());
                return Err(fault);
            }
        }
        if let Some(session) = self.sessions.get_mut(&number) {
            session.purpose = Purpose::Exec { task: task_number };
        }
        Ok(())
    }

    fn open_attach(&mut self, number: u32, attach: v1::Attach) -> Result<(), Fault> {
        let id = attach.container_id;
        let container = self.containers.get_mut(&id).ok_or_else(|| Fault::no_container(&id))?;
        if container.exited.is_some() || container.creating.is_some() {
            return Err(Fault::wrong_state(format!("container {id} is not running")));
        }
        container.attached.push(number);
        let task = container.task;
        if let Some(session) = self.sessions.get_mut(&number) {
            session
                .connection
                .send(&v1::Opened { error: None })
                .map_err(|error| io::Error::other(error.to_string()))?;
            session.purpose = Purpose::Attach { task, container: id, stdin: attach.stdin };
        }
        Ok(())
    }

    fn open_forward(&mut self, number: u32, port: u32) -> Result<(), Fault> {
        let valid = u16::try_from(port).ok().filter(|&port| port > 0);
        let invalid = || Fault::new(v1::error::Kind::Invalid, format!("{port} is not a port"));
        let forward = Forward::dial(number, valid.ok_or_else(invalid)?).map_err(|error| no_server(&error))?;
        if let Some(session) = self.sessions.get_mut(&number) {
            session.purpose = Purpose::Forward(forward);
        }
        self.forward_event(number, EpollFlags::empty());
        Ok(())
    }

    /// Brings a forwarded connection as far as it goes now.
    pub(crate) fn forward_event(&mut self, number: u32, events: EpollFlags) {
        let Some(session) = self.sessions.get_mut(&number) else { return };
        let Purpose::Forward(forward) = &mut session.purpose else { return };
        if forward.phase == Phase::Dialling
            && !events.is_empty()
            && let Err(error) = forward.answered()
        {
            return self.refuse_session(number, no_server(&error));
        }
        if forward.phase == Phase::Answered {
            forward.phase = Phase::Open;
            if session.connection.send(&v1::Opened { error: None }).is_err() {
                return self.close_session(number);
            }
        }
        forward.write_input();
        if let Some(exit) = self.forward_output(number) {
            return self.session_over(number, exit);
        }
        if self.session_messages(number).is_err() {
            return self.close_session(number);
        }
        self.flush_session(number);
        self.watch_forward(number);
    }

    /// Passes output on for as long as the host takes it; says how the connection ended if it has.
    fn forward_output(&mut self, number: u32) -> Option<v1::Exit> {
        let session = self.sessions.get_mut(&number)?;
        let Purpose::Forward(forward) = &mut session.purpose else { return None };
        for _ in 0..ROUNDS {
            if forward.phase != Phase::Open || !session.connection.has_room() {
                return None;
            }
            let message = match forward.read() {
                Ok(Some(bytes)) if bytes.is_empty() => return Some(ENDED),
                Ok(Some(bytes)) => v1::FromSession { message: Some(from_session::Message::Stdout(bytes)) },
                Ok(None) => return None,
                Err(_) => return Some(BROKEN),
            };
            if session.connection.send(&message).and_then(|()| Ok(session.connection.flush(&self.poll)?)).is_err() {
                return Some(BROKEN);
            }
        }
        None
    }

    /// Only after the last flush of a turn, or there would be room that nothing waits for.
    fn watch_forward(&mut self, number: u32) {
        let Some(session) = self.sessions.get_mut(&number) else { return };
        let room = session.connection.has_room();
        if let Purpose::Forward(forward) = &mut session.purpose
            && let Err(error) = forward.watch(&self.poll, room)
        {
            kmsg::say(&format!("cannot watch a forwarded port: {error}"));
            self.close_session(number);
        }
    }

    /// An exec's process has something to say before it is its program.
    pub(crate) fn exec_news(&mut self, task: u32, number: u32, news: News) {
        match news {
            News::Ready(_) => {
                if let Some(task) = self.tasks.get_mut(&task) {
                    task.go();
                }
            }
            News::Running => {
                let Some(session) = self.sessions.get_mut(&number) else { return };
                if session.connection.send(&v1::Opened { error: None }).is_err() {
                    self.close_session(number);
                }
            }
            News::Failed { cannot_exec, text } => self.refuse_session(number, Fault::not_started(cannot_exec, text)),
        }
    }

    /// Says why there is no session, as its only and last word.
    fn refuse_session(&mut self, number: u32, fault: Fault) {
        let Some(session) = self.sessions.get_mut(&number) else { return };
        let refused = session.connection.send(&v1::Opened { error: Some(fault.into()) });
        let purpose = std::mem::replace(&mut session.purpose, Purpose::Over);
        if let Purpose::Exec { task } = purpose
            && let Some(task) = self.tasks.get(&task)
        {
            task.kill_exec();
        }
        match refused {
            Ok(()) => self.flush_session(number),
            Err(_) => drop(self.sessions.remove(&number)),
        }
    }

    /// Says the last word of a session.
    pub(crate) fn session_over(&mut self, number: u32, exit: v1::Exit) {
        if self.sessions.get(&number).is_none_or(|session| matches!(session.purpose, Purpose::Over)) {
            return;
        }
        self.tell_session(number, from_session::Message::Exit(exit));
        if let Some(session) = self.sessions.get_mut(&number) {
            session.purpose = Purpose::Over;
        }
        self.flush_session(number);
    }

    /// Queues a message for a session, if it is still there.
    pub(crate) fn tell_session(&mut self, number: u32, message: from_session::Message) {
        let Some(session) = self.sessions.get_mut(&number) else { return };
        if let Err(error) = session.connection.send(&v1::FromSession { message: Some(message) }) {
            kmsg::say(&format!("a session is closed: {error}"));
            self.close_session(number);
        }
    }

    /// Sends what a session's connection takes; closes it after the last word.
    pub(crate) fn flush_session(&mut self, number: u32) {
        let Some(session) = self.sessions.get_mut(&number) else { return };
        let failed = session.connection.flush(&self.poll).is_err();
        let over = matches!(session.purpose, Purpose::Over) && session.connection.is_flushed();
        if failed || over {
            self.close_session(number);
        }
    }

    /// Input may be taken again from the sessions of a process that had too much of it.
    pub(crate) fn resume_sessions(&mut self, task: u32) {
        if self.tasks.get(&task).is_none_or(|task| !task.stdio.has_input_room()) {
            return;
        }
        let paused = |session: &Session| session.task() == Some(task) && session.connection.is_paused();
        let paused = self.sessions.iter().filter(|(_, session)| paused(session));
        for number in paused.map(|(&number, _)| number).collect::<Vec<_>>() {
            match self.session_messages(number) {
                Ok(()) => self.flush_session(number),
                Err(_) => self.close_session(number),
            }
        }
    }

    fn stdin_over(&mut self, number: u32) {
        let Some(Purpose::Attach { task, container, stdin: true }) =
            self.sessions.get(&number).map(|session| &session.purpose)
        else {
            return;
        };
        let once = self.containers.get(container).is_some_and(|container| container.stdin_once);
        if let Some(task) = self.tasks.get_mut(task).filter(|_| once) {
            task.stdio.close_input();
            task.stdio.write_input();
        }
    }

    fn close_session(&mut self, number: u32) {
        self.stdin_over(number);
        let Some(session) = self.sessions.remove(&number) else { return };
        match session.purpose {
            Purpose::Exec { task } => {
                if let Some(task) = self.tasks.get(&task) {
                    task.kill_exec();
                }
                self.settle(task);
            }
            Purpose::Attach { task, container, .. } => {
                if let Some(container) = self.containers.get_mut(&container) {
                    container.attached.retain(|&each| each != number);
                }
                self.settle(task);
            }
            // A forwarded connection ends with its session.
            Purpose::Greeting | Purpose::Opening | Purpose::Forward(_) | Purpose::Over => {}
        }
    }
}

fn no_server(error: &io::Error) -> Fault {
    Fault::wrong_state(format!("the pod's loopback: {error}"))
}

/// To the process group in the foreground of its terminal, or else its own.
fn signal_group(task: &Task, signal: i32) -> io::Result<()> {
    let group = task.stdio.master().and_then(|master| sys::foreground_group(master).ok());
    let group = group.filter(|group| group.as_raw() > 0).unwrap_or(task.pid);
    sys::kill(group.as_raw().saturating_neg(), signal)
}
