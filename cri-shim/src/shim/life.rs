//! The lives of tasks and their processes: made, started, signalled, and forgotten when they have ended. containerd is told
//! of each step.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskStart,
};

use super::bundle::{Bundle, Role};
use super::convert;
use super::process::{Exit, Life, Process};
use super::service::{NO_CHECKPOINTS, Service};
use super::task::Task;
use crate::error::{Error, Result};
use crate::snapshot;
use crate::spec::{NetworkSource, ProcessSpec};
use crate::streaming::loopback;
use crate::streaming::stdio::{Order, Streams};

/// Exit code of what ended by SIGKILL.
const KILLED_CODE: i32 = 128 + libc::SIGKILL;

/// The reason of a container that was killed for want of memory.
const OOM: &str = "OOMKilled";

impl Service {
    /// Makes a task and returns the process id that stands for it. On failure nothing is left of it.
    pub(super) async fn create_task(&self, request: CreateTaskRequest) -> Result<u32> {
        if !request.checkpoint.is_empty() {
            return Err(Error::InvalidArgument(NO_CHECKPOINTS.into()));
        }
        let bundle = Bundle::read(&PathBuf::from(&request.bundle))?;
        let CreateTaskRequest { stdin, stdout, stderr, terminal, .. } = request.clone();
        let process = Process::new(request.id.clone(), None, Streams { stdin, stdout, stderr, terminal });
        let role = bundle.role();
        let pod = match role {
            Role::Member => {
                let missing = || Error::FailedPrecondition("the container's pod does not run".into());
                self.pods.pods().first().ok_or_else(missing)?.id.clone()
            }
            Role::Sandbox | Role::Alone => self.make_pod(&bundle, &request.id).await?,
        };
        let container = match role {
            Role::Sandbox => None,
            Role::Member => Some(self.make_container(&pod, &bundle, &request, &process).await?),
            Role::Alone => match self.make_container(&pod, &bundle, &request, &process).await {
                Ok(container) => Some(container),
                Err(error) => {
                    self.pods.remove_pod(&pod).await?;
                    return Err(error);
                }
            },
        };
        let pid = self.pods.pods().iter().find_map(|pod| pod.vmm_pid).unwrap_or(0);
        let (pod, first) = ((role != Role::Member).then_some(pod), Arc::new(process));
        let (id, execs) = (request.id.clone(), Mutex::default());
        self.tasks().insert(id.clone(), Arc::new(Task { id, bundle: bundle.path, pod, container, pid, first, execs }));
        let CreateTaskRequest { id: container_id, bundle, rootfs, stdin, stdout, stderr, terminal, .. } = request;
        let io = Some(TaskIO { stdin, stdout, stderr, terminal, ..TaskIO::default() }).into();
        self.events.tell(TaskCreate { container_id, bundle, rootfs, io, pid, ..TaskCreate::default() }).await;
        Ok(pid)
    }

    async fn make_pod(&self, bundle: &Bundle, id: &str) -> Result<String> {
        let spec = convert::pod_spec(bundle, id)?;
        let network = spec.network.clone();
        let pod = self.pods.run_pod(spec).await?;
        if let (Role::Sandbox, NetworkSource::Netns(netns)) = (bundle.role(), network) {
            let (pods, pod) = (self.pods.clone(), pod.clone());
            // Nobody forwards a port before the pod is known to run, and all else of it works without.
            tokio::spawn(async move {
                if let Err(error) = loopback::forward(&pods, &pod, netns).await {
                    tracing::warn!(%error, "ports of the pod cannot be forwarded");
                }
            });
        }
        Ok(pod)
    }

    /// Makes a container in the core, its files and streams connected. On failure nothing is left of it.
    async fn make_container(
        &self,
        pod: &str,
        bundle: &Bundle,
        request: &CreateTaskRequest,
        process: &Process,
    ) -> Result<String> {
        let pid = self.pods.pod(pod)?.vmm_pid.unwrap_or(0);
        let made = async {
            let root = snapshot::prepare(&bundle.path, &bundle.spec.root.path, &convert::mounts(&request.rootfs))?;
            let mut spec = convert::container_spec(bundle, &request.id, root, pid)?;
            // containerd does not say which attempt a container is, and keeps those that ended for a while.
            let others = self.pods.containers();
            let attempts = others.iter().filter(|other| other.spec.name == spec.name).map(|other| other.spec.attempt);
            spec.attempt = attempts.max().map_or(0, |last| last.saturating_add(1));
            spec.stdin = !request.stdin.is_empty();
            // Ours is the one session that gives input; when it says so, there is no more.
            spec.stdin_once = true;
            spec.process.terminal = request.terminal;
            let id = self.pods.create_container(pod, spec).await?;
            let connected = match self.pods.attach(&id, !request.stdin.is_empty()).await {
                // Before its start, so that nothing it says is missed.
                Ok(session) => process.connect(session, &self.events.namespace).await.map(drop),
                Err(error) => Err(error),
            };
            if let Err(error) = connected {
                self.pods.remove_container(&id).await?;
                return Err(error);
            }
            Ok(id)
        };
        let made = made.await;
        if made.is_err() {
            snapshot::unmount(&bundle.path)?;
        }
        made
    }

    pub(super) async fn start_task(&self, task: &Arc<Task>) -> Result<()> {
        if let Some(container) = &task.container {
            self.pods.start_container(container).await?;
        }
        task.first.step(Life::Running);
        self.events.tell(TaskStart { container_id: task.id.clone(), pid: task.pid, ..TaskStart::default() }).await;
        let (service, task) = (self.clone(), Arc::clone(task));
        tokio::spawn(async move {
            let exit = service.end_of(&task).await;
            service.exited(&task, &task.first, exit).await;
        });
        Ok(())
    }

    /// Waits for a task's end.
    async fn end_of(&self, task: &Task) -> Exit {
        let Some(container) = &task.container else {
            // Whether it was stopped, removed or ended by itself: the VM is gone.
            let _ = self.pods.wait_pod(task.pod.as_deref().unwrap_or_default()).await;
            return Exit::now(KILLED_CODE);
        };
        let Ok(status) = self.pods.wait_container(container).await else { return Exit::now(KILLED_CODE) };
        if status.reason == OOM {
            self.events.tell(TaskOOM { container_id: task.id.clone(), ..TaskOOM::default() }).await;
        }
        Exit { code: status.exit_code, at_ns: status.finished_at_ns }
    }

    /// Tells of a process's end, once.
    async fn exited(&self, task: &Task, process: &Process, exit: Exit) {
        if process.step(Life::Exited(exit)) {
            let (container_id, id, pid) = (task.id.clone(), process.id.clone(), task.pid);
            let (exit_status, exited_at) = (exit.status(), exit.at());
            self.events.tell(TaskExit { container_id, id, pid, exit_status, exited_at, ..TaskExit::default() }).await;
        }
    }

    pub(super) async fn start_exec(&self, task: &Arc<Task>, exec: &Arc<Process>, spec: &ProcessSpec) -> Result<()> {
        if exec.life() != Life::Created {
            return Err(Error::FailedPrecondition(format!("exec {} has been started already", exec.id)));
        }
        let session = self.pods.exec_process(task.container()?, spec, !exec.streams.stdin.is_empty()).await?;
        let pump = exec.connect(session, &self.events.namespace).await?;
        exec.step(Life::Running);
        let (container_id, exec_id) = (task.id.clone(), exec.id.clone());
        let started = TaskExecStarted { container_id, exec_id, pid: task.pid, ..TaskExecStarted::default() };
        self.events.tell(started).await;
        let (service, task, exec) = (self.clone(), Arc::clone(task), Arc::clone(exec));
        tokio::spawn(async move {
            let exit = Exit::now(pump.ended().await);
            service.exited(&task, &exec, exit).await;
        });
        Ok(())
    }

    /// Sends a process a signal, or all of its container's.
    pub(super) async fn signal(&self, task: &Task, process: &Process, signal: i32, all: bool) -> Result<()> {
        let ends = signal == libc::SIGKILL || signal == libc::SIGTERM;
        match (process.life(), &task.container) {
            (Life::Exited(_), _) => return Err(Error::NotFound("the process has ended already".into())),
            (_, None) if ends => {
                let (pods, pod) = (self.pods.clone(), task.pod.clone().unwrap_or_default());
                // Powering a guest off takes a while; whoever wants to know waits for the task's end.
                tokio::spawn(async move {
                    if let Err(error) = pods.stop_pod(&pod).await {
                        tracing::error!(%error, "a pod does not stop");
                    }
                });
            }
            (_, None) => {}
            (Life::Created, _) if ends => {
                self.exited(task, process, Exit::now(128_i32.saturating_add(signal))).await;
            }
            (_, Some(container)) if process.exec.is_none() => {
                if signal == libc::SIGKILL {
                    process.killed();
                }
                // The VM may have ended in this moment, and the process with it.
                self.pods.signal_container(container, signal, all).await?;
            }
            (_, Some(_)) => {
                process.order(Order::Signal(signal)).await?;
                if signal == libc::SIGKILL {
                    process.killed();
                }
            }
        }
        Ok(())
    }

    /// Removes a process that has ended; with a task's first one goes the task.
    pub(super) async fn forget(&self, task: &Task, process: &Process) -> Result<Exit> {
        let exit = process.over()?;
        process.finish().await;
        if process.exec.is_some() {
            task.remove_exec(&process.id);
            return Ok(exit);
        }
        if let Some(container) = &task.container {
            self.pods.remove_container(container).await?;
        }
        if let Some(pod) = &task.pod {
            self.pods.remove_pod(pod).await?;
        }
        snapshot::unmount(&task.bundle)?;
        self.tasks().remove(&task.id);
        let (container_id, pid, exit_status, exited_at) = (task.id.clone(), task.pid, exit.status(), exit.at());
        self.events.tell(TaskDelete { container_id, pid, exit_status, exited_at, ..TaskDelete::default() }).await;
        Ok(exit)
    }
}
