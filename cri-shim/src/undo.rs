//! The one way in which what was made is unmade: a stack of named steps, run last first, or disarmed on success.
//!
//! A step is written before the thing it undoes is made, and so must do nothing when there is nothing to undo.
//! Nothing here depends on unwinding or on destructors: whoever holds the stack runs it or disarms it.

use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use crate::error::{Error, Result};

/// Longest time for one step; a CNI plugin may wait for a remote service.
const STEP_LIMIT: Duration = Duration::from_secs(90);

/// Steps that undo what was done so far.
#[must_use = "run it or disarm it"]
#[derive(Default)]
pub(crate) struct Undo {
    steps: Vec<Step>,
}

struct Step {
    name: &'static str,
    action: Pin<Box<dyn Future<Output = Result<()>> + Send>>,
}

impl Undo {
    /// Nothing to undo.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Puts a step on top. `name` says what is undone, such as `cgroup`; the future is not polled before [`Undo::run`].
    pub(crate) fn push(&mut self, name: &'static str, action: impl Future<Output = Result<()>> + Send + 'static) {
        self.steps.push(Step { name, action: Box::pin(action) });
    }

    /// What was made stays.
    pub(crate) fn disarm(self) {}

    /// Runs every step, the last first, also those after one that fails; returns the first failure.
    pub(crate) async fn run(self) -> Result<()> {
        let mut result = Ok(());
        for Step { name, action } in self.steps.into_iter().rev() {
            let done = tokio::time::timeout(STEP_LIMIT, action)
                .await
                .unwrap_or_else(|_| Err(Error::DeadlineExceeded(format!("not done after {} s", STEP_LIMIT.as_secs()))));
            if let Err(error) = done {
                tracing::warn!(step = name, %error, "clean-up failed");
                result = result.and(Err(error.context(format_args!("cleaning up ({name})"))));
            }
        }
        result
    }
}

impl fmt::Debug for Undo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.steps.iter().map(|step| step.name)).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn noted(
        notes: &Arc<Mutex<Vec<u32>>>,
        number: u32,
        result: Result<()>,
    ) -> impl Future<Output = Result<()>> + use<> {
        let notes = Arc::clone(notes);
        async move {
            notes.lock().expect("not poisoned").push(number);
            result
        }
    }

    #[tokio::test]
    async fn runs_last_first_and_goes_on_after_a_failure() {
        let notes = Arc::default();
        let mut undo = Undo::new();
        undo.push("first", noted(&notes, 1, Ok(())));
        undo.push("second", noted(&notes, 2, Err(Error::Internal("busy".into()))));
        undo.push("third", noted(&notes, 3, Err(Error::NotFound("gone".into()))));
        let error = undo.run().await.expect_err("two steps fail");
        assert_eq!(error, Error::NotFound("cleaning up (third): gone".into()));
        assert_eq!(*notes.lock().expect("not poisoned"), [3, 2, 1]);
    }

    #[tokio::test]
    async fn disarmed_it_does_nothing() {
        let notes = Arc::default();
        let mut undo = Undo::new();
        undo.push("only", noted(&notes, 1, Ok(())));
        undo.disarm();
        assert!(notes.lock().expect("not poisoned").is_empty());
    }
}
