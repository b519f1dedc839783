//! A CRI client that stays up, where a `crictl` for each call would cost more than the call.

use std::path::Path;

use cri_shim::cri::proto::runtime_service_client::RuntimeServiceClient;
use cri_shim::cri::proto::{
    PodSandboxConfig, PodSandboxMetadata, RemovePodSandboxRequest, RunPodSandboxRequest, StopPodSandboxRequest,
};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    runtime: Runtime,
    pods: RuntimeServiceClient<Channel>,
}

impl Client {
    /// Connects.
    pub fn connect(socket: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display())).expect("a URI");
        let channel = runtime.block_on(endpoint.connect()).expect("the daemon listens");
        Self { runtime, pods: RuntimeServiceClient::new(channel) }
    }

    /// Makes any other call.
    pub fn ask<T>(&mut self, call: impl AsyncFnOnce(&mut RuntimeServiceClient<Channel>) -> T) -> T {
        self.runtime.block_on(call(&mut self.pods))
    }

    /// Runs a pod and returns its id.
    #[track_caller]
    pub fn run_pod(&mut self, name: &str) -> String {
        let metadata = PodSandboxMetadata { name: name.into(), uid: name.into(), namespace: "test".into(), attempt: 0 };
        let config = PodSandboxConfig { metadata: Some(metadata), ..Default::default() };
        let request = RunPodSandboxRequest { config: Some(config), ..Default::default() };
        let answer = self.runtime.block_on(self.pods.run_pod_sandbox(request));
        answer.unwrap_or_else(|status| panic!("{name}: {status}")).into_inner().pod_sandbox_id
    }

    /// Stops and removes a pod.
    #[track_caller]
    pub fn remove_pod(&mut self, id: &str) {
        let pod_sandbox_id = id.to_owned();
        let stop = StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
        self.runtime.block_on(self.pods.stop_pod_sandbox(stop)).unwrap_or_else(|status| panic!("{id}: {status}"));
        let remove = RemovePodSandboxRequest { pod_sandbox_id };
        self.runtime.block_on(self.pods.remove_pod_sandbox(remove)).unwrap_or_else(|status| panic!("{id}: {status}"));
    }
}
