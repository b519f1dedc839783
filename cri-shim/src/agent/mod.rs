//! The daemon's side of a pod's agent: requests with an answer each, notices unasked, and sessions.
//!
//! One task owns the control connection. It pings, and when the agent stays silent or the connection breaks it says
//! so and connects anew until its owner lets go of it. What the agent says is a guest's word: it changes the state of
//! its own pod and nothing else.

mod link;
mod session;

use std::collections::HashMap;
use std::time::Duration;

use agent_protocol::{CONTROL_PORT, v1};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::error::{Error, Result};
use crate::pod_dir::PodDir;
use link::Link;

pub use session::{Session, SessionOutput, SessionReader, SessionWriter};
pub(crate) use v1::reply::Result as Answer;
pub(crate) use v1::request::Call;

/// Between two pings.
const PING_EVERY: Duration = Duration::from_secs(5);

/// Pings without a word from the agent before it counts as silent.
const PINGS_MISSED: u32 = 3;

/// Longest wait for one new connection.
const RECONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Between two tries to connect anew.
const RECONNECT_EVERY: Duration = Duration::from_secs(1);

/// Requests that may wait to be sent, and notices to be read.
const QUEUE: usize = 64;

/// Requests that may wait for their answer.
const PENDING: usize = 1024;

/// Request ids of the task itself: their answers have no caller.
const PING_ID: u64 = 0;
const STATE_ID: u64 = 1;
const FIRST_ID: u64 = 2;

/// What an agent says unasked.
#[derive(Debug)]
pub(crate) enum Notice {
    /// A container's first process has ended.
    Exited(v1::ContainerExited),
    /// It answers (again), and this is how things stand.
    State(v1::PodState),
    /// It does not answer; says why.
    Silent(String),
}

struct Question {
    call: Call,
    answer: oneshot::Sender<Result<Answer>>,
}

/// A pod's agent. The task behind it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Agent {
    questions: mpsc::Sender<Question>,
}

impl Agent {
    /// Connects; also returns the guest's `uname -r` and where the agent's notices arrive.
    pub(crate) async fn connect(dir: PodDir, limit: Duration) -> Result<(Self, String, mpsc::Receiver<Notice>)> {
        let (link, kernel) = Link::open(&dir, CONTROL_PORT, limit).await?;
        let (agent, notices) = Self::start(dir, Some(link));
        Ok((agent, kernel, notices))
    }

    /// Like [`Agent::connect`] without waiting: a first notice tells how it went.
    pub(crate) fn reconnect(dir: PodDir) -> (Self, mpsc::Receiver<Notice>) {
        Self::start(dir, None)
    }

    fn start(dir: PodDir, link: Option<Link>) -> (Self, mpsc::Receiver<Notice>) {
        let (questions, inbox) = mpsc::channel(QUEUE);
        let (notices, received) = mpsc::channel(QUEUE);
        tokio::spawn(Conversation { dir, inbox, notices }.run(link));
        (Self { questions }, received)
    }

    /// Asks, and waits for the answer at most `limit`. A refusal is an error.
    pub(crate) async fn ask(&self, call: Call, limit: Duration) -> Result<Answer> {
        let (answer, result) = oneshot::channel();
        let name = name_of(&call);
        let gone = || Error::Unavailable("the agent is gone".into());
        let exchange = async {
            self.questions.send(Question { call, answer }).await.map_err(|_| gone())?;
            result.await.map_err(|_| gone())?
        };
        match tokio::time::timeout(limit, exchange).await {
            Ok(Ok(Answer::Error(error))) => Err(refusal(error)),
            Ok(result) => result,
            Err(_) => {
                Err(Error::DeadlineExceeded(format!("the agent did not answer {name} within {} s", limit.as_secs())))
            }
        }
    }

    /// Asks for something whose answer is only that it is done.
    pub(crate) async fn tell(&self, call: Call, limit: Duration) -> Result<()> {
        match self.ask(call, limit).await? {
            Answer::Done(_) => Ok(()),
            _ => Err(Error::Unavailable("the agent gave an answer that does not fit".into())),
        }
    }
}

/// The agent's refusal as the core's error.
fn refusal(error: v1::Error) -> Error {
    use v1::error::Kind;
    let kind = error.kind();
    let message = error.message;
    match kind {
        Kind::Internal => Error::Internal(format!("the agent: {message}")),
        Kind::NotFound => Error::NotFound(message),
        Kind::AlreadyExists => Error::AlreadyExists(message),
        Kind::WrongState => Error::FailedPrecondition(message),
        Kind::CannotExec | Kind::Invalid => Error::InvalidArgument(message),
    }
}

fn name_of(call: &Call) -> &'static str {
    match call {
        Call::Configure(_) => "Configure",
        Call::CreateContainer(_) => "CreateContainer",
        Call::StartContainer(_) => "StartContainer",
        Call::SignalContainer(_) => "SignalContainer",
        Call::RemoveContainer(_) => "RemoveContainer",
        Call::GetState(_) => "GetState",
        Call::Ping(_) => "Ping",
        Call::PowerOff(_) => "PowerOff",
        Call::ReopenLog(_) => "ReopenLog",
        Call::UpdateContainer(_) => "UpdateContainer",
        Call::GetStats(_) => "GetStats",
        Call::UpdatePod(_) => "UpdatePod",
        Call::UpdateFiles(_) => "UpdateFiles",
    }
}

/// The task that owns the control connection.
struct Conversation {
    dir: PodDir,
    inbox: mpsc::Receiver<Question>,
    notices: mpsc::Sender<Notice>,
}

impl Conversation {
    /// Ends when the [`Agent`] or the receiver of its notices is dropped.
    async fn run(mut self, mut link: Option<Link>) {
        loop {
            let broken = match link.take() {
                Some(link) => self.converse(link).await,
                None => None,
            };
            if self.inbox.is_closed() && self.inbox.is_empty() {
                return;
            }
            if let Some(error) = broken
                && self.notices.send(Notice::Silent(error.to_string())).await.is_err()
            {
                return;
            }
            match self.connect_anew().await {
                Some(connected) => link = Some(connected),
                None => return,
            }
        }
    }

    /// Talks until the connection breaks, and says why; `None` when nobody is interested any more.
    async fn converse(&mut self, mut link: Link) -> Option<Error> {
        let mut pending: HashMap<u64, oneshot::Sender<Result<Answer>>> = HashMap::new();
        let (mut next_id, mut missed) = (FIRST_ID, 0);
        let mut ticks = interval_at(Instant::now() + PING_EVERY, PING_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let error = loop {
            let done = tokio::select! {
                question = self.inbox.recv() => {
                    let Question { call, answer } = question?;
                    if pending.len() >= PENDING {
                        let _ = answer.send(Err(Error::ResourceExhausted("too many requests to one agent".into())));
                        continue;
                    }
                    let id = next_id;
                    next_id = next_id.wrapping_add(1).max(FIRST_ID);
                    pending.insert(id, answer);
                    request(&mut link, &mut pending, id, call).await
                }
                message = link.next::<v1::FromAgent>() => match message {
                    Ok(Some(message)) => {
                        missed = 0;
                        self.heard(message, &mut pending).await?;
                        Ok(())
                    }
                    Ok(None) => Err(Error::Unavailable("the agent closed the connection".into())),
                    Err(error) => Err(error),
                },
                _ = ticks.tick() => {
                    missed += 1;
                    if missed > PINGS_MISSED {
                        Err(Error::Unavailable("the agent does not answer".into()))
                    } else {
                        request(&mut link, &mut pending, PING_ID, Call::Ping(v1::Ping {})).await
                    }
                }
            };
            if let Err(error) = done {
                break error;
            }
        };
        for (_, answer) in pending {
            let _ = answer.send(Err(error.clone()));
        }
        Some(error)
    }

    /// Passes on what the agent said; `None` when nobody is interested any more.
    async fn heard(
        &self,
        message: v1::FromAgent,
        pending: &mut HashMap<u64, oneshot::Sender<Result<Answer>>>,
    ) -> Option<()> {
        use v1::from_agent::Message;
        match message.message {
            Some(Message::ContainerExited(exited)) => self.notices.send(Notice::Exited(exited)).await.ok(),
            Some(Message::Reply(v1::Reply { id: STATE_ID, result: Some(Answer::State(state)) })) => {
                self.notices.send(Notice::State(state)).await.ok()
            }
            Some(Message::Reply(v1::Reply { id, result })) => {
                let empty = || Error::Unavailable("the agent sent an empty answer".into());
                // A caller whose limit is over has gone away.
                if let Some(answer) = pending.remove(&id) {
                    let _ = answer.send(result.ok_or_else(empty));
                }
                Some(())
            }
            None => Some(()),
        }
    }

    /// Tries until it works, refusing questions meanwhile; `None` when nobody is interested any more.
    async fn connect_anew(&mut self) -> Option<Link> {
        loop {
            let mut attempt = std::pin::pin!(Link::open(&self.dir, CONTROL_PORT, RECONNECT_LIMIT));
            let result = loop {
                tokio::select! {
                    result = &mut attempt => break result,
                    question = self.inbox.recv() => refuse(question?),
                }
            };
            let error = match result {
                Ok((mut link, _)) => {
                    let call = Some(Call::GetState(v1::GetState {}));
                    match link.send(&v1::Request { id: STATE_ID, call }).await {
                        Ok(()) => return Some(link),
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            self.notices.send(Notice::Silent(error.to_string())).await.ok()?;
            let mut pause = std::pin::pin!(tokio::time::sleep(RECONNECT_EVERY));
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    question = self.inbox.recv() => refuse(question?),
                }
            }
        }
    }
}

fn refuse(question: Question) {
    let _ = question.answer.send(Err(Error::Unavailable("the agent does not answer".into())));
}

/// Sends one request. What the agent would not take is its caller's error; any other breaks the connection.
async fn request(
    link: &mut Link,
    pending: &mut HashMap<u64, oneshot::Sender<Result<Answer>>>,
    id: u64,
    call: Call,
) -> Result<()> {
    match link.send(&v1::Request { id, call: Some(call) }).await {
        Err(error @ Error::InvalidArgument(_)) => {
            if let Some(answer) = pending.remove(&id) {
                let _ = answer.send(Err(error));
            }
            Ok(())
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_keeps_its_kind() {
        let error = |kind: v1::error::Kind| refusal(v1::Error { kind: kind.into(), message: "m".into() });
        assert_eq!(error(v1::error::Kind::NotFound), Error::NotFound("m".into()));
        assert_eq!(error(v1::error::Kind::CannotExec), Error::InvalidArgument("m".into()));
        assert!(matches!(error(v1::error::Kind::Internal), Error::Internal(_)));
        let unknown = refusal(v1::Error { kind: 99, message: "m".into() });
        assert!(matches!(unknown, Error::Internal(_)), "an agent may be newer");
    }
}
