//! Control connections: what the host asks, and events for it.
//!
//! A request is answered at once or, if it waits for a process, when that has happened. Closing a connection changes
//! nothing.

use std::io;
use std::os::fd::OwnedFd;

use agent_protocol::v1::error::Kind;
use agent_protocol::v1::{self, from_agent, reply, request};
use agent_protocol::{FrameError, VERSION, agree};
use nix::sys::reboot::{RebootMode, reboot};

use crate::agent::Agent;
use crate::cgroup::{self, Cgroup, CgroupError};
use crate::configure;
use crate::connection::Connection;
use crate::container::{Asker, Container, Holdings};
use crate::cpus;
use crate::devices;
use crate::fault::Fault;
use crate::files;
use crate::kmsg;
use crate::log::Log;
use crate::memory;
use crate::plan::ContainerPlan;
use crate::poll::{Part, Poll, Token, Watched};
use crate::process::{Job, PidSpace, Surroundings, start_pod_reaper};
use crate::rootfs::Root;
use crate::stdio::Stdio;
use crate::task::{Owner, Phase, Task};
use crate::userns::UserSpace;

/// What a request is answered with; `None` if the answer comes later.
type Answer = Result<Option<reply::Result>, Fault>;

const DONE: Option<reply::Result> = Some(reply::Result::Done(v1::Done {}));

/// The agent's opening word on every connection.
pub(crate) fn hello() -> v1::Hello {
    let kernel = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
    v1::Hello { version: VERSION, kernel: kernel.unwrap_or_default() }
}

/// A control connection.
#[derive(Debug)]
pub(crate) struct Peer {
    connection: Connection,
    greeted: bool,
}

impl Peer {
    /// Waits for the host's hello.
    pub(crate) fn new(poll: &Poll, stream: OwnedFd, number: u32) -> io::Result<Self> {
        Ok(Self { connection: Connection::new(poll, stream, Token::Control(number))?, greeted: false })
    }

    /// The host's next request, past its hello.
    fn next(&mut self) -> Result<Option<v1::Request>, FrameError> {
        if !self.greeted {
            let Some(theirs) = self.connection.next::<v1::Hello>()? else { return Ok(None) };
            // Answered even if refused, so that the host can name both versions.
            self.connection.send(&hello())?;
            agree(theirs.version)?;
            self.greeted = true;
        }
        self.connection.next()
    }
}

impl Agent {
    /// Takes what a control connection brings, and sends what waits for it.
    pub(crate) fn control_event(&mut self, number: u32) {
        let Some(peer) = self.control.get_mut(&number) else { return };
        let open = peer.connection.receive();
        loop {
            let Some(peer) = self.control.get_mut(&number) else { return };
            match peer.next() {
                Ok(Some(request)) => self.serve(number, request),
                Ok(None) => break,
                Err(error) => {
                    kmsg::say(&format!("a control connection is closed: {error}"));
                    drop(peer.connection.flush(&self.poll));
                    self.control.remove(&number);
                    return;
                }
            }
        }
        if matches!(open, Ok(true)) {
            self.flush_peer(number);
        } else {
            self.control.remove(&number);
        }
    }

    fn serve(&mut self, connection: u32, request: v1::Request) {
        let asker = Asker { connection, request: request.id };
        let Some(call) = request.call else {
            let fault = Fault::new(Kind::Invalid, "this version of the agent does not know the request");
            return self.answer(Some(asker), Err(fault));
        };
        match self.call(asker, call) {
            Ok(Some(result)) => self.answer(Some(asker), Ok(result)),
            Ok(None) => {}
            Err(fault) => self.answer(Some(asker), Err(fault)),
        }
    }

    fn call(&mut self, asker: Asker, call: request::Call) -> Answer {
        match call {
            request::Call::Configure(call) => self.configure(&call),
            request::Call::CreateContainer(call) => self.create(asker, &call),
            request::Call::StartContainer(call) => self.start(asker, &call.id),
            request::Call::SignalContainer(call) => self.signal(&call),
            request::Call::RemoveContainer(call) => self.remove(asker, &call.id),
            request::Call::GetState(_) => Ok(Some(reply::Result::State(self.state()))),
            request::Call::Ping(_) => Ok(DONE),
            request::Call::PowerOff(_) => self.power_off(asker),
            request::Call::ReopenLog(call) => self.reopen_log(asker, &call.id),
            request::Call::UpdateContainer(call) => self.update(&call),
            request::Call::UpdatePod(call) => self.update_pod(&call),
            request::Call::UpdateFiles(call) => self.update_files(&call),
            request::Call::GetStats(_) => self.count_for(asker),
        }
    }

    fn configure(&mut self, call: &v1::Configure) -> Answer {
        if self.configured {
            return Err(Fault::wrong_state("this guest has been configured"));
        }
        self.sysctls = call.sysctls.keys().cloned().collect();
        if self.transport.in_guest() {
            memory::allow(call.memory_mib, &self.sysctls);
        }
        configure::apply(call, &mut self.disk)?;
        if self.transport.in_guest() {
            cpus::set(call.cpus);
        }
        self.users = call.user_namespace.as_ref().map(UserSpace::new).transpose()?;
        self.configured = true;
        Ok(DONE)
    }

    fn create(&mut self, asker: Asker, call: &v1::CreateContainer) -> Answer {
        if !self.configured {
            return Err(Fault::wrong_state("this guest has not been configured"));
        }
        if self.containers.contains_key(&call.id) {
            return Err(Fault::new(Kind::AlreadyExists, format!("there is a container {} already", call.id)));
        }
        let mut plan = ContainerPlan::new(call)?;
        let rootfs = call.rootfs.clone().unwrap_or_default();
        let cgroup = Cgroup::for_container(&plan.id)?;
        let mut holdings = Holdings::default();
        let made = holdings
            .acquire(&mut plan, &rootfs, &mut self.disk, self.users.as_ref())
            .and_then(|root| self.launch(asker, call, plan, &root, &cgroup));
        match made {
            Ok(build) => {
                self.containers.insert(call.id.clone(), build(cgroup, holdings));
                Ok(None)
            }
            Err(fault) => {
                drop(cgroup.kill());
                holdings.release(&mut self.disk);
                drop(cgroup.remove());
                Err(fault)
            }
        }
    }

    /// Sets limits, opens the log and forks the first process. The rest of the container is put together by what is
    /// returned, once nothing can fail any more.
    fn launch(
        &mut self,
        asker: Asker,
        call: &v1::CreateContainer,
        plan: ContainerPlan,
        root: &Root,
        cgroup: &Cgroup,
    ) -> Result<impl FnOnce(Cgroup, Holdings) -> Container + use<>, Fault> {
        if let Some(resources) = &call.resources {
            cgroup.limit(resources)?;
        }
        devices::confine(cgroup, &plan.devices)?;
        let streams = call.stdio.unwrap_or_default();
        let number = self.next_number();
        let log = self.open_log(number, streams.log_port)?;
        let emptied = Watched::new(cgroup.events()?, Token::Task(number, Part::Cgroup));
        let (stdio, ends) =
            if plan.process.terminal { Stdio::terminal(number)? } else { Stdio::pipes(number, streams.stdin)? };
        self.prepare_pid_space(call)?;
        let job = Job {
            plan: &plan.process,
            surroundings: Surroundings::New(root),
            users: self.users.as_ref(),
            pid_space: self.pid_space(call)?,
            cgroup: cgroup.fd(),
            stdio: ends.fds(),
        };
        let started = job.start()?;
        let task = Task::new(&self.poll, number, Owner::Container(plan.id.clone()), started, stdio)?;
        self.tasks.insert(number, task);
        let (process, stdin_once) = (plan.process, streams.stdin_once);
        Ok(move |cgroup, holdings| Container {
            task: number,
            process,
            cgroup,
            emptied,
            holdings,
            log,
            stdin_once,
            attached: Vec::new(),
            creating: Some(asker),
            starting: None,
            removing: None,
            reopening: Vec::new(),
            refusal: None,
            started_at_ns: 0,
            exited: None,
        })
    }

    fn open_log(&self, task: u32, port: u32) -> Result<Log, Fault> {
        if port == 0 {
            return Ok(Log::new(None));
        }
        let dialled = self.transport.dial(port).and_then(|stream| {
            crate::stdio::set_nonblocking(&stream)?;
            Ok(stream)
        });
        let stream = dialled.map_err(|error| {
            Fault::new(Kind::Internal, format!("cannot reach the log on host port {port}: {error}"))
        })?;
        Ok(Log::new(Some(Watched::new(stream, Token::Task(task, Part::Log)))))
    }

    fn prepare_pid_space(&mut self, call: &v1::CreateContainer) -> Result<(), Fault> {
        if call.pid_namespace() == v1::PidNamespace::Pod && self.pod_reaper.is_none() {
            self.pod_reaper = Some(start_pod_reaper()?);
        }
        Ok(())
    }

    fn pid_space(&self, call: &v1::CreateContainer) -> Result<PidSpace<'_>, Fault> {
        use std::os::fd::AsFd;
        Ok(match call.pid_namespace() {
            v1::PidNamespace::Container => PidSpace::New,
            v1::PidNamespace::Node => PidSpace::Agent,
            v1::PidNamespace::Pod => self.pod_reaper.as_ref().map_or(PidSpace::New, |(_, fd)| PidSpace::Of(fd.as_fd())),
            v1::PidNamespace::Target => {
                let target = &call.pid_target;
                let container = self.containers.get(target).ok_or_else(|| Fault::no_container(target))?;
                let task = self.tasks.get(&container.task).filter(|task| task.is_running());
                let text =
                    || Fault::wrong_state(format!("container {target} does not run, its processes cannot be shared"));
                PidSpace::Of(task.ok_or_else(text)?.pidfd.as_fd())
            }
        })
    }

    fn start(&mut self, asker: Asker, id: &str) -> Answer {
        let container = self.containers.get_mut(id).ok_or_else(|| Fault::no_container(id))?;
        let task = self.tasks.get_mut(&container.task).filter(|task| task.phase == Phase::Ready);
        let task = task.ok_or_else(|| Fault::wrong_state(format!("container {id} is not waiting to be started")))?;
        container.starting = Some(asker);
        task.go();
        Ok(None)
    }

    fn signal(&mut self, call: &v1::SignalContainer) -> Answer {
        let container = self.containers.get(&call.id).ok_or_else(|| Fault::no_container(&call.id))?;
        let task = self.tasks.get(&container.task).filter(|task| task.exit().is_none());
        let task = task.ok_or_else(|| Fault::wrong_state(format!("container {} has exited", call.id)))?;
        if !(1..=libc::SIGRTMAX()).contains(&call.signal) {
            return Err(Fault::new(Kind::Invalid, format!("there is no signal {}", call.signal)));
        }
        if call.all {
            container.cgroup.signal(call.signal);
        } else {
            task.signal(call.signal)?;
        }
        Ok(DONE)
    }

    fn remove(&mut self, asker: Asker, id: &str) -> Answer {
        let container = self.containers.get_mut(id).ok_or_else(|| Fault::no_container(id))?;
        if container.exited.is_some() {
            return self.forget(id).map(Some);
        }
        if container.removing.is_some() || container.creating.is_some() {
            return Err(Fault::wrong_state(format!("container {id} is on its way")));
        }
        container.removing = Some(asker);
        container.cgroup.kill()?;
        Ok(None)
    }

    fn reopen_log(&mut self, asker: Asker, id: &str) -> Answer {
        let container = self.containers.get_mut(id).ok_or_else(|| Fault::no_container(id))?;
        container.log.flush(&self.poll);
        if container.log.is_flushed() {
            return Ok(DONE);
        }
        container.reopening.push(asker);
        Ok(None)
    }

    fn update(&mut self, call: &v1::UpdateContainer) -> Answer {
        let container = self.containers.get(&call.id).ok_or_else(|| Fault::no_container(&call.id))?;
        if let Some(resources) = &call.resources {
            container.cgroup.limit(resources)?;
        }
        Ok(DONE)
    }

    fn update_pod(&mut self, call: &v1::UpdatePod) -> Answer {
        match call.resources.as_ref().map(cgroup::limit_pod) {
            Some(Err(error @ CgroupError::InUse { .. })) => return Err(Fault::wrong_state(error.to_string())),
            Some(result) => result?,
            None => {}
        }
        if self.transport.in_guest() {
            memory::allow(call.memory_mib, &self.sysctls);
            if call.cpus > 0 {
                cpus::set(call.cpus);
            }
        }
        Ok(DONE)
    }

    fn update_files(&mut self, call: &v1::UpdateFiles) -> Answer {
        let container = self.containers.get(&call.id).ok_or_else(|| Fault::no_container(&call.id))?;
        let text = || format!("container {} has no files at {}", call.id, call.destination);
        let place = container.holdings.files(&call.destination);
        let place = place.ok_or_else(|| Fault::new(Kind::NotFound, text()))?;
        files::update(call.files.as_ref().unwrap_or(&v1::FileTree::default()), place)?;
        Ok(DONE)
    }

    fn state(&self) -> v1::PodState {
        let containers = self.containers.iter().filter(|(_, container)| container.refusal.is_none());
        let containers = containers.map(|(id, container)| {
            container
                .state(id, self.tasks.get(&container.task).filter(|task| task.exit().is_none()).map(|task| task.pid))
        });
        v1::PodState { configured: self.configured, containers: containers.collect() }
    }

    fn count_for(&mut self, asker: Asker) -> Answer {
        let mut census = std::mem::take(&mut self.census);
        census.want(|| {
            let layer = |(id, container): (&String, &Container)| Some((id.clone(), container.holdings.layer()?));
            self.running().filter_map(layer).collect()
        });
        self.census = census;
        self.waiting_for_stats.push(asker);
        Ok(None)
    }

    /// Tells those who wait how things stand, unless more is known in a moment.
    pub(crate) fn answer_stats(&mut self) {
        if self.waiting_for_stats.is_empty() || self.census.is_worth_waiting() {
            return;
        }
        let stats = self.stats();
        for asker in std::mem::take(&mut self.waiting_for_stats) {
            self.answer(Some(asker), Ok(reply::Result::Stats(stats.clone())));
        }
    }

    fn running(&self) -> impl Iterator<Item = (&String, &Container)> {
        let running = |container: &Container| self.tasks.get(&container.task).is_some_and(Task::is_running);
        self.containers.iter().filter(move |(_, container)| running(container))
    }

    fn stats(&self) -> v1::PodStats {
        let counts = self.census.counts();
        let layer = |(id, _): (&String, &Container)| Some((id.clone(), *counts.get(id)?));
        v1::PodStats {
            pod: Some(cgroup::pod_figures()),
            containers: self.running().map(|(id, container)| (id.clone(), container.cgroup.figures())).collect(),
            network: std::fs::read_to_string("/proc/net/dev").unwrap_or_default(),
            layers: self.running().filter_map(layer).collect(),
        }
    }

    /// The pod's disk is thrown away with it, so nothing is written out first.
    fn power_off(&mut self, asker: Asker) -> Answer {
        if let Err(error) = cgroup::kill_pod() {
            kmsg::say(&format!("cannot kill the pod's processes: {error}"));
        }
        self.answer(Some(asker), Ok(reply::Result::Done(v1::Done {})));
        if std::process::id() == 1 && matches!(self.transport, crate::transport::Transport::Vsock) {
            match reboot(RebootMode::RB_POWER_OFF) {
                Ok(never) => match never {},
                Err(error) => kmsg::say(&format!("cannot power off: {error}")),
            }
        }
        crate::sys::exit_now(0)
    }

    /// Sends something to one control connection, if it is still there.
    pub(crate) fn tell_peer(&mut self, number: u32, message: &from_agent::Message) {
        let Some(peer) = self.control.get_mut(&number) else { return };
        let message = v1::FromAgent { message: Some(message.clone()) };
        match peer.connection.send(&message) {
            Ok(()) => self.flush_peer(number),
            Err(error) => {
                kmsg::say(&format!("a control connection does not read and is closed: {error}"));
                self.control.remove(&number);
            }
        }
    }

    /// Sends an event to every control connection.
    pub(crate) fn broadcast(&mut self, message: &from_agent::Message) {
        let greeted: Vec<u32> =
            self.control.iter().filter(|(_, peer)| peer.greeted).map(|(&number, _)| number).collect();
        for number in greeted {
            self.tell_peer(number, message);
        }
    }

    fn flush_peer(&mut self, number: u32) {
        let Some(peer) = self.control.get_mut(&number) else { return };
        if peer.connection.flush(&self.poll).is_err() {
            self.control.remove(&number);
        }
    }
}
