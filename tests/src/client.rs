//! A CRI client that stays up, where a `crictl` for each call would cost more than the call.

use std::path::Path;

use cri_shim::cri::proto::image_service_client::ImageServiceClient;
use cri_shim::cri::proto::runtime_service_client::RuntimeServiceClient;
use cri_shim::cri::proto::{
    PodSandboxConfig, PodSandboxMetadata, RemovePodSandboxRequest, RunPodSandboxRequest, StopPodSandboxRequest,
};
use tokio::runtime::Runtime;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    runtime: Runtime,
    pods: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

impl Client {
    /// Connects.
    pub fn connect(socket: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display())).expect("a URI");
        let channel = runtime.block_on(endpoint.connect()).expect("the daemon listens");
        Self { runtime, pods: RuntimeServiceClient::new(channel.clone()), images: ImageServiceClient::new(channel) }
    }

    /// Makes any other call.
    pub fn ask<T>(&mut self, call: impl AsyncFnOnce(&mut RuntimeServiceClient<Channel>) -> T) -> T {
        self.runtime.block_on(call(&mut self.pods))
    }

    /// Makes any call about images.
    pub fn ask_images<T>(&mut self, call: impl AsyncFnOnce(&mut ImageServiceClient<Channel>) -> T) -> T {
        self.runtime.block_on(call(&mut self.images))
    }

    /// Asks for a pod and returns its id.
    pub fn try_run_pod(&mut self, name: &str) -> Result<String, Status> {
        let metadata = PodSandboxMetadata { name: name.into(), uid: name.into(), namespace: "test".into(), attempt: 0 };
        let config = PodSandboxConfig { metadata: Some(metadata), ..Default::default() };
        let request = RunPodSandboxRequest { config: Some(config), ..Default::default() };
        self.ask(async |cri| cri.run_pod_sandbox(request).await).map(|answer| answer.into_inner().pod_sandbox_id)
    }

    /// As [`Client::try_run_pod`], of a pod that must start.
    #[track_caller]
    pub fn run_pod(&mut self, name: &str) -> String {
        self.try_run_pod(name).unwrap_or_else(|status| panic!("{name}: {status}"))
    }

    /// Stops and removes a pod.
    pub fn try_remove_pod(&mut self, id: &str) -> Result<(), Status> {
        let pod_sandbox_id = id.to_owned();
        let stop = StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
        self.ask(async |cri| cri.stop_pod_sandbox(stop).await)?;
        self.ask(async |cri| cri.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id }).await).map(drop)
    }

    /// As [`Client::try_remove_pod`], which must work.
    #[track_caller]
    pub fn remove_pod(&mut self, id: &str) {
        self.try_remove_pod(id).unwrap_or_else(|status| panic!("{id}: {status}"));
    }
}
