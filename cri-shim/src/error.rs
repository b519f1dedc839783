//! The core's one error: its kind is what a caller acts on, its text what a user reads.
//!
//! A text says what failed and, where the user can do something, what to do. It is complete: nothing is to be read
//! from a chain behind it.

use std::fmt::Display;

use thiserror::Error;

/// The result of what the core is asked.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the core did not do what it was asked, by what the caller can do about it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// The pod, container, image or file named is not there.
    #[error("{0}")]
    NotFound(String),
    /// A pod or container of that name is there already.
    #[error("{0}")]
    AlreadyExists(String),
    /// The request can never work as it is.
    #[error("{0}")]
    InvalidArgument(String),
    /// The request does not fit the present state.
    #[error("{0}")]
    FailedPrecondition(String),
    /// A limit of time is over.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// Memory, disk space, processes or some other limit is used up.
    #[error("{0}")]
    ResourceExhausted(String),
    /// Something that the request needs does not work at present.
    #[error("{0}")]
    Unavailable(String),
    /// The fault is the runtime's or the host's.
    #[error("{0}")]
    Internal(String),
}

impl Error {
    /// The same kind of error with more said before its text.
    pub fn context(self, what: impl Display) -> Self {
        self.map(|text| format!("{what}: {text}"))
    }

    fn map(self, say: impl FnOnce(String) -> String) -> Self {
        match self {
            Self::NotFound(text) => Self::NotFound(say(text)),
            Self::AlreadyExists(text) => Self::AlreadyExists(say(text)),
            Self::InvalidArgument(text) => Self::InvalidArgument(say(text)),
            Self::FailedPrecondition(text) => Self::FailedPrecondition(say(text)),
            Self::DeadlineExceeded(text) => Self::DeadlineExceeded(say(text)),
            Self::ResourceExhausted(text) => Self::ResourceExhausted(say(text)),
            Self::Unavailable(text) => Self::Unavailable(say(text)),
            Self::Internal(text) => Self::Internal(say(text)),
        }
    }

    /// The same kind of error with more said behind its text, if there is more.
    pub fn context_end(self, what: &str) -> Self {
        if what.is_empty() { self } else { self.map(|text| format!("{text}: {what}")) }
    }

    /// An error of the operating system: a full disk or table is the caller's to know, all else is internal.
    pub fn io(what: impl Display, error: &std::io::Error) -> Self {
        let text = format!("{what}: {error}");
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN) => {
                Self::ResourceExhausted(text)
            }
            _ => Self::Internal(text),
        }
    }
}

/// Says what was being done when the operating system failed.
pub(crate) trait IoContext<T> {
    /// `what` comes before the system's own text.
    fn doing<D: Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn doing<D: Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| Error::io(what(), &error.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_keeps_the_kind() {
        let error = Error::NotFound("no image x".into()).context("container c");
        assert_eq!(error, Error::NotFound("container c: no image x".into()));
    }

    #[test]
    fn a_full_disk_is_told_from_a_fault() {
        let full = std::io::Error::from_raw_os_error(libc::ENOSPC);
        assert!(matches!(Error::io("writing", &full), Error::ResourceExhausted(_)));
        let fault = std::io::Error::from_raw_os_error(libc::EIO);
        assert!(matches!(Error::io("writing", &fault), Error::Internal(_)));
    }
}
