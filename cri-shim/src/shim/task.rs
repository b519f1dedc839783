//! A container as containerd sees it (a task): what stands behind it in the core, and its processes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;

use super::process::Process;
use crate::error::{Error, Result};
use crate::spec::ProcessSpec;

/// What stands behind a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Behind {
    /// The pod as a whole, by its id in the core.
    Pod(String),
    /// A container, by its id in the core.
    Container(String),
    /// A container and the pod that is its alone.
    Alone {
        /// By its id in the core.
        pod: String,
        /// By its id in the core.
        container: String,
    },
}

impl Behind {
    /// The container in the core, if it is one.
    pub(super) fn container(&self) -> Option<&str> {
        match self {
            Self::Pod(_) => None,
            Self::Container(container) | Self::Alone { container, .. } => Some(container),
        }
    }

    /// The pod in the core that ends with the task.
    pub(super) fn pod(&self) -> Option<&str> {
        match self {
            Self::Container(_) => None,
            Self::Pod(pod) | Self::Alone { pod, .. } => Some(pod),
        }
    }
}

/// A process beside a container's own.
#[derive(Debug)]
pub(super) struct Exec {
    pub(super) spec: ProcessSpec,
    pub(super) process: Process,
}

/// A task.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) id: String,
    pub(super) bundle: PathBuf,
    pub(super) behind: Behind,
    /// The pod's VMM, which is all that the host sees of it.
    pub(super) pid: u32,
    /// The first one.
    pub(super) process: Process,
    execs: Mutex<BTreeMap<String, Arc<Exec>>>,
}

impl Task {
    pub(super) fn new(id: String, bundle: PathBuf, behind: Behind, pid: u32, process: Process) -> Self {
        Self { id, bundle, behind, pid, process, execs: Mutex::default() }
    }

    pub(super) fn add_exec(&self, id: &str, exec: Exec) -> Result<()> {
        let mut execs = self.lock();
        if execs.contains_key(id) {
            return Err(Error::AlreadyExists(format!("exec {id} is there already")));
        }
        execs.insert(id.to_owned(), Arc::new(exec));
        Ok(())
    }

    pub(super) fn exec(&self, id: &str) -> Result<Arc<Exec>> {
        self.lock().get(id).cloned().ok_or_else(|| Error::NotFound(format!("no exec {id}")))
    }

    pub(super) fn remove_exec(&self, id: &str) {
        self.lock().remove(id);
    }

    /// What is behind the lock is whole at every moment.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Exec>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `CLOCK_REALTIME` in nanoseconds as containerd writes it.
pub(super) fn timestamp(at_ns: i64) -> Timestamp {
    let (seconds, nanos) = (at_ns.div_euclid(1_000_000_000), at_ns.rem_euclid(1_000_000_000));
    Timestamp { seconds, nanos: i32::try_from(nanos).unwrap_or(0), ..Timestamp::default() }
}
