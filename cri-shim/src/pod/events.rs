//! What happens to pods and containers, for whoever wants to be told rather than ask: the difference between two
//! statuses of a pod. Nobody is waited for; who listens too slowly loses the thread and is told so.

use std::sync::Arc;

use tokio::sync::broadcast;

use super::{ContainerState, PodStatus};
use crate::clock;

/// Events that a listener may be behind.
const BACKLOG: usize = 4096;

/// What happened (CRI ContainerEventType).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// It is there.
    Created,
    /// It runs.
    Started,
    /// It has ended.
    Stopped,
    /// It is gone.
    Deleted,
}

/// Something that happened to a container, or to a pod as a whole.
#[derive(Clone, Debug)]
pub struct Event {
    /// The container, or the pod itself.
    pub id: String,
    /// What.
    pub kind: EventKind,
    /// `CLOCK_REALTIME` in nanoseconds.
    pub at_ns: i64,
    /// The pod as it is from then on.
    pub pod: Arc<PodStatus>,
}

/// Where events are told.
#[derive(Debug)]
pub(super) struct Events(broadcast::Sender<Event>);

impl Events {
    pub(super) fn new() -> Self {
        Self(broadcast::Sender::new(BACKLOG))
    }

    pub(super) fn listen(&self) -> broadcast::Receiver<Event> {
        self.0.subscribe()
    }

    /// Tells what has changed.
    pub(super) fn tell(&self, before: &PodStatus, now: &Arc<PodStatus>) {
        for (id, kind) in differences(before, now) {
            self.tell_one(id, kind, now);
        }
    }

    pub(super) fn tell_one(&self, id: String, kind: EventKind, pod: &Arc<PodStatus>) {
        // Nobody listens, most of the time.
        let _ = self.0.send(Event { id, kind, at_ns: clock::realtime_ns(), pod: Arc::clone(pod) });
    }
}

fn differences(before: &PodStatus, now: &PodStatus) -> Vec<(String, EventKind)> {
    let mut found = Vec::new();
    for (id, container) in &now.containers {
        let then = before.containers.get(id).map(|container| container.state);
        if then.is_none() {
            found.push((id.clone(), EventKind::Created));
        }
        let had_run = matches!(then, Some(ContainerState::Running | ContainerState::Exited));
        if !had_run && container.started_at_ns != 0 {
            found.push((id.clone(), EventKind::Started));
        }
        if container.state == ContainerState::Exited && then != Some(ContainerState::Exited) {
            found.push((id.clone(), EventKind::Stopped));
        }
    }
    let deleted = before.containers.keys().filter(|id| !now.containers.contains_key(*id));
    found.extend(deleted.map(|id| (id.clone(), EventKind::Deleted)));
    if before.vmm_pid.is_some() && now.vmm_pid.is_none() {
        found.push((now.id.clone(), EventKind::Stopped));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::owner::status;
    use crate::record::tests::record;
    use crate::record::{Life, Phase};

    fn with(life: Option<Life>) -> PodStatus {
        let mut record = record();
        record.phase = Phase::Running;
        match life {
            Some(life) => record.containers.get_mut("c").expect("is there").life = life,
            None => record.containers.clear(),
        }
        status(&record, "")
    }

    fn kinds(before: Option<Life>, now: Option<Life>) -> Vec<EventKind> {
        differences(&with(before), &with(now)).into_iter().map(|(_, kind)| kind).collect()
    }

    #[test]
    fn a_containers_life_is_told_step_by_step() {
        let running = || Some(Life::Running { started_at_ns: 3 });
        let exited = |started_at_ns| {
            let (reason, message) = (String::new(), String::new());
            Some(Life::Exited { started_at_ns, finished_at_ns: 4, code: 0, reason, message })
        };
        assert_eq!(kinds(None, Some(Life::Created)), [EventKind::Created]);
        assert_eq!(kinds(Some(Life::Created), running()), [EventKind::Started]);
        assert_eq!(kinds(running(), exited(3)), [EventKind::Stopped]);
        assert_eq!(kinds(Some(Life::Created), exited(3)), [EventKind::Started, EventKind::Stopped]);
        assert_eq!(kinds(exited(3), None), [EventKind::Deleted]);
        assert!(kinds(running(), running()).is_empty());
    }
}
