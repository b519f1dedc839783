//! Pods by their records, whoever owns them: the daemon, or a `pericarp run` that is still there.
//!
//! Only reads. What a record says is what its owner last wrote.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::config::Config;
use crate::own_core;
use crate::pod::CoreConfig;
use crate::pod_dir::PodDir;
use crate::record::{ContainerRecord, Record};

/// A pod's record and where it was found.
#[derive(Clone)]
pub(super) struct Found {
    pub(super) record: Record,
    pub(super) dir: PodDir,
    /// State directory of the core that owns it.
    pub(super) state_dir: PathBuf,
}

/// Every pod on this host.
pub(super) fn pods(config: &Config) -> Vec<Found> {
    let own = [own_core::RUN, own_core::CONTAINERD].map(|kind| own_core::directory(config, kind));
    let own = own.iter().flat_map(fs::read_dir).flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<Found> = std::iter::once(config.core.state_dir.clone())
        .chain(own)
        .flat_map(|state_dir| below(config, &state_dir))
        .collect();
    found.sort_by_key(|pod| pod.record.created_at_ns);
    found
}

fn below(config: &Config, state_dir: &Path) -> Vec<Found> {
    let core = CoreConfig { state_dir: state_dir.to_owned(), ..config.core.clone() };
    let entries = fs::read_dir(core.pods_dir()).into_iter().flatten().flatten();
    let read = |entry: fs::DirEntry| {
        let dir = core.pod_dir(&entry.file_name().to_string_lossy());
        // A pod on its way in or out has no record, or half of one to read tomorrow.
        let record = Record::read(&dir.record()).ok()?;
        Some(Found { record, dir, state_dir: state_dir.to_owned() })
    };
    entries.filter_map(read).collect()
}

/// The one pod whose id begins so, or whose name it is.
pub(super) fn pod(config: &Config, wanted: &str) -> Result<Found> {
    let matching = |found: &Found| found.record.id.starts_with(wanted) || found.record.spec.identity.name == wanted;
    let mut matches: Vec<Found> = pods(config).into_iter().filter(matching).collect();
    match (matches.pop(), matches.is_empty()) {
        (Some(found), true) => Ok(found),
        (Some(_), false) => bail!("{wanted} fits several pods: give more of the id (`pericarp ps` shows them)"),
        (None, _) => bail!("no pod {wanted}: `pericarp ps` shows those there are"),
    }
}

/// The one container whose id begins so or whose name it is, its id, and its pod.
pub(super) fn container(config: &Config, wanted: &str) -> Result<(Found, String)> {
    let of = |found: Found| {
        let fits =
            |(id, container): &(&String, &ContainerRecord)| id.starts_with(wanted) || container.spec.name == wanted;
        let ids: Vec<String> = found.record.containers.iter().filter(fits).map(|(id, _)| id.clone()).collect();
        ids.into_iter().map(move |id| (found.clone(), id))
    };
    let mut matches: Vec<_> = pods(config).into_iter().flat_map(of).collect();
    match (matches.pop(), matches.is_empty()) {
        (Some(found), true) => Ok(found),
        (Some(_), false) => bail!("{wanted} fits several containers: give more of the id (`pericarp ps` shows them)"),
        (None, _) => bail!("no container {wanted}: `pericarp ps` shows those there are"),
    }
}
