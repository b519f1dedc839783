//! What a pod may use, changed while it runs, within the VM that it was started with.

use std::sync::Arc;
use std::time::Duration;

use agent_protocol::v1;

use super::message;
use super::owner::Owner;
use super::size::{Size, fits, quota, size};
use crate::agent::Call;
use crate::cgroup;
use crate::error::Result;
use crate::spec::{PodSpec, Resources};

/// Longest time for the agent to set limits.
const LIMIT: Duration = Duration::from_secs(30);

impl Owner {
    /// The new limits hold for all containers of the guest together, and for the VMM's cgroup where that is ours.
    pub(super) async fn update_pod(&mut self, overhead: Option<Resources>, resources: Option<Resources>) -> Result<()> {
        let mut spec = PodSpec::clone(&self.record.spec);
        spec.overhead.update(&overhead.unwrap_or_default());
        if let Some(resources) = &resources {
            spec.resources.update(resources);
        }
        let has = Size { memory_mib: self.record.memory_mib, vcpus: self.record.vcpus };
        fits(size(&spec, &self.context.config, self.context.host)?, has)?;
        if let Some(resources) = &resources {
            let call = v1::UpdatePod { resources: Some(message::resources(resources)) };
            self.agent()?.tell(Call::UpdatePod(call), LIMIT).await?;
        }
        // A pod below a group of the kubelet's has its CPU limit there.
        if let Some(cpu) = quota(&spec).filter(|_| spec.cgroup_parent.is_empty()) {
            cgroup::limit_cpu(&self.context.config.cgroup_root, &self.record.cgroup, cpu)?;
        }
        self.record.spec = Arc::new(spec);
        self.save()
    }
}
