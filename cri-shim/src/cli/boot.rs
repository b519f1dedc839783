//! `pericarp boot`: the VMM alone, on any 64-bit kernel, with no pod around it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::terminal::RawTerminal;
use anyhow::{Context, Result, bail};
use clap::Args;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe};
use vmm_control::{CONFIG_VERSION, Config, Console, Disk, Extent, Limits, SECTOR_BYTES};

/// Extents begin and end on whole pages (`vmm_control::Extent`).
const PAGE_BYTES: u64 = 4096;

/// Ctrl-A, which introduces a command to `pericarp` itself.
const ESCAPE: u8 = 0x01;

/// What the VMM boots.
#[derive(Args, Debug)]
pub(super) struct Boot {
    /// An uncompressed ELF vmlinux or a bzImage.
    #[arg(long)]
    kernel: PathBuf,
    /// Initial RAM disk.
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u8,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 256)]
    memory: u32,
    /// A file or block device shown as a disk; `:ro` after it refuses writes. May be given several times.
    #[arg(long = "disk", value_name = "FILE[:ro]")]
    disks: Vec<String>,
    /// Added to the kernel's command line.
    #[arg(long, default_value = "")]
    cmdline: String,
    /// The guest's console on standard input and output, through an 8250 serial port; Ctrl-A x ends the VM.
    #[arg(long)]
    console: bool,
    /// A file to which the VMM's events are appended, one JSON document a line.
    #[arg(long)]
    events: Option<PathBuf>,
    /// The VMM to run.
    #[arg(long, env = "PERICARP_VMM", default_value = "/usr/lib/pericarp/pericarp-vmm")]
    vmm: PathBuf,
}

/// Descriptors that the VMM will inherit, kept open until it is started.
#[derive(Default)]
struct Inherited(Vec<OwnedFd>);

impl Inherited {
    fn give(&mut self, fd: impl Into<OwnedFd>) -> io::Result<RawFd> {
        let fd = fd.into();
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let number = fd.as_raw_fd();
        self.0.push(fd);
        Ok(number)
    }
}

impl Boot {
    /// Runs the VM to its end and returns the VMM's exit code.
    pub(super) fn run(&self) -> Result<i32> {
        let mut inherited = Inherited::default();
        let (config, keyboard) = self.config(&mut inherited)?;
        let mut vmm = Command::new(&self.vmm)
            .stdin(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {} (--vmm or PERICARP_VMM names another)", self.vmm.display()))?;
        drop(inherited);
        let mut stdin = vmm.stdin.take().context("the VMM's standard input is a pipe")?;
        stdin.write_all(&serde_json::to_vec(&config)?)?;
        drop(stdin);
        let terminal = keyboard.is_some().then(RawTerminal::enter).transpose()?.flatten();
        if let Some(keyboard) = keyboard {
            let pid = Pid::from_raw(i32::try_from(vmm.id())?);
            std::thread::spawn(move || type_to_guest(File::from(keyboard), pid));
        }
        let code = wait(&mut vmm);
        drop(terminal);
        code
    }

    fn config(&self, inherited: &mut Inherited) -> Result<(Config, Option<OwnedFd>)> {
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        let kvm = kvm.context("opening /dev/kvm (`pericarp check` says what this host lacks)")?;
        let mut disks = Vec::new();
        for disk in &self.disks {
            disks.push(open_disk(disk, inherited)?);
        }
        let (console, keyboard) = if self.console {
            let (read, write) = pipe()?;
            (Console::Serial { input: Some(inherited.give(read)?) }, Some(write))
        } else {
            (Console::Ring, None)
        };
        if let Some(keyboard) = &keyboard {
            fcntl(keyboard, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
        let initrd = self.initrd.as_deref().map(open).transpose()?;
        let events = self.events.as_deref().map(|path| {
            let file = OpenOptions::new().append(true).create(true).open(path);
            file.with_context(|| format!("opening {}", path.display()))
        });
        let config = Config {
            version: CONFIG_VERSION,
            kvm: inherited.give(kvm)?,
            kernel: inherited.give(open(&self.kernel)?)?,
            initrd: initrd.map(|file| inherited.give(file)).transpose()?,
            cmdline: self.cmdline.clone(),
            vcpus: self.cpus,
            memory_mib: self.memory,
            room_mib: 0,
            console,
            disks,
            nets: Vec::new(),
            vsock: None,
            control: None,
            events: events.transpose()?.map(|file| inherited.give(file)).transpose()?,
        };
        Ok((config, keyboard))
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("opening {}", path.display()))
}

/// One file as a whole disk, its last partial page padded by the VMM.
fn open_disk(argument: &str, inherited: &mut Inherited) -> Result<Disk> {
    let (path, read_only) = match argument.strip_suffix(":ro") {
        Some(path) => (path, true),
        None => (argument, false),
    };
    let mut file =
        OpenOptions::new().read(true).write(!read_only).open(path).with_context(|| format!("opening {path}"))?;
    let bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
    if bytes == 0 || bytes % SECTOR_BYTES != 0 {
        bail!("{path} holds {bytes} bytes: a disk's size is a multiple of {SECTOR_BYTES}, and not 0");
    }
    let sectors = bytes.next_multiple_of(PAGE_BYTES) / SECTOR_BYTES;
    let extent = Extent { first_sector: 0, sectors, read_only, file: inherited.give(file)? };
    Ok(Disk { capacity_bytes: bytes, queues: 1, extents: vec![extent], limits: Limits::default() })
}

fn wait(vmm: &mut Child) -> Result<i32> {
    let status = vmm.wait()?;
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

/// Copies what is typed to the guest until Ctrl-A x, which asks the VMM to end.
fn type_to_guest(mut keyboard: File, vmm: Pid) {
    let mut escaped = false;
    for byte in io::stdin().lock().bytes() {
        let Ok(byte) = byte else { break };
        match (escaped, byte) {
            (true, b'x') => {
                // The VMM may have ended by itself in between: then there is nobody to tell.
                let _ = kill(vmm, Signal::SIGTERM);
                return;
            }
            (false, ESCAPE) => escaped = true,
            _ => {
                escaped = false;
                if keyboard.write_all(&[byte]).is_err() {
                    return;
                }
            }
        }
    }
}
