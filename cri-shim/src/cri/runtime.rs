//! RuntimeService: pods and containers.

use std::collections::HashMap;
use std::pin::Pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::{Stream, StreamExt};
use serde::Serialize;
use tokio_stream::wrappers::BroadcastStream;
use tonic::{Request, Response, Status};

use super::proto::runtime_service_server::RuntimeService;
use super::proto::*;
use super::{Node, convert, readiness, stats};
use crate::audit;
use crate::error::Error;
use crate::pod::{ContainerState, Moment, PodState, PodStatus};
use crate::streaming::{self, Wanted};

/// Of this interface, not of this program (CRI `VersionResponse.version`).
const KUBELET_API_VERSION: &str = "0.1.0";
const RUNTIME_API_VERSION: &str = "v1";
const RUNTIME_NAME: &str = "pericarp";

/// Most bytes of each stream that ExecSync answers with, so that both fit in a message.
const EXEC_OUTPUT_LIMIT: usize = (super::MESSAGE_LIMIT / 2) - 4096;

type Answer<T> = Result<Response<T>, Status>;

/// A list in parts.
pub(super) type Parts<T> = tokio_stream::Iter<std::vec::IntoIter<Result<T, Status>>>;

/// Items of a list in one part: far from what a message holds, were every one as long as can be.
const PART_ITEMS: usize = 100;

/// The Stream calls answer as their List calls do, for lists that no message would hold (CRI, since Kubernetes 1.36).
pub(super) fn parts<I: Clone, T>(items: &[I], part: impl Fn(Vec<I>) -> T) -> Answer<Parts<T>> {
    let parts: Vec<_> = items.chunks(PART_ITEMS).map(|items| Ok(part(items.to_vec()))).collect();
    answer(tokio_stream::iter(parts))
}

fn answer<T>(message: T) -> Answer<T> {
    Ok(Response::new(message))
}

/// The verbose part of a status: everything that is known, as one JSON document.
fn info(verbose: bool, value: &impl Serialize) -> Result<HashMap<String, String>, Status> {
    if !verbose {
        return Ok(HashMap::new());
    }
    let text = serde_json::to_string(value).map_err(|error| Status::internal(error.to_string()))?;
    Ok(HashMap::from([("info".to_owned(), text)]))
}

/// A pod for people who look into it.
#[derive(Serialize)]
struct PodDetails<'a> {
    #[serde(flatten)]
    pod: &'a PodStatus,
    timeline: Vec<Moment>,
}

fn now_ns() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

/// Seconds of a request; less than none is none.
fn seconds(count: i64) -> Duration {
    Duration::from_secs(u64::try_from(count).unwrap_or(0))
}

/// What the CRI allows: something, and no errors beside a terminal (ExecRequest, AttachRequest).
fn wanted(wanted: Wanted) -> Result<Wanted, Status> {
    if wanted.terminal && wanted.stderr {
        return Err(Status::invalid_argument("a terminal has one output: ask for tty or stderr, not for both"));
    }
    if !(wanted.stdin || wanted.stdout || wanted.stderr) {
        return Err(Status::invalid_argument("none of stdin, stdout and stderr is asked for"));
    }
    Ok(wanted)
}

/// The whole id of a container that runs.
fn running(node: &Node, id: &str) -> Result<String, Status> {
    let container = node.pods.container(id)?;
    if container.state != ContainerState::Running {
        return Err(Error::FailedPrecondition(format!("container {} does not run", container.id)).into());
    }
    Ok(container.id)
}

impl Node {
    fn listed_pods(&self, filter: Option<&PodSandboxFilter>) -> Vec<PodSandbox> {
        let pods = self.pods.pods();
        pods.iter().filter(|pod| convert::pod_matches(filter, pod)).map(|pod| convert::pod(pod)).collect()
    }

    fn listed_containers(&self, filter: Option<&ContainerFilter>) -> Vec<Container> {
        let containers = self.pods.containers();
        let matching = containers.iter().filter(|container| convert::container_matches(filter, container));
        matching.map(convert::container).collect()
    }
}

#[tonic::async_trait]
impl RuntimeService for Node {
    async fn version(&self, _: Request<VersionRequest>) -> Answer<VersionResponse> {
        answer(VersionResponse {
            version: KUBELET_API_VERSION.to_owned(),
            runtime_name: RUNTIME_NAME.to_owned(),
            runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
            runtime_api_version: RUNTIME_API_VERSION.to_owned(),
        })
    }

    async fn status(&self, request: Request<StatusRequest>) -> Answer<StatusResponse> {
        let features = RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: true };
        let handler = |name: &str| RuntimeHandler { name: name.to_owned(), features: Some(features) };
        let network = self.network.configuration().ok();
        let verbose = request.get_ref().verbose;
        let mut info = info(verbose, &serde_json::json!({"config": self.config, "cni": network}))?;
        if verbose {
            // As containerd names them, for whoever looks for the place of root file systems (critest).
            let config = serde_json::json!({"stateDir": self.pods.config().state_dir});
            info.insert("config".to_owned(), config.to_string());
        }
        answer(StatusResponse {
            status: Some(readiness::conditions(self)),
            info,
            runtime_handlers: vec![handler(""), handler(&self.handler)],
            features: Some(RuntimeFeatures { supplemental_groups_policy: true, ..RuntimeFeatures::default() }),
        })
    }

    async fn runtime_config(&self, _: Request<RuntimeConfigRequest>) -> Answer<RuntimeConfigResponse> {
        let linux = LinuxRuntimeConfiguration { cgroup_driver: CgroupDriver::Cgroupfs.into() };
        answer(RuntimeConfigResponse { linux: Some(linux) })
    }

    async fn run_pod_sandbox(&self, request: Request<RunPodSandboxRequest>) -> Answer<RunPodSandboxResponse> {
        let RunPodSandboxRequest { config, runtime_handler } = request.into_inner();
        let config = convert::required(config, "config")?;
        config.metadata.iter().for_each(|metadata| audit::identity(&convert::identity(metadata)));
        let spec = convert::pod_spec(config, &runtime_handler, &self.handler)?;
        let pod_sandbox_id = self.pods.run_pod(spec).await?;
        audit::pod_id(&pod_sandbox_id);
        answer(RunPodSandboxResponse { pod_sandbox_id })
    }

    async fn stop_pod_sandbox(&self, request: Request<StopPodSandboxRequest>) -> Answer<StopPodSandboxResponse> {
        audit::pod(&self.pods, &request.get_ref().pod_sandbox_id);
        self.pods.stop_pod(&request.get_ref().pod_sandbox_id).await?;
        answer(StopPodSandboxResponse {})
    }

    async fn remove_pod_sandbox(&self, request: Request<RemovePodSandboxRequest>) -> Answer<RemovePodSandboxResponse> {
        audit::pod(&self.pods, &request.get_ref().pod_sandbox_id);
        self.pods.remove_pod(&request.get_ref().pod_sandbox_id).await?;
        answer(RemovePodSandboxResponse {})
    }

    async fn pod_sandbox_status(&self, request: Request<PodSandboxStatusRequest>) -> Answer<PodSandboxStatusResponse> {
        let PodSandboxStatusRequest { pod_sandbox_id, verbose } = request.into_inner();
        let pod = self.pods.pod(&pod_sandbox_id)?;
        let timeline = if verbose { self.pods.timeline(&pod.id).await? } else { Vec::new() };
        answer(PodSandboxStatusResponse {
            status: Some(convert::pod_status(&pod)),
            info: info(verbose, &PodDetails { pod: &pod, timeline })?,
            containers_statuses: pod.containers.values().map(convert::container_status).collect(),
            timestamp: now_ns(),
        })
    }

    async fn list_pod_sandbox(&self, request: Request<ListPodSandboxRequest>) -> Answer<ListPodSandboxResponse> {
        let items = self.listed_pods(request.get_ref().filter.as_ref());
        answer(ListPodSandboxResponse { items })
    }

    async fn create_container(&self, request: Request<CreateContainerRequest>) -> Answer<CreateContainerResponse> {
        let CreateContainerRequest { pod_sandbox_id, config, sandbox_config: _ } = request.into_inner();
        let config = convert::required(config, "config")?;
        let name = convert::required(config.image.as_ref(), "image")?.image.clone();
        audit::pod(&self.pods, &pod_sandbox_id);
        config.metadata.iter().for_each(|metadata| audit::container_name(&metadata.name));
        audit::image(&name);
        let pod = self.pods.pod(&pod_sandbox_id)?;
        let image = self.images.resolve(&name).ok_or_else(|| {
            Error::NotFound(format!("image {name:?} is not on this node: pull it first (crictl pull {name})"))
        })?;
        let spec = convert::container_spec(config, &pod.spec, &image, |name| self.images.resolve(name))?;
        let container_id = self.pods.create_container(&pod.id, spec).await?;
        audit::container_id(&container_id);
        answer(CreateContainerResponse { container_id })
    }

    async fn start_container(&self, request: Request<StartContainerRequest>) -> Answer<StartContainerResponse> {
        audit::container(&self.pods, &request.get_ref().container_id);
        self.pods.start_container(&request.get_ref().container_id).await?;
        answer(StartContainerResponse {})
    }

    async fn stop_container(&self, request: Request<StopContainerRequest>) -> Answer<StopContainerResponse> {
        let StopContainerRequest { container_id, timeout } = request.into_inner();
        audit::container(&self.pods, &container_id);
        self.pods.stop_container(&container_id, seconds(timeout)).await?;
        answer(StopContainerResponse {})
    }

    async fn remove_container(&self, request: Request<RemoveContainerRequest>) -> Answer<RemoveContainerResponse> {
        audit::container(&self.pods, &request.get_ref().container_id);
        self.pods.remove_container(&request.get_ref().container_id).await?;
        answer(RemoveContainerResponse {})
    }

    async fn list_containers(&self, request: Request<ListContainersRequest>) -> Answer<ListContainersResponse> {
        answer(ListContainersResponse { containers: self.listed_containers(request.get_ref().filter.as_ref()) })
    }

    async fn container_status(&self, request: Request<ContainerStatusRequest>) -> Answer<ContainerStatusResponse> {
        let ContainerStatusRequest { container_id, verbose } = request.into_inner();
        let container = self.pods.container(&container_id)?;
        let status = Some(convert::container_status(&container));
        answer(ContainerStatusResponse { status, info: info(verbose, &container)? })
    }

    async fn reopen_container_log(
        &self,
        request: Request<ReopenContainerLogRequest>,
    ) -> Answer<ReopenContainerLogResponse> {
        audit::container(&self.pods, &request.get_ref().container_id);
        self.pods.reopen_log(&request.get_ref().container_id).await?;
        answer(ReopenContainerLogResponse {})
    }

    async fn exec_sync(&self, request: Request<ExecSyncRequest>) -> Answer<ExecSyncResponse> {
        let ExecSyncRequest { container_id, cmd, timeout } = request.into_inner();
        audit::container(&self.pods, &container_id);
        if cmd.is_empty() {
            return Err(Status::invalid_argument("the command is empty"));
        }
        let timeout = Some(seconds(timeout)).filter(|timeout| !timeout.is_zero());
        let mut output = self.pods.exec_sync(&container_id, cmd, timeout).await?;
        output.stdout.truncate(EXEC_OUTPUT_LIMIT);
        output.stderr.truncate(EXEC_OUTPUT_LIMIT);
        answer(ExecSyncResponse { stdout: output.stdout, stderr: output.stderr, exit_code: output.exit_code })
    }

    async fn update_container_resources(
        &self,
        request: Request<UpdateContainerResourcesRequest>,
    ) -> Answer<UpdateContainerResourcesResponse> {
        let UpdateContainerResourcesRequest { container_id, linux, windows: _, annotations: _ } = request.into_inner();
        audit::container(&self.pods, &container_id);
        let resources = convert::resources(convert::required(linux, "linux")?)?;
        self.pods.update_container(&container_id, resources).await?;
        answer(UpdateContainerResourcesResponse {})
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<UpdatePodSandboxResourcesRequest>,
    ) -> Answer<UpdatePodSandboxResourcesResponse> {
        let UpdatePodSandboxResourcesRequest { pod_sandbox_id, overhead, resources } = request.into_inner();
        audit::pod(&self.pods, &pod_sandbox_id);
        let overhead = overhead.map(convert::resources).transpose()?;
        let resources = resources.map(convert::resources).transpose()?;
        self.pods.update_pod(&pod_sandbox_id, overhead, resources).await?;
        answer(UpdatePodSandboxResourcesResponse {})
    }

    /// The one setting there is, the node's pod CIDR, is the CNI configuration's business here.
    async fn update_runtime_config(
        &self,
        _: Request<UpdateRuntimeConfigRequest>,
    ) -> Answer<UpdateRuntimeConfigResponse> {
        answer(UpdateRuntimeConfigResponse {})
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Answer<ExecResponse> {
        let ExecRequest { container_id, cmd, tty, stdin, stdout, stderr } = request.into_inner();
        audit::container(&self.pods, &container_id);
        if cmd.is_empty() {
            return Err(Status::invalid_argument("the command is empty"));
        }
        let wanted = wanted(Wanted { stdin, stdout, stderr, terminal: tty })?;
        let container = running(self, &container_id)?;
        let url = self.streaming.url(streaming::Request::Exec { container, args: cmd, wanted })?;
        answer(ExecResponse { url })
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Answer<AttachResponse> {
        let AttachRequest { container_id, stdin, tty, stdout, stderr } = request.into_inner();
        audit::container(&self.pods, &container_id);
        let wanted = wanted(Wanted { stdin, stdout, stderr, terminal: tty })?;
        let container = running(self, &container_id)?;
        answer(AttachResponse { url: self.streaming.url(streaming::Request::Attach { container, wanted })? })
    }

    /// The ports are named by the streams that the client opens; those of the request are for runtimes of old.
    async fn port_forward(&self, request: Request<PortForwardRequest>) -> Answer<PortForwardResponse> {
        audit::pod(&self.pods, &request.get_ref().pod_sandbox_id);
        let pod = self.pods.pod(&request.get_ref().pod_sandbox_id)?;
        if pod.state != PodState::Ready {
            return Err(Error::FailedPrecondition(format!("pod {} is not ready: {}", pod.id, pod.message)).into());
        }
        let url = self.streaming.url(streaming::Request::PortForward { pod: pod.id.clone() })?;
        answer(PortForwardResponse { url })
    }

    async fn checkpoint_container(
        &self,
        request: Request<CheckpointContainerRequest>,
    ) -> Answer<CheckpointContainerResponse> {
        audit::container(&self.pods, &request.get_ref().container_id);
        Err(Status::unimplemented("containers share their pod's kernel and cannot be checkpointed one by one"))
    }

    async fn container_stats(&self, request: Request<ContainerStatsRequest>) -> Answer<ContainerStatsResponse> {
        let stats = stats::container(self, &request.get_ref().container_id).await?;
        answer(ContainerStatsResponse { stats: Some(stats) })
    }

    async fn list_container_stats(
        &self,
        request: Request<ListContainerStatsRequest>,
    ) -> Answer<ListContainerStatsResponse> {
        let stats = stats::containers(self, request.get_ref().filter.as_ref()).await;
        answer(ListContainerStatsResponse { stats })
    }

    async fn pod_sandbox_stats(&self, request: Request<PodSandboxStatsRequest>) -> Answer<PodSandboxStatsResponse> {
        let stats = stats::pod(self, &request.get_ref().pod_sandbox_id).await?;
        answer(PodSandboxStatsResponse { stats: Some(stats) })
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<ListPodSandboxStatsRequest>,
    ) -> Answer<ListPodSandboxStatsResponse> {
        let stats = stats::pods(self, request.get_ref().filter.as_ref()).await;
        answer(ListPodSandboxStatsResponse { stats })
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<ListMetricDescriptorsRequest>,
    ) -> Answer<ListMetricDescriptorsResponse> {
        answer(ListMetricDescriptorsResponse { descriptors: convert::metric_descriptors() })
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<ListPodSandboxMetricsRequest>,
    ) -> Answer<ListPodSandboxMetricsResponse> {
        answer(ListPodSandboxMetricsResponse { pod_metrics: stats::metrics(self).await })
    }

    type StreamPodSandboxesStream = Parts<StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let pods = self.listed_pods(request.get_ref().filter.as_ref());
        parts(&pods, |pod_sandboxes| StreamPodSandboxesResponse { pod_sandboxes })
    }

    type StreamContainersStream = Parts<StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let containers = self.listed_containers(request.get_ref().filter.as_ref());
        parts(&containers, |containers| StreamContainersResponse { containers })
    }

    type StreamContainerStatsStream = Parts<StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let stats = stats::containers(self, request.get_ref().filter.as_ref()).await;
        parts(&stats, |container_stats| StreamContainerStatsResponse { container_stats })
    }

    type StreamPodSandboxStatsStream = Parts<StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let stats = stats::pods(self, request.get_ref().filter.as_ref()).await;
        parts(&stats, |pod_sandbox_stats| StreamPodSandboxStatsResponse { pod_sandbox_stats })
    }

    type StreamPodSandboxMetricsStream = Parts<StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let metrics = stats::metrics(self).await;
        parts(&metrics, |pod_sandbox_metrics| StreamPodSandboxMetricsResponse { pod_sandbox_metrics })
    }

    type GetContainerEventsStream = Pin<Box<dyn Stream<Item = Result<ContainerEventResponse, Status>> + Send>>;

    async fn get_container_events(&self, _: Request<GetEventsRequest>) -> Answer<Self::GetContainerEventsStream> {
        let events = BroadcastStream::new(self.pods.events()).map(|event| {
            let behind = |_| Status::data_loss("events came faster than they were read: list pods and containers anew");
            Ok(convert::event(&event.map_err(behind)?))
        });
        answer(Box::pin(events))
    }
}
