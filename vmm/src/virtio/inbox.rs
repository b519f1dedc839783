//! Questions from the control thread to a device's thread: a bounded channel, an eventfd that wakes the thread from
//! its epoll, and one answer per question.
//!
//! The device answers in [`super::device::Backend::idle`] as well as in `run`, so a question never waits for a driver.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::time::Duration;

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Most questions waiting; whoever asks one more waits for room.
const QUESTIONS: usize = 16;

/// Longest wait for an answer. A device answers between two requests of the guest, so only a host disk that hangs
/// for as long can exceed it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why a question has no answer.
#[derive(Debug, Error)]
pub enum AskError {
    /// The device's thread has ended.
    #[error("the device has ended")]
    Ended,
    /// The device is stuck in the host.
    #[error("the device did not answer in {} s; check the host's disks, then ask for the state", PATIENCE.as_secs())]
    Stuck,
    /// The device's thread cannot be woken.
    #[error("cannot wake the device's thread")]
    Wake(#[from] io::Error),
}

struct Envelope<Q, A> {
    question: Q,
    answer: SyncSender<A>,
}

/// The asking end.
pub struct Asker<Q, A> {
    questions: SyncSender<Envelope<Q, A>>,
    wake: Arc<EventFd>,
}

// Not derived: that would ask Q and A to be Clone.
impl<Q, A> Clone for Asker<Q, A> {
    fn clone(&self) -> Self {
        Self { questions: self.questions.clone(), wake: Arc::clone(&self.wake) }
    }
}

impl<Q, A> Asker<Q, A> {
    /// Asks, and waits for the answer.
    pub fn ask(&self, question: Q) -> Result<A, AskError> {
        let (answer, receiver) = sync_channel(1);
        self.questions.send(Envelope { question, answer }).map_err(|_| AskError::Ended)?;
        self.wake.write(1)?;
        receiver.recv_timeout(PATIENCE).map_err(|error| match error {
            std::sync::mpsc::RecvTimeoutError::Timeout => AskError::Stuck,
            std::sync::mpsc::RecvTimeoutError::Disconnected => AskError::Ended,
        })
    }
}

/// The answering end; watch it in an epoll, it is readable while questions wait.
pub struct Inbox<Q, A> {
    questions: Receiver<Envelope<Q, A>>,
    wake: Arc<EventFd>,
}

impl<Q, A> Inbox<Q, A> {
    /// Both ends of a new inbox.
    pub fn new() -> io::Result<(Asker<Q, A>, Self)> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let (sender, questions) = sync_channel(QUESTIONS);
        Ok((Asker { questions: sender, wake: Arc::clone(&wake) }, Self { questions, wake }))
    }

    /// Answers every question that waits.
    pub fn answer_all(&self, mut answer: impl FnMut(Q) -> A) {
        // The wake-up is taken back before the questions are: one that comes in between wakes the thread again.
        let _count = self.wake.read();
        loop {
            match self.questions.try_recv() {
                // An asker that lost its patience is not there to be told.
                Ok(envelope) => drop(envelope.answer.send(answer(envelope.question))),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            }
        }
    }
}

impl<Q, A> AsRawFd for Inbox<Q, A> {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::virtio::poller::{Poller, Wait};
    use vmm_sys_util::epoll::EventSet;

    #[test]
    fn each_question_gets_its_own_answer() {
        let (asker, inbox) = Inbox::<u32, u32>::new().unwrap();
        let askers: Vec<_> = (0..40)
            .map(|n| {
                let asker = asker.clone();
                thread::spawn(move || asker.ask(n).unwrap())
            })
            .collect();
        let mut poller = Poller::new().unwrap();
        poller.add(&inbox, EventSet::IN, 0).unwrap();
        let mut answered = 0;
        while answered < 40 {
            let _woken = poller.wait(Wait::Block).unwrap();
            inbox.answer_all(|n| {
                answered += 1;
                n * 2
            });
        }
        let answers: Vec<_> = askers.into_iter().map(|asker| asker.join().unwrap()).collect();
        assert_eq!(answers, (0..40).map(|n| n * 2).collect::<Vec<_>>());
    }

    #[test]
    fn a_device_that_ended_is_told_apart() {
        let (asker, inbox) = Inbox::<(), ()>::new().unwrap();
        drop(inbox);
        assert!(matches!(asker.ask(()), Err(AskError::Ended)));
    }

    #[test]
    fn a_device_that_ends_with_a_question_open_is_told_apart() {
        let (asker, inbox) = Inbox::<(), ()>::new().unwrap();
        let waiting = thread::spawn(move || asker.ask(()));
        let mut poller = Poller::new().unwrap();
        poller.add(&inbox, EventSet::IN, 0).unwrap();
        let _woken = poller.wait(Wait::Block).unwrap();
        drop(inbox);
        assert!(matches!(waiting.join().unwrap(), Err(AskError::Ended)));
    }
}
