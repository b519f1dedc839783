//! Pods and their containers: the table of them, and all that can be asked of them.
//!
//! An operation runs in a task of its pod, not in its caller's: a caller that hangs up leaves nothing half done.
//! Reading a status never waits for an operation.

mod config;
mod container;
mod context;
mod copies;
mod disks;
mod events;
mod exec;
mod files;
mod memory;
mod message;
mod owner;
mod phases;
mod resize;
mod share;
mod size;
mod start;
mod stats;
mod status;
mod sweep;
mod table;
mod watcher;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, oneshot, watch};
use tracing::Instrument;
use vmm_control::{Command, Reply};

pub use config::CoreConfig;
pub use events::{Event, EventKind};
pub use phases::{Phase, phases, whole};
pub use stats::{Layer, PodUsage, Pressure, Stall, Throttling, Traffic, Transfers, Usage};
pub use status::{ContainerState, ContainerStatus, ContainerUser, ExecOutput, Moment, PodDisk, PodState, PodStatus};

use context::{Context, blocking};

use crate::agent::Session;
use crate::error::{Error, Result};
use crate::image::Store;
use crate::network::Network;
use crate::random;
use crate::spawner::Spawner;
use crate::spec::{ContainerSpec, PodSpec, ProcessSpec, Resources};
use crate::vmm;
pub(crate) use size::Frame;
use table::{Pod, Table};

pub(crate) use message::exec_process;

/// What stops and continues all processes of a cgroup v2.
const FREEZE: &str = "cgroup.freeze";

/// How long a container may take to be gone after SIGKILL.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// All pods of the node. Cheap to clone; every clone is the same table.
#[derive(Clone)]
pub struct Pods {
    context: Arc<Context>,
    table: Table,
}

impl Pods {
    /// Claims the state directory, finds the pods again that run, and removes what no record claims.
    pub async fn open(config: CoreConfig, spawner: Spawner, images: Store, network: Network) -> Result<Self> {
        let spawner = spawner.connect()?;
        let context = blocking(move || Context::new(config, spawner, images, network)).await?;
        let pods = Self { context: Arc::new(context), table: Table::default() };
        for owner in sweep::sweep(&pods.context).await? {
            pods.table.adopt(owner);
        }
        Ok(pods)
    }

    /// The choices it was opened with.
    pub fn config(&self) -> &CoreConfig {
        &self.context.config
    }

    /// Whether the process that starts VMMs is there.
    pub fn spawner_alive(&self) -> bool {
        self.context.spawner.alive()
    }

    /// Starts a pod and returns its id once its agent is configured; on failure nothing is left of it. A caller that
    /// hangs up before that leaves nothing either, since it has no id to remove the pod by.
    pub async fn run_pod(&self, spec: PodSpec) -> Result<String> {
        let id = random::id()?;
        self.table.reserve(&id, &spec.identity)?;
        let (pods, name) = (self.clone(), id.clone());
        let (answer, started) = oneshot::channel();
        let span = spec.identity.span();
        let work = async move {
            let done = match start::start(Arc::clone(&pods.context), name.clone(), spec).await {
                Ok(owner) => {
                    let status = owner.watch().borrow().clone();
                    pods.table.adopt(owner);
                    for kind in [EventKind::Created, EventKind::Started] {
                        pods.context.events.tell_one(name.clone(), kind, &status);
                    }
                    Ok(())
                }
                Err(error) => {
                    pods.table.remove(&name);
                    Err(error)
                }
            };
            if let Err(Ok(())) = answer.send(done) {
                tracing::info!(pod = name, "nobody waits for the pod any more, so it is removed");
                if let Err(error) = pods.remove_pod(&name).await {
                    tracing::warn!(pod = name, %error, "a pod that nobody waits for is not quite gone");
                }
            }
        };
        tokio::spawn(work.instrument(span));
        started.await.map_err(|_| Error::Internal("starting the pod failed".into()))??;
        Ok(id)
    }

    /// Stops a pod's containers, guest and network. Doing it again, or to a pod that is not there, does nothing.
    pub async fn stop_pod(&self, id: &str) -> Result<()> {
        match self.table.pod(id) {
            Ok(pod) => absent_is_done(pod.run(|owner| Box::pin(owner.stop())).await),
            Err(error) => absent_is_done(Err(error)),
        }
    }

    /// Ends a pod's VM at once, without asking its guest.
    pub async fn kill_pod(&self, id: &str) -> Result<()> {
        self.table
            .pod(id)?
            .run(|owner| {
                owner.kill();
                Box::pin(async { Ok(()) })
            })
            .await
    }

    /// Stops a pod if need be and forgets it. Doing it again does nothing.
    pub async fn remove_pod(&self, id: &str) -> Result<()> {
        match self.table.pod(id) {
            Ok(pod) => {
                absent_is_done(pod.run(|owner| Box::pin(owner.remove())).await)?;
                // Its owner does so as well, a moment later: who asks next shall not see it.
                self.table.remove(pod.id());
                Ok(())
            }
            Err(error) => absent_is_done(Err(error)),
        }
    }

    /// One pod, by its id or a prefix of it that no other has.
    pub fn pod(&self, id: &str) -> Result<Arc<PodStatus>> {
        Ok(self.table.pod(id)?.status())
    }

    /// Every pod that has been started.
    pub fn pods(&self) -> Vec<Arc<PodStatus>> {
        self.table.statuses()
    }

    /// Makes a container in a pod, not yet running, and returns its id. A caller that hangs up before that leaves
    /// nothing, since it has no id to remove the container by.
    pub async fn create_container(&self, pod: &str, spec: ContainerSpec) -> Result<String> {
        let id = random::id()?;
        let (name, unwanted) = (id.clone(), id.clone());
        let pod = self.table.pod(pod)?;
        pod.make(
            move |owner| Box::pin(owner.create_container(name, spec)),
            move |owner| Box::pin(async move { owner.abandon_container(&unwanted).await }),
        )
        .await?;
        Ok(id)
    }

    /// Runs a container that was created.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let (pod, container) = self.table.container(id)?;
        pod.run(move |owner| Box::pin(async move { owner.start_container(&container.id).await })).await
    }

    /// Sends a container its stop signal, and SIGKILL when `grace` is over. One that has ended, or is not there, is
    /// left alone.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        let (pod, container) = match self.table.container(id) {
            Ok(found) => found,
            Err(error) => return absent_is_done(Err(error)),
        };
        let asked = match container.spec.stop_signal {
            signal if signal > 0 => signal,
            _ => libc::SIGTERM,
        };
        if !grace.is_zero()
            && (!pod.signal(&container.id, asked, false).await? || pod.exited(&container.id, grace).await)
        {
            return Ok(());
        }
        if !pod.signal(&container.id, libc::SIGKILL, true).await? || pod.exited(&container.id, KILL_LIMIT).await {
            return Ok(());
        }
        let limit = KILL_LIMIT.as_secs();
        Err(Error::DeadlineExceeded(format!("container {id} was killed and has not ended after {limit} s")))
    }

    /// Kills a container if need be and forgets it. Doing it again does nothing.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        match self.table.container(id) {
            Ok((pod, container)) => {
                let removed =
                    pod.run(move |owner| Box::pin(async move { owner.remove_container(&container.id).await }));
                absent_is_done(removed.await)
            }
            Err(error) => absent_is_done(Err(error)),
        }
    }

    /// One container, by its id or a prefix of it that no other has.
    pub fn container(&self, id: &str) -> Result<ContainerStatus> {
        Ok(self.table.container(id)?.1)
    }

    /// Every container.
    pub fn containers(&self) -> Vec<ContainerStatus> {
        self.pods().iter().flat_map(|pod| pod.containers.values().cloned()).collect()
    }

    /// Waits for a container's end and returns how it ended.
    pub async fn wait_container(&self, id: &str) -> Result<ContainerStatus> {
        let (pod, container) = self.table.container(id)?;
        pod.until(|status| !runs(status, &container.id)).await?;
        self.container(&container.id)
    }

    /// Waits for the end of a pod's VM and returns the pod as it is then.
    pub async fn wait_pod(&self, id: &str) -> Result<Arc<PodStatus>> {
        let pod = self.table.pod(id)?;
        pod.until(|status| status.vmm_pid.is_none()).await?;
        Ok(pod.status())
    }

    /// What happens from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.context.events.listen()
    }

    /// Runs a command in a container to its end; `timeout` kills it (`DeadlineExceeded`), `None` waits for ever.
    pub async fn exec_sync(&self, id: &str, args: Vec<String>, timeout: Option<Duration>) -> Result<ExecOutput> {
        let (pod, container) = self.table.container(id)?;
        exec::sync(&self.context.config.pod_dir(pod.id()), &container, args, timeout).await
    }

    /// Runs a command in a container; dropping the session kills it.
    pub async fn exec(&self, id: &str, args: Vec<String>, terminal: bool, stdin: bool) -> Result<Session> {
        let (pod, container) = self.table.container(id)?;
        exec::open(&self.context.config.pod_dir(pod.id()), &container, args, terminal, stdin).await
    }

    /// Runs a process that is described in full in a container; dropping the session kills it.
    pub async fn exec_process(&self, id: &str, process: &ProcessSpec, stdin: bool) -> Result<Session> {
        let (pod, container) = self.table.container(id)?;
        exec::open_process(&self.context.config.pod_dir(pod.id()), &container, process, stdin).await
    }

    /// Sends a container's first process, or all its processes, a signal; whether there was one to send it to.
    pub async fn signal_container(&self, id: &str, signal: i32, all: bool) -> Result<bool> {
        let (pod, container) = self.table.container(id)?;
        pod.signal(&container.id, signal, all).await
    }

    /// Watches a container's own process; its input too, if the container was made with one.
    pub async fn attach(&self, id: &str, stdin: bool) -> Result<Session> {
        let (pod, container) = self.table.container(id)?;
        exec::attach(&self.context.config.pod_dir(pod.id()), &container, stdin).await
    }

    /// Connects to a port of a pod's loopback.
    pub async fn port_forward(&self, pod: &str, port: u16) -> Result<Session> {
        exec::forward(&self.context.config.pod_dir(self.table.pod(pod)?.id()), port).await
    }

    /// Changes those limits of a pod that are named; the others stay. Its VM grows or shrinks with them.
    pub async fn update_pod(&self, id: &str, overhead: Option<Resources>, resources: Option<Resources>) -> Result<()> {
        self.table.pod(id)?.run(move |owner| Box::pin(owner.update_pod(overhead, resources))).await
    }

    /// Changes those limits of a container that `resources` names; the others stay.
    pub async fn update_container(&self, id: &str, resources: Resources) -> Result<()> {
        let (pod, container) = self.table.container(id)?;
        pod.run(move |owner| Box::pin(async move { owner.update_container(&container.id, &resources).await })).await
    }

    /// Stops all processes of a container by its guest's kernel, or lets them go on.
    pub async fn freeze_container(&self, id: &str, frozen: bool) -> Result<()> {
        let unified = [(FREEZE.to_owned(), u8::from(frozen).to_string())].into();
        self.update_container(id, Resources { unified, ..Resources::default() }).await
    }

    /// Goes on with a container's log in a new file of the same name, the old one having been moved away.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let (pod, container) = self.table.container(id)?;
        pod.run(move |owner| Box::pin(async move { owner.reopen_log(&container.id).await })).await
    }

    /// What a pod and its containers use now.
    pub async fn usage(&self, id: &str) -> Result<PodUsage> {
        self.table.pod(id)?.run(|owner| Box::pin(owner.usage())).await
    }

    /// What a container uses now.
    pub async fn container_usage(&self, id: &str) -> Result<Usage> {
        let (pod, container) = self.table.container(id)?;
        let mut usage = pod.run(|owner| Box::pin(owner.usage())).await?;
        let missing = || Error::NotFound(format!("container {id} does not run"));
        usage.containers.remove(&container.id).ok_or_else(missing)
    }

    /// The moments of a pod's start, those the VMM noted among them, in order of time.
    pub async fn timeline(&self, id: &str) -> Result<Vec<Moment>> {
        let pod = self.table.pod(id)?;
        let dir = self.context.config.pod_dir(pod.id());
        let mut moments = pod.status().moments.clone();
        moments.extend(blocking(move || Ok(vmm::moments(&dir))).await?);
        moments.sort_by_key(|moment| moment.at_ns);
        Ok(moments)
    }

    /// What a pod's VMM has counted since it started, such as exits by reason.
    pub async fn counters(&self, id: &str) -> Result<BTreeMap<String, u64>> {
        match self.ask_vmm(id, &Command::Counters).await? {
            Reply::Counters(counters) => Ok(counters),
            _ => Err(Error::Internal("the VMM gave an answer that does not fit".into())),
        }
    }

    /// How often VMs have ended since the daemon began, by why: `guest_poweroff`, `guest_panic`, `killed` ….
    pub fn vm_ends(&self) -> BTreeMap<&'static str, u64> {
        self.context.ends()
    }

    /// What a pod's guest printed on its console from byte `from` on, and the byte to go on from.
    pub async fn console(&self, id: &str, from: u64) -> Result<(u64, String)> {
        match self.ask_vmm(id, &Command::Console { from }).await? {
            Reply::Console { next, text } => Ok((next, text)),
            _ => Err(Error::Internal("the VMM gave an answer that does not fit".into())),
        }
    }

    async fn ask_vmm(&self, id: &str, command: &Command) -> Result<Reply> {
        let pod = self.table.pod(id)?;
        if pod.status().vmm_pid.is_none() {
            return Err(Error::FailedPrecondition(format!("pod {id} does not run")));
        }
        crate::control::ask(&self.context.config.pod_dir(pod.id()), command, &[]).await
    }
}

/// What is asked to be gone and is not there is as it should be (CRI: stop and remove are idempotent).
fn absent_is_done(result: Result<()>) -> Result<()> {
    match result {
        Err(Error::NotFound(_)) => Ok(()),
        other => other,
    }
}

fn runs(status: &PodStatus, container: &str) -> bool {
    status.containers.get(container).is_some_and(|container| container.state == ContainerState::Running)
}

impl Pod {
    /// Signals a container in its pod's turn; whether there was anything to signal.
    async fn signal(&self, container: &str, signal: i32, all: bool) -> Result<bool> {
        let id = container.to_owned();
        self.run(move |owner| Box::pin(async move { owner.signal_container(&id, signal, all).await })).await
    }

    /// Whether a container does not run any more, within `limit`.
    async fn exited(&self, container: &str, limit: Duration) -> bool {
        tokio::time::timeout(limit, self.until(|status| !runs(status, container))).await.is_ok()
    }

    /// Waits until the pod's status is as wished; an error if the pod is removed first.
    async fn until(&self, wished: impl FnMut(&PodStatus) -> bool) -> Result<()> {
        let mut wished = wished;
        let mut status: watch::Receiver<Arc<PodStatus>> = self.watch();
        let seen = status.wait_for(|status| wished(status)).await;
        seen.map(drop).map_err(|_| Error::NotFound("the pod has been removed".into()))
    }
}
