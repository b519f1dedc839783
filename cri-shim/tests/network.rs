//! Pods' networks with the real CNI plugins, in a network and mount namespace of the test's own.
//!
//! The guest is played by another namespace: its tap and the pod's are pumped into each other, header and all, and
//! it is configured from nothing but the attachment. Needs root, Debian's containernetworking-plugins and iptables.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use cri_shim::network::{Attachment, Netns, Network, NetworkConfig};
use cri_shim::spec::{PodIdentity, PodSpec, PortMapping};

/// Set in the copy of this program that runs in the namespaces.
const INSIDE: &str = "PERICARP_TEST_INSIDE";
const PLUGINS: &str = "/usr/lib/cni";
const PATIENCE: Duration = Duration::from_secs(20);

const CONFLIST: &str = r#"{"cniVersion": "1.0.0", "name": "pods", "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true, "mtu": 1400,
     "ipam": {"type": "host-local", "dataDir": "/run/leases",
              "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd88::/64"}]],
              "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]},
     "dns": {"nameservers": ["10.88.0.1"]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}]}"#;

/// Runs the rest of a test in fresh namespaces with an empty /run; returns false outside of them.
fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        run("mount", &["-t", "tmpfs", "tmpfs", "/run"]);
        run("ip", &["link", "set", "lo", "up"]);
        return true;
    }
    let me = std::env::current_exe().expect("own path");
    let status = Command::new("unshare")
        .args(["--mount", "--net", "--propagation", "private"])
        .arg(me)
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .expect("unshare runs");
    assert!(status.success(), "{test} failed in its namespaces (it needs root and {PLUGINS})");
    false
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect("program runs");
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn network(conflist: &str) -> Network {
    fs::create_dir_all("/run/net.d").expect("conf dir");
    fs::write("/run/net.d/10-pods.conflist", conflist).expect("conf");
    Network::new(NetworkConfig {
        conf_dir: "/run/net.d".into(),
        bin_dirs: vec!["/run/bin".into(), PLUGINS.into()],
        state_dir: "/run/state".into(),
    })
}

fn pod() -> PodSpec {
    let identity = PodIdentity { name: "web".into(), namespace: "default".into(), uid: "u".into(), attempt: 0 };
    let port = PortMapping { protocol: "TCP".into(), container_port: 80, host_port: 8080, host_ip: None };
    PodSpec { identity, port_mappings: vec![port], ..PodSpec::default() }
}

/// Everything that a pod's network might leave on the host, except what plugins share between pods.
fn traces() -> String {
    let rules = run("iptables-save", &[]) + &run("ip6tables-save", &[]);
    let rules: Vec<&str> = rules.lines().filter(|line| !line.starts_with(['#', ':'])).collect();
    let links = run("ip", &["-o", "link"]);
    let links: Vec<&str> = links.lines().filter(|line| !line.contains("cni0:")).collect();
    let mut leases: Vec<_> = files(Path::new("/run/leases/pods"));
    leases.retain(|path| !path.ends_with("lock") && !path.to_string_lossy().contains("last_reserved"));
    let state = [files(Path::new("/run/state/cni")), files(Path::new("/run/state/netns"))];
    format!("{rules:#?}\n{links:#?}\n{leases:?}\n{state:?}")
}

fn files(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

/// A network stack behind the pod's tap, configured as an agent would.
struct Guest {
    netns: Netns,
}

impl Guest {
    fn start(network: &Network, attachment: &Attachment, tap: &OwnedFd) -> Self {
        let netns = network.create_netns("guest").expect("guest netns");
        let own = network.create_tap(&netns, 1).expect("guest tap").remove(0);
        let guest = Self { netns };
        for (mut from, mut to) in [(file(tap), file(&own)), (file(&own), file(tap))] {
            std::thread::spawn(move || {
                let mut frame = vec![0; 70_000];
                while let Ok(length) = from.read(&mut frame) {
                    // A frame that finds no room is lost, as on any wire.
                    let _ = to.write(&frame[..length]);
                }
            });
        }
        let mac = attachment.interface.mac.map(|byte| format!("{byte:02x}")).join(":");
        guest.run("sysctl -qw net.ipv6.conf.pericarp0.disable_ipv6=0 net.ipv6.conf.pericarp0.accept_dad=0");
        guest.run(&format!("ip link set pericarp0 address {mac} mtu {} name eth0", attachment.interface.mtu));
        guest.run("ip link set eth0 up");
        for address in &attachment.interface.addresses {
            guest.run(&format!("ip addr add {address} dev eth0 noprefixroute"));
        }
        for route in &attachment.routes {
            let family = if route.destination.address.is_ipv6() { "-6" } else { "-4" };
            let gateway = route.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
            guest.run(&format!("ip {family} route add {}{gateway} dev eth0", route.destination));
        }
        guest
    }

    fn run(&self, command: &str) {
        let net = format!("--net={}", self.netns.path().display());
        run("nsenter", &[&[net.as_str()], command.split(' ').collect::<Vec<_>>().as_slice()].concat());
    }

    /// Runs `work` on a thread of the guest's.
    fn within<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> std::thread::JoinHandle<T> {
        let handle = fs::File::open(self.netns.path()).expect("guest netns");
        std::thread::spawn(move || {
            nix::sched::setns(handle, nix::sched::CloneFlags::CLONE_NEWNET).expect("setns");
            work()
        })
    }
}

/// A blocking file on a tap.
fn file(tap: &OwnedFd) -> fs::File {
    let tap = tap.try_clone().expect("dup");
    nix::fcntl::fcntl(&tap, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_RDWR)).expect("fcntl");
    tap.into()
}

/// Answers the first connection with the count of bytes it sends.
fn serve(listener: &TcpListener) -> (SocketAddr, usize) {
    let (mut stream, peer) = listener.accept().expect("accept");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let mut all = Vec::new();
    stream.read_to_end(&mut all).expect("read");
    stream.write_all(all.len().to_string().as_bytes()).expect("write");
    (peer, all.len())
}

/// Sends 300 kB, enough to be segmented, and returns the answer.
fn call(address: SocketAddr) -> String {
    let start = Instant::now();
    let mut stream = loop {
        match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
            Ok(stream) => break stream,
            // Duplicate address detection on the bridge, or the listener's thread, takes a moment.
            Err(error) => assert!(start.elapsed() < PATIENCE, "connect to {address}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.write_all(&vec![7; 300_000]).expect("write");
    stream.shutdown(std::net::Shutdown::Write).expect("shutdown");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read");
    answer
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime")
}

#[test]
fn a_guest_takes_the_place_of_its_namespace() {
    if !inside("a_guest_takes_the_place_of_its_namespace") {
        return;
    }
    let network = network(CONFLIST);
    network.status().expect("ready");
    let runtime = runtime();

    // The first pod makes what pods share (the bridge, chains), so that a later one can be seen to leave nothing.
    let netns = network.create_netns("warm").expect("netns");
    let taps = network.create_tap(&netns, 3).expect("a tap of three pairs of queues");
    assert_eq!(taps.len(), 3);
    runtime.block_on(network.attach("warm", &pod(), &netns)).expect("attach");
    runtime.block_on(network.detach("warm")).expect("detach");
    network.remove_netns("warm").expect("remove");
    drop(taps);
    let before = traces();

    let netns = network.create_netns("p1").expect("netns");
    let tap = network.create_tap(&netns, 1).expect("tap").remove(0);
    let attachment = runtime.block_on(network.attach("p1", &pod(), &netns)).expect("attach");
    assert_eq!(attachment.interface.name, "eth0");
    assert_eq!(attachment.interface.mtu, 1400);
    assert_eq!(attachment.dns.servers, ["10.88.0.1"]);
    let [v4, v6] = attachment.ips[..] else { panic!("two addresses, not {:?}", attachment.ips) };
    assert!(v4.is_ipv4() && v6.is_ipv6(), "{v4} {v6}");
    assert_eq!(attachment.interface.addresses.len(), 2, "{attachment:?}");
    let copy: Attachment = serde_json::from_str(&serde_json::to_string(&attachment).expect("json")).expect("json");
    assert_eq!(copy, attachment);
    assert_ne!(traces(), before, "rules and a lease are there");

    // Nobody answers for the guest while it is not there, not even ARP.
    assert!(TcpStream::connect_timeout(&SocketAddr::new(v4, 80), Duration::from_secs(2)).is_err());
    let neighbour = run("ip", &["neigh", "show", &v4.to_string()]);
    assert!(neighbour.contains(&v4.to_string()) && !neighbour.contains("lladdr"), "{neighbour}");

    let guest = Guest::start(&network, &attachment, &tap);
    let gateway4: IpAddr = [10, 88, 0, 1].into();
    for (listen, dial) in
        [(v4, SocketAddr::new(v4, 80)), (v6, SocketAddr::new(v6, 80)), (v4, SocketAddr::new(gateway4, 8080))]
    {
        let server = guest.within(move || serve(&TcpListener::bind((listen, 80)).expect("bind")));
        assert_eq!(call(dial), "300000", "host to {dial}");
        server.join().expect("server");
    }
    for gateway in [gateway4, "fd88::1".parse().expect("address")] {
        let listener = TcpListener::bind((gateway, 9000)).expect("bind");
        let client = guest.within(move || call(SocketAddr::new(gateway, 9000)));
        let (peer, length) = serve(&listener);
        assert_eq!(length, 300_000);
        assert!(attachment.ips.contains(&peer.ip()), "{peer}");
        assert_eq!(client.join().expect("client"), "300000");
    }

    for _ in 0..2 {
        runtime.block_on(network.detach("p1")).expect("detach");
        network.remove_netns("p1").expect("remove");
    }
    network.remove_netns("guest").expect("remove");
    assert_eq!(traces(), before);
    assert!(network.pods().expect("pods").is_empty());
}

#[test]
fn a_detach_finishes_what_a_killed_daemon_began() {
    if !inside("a_detach_finishes_what_a_killed_daemon_began") {
        return;
    }
    let runtime = runtime();
    let before = traces();

    // A plugin that hangs after the bridge has done its work; the daemon is gone before it answers.
    fs::create_dir_all("/run/bin").expect("bin dir");
    let slow = "#!/bin/sh\ncat > /run/slow.$CNI_COMMAND\n[ $CNI_COMMAND = DEL ] || exec sleep 600\n";
    fs::write("/run/bin/slow", slow).expect("plugin");
    run("chmod", &["+x", "/run/bin/slow"]);
    let network =
        network(&CONFLIST.replace(r#"{"type": "portmap","#, r#"{"type": "slow","#).replace(r#""ipMasq": true,"#, ""));

    let netns = network.create_netns("p1").expect("netns");
    let _tap = network.create_tap(&netns, 1).expect("tap");
    let asked = pod();
    runtime.block_on(async {
        let reached = async {
            while !fs::metadata("/run/slow.ADD").is_ok_and(|m| m.len() > 0) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            result = network.attach("p1", &asked, &netns) => panic!("attached: {result:?}"),
            () = reached => {}
        }
    });
    assert_ne!(traces(), before, "the bridge plugin left something to take back");
    assert!(fs::read_to_string("/run/slow.ADD").expect("input").contains("10.88.0.2/16"), "result of the bridge");

    // The configuration is gone, the record is not.
    fs::remove_file("/run/net.d/10-pods.conflist").expect("remove");
    assert!(network.status().is_err());
    assert_eq!(network.pods().expect("pods").into_iter().collect::<Vec<_>>(), ["p1"]);
    for _ in 0..2 {
        runtime.block_on(network.detach("p1")).expect("detach");
        network.remove_netns("p1").expect("remove");
    }
    run("ip", &["link", "del", "cni0"]);
    assert_eq!(traces(), before);
    let told = fs::read_to_string("/run/slow.DEL").expect("input");
    assert!(told.contains("portMappings") && told.contains("8080"), "{told}");
}

#[test]
fn errors_say_what_to_do() {
    if !inside("errors_say_what_to_do") {
        return;
    }
    let runtime = runtime();
    let error = network("{}").status().expect_err("no configuration").to_string();
    assert!(error.contains("/run/net.d") && error.contains("\"name\" is missing"), "{error}");

    let missing = network(&CONFLIST.replace("portmap", "nosuch"));
    let error = missing.status().expect_err("no plugin").to_string();
    assert!(error.contains("\"nosuch\"") && error.contains("install it"), "{error}");

    // A plugin that refuses: there is no such subnet.
    let refused = network(&CONFLIST.replace("10.88.0.0/16", "10.88.0.0/99"));
    let netns = refused.create_netns("p1").expect("netns");
    let error = runtime.block_on(refused.attach("p1", &pod(), &netns)).expect_err("refused").to_string();
    assert!(error.contains("\"bridge\"") && error.contains("10.88.0.0/99"), "{error}");
    assert!(refused.create_netns("p1").is_err());
    assert!(refused.create_netns("../p1").is_err());
    runtime.block_on(refused.detach("p1")).expect("detach");
    refused.remove_netns("p1").expect("remove");
    assert!(refused.pods().expect("pods").is_empty());
}
