//! A container as containerd sees it (a task): what stands behind it in the core, and its processes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::process::Process;
use crate::error::{Error, Result};

/// A task. It is a container, a pod as a whole, or a container together with the pod that is its alone.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) id: String,
    pub(super) bundle: PathBuf,
    /// The pod that ends with it, by its id in the core.
    pub(super) pod: Option<String>,
    /// By its id in the core; a pod as a whole has no process.
    pub(super) container: Option<String>,
    /// The pod's VMM, which is all that the host sees of it.
    pub(super) pid: u32,
    /// The container's own.
    pub(super) first: Arc<Process>,
    /// Those beside it, by containerd's ids.
    pub(super) execs: Mutex<BTreeMap<String, Arc<Process>>>,
}

impl Task {
    /// A process by its id, which the first one has none of.
    pub(super) fn process(&self, id: &str) -> Result<Arc<Process>> {
        if id.is_empty() {
            return Ok(Arc::clone(&self.first));
        }
        self.lock().get(id).cloned().ok_or_else(|| Error::NotFound(format!("no exec {id}")))
    }

    pub(super) fn add_exec(&self, exec: Process) -> Result<()> {
        let mut execs = self.lock();
        if execs.contains_key(&exec.id) {
            return Err(Error::AlreadyExists(format!("exec {} is there already", exec.id)));
        }
        execs.insert(exec.id.clone(), Arc::new(exec));
        Ok(())
    }

    pub(super) fn remove_exec(&self, id: &str) {
        self.lock().remove(id);
    }

    /// What a process is to run in.
    pub(super) fn container(&self) -> Result<&str> {
        let none = || Error::FailedPrecondition("a pod's sandbox has no process of its own".into());
        self.container.as_deref().ok_or_else(none)
    }

    /// What is behind the lock is whole at every moment.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
