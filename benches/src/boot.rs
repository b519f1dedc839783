//! From the decision to spawn a VMM to the agent's word that it is ready, on our kernel and behind all of the jail.

use std::path::PathBuf;
use std::process::{self, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_shim::image::{Store, StoreConfig};
use cri_shim::network::{Network, NetworkConfig};
use cri_shim::pod::{CoreConfig, Pods};
use cri_shim::pod_dir::PodDir;
use cri_shim::spawner::Spawner;
use cri_shim::spec::{NetworkSource, PodIdentity, PodSpec};
use vmm_control::{Client, Command, Event, EventKind};

use crate::minimal::{Minimal, idle};
use crate::phases::{events, find, minstr, now, of_agent};
use crate::repeat::repeat;
use crate::report::{Report, Samples};
use crate::{Place, smaps};

/// Guest memory of the pod that is measured, in MiB: the default of a pod without limits.
pub(crate) const POD_MIB: u32 = 512;

/// The network namespace that stands for what a CNI plugin makes.
const NETNS: &str = "pericarp-bench";

/// Pods whose start is to cost no more than that of a small one: names of their figures, and guest memory in MiB.
pub(crate) const LARGE: [(&str, u32); 2] = [("boot.16gib", 16 << 10), ("boot.64gib", 64 << 10)];

/// Longest wait for a guest to plug its memory.
const PATIENCE: Duration = Duration::from_secs(120);

/// Measures the boots of [`LARGE`].
pub(crate) async fn measure_large(place: &Place, spawners: [Spawner; 2], report: &mut Report) -> Result<()> {
    let mut samples = Samples::default();
    for ((name, mib), spawner) in LARGE.into_iter().zip(spawners) {
        let pods = open(place, spawner, mib).await?;
        for pod in repeat(name, place.runs, async || pod(&pods).await).await? {
            samples.extend(of_agent(name, pod.begun, &pod.events)?);
            samples.add(format!("{name}.plugged.minstr"), pod.plugged_minstr);
        }
    }
    report.take(samples);
    Ok(())
}

/// Measures `boot.own.*`, `vmm.pss_kib` and `vmm.guest_kib`.
pub(crate) async fn measure_pod(place: &Place, pods: &Pods, report: &mut Report) -> Result<()> {
    let mut samples = Samples::default();
    for pod in repeat("boot.own", place.runs, async || pod(pods).await).await? {
        samples.extend(of_agent("boot.own", pod.begun, &pod.events)?);
        samples.add("boot.own.plugged.minstr", pod.plugged_minstr);
        samples.add("vmm.pss_kib", pod.vmm.own);
        samples.add("vmm.guest_kib", pod.vmm.guest);
    }
    report.take(samples);
    Ok(())
}

/// Measures `boot.min.*`, and the same with more CPUs.
pub(crate) async fn measure_minimal(place: &Place, minimal: &Minimal, report: &mut Report) -> Result<()> {
    let mut samples = Samples::default();
    for (name, vcpus) in [("boot.min", 1), ("boot.2vcpu", 2), ("boot.4vcpu", 4)] {
        for (begun, events) in repeat(name, place.runs, async || minimal.boot(vcpus).await).await? {
            samples.extend(of_agent(name, begun, &events)?);
        }
    }
    report.take(samples);
    Ok(())
}

/// The daemon's core for pods of a size, with a state directory of its own.
pub(crate) async fn open(place: &Place, spawner: Spawner, memory_mib: u32) -> Result<Pods> {
    let state_dir = place.work.join(format!("state-{memory_mib}"));
    let network = NetworkConfig {
        conf_dir: place.work.join("no-cni"),
        bin_dirs: vec![place.cni.clone()],
        state_dir: state_dir.clone(),
    };
    let images = Store::open(&place.work.join("images"), StoreConfig::default())?;
    let config = CoreConfig {
        state_dir,
        scratch_dir: place.work.join("scratch"),
        vmm: place.library("pericarp-vmm"),
        kernel: place.library("vmlinux"),
        initrd: place.library("initrd"),
        cgroup_parent: "/pericarp-bench".into(),
        default_memory_mib: memory_mib,
        default_vcpus: 1,
        ..CoreConfig::default()
    };
    Ok(Pods::open(config, spawner, images, Network::new(network)).await?)
}

/// A pod that was started, and removed again.
pub(crate) struct Pod {
    /// When everything was there that a VMM needs.
    begun: u64,
    /// What the VMM wrote down.
    pub(crate) events: Vec<Event>,
    vmm: smaps::Vmm,
    /// From the agent's word to all of its memory being plugged.
    plugged_minstr: f64,
}

/// Starts a pod with disk and NIC, looks at it, and removes it. Its network is there already, so that no plugin's work
/// is counted: the interface is only read and joined to the tap, while the guest boots.
pub(crate) async fn pod(pods: &Pods) -> Result<Pod> {
    // One that failed may have left its own.
    let _ = process::Command::new("ip").args(["netns", "delete", NETNS]).stderr(Stdio::null()).status();
    let netns = fill_netns()?;
    idle().await;
    let identity =
        PodIdentity { name: "bench".into(), namespace: "default".into(), uid: "bench".into(), ..Default::default() };
    let spec = PodSpec { identity, network: NetworkSource::Netns(netns), ..PodSpec::default() };
    let id = pods.run_pod(spec).await?;
    let plugged = plugged(&pods.config().pod_dir(&id))?;
    let moments = pods.timeline(&id).await?;
    let begun = moments.iter().find(|moment| moment.name == "prepared").context("the pod's timeline has no begin")?;
    let events = events(&pods.config().pod_dir(&id).events())?;
    let ready = find(&events, &EventKind::AgentConnected).context("the agent is not ready")?;
    let plugged_minstr = minstr(ready.at_ns, plugged);
    let vmm = pods.pod(&id)?.vmm_pid.context("the pod has no VMM")?;
    let vmm = smaps::vmm_kib(vmm)?;
    pods.stop_pod(&id).await?;
    pods.remove_pod(&id).await?;
    Ok(Pod { begun: begun.at_ns, events, vmm, plugged_minstr })
}

/// When a guest has all the memory that it was promised.
fn plugged(dir: &PodDir) -> Result<u64> {
    let (_directory, path) = dir.reach(&dir.control())?;
    Client::connect(&path, PATIENCE)?.ask(&Command::AwaitMemory, &[])?;
    now()
}

/// A namespace with an `eth0` in it, as a runtime above us would hand it over.
fn fill_netns() -> Result<PathBuf> {
    ip(&["netns", "add", NETNS])?;
    ip(&["-n", NETNS, "link", "add", "eth0", "type", "veth", "peer", "name", "host0"])?;
    ip(&["-n", NETNS, "address", "add", "10.1.2.3/24", "dev", "eth0"])?;
    ip(&["-n", NETNS, "link", "set", "host0", "up"])?;
    ip(&["-n", NETNS, "link", "set", "eth0", "up"])?;
    Ok(PathBuf::from("/run/netns").join(NETNS))
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = process::Command::new("ip").args(arguments).status().context("running ip (Debian: iproute2)")?;
    ensure!(status.success(), "ip {}: {status}", arguments.join(" "));
    Ok(())
}
