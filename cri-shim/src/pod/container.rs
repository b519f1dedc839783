//! Operations on containers that run in their pod's turn.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent_protocol::v1;
use vmm_control::Command;

use super::context::blocking;
use super::owner::Owner;
use super::status::ContainerUser;
use super::{memory, message};
use crate::agent::{Answer, Call};
use crate::clock;
use crate::control;
use crate::error::{Error, IoContext, Result};
use crate::kill_point::kill_point;
use crate::record::{ContainerRecord, Life, LogRecord};
use crate::spec::{ContainerSpec, Resources, Rootfs};

/// Longest time for the agent to make a container: mounts and copies.
const CREATE_LIMIT: Duration = Duration::from_secs(60);

/// Longest time for the agent to run, signal or remove one.
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// Permission bits of a log file that we make, as other runtimes give it.
const LOG_MODE: u32 = 0o640;

/// Exit code and reason of a container that could not be started, as other runtimes give them.
const START_ERROR_CODE: i32 = 128;
const START_ERROR: &str = "StartError";

impl Owner {
    /// Makes a container. On failure nothing is left of it.
    pub(super) async fn create_container(&mut self, id: String, spec: ContainerSpec) -> Result<()> {
        self.agent()?;
        if spec.process.args.is_empty() {
            return Err(Error::InvalidArgument("no command: neither the container nor its image names one".into()));
        }
        let same = |other: &ContainerRecord| other.spec.name == spec.name && other.spec.attempt == spec.attempt;
        if !spec.name.is_empty() && self.record.containers.values().any(same) {
            let text = format!("container {} (attempt {}) is there already: remove it first", spec.name, spec.attempt);
            return Err(Error::AlreadyExists(text));
        }
        let log = self.plan_log(&spec)?;
        let spec = blocking(move || memory::replace(spec)).await?;
        let shares = self.plan_shares(&spec).await?;
        let image_id = match &spec.rootfs {
            Rootfs::Image(id) => id.clone(),
            Rootfs::Directory { .. } | Rootfs::Disk(_) => String::new(),
        };
        let life = Life::Creating;
        let created_at_ns = clock::realtime_ns();
        let spec = Arc::new(spec);
        let container =
            ContainerRecord { spec, created_at_ns, image_id, log, shares, volumes: BTreeMap::new(), user: None, life };
        self.record.containers.insert(id.clone(), container.clone());
        let made = self.make_container(&id, container).await;
        kill_point("container.made");
        match &made {
            Ok(user) => {
                self.set_life(&id, Life::Created);
                if let Some(container) = self.record.containers.get_mut(&id) {
                    container.user.clone_from(user);
                }
            }
            Err(_) => self.unmake_container(&id).await,
        }
        self.save()?;
        kill_point("container.created");
        made.map(drop)
    }

    async fn make_container(&mut self, id: &str, mut container: ContainerRecord) -> Result<Option<ContainerUser>> {
        self.save()?;
        kill_point("container.recorded");
        for image in container.spec.images() {
            self.map_image(image).await?;
        }
        container.volumes = self.map_volumes(&container.spec).await?;
        self.record.containers.insert(id.to_owned(), container.clone());
        kill_point("container.mapped");
        if let Some(log) = &container.log {
            self.open_log(log).await?;
        }
        self.make_shares(&container).await?;
        kill_point("container.shared");
        // Before anything in the guest is sized by what it has, or uses it.
        self.grow(self.wanted()?.at_most(self.record.frame())).await?;
        self.memory_there().await?;
        let (record, name) = (self.record.clone(), id.to_owned());
        let create = blocking(move || message::create_container(&record, &name, &container)).await?;
        self.copies.sent(&create);
        match self.agent()?.ask(Call::CreateContainer(create), CREATE_LIMIT).await? {
            Answer::Created(v1::Created { uid, gid, groups }) => Ok(Some(ContainerUser { uid, gid, groups })),
            // An agent of an older release does not say.
            _ => Ok(None),
        }
    }

    /// Takes back what [`Owner::make_container`] may have made; an image stays mapped for the next container.
    pub(super) async fn unmake_container(&mut self, id: &str) {
        let gone = self.remove_from_guest(id).await;
        if let Err(error) = gone {
            tracing::warn!(pod = self.record.id, container = id, %error, "a container that failed is not quite gone");
        }
        self.record.containers.remove(id);
        self.copies.forget(id);
        self.unmap_volumes().await;
    }

    /// Where a container's log goes; its directory is the caller's to make.
    fn plan_log(&mut self, spec: &ContainerSpec) -> Result<Option<LogRecord>> {
        let Some(directory) = self.record.spec.log_directory.clone() else { return Ok(None) };
        if spec.log_path.as_os_str().is_empty() {
            return Ok(None);
        }
        let path = directory.join(&spec.log_path);
        if !path.parent().is_some_and(Path::is_dir) {
            return Err(Error::FailedPrecondition(format!(
                "the container's log {} cannot be written: its directory does not exist, create it first",
                path.display()
            )));
        }
        Ok(Some(LogRecord { port: self.record.take_log_port(), path }))
    }

    async fn open_log(&self, log: &LogRecord) -> Result<()> {
        let file = File::options().create(true).append(true).mode(LOG_MODE).open(&log.path);
        let file = file.doing(|| format!("opening the container's log {}", log.path.display()))?;
        control::run(&self.dir, &Command::SetSink { port: log.port }, &[file.as_raw_fd()]).await
    }

    /// Runs a container that was created; one that cannot be run counts as exited.
    pub(super) async fn start_container(&mut self, id: &str) -> Result<()> {
        let life = self.container(id)?.life.clone();
        if life != Life::Created {
            return Err(Error::FailedPrecondition(format!("container {id} has been started already")));
        }
        let started_at_ns = clock::realtime_ns();
        let call = Call::StartContainer(v1::StartContainer { id: id.into() });
        let started = self.agent()?.tell(call, CALL_LIMIT).await;
        kill_point("container.started");
        let life = match &started {
            Ok(()) => Life::Running { started_at_ns },
            Err(error) => Life::Exited {
                started_at_ns,
                finished_at_ns: clock::realtime_ns().max(started_at_ns.saturating_add(1)),
                code: START_ERROR_CODE,
                reason: START_ERROR.into(),
                message: error.to_string(),
            },
        };
        self.set_life(id, life);
        self.save()?;
        kill_point("container.running");
        started
    }

    /// Sends a signal to a container's first process, or to all; whether there was one to send it to.
    pub(super) async fn signal_container(&mut self, id: &str, signal: i32, all: bool) -> Result<bool> {
        if !matches!(self.container(id)?.life, Life::Running { .. }) || !self.is_running() {
            return Ok(false);
        }
        let call = Call::SignalContainer(v1::SignalContainer { id: id.into(), signal, all });
        match self.agent()?.tell(call, CALL_LIMIT).await {
            // It has just ended; its exit is on the way.
            Err(Error::NotFound(_) | Error::FailedPrecondition(_)) | Ok(()) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Kills a container if need be and forgets it.
    pub(super) async fn remove_container(&mut self, id: &str) -> Result<()> {
        if !self.record.containers.contains_key(id) {
            return Ok(());
        }
        self.remove_from_guest(id).await?;
        kill_point("container.removed");
        self.record.containers.remove(id);
        self.copies.forget(id);
        self.unmap_volumes().await;
        self.save()
    }

    /// Forgets a container whose caller has gone away before it knew its id.
    pub(super) async fn abandon_container(&mut self, id: &str) {
        tracing::info!(
            pod = self.record.id,
            container = id,
            "nobody waits for the container any more, so it is removed"
        );
        if let Err(error) = self.remove_container(id).await {
            tracing::warn!(pod = self.record.id, container = id, %error, "a container that nobody waits for stays");
        }
    }

    async fn remove_from_guest(&self, id: &str) -> Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        let call = Call::RemoveContainer(v1::RemoveContainer { id: id.into() });
        match self.agent()?.tell(call, CALL_LIMIT).await {
            Ok(()) | Err(Error::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        // The guest has let go of them.
        self.unmake_shares(id).await?;
        let Some(log) = self.record.containers.get(id).and_then(|container| container.log.as_ref()) else {
            return Ok(());
        };
        match control::run(&self.dir, &Command::RemoveSink { port: log.port }, &[]).await {
            // Refused: there was none.
            Ok(()) | Err(Error::Internal(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Changes limits, of the guest's cgroup and so of what the status tells.
    pub(super) async fn update_container(&mut self, id: &str, resources: &Resources) -> Result<()> {
        let container = self.container(id)?;
        if matches!(container.life, Life::Exited { .. }) {
            return Err(Error::FailedPrecondition(format!("container {id} has exited")));
        }
        let before = Arc::clone(&container.spec);
        let mut spec = ContainerSpec::clone(&before);
        spec.resources.update(resources);
        self.set_spec(id, Arc::new(spec));
        let changed = Some(message::resources(resources));
        let call = Call::UpdateContainer(v1::UpdateContainer { id: id.into(), resources: changed });
        let done = match self.grow(self.wanted()?).await {
            Ok(()) => self.agent()?.tell(call, CALL_LIMIT).await,
            Err(error) => Err(error),
        };
        if done.is_err() {
            self.set_spec(id, before);
        }
        self.save()?;
        self.shrink(self.wanted()?.memory_mib).await?;
        done
    }

    /// Goes on with a log in a new file.
    pub(super) async fn reopen_log(&mut self, id: &str) -> Result<()> {
        let Some(log) = self.container(id)?.log.clone() else { return Ok(()) };
        if !self.is_running() {
            return Err(Error::FailedPrecondition(format!("container {id} does not run")));
        }
        let call = Call::ReopenLog(v1::ReopenLog { id: id.into() });
        self.agent()?.tell(call, CALL_LIMIT).await?;
        self.open_log(&log).await
    }

    fn container(&self, id: &str) -> Result<&ContainerRecord> {
        self.record.containers.get(id).ok_or_else(|| Error::NotFound(format!("no container {id}")))
    }

    fn set_spec(&mut self, id: &str, spec: Arc<ContainerSpec>) {
        if let Some(container) = self.record.containers.get_mut(id) {
            container.spec = spec;
        }
    }

    fn set_life(&mut self, id: &str, life: Life) {
        if let Some(container) = self.record.containers.get_mut(id) {
            container.life = life;
        }
    }
}
