//! Guests that attack their VMM through every device: it ends them or isolates a device, never panics, and no neighbour suffers.
//!
//! The guest is `tests/hostile/guest.c`; what it says on its serial port is what it saw.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket, socketpair};
use pericarp_tests::{Node, image, wait_until};
use serde_json::json;
use tempfile::TempDir;
use vmm_control::{Client, Config, Console, Disk, EventKind, Extent, Limits, ShutdownReason, Vsock, read_events};

/// Bytes of the guest's disk.
const DISK_BYTES: u64 = 1 << 20;

/// Longest life of a guest that is to end by itself, in the lab.
const LIFE: Duration = Duration::from_secs(300);

/// For a command.
const PATIENCE: Duration = Duration::from_secs(20);

/// Devices that the guest waits for: vsock and two disks; then file system, balloon and memory, which are plugged in.
const DEVICES: u32 = 6;

/// The most failures of one device that a VMM writes down, with room for those that come while it hears of the last.
const MOST_FAILURES: usize = 70;

/// A VMM and its hostile guest.
struct Hostile {
    directory: TempDir,
    vmm: Child,
    /// The file server's end, which reads nothing.
    _server: OwnedFd,
}

/// What a guest left behind.
struct Remains {
    said: String,
    events: Vec<EventKind>,
}

impl Hostile {
    fn start(mode: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        let mut given = Given::default();
        let config = config(mode, &path, &mut given);
        fs::write(path("config"), serde_json::to_vec(&config).expect("serializes")).expect("writes");
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/root/usr/lib/pericarp/pericarp-vmm");
        let vmm = Command::new(root)
            .stdin(File::open(path("config")).expect("opens"))
            .stdout(File::create(path("said")).expect("creates"))
            .stderr(File::create(path("log")).expect("creates"))
            .spawn()
            .expect("`make test-lab` has filled target/root");
        drop(given);
        // What is not there at boot.
        let flags = SockFlag::SOCK_CLOEXEC;
        let (server, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("a socket pair");
        let control = Client::connect(&path("control"), PATIENCE).expect("the control socket is there");
        let command = vmm_control::Command::AddFs { tag: "hostile".into() };
        control.ask(&command, &[theirs.as_raw_fd()]).expect("plugs in a file system");
        control.ask(&vmm_control::Command::SetMemory { mib: 128 }, &[]).expect("plugs in memory");
        Self { directory, vmm, _server: server }
    }

    /// Puts the VMM into a cgroup of its own, as a pod's is.
    fn confine(&self, name: &str) {
        let cgroup = Path::new("/sys/fs/cgroup").join(name);
        fs::create_dir_all(&cgroup).expect("a cgroup");
        fs::write(cgroup.join("cgroup.procs"), self.vmm.id().to_string()).expect("moves the VMM");
    }

    /// Waits for the guest's end: the VMM must have survived it.
    fn survived(mut self) -> Remains {
        let deadline = Instant::now() + LIFE;
        let status = loop {
            if let Some(status) = self.vmm.try_wait().expect("a child") {
                break status;
            }
            assert!(Instant::now() < deadline, "the guest does not end: {}", self.read("said"));
            std::thread::sleep(Duration::from_millis(20));
        };
        let remains = Remains { said: self.read("said"), events: self.events() };
        let (log, said) = (self.read("log"), &remains.said);
        assert_eq!(status.code(), Some(0), "the VMM's end: {status}, its log: {log}, the guest: {said}");
        assert_eq!(log, "", "the VMM said something");
        let end = EventKind::Shutdown { reason: ShutdownReason::GuestPoweroff };
        assert_eq!(remains.events.last(), Some(&end));
        remains
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.directory.path().join(name)).expect("reads")
    }

    fn events(&self) -> Vec<EventKind> {
        let file = File::open(self.directory.path().join("events")).expect("opens");
        read_events(file).expect("reads").into_iter().map(|event| event.kind).collect()
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

impl Remains {
    /// The devices that answer by themselves still do, and none got stuck.
    fn assert_working(&self) {
        let works = self.said.lines().filter(|line| line.ends_with("check: works")).count();
        assert_eq!(works, 2, "both disks work: {}", self.said);
        assert!(!self.said.contains("stuck") && !self.said.contains("broken"), "{}", self.said);
        assert!(self.said.ends_with("end\n"), "{}", self.said);
    }

    /// How often each device needed a reset.
    fn failures(&self, device: &str) -> usize {
        let failed =
            |event: &&EventKind| matches!(event, EventKind::DeviceNeedsReset { device: name, .. } if name == device);
        self.events.iter().filter(failed).count()
    }
}

/// Where the guest is, built once.
fn kernel() -> &'static Path {
    static KERNEL: OnceLock<PathBuf> = OnceLock::new();
    KERNEL.get_or_init(build)
}

fn build() -> PathBuf {
    let kernel = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hostile.elf");
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("hostile/build");
    assert!(Command::new(build).arg(&kernel).stdout(Stdio::null()).status().expect("runs").success());
    kernel
}

fn config(mode: &str, path: &dyn Fn(&str) -> PathBuf, given: &mut Given) -> Config {
    let mut disk = |name, queues| {
        let file = File::options().read(true).write(true).create_new(true).open(path(name)).expect("creates");
        file.set_len(DISK_BYTES).expect("grows");
        let extent = Extent { first_sector: 0, sectors: DISK_BYTES / 512, read_only: false, file: given.give(file) };
        Disk { capacity_bytes: DISK_BYTES, queues, extents: vec![extent], limits: Limits::default() }
    };
    let disks = vec![disk("disk0", 1), disk("disk1", 2)];
    let control = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
    bind(control.as_raw_fd(), &UnixAddr::new(&path("control")).expect("a short path")).expect("binds");
    listen(&control, Backlog::new(1).expect("fits")).expect("listens");
    Config {
        version: vmm_control::CONFIG_VERSION,
        kvm: given.give(OpenOptions::new().read(true).write(true).open("/dev/kvm").expect("the lab has KVM")),
        kernel: given.give(File::open(kernel()).expect("was built")),
        initrd: None,
        cmdline: format!("hostile={mode} devices={DEVICES}"),
        vcpus: 1,
        memory_mib: 64,
        room_mib: 128,
        console: Console::Serial { input: None },
        disks,
        nets: Vec::new(),
        vsock: Some(Vsock { listener: given.give(UnixListener::bind(path("vsock")).expect("binds")) }),
        control: Some(given.give(control)),
        events: Some(given.give(File::options().create(true).append(true).open(path("events")).expect("creates"))),
    }
}

/// Descriptors that a VMM inherits, kept open until it is started.
#[derive(Default)]
struct Given(Vec<OwnedFd>);

impl Given {
    fn give(&mut self, fd: impl Into<OwnedFd>) -> RawFd {
        let fd = fd.into();
        fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::empty())).expect("is open");
        let number = fd.as_raw_fd();
        self.0.push(fd);
        number
    }
}

#[test]
fn spoilt_rings_isolate_a_device_and_nothing_else() {
    let remains = Hostile::start("rings").survived();
    remains.assert_working();
    // What no device can read as a request, it must not go on with.
    for attack in ["index", "loop", "outside", "next", "head", "nested", "order"] {
        let line = format!("device 2 queue 0 {attack}: reset");
        assert!(remains.said.contains(&line), "no {line:?} in {}", remains.said);
    }
    for device in ["disk0", "vsock", "disk1", "fs0"] {
        assert!(remains.failures(device) > 0, "{device}: {:?}", remains.events);
    }
}

#[test]
fn any_write_to_any_register_is_survived() {
    Hostile::start("registers").survived().assert_working();
}

#[test]
fn doorbells_without_end_are_survived() {
    let remains = Hostile::start("doorbells").survived();
    remains.assert_working();
}

#[test]
fn devices_are_reset_with_requests_in_flight() {
    let remains = Hostile::start("resets").survived();
    remains.assert_working();
    // Their requests keep the rules, and a reset is no failure.
    for device in ["disk0", "disk1"] {
        assert_eq!(remains.failures(device), 0, "{device}: {:?}", remains.events);
    }
}

#[test]
fn a_device_that_fails_again_and_again_fills_no_memory_of_the_hosts() {
    let remains = Hostile::start("failures").survived();
    assert!(!remains.said.contains("stuck"), "{}", remains.said);
    assert!((1..=MOST_FAILURES).contains(&remains.failures("disk0")), "{}", remains.failures("disk0"));
    assert!(remains.events.len() < 1000, "{} events", remains.events.len());
}

/// Answers that a web server in a pod of its own gives in a while.
fn answers(address: &str) -> u32 {
    let until = Instant::now() + Duration::from_secs(5);
    let mut answers = 0;
    while Instant::now() < until {
        assert!(http_get(address).contains("200 OK"));
        answers += 1;
    }
    answers
}

fn http_get(address: &str) -> String {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect((address, 80)).expect("the server listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("sets");
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("sends");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answers");
    answer
}

#[test]
fn a_neighbour_of_a_hostile_guest_is_served_as_beside_a_busy_one() {
    let node = Node::start();
    node.crictl(["pull", image::NGINX]).ok();
    let pod = node.run_pod("neighbour", &json!({}));
    node.run_container(&pod, "neighbour", "web", image::NGINX, &[]);
    let address = node.inspect_pod(&pod)["status"]["network"]["ip"].as_str().expect("an address").to_owned();
    wait_until("the web server", || std::net::TcpStream::connect((address.as_str(), 80)).is_ok());
    let (mut benign, mut hostile) = (0, 0);
    // In turn, so that what else the machine does weighs on both.
    for _ in 0..3 {
        for (mode, sum) in [("spin", &mut benign), ("flood", &mut hostile)] {
            let mut beside = Hostile::start(mode);
            beside.confine("hostile");
            wait_until("the guest to run", || beside.read("said").contains("devices"));
            *sum += answers(&address);
            let end = beside.vmm.try_wait().expect("a child");
            assert_eq!(end, None, "{mode} ended, with the log: {}", beside.read("log"));
        }
    }
    println!("answers beside a spinner: {benign}, beside a hostile guest: {hostile}");
    assert!(f64::from(hostile) >= f64::from(benign) / 1.5, "{hostile} against {benign}");
    wait_until("the cgroup to be empty", || fs::remove_dir("/sys/fs/cgroup/hostile").is_ok());
    node.remove_pod(&pod);
}
