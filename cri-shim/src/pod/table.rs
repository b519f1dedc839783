//! Who owns which pod: the only state that all pods share, locked for lookups and never across a wait.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{mpsc, oneshot, watch};
use tracing::Instrument;

use super::owner::{Operation, Owner, Running};
use super::{ContainerStatus, PodStatus};
use crate::error::{Error, Result};
use crate::spec::PodIdentity;

/// Operations that may wait for their turn in one pod.
const QUEUE: usize = 64;

/// The way to one pod: its owner's inbox, and what it shows.
#[derive(Clone)]
pub(super) struct Pod {
    id: Arc<str>,
    operations: mpsc::Sender<Operation>,
    status: watch::Receiver<Arc<PodStatus>>,
}

impl Pod {
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn status(&self) -> Arc<PodStatus> {
        Arc::clone(&self.status.borrow())
    }

    pub(super) fn watch(&self) -> watch::Receiver<Arc<PodStatus>> {
        self.status.clone()
    }

    /// Runs an operation in the pod's turn; it runs to its end even if this future is dropped.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        operation: impl for<'a> FnOnce(&'a mut Owner) -> Running<'a, Result<T>> + Send + 'static,
    ) -> Result<T> {
        let (answer, result) = oneshot::channel();
        let operation: Operation = Box::new(move |owner| {
            let running = operation(owner);
            Box::pin(async move {
                // A caller that has gone away does not want to know.
                let _ = answer.send(running.await);
            })
        });
        self.ask(operation, result).await
    }

    /// As [`Pod::run`], for what nobody could ever name if its caller has gone away: it is then not begun, or taken
    /// back by `undo` in the same turn.
    pub(super) async fn make<T: Send + 'static>(
        &self,
        operation: impl for<'a> FnOnce(&'a mut Owner) -> Running<'a, Result<T>> + Send + 'static,
        undo: impl for<'a> FnOnce(&'a mut Owner) -> Running<'a, ()> + Send + 'static,
    ) -> Result<T> {
        let (answer, result) = oneshot::channel();
        let operation: Operation = Box::new(move |owner| {
            Box::pin(async move {
                if answer.is_closed() {
                    return;
                }
                let made = operation(owner).await;
                if let Err(Ok(_)) = answer.send(made) {
                    undo(owner).await;
                }
            })
        });
        self.ask(operation, result).await
    }

    async fn ask<T>(&self, operation: Operation, result: oneshot::Receiver<Result<T>>) -> Result<T> {
        let gone = || Error::NotFound(format!("no pod {}", self.id));
        self.operations.send(operation).await.map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }
}

enum Entry {
    Starting(PodIdentity),
    Started(Pod),
}

/// All pods by id. Cheap to clone; every clone is the same table.
#[derive(Clone, Default)]
pub(super) struct Table(Arc<Mutex<BTreeMap<String, Entry>>>);

impl Table {
    /// What is behind the lock is whole at every moment, so that a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a name for a pod that is about to be made. A pod without a name shares it with nobody.
    pub(super) fn reserve(&self, id: &str, identity: &PodIdentity) -> Result<()> {
        let mut entries = self.lock();
        let taken = |entry: &Entry| match entry {
            Entry::Starting(other) => other == identity,
            Entry::Started(pod) => pod.status.borrow().spec.identity == *identity,
        };
        if !identity.name.is_empty() && entries.values().any(taken) {
            let PodIdentity { name, namespace, attempt, .. } = identity;
            let text = format!("pod {namespace}/{name} (attempt {attempt}) is there already: remove it first");
            return Err(Error::AlreadyExists(text));
        }
        entries.insert(id.into(), Entry::Starting(identity.clone()));
        Ok(())
    }

    pub(super) fn remove(&self, id: &str) {
        self.lock().remove(id);
    }

    /// Lets a pod's owner run, until the pod is removed.
    pub(super) fn adopt(&self, owner: Owner) {
        let (operations, inbox) = mpsc::channel(QUEUE);
        let id: Arc<str> = owner.record.id.as_str().into();
        let pod = Pod { id: Arc::clone(&id), operations, status: owner.watch() };
        self.lock().insert(id.to_string(), Entry::Started(pod));
        let table = self.clone();
        let span = owner.record.span();
        let work = async move {
            owner.run(inbox).await;
            table.remove(&id);
        };
        tokio::spawn(work.instrument(span));
    }

    /// A pod that has been started, by its id or a prefix that no other has.
    pub(super) fn pod(&self, id: &str) -> Result<Pod> {
        let entries = self.lock();
        let pods = entries.iter().filter_map(|(key, entry)| match entry {
            Entry::Started(pod) => Some((key.as_str(), pod)),
            Entry::Starting(_) => None,
        });
        only(pods, id, "pod").cloned()
    }

    /// A container and its pod, by the container's id or a prefix that no other has.
    pub(super) fn container(&self, id: &str) -> Result<(Pod, ContainerStatus)> {
        let all: Vec<(Pod, Arc<PodStatus>)> =
            self.started().into_iter().map(|pod| (pod.clone(), pod.status())).collect();
        let containers = all.iter().flat_map(|(pod, status)| {
            status.containers.iter().map(move |(key, container)| (key.as_str(), (pod, container)))
        });
        only(containers, id, "container").map(|(pod, container)| (pod.clone(), container.clone()))
    }

    pub(super) fn statuses(&self) -> Vec<Arc<PodStatus>> {
        self.started().iter().map(Pod::status).collect()
    }

    fn started(&self) -> Vec<Pod> {
        let entries = self.lock();
        let started = entries.values().filter_map(|entry| match entry {
            Entry::Started(pod) => Some(pod.clone()),
            Entry::Starting(_) => None,
        });
        started.collect()
    }
}

/// The one whose key is `id`, or the only one whose key begins with it.
fn only<'a, T>(all: impl Iterator<Item = (&'a str, T)>, id: &str, kind: &str) -> Result<T> {
    let mut found = None;
    for (key, value) in all {
        if key == id {
            return Ok(value);
        }
        if !id.is_empty() && key.starts_with(id) && found.replace(value).is_some() {
            return Err(Error::InvalidArgument(format!("more than one {kind} begins with {id}: give more of its id")));
        }
    }
    found.ok_or_else(|| Error::NotFound(format!("no {kind} {id}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_may_be_cut_where_it_stays_clear() {
        let all = || [("ab12", 1), ("ab34", 2), ("cd", 3), ("cdef", 4)].into_iter();
        assert_eq!(only(all(), "ab1", "pod"), Ok(1));
        assert_eq!(only(all(), "cd", "pod"), Ok(3), "the whole id wins");
        assert!(matches!(only(all(), "ab", "pod"), Err(Error::InvalidArgument(_))));
        assert!(matches!(only(all(), "", "pod"), Err(Error::NotFound(_))));
        assert!(matches!(only(all(), "x", "pod"), Err(Error::NotFound(_))));
    }

    #[test]
    fn a_name_is_taken_until_it_is_given_back() {
        let table = Table::default();
        let identity = PodIdentity { name: "web".into(), ..PodIdentity::default() };
        table.reserve("1", &identity).expect("is free");
        assert!(matches!(table.reserve("2", &identity), Err(Error::AlreadyExists(_))));
        table.reserve("3", &PodIdentity { attempt: 1, ..identity.clone() }).expect("another attempt");
        table.remove("1");
        table.reserve("4", &identity).expect("is free again");
        assert!(table.statuses().is_empty(), "a pod that is being started is not shown");
    }
}
