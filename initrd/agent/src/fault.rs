//! How a failure is told to the host: what kind it is, and a sentence.

use agent_protocol::v1::Error;
use agent_protocol::v1::error::Kind;

use crate::cgroup::CgroupError;
use crate::configure::ConfigureError;
use crate::disk::DiskError;
use crate::files::FilesError;
use crate::mounts::MountError;
use crate::plan::PlanError;
use crate::process::ProcessError;
use crate::userns::UserSpaceError;

/// A refusal.
#[derive(Debug)]
pub(crate) struct Fault(Kind, String);

impl Fault {
    pub(crate) fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self(kind, text.into())
    }

    pub(crate) fn no_container(id: &str) -> Self {
        Self(Kind::NotFound, format!("there is no container {id}"))
    }

    pub(crate) fn wrong_state(text: impl Into<String>) -> Self {
        Self(Kind::WrongState, text.into())
    }

    /// What a process said when it gave up.
    pub(crate) fn not_started(cannot_exec: bool, text: String) -> Self {
        Self(if cannot_exec { Kind::CannotExec } else { Kind::Internal }, text)
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Self { kind: fault.0.into(), message: fault.1 }
    }
}

macro_rules! told_as {
    ($($source:ty => $kind:expr),* $(,)?) => {
        $(impl From<$source> for Fault {
            fn from(source: $source) -> Self {
                let mut text = source.to_string();
                // A sentence that already holds its cause is not given it twice.
                let mut cause = std::error::Error::source(&source);
                while let Some(next) = cause {
                    let next_text = next.to_string();
                    if !text.contains(&next_text) {
                        text = format!("{text}: {next_text}");
                    }
                    cause = next.source();
                }
                Self($kind, text)
            }
        })*
    };
}

told_as! {
    CgroupError => Kind::Internal,
    ConfigureError => Kind::Invalid,
    DiskError => Kind::Internal,
    FilesError => Kind::Invalid,
    MountError => Kind::Internal,
    PlanError => Kind::Invalid,
    ProcessError => Kind::Internal,
    UserSpaceError => Kind::Invalid,
    std::io::Error => Kind::Internal,
}
