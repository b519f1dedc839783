//! What a daemon does before it answers anybody: pods that run are found again, pods that were half made or half
//! removed are undone, and what bears our names and no record claims is removed.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent_protocol::v1;
use tokio::task::JoinSet;

use super::context::Context;
use super::owner::{KILLED_CODE, Machine, Owner, end, remove_directory, remove_file, vm_lost};
use crate::agent::{Agent, Answer, Call};
use crate::cgroup;
use crate::clock;
use crate::error::{Error, IoContext, Result};
use crate::pod_dir::PodDir;
use crate::record::{Life, Phase, Record, RecordError};
use crate::undo::Undo;
use crate::vmm::{Vmm, cause_of};

/// How long an agent may take to answer before the daemon goes on without it; its pod is then not ready.
const AGENT_LIMIT: Duration = Duration::from_secs(10);

/// Ending of a scratch file's name, after the pod's id.
const SCRATCH_SUFFIX: &str = ".ext4";

/// Digits of a pod's id.
const ID_DIGITS: usize = 64;

/// Brings the node in order, and returns the pods that there are.
pub(super) async fn sweep(context: &Arc<Context>) -> Result<Vec<Owner>> {
    let mut claimed = BTreeSet::new();
    let mut recoveries = JoinSet::new();
    for id in names(&context.config.pods_dir())? {
        let dir = context.config.pod_dir(&id);
        match Record::read(&dir.record()) {
            Ok(record) => {
                recoveries.spawn(recover(Arc::clone(context), record));
            }
            // Made before its record: there is nothing else of it.
            Err(RecordError::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => {
                log(&id, "an empty directory", remove_directory(&dir));
                continue;
            }
            Err(error) => tracing::error!(pod = id, %error, "left alone"),
        }
        claimed.insert(id);
    }
    let mut owners = Vec::new();
    while let Some(recovered) = recoveries.join_next().await {
        owners.extend(recovered.map_err(|error| Error::Internal(format!("finding a pod again failed: {error}")))??);
    }
    remove_unclaimed(context, &claimed).await?;
    Ok(owners)
}

fn names(directory: &Path) -> Result<Vec<String>> {
    let listing = || format!("listing {}", directory.display());
    let entries = fs::read_dir(directory).doing(listing)?;
    let names = entries.map(|entry| entry.doing(listing).map(|entry| entry.file_name()));
    Ok(names.collect::<Result<Vec<_>>>()?.iter().filter_map(|name| name.to_str().map(str::to_owned)).collect())
}

fn log(id: &str, what: &str, result: Result<()>) {
    match result {
        Ok(()) => tracing::info!(pod = id, what, "removed: no record claims it"),
        Err(error) => tracing::error!(pod = id, what, %error, "not removed, although no record claims it"),
    }
}

/// One pod, or nothing if it was half made or half removed.
async fn recover(context: Arc<Context>, mut record: Record) -> Result<Option<Owner>> {
    match record.phase {
        Phase::Starting | Phase::Removing => {
            log(&record.id, "a pod that was half made or half removed", context.forget(&record).await);
            Ok(None)
        }
        Phase::Ended { .. } | Phase::Stopped { .. } => Ok(Some(Owner::new(context, record, None))),
        Phase::Running => {
            let dir = context.config.pod_dir(&record.id);
            let vmm = record.vmm.map(|id| Vmm::adopt(id, dir.clone())).transpose()?.flatten();
            let Some(vmm) = vmm else {
                let message = context.ended(cause_of(&dir, None), &record.cgroup);
                let _named = record.span().entered();
                tracing::warn!(pod = record.id, message, "the VM ended while no daemon ran");
                vm_lost(&mut record, message);
                let owner = Owner::new(context, record, None);
                owner.save()?;
                return Ok(Some(owner));
            };
            Ok(Some(readopt(context, record, vmm).await))
        }
    }
}

/// A pod whose VMM runs.
async fn readopt(context: Arc<Context>, record: Record, vmm: Vmm) -> Owner {
    let dir = context.config.pod_dir(&record.id);
    match find_agent(&dir).await {
        Ok((agent, notices, state)) => {
            let mut owner = Owner::new(context, record, Some(Machine { vmm, agent, notices }));
            owner.end_missing(&state);
            owner.agent_found(state);
            owner.finish().await;
            owner.save_or_log();
            owner
        }
        Err(error) => {
            let (agent, notices) = Agent::reconnect(dir);
            let mut owner = Owner::new(context, record, Some(Machine { vmm, agent, notices }));
            owner.agent_missing(error.to_string());
            owner
        }
    }
}

async fn find_agent(dir: &PodDir) -> Result<(Agent, tokio::sync::mpsc::Receiver<crate::agent::Notice>, v1::PodState)> {
    let (agent, _, notices) = Agent::connect(dir.clone(), AGENT_LIMIT).await?;
    match agent.ask(Call::GetState(v1::GetState {}), AGENT_LIMIT).await? {
        Answer::State(state) => Ok((agent, notices, state)),
        _ => Err(Error::Unavailable("the agent gave an answer that does not fit".into())),
    }
}

impl Owner {
    /// Ends the containers that the guest does not have any more: the last daemon was removing them.
    fn end_missing(&mut self, state: &v1::PodState) {
        let there: BTreeSet<&str> = state.containers.iter().map(|container| container.id.as_str()).collect();
        for (id, container) in &mut self.record.containers {
            if container.life != Life::Creating && !there.contains(id.as_str()) {
                end(container, clock::realtime_ns(), KILLED_CODE, "Error", "it was being removed".into());
            }
        }
    }

    /// Takes back what the last daemon had begun: containers not quite created, images mapped for them.
    async fn finish(&mut self) {
        let begun = self.record.containers.iter().filter(|(_, container)| container.life == Life::Creating);
        for id in begun.map(|(id, _)| id.clone()).collect::<Vec<_>>() {
            self.unmake_container(&id).await;
        }
        self.unmap_unused().await;
    }
}

/// What bears a pod's name although no record does.
async fn remove_unclaimed(context: &Arc<Context>, claimed: &BTreeSet<String>) -> Result<()> {
    let config = &context.config;
    let parent = config.cgroup_root.join(config.cgroup_parent.trim_start_matches('/'));
    for name in names(&parent)? {
        if let Some(id) = cgroup::pod_of(&name).filter(|id| !claimed.contains(*id)) {
            let leaf = format!("{}/{name}", config.cgroup_parent);
            match cgroup::remove_empty(&config.cgroup_root, &leaf) {
                Ok(false) => tracing::warn!(pod = id, leaf, "something runs in a cgroup that no record claims"),
                removed => log(id, "cgroup", removed.map(drop)),
            }
        }
    }
    for id in context.network.pods()?.difference(claimed) {
        let mut undo = Undo::new();
        context.push_network(&mut undo, id.clone());
        log(id, "network", undo.run().await);
    }
    for name in names(&config.scratch_dir)? {
        let id = Path::new(&name).file_stem().and_then(OsStr::to_str).unwrap_or_default();
        let ours = name.ends_with(SCRATCH_SUFFIX) && id.len() == ID_DIGITS;
        if ours && !claimed.contains(id) {
            log(id, "scratch", remove_file(&config.scratch_dir.join(&name)));
        }
    }
    Ok(())
}
