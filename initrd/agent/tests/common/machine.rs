//! What an agent runs on: namespaces of this machine, or a guest.
//!
//! In namespaces everything but vsock and the guest's kernel is the real thing: unix sockets stand for vsock, a loop
//! device for the pod disk. With `PERICARP_VMM`, `PERICARP_KERNEL` and `PERICARP_INITRD` set it is a guest of that VMM
//! with nothing left out (`/dev/kvm` must work, so this is for the lab).

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use vmm_control::{Client, Config, Disk, EventKind, Extent, Vsock};

use super::{DISK, IMAGE_AT, Log, MIB, PATIENCE, SCRATCH_AT, SECTOR, eventually};

/// What the image is made of, beside busybox and its names.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/var/www:/bin/sh\n";
const GROUP: &str = "root:x:0:\nweb:x:34:\nlog:x:60:web\n";

/// A machine with an agent that is ready. What was made for it goes with it.
pub(crate) enum Machine {
    Namespaces(Namespaces),
    Guest(Guest),
}

/// The agent is PID 1 of its own namespaces.
pub(crate) struct Namespaces {
    directory: tempfile::TempDir,
    loop_device: String,
    cgroup: PathBuf,
    agent: Option<Child>,
}

/// The agent is PID 1 of a guest.
pub(crate) struct Guest {
    directory: tempfile::TempDir,
    vmm: Child,
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// An image with a shell, two users, and a link to a place that is not there.
fn make_image(directory: &Path) -> PathBuf {
    let tree = directory.join("tree");
    for path in ["bin", "etc", "root", "tmp", "var/www"] {
        fs::create_dir_all(tree.join(path)).expect("directory");
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox")).expect("a static busybox");
    for applet in run("/bin/busybox", &["--list"]).lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", tree.join("bin").join(applet)).expect("link");
    }
    fs::write(tree.join("etc/passwd"), PASSWD).expect("passwd");
    fs::write(tree.join("etc/group"), GROUP).expect("group");
    fs::write(tree.join("etc/not-a-program"), "text").expect("file");
    symlink("/etc/linked", tree.join("var/escape")).expect("link");
    let image = directory.join("image.erofs");
    run("mkfs.erofs", &["--quiet", image.to_str().expect("path"), tree.to_str().expect("path")]);
    image
}

/// The image and the pod's writable space, each in a file of the size of its place on the disk.
fn make_files(directory: &Path) -> (PathBuf, PathBuf) {
    let (image, scratch) = (make_image(directory), directory.join("scratch"));
    OpenOptions::new().write(true).open(&image).expect("file").set_len(SCRATCH_AT - IMAGE_AT).expect("size");
    File::create(&scratch).expect("file").set_len(DISK - SCRATCH_AT).expect("size");
    run("mkfs.ext4", &["-q", "-O", "^has_journal", scratch.to_str().expect("path")]);
    (image, scratch)
}

/// CPUs of a guest, whose kernel starts the first alone.
const VCPUS: u8 = 2;

impl Machine {
    /// CPUs that it has.
    pub(crate) fn cpus(&self) -> usize {
        match self {
            Self::Namespaces(_) => std::thread::available_parallelism().expect("known").get(),
            Self::Guest(_) => VCPUS.into(),
        }
    }

    /// Boots one and waits until its agent is ready.
    pub(crate) fn boot() -> Self {
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
        match (variable("PERICARP_VMM"), variable("PERICARP_KERNEL"), variable("PERICARP_INITRD")) {
            (Some(vmm), Some(kernel), Some(initrd)) => Self::Guest(Guest::boot(&vmm, &kernel, &initrd)),
            _ => Self::Namespaces(Namespaces::boot()),
        }
    }

    /// Dials one of the agent's ports.
    pub(crate) fn dial(&self, port: u32) -> UnixStream {
        let stream = match self {
            Self::Namespaces(machine) => {
                let path = machine.directory.path().join("s").join(format!("port-{port}"));
                eventually("a connection", || UnixStream::connect(&path).ok())
            }
            Self::Guest(guest) => guest.dial(port),
        };
        stream.set_read_timeout(Some(PATIENCE)).expect("time limit");
        stream
    }

    /// Takes in what the agent sends to one of the host's ports.
    pub(crate) fn sink(&self, port: u32) -> Log {
        match self {
            Self::Namespaces(machine) => Log::listen(&machine.directory.path().join("s").join(format!("host-{port}"))),
            Self::Guest(guest) => guest.sink(port),
        }
    }

    /// Directory of a container's cgroup, where it can be seen from here.
    pub(crate) fn cgroup(&self, id: &str) -> Option<PathBuf> {
        match self {
            Self::Namespaces(machine) => Some(machine.cgroup.join("pod").join(id)),
            Self::Guest(_) => None,
        }
    }

    /// Partitions of the pod disk, where they can be seen from here.
    pub(crate) fn partitions(&self) -> Option<usize> {
        let Self::Namespaces(machine) = self else { return None };
        let name = machine.loop_device.trim_start_matches("/dev/");
        let entries = fs::read_dir(format!("/sys/block/{name}")).expect("disk").flatten();
        Some(entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(name)).count())
    }
}

/// A cgroup in which the agent is as if at the root of all.
fn make_cgroup(name: &str) -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let root = mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (target, kind) = (words.nth(1)?, words.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(target))
    });
    let root = root.expect("a cgroup2 hierarchy");
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).expect("controllers");
    for controller in controllers.split_whitespace() {
        // One that cannot be given fails the tests that need it.
        drop(fs::write(root.join("cgroup.subtree_control"), format!("+{controller}")));
    }
    let cgroup = root.join(name);
    fs::create_dir(&cgroup).expect("cgroup");
    cgroup
}

impl Namespaces {
    fn boot() -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let (image, scratch) = make_files(directory.path());
        let disk = directory.path().join("disk");
        File::create(&disk).expect("file").set_len(DISK).expect("size");
        for (part, at) in [(&image, IMAGE_AT), (&scratch, SCRATCH_AT)] {
            let (from, to) = (format!("if={}", part.display()), format!("of={}", disk.display()));
            run("dd", &[&from, &to, "bs=1M", &format!("seek={}", at / MIB), "conv=notrunc,sparse", "status=none"]);
        }
        let loop_device = run("losetup", &["--show", "--find", "--partscan", disk.to_str().expect("path")]);
        let unique = directory.path().file_name().expect("name").to_string_lossy().trim_start_matches('.').to_owned();
        let cgroup = make_cgroup(&format!("pericarp-test-{unique}"));
        let mut machine = Self { directory, loop_device, cgroup, agent: None };
        machine.start_agent();
        machine
    }

    fn start_agent(&mut self) {
        let sockets = self.directory.path().join("s");
        fs::create_dir(&sockets).expect("directory");
        let ready = UnixListener::bind(sockets.join(format!("host-{}", vmm_control::READY_PORT))).expect("socket");
        // Only the agent itself may be in its cgroup, which cannot have children with limits otherwise.
        let script = format!(
            "echo 0 > {}/cgroup.procs && exec unshare --cgroup {} --unix {} --disk {}",
            self.cgroup.display(),
            env!("CARGO_BIN_EXE_pericarp-init"),
            sockets.display(),
            self.loop_device,
        );
        let agent = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount", "--net", "--uts", "--ipc", "sh", "-c", &script])
            .spawn();
        self.agent = Some(agent.expect("unshare"));
        ready.accept().expect("the agent says that it is ready");
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            drop(agent.kill());
            drop(agent.wait());
        }
        let start = Instant::now();
        while start.elapsed() < PATIENCE && remove_cgroups(&self.cgroup).is_err() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        for number in 1..16 {
            drop(Command::new("partx").args(["-d", "--nr", &number.to_string(), &self.loop_device]).output());
        }
        drop(Command::new("losetup").args(["-d", &self.loop_device]).output());
    }
}

fn remove_cgroups(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_cgroups(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

/// The number under which the VMM will find `fd`.
fn inherited(fd: &impl AsFd) -> RawFd {
    fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::empty())).expect("flags");
    fd.as_fd().as_raw_fd()
}

impl Guest {
    fn boot(vmm: &Path, kernel: &Path, initrd: &Path) -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let (image, scratch) = make_files(directory.path());
        let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path).expect("file");
        let read = |path: &Path| File::open(path).expect("file");
        let (kvm, kernel, initrd) = (open(Path::new("/dev/kvm")), read(kernel), read(initrd));
        let (image, scratch) = (read(&image), open(&scratch));
        let events = OpenOptions::new().create(true).append(true).open(directory.path().join("events")).expect("file");
        let vsock = UnixListener::bind(directory.path().join("vsock")).expect("socket");
        let control = seqpacket_listener(&directory.path().join("control"));
        let extent = |at: u64, end: u64, read_only, file: &File| Extent {
            first_sector: at / SECTOR,
            sectors: (end - at) / SECTOR,
            read_only,
            file: inherited(file),
        };
        let extents = vec![extent(IMAGE_AT, SCRATCH_AT, true, &image), extent(SCRATCH_AT, DISK, false, &scratch)];
        let config = Config {
            version: vmm_control::CONFIG_VERSION,
            kvm: inherited(&kvm),
            kernel: inherited(&kernel),
            initrd: Some(inherited(&initrd)),
            cmdline: String::new(),
            vcpus: VCPUS,
            memory_mib: 256,
            room_mib: 0,
            console: vmm_control::Console::Ring,
            disks: vec![Disk {
                capacity_bytes: vmm_control::POD_DISK_BYTES,
                queues: 1,
                extents,
                limits: vmm_control::Limits::default(),
            }],
            nets: Vec::new(),
            vsock: Some(Vsock { listener: inherited(&vsock) }),
            control: Some(inherited(&control)),
            events: Some(inherited(&events)),
        };
        let mut vmm = Command::new(vmm).stdin(Stdio::piped()).spawn().expect("the VMM");
        let mut stdin = vmm.stdin.take().expect("stdin");
        stdin.write_all(&serde_json::to_vec(&config).expect("JSON")).expect("configuration");
        drop(stdin);
        let mut guest = Self { directory, vmm };
        guest.wait_for_agent();
        guest
    }

    fn wait_for_agent(&mut self) {
        eventually("the agent", || {
            let events = File::open(self.directory.path().join("events")).expect("events");
            let events = vmm_control::read_events(events).expect("events");
            let ended = self.vmm.try_wait().expect("the VMM");
            assert!(ended.is_none(), "the VMM has ended: {ended:?}, {events:?}");
            events.iter().any(|event| event.kind == EventKind::AgentConnected).then_some(())
        });
    }

    fn client(&self) -> Client {
        Client::connect(&self.directory.path().join("control"), PATIENCE).expect("the VMM's control socket")
    }

    fn dial(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.directory.path().join("vsock")).expect("vsock");
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).expect("vsock");
        let mut answer = String::new();
        // Nothing follows the line until the first word of ours.
        BufReader::new(&stream).read_line(&mut answer).expect("vsock");
        assert!(answer.starts_with("OK "), "the agent does not take port {port}: {answer:?}");
        stream
    }

    fn sink(&self, port: u32) -> Log {
        let path = self.directory.path().join(format!("sink-{port}"));
        let file = OpenOptions::new().create(true).append(true).open(&path).expect("file");
        let command = vmm_control::Command::SetSink { port };
        let done = self.client().ask(&command, &[file.as_raw_fd()]).expect("a sink");
        assert_eq!(done, vmm_control::Reply::Done);
        Log::File(path)
    }

    /// All that the guest's kernel and agent have said.
    fn console(&self) -> String {
        match self.client().ask(&vmm_control::Command::Console { from: 0 }, &[]) {
            Ok(vmm_control::Reply::Console { text, .. }) => text,
            other => format!("{other:?}"),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.console());
        }
        drop(self.vmm.kill());
        drop(self.vmm.wait());
    }
}

fn seqpacket_listener(path: &Path) -> OwnedFd {
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).expect("socket");
    bind(listener.as_raw_fd(), &UnixAddr::new(path).expect("path")).expect("socket");
    listen(&listener, Backlog::MAXCONN).expect("socket");
    listener
}
