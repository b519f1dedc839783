//! What a pod may use, changed while it runs: limits, and with them the memory and CPUs of its VM.
//!
//! Up, the host goes first: the VMM's cgroup, the VM's memory, then the limits in the guest. Down, the guest does: limits,
//! then memory, and the cgroup follows what the guest has really given back.

use std::sync::Arc;
use std::time::Duration;

use agent_protocol::v1;
use vmm_control::{Command, Reply};

use super::message;
use super::owner::Owner;
use super::size::{Size, quota, size};
use crate::agent::Call;
use crate::cgroup;
use crate::control;
use crate::error::{Error, Result};
use crate::spec::{PodSpec, Resources};

/// Longest time for the agent to set limits.
const LIMIT: Duration = Duration::from_secs(30);

/// Longest time for the guest to plug memory.
const GROW_LIMIT: Duration = Duration::from_secs(60);

/// How long the guest may take to give memory back before its caller goes on without; the guest goes on trying.
const SHRINK_LIMIT: Duration = Duration::from_secs(10);

impl Owner {
    /// The new limits hold for all containers of the guest together, and for the VMM's cgroup where that is ours.
    pub(super) async fn update_pod(&mut self, overhead: Option<Resources>, resources: Option<Resources>) -> Result<()> {
        let mut spec = PodSpec::clone(&self.record.spec);
        spec.overhead.update(&overhead.unwrap_or_default());
        if let Some(resources) = &resources {
            spec.resources.update(resources);
        }
        let wanted = size(&spec, self.record.container_limits(), &self.context.config, self.context.host)?;
        self.grow(wanted).await?;
        if let Some(resources) = &resources {
            let (cpus, memory_mib) = (wanted.vcpus.into(), wanted.memory_mib);
            let call = v1::UpdatePod { resources: Some(message::resources(resources)), cpus, memory_mib };
            if let Err(refused) = self.agent()?.tell(Call::UpdatePod(call), LIMIT).await {
                self.shrink(self.wanted()?.memory_mib).await?;
                return Err(refused);
            }
            self.record.vcpus = wanted.vcpus;
        }
        // A pod below a group of the kubelet's has its CPU limit there.
        if let Some(cpu) = quota(&spec).filter(|_| spec.cgroup_parent.is_empty()) {
            cgroup::limit_cpu(&self.context.config.cgroup_root, &self.record.cgroup, cpu)?;
        }
        self.record.spec = Arc::new(spec);
        self.save()?;
        self.shrink(wanted.memory_mib).await
    }

    /// The size that the pod is to have by its own limits and those of its containers.
    pub(super) fn wanted(&self) -> Result<Size> {
        size(&self.record.spec, self.record.container_limits(), &self.context.config, self.context.host)
    }

    /// Gives the VM memory up to a size, and waits until it has that; one that is large enough stays as it is.
    pub(super) async fn grow(&mut self, wanted: Size) -> Result<()> {
        self.record.frame().holds(wanted)?;
        if wanted.memory_mib <= self.record.memory_mib {
            return Ok(());
        }
        let before = self.record.memory_mib;
        self.limit_host(wanted.memory_mib)?;
        self.record.memory_mib = wanted.memory_mib;
        self.save()?;
        let grown = match self.ask_for_memory().await {
            Ok(()) => self.memory_there().await,
            Err(error) => Err(error),
        };
        if grown.is_err() {
            tracing::warn!(pod = self.record.id, mib = wanted.memory_mib, "the VM does not grow");
            self.shrink(before).await?;
        }
        grown
    }

    /// Asks the guest for memory down to a size. The host's limit follows what it gives back in time; what it keeps, it
    /// may still give back later.
    pub(super) async fn shrink(&mut self, wanted_mib: u32) -> Result<()> {
        if wanted_mib >= self.record.memory_mib || self.record.frame().room_mib == 0 {
            return Ok(());
        }
        self.record.memory_mib = wanted_mib;
        self.save()?;
        self.ask_for_memory().await?;
        let reply = match control::ask_within(SHRINK_LIMIT, &self.dir, &Command::AwaitMemory, &[]).await {
            Err(Error::DeadlineExceeded(_)) => control::ask(&self.dir, &Command::Memory, &[]).await,
            reply => reply,
        };
        let has_mib = self.record.frame().boot_mib.saturating_add(plugged(&reply?)?).max(wanted_mib);
        if has_mib > wanted_mib {
            tracing::info!(
                pod = self.record.id,
                has_mib,
                wanted_mib,
                "the guest does not give back all of its memory yet"
            );
        }
        self.limit_host(has_mib)
    }

    /// Waits until the guest has the memory that it was promised.
    pub(super) async fn memory_there(&mut self) -> Result<()> {
        let promised = self.record.frame().plugged_mib(self.record.memory_mib);
        if promised == 0 || plugged(&control::ask(&self.dir, &Command::Memory, &[]).await?)? >= promised {
            return Ok(());
        }
        let reply = control::ask_within(GROW_LIMIT, &self.dir, &Command::AwaitMemory, &[]).await;
        let failed = |error: Error| error.context(format_args!("the guest does not take {promised} MiB more memory"));
        reply.map(drop).map_err(failed)
    }

    async fn ask_for_memory(&self) -> Result<()> {
        let mib = self.record.frame().plugged_mib(self.record.memory_mib);
        control::run(&self.dir, &Command::SetMemory { mib }, &[]).await
    }

    fn limit_host(&self, guest_mib: u32) -> Result<()> {
        cgroup::limit_memory(&self.context.config.cgroup_root, &self.record.cgroup, u64::from(guest_mib) << 20)
    }
}

fn plugged(reply: &Reply) -> Result<u32> {
    match reply {
        Reply::Memory { mib } => Ok(*mib),
        _ => Err(Error::Internal("the VMM gave an answer that does not fit".into())),
    }
}
