//! The smallest machine that our agent runs in: a vsock and nothing else, started by the daemon's own spawner.
//!
//! What the VMM is given besides is what a pod's VMM is given: a control socket, a file for events, a log.

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_protocol::CONTROL_PORT;
use anyhow::{Context, Result, ensure};
use cri_shim::spawner::{Child, Client, IDLE_MS, Kind, Program, Spawner};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use vmm_control::{CONFIG_VERSION, Config, Console, Event, EventKind, Vsock};

use crate::Place;
use crate::phases::now;

/// Guest memory in MiB.
const MEMORY_MIB: u32 = 128;

/// Where the VMM is counted.
const CGROUP: &str = "/sys/fs/cgroup/pericarp-bench-min";

/// Longest wait for a VMM's answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Descriptors of a VMM that are always there: standard input, output and error.
const FIRST_FD: RawFd = 3;

/// Starts such machines, one at a time.
pub(crate) struct Minimal {
    spawner: Client,
    vmm: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    directory: PathBuf,
}

impl Minimal {
    /// Nothing runs yet.
    pub(crate) fn new(place: &Place, spawner: Spawner) -> Result<Self> {
        let directory = place.work.join("minimal");
        fs::create_dir_all(CGROUP).with_context(|| format!("creating {CGROUP}"))?;
        Ok(Self {
            spawner: spawner.connect()?,
            vmm: place.library("pericarp-vmm"),
            kernel: place.library("vmlinux"),
            initrd: place.library("initrd"),
            directory,
        })
    }

    /// Boots until the agent is ready, and ends the machine: when the decision fell, and the VMM's events.
    pub(crate) async fn boot(&self, vcpus: u8) -> Result<(u64, Vec<Event>)> {
        // A boot that failed may have left its own.
        let _ = fs::remove_dir_all(&self.directory);
        fs::create_dir_all(&self.directory)?;
        idle().await;
        let begun = now()?;
        let child = self.spawner.spawn(self.program(vcpus)?).await?;
        let booted = self.ready().await;
        let events = booted.and_then(|()| self.events());
        end(child).await?;
        Ok((begun, events?))
    }

    /// Connects to the agent, as the daemon does; the VMM lets the connection wait until the agent is ready.
    async fn ready(&self) -> Result<()> {
        let mut agent = UnixStream::connect(self.path("vsock")).await?;
        agent.write_all(format!("CONNECT {CONTROL_PORT}\n").as_bytes()).await?;
        let mut answer = [0; 3];
        let read =
            tokio::time::timeout(PATIENCE, agent.read_exact(&mut answer)).await.context("the agent is silent")?;
        read.context("the VMM ended")?;
        ensure!(answer == *b"OK ", "the VMM answered {answer:?}");
        Ok(())
    }

    /// The VMM's events up to the agent's word.
    fn events(&self) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        for event in vmm_control::Client::connect(&self.path("control"), PATIENCE)?.events()? {
            events.push(event?);
            if events.last().is_some_and(|event| event.kind == EventKind::AgentConnected) {
                break;
            }
        }
        Ok(events)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn program(&self, vcpus: u8) -> Result<Program> {
        let log = File::create(self.path("log"))?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let mut fds: Vec<(RawFd, OwnedFd)> = vec![(1, null.into()), (2, log.into())];
        let mut given = FIRST_FD..;
        let mut give = |fd: OwnedFd| {
            let number = given.next().context("descriptors are counted from 3")?;
            fds.push((number, fd));
            anyhow::Ok(number)
        };
        let config = Config {
            version: CONFIG_VERSION,
            kvm: give(File::options().read(true).write(true).open("/dev/kvm")?.into())?,
            kernel: give(File::open(&self.kernel)?.into())?,
            initrd: Some(give(File::open(&self.initrd)?.into())?),
            cmdline: String::new(),
            vcpus,
            memory_mib: MEMORY_MIB,
            room_mib: 0,
            console: Console::Ring,
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: Some(Vsock { listener: give(listener(&self.path("vsock"), SockType::Stream)?)? }),
            control: Some(give(listener(&self.path("control"), SockType::SeqPacket)?)?),
            events: Some(give(File::options().create(true).append(true).open(self.path("events"))?.into())?),
        };
        let mut document = File::from(memfd_create(c"config", MFdFlags::MFD_CLOEXEC)?);
        document.write_all(&serde_json::to_vec(&config)?)?;
        document.rewind()?;
        fds.push((0, document.into()));
        Ok(Program { kind: Kind::Vmm, binary: File::open(&self.vmm)?.into(), cgroup: File::open(CGROUP)?.into(), fds })
    }
}

/// Waits as long as a host is idle between two pods at least, for the spawner to have made what it makes ahead.
pub(crate) async fn idle() {
    tokio::time::sleep(Duration::from_millis(2 * u64::from(IDLE_MS))).await;
}

async fn end(child: Child) -> Result<()> {
    // One that has ended by itself is gone already.
    let _ = kill(Pid::from_raw(i32::try_from(child.pid)?), Signal::SIGKILL);
    child.ended.await.map(drop).context("the spawner ended")
}

/// A listening socket at `path`.
pub(crate) fn listener(path: &Path, kind: SockType) -> Result<OwnedFd> {
    let socket = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(8)?)?;
    Ok(socket)
}
