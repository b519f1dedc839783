//! A process as containerd sees it, a container's first or one beside it: where its streams lead and how far it is.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::stdio::{Order, Pump, Streams};
use crate::agent::Session;
use crate::clock;
use crate::error::{Error, Result};

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
}

/// A process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) streams: Streams,
    life: watch::Sender<Life>,
    /// While it has a session.
    pump: Mutex<Option<Arc<Pump>>>,
}

impl Process {
    pub(super) fn new(streams: Streams) -> Self {
        Self { streams, life: watch::Sender::new(Life::Created), pump: Mutex::default() }
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

    /// Connects its session with its streams.
    pub(super) fn connect(&self, session: Session) -> Result<Arc<Pump>> {
        let pump = Arc::new(Pump::start(session, &self.streams)?);
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
