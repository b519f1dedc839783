//! containerd's task API: each call is one or two of the core's, and an event.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{TaskExecAdded, TaskPaused, TaskResumed};
use containerd_shim_protos::shim_async;
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;
use containerd_shim_protos::ttrpc::{self, Code, get_status};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::events::Events;
use super::process::{Life, Process};
use super::task::Task;
use super::{convert, metrics, oci};
use crate::error::{Error, Result};
use crate::pod::Pods;
use crate::streaming::stdio::{Order, Streams};

/// Of what containerd may ask for all the same.
pub(super) const NO_CHECKPOINTS: &str = "checkpoints of virtual machines are not supported";

/// The server of one pod. Cheap to clone.
#[derive(Clone)]
pub(super) struct Service {
    pub(super) pods: Pods,
    pub(super) events: Events,
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
        self.tasks().get(id).cloned().ok_or_else(|| Error::NotFound(format!("no task {id}")))
    }

    /// A task, and that of its processes which `exec` names; the first one has no name.
    fn find(&self, id: &str, exec: &str) -> Result<(Arc<Task>, Arc<Process>)> {
        let task = self.task(id)?;
        let process = task.process(exec)?;
        Ok((task, process))
    }

    /// What is behind the lock is whole at every moment.
    pub(super) fn tasks(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Task>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Of what containerd passes on as it has it.
fn decode<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| Error::InvalidArgument(format!("{what} does not decode: {error}")))
}

#[async_trait]
impl shim_async::Task for Service {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let pid = self.create_task(request).await?;
        Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let (task, process) = self.find(&request.id, &request.exec_id)?;
        match &process.exec {
            None => self.start_task(&task).await?,
            Some(spec) => self.start_exec(&task, &process, spec).await?,
        }
        Ok(StartResponse { pid: task.pid, ..StartResponse::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let task = self.task(&request.id)?;
        let asked: oci::Process = decode("the process's specification", &request.spec.value)?;
        let mut spec = convert::process(&asked);
        spec.terminal = request.terminal;
        let ExecProcessRequest { exec_id, terminal, stdin, stdout, stderr, .. } = request;
        let streams = Streams { stdin, stdout, stderr, terminal };
        task.add_exec(Process::new(exec_id.clone(), Some(spec), streams))?;
        self.events.tell(TaskExecAdded { container_id: request.id, exec_id, ..TaskExecAdded::default() }).await;
        Ok(Empty::default())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let (task, process) = self.find(&request.id, &request.exec_id)?;
        self.signal(&task, &process, i32::try_from(request.signal).unwrap_or(0), request.all).await?;
        Ok(Empty::default())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let (task, process) = self.find(&request.id, &request.exec_id)?;
        let exit = self.forget(&task, &process).await?;
        let (exit_status, exited_at) = (exit.status(), exit.at());
        Ok(DeleteResponse { pid: task.pid, exit_status, exited_at, ..DeleteResponse::default() })
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let (_, process) = self.find(&request.id, &request.exec_id)?;
        let exit = process.wait().await;
        Ok(WaitResponse { exit_status: exit.status(), exited_at: exit.at(), ..WaitResponse::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let (task, process) = self.find(&request.id, &request.exec_id)?;
        let Streams { stdin, stdout, stderr, terminal } = process.streams.clone();
        let mut response = StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: task.bundle.display().to_string(),
            pid: task.pid,
            stdin,
            stdout,
            stderr,
            terminal,
            ..StateResponse::default()
        };
        let status = match process.life() {
            Life::Created => Status::CREATED,
            Life::Running => Status::RUNNING,
            Life::Paused => Status::PAUSED,
            Life::Exited(exit) => {
                (response.exit_status, response.exited_at) = (exit.status(), exit.at());
                Status::STOPPED
            }
        };
        response.status = status.into();
        Ok(response)
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let processes = vec![ProcessInfo { pid: self.task(&request.id)?.pid, ..ProcessInfo::default() }];
        Ok(PidsResponse { processes, ..PidsResponse::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let task = self.task(&request.id)?;
        self.pods.freeze_container(task.container()?, true).await?;
        task.first.step(Life::Paused);
        self.events.tell(TaskPaused { container_id: request.id, ..TaskPaused::default() }).await;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let task = self.task(&request.id)?;
        self.pods.freeze_container(task.container()?, false).await?;
        task.first.step(Life::Running);
        self.events.tell(TaskResumed { container_id: request.id, ..TaskResumed::default() }).await;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let (_, process) = self.find(&request.id, &request.exec_id)?;
        process.order(Order::Resize(request.width, request.height)).await?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let (_, process) = self.find(&request.id, &request.exec_id)?;
        process.order(Order::CloseStdin).await?;
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let task = self.task(&request.id)?;
        let resources = convert::resources(&decode::<oci::Resources>("what is to change", &request.resources.value)?);
        if let Some(pod) = &task.pod {
            self.pods.update_pod(pod, None, Some(resources.clone())).await?;
        }
        if let Some(container) = &task.container {
            self.pods.update_container(container, resources).await?;
        }
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let task = self.task(&request.id)?;
        let usage = match (&task.container, &task.pod) {
            (Some(container), _) => self.pods.container_usage(container).await?,
            (None, pod) => self.pods.usage(pod.as_deref().unwrap_or_default()).await?.pod,
        };
        Ok(StatsResponse { stats: Some(metrics::metrics(&usage)).into(), ..StatsResponse::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let task_pid = self.task(&request.id).map_or(0, |task| task.pid);
        let (shim_pid, version) = (std::process::id(), env!("CARGO_PKG_VERSION").to_owned());
        Ok(ConnectResponse { shim_pid, task_pid, version, ..ConnectResponse::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        // Others of the pod may still need it.
        if self.tasks().is_empty() {
            self.ended.send_replace(true);
        }
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(ttrpc::Error::RpcStatus(get_status(Code::UNIMPLEMENTED, NO_CHECKPOINTS)))
    }
}
