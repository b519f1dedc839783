//! Calls of the CRI, made by a client that stays up to a daemon that does, with the bridge plugin's network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cri_shim::cri::proto::image_service_client::ImageServiceClient;
use cri_shim::cri::proto::runtime_service_client::RuntimeServiceClient;
use cri_shim::cri::proto::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ImageSpec, LinuxContainerConfig, LinuxPodSandboxConfig,
    PodSandboxConfig, PodSandboxMetadata, PullImageRequest, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StopContainerRequest, StopPodSandboxRequest, VersionRequest,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use crate::repeat::repeat;
use crate::report::{Report, Samples};
use crate::{Place, kvm, smaps};

/// What a container runs; it needs no more than a kernel.
const IMAGE: &str = "registry.k8s.io/e2e-test-images/busybox:1.29-2";
const COMMAND: [&str; 2] = ["sleep", "3600"];

/// Pods that are started at once, and how often that is measured.
const AT_ONCE: [usize; 3] = [1, 10, 50];
const RATE_RUNS: usize = 3;

/// Longest start of the daemon.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks whether it answers.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The network that container runtimes' own examples have: a bridge with masquerading, and port mappings.
const NETWORK: &str = r#"{"cniVersion": "1.0.0", "name": "bench", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}"#;

/// Measures `cri.*` and `daemon.pss_kib`.
pub(crate) async fn measure(place: &Place, report: &mut Report) -> Result<()> {
    let daemon = Daemon::start(place)?;
    let channel = daemon.connect().await?;
    pull(&channel, place.registry).await?;
    let mut calls = RuntimeServiceClient::new(channel);
    let mut samples = Samples::default();
    for figures in repeat("cri", place.runs, async || life(&mut calls, &daemon.directory).await).await? {
        samples.extend(figures);
    }
    samples.add("daemon.pss_kib", daemon.pss_kib()?);
    report.take(samples);
    daemon.end()
}

/// Measures `runs.pods_per_s.*`: pods that are asked for at once, over the seconds until the last of them is there.
pub(crate) async fn measure_rate(place: &Place, report: &mut Report) -> Result<()> {
    let daemon = Daemon::start(place)?;
    let calls = RuntimeServiceClient::new(daemon.connect().await?);
    let mut samples = Samples::default();
    for count in AT_ONCE {
        for rate in repeat("pods at once", RATE_RUNS, async || rate(&calls, &daemon.directory, count).await).await? {
            samples.add(format!("runs.pods_per_s.{count}"), rate);
        }
    }
    report.take(samples);
    daemon.end()
}

async fn rate(calls: &RuntimeServiceClient<Channel>, logs: &Path, count: usize) -> Result<f64> {
    let since = Instant::now();
    let mut starting = JoinSet::new();
    for number in 0..count {
        let mut calls = calls.clone();
        let request = RunPodSandboxRequest { config: Some(pod_config(logs, number)), ..Default::default() };
        starting.spawn(async move { calls.run_pod_sandbox(request).await });
    }
    let started = starting.join_all().await;
    let elapsed = since.elapsed().as_secs_f64();
    let mut failed = None;
    for pod in started {
        match pod {
            Ok(pod) => remove(&mut calls.clone(), pod.into_inner().pod_sandbox_id).await?,
            Err(error) => failed = Some(error),
        }
    }
    failed.map_or(Ok(count as f64 / elapsed), |error| Err(error).context("RunPodSandbox"))
}

/// Stops and removes a pod.
pub(crate) async fn remove(calls: &mut RuntimeServiceClient<Channel>, pod: String) -> Result<()> {
    calls.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.context("StopPodSandbox")?;
    calls.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: pod }).await.context("RemovePodSandbox")?;
    Ok(())
}

/// One pod with one container, from begin to end; what each call took.
async fn life(calls: &mut RuntimeServiceClient<Channel>, logs: &Path) -> Result<Vec<(String, f64)>> {
    let mut laps = Laps::begin();
    let request = RunPodSandboxRequest { config: Some(pod_config(logs, 0)), ..Default::default() };
    let pod = calls.run_pod_sandbox(request).await.context("RunPodSandbox")?.into_inner().pod_sandbox_id;
    laps.lap("run_pod");
    let lived = live(calls, logs, &pod, &mut laps).await;
    if lived.is_err() {
        // The next one has its name.
        let _ = remove(calls, pod).await;
    }
    lived.map(|()| laps.figures)
}

async fn live(calls: &mut RuntimeServiceClient<Channel>, logs: &Path, pod: &str, laps: &mut Laps) -> Result<()> {
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.to_owned(),
        config: Some(container_config()),
        sandbox_config: Some(pod_config(logs, 0)),
    };
    let container_id = calls.create_container(request).await.context("CreateContainer")?.into_inner().container_id;
    laps.lap("create");
    let request = StartContainerRequest { container_id: container_id.clone() };
    calls.start_container(request).await.context("StartContainer")?;
    laps.lap("start");
    calls.stop_container(StopContainerRequest { container_id, timeout: 0 }).await.context("StopContainer")?;
    laps.lap("stop");
    let request = StopPodSandboxRequest { pod_sandbox_id: pod.to_owned() };
    calls.stop_pod_sandbox(request).await.context("StopPodSandbox")?;
    laps.lap("stop_pod");
    let request = RemovePodSandboxRequest { pod_sandbox_id: pod.to_owned() };
    calls.remove_pod_sandbox(request).await.context("RemovePodSandbox")?;
    laps.lap("remove_pod");
    Ok(())
}

/// What passes between one call's answer and the next's.
struct Laps {
    since: Instant,
    figures: Vec<(String, f64)>,
}

impl Laps {
    fn begin() -> Self {
        Self { since: Instant::now(), figures: Vec::new() }
    }

    fn lap(&mut self, name: &str) {
        self.figures.push((format!("cri.{name}.minstr"), self.since.elapsed().as_secs_f64() * 1e3));
        self.since = Instant::now();
    }
}

/// A pod of its own name, without anything special.
pub(crate) fn pod_config(logs: &Path, number: usize) -> PodSandboxConfig {
    let metadata = PodSandboxMetadata {
        name: format!("bench-{number}"),
        namespace: "default".into(),
        uid: format!("bench-{number}"),
        ..Default::default()
    };
    PodSandboxConfig {
        metadata: Some(metadata),
        log_directory: logs.display().to_string(),
        linux: Some(LinuxPodSandboxConfig::default()),
        ..Default::default()
    }
}

fn container_config() -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: "bench".into(), ..Default::default() }),
        image: Some(ImageSpec { image: IMAGE.into(), ..Default::default() }),
        command: COMMAND.map(str::to_owned).to_vec(),
        log_path: "bench.log".into(),
        linux: Some(LinuxContainerConfig::default()),
        ..Default::default()
    }
}

/// Pulls the image, after which nobody else's work is counted.
async fn pull(channel: &Channel, registry: i32) -> Result<()> {
    let image = Some(ImageSpec { image: IMAGE.into(), ..Default::default() });
    let request = PullImageRequest { image, ..Default::default() };
    ImageServiceClient::new(channel.clone()).pull_image(request).await.with_context(|| format!("pulling {IMAGE}"))?;
    kill(Pid::from_raw(registry), Signal::SIGTERM).context("ending the registry")
}

/// A daemon of our own. Dropping it kills it.
pub(crate) struct Daemon {
    process: Child,
    /// Where all that it writes is.
    pub(crate) directory: PathBuf,
}

impl Daemon {
    /// Starts it.
    pub(crate) fn start(place: &Place) -> Result<Self> {
        let directory = place.work.join("daemon");
        let networks = directory.join("networks");
        fs::create_dir_all(&networks)?;
        fs::write(networks.join("10-bench.conflist"), NETWORK)?;
        let config = format!(
            "socket = \"{run}/pericarpd.sock\"\nstate_dir = \"{run}/state\"\nimage_dir = \"{run}/images\"\n\
             scratch_dir = \"{run}/scratch\"\nlog = \"warn\"\nvmm = \"{vmm}\"\nkernel = \"{kernel}\"\ninitrd = \"{initrd}\"\n\
             [cni]\nconf_dir = \"{networks}\"\nbin_dirs = [\"{cni}\"]\n\
             [[registry]]\nhost = \"registry.k8s.io\"\nmirrors = [\"http://127.0.0.1:5000\"]\n",
            run = directory.display(),
            vmm = place.library("pericarp-vmm").display(),
            kernel = place.library("vmlinux").display(),
            initrd = place.library("initrd").display(),
            networks = networks.display(),
            cni = place.cni.display(),
        );
        let file = directory.join("pericarp.toml");
        fs::write(&file, config)?;
        let process = Command::new(place.program("pericarpd")).arg("--config").arg(file).spawn()?;
        Ok(Self { process, directory })
    }

    /// Waits until it answers.
    pub(crate) async fn connect(&self) -> Result<Channel> {
        let since = Instant::now();
        let endpoint = Endpoint::try_from(format!("unix://{}/pericarpd.sock", self.directory.display()))?;
        loop {
            if let Ok(channel) = endpoint.connect().await
                && RuntimeServiceClient::new(channel.clone()).version(VersionRequest::default()).await.is_ok()
            {
                return Ok(channel);
            }
            if since.elapsed() > PATIENCE {
                bail!("pericarpd does not answer after {} s", PATIENCE.as_secs());
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Of the daemon and its spawner.
    pub(crate) fn pss_kib(&self) -> Result<f64> {
        let daemon = self.process.id();
        let spawner = kvm::children(daemon)?.first().copied().context("the daemon has no spawner")?;
        Ok(smaps::pss_kib(daemon)? + smaps::pss_kib(spawner)?)
    }

    /// Ends it in peace.
    pub(crate) fn end(mut self) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.process.id())?), Signal::SIGTERM)?;
        let status = self.process.wait()?;
        ensure!(status.success(), "pericarpd: {status}");
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
