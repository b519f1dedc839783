//! Pods and their containers: the table of them, and all that can be asked of them.
//!
//! An operation runs in a task of its pod, not in its caller's: a caller that hangs up leaves nothing half done.
//! Reading a status never waits for an operation.

mod config;
mod status;

use std::sync::Arc;
use std::time::Duration;

pub use config::{CoreConfig, PodDir};
pub use status::{ContainerState, ContainerStatus, ExecOutput, Moment, PodState, PodStatus};

use crate::error::{Error, Result};
use crate::spec::{ContainerSpec, PodSpec};

/// All pods of the node. Cheap to clone; every clone is the same table.
#[derive(Clone, Debug)]
pub struct Pods {
    config: Arc<CoreConfig>,
}

impl Pods {
    /// The choices it was opened with.
    pub fn config(&self) -> &CoreConfig {
        &self.config
    }

    /// Starts a pod and returns its id once its agent is configured; on failure nothing is left of it.
    pub async fn run_pod(&self, _spec: PodSpec) -> Result<String> {
        Err(unfinished())
    }

    /// Stops a pod's containers, guest and network. Doing it again, or to a pod that is not there, does nothing.
    pub async fn stop_pod(&self, _id: &str) -> Result<()> {
        Err(unfinished())
    }

    /// Stops a pod if need be and forgets it. Doing it again does nothing.
    pub async fn remove_pod(&self, _id: &str) -> Result<()> {
        Err(unfinished())
    }

    /// One pod, by its id or a prefix of it that no other has.
    pub fn pod(&self, id: &str) -> Result<Arc<PodStatus>> {
        Err(Error::NotFound(format!("no pod {id}")))
    }

    /// Every pod that has been started.
    pub fn pods(&self) -> Vec<Arc<PodStatus>> {
        Vec::new()
    }

    /// Makes a container in a pod, not yet running, and returns its id.
    pub async fn create_container(&self, _pod: &str, _spec: ContainerSpec) -> Result<String> {
        Err(unfinished())
    }

    /// Runs a container that was created.
    pub async fn start_container(&self, _id: &str) -> Result<()> {
        Err(unfinished())
    }

    /// Sends a container its stop signal, and SIGKILL when `grace` is over. One that has ended is left alone.
    pub async fn stop_container(&self, _id: &str, _grace: Duration) -> Result<()> {
        Err(unfinished())
    }

    /// Kills a container if need be and forgets it. Doing it again does nothing.
    pub async fn remove_container(&self, _id: &str) -> Result<()> {
        Err(unfinished())
    }

    /// One container, by its id or a prefix of it that no other has.
    pub fn container(&self, id: &str) -> Result<ContainerStatus> {
        Err(Error::NotFound(format!("no container {id}")))
    }

    /// Every container.
    pub fn containers(&self) -> Vec<ContainerStatus> {
        Vec::new()
    }

    /// Runs a command in a container to its end; `timeout` kills it (`DeadlineExceeded`), `None` waits for ever.
    pub async fn exec_sync(&self, _id: &str, _args: Vec<String>, _timeout: Option<Duration>) -> Result<ExecOutput> {
        Err(unfinished())
    }

    /// Goes on with a container's log in a new file of the same name, the old one having been moved away.
    pub async fn reopen_log(&self, _id: &str) -> Result<()> {
        Err(unfinished())
    }

    /// The moments of a pod's start, in order of time.
    pub async fn timeline(&self, _id: &str) -> Result<Vec<Moment>> {
        Err(unfinished())
    }
}

fn unfinished() -> Error {
    Error::Unavailable("pods cannot be run by this build".into())
}
