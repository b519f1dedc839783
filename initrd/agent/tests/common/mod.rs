//! A pod as its host sees it, on a machine of [`machine`]'s.
//!
//! Wants root, every cgroup v2 controller, `unshare`, `losetup`, `partx`, `mkfs.erofs`, `mkfs.ext4` and a static busybox.

#![allow(dead_code, reason = "each test program uses its own part")]

mod machine;

use std::collections::VecDeque;
use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use agent_protocol::v1::{self, error::Kind, from_agent, from_session, open, reply, request, to_session};
use nix::sys::socket::{MsgFlags, recv};

use machine::Machine;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
const IMAGE_AT: u64 = MIB;
const SCRATCH_AT: u64 = 64 * MIB;
const DISK: u64 = 320 * MIB;

/// An agent and what was made for it.
pub(crate) struct Pod {
    machine: Machine,
    control: UnixStream,
    events: VecDeque<v1::ContainerExited>,
    last_id: u64,
    ports: u32,
}

pub(crate) fn image() -> v1::DiskRange {
    v1::DiskRange { first_sector: IMAGE_AT / SECTOR, sectors: (SCRATCH_AT - IMAGE_AT) / SECTOR, verity: None }
}

pub(crate) fn scratch() -> v1::DiskRange {
    v1::DiskRange { first_sector: SCRATCH_AT / SECTOR, sectors: (DISK - SCRATCH_AT) / SECTOR, verity: None }
}

/// Waits until `check` gives something.
pub(crate) fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn greet(stream: &UnixStream) {
    agent_protocol::write(stream, &v1::Hello { version: agent_protocol::VERSION, kernel: String::new() })
        .expect("hello");
    let hello = agent_protocol::read::<v1::Hello>(stream).expect("hello").expect("hello");
    assert!(hello.version == agent_protocol::VERSION && !hello.kernel.is_empty());
}

impl Pod {
    /// An agent that is ready, and no more.
    pub(crate) fn boot() -> Self {
        let machine = Machine::boot();
        let control = machine.dial(agent_protocol::CONTROL_PORT);
        greet(&control);
        Self { machine, control, events: VecDeque::new(), last_id: 0, ports: 2000 }
    }

    /// An agent that is a pod with a disk.
    pub(crate) fn start() -> Self {
        Self::configured(v1::Configure { scratch: Some(scratch()), ..configuration() })
    }

    pub(crate) fn configured(configure: v1::Configure) -> Self {
        let mut pod = Self::boot();
        pod.done(request::Call::Configure(configure));
        pod
    }

    /// CPUs of the pod's machine.
    pub(crate) fn cpus(&self) -> usize {
        self.machine.cpus()
    }

    pub(crate) fn dial(&self, port: u32) -> UnixStream {
        self.machine.dial(port)
    }

    fn receive(&mut self, id: u64) -> Option<reply::Result> {
        let message = agent_protocol::read::<v1::FromAgent>(&self.control).expect("message").expect("no end");
        match message.message.expect("known") {
            from_agent::Message::ContainerExited(exited) => {
                self.events.push_back(exited);
                None
            }
            from_agent::Message::Reply(reply) => {
                assert_eq!(reply.id, id);
                reply.result
            }
        }
    }

    pub(crate) fn call(&mut self, call: request::Call) -> reply::Result {
        self.last_id += 1;
        let id = self.last_id;
        agent_protocol::write(&self.control, &v1::Request { id, call: Some(call) }).expect("request");
        loop {
            if let Some(result) = self.receive(id) {
                return result;
            }
        }
    }

    pub(crate) fn done(&mut self, call: request::Call) {
        let result = self.call(call);
        assert!(matches!(result, reply::Result::Done(_)), "{result:?}");
    }

    pub(crate) fn refused(&mut self, call: request::Call) -> (Kind, String) {
        match self.call(call) {
            reply::Result::Error(error) => (error.kind(), error.message),
            other => panic!("not refused: {other:?}"),
        }
    }

    /// Creates a container with a log, which is collected.
    pub(crate) fn create(&mut self, container: v1::CreateContainer) -> Result<Log, (Kind, String)> {
        self.ports += 1;
        let log = self.machine.sink(self.ports);
        let stdio = v1::Stdio { log_port: self.ports, ..container.stdio.unwrap_or_default() };
        let container = v1::CreateContainer { stdio: Some(stdio), ..container };
        match self.call(request::Call::CreateContainer(container)) {
            reply::Result::Created(_) => Ok(log),
            reply::Result::Error(error) => Err((error.kind(), error.message)),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn start_container(&mut self, id: &str) {
        self.done(request::Call::StartContainer(v1::StartContainer { id: id.into() }));
    }

    /// Creates and starts one.
    pub(crate) fn launch(&mut self, container: v1::CreateContainer) -> Log {
        let id = container.id.clone();
        let log = self.create(container).expect("created");
        self.start_container(&id);
        log
    }

    pub(crate) fn exit_of(&mut self, id: &str) -> v1::Exit {
        loop {
            if let Some(at) = self.events.iter().position(|exited| exited.id == id) {
                return self.events.remove(at).and_then(|exited| exited.exit).expect("exit");
            }
            assert!(self.receive(0).is_none());
        }
    }

    /// Runs a script to its end in a fresh container: its exit and its log.
    pub(crate) fn run(&mut self, container: v1::CreateContainer) -> (v1::Exit, Vec<String>) {
        let id = container.id.clone();
        let log = self.launch(container);
        let exit = self.exit_of(&id);
        // Complete by the time of the event, so nothing is waited for.
        let lines = log.texts();
        self.remove(&id);
        (exit, lines)
    }

    pub(crate) fn remove(&mut self, id: &str) {
        self.done(request::Call::RemoveContainer(v1::RemoveContainer { id: id.into() }));
    }

    pub(crate) fn signal(&mut self, id: &str, signal: i32, all: bool) {
        self.done(request::Call::SignalContainer(v1::SignalContainer { id: id.into(), signal, all }));
    }

    pub(crate) fn state(&mut self, id: &str) -> Option<v1::ContainerState> {
        match self.call(request::Call::GetState(v1::GetState {})) {
            reply::Result::State(state) => state.containers.into_iter().find(|container| container.id == id),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn open(&self, kind: open::Kind) -> Result<Session, (Kind, String)> {
        let stream = self.dial(agent_protocol::SESSION_PORT);
        greet(&stream);
        agent_protocol::write(&stream, &v1::Open { kind: Some(kind) }).expect("open");
        match agent_protocol::read::<v1::Opened>(&stream).expect("opened").expect("opened").error {
            None => Ok(Session { stream }),
            Some(error) => Err((error.kind(), error.message)),
        }
    }

    pub(crate) fn exec(&self, id: &str, process: v1::Process, stdin: bool) -> Result<Session, (Kind, String)> {
        self.open(open::Kind::Exec(v1::Exec { container_id: id.into(), process: Some(process), stdin }))
    }

    /// Runs a script by exec: its exit status and output.
    pub(crate) fn exec_sh(&self, id: &str, script: &str) -> (i32, String) {
        let (exit, out, err) = self.exec(id, sh(script), false).expect("exec").finish();
        (exit.code, out + &err)
    }

    /// Whether no cgroup of this container is left, as far as that can be seen from here.
    pub(crate) fn has_no_cgroup(&self, id: &str) -> bool {
        self.machine.cgroup(id).is_none_or(|cgroup| !cgroup.exists())
    }

    /// Whether no exec of this container has left a cgroup, as far as that can be seen from here.
    pub(crate) fn has_no_execs(&self, id: &str) -> bool {
        let Some(cgroup) = self.machine.cgroup(id) else { return true };
        let mut entries = fs::read_dir(cgroup).expect("cgroup").flatten();
        entries.all(|entry| !entry.file_name().to_string_lossy().starts_with("exec-"))
    }

    /// Whether the pod disk has between `least` and `most` partitions, as far as that can be seen from here.
    pub(crate) fn has_partitions(&self, least: usize, most: usize) -> bool {
        self.machine.partitions().is_none_or(|count| (least..=most).contains(&count))
    }

    /// Fails where containers cannot be limited so, instead of passing without a test.
    pub(crate) fn assert_controller(&self, controller: &str) {
        let offered = match &self.machine {
            // The guest kernel has them all, or the test itself fails.
            Machine::Guest(_) => return,
            Machine::Namespaces(_) => fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default(),
        };
        let has = offered.split_whitespace().any(|each| each == controller);
        assert!(has, "this machine's cgroup2 has no {controller} controller: run `make test-lab`");
    }
}

/// The host's end of a container's log.
pub(crate) enum Log {
    /// Written by a VMM.
    File(PathBuf),
    /// Collected here.
    Socket { bytes: Arc<Mutex<Vec<u8>>>, stream: Arc<OnceLock<UnixStream>> },
}

impl Log {
    fn listen(path: &Path) -> Self {
        let listener = UnixListener::bind(path).expect("socket");
        let (bytes, stream) = (Arc::<Mutex<Vec<u8>>>::default(), Arc::<OnceLock<UnixStream>>::default());
        let log = Self::Socket { bytes: Arc::clone(&bytes), stream: Arc::clone(&stream) };
        std::thread::spawn(move || {
            let Ok((accepted, _)) = listener.accept() else { return };
            let mut source = stream.get_or_init(|| accepted);
            let mut chunk = [0; 1 << 16];
            // Looked at first, then taken under the lock: what is not in the socket is in the log.
            while matches!(recv(source.as_raw_fd(), &mut chunk[..1], MsgFlags::MSG_PEEK), Ok(1)) {
                let mut bytes = bytes.lock().expect("lock");
                let count = source.read(&mut chunk).unwrap_or(0);
                bytes.extend_from_slice(&chunk[..count]);
            }
        });
        log
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::File(path) => fs::read(path).expect("log"),
            Self::Socket { bytes, .. } => bytes.lock().expect("lock").clone(),
        }
    }

    /// Whole lines so far, each as stream, tag and text.
    pub(crate) fn lines(&self) -> Vec<String> {
        let text = String::from_utf8_lossy(&self.bytes()).into_owned();
        let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        lines.map(|line| line.trim_end_matches('\n').split_once(' ').expect("a time").1.to_owned()).collect()
    }

    pub(crate) fn texts(&self) -> Vec<String> {
        self.settle();
        self.lines().into_iter().map(|line| line.splitn(3, ' ').nth(2).expect("text").to_owned()).collect()
    }

    /// Waits until all that the agent has sent so far is in the log: a VMM writes it before it passes on any event that
    /// was sent later, and here it is in the socket by then.
    pub(crate) fn settle(&self) {
        let Self::Socket { bytes, stream } = self else { return };
        eventually("the log's collection", || {
            let unread = stream.get().is_none_or(|stream| {
                let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
                matches!(recv(stream.as_raw_fd(), &mut [0], flags), Ok(1))
            });
            // The collector holds the lock while it has bytes that are not in the log yet.
            let _collected = bytes.lock().expect("lock");
            (!unread).then_some(())
        });
    }

    pub(crate) fn wait_for(&self, text: &str) -> String {
        eventually(text, || self.lines().into_iter().find(|line| line.contains(text)))
    }
}

/// The host's end of an exec or attach.
pub(crate) struct Session {
    stream: UnixStream,
}

impl Session {
    pub(crate) fn send(&self, message: to_session::Message) {
        agent_protocol::write(&self.stream, &v1::ToSession { message: Some(message) }).expect("sends");
    }

    pub(crate) fn next(&self) -> Option<from_session::Message> {
        agent_protocol::read::<v1::FromSession>(&self.stream).expect("message").and_then(|message| message.message)
    }

    /// Reads output until it holds `text`.
    pub(crate) fn wait_for(&self, text: &str) -> String {
        let mut found = String::new();
        while !found.contains(text) {
            match self.next() {
                Some(from_session::Message::Stdout(bytes) | from_session::Message::Stderr(bytes)) => {
                    found += &String::from_utf8_lossy(&bytes);
                }
                other => panic!("{text:?} did not come, but {other:?} after {found:?}"),
            }
        }
        found
    }

    pub(crate) fn finish(self) -> (v1::Exit, String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        loop {
            match self.next().expect("an exit before the end") {
                from_session::Message::Stdout(bytes) => out.extend(bytes),
                from_session::Message::Stderr(bytes) => err.extend(bytes),
                from_session::Message::Exit(exit) => {
                    assert!(self.next().is_none(), "nothing follows the exit");
                    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
                    return (exit, text(&out), text(&err));
                }
            }
        }
    }
}

/// A container that runs a shell script.
pub(crate) fn container(id: &str, script: &str) -> v1::CreateContainer {
    v1::CreateContainer {
        id: id.into(),
        rootfs: Some(v1::Rootfs { layers: vec![image()], read_only: false, ..Default::default() }),
        process: Some(v1::Process { capabilities: Some(default_capabilities()), ..sh(script) }),
        masked_paths: ["/proc/kcore", "/proc/acpi", "/sys/firmware"].map(str::to_owned).into(),
        readonly_paths: ["/proc/sys", "/proc/sysrq-trigger"].map(str::to_owned).into(),
        ..v1::CreateContainer::default()
    }
}

pub(crate) fn sh(script: &str) -> v1::Process {
    v1::Process { args: ["sh", "-c", script].map(str::to_owned).into(), ..v1::Process::default() }
}

/// What runtimes give by default.
pub(crate) fn default_capabilities() -> v1::Capabilities {
    let names: Vec<String> = [
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "MKNOD",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SETFCAP",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "KILL",
        "AUDIT_WRITE",
    ]
    .map(|name| format!("CAP_{name}"))
    .into();
    v1::Capabilities {
        bounding: names.clone(),
        effective: names.clone(),
        permitted: names,
        inheritable: Vec::new(),
        ambient: Vec::new(),
    }
}

pub(crate) fn configuration() -> v1::Configure {
    v1::Configure { hostname: "pod-a".into(), ..v1::Configure::default() }
}
