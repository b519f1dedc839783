//! The daemon: the CRI on a unix socket. It may be ended at any moment; pods live on and are found again.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use cri_shim::config::{Config, DEFAULT_PATH};
use cri_shim::cri::{self, Node};
use cri_shim::image::Store;
use cri_shim::metrics::{self, Metrics, Sources};
use cri_shim::network::Network;
use cri_shim::pod::Pods;
use cri_shim::spans::Spans;
use cri_shim::spawner::Spawner;
use cri_shim::streaming::Streaming;
use nix::sys::prctl::set_thp_disable;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

/// How long calls under way may go on after SIGTERM.
const FAREWELL: Duration = Duration::from_secs(10);

/// Who may connect: the owner and the group of the socket.
const SOCKET_MODE: u32 = 0o660;

/// Runs Kubernetes pods in virtual machines, asked over the CRI.
#[derive(Debug, Parser)]
#[command(name = "pericarpd", version)]
struct Arguments {
    /// Configuration file; /etc/pericarp/pericarp.toml documents every key
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
}

fn main() -> ExitCode {
    match start(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pericarpd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &Arguments) -> Result<()> {
    let config = Config::load(&arguments.config)?;
    // Before any thread: it forks, and fork and threads do not mix.
    let spawner = Spawner::fork().context("starting the spawner")?;
    // Huge pages under many small heaps and stacks would be most of the daemon's memory. Only its own: VMMs are the spawner's.
    set_thp_disable(true).context("leaving huge pages to others")?;
    log(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    let result = runtime.block_on(run(&config, spawner));
    // What still runs is left to the next daemon.
    runtime.shutdown_background();
    result
}

fn log(config: &Config) -> Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| config.log.clone());
    let filter = filter.parse::<tracing_subscriber::EnvFilter>().with_context(|| format!("log level {filter:?}"))?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).init();
    Ok(())
}

async fn run(config: &Config, spawner: Spawner) -> Result<()> {
    let _lock = lock(&config.core.state_dir)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let images = Store::open(&config.image_dir, config.store()).context("opening the image store")?;
    let network = Network::new(config.network());
    let pods = Pods::open(config.core.clone(), spawner, images.clone(), network.clone())
        .await
        .context("finding the pods of an earlier daemon")?;
    let streaming = Streaming::start(pods.clone()).await.context("starting the streaming server")?;
    let collector = config.tracing.endpoint().map_err(anyhow::Error::msg)?;
    let spans = collector.map_or_else(Spans::default, |collector| Spans::start(&collector, pods.clone()));
    let node = Node {
        pods,
        images,
        network,
        streaming,
        handler: config.handler.clone(),
        config: serde_json::to_value(config).context("the configuration as JSON")?,
        metrics: Metrics::default(),
        spans,
    };
    observe(config, &node).await?;
    let listener = listen(&config.socket)?;
    tracing::info!(socket = %config.socket.display(), version = env!("CARGO_PKG_VERSION"), "ready");
    notify("READY=1");
    let (ending, mut ended) = tokio::sync::watch::channel(false);
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("ending; pods go on");
        notify("STOPPING=1");
        // The receiver lives as long as this function.
        let _ = ending.send(true);
    };
    let overdue = async {
        let _ = ended.wait_for(|ended| *ended).await;
        tokio::time::sleep(FAREWELL).await;
    };
    tokio::select! {
        served = cri::serve(listener, node, shutdown) => served.context("serving the CRI")?,
        () = overdue => tracing::warn!("calls are still under way; their clients will try again"),
    }
    fs::remove_file(&config.socket).with_context(|| format!("removing {}", config.socket.display()))
}

/// Counts what there is to count, and tells who asks.
async fn observe(config: &Config, node: &Node) -> Result<()> {
    node.metrics.watch_boots(node.pods.clone());
    let Some(address) = config.metrics.address().map_err(anyhow::Error::msg)? else { return Ok(()) };
    let sources = Sources { pods: node.pods.clone(), images: node.images.clone() };
    let served = metrics::server::start(address, node.metrics.clone(), sources).await;
    let at = served.with_context(|| format!("listening on {address}, the configuration's metrics.listen"))?;
    tracing::info!(%at, "metrics can be read");
    Ok(())
}

/// Makes sure that one daemon alone uses a state directory, for as long as the file is open.
fn lock(state_dir: &Path) -> Result<File> {
    fs::create_dir_all(state_dir).with_context(|| format!("creating {}", state_dir.display()))?;
    let path = state_dir.join("pericarpd.lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!(
                "another pericarpd uses {}: end it, or give this one another state_dir and socket",
                state_dir.display()
            )
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("locking {}", path.display())),
    }
}

/// Listens where nobody does; a socket on which nobody answers is what a killed daemon left.
fn listen(path: &Path) -> Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        bail!("somebody answers on {} already: end it, or configure another socket", path.display());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("replacing {}", path.display()));
        }
        _ => {}
    }
    // Under another name until its mode is right, so that nobody connects who may not.
    let fresh = path.with_extension("new");
    let _ = fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh).with_context(|| format!("listening on {}", path.display()))?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(SOCKET_MODE))
        .and_then(|()| fs::rename(&fresh, path))
        .with_context(|| format!("opening {} to its group", path.display()))?;
    Ok(listener)
}

/// Tells systemd how far we are, if it started us (sd_notify(3)). Nothing depends on its hearing it.
fn notify(state: &str) {
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET")
        && let Ok(sender) = UnixDatagram::unbound()
    {
        let _ = sender.send_to(state.as_bytes(), Path::new(&socket));
    }
}
