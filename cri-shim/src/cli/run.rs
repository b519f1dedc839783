//! `pericarp run`: one pod of one container in the foreground, without any kubelet or daemon.
//!
//! The core lives in this process, in a state directory of its own, which a lock marks as in use. If this process is
//! killed, the next run sweeps what it left.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::watch;

use super::find;
use super::terminal;
use crate::config::Config;
use crate::cri::convert::security;
use crate::cri::proto::LinuxContainerSecurityContext;
use crate::image::{Image, PullProgress, Store};
use crate::network::{Network, NetworkConfig};
use crate::pod::{CoreConfig, Pods};
use crate::spawner::Spawner;
use crate::spec::{ContainerSpec, NetworkSource, PodIdentity, PodSpec, ProcessSpec, Resources, Rootfs};

/// CFS period that a CPU limit is counted in, in µs.
const CPU_PERIOD: u64 = 100_000;

/// What a container that does not stop by itself is given at the end.
const GRACE: Duration = Duration::from_secs(2);

/// Run an image in a pod of its own, in the foreground
#[derive(Args, Debug)]
pub(super) struct Run {
    /// Keep standard input open.
    #[arg(short, long)]
    interactive: bool,
    /// Give the container a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Name of the pod; the image's by default.
    #[arg(long)]
    name: Option<String>,
    /// KEY=value added to the environment; may be given several times.
    #[arg(short, long, value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// user, uid, user:group or uid:gid.
    #[arg(short, long)]
    user: Option<String>,
    /// Working directory.
    #[arg(short, long)]
    workdir: Option<String>,
    /// Memory limit of the container in MiB.
    #[arg(short, long, value_name = "MIB")]
    memory: Option<u64>,
    /// CPUs that it may use, such as 0.5 or 2.
    #[arg(long)]
    cpus: Option<f64>,
    /// Where the network comes from.
    #[arg(long, value_enum, default_value_t)]
    network: NetworkChoice,
    /// Everything of the guest; nothing of the host.
    #[arg(long)]
    privileged: bool,
    /// A name in a registry; or, beginning with / or ., an OCI layout directory or an archive.
    image: String,
    /// Instead of the image's own command.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum NetworkChoice {
    /// The CNI plugins configured.
    #[default]
    Cni,
    /// Loopback only.
    None,
}

impl Run {
    /// Runs the container to its end and returns its exit code. `spawner` is from before the first thread.
    pub(super) async fn run(&self, config: &Config, spawner: Spawner) -> Result<i32> {
        let images = Store::open(&config.image_dir, config.store())?;
        let core = own_core(config)?;
        let network = NetworkConfig { state_dir: core.config.state_dir.clone(), ..config.network() };
        let pods = Pods::open(core.config.clone(), spawner, images.clone(), Network::new(network)).await?;
        // What a run that was killed here left: its record said so, and nobody needs it now.
        for pod in pods.pods() {
            pods.remove_pod(&pod.id).await?;
        }
        let image = self.image(&images).await?;
        let pod = pods.run_pod(self.pod_spec()).await?;
        let code = self.container(&pods, &pod, &image).await;
        pods.remove_pod(&pod).await?;
        code
    }

    async fn container(&self, pods: &Pods, pod: &str, image: &Image) -> Result<i32> {
        let id = pods.create_container(pod, self.container_spec(image)?).await?;
        let mut session = pods.attach(&id, self.interactive).await?;
        pods.start_container(&id).await?;
        let code = terminal::pump(&mut session, self.interactive, self.tty).await;
        pods.stop_container(&id, GRACE).await?;
        code
    }

    async fn image(&self, images: &Store) -> Result<Image> {
        // No image's name begins so: it is a file.
        if self.image.starts_with(['/', '.']) {
            let path = Path::new(&self.image);
            let found = if path.is_dir() { images.import_layout(path).await? } else { images.import_tar(path).await? };
            return found.into_iter().next().with_context(|| format!("{} holds no image", path.display()));
        }
        if let Some(image) = images.resolve(&self.image) {
            return Ok(image);
        }
        let (sender, receiver) = watch::channel(PullProgress::default());
        let shown = tokio::spawn(show_progress(self.image.clone(), receiver));
        let image = images.pull(&self.image, None, Some(sender)).await;
        shown.await?;
        Ok(image?)
    }

    fn pod_spec(&self) -> PodSpec {
        let name = self.name.clone().unwrap_or_else(|| {
            let last = self.image.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
            last.split([':', '@', '.']).next().unwrap_or("run").to_owned()
        });
        PodSpec {
            identity: PodIdentity { name, namespace: "run".into(), uid: std::process::id().to_string(), attempt: 0 },
            resources: self.resources(),
            network: match self.network {
                NetworkChoice::Cni => NetworkSource::Cni,
                NetworkChoice::None => NetworkSource::None,
            },
            ..PodSpec::default()
        }
    }

    fn resources(&self) -> Resources {
        Resources {
            memory_limit: self.memory.map(|mib| mib << 20),
            cpu_period: self.cpus.map(|_| CPU_PERIOD),
            cpu_quota: self.cpus.map(|cpus| (cpus * CPU_PERIOD as f64) as i64),
            ..Resources::default()
        }
    }

    fn container_spec(&self, image: &Image) -> Result<ContainerSpec> {
        let config = &image.config;
        let command = if self.command.is_empty() { &config.cmd } else { &self.command };
        let args: Vec<String> = config.entrypoint.iter().chain(command).cloned().collect();
        if args.is_empty() {
            bail!("{} names no command: give one after the image", self.image);
        }
        let context = LinuxContainerSecurityContext { privileged: self.privileged, ..Default::default() };
        let (masked_paths, readonly_paths) = security::paths(&context);
        let mut env = config.env.clone();
        env.extend(self.env.iter().cloned());
        if self.tty {
            env.push(format!("TERM={}", std::env::var("TERM").unwrap_or_else(|_| "xterm".into())));
        }
        Ok(ContainerSpec {
            name: "main".into(),
            rootfs: Rootfs::Image(image.id.clone()),
            process: ProcessSpec {
                args,
                env,
                cwd: self.workdir.clone().unwrap_or_else(|| config.cwd.clone()),
                user: self.user.clone().unwrap_or_else(|| config.user.clone()),
                merge_image_groups: true,
                terminal: self.tty,
                capabilities: security::capabilities(&context)?,
                ..ProcessSpec::default()
            },
            resources: self.resources(),
            stdin: self.interactive,
            stdin_once: true,
            privileged: self.privileged,
            masked_paths,
            readonly_paths,
            stop_signal: libc::SIGTERM,
            labels: BTreeMap::new(),
            ..ContainerSpec::default()
        })
    }
}

/// A core's configuration, and the lock that keeps others off its directory while this lives.
struct OwnCore {
    config: CoreConfig,
    directory: PathBuf,
    _lock: File,
}

impl Drop for OwnCore {
    fn drop(&mut self) {
        // Best effort: the next run takes over what cannot be removed now.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Takes over a directory that no run uses any more, or makes one.
fn own_core(config: &Config) -> Result<OwnCore> {
    let runs = find::runs_dir(config);
    let fresh = runs.join(std::process::id().to_string());
    let left = fs::read_dir(&runs).into_iter().flatten().flatten().map(|entry| entry.path());
    for directory in left.chain([fresh]) {
        fs::create_dir_all(&directory).with_context(|| format!("making {} (run as root)", directory.display()))?;
        let lock = File::create(directory.join("lock"))?;
        match lock.try_lock() {
            Ok(()) => {
                let config = CoreConfig {
                    state_dir: directory.clone(),
                    scratch_dir: config.core.scratch_dir.join("run").join(directory.file_name().unwrap_or_default()),
                    // Not the daemon's: each sweeps what is in its own.
                    cgroup_parent: format!("{}/run", config.core.cgroup_parent.trim_end_matches('/')),
                    ..config.core.clone()
                };
                return Ok(OwnCore { config, directory, _lock: lock });
            }
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
    }
    bail!("every directory under {} is in use", runs.display())
}

/// A bar on standard error until the pull ends.
async fn show_progress(image: String, mut progress: watch::Receiver<PullProgress>) {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
    let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(image);
    while progress.changed().await.is_ok() {
        let now = progress.borrow_and_update().clone();
        bar.set_length(now.layers.iter().map(|layer| layer.total).sum());
        bar.set_position(now.layers.iter().map(|layer| layer.done).sum());
    }
    bar.finish_and_clear();
}
