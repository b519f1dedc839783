//! Where the load runs: in a guest of ours, in one of QEMU's, or on the host.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command as Process, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::SockType;
use nix::unistd::pipe;
use vmm_control::{CONFIG_VERSION, Client, Command, Config, Console, Disk, Extent, Limits, Net, SECTOR_BYTES, Vsock};

use super::jobs::Job;
use super::peer::{Peer, Way};
use super::{DISK_BYTES, Kind, tap};
use crate::minimal::listener;
use crate::{Place, kvm};

/// What a guest has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Memory in MiB.
    pub(super) memory_mib: u32,
    /// Whether there is a device by which it tells of memory that it does not use.
    pub(super) gives_back: bool,
}

/// Longest wait for the VMM's control socket.
const PATIENCE: Duration = Duration::from_secs(10);

/// For every guest.
const COMMAND_LINE: &str = "quiet panic=-1 reboot=t";

/// What Debian's QEMU can leave out of its microvm machine; its devices are on PCI, which has MSI-X and so costs it the least.
const MICROVM: &str = "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on,auto-kernel-cmdline=off,pcie=on";

/// The number by which the host's kernel knows QEMU's guest.
const QEMU_CID: u32 = 42;

/// A guest's tap and addresses.
struct Wire {
    tap: &'static str,
    host: &'static str,
    guest: &'static str,
}

const OURS: Wire = Wire { tap: "io-pericarp", host: "10.213.1.1", guest: "10.213.1.2" };
const QEMUS: Wire = Wire { tap: "io-qemu", host: "10.213.2.1", guest: "10.213.2.2" };

/// A load that waits for jobs.
pub(super) struct Machine {
    pub(super) kind: Kind,
    child: Child,
    input: Box<dyn Write>,
    output: BufReader<ChildStdout>,
    way: Way,
}

impl Machine {
    /// Starts it; returns when the load is there.
    pub(super) fn start(place: &Place, kind: Kind, shape: Shape, directory: &Path, disk: &Path) -> Result<Self> {
        let way = match kind {
            Kind::Pericarp => Way::Unix(directory.join("vsock")),
            Kind::Qemu => Way::Cid(QEMU_CID),
            Kind::Host => Way::None,
        };
        let (mut child, input) = match kind {
            Kind::Pericarp => pericarp(place, shape, directory, disk)?,
            Kind::Qemu => piped(&mut qemu(place, shape, disk)?)?,
            Kind::Host => {
                let mut command = Process::new(place.plain.join("pericarp-load"));
                command.env("LOAD_DISK", disk).env("LOAD_PEER", "127.0.0.1");
                piped(&mut command)?
            }
        };
        let output = BufReader::new(child.stdout.take().context("its output is a pipe")?);
        let mut machine = Self { kind, child, input, output, way };
        machine.expect("hello")?;
        if kind == Kind::Pericarp && shape.gives_back {
            // The first such command plugs the device in.
            Client::connect(&directory.join("control"), PATIENCE)?.ask(&Command::SetMemory { mib: 0 }, &[])?;
        }
        Ok(machine)
    }

    /// Memory that its process has, in MiB (`resident` of proc_pid_statm(5)).
    pub(super) fn resident_mib(&self) -> Result<f64> {
        let text = fs::read_to_string(format!("/proc/{}/statm", self.child.id()))?;
        let pages: f64 = text.split(' ').nth(1).context("statm has no second field")?.parse()?;
        Ok(pages / 256.0)
    }

    /// How a peer reaches its vsock.
    pub(super) fn way(&self) -> Way {
        self.way.clone()
    }

    /// Tells the load what it is to do.
    pub(super) fn prepare(&mut self, job: &Job, peer: &Peer) -> Result<()> {
        self.say(&job.line(peer.port()?))
    }

    /// Says a line to the load.
    pub(super) fn say(&mut self, line: &str) -> Result<()> {
        self.input.write_all(format!("{line}\n").as_bytes())?;
        Ok(self.input.flush()?)
    }

    /// Waits for a word of the load's; what a kernel says is passed over.
    pub(super) fn expect(&mut self, word: &str) -> Result<()> {
        let mut heard = String::new();
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line)? == 0 {
                bail!("{:?} ended without `{word}`, after: {heard}", self.kind);
            }
            if line.trim() == word {
                return Ok(());
            }
            heard.push_str(&line);
        }
    }

    /// Exits so far.
    pub(super) fn exits(&self) -> Result<f64> {
        if self.kind == Kind::Host { Ok(0.0) } else { kvm::counter(self.child.id(), "exits") }
    }

    /// Its threads.
    pub(super) fn threads(&self) -> Result<Vec<u32>> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id()))?;
        tasks.map(|task| Ok(task?.file_name().to_string_lossy().parse()?)).collect()
    }

    /// Ends it.
    pub(super) fn end(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        match self.kind {
            Kind::Pericarp => tap::remove(OURS.tap),
            Kind::Qemu => tap::remove(QEMUS.tap),
            Kind::Host => Ok(()),
        }
    }
}

type Started = (Child, Box<dyn Write>);

fn piped(command: &mut Process) -> Result<Started> {
    let program = command.get_program().to_owned();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    let input: ChildStdin = child.stdin.take().context("its input is a pipe")?;
    Ok((child, Box::new(input)))
}

fn command_line(wire: &Wire) -> String {
    format!("{COMMAND_LINE} LOAD_DISK=/dev/vda LOAD_ADDRESS={} LOAD_PEER={}", wire.guest, wire.host)
}

fn kernel(place: &Place) -> PathBuf {
    place.plain.join("vmlinux")
}

fn initrd(place: &Place) -> PathBuf {
    place.plain.join("load.cpio")
}

/// Each device as QEMU has it without another process or kernel part: packets by way of its own loop, no vhost. The vsock it
/// only has as a part of the kernel.
fn qemu(place: &Place, shape: Shape, disk: &Path) -> Result<Process> {
    tap::create(QEMUS.tap, &format!("{}/24", QEMUS.host))?;
    let mut command = Process::new("qemu-system-x86_64");
    command.args(["-M", MICROVM, "-bios", "qboot.rom", "-accel", "kvm", "-cpu", "host", "-smp", "1"]);
    command.args(["-m", &shape.memory_mib.to_string()]);
    command.args(["-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio", "-no-reboot"]);
    command.arg("-kernel").arg(kernel(place)).arg("-initrd").arg(initrd(place));
    command.args(["-append", &format!("console=ttyS0 {}", command_line(&QEMUS))]);
    command.args(["-drive", &format!("if=none,id=disk,format=raw,file={}", disk.display())]);
    command.args(["-device", "virtio-blk-pci,drive=disk"]);
    command.args(["-netdev", &format!("tap,id=net,ifname={},script=no,downscript=no,vhost=off", QEMUS.tap)]);
    command.args(["-device", "virtio-net-pci,netdev=net,romfile="]);
    command.args(["-device", &format!("vhost-vsock-pci,guest-cid={QEMU_CID}")]);
    if shape.gives_back {
        command.args(["-device", "virtio-balloon-pci,free-page-reporting=on"]);
    }
    Ok(command)
}

/// Our VMM behind its filter of system calls, with the devices of a pod.
fn pericarp(place: &Place, shape: Shape, directory: &Path, disk: &Path) -> Result<Started> {
    tap::create(OURS.tap, &format!("{}/24", OURS.host))?;
    let mut given = Given::default();
    let (typed, input) = pipe()?;
    fcntl(&input, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    let read_write = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
    let extent = Extent {
        first_sector: 0,
        sectors: DISK_BYTES / SECTOR_BYTES,
        read_only: false,
        file: given.give(read_write(disk)?)?,
    };
    let config = Config {
        version: CONFIG_VERSION,
        kvm: given.give(read_write(Path::new("/dev/kvm"))?)?,
        kernel: given.give(File::open(kernel(place))?)?,
        initrd: Some(given.give(File::open(initrd(place))?)?),
        cmdline: command_line(&OURS),
        vcpus: 1,
        memory_mib: shape.memory_mib,
        room_mib: 0,
        console: Console::Serial { input: Some(given.give(typed)?) },
        disks: vec![Disk { capacity_bytes: DISK_BYTES, queues: 1, extents: vec![extent], limits: Limits::default() }],
        nets: vec![Net {
            taps: vec![given.give(tap::open(OURS.tap)?)?],
            mac: [2, 0, 0, 0, 0, 1],
            limits: Limits::default(),
        }],
        vsock: Some(Vsock { listener: given.give(UnixListener::bind(directory.join("vsock"))?)? }),
        control: shape
            .gives_back
            .then(|| given.give(listener(&directory.join("control"), SockType::SeqPacket)?))
            .transpose()?,
        events: None,
    };
    let document = directory.join("config");
    fs::write(&document, serde_json::to_vec(&config)?)?;
    let vmm = place.library("pericarp-vmm");
    let started = Process::new(&vmm).stdin(File::open(&document)?).stdout(Stdio::piped()).spawn();
    drop(given);
    Ok((started.with_context(|| format!("starting {}", vmm.display()))?, Box::new(File::from(input))))
}

/// Descriptors that the VMM inherits, kept open until it is started.
#[derive(Default)]
struct Given(Vec<OwnedFd>);

impl Given {
    fn give(&mut self, fd: impl Into<OwnedFd>) -> Result<RawFd> {
        let fd = fd.into();
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let number = fd.as_raw_fd();
        self.0.push(fd);
        Ok(number)
    }
}
