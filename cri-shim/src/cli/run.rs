//! `pericarp run`: one pod of one container in the foreground, without any kubelet or daemon.
//!
//! The core lives in this process, in a state directory of its own, which a lock marks as in use. If this process is
//! killed, the next run sweeps what it left.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::watch;

use super::output::Format;
use super::terminal::{self, Given, Output, SIGNALLED, Signals};
use crate::config::Config;
use crate::defaults::{self, Changes};
use crate::image::{Image, PullProgress, Store};
use crate::own_core::{self, OwnCore};
use crate::pod::{PodState, Pods};
use crate::spawner::Spawner;
use crate::spec::{ContainerSpec, NetworkSource, PidNamespace, PodIdentity, PodSpec, ProcessSpec, Resources, Rootfs};

/// CFS period that a CPU limit is counted in, in µs.
const CPU_PERIOD: u64 = 100_000;

/// What a container that does not stop by itself is given at the end.
const GRACE: Duration = Duration::from_secs(2);

/// How soon the end of a pod's VM is known after that of its connections.
const NOTICE_LIMIT: Duration = Duration::from_secs(2);

/// Between two looks at something that may have happened.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Run an image in a pod of its own, in the foreground
#[derive(Args, Debug)]
pub(super) struct Run {
    /// Keep standard input open.
    #[arg(short, long)]
    interactive: bool,
    /// Give the container a terminal.
    #[arg(short, long, conflicts_with = "output")]
    tty: bool,
    /// As JSON: exit code and output in one document, at the end.
    #[arg(short, long, value_enum, default_value_t, hide_default_value = true)]
    output: Format,
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
        let mut signals = Signals::listen()?;
        let images = Store::open(&config.image_dir, config.store())?;
        let image = tokio::select! {
            image = self.image(&images) => image?,
            signal = signals.next() => return Ok(SIGNALLED + signal),
        };
        let core = OwnCore::claim_any(config, own_core::RUN)?;
        let pods = core.open(config, images, spawner).await?;
        let code = self.pod(&pods, &image, &mut signals).await;
        let closed = core.close(pods).await;
        let code = code?;
        closed?;
        Ok(code)
    }

    async fn pod(&self, pods: &Pods, image: &Image, signals: &mut Signals) -> Result<i32> {
        let spec = self.container_spec(image)?;
        let mut starting = std::pin::pin!(pods.run_pod(self.pod_spec()));
        let (pod, signal) = tokio::select! {
            pod = &mut starting => (pod?, None),
            // A start cannot be cut short, but it can be taken back.
            signal = signals.next() => (starting.await?, Some(signal)),
        };
        let code = match signal {
            None => self.container(pods, &pod, spec, signals).await,
            Some(signal) => Ok(SIGNALLED + signal),
        };
        pods.remove_pod(&pod).await?;
        code
    }

    async fn container(&self, pods: &Pods, pod: &str, spec: ContainerSpec, signals: &mut Signals) -> Result<i32> {
        let id = pods.create_container(pod, spec).await?;
        let session = pods.attach(&id, self.interactive).await?;
        pods.start_container(&id).await?;
        let (given, mut output) = (Given { stdin: self.interactive, terminal: self.tty }, Output::of(self.output));
        let code = match terminal::pump(session, given, signals, &mut output).await {
            Ok(code) => code,
            Err(error) => return Err(why_ended(pods, pod).await.unwrap_or(error)),
        };
        pods.stop_container(&id, GRACE).await?;
        output.finish(code)?;
        Ok(code)
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

    /// The pod's name: what was asked for, or the last part of the image's.
    fn name(&self) -> String {
        self.name.clone().unwrap_or_else(|| {
            let last = self.image.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
            let name = last.split([':', '@', '.']).next().unwrap_or_default();
            if name.is_empty() { "run".to_owned() } else { name.to_owned() }
        })
    }

    fn pod_spec(&self) -> PodSpec {
        PodSpec {
            identity: PodIdentity {
                name: self.name(),
                namespace: "run".into(),
                uid: std::process::id().to_string(),
                attempt: 0,
            },
            share_pid_namespace: true,
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
        let mut env = self.env.clone();
        if let (true, Ok(term)) = (self.tty, std::env::var("TERM")) {
            env.insert(0, format!("TERM={term}"));
        }
        let hidden = |paths: fn() -> Vec<String>| if self.privileged { Vec::new() } else { paths() };
        let capabilities =
            if self.privileged { defaults::all_capabilities() } else { defaults::capabilities(&Changes::default())? };
        Ok(ContainerSpec {
            name: "main".into(),
            rootfs: Rootfs::Image(image.id.clone()),
            process: ProcessSpec {
                args,
                env: defaults::env(&config.env, &env, &self.name(), self.tty),
                cwd: self.workdir.clone().unwrap_or_else(|| config.cwd.clone()),
                user: self.user.clone().unwrap_or_else(|| config.user.clone()),
                merge_image_groups: true,
                terminal: self.tty,
                capabilities,
                ..ProcessSpec::default()
            },
            resources: self.resources(),
            stdin: self.interactive,
            stdin_once: true,
            // So that the command is not PID 1, which a signal without a handler leaves alone (pid_namespaces(7)).
            pid_namespace: PidNamespace::Pod,
            privileged: self.privileged,
            masked_paths: hidden(defaults::masked_paths),
            readonly_paths: hidden(defaults::readonly_paths),
            stop_signal: libc::SIGTERM,
            ..ContainerSpec::default()
        })
    }
}

/// Why a pod is not ready, if it is not: what its container's session knows only by its end.
async fn why_ended(pods: &Pods, pod: &str) -> Option<anyhow::Error> {
    let deadline = Instant::now() + NOTICE_LIMIT;
    loop {
        let status = pods.pod(pod).ok()?;
        if status.state == PodState::NotReady {
            return Some(anyhow!("the pod has ended: {}", status.message));
        }
        if Instant::now() > deadline {
            return None;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// A bar on standard error until the pull ends.
async fn show_progress(image: String, mut progress: watch::Receiver<PullProgress>) {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
    let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(image);
    bar.tick();
    while progress.changed().await.is_ok() {
        let now = progress.borrow_and_update().clone();
        bar.set_length(now.layers.iter().map(|layer| layer.total).sum());
        bar.set_position(now.layers.iter().map(|layer| layer.done).sum());
    }
    bar.finish_and_clear();
}
