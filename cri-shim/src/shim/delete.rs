//! The `delete` action: what a shim that was killed has left, removed. containerd runs it in the bundle, or names it.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;

use super::arguments::Arguments;
use super::bundle::{self, Bundle};
use super::config;
use super::process::timestamp;
use super::serve::{core_name, images};
use crate::clock;
use crate::config::Config;
use crate::own_core::{self, OwnCore};
use crate::snapshot;
use crate::spawner::Spawner;

/// Exit code of a container that ended with its shim: that of SIGKILL.
const KILLED_CODE: u32 = 137;

pub(super) fn delete(arguments: &Arguments) -> Result<()> {
    // Before any thread: it forks.
    let spawner = Spawner::fork().context("starting the spawner")?;
    let path = if arguments.bundle.as_os_str().is_empty() {
        std::env::current_dir().context("finding the bundle")?
    } else {
        arguments.bundle.clone()
    };
    let config = config(bundle::config(&path).as_deref())?;
    // Without its specification the container can only be its own pod's.
    let pod = Bundle::read(&path).map_or_else(|_| arguments.id.clone(), |read| read.pod(&arguments.id).to_owned());
    let name = core_name(&arguments.namespace, &pod)?;
    if own_core::directory(&config, own_core::CONTAINERD).join(&name).exists() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.context("starting the runtime")?.block_on(remove(&config, &name, spawner))?;
    }
    snapshot::unmount(&path)?;
    remove_socket(&path);
    let exited_at = Some(timestamp(clock::realtime_ns())).into();
    let response = DeleteResponse { exit_status: KILLED_CODE, exited_at, ..DeleteResponse::default() };
    std::io::stdout().write_all(&response.write_to_bytes()?).context("answering containerd")
}

/// Removes a core with its pods, unless its shim lives: then only this container is to go.
async fn remove(config: &Config, name: &str, spawner: Spawner) -> Result<()> {
    let Some(core) = OwnCore::claim(config, own_core::CONTAINERD, name)? else { return Ok(()) };
    // That is quick, since nothing is asked of guests: containerd does not wait long.
    let pods = core.open(config, images(config)?, spawner).await?;
    Ok(core.close(pods).await?)
}

/// Its own if it stands for its pod; a member's bundle names the socket of a pod that may live.
fn remove_socket(bundle: &Path) {
    let own = Bundle::read(bundle).is_ok_and(|read| read.role() != bundle::Role::Member);
    if let (true, Ok(address)) = (own, fs::read_to_string(bundle.join("address"))) {
        let _ = fs::remove_file(PathBuf::from(address.trim_start_matches("unix://")));
    }
}
