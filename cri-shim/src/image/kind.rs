//! What a caller can do about each error of images.

use super::registry::Error as Registry;
use super::store::Error;

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        kind(&error)(text(&error))
    }
}

fn kind(error: &Error) -> fn(String) -> crate::Error {
    match error {
        Error::Reference(_) | Error::Unpack(..) | Error::Import(_) => crate::Error::InvalidArgument,
        Error::Pull(_, error) => match error {
            Registry::NotFound { .. } => crate::Error::NotFound,
            Registry::Denied { .. } | Registry::Ca(..) | Registry::Mirror(_) | Registry::Client(_) => {
                crate::Error::FailedPrecondition
            }
            Registry::BadAuth | Registry::Manifest(..) | Registry::TooLarge(..) => crate::Error::InvalidArgument,
            Registry::Unreachable(..)
            | Registry::Stalled(..)
            | Registry::Broken(..)
            | Registry::Status(..)
            | Registry::Reply(..)
            | Registry::Mismatch(..) => crate::Error::Unavailable,
            Registry::RateLimited(_) => crate::Error::ResourceExhausted,
            Registry::Write(_) => crate::Error::Internal,
        },
        Error::Signature(..) | Error::Policy(_) => crate::Error::FailedPrecondition,
        Error::DiskFull(..) => crate::Error::ResourceExhausted,
        Error::Io(..) => crate::Error::Internal,
        Error::Ending => crate::Error::Unavailable,
        Error::Shared(error) => kind(error),
    }
}

impl Error {
    /// The result of a pull in one of a few words, to count by.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Pull(_, error) => match error {
                Registry::NotFound { .. } => "not_found",
                Registry::Denied { .. } | Registry::BadAuth => "denied",
                Registry::Unreachable(..) => "unreachable",
                Registry::Stalled(..) | Registry::Broken(..) => "broken_off",
                Registry::RateLimited(_) => "rate_limited",
                Registry::Status(..) | Registry::Reply(..) => "registry_fails",
                Registry::Mismatch(..) => "damaged",
                Registry::Manifest(..) | Registry::TooLarge(..) => "unusable",
                Registry::Ca(..) | Registry::Mirror(_) | Registry::Client(_) => "misconfigured",
                Registry::Write(_) => "store_fails",
            },
            Self::Reference(_) => "no_name",
            Self::Unpack(..) | Self::Import(_) => "unusable",
            Self::Signature(..) | Self::Policy(_) => "not_let_in",
            Self::DiskFull(..) => "disk_full",
            Self::Io(..) => "store_fails",
            Self::Ending => "broken_off",
            Self::Shared(error) => error.word(),
        }
    }
}

/// The error with all that caused it.
fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}
