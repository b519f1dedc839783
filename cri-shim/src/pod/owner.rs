//! The task that owns one pod: its record, its machine, and what others see of them.
//!
//! ```text
//!            start                VMM ends             stop              remove
//! (Starting) ─────▶ Running ─────────────────▶ Ended ────────▶ Stopped ─────────▶ gone
//!                      └──────────────── stop ──────────────────▲
//! ```
//! Everything that changes a pod is an operation that runs here, one after another, or a happening of its machine.
//! What may take long without changing anything (an exec, the grace period of a stop) waits elsewhere.

use std::fs;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use agent_protocol::v1;
use tokio::sync::{mpsc, watch};

use super::context::{Context, blocking};
use super::copies::Copies;
use super::events::EventKind;
use super::stats::CpuTimes;
use super::{ContainerState, ContainerStatus, PodDisk, PodState, PodStatus};
use crate::agent::{Agent, Call, Notice};
use crate::clock;
use crate::error::{Error, IoContext, Result};
use crate::kill_point::kill_point;
use crate::pod_dir::PodDir;
use crate::record::{ContainerRecord, Life, Phase, Record};
use crate::spec::NetworkSource;
use crate::undo::Undo;
use crate::vmm::Vmm;

/// How long a guest may take to power itself off.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(10);

/// How long a killed VMM may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Exit code of a container whose end nobody saw: that of SIGKILL.
pub(super) const KILLED_CODE: i32 = 128 + libc::SIGKILL;

/// Reason of a container whose VM ended under it.
const VM_EXITED: &str = "PodVMExited";

/// A future of an operation, which may borrow the owner.
pub(super) type Running<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Something to be done to a pod, in its turn.
pub(super) type Operation = Box<dyn for<'a> FnOnce(&'a mut Owner) -> Running<'a, ()> + Send>;

/// A VMM that runs and the agent in it.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) vmm: Vmm,
    pub(super) agent: Agent,
    pub(super) notices: mpsc::Receiver<Notice>,
}

/// One pod.
pub(super) struct Owner {
    pub(super) context: Arc<Context>,
    pub(super) dir: PodDir,
    pub(super) record: Record,
    /// While [`Phase::Running`].
    machine: Option<Machine>,
    /// Why the agent does not answer; empty if it does.
    silence: String,
    /// Since the last look at what it uses.
    pub(super) cpu_times: CpuTimes,
    /// Directories of the host of which its containers have copies.
    pub(super) copies: Copies,
    status: watch::Sender<Arc<PodStatus>>,
    removed: bool,
}

enum Happening {
    Operation(Option<Operation>),
    Notice(Option<Notice>),
    VmmEnded,
    FilesChanged,
}

impl Owner {
    pub(super) fn new(context: Arc<Context>, record: Record, machine: Option<Machine>) -> Self {
        let dir = context.config.pod_dir(&record.id);
        let status = watch::Sender::new(Arc::new(status(&record, "")));
        let copies = Copies::new(context.watcher.follower(), &record);
        Self {
            copies,
            context,
            dir,
            record,
            machine,
            silence: String::new(),
            cpu_times: CpuTimes::new(),
            status,
            removed: false,
        }
    }

    /// What others see, from now on.
    pub(super) fn watch(&self) -> watch::Receiver<Arc<PodStatus>> {
        self.status.subscribe()
    }

    /// Until the pod has been removed or nobody can ask for anything any more.
    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Operation>) {
        while !self.removed {
            match self.next(&mut inbox).await {
                Happening::Operation(Some(operation)) => operation(&mut self).await,
                Happening::Operation(None) => return,
                Happening::Notice(Some(notice)) => self.heard(notice),
                Happening::Notice(None) => self.agent_lost(),
                Happening::VmmEnded => self.vmm_ended().await,
                Happening::FilesChanged => self.refresh().await,
            }
        }
    }

    async fn next(&mut self, inbox: &mut mpsc::Receiver<Operation>) -> Happening {
        let Some(machine) = &mut self.machine else { return Happening::Operation(inbox.recv().await) };
        tokio::select! {
            biased;
            () = machine.vmm.wait() => Happening::VmmEnded,
            notice = machine.notices.recv() => Happening::Notice(notice),
            operation = inbox.recv() => Happening::Operation(operation),
            () = self.copies.due() => Happening::FilesChanged,
        }
    }

    /// Writes the record and shows others how things stand.
    pub(super) fn save(&self) -> Result<()> {
        self.publish();
        self.record.write(&self.dir.record()).map_err(|error| Error::Internal(error.to_string()))
    }

    /// As [`Owner::save`], where there is no caller: what others see is right, and the next change writes again.
    pub(super) fn save_or_log(&self) {
        if let Err(error) = self.save() {
            tracing::error!(pod = self.record.id, %error, "the record is out of date");
        }
    }

    fn publish(&self) {
        let now = Arc::new(status(&self.record, &self.silence));
        let before = self.status.send_replace(Arc::clone(&now));
        self.context.events.tell(&before, &now);
    }

    /// The agent, if the pod is ready for new work.
    pub(super) fn agent(&self) -> Result<&Agent> {
        match &self.machine {
            Some(machine) if self.silence.is_empty() => Ok(&machine.agent),
            _ => Err(Error::FailedPrecondition(format!("the pod is not ready: {}", self.status.borrow().message))),
        }
    }

    /// Whether the VMM runs, so that there is something to talk to.
    pub(super) fn is_running(&self) -> bool {
        self.machine.is_some()
    }

    fn heard(&mut self, notice: Notice) {
        match notice {
            Notice::Exited(exited) => self.container_exited(&exited),
            Notice::State(state) => self.agent_found(state),
            Notice::Silent(why) => {
                tracing::warn!(pod = self.record.id, why, "the agent does not answer");
                self.silence = why;
                return self.publish();
            }
        }
        self.save_or_log();
    }

    /// The agent's task is gone; a new one connects.
    fn agent_lost(&mut self) {
        if let Some(machine) = &mut self.machine {
            (machine.agent, machine.notices) = Agent::reconnect(self.dir.clone());
        }
    }

    /// The agent of a VMM that an earlier daemon started does not answer yet.
    pub(super) fn agent_missing(&mut self, why: String) {
        self.silence = why;
        self.publish();
    }

    /// After a time without a connection: what happened meanwhile.
    pub(super) fn agent_found(&mut self, state: v1::PodState) {
        self.silence.clear();
        for found in state.containers {
            if found.phase() == v1::container_state::Phase::Running
                && let Some(container) = self.record.containers.get_mut(&found.id)
                && let Life::Created = container.life
            {
                container.life = Life::Running { started_at_ns: found.started_at_ns };
            }
            if let Some(exited) = found.exited {
                self.container_exited(&v1::ContainerExited { id: found.id, ..exited });
            }
        }
    }

    fn container_exited(&mut self, exited: &v1::ContainerExited) {
        let exit = exited.exit.unwrap_or_default();
        let reason = match exit {
            v1::Exit { oom_killed: true, .. } => "OOMKilled",
            v1::Exit { code: 0, signal: 0, .. } => "Completed",
            _ => "Error",
        };
        if let Some(container) = self.record.containers.get_mut(&exited.id) {
            end(container, exited.finished_at_ns, exit.code, reason, String::new());
            self.copies.forget(&exited.id);
            tracing::info!(pod = self.record.id, container = exited.id, code = exit.code, reason, "container exited");
        }
    }

    /// The VMM has ended under the pod.
    async fn vmm_ended(&mut self) {
        let Some(message) = self.take_cause().await else { return };
        tracing::warn!(pod = self.record.id, message, "the VM has ended");
        self.machine_gone(message, VM_EXITED);
        self.save_or_log();
    }

    /// Takes the machine of a VMM that has ended, hears what its agent still had to say, and tells why it ended.
    async fn take_cause(&mut self) -> Option<String> {
        let mut machine = self.machine.take()?;
        while let Ok(notice) = machine.notices.try_recv() {
            if let Notice::Exited(exited) = notice {
                self.container_exited(&exited);
            }
        }
        Some(self.context.ended(machine.vmm.cause().await, &self.record.cgroup))
    }

    /// Makes the record say that nothing runs any more.
    fn machine_gone(&mut self, message: String, reason: &str) {
        self.machine = None;
        self.silence.clear();
        self.copies.end();
        end_all(&mut self.record, reason, &message);
        self.record.vmm = None;
        // It ends with the VMM, whose end of its socket is closed.
        self.record.file_server = None;
        self.record.phase = Phase::Ended { message };
    }

    /// Stops everything of the pod; what is left is its record.
    pub(super) async fn stop(&mut self) -> Result<()> {
        if let Phase::Stopped { .. } = self.record.phase {
            return Ok(());
        }
        self.power_off().await?;
        kill_point("pod.off");
        self.context.release(&self.record).run().await?;
        kill_point("pod.released");
        let message = match &self.record.phase {
            Phase::Ended { message } => message.clone(),
            _ => String::new(),
        };
        self.record.phase = Phase::Stopped { message };
        self.record.disks.clear();
        self.save()
    }

    /// Ends the VM at once, whatever its guest has not written yet.
    pub(super) fn kill(&self) {
        if let Some(machine) = &self.machine {
            machine.vmm.kill();
        }
    }

    /// Ends the VM, by the guest if it does.
    async fn power_off(&mut self) -> Result<()> {
        let Some(machine) = &self.machine else { return Ok(()) };
        if self.silence.is_empty() {
            let asked = machine.agent.tell(Call::PowerOff(v1::PowerOff {}), POWER_OFF_LIMIT);
            let obeyed = async {
                // Its answer may not arrive; the end of the VMM is what counts.
                let _ = asked.await;
                machine.vmm.wait().await;
            };
            if tokio::time::timeout(POWER_OFF_LIMIT, obeyed).await.is_err() {
                tracing::warn!(pod = self.record.id, "the guest does not power off, so its VM is killed");
            }
        }
        machine.vmm.kill();
        if tokio::time::timeout(KILL_LIMIT, machine.vmm.wait()).await.is_err() {
            return Err(Error::DeadlineExceeded(format!(
                "the VMM (process {}) was killed and is not gone after {} s: it hangs in the host's kernel",
                machine.vmm.id().pid,
                KILL_LIMIT.as_secs()
            )));
        }
        if let Some(cause) = self.take_cause().await {
            tracing::info!(pod = self.record.id, cause, "the VM has been stopped");
        }
        self.machine_gone("the pod was stopped".into(), "Error");
        self.save()
    }

    /// Stops the pod if need be and removes all that is left of it.
    pub(super) async fn remove(&mut self) -> Result<()> {
        self.stop().await?;
        self.record.phase = Phase::Removing;
        self.save()?;
        kill_point("pod.removing");
        self.context.forget(&self.record).await?;
        kill_point("pod.removed");
        self.removed = true;
        self.context.events.tell_one(self.record.id.clone(), EventKind::Deleted, &self.status.borrow());
        Ok(())
    }
}

/// Marks a container as ended, unless it already is.
pub(super) fn end(container: &mut ContainerRecord, finished_at_ns: i64, code: i32, reason: &str, message: String) {
    let started_at_ns = match container.life {
        Life::Running { started_at_ns } => started_at_ns,
        Life::Creating | Life::Created => 0,
        Life::Exited { .. } => return,
    };
    // The guest's clock is the guest's; an end before the start would confuse whoever sorts by them.
    let finished_at_ns = finished_at_ns.max(started_at_ns.saturating_add(1));
    container.life = Life::Exited { started_at_ns, finished_at_ns, code, reason: reason.into(), message };
}

/// Marks every container that has not ended: its VM has.
pub(super) fn end_all(record: &mut Record, reason: &str, message: &str) {
    let now = clock::realtime_ns();
    for container in record.containers.values_mut() {
        end(container, now, KILLED_CODE, reason, message.into());
    }
}

/// As [`end_all`] for a VM whose end was not seen.
pub(super) fn vm_lost(record: &mut Record, message: String) {
    end_all(record, VM_EXITED, &message);
    record.vmm = None;
    record.file_server = None;
    record.phase = Phase::Ended { message };
}

pub(super) fn status(record: &Record, silence: &str) -> PodStatus {
    let (state, message) = match &record.phase {
        Phase::Running if silence.is_empty() => (PodState::Ready, ""),
        Phase::Running => (PodState::NotReady, silence),
        Phase::Ended { message } | Phase::Stopped { message } => (PodState::NotReady, message.as_str()),
        Phase::Starting => (PodState::NotReady, "it is being started"),
        Phase::Removing => (PodState::NotReady, "it is being removed"),
    };
    let containers = record.containers.iter().filter(|(_, container)| container.life != Life::Creating);
    PodStatus {
        id: record.id.clone(),
        spec: Arc::clone(&record.spec),
        state,
        created_at_ns: record.created_at_ns,
        message: message.into(),
        ips: record.attachment.as_ref().map(|attachment| attachment.ips.clone()).unwrap_or_default(),
        netns: record.netns.clone(),
        guest_kernel: record.guest_kernel.clone(),
        vmm_pid: record.vmm.map(|vmm| vmm.pid),
        memory_mib: record.memory_mib,
        vcpus: record.vcpus,
        cgroup: record.cgroup.clone(),
        disks: record.disks.iter().map(|disk| PodDisk { file: disk.file.clone(), image: disk.image.clone() }).collect(),
        moments: record.moments.clone(),
        containers: containers.map(|(id, container)| (id.clone(), container_status(record, id, container))).collect(),
    }
}

fn container_status(record: &Record, id: &str, container: &ContainerRecord) -> ContainerStatus {
    let mut status = ContainerStatus {
        id: id.into(),
        pod_id: record.id.clone(),
        spec: Arc::clone(&container.spec),
        state: ContainerState::Created,
        created_at_ns: container.created_at_ns,
        started_at_ns: 0,
        finished_at_ns: 0,
        exit_code: 0,
        reason: String::new(),
        message: String::new(),
        image_id: container.image_id.clone(),
        log_path: container.log.as_ref().map(|log| log.path.clone()).unwrap_or_default(),
        user: container.user.clone(),
    };
    match &container.life {
        Life::Creating | Life::Created => {}
        Life::Running { started_at_ns } => {
            (status.state, status.started_at_ns) = (ContainerState::Running, *started_at_ns);
        }
        Life::Exited { started_at_ns, finished_at_ns, code, reason, message } => {
            status.state = ContainerState::Exited;
            (status.started_at_ns, status.finished_at_ns) = (*started_at_ns, *finished_at_ns);
            (status.exit_code, status.reason, status.message) = (*code, reason.clone(), message.clone());
        }
    }
    status
}

impl Context {
    /// Undoes all that runs or is kept for a pod outside its directory, the VMM first.
    pub(super) fn release(self: &Arc<Self>, record: &Record) -> Undo {
        let mut undo = Undo::new();
        let scratch = self.config.scratch_file(&record.id);
        undo.push("scratch", async move { remove_file(&scratch) });
        if record.spec.network == NetworkSource::Cni {
            self.push_network(&mut undo, record.id.clone());
        }
        let (root, leaf) = (self.config.cgroup_root.clone(), record.cgroup.clone());
        undo.push("VMM", async move { crate::cgroup::remove(&root, &leaf).await });
        undo
    }

    /// Undoes all there is of a pod, its record last, and only if nothing else is left: the next sweep tries again.
    pub(super) async fn forget(self: &Arc<Self>, record: &Record) -> Result<()> {
        self.release(record).run().await?;
        remove_directory(&self.config.pod_dir(&record.id))
    }

    /// The plugins first, for which the namespace must still be there.
    pub(super) fn push_network(self: &Arc<Self>, undo: &mut Undo, id: String) {
        let (context, pod) = (Arc::clone(self), id.clone());
        undo.push("network namespace", async move { blocking(move || Ok(context.network.remove_netns(&pod)?)).await });
        let context = Arc::clone(self);
        undo.push("network", async move { Ok(context.network.detach(&id).await?) });
    }
}

pub(super) fn remove_directory(dir: &PodDir) -> Result<()> {
    // The record goes last: as long as anything else is left, it says whose it is.
    for entry in fs::read_dir(dir.path()).into_iter().flatten().flatten() {
        if entry.path() != dir.record() {
            remove_file(&entry.path())?;
        }
    }
    remove_file(&dir.record())?;
    match fs::remove_dir(dir.path()) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result.doing(|| format!("removing {}", dir.path().display())),
    }
}

/// One that is not there is no error.
pub(super) fn remove_file(path: &std::path::Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result.doing(|| format!("removing {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::record;

    #[test]
    fn a_lost_vm_ends_its_containers_and_never_well() {
        let mut record = record();
        record.phase = Phase::Running;
        vm_lost(&mut record, "the VMM was killed by signal 9".into());
        let status = status(&record, "");
        assert_eq!(status.state, PodState::NotReady);
        assert_eq!(status.vmm_pid, None);
        let container = &status.containers["c"];
        assert_eq!((container.state, container.exit_code), (ContainerState::Exited, 137));
        assert_eq!((container.reason.as_str(), container.started_at_ns), ("PodVMExited", 3));
        assert!(container.message.contains("signal 9") && container.finished_at_ns > 3);
    }

    #[test]
    fn an_end_is_not_overwritten() {
        let mut record = record();
        let container = record.containers.get_mut("c").expect("is there");
        end(container, 0, 3, "Error", String::new());
        vm_lost(&mut record, "later".into());
        let status = status(&record, "");
        assert_eq!((status.containers["c"].exit_code, status.containers["c"].finished_at_ns), (3, 4));
    }

    #[test]
    fn a_silent_agent_makes_a_pod_not_ready() {
        let mut record = record();
        record.phase = Phase::Running;
        assert_eq!(status(&record, "").state, PodState::Ready);
        let silent = status(&record, "the agent does not answer");
        assert_eq!((silent.state, silent.message.as_str()), (PodState::NotReady, "the agent does not answer"));
    }
}
