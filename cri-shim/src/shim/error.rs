//! The core's errors in the words of ttrpc.

use containerd_shim_protos::ttrpc::{self, Code, get_status};

use crate::error::Error;

/// By kind: containerd acts on some of them, and shows the text.
impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Error::InvalidArgument(_) => Code::INVALID_ARGUMENT,
            Error::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Error::DeadlineExceeded(_) => Code::DEADLINE_EXCEEDED,
            Error::ResourceExhausted(_) => Code::RESOURCE_EXHAUSTED,
            Error::Unavailable(_) => Code::UNAVAILABLE,
            Error::Internal(_) => Code::INTERNAL,
        };
        Self::RpcStatus(get_status(code, error))
    }
}
