//! The server: a core with one pod, and containerd's task API in front of it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use containerd_shim_protos::shim_async::{Task, create_task};
use containerd_shim_protos::ttrpc::asynchronous::{Server, transport::Listener};
use nix::sys::prctl::set_thp_disable;
use tokio::signal::unix::{SignalKind, signal};

use super::arguments::Arguments;
use super::bootstrap::TTRPC_ADDRESS;
use super::config;
use super::events::Events;
use super::service::Service;
use super::start::READY;
use crate::config::Config;
use crate::image::Store;
use crate::own_core::{self, OwnCore};
use crate::spawner::Spawner;

/// The service as containerd 1.x names it; since 2.0 it has a 3, and nothing else is different.
const TASK_V2: &str = "containerd.task.v2.Task";

/// FIFO in the bundle from which containerd takes a shim's log.
const LOG: &str = "log";

pub(super) fn serve(arguments: &Arguments) -> Result<()> {
    let config = config(None)?;
    // Before any thread: it forks.
    let spawner = Spawner::fork().context("starting the spawner")?;
    set_thp_disable(true).context("leaving huge pages to others")?;
    // A clone of standard input, which nothing else reads.
    let listener = io::stdin().as_fd().try_clone_to_owned().context("taking the socket")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.context("starting the runtime")?.block_on(run(arguments, &config, spawner, listener.into()))
}

async fn run(arguments: &Arguments, config: &Config, spawner: Spawner, listener: UnixListener) -> Result<()> {
    let name = core_name(&arguments.namespace, &arguments.id)?;
    let Some(core) = OwnCore::claim(config, own_core::CONTAINERD, &name)? else {
        bail!("another shim has the pod {}", arguments.id)
    };
    let pods = core.open(config, images(config)?, spawner).await?;
    let containerd = std::env::var(TTRPC_ADDRESS).context(TTRPC_ADDRESS)?;
    let service = Service::new(pods.clone(), Events::start(containerd, arguments.namespace.clone()));
    let mut server = listen(service.clone(), listener)?;
    server.start().await.context("serving the task API")?;
    // They are for containerd to give: a signal to its group does not end pods.
    let _ignored = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    println!("{READY}");
    log(arguments.debug, config)?;
    service.ended().await;
    tracing::info!("the shim ends");
    let _ = server.shutdown().await;
    core.close(pods).await?;
    fs::remove_file(&arguments.socket).with_context(|| format!("removing {}", arguments.socket))
}

/// Of which a core must have one, although containerd has its own.
pub(super) fn images(config: &Config) -> Result<Store> {
    Store::open(&config.image_dir, config.store()).context("opening the image store")
}

/// Names a pod's core: containerd's namespaces have ids of their own.
pub(super) fn core_name(namespace: &str, pod: &str) -> Result<String> {
    let plain = |text: &str| !text.is_empty() && !text.starts_with('.') && !text.contains('/');
    if plain(namespace) && plain(pod) {
        return Ok(format!("{namespace}-{pod}"));
    }
    bail!("{namespace:?} and {pod:?} do not name a container")
}

fn listen(service: Service, listener: UnixListener) -> Result<Server> {
    let service: Arc<dyn Task + Send + Sync> = Arc::new(service);
    let older = create_task(Arc::clone(&service)).into_values().map(|service| (TASK_V2.to_owned(), service)).collect();
    let listener = Listener::try_from(listener).context("taking the socket")?;
    Ok(Server::new().add_listener(listener).register_service(create_task(service)).register_service(older))
}

/// Lines go to containerd's log. They are dropped while it takes none, rather than waited with.
fn log(debug: bool, config: &Config) -> Result<()> {
    let level = if debug { "debug" } else { config.log.as_str() };
    let filter = level.parse::<tracing_subscriber::EnvFilter>().with_context(|| format!("log level {level:?}"))?;
    // Read and write: so it can be opened, and stays, whether or not containerd runs.
    let fifo = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(LOG);
    let (out, err) = match fifo {
        Ok(fifo) => (null()?, OwnedFd::from(fifo)),
        Err(_) => (null()?, null()?),
    };
    nix::unistd::dup2_stdin(null()?).context("standard input")?;
    nix::unistd::dup2_stdout(out).context("standard output")?;
    nix::unistd::dup2_stderr(err).context("standard error")?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).init();
    Ok(())
}

fn null() -> Result<OwnedFd> {
    Ok(File::options().read(true).write(true).open(Path::new("/dev/null")).context("/dev/null")?.into())
}
