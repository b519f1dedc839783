//! containerd's task API: each call is one or two of the core's, and an event.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
    DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse, ProcessInfo,
    ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse,
    StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::protobuf::EnumOrUnknown;
use containerd_shim_protos::shim_async;
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;
use containerd_shim_protos::ttrpc::{self};
use containerd_shim_protos::types::mount::Mount;
use tokio::sync::watch;

use super::bundle::{Bundle, Role};
use super::error::{status, unimplemented};
use super::events::Events;
use super::process::{Exit, Life, Process};
use super::stdio::{Order, Streams};
use super::task::{Behind, Exec, Task, timestamp};
use super::{convert, forward, metrics, oci, rootfs};
use crate::error::{Error, Result};
use crate::pod::Pods;
use crate::spec::{NetworkSource, Resources};

/// Exit code of what ended by SIGKILL.
const KILLED_CODE: i32 = 128 + libc::SIGKILL;

/// What stops and continues all processes of a cgroup v2.
const FREEZE: &str = "cgroup.freeze";

/// The reason of a container that was killed for want of memory.
const OOM: &str = "OOMKilled";

/// The server of one pod. Cheap to clone.
#[derive(Clone)]
pub(super) struct Service {
    pods: Pods,
    events: Events,
    tasks: Arc<Mutex<BTreeMap<String, Arc<Task>>>>,
    ended: Arc<watch::Sender<bool>>,
}

impl Service {
    pub(super) fn new(pods: Pods, events: Events) -> Self {
        Self { pods, events, tasks: Arc::default(), ended: Arc::new(watch::Sender::new(false)) }
    }

    /// Waits until containerd needs it no more.
    pub(super) async fn ended(&self) {
        // The sender lives as long as this.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    fn task(&self, id: &str) -> Result<Arc<Task>> {
        self.lock().get(id).cloned().ok_or_else(|| Error::NotFound(format!("no task {id}")))
    }

    /// What is behind the lock is whole at every moment.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Task>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn make(&self, request: &CreateTaskRequest) -> Result<Arc<Task>> {
        if !request.checkpoint.is_empty() {
            return Err(Error::InvalidArgument("checkpoints of virtual machines are not supported".into()));
        }
        let path = PathBuf::from(&request.bundle);
        let bundle = Bundle::read(&path)?;
        let process = Process::new(Streams {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        });
        let behind = match bundle.role() {
            Role::Sandbox => Behind::Pod(self.make_pod(&bundle, &request.id).await?),
            Role::Member => {
                let missing = || Error::FailedPrecondition("the container's pod does not run".into());
                let pod = self.pods.pods().first().ok_or_else(missing)?.id.clone();
                Behind::Container(self.make_container(&pod, &bundle, request, &process).await?)
            }
            Role::Alone => {
                let pod = self.pods.run_pod(convert::pod_spec(&bundle, &request.id)?).await?;
                match self.make_container(&pod, &bundle, request, &process).await {
                    Ok(container) => Behind::Alone { pod, container },
                    Err(error) => {
                        self.pods.remove_pod(&pod).await?;
                        return Err(error);
                    }
                }
            }
        };
        let pid = self.pods.pods().iter().find_map(|pod| pod.vmm_pid).unwrap_or(0);
        let task = Arc::new(Task::new(request.id.clone(), path, behind, pid, process));
        self.lock().insert(request.id.clone(), Arc::clone(&task));
        Ok(task)
    }

    async fn make_pod(&self, bundle: &Bundle, id: &str) -> Result<String> {
        let spec = convert::pod_spec(bundle, id)?;
        let network = spec.network.clone();
        let pod = self.pods.run_pod(spec).await?;
        if let NetworkSource::Netns(netns) = network {
            let (pods, pod) = (self.pods.clone(), pod.clone());
            // Nobody forwards a port before the pod is known to run, and all else of it works without.
            tokio::spawn(async move {
                if let Err(error) = forward::start(&pods, &pod, &netns).await {
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
            let root = rootfs::prepare(bundle, &request.rootfs)?;
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
                Ok(session) => process.connect(session).map(drop),
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
            rootfs::unmount(&bundle.path)?;
        }
        made
    }

    async fn start_task(&self, task: &Arc<Task>) -> Result<()> {
        if let Some(container) = task.behind.container() {
            self.pods.start_container(container).await?;
        }
        task.process.step(Life::Running);
        self.events.tell(TaskStart { container_id: task.id.clone(), pid: task.pid, ..TaskStart::default() }).await;
        let (service, task) = (self.clone(), Arc::clone(task));
        tokio::spawn(async move { service.watch(&task).await });
        Ok(())
    }

    /// Waits for a task's end and tells it.
    async fn watch(&self, task: &Task) {
        let exit = match &task.behind {
            Behind::Pod(pod) => {
                // Whether it was stopped, removed or ended by itself: the VM is gone.
                let _ = self.pods.wait_pod(pod).await;
                Exit::now(KILLED_CODE)
            }
            Behind::Container(container) | Behind::Alone { container, .. } => {
                match self.pods.wait_container(container).await {
                    Ok(status) => {
                        if status.reason == OOM {
                            let container_id = task.id.clone();
                            self.events.tell(TaskOOM { container_id, ..TaskOOM::default() }).await;
                        }
                        Exit { code: status.exit_code, at_ns: status.finished_at_ns }
                    }
                    Err(_) => Exit::now(KILLED_CODE),
                }
            }
        };
        self.exited(task, &task.id, &task.process, exit).await;
    }

    /// Tells of a process's end, once.
    async fn exited(&self, task: &Task, id: &str, process: &Process, exit: Exit) {
        if process.step(Life::Exited(exit)) {
            let event = TaskExit {
                container_id: task.id.clone(),
                id: id.to_owned(),
                pid: task.pid,
                exit_status: exit.code.cast_unsigned(),
                exited_at: Some(timestamp(exit.at_ns)).into(),
                ..TaskExit::default()
            };
            self.events.tell(event).await;
        }
    }

    async fn start_exec(&self, task: &Arc<Task>, id: &str) -> Result<()> {
        let exec = task.exec(id)?;
        let container = task.behind.container().ok_or_else(no_process)?;
        if exec.process.life() != Life::Created {
            return Err(Error::FailedPrecondition(format!("exec {id} has been started already")));
        }
        let stdin = !exec.process.streams.stdin.is_empty();
        let session = self.pods.exec_process(container, &exec.spec, stdin).await?;
        let pump = exec.process.connect(session)?;
        exec.process.step(Life::Running);
        let (container_id, exec_id) = (task.id.clone(), id.to_owned());
        let started = TaskExecStarted { container_id, exec_id, pid: task.pid, ..TaskExecStarted::default() };
        self.events.tell(started).await;
        let (service, task, id) = (self.clone(), Arc::clone(task), id.to_owned());
        tokio::spawn(async move {
            let exit = Exit::now(pump.ended().await);
            service.exited(&task, &id, &exec.process, exit).await;
        });
        Ok(())
    }

    async fn kill_task(&self, task: &Task, signal: i32, all: bool) -> Result<()> {
        let ends = signal == libc::SIGKILL || signal == libc::SIGTERM;
        match (&task.behind, task.process.life()) {
            (_, Life::Exited(_)) => return Err(Error::NotFound("the process has ended already".into())),
            (Behind::Pod(pod), _) if ends => {
                let (pods, pod) = (self.pods.clone(), pod.clone());
                // Powering a guest off takes a while; whoever wants to know waits for the task's end.
                tokio::spawn(async move {
                    if let Err(error) = pods.stop_pod(&pod).await {
                        tracing::error!(%error, "a pod does not stop");
                    }
                });
            }
            (Behind::Pod(_), _) => {}
            (_, Life::Created) if ends => {
                self.exited(task, &task.id, &task.process, Exit::now(128_i32.saturating_add(signal))).await;
            }
            (Behind::Container(container) | Behind::Alone { container, .. }, _) => {
                if signal == libc::SIGKILL {
                    task.process.killed();
                }
                // The VM may have ended in this moment, and the task with it.
                self.pods.signal_container(container, signal, all).await?;
            }
        }
        Ok(())
    }

    async fn kill_exec(&self, task: &Task, id: &str, signal: i32) -> Result<()> {
        let exec = task.exec(id)?;
        match exec.process.life() {
            Life::Exited(_) => return Err(Error::NotFound("the process has ended already".into())),
            Life::Created => self.exited(task, id, &exec.process, Exit::now(KILLED_CODE)).await,
            Life::Running | Life::Paused => {
                exec.process.order(Order::Signal(signal)).await?;
                if signal == libc::SIGKILL {
                    exec.process.killed();
                }
            }
        }
        Ok(())
    }

    async fn delete_task(&self, task: &Task) -> Result<Exit> {
        let exit = match task.process.life() {
            Life::Exited(exit) => exit,
            Life::Created => Exit::now(0),
            Life::Running | Life::Paused => {
                return Err(Error::FailedPrecondition(format!("task {} runs: kill it first", task.id)));
            }
        };
        task.process.finish().await;
        if let Some(container) = task.behind.container() {
            self.pods.remove_container(container).await?;
        }
        if let Some(pod) = task.behind.pod() {
            self.pods.remove_pod(pod).await?;
        }
        rootfs::unmount(&task.bundle)?;
        self.lock().remove(&task.id);
        let event = TaskDelete {
            container_id: task.id.clone(),
            pid: task.pid,
            exit_status: exit.code.cast_unsigned(),
            exited_at: Some(timestamp(exit.at_ns)).into(),
            ..TaskDelete::default()
        };
        self.events.tell(event).await;
        Ok(exit)
    }

    async fn delete_exec(&self, task: &Task, id: &str) -> Result<Exit> {
        let exec = task.exec(id)?;
        let exit = match exec.process.life() {
            Life::Exited(exit) => exit,
            Life::Created => Exit::now(0),
            Life::Running | Life::Paused => {
                return Err(Error::FailedPrecondition(format!("exec {id} runs: kill it first")));
            }
        };
        exec.process.finish().await;
        task.remove_exec(id);
        Ok(exit)
    }

    /// Stops or continues all processes of a container, by the guest's kernel.
    async fn freeze(&self, task: &Task, frozen: bool) -> Result<()> {
        let container = task.behind.container().ok_or_else(no_process)?;
        let value = if frozen { "1" } else { "0" };
        let unified = [(FREEZE.to_owned(), value.to_owned())].into();
        self.pods.update_container(container, Resources { unified, ..Resources::default() }).await?;
        task.process.step(if frozen { Life::Paused } else { Life::Running });
        Ok(())
    }

    async fn update_task(&self, task: &Task, request: &UpdateTaskRequest) -> Result<()> {
        let asked: oci::Resources = serde_json::from_slice(&request.resources.value)
            .map_err(|error| Error::InvalidArgument(format!("the resources do not decode: {error}")))?;
        let resources = convert::resources(&asked)?;
        match (task.behind.container(), task.behind.pod()) {
            (None, Some(pod)) => self.pods.update_pod(pod, None, Some(resources)).await,
            (Some(container), None) => self.pods.update_container(container, resources).await,
            (Some(container), Some(pod)) => {
                self.pods.update_pod(pod, None, Some(resources.clone())).await?;
                self.pods.update_container(container, resources).await
            }
            (None, None) => Ok(()),
        }
    }

    async fn usage(&self, task: &Task) -> Result<crate::pod::Usage> {
        let pod = match (&task.behind, task.behind.container()) {
            (_, Some(container)) => self.pods.container(container)?.pod_id,
            (behind, None) => behind.pod().unwrap_or_default().to_owned(),
        };
        let mut usage = self.pods.usage(&pod).await?;
        match task.behind.container() {
            None => Ok(usage.pod),
            Some(container) => {
                usage.containers.remove(container).ok_or_else(|| Error::NotFound("the container does not run".into()))
            }
        }
    }
}

fn no_process() -> Error {
    Error::FailedPrecondition("a pod's sandbox has no process of its own".into())
}

fn wire_status(life: Life) -> EnumOrUnknown<Status> {
    EnumOrUnknown::new(match life {
        Life::Created => Status::CREATED,
        Life::Running => Status::RUNNING,
        Life::Paused => Status::PAUSED,
        Life::Exited(_) => Status::STOPPED,
    })
}

fn created(request: &CreateTaskRequest, rootfs: Vec<Mount>, pid: u32) -> TaskCreate {
    let io = TaskIO {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
        ..TaskIO::default()
    };
    let (container_id, bundle) = (request.id.clone(), request.bundle.clone());
    TaskCreate { container_id, bundle, rootfs, io: Some(io).into(), pid, ..TaskCreate::default() }
}

#[async_trait]
impl shim_async::Task for Service {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let task = self.make(&request).await.map_err(status)?;
        self.events.tell(created(&request, request.rootfs.clone(), task.pid)).await;
        Ok(CreateTaskResponse { pid: task.pid, ..CreateTaskResponse::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let task = self.task(&request.id).map_err(status)?;
        let started = if request.exec_id.is_empty() {
            self.start_task(&task).await
        } else {
            self.start_exec(&task, &request.exec_id).await
        };
        started.map_err(status)?;
        Ok(StartResponse { pid: task.pid, ..StartResponse::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let task = self.task(&request.id).map_err(status)?;
        let asked: oci::Process = serde_json::from_slice(&request.spec.value).map_err(|error| {
            status(Error::InvalidArgument(format!("the process's specification does not decode: {error}")))
        })?;
        let mut spec = convert::process(&asked);
        spec.terminal = request.terminal;
        let ExecProcessRequest { exec_id, terminal, stdin, stdout, stderr, .. } = request;
        let process = Process::new(Streams { stdin, stdout, stderr, terminal });
        task.add_exec(&exec_id, Exec { spec, process }).map_err(status)?;
        self.events.tell(TaskExecAdded { container_id: request.id, exec_id, ..TaskExecAdded::default() }).await;
        Ok(Empty::default())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let task = self.task(&request.id).map_err(status)?;
        let signal = i32::try_from(request.signal).unwrap_or(0);
        let killed = if request.exec_id.is_empty() {
            self.kill_task(&task, signal, request.all).await
        } else {
            self.kill_exec(&task, &request.exec_id, signal).await
        };
        killed.map_err(status)?;
        Ok(Empty::default())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let task = self.task(&request.id).map_err(status)?;
        let deleted = if request.exec_id.is_empty() {
            self.delete_task(&task).await
        } else {
            self.delete_exec(&task, &request.exec_id).await
        };
        let exit = deleted.map_err(status)?;
        let (exit_status, exited_at) = (exit.code.cast_unsigned(), Some(timestamp(exit.at_ns)).into());
        Ok(DeleteResponse { pid: task.pid, exit_status, exited_at, ..DeleteResponse::default() })
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let task = self.task(&request.id).map_err(status)?;
        let exit = if request.exec_id.is_empty() {
            task.process.wait().await
        } else {
            task.exec(&request.exec_id).map_err(status)?.process.wait().await
        };
        let (exit_status, exited_at) = (exit.code.cast_unsigned(), Some(timestamp(exit.at_ns)).into());
        Ok(WaitResponse { exit_status, exited_at, ..WaitResponse::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let task = self.task(&request.id).map_err(status)?;
        let exec = match request.exec_id.as_str() {
            "" => None,
            id => Some(task.exec(id).map_err(status)?),
        };
        let process = exec.as_ref().map_or(&task.process, |exec| &exec.process);
        let Streams { stdin, stdout, stderr, terminal } = process.streams.clone();
        let mut response = StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: Path::display(&task.bundle).to_string(),
            pid: task.pid,
            status: wire_status(process.life()),
            stdin,
            stdout,
            stderr,
            terminal,
            ..StateResponse::default()
        };
        if let Life::Exited(exit) = process.life() {
            response.exit_status = exit.code.cast_unsigned();
            response.exited_at = Some(timestamp(exit.at_ns)).into();
        }
        Ok(response)
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let task = self.task(&request.id).map_err(status)?;
        let processes = vec![ProcessInfo { pid: task.pid, ..ProcessInfo::default() }];
        Ok(PidsResponse { processes, ..PidsResponse::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let task = self.task(&request.id).map_err(status)?;
        self.freeze(&task, true).await.map_err(status)?;
        self.events.tell(TaskPaused { container_id: request.id, ..TaskPaused::default() }).await;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let task = self.task(&request.id).map_err(status)?;
        self.freeze(&task, false).await.map_err(status)?;
        self.events.tell(TaskResumed { container_id: request.id, ..TaskResumed::default() }).await;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.order(&request.id, &request.exec_id, Order::Resize(request.width, request.height)).await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        self.order(&request.id, &request.exec_id, Order::CloseStdin).await
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let task = self.task(&request.id).map_err(status)?;
        self.update_task(&task, &request).await.map_err(status)?;
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let task = self.task(&request.id).map_err(status)?;
        let usage = self.usage(&task).await.map_err(status)?;
        Ok(StatsResponse { stats: Some(metrics::metrics(&usage)).into(), ..StatsResponse::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let task_pid = self.task(&request.id).map_or(0, |task| task.pid);
        let (shim_pid, version) = (std::process::id(), env!("CARGO_PKG_VERSION").to_owned());
        Ok(ConnectResponse { shim_pid, task_pid, version, ..ConnectResponse::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        // Others of the pod may still need it.
        if self.lock().is_empty() {
            self.ended.send_replace(true);
        }
        Ok(Empty::default())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        _: containerd_shim_protos::api::CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        Err(unimplemented("checkpoints of virtual machines are not supported"))
    }
}

impl Service {
    async fn order(&self, id: &str, exec: &str, order: Order) -> ttrpc::Result<Empty> {
        let task = self.task(id).map_err(status)?;
        let ordered = if exec.is_empty() {
            task.process.order(order).await
        } else {
            match task.exec(exec) {
                Ok(exec) => exec.process.order(order).await,
                Err(error) => Err(error),
            }
        };
        ordered.map_err(status)?;
        Ok(Empty::default())
    }
}
