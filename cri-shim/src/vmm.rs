//! A pod's VMM process: starting it, finding it again, and knowing why it ended.
//!
//! It is given everything it needs as open descriptors, and tells what happens in a file that it was given. That file
//! and the process's pidfd are all this module needs: a daemon that was not there when the VMM ended learns the same.

use std::fs::{self, File};
use std::io::{self, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use vmm_control::{
    CONFIG_VERSION, Config, Console, Disk, Event, EventKind, Extent, Net, POD_DISK_BYTES, ShutdownReason, Vsock,
    read_events,
};

use crate::error::{Error, IoContext, Result};
use crate::pod::{CoreConfig, Frame, Moment};
use crate::pod_dir::PodDir;
use crate::process::{self, ProcessRecord};
use crate::spawner::{Child, Client, Ended, Kind, Program};
use crate::watched::watch;

/// First number of a descriptor beyond the standard three.
const FIRST_FD: RawFd = 3;

/// How long the spawner's word on an end may take after the pidfd has told it.
const REPORT_LIMIT: Duration = Duration::from_secs(1);

/// How much of the VMM's standard error is quoted, in bytes.
const LOG_TAIL: usize = 2048;

/// The address that the NIC announces before the agent gives it the pod's: locally administered.
const BOOT_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];

/// What one VMM is given beside what all get.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) dir: &'a PodDir,
    pub(crate) frame: Frame,
    pub(crate) cgroup: OwnedFd,
    /// One descriptor for each pair of the NIC's queues; none gives the guest no NIC.
    pub(crate) taps: Vec<OwnedFd>,
    /// The writable space, and its length in sectors; it is at the pod disk's beginning.
    pub(crate) scratch: (OwnedFd, u64),
}

/// A VMM that was running when last seen.
#[derive(Debug)]
pub(crate) struct Vmm {
    id: ProcessRecord,
    pidfd: AsyncFd<OwnedFd>,
    /// Only if this daemon started it.
    ended: Option<oneshot::Receiver<Ended>>,
    dir: PodDir,
}

impl Vmm {
    /// Starts a VMM; returns when its program is loaded.
    pub(crate) async fn launch(spawner: &Client, config: &CoreConfig, launch: Launch<'_>) -> Result<Self> {
        let dir = launch.dir.clone();
        let child = spawner.spawn(program(config, launch)?).await?;
        Self::watch(child, dir)
    }

    fn watch(child: Child, dir: PodDir) -> Result<Self> {
        let Child { pid, pidfd, ended } = child;
        // 0 if it has ended already, which no later process's start is.
        let start_time = process::start_time(pid).unwrap_or(0);
        let pidfd = watch(pidfd).doing(|| "watching the VMM")?;
        Ok(Self { id: ProcessRecord { pid, start_time }, pidfd, ended: Some(ended), dir })
    }

    /// Finds a VMM that an earlier daemon started; `None` if it has ended.
    pub(crate) fn adopt(id: ProcessRecord, dir: PodDir) -> Result<Option<Self>> {
        let Some(pidfd) = process::find(id).doing(|| "finding the VMM again")? else { return Ok(None) };
        let pidfd = watch(pidfd).doing(|| "watching the VMM")?;
        Ok(Some(Self { id, pidfd, ended: None, dir }))
    }

    /// What the record holds of it.
    pub(crate) fn id(&self) -> ProcessRecord {
        self.id
    }

    /// Waits until it has ended. May be dropped and called again.
    pub(crate) async fn wait(&self) {
        // An error here would be the runtime's own end.
        let _ = self.pidfd.readable().await;
    }

    /// Kills it; one that has ended is left alone.
    pub(crate) fn kill(&self) {
        if let Err(error) = process::signal(self.pidfd.get_ref(), libc::SIGKILL) {
            tracing::warn!(pid = self.id.pid, %error, "the VMM cannot be killed");
        }
    }

    /// Why it ended, after [`Vmm::wait`].
    pub(crate) async fn cause(self) -> Cause {
        let ended = match self.ended {
            Some(ended) => tokio::time::timeout(REPORT_LIMIT, ended).await.ok().and_then(Result::ok),
            None => None,
        };
        cause_of(&self.dir, ended)
    }
}

// Kinds of [`Cause`] that say little.
const KILLED: &str = "killed";
const UNKNOWN: &str = "unknown";

/// Why a VMM ended.
#[derive(Debug)]
pub(crate) struct Cause {
    /// A word to count by.
    pub(crate) kind: &'static str,
    /// A sentence for people, and after a panic the end of the guest's console.
    pub(crate) text: String,
}

impl Cause {
    /// Whether the guest ended it, and not the VMM or the host.
    pub(crate) fn is_the_guests(&self) -> bool {
        ["guest_reset", "guest_panic", "fault"].contains(&self.kind)
    }

    /// Whether it was killed, as far as is known, by whom nobody knows.
    pub(crate) fn is_unexplained(&self) -> bool {
        matches!(self.kind, KILLED | UNKNOWN)
    }

    /// The host's kernel killed it when its cgroup was at its limit.
    pub(crate) fn out_of_memory() -> Self {
        let text = "the VMM was killed by the host's kernel: the pod's cgroup was out of memory (memory.max)";
        Self { kind: "out_of_memory", text: text.into() }
    }
}

/// Why the VMM of a directory ended, from the events it left and, where known, how the process ended.
pub(crate) fn cause_of(dir: &PodDir, ended: Option<Ended>) -> Cause {
    let events = events(dir);
    let log = fs::read(dir.vmm_log()).unwrap_or_default();
    let text = cause(&events, ended, &String::from_utf8_lossy(&log[log.len().saturating_sub(LOG_TAIL)..]));
    Cause { kind: kind(&events, ended), text }
}

fn kind(events: &[Event], ended: Option<Ended>) -> &'static str {
    match (events.last().map(|event| &event.kind), ended) {
        (Some(EventKind::Shutdown { reason }), _) => match reason {
            ShutdownReason::GuestPoweroff => "guest_poweroff",
            ShutdownReason::GuestReset => "guest_reset",
            ShutdownReason::GuestPanic => "guest_panic",
            ShutdownReason::Requested => "requested",
            ShutdownReason::Fault { .. } => "fault",
            ShutdownReason::ForbiddenSyscall { .. } => "forbidden_syscall",
        },
        (_, Some(Ended::Killed(_))) => KILLED,
        (_, Some(Ended::Exited(_))) => "exited",
        (_, None) => UNKNOWN,
    }
}

fn cause(events: &[Event], ended: Option<Ended>, log: &str) -> String {
    let console = events.iter().rev().find_map(|event| match &event.kind {
        EventKind::GuestPanic { console } => Some(console.as_str()),
        _ => None,
    });
    let last = events.last().map(|event| &event.kind);
    let said = |text: String| if log.trim().is_empty() { text } else { format!("{text}: {}", log.trim()) };
    let mut message = match (last, ended) {
        (Some(EventKind::Shutdown { reason }), _) => shutdown_text(reason),
        (_, Some(Ended::Killed(signal))) => said(format!("the VMM was killed by signal {signal}")),
        (_, Some(Ended::Exited(code))) => said(format!("the VMM ended with exit code {code}")),
        (_, None) => said("the VMM was killed or crashed: it left no last word".into()),
    };
    if let Some(console) = console {
        message = format!("{message}; end of the guest's console:\n{}", console.trim_end());
    }
    message
}

fn shutdown_text(reason: &ShutdownReason) -> String {
    match reason {
        ShutdownReason::GuestPoweroff => "the guest powered itself off".into(),
        ShutdownReason::GuestReset => "the guest reset itself".into(),
        ShutdownReason::GuestPanic => "the guest kernel panicked".into(),
        ShutdownReason::Requested => "the VM was shut down".into(),
        ShutdownReason::Fault { message } => format!("the VMM could not go on: {message}"),
        ShutdownReason::ForbiddenSyscall { thread, syscall } => {
            format!("the VMM's thread {thread} made system call {syscall}, which its filter forbids")
        }
    }
}

/// What a VMM has told so far; nothing if there never was one.
pub(crate) fn events(dir: &PodDir) -> Vec<Event> {
    File::open(dir.events()).and_then(read_events).unwrap_or_default()
}

/// The moments of a boot as the VMM noted them.
pub(crate) fn moments(dir: &PodDir) -> Vec<Moment> {
    let moment = |event: Event| {
        let name = match event.kind {
            EventKind::Started => "vmm_started",
            EventKind::Configured => "vmm_configured",
            EventKind::Loaded => "kernel_loaded",
            EventKind::Booted => "kernel_booted",
            EventKind::AgentConnected => "agent_connected",
            EventKind::DeviceNeedsReset { .. } => "device_needs_reset",
            EventKind::GuestPanic { .. } => "guest_panic",
            EventKind::Shutdown { .. } => "shutdown",
        };
        Moment { name: name.into(), at_ns: event.at_ns }
    };
    events(dir).into_iter().map(moment).collect()
}

/// The binary, configuration and descriptors of a VMM.
fn program(config: &CoreConfig, launch: Launch<'_>) -> Result<Program> {
    let open = |path: &Path| File::open(path).doing(|| format!("opening {}", path.display()));
    let dir = launch.dir;
    let log = append(&dir.vmm_log())?;
    let null = File::options().read(true).write(true).open("/dev/null").doing(|| "opening /dev/null")?;
    let mut fds = Fds(vec![(1, null.into()), (2, log.into())]);
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let kvm = kvm.map_err(|error| match Error::io("/dev/kvm", &error) {
        Error::Internal(text) => Error::Unavailable(format!("{text}: `pericarp check` says more")),
        full => full,
    })?;
    let taps: Vec<_> = launch.taps.into_iter().map(|tap| fds.give(tap)).collect();
    let (scratch, sectors) = launch.scratch;
    let extent = Extent { first_sector: 0, sectors, read_only: false, file: fds.give(scratch) };
    let vmm = Config {
        version: CONFIG_VERSION,
        kvm: fds.give(kvm),
        kernel: fds.give(open(&config.kernel)?),
        initrd: Some(fds.give(open(&config.initrd)?)),
        cmdline: config.kernel_cmdline.clone(),
        vcpus: launch.frame.vcpus,
        memory_mib: launch.frame.boot_mib,
        room_mib: launch.frame.room_mib,
        console: Console::Ring,
        disks: vec![Disk {
            capacity_bytes: POD_DISK_BYTES,
            queues: launch.frame.queues,
            extents: vec![extent],
            limits: config.disk_limits(),
        }],
        nets: if taps.is_empty() { Vec::new() } else { vec![Net { taps, mac: BOOT_MAC, limits: config.net_limits() }] },
        vsock: Some(Vsock { listener: fds.give(listener(dir, &dir.vsock(), SockType::Stream)?) }),
        control: Some(fds.give(listener(dir, &dir.control(), SockType::SeqPacket)?)),
        events: Some(fds.give(append(&dir.events())?)),
    };
    fds.0.push((0, document(&vmm)?));
    Ok(Program { kind: Kind::Vmm, binary: open(&config.vmm)?.into(), cgroup: launch.cgroup, fds: fds.0 })
}

/// The descriptors of a VMM by number.
struct Fds(Vec<(RawFd, OwnedFd)>);

impl Fds {
    /// Gives one the next number.
    fn give(&mut self, fd: impl Into<OwnedFd>) -> RawFd {
        let number = self.0.iter().map(|(number, _)| number.saturating_add(1)).max().unwrap_or(0).max(FIRST_FD);
        self.0.push((number, fd.into()));
        number
    }
}

fn append(path: &Path) -> Result<File> {
    let file = File::options().create(true).append(true).mode(0o600).open(path);
    file.doing(|| format!("creating {}", path.display()))
}

/// The configuration as a file that is read to its end.
fn document(config: &Config) -> Result<OwnedFd> {
    let write = || -> io::Result<File> {
        let mut file = File::from(memfd_create(c"config", MFdFlags::MFD_CLOEXEC)?);
        // At once: a writer without a buffer would be called for every comma.
        file.write_all(&serde_json::to_vec(config)?)?;
        file.rewind()?;
        Ok(file)
    };
    Ok(write().doing(|| "writing the VMM's configuration")?.into())
}

/// A listening socket at a path of the pod's directory.
fn listener(dir: &PodDir, path: &Path, kind: SockType) -> Result<OwnedFd> {
    let (_directory, reach) = dir.reach(path)?;
    let make = || -> nix::Result<OwnedFd> {
        let socket = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
        bind(socket.as_raw_fd(), &UnixAddr::new(&reach)?)?;
        listen(&socket, Backlog::new(libc::SOMAXCONN.min(128))?)?;
        Ok(socket)
    };
    make().doing(|| format!("listening on {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: EventKind) -> Event {
        Event { at_ns: 0, exits: None, kind }
    }

    #[test]
    fn a_killed_vmm_is_never_a_success() {
        let events = [event(EventKind::Started), event(EventKind::AgentConnected)];
        assert_eq!(cause(&events, Some(Ended::Killed(9)), ""), "the VMM was killed by signal 9");
        assert_eq!(kind(&events, Some(Ended::Killed(9))), "killed");
        assert!(cause(&events, None, "").contains("killed"));
    }

    #[test]
    fn a_panic_brings_the_consoles_end() {
        let panic = event(EventKind::GuestPanic { console: "a\nKernel panic - not syncing\n".into() });
        let last = event(EventKind::Shutdown { reason: ShutdownReason::GuestPanic });
        let message = cause(&[panic, last], Some(Ended::Exited(10)), "");
        assert_eq!(message, "the guest kernel panicked; end of the guest's console:\na\nKernel panic - not syncing");
    }

    #[test]
    fn a_vmm_that_never_started_quotes_its_own_words() {
        let message = cause(&[], Some(Ended::Exited(5)), "pericarp-vmm: KVM lacks x\n");
        assert_eq!(message, "the VMM ended with exit code 5: pericarp-vmm: KVM lacks x");
    }

    #[test]
    fn descriptors_are_numbered_from_three() {
        let null = || OwnedFd::from(File::open("/dev/null").expect("opens"));
        let mut fds = Fds(vec![(1, null()), (2, null())]);
        assert_eq!([fds.give(null()), fds.give(null())], [3, 4]);
    }
}
