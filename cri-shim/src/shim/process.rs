//! A process as containerd sees it, a container's first or one beside it: where its streams lead and how far it is.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

use crate::agent::Session;
use crate::clock;
use crate::error::{Error, Result};
use crate::spec::ProcessSpec;
use crate::streaming::stdio::{Order, Pump, Streams};

/// How long the rest of a process's output may take to be taken, once it has ended.
const OUTPUT_LIMIT: Duration = Duration::from_secs(10);

/// How far a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Created,
    Running,
    Paused,
    Exited(Exit),
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exit {
    /// Exit status, or 128 + signal.
    pub(super) code: i32,
    /// `CLOCK_REALTIME` in nanoseconds.
    pub(super) at_ns: i64,
}

impl Exit {
    pub(super) fn now(code: i32) -> Self {
        Self { code, at_ns: clock::realtime_ns() }
    }

    /// The code as containerd has it.
    pub(super) fn status(self) -> u32 {
        self.code.cast_unsigned()
    }

    /// The time as containerd has it.
    pub(super) fn at(self) -> MessageField<Timestamp> {
        Some(timestamp(self.at_ns)).into()
    }
}

/// `CLOCK_REALTIME` in nanoseconds as containerd writes it.
pub(super) fn timestamp(at_ns: i64) -> Timestamp {
    let (seconds, nanos) = (at_ns.div_euclid(1_000_000_000), at_ns.rem_euclid(1_000_000_000));
    Timestamp { seconds, nanos: i32::try_from(nanos).unwrap_or(0), ..Timestamp::default() }
}

/// A process.
#[derive(Debug)]
pub(super) struct Process {
    /// By which events name it: the task's own for its first.
    pub(super) id: String,
    /// What it is to be, if it is one beside the first.
    pub(super) exec: Option<ProcessSpec>,
    pub(super) streams: Streams,
    life: watch::Sender<Life>,
    /// While it has a session.
    pump: Mutex<Option<Arc<Pump>>>,
}

impl Process {
    pub(super) fn new(id: String, exec: Option<ProcessSpec>, streams: Streams) -> Self {
        Self { id, exec, streams, life: watch::Sender::new(Life::Created), pump: Mutex::default() }
    }

    pub(super) fn life(&self) -> Life {
        *self.life.borrow()
    }

    /// Takes the next step of its life; whether it had not ended already.
    pub(super) fn step(&self, life: Life) -> bool {
        self.life.send_if_modified(|now| {
            let live = !matches!(now, Life::Exited(_));
            if live {
                *now = life;
            }
            live
        })
    }

    /// Waits for its end.
    pub(super) async fn wait(&self) -> Exit {
        let mut life = self.life.subscribe();
        loop {
            if let Life::Exited(exit) = *life.borrow_and_update() {
                return exit;
            }
            // The sender lives as long as this.
            let _ = life.changed().await;
        }
    }

    /// How it ended, for one that is to be forgotten.
    pub(super) fn over(&self) -> Result<Exit> {
        match self.life() {
            Life::Exited(exit) => Ok(exit),
            Life::Created => Ok(Exit::now(0)),
            Life::Running | Life::Paused => {
                Err(Error::FailedPrecondition(format!("process {} runs: kill it first", self.id)))
            }
        }
    }

    /// Connects its session with its streams.
    pub(super) async fn connect(&self, session: Session, namespace: &str) -> Result<Arc<Pump>> {
        let pump = Arc::new(Pump::start(session, &self.streams, namespace, &self.id).await?);
        *self.lock() = Some(Arc::clone(&pump));
        Ok(pump)
    }

    pub(super) async fn order(&self, order: Order) -> Result<()> {
        let pump = self.pump().ok_or_else(|| Error::FailedPrecondition("the process does not run".into()))?;
        pump.order(order).await;
        Ok(())
    }

    /// Output that nobody takes shall not hold up its end.
    pub(super) fn killed(&self) {
        if let Some(pump) = self.pump() {
            pump.killed();
        }
    }

    /// Waits until the rest of its output has been taken, or for a while.
    pub(super) async fn finish(&self) {
        if let Some(pump) = self.pump()
            && tokio::time::timeout(OUTPUT_LIMIT, pump.ended()).await.is_err()
        {
            pump.killed();
        }
    }

    fn pump(&self) -> Option<Arc<Pump>> {
        self.lock().clone()
    }

    /// What is behind the lock is whole at every moment.
    fn lock(&self) -> MutexGuard<'_, Option<Arc<Pump>>> {
        self.pump.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
