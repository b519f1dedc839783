//! The core's errors in the words of ttrpc.

use containerd_shim_protos::ttrpc::{self, Code, get_status};

use crate::error::Error;

/// By kind: containerd acts on some of them, and shows the text.
pub(super) fn status(error: Error) -> ttrpc::Error {
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
    ttrpc::Error::RpcStatus(get_status(code, error))
}

/// What this shim does not do.
pub(super) fn unimplemented(what: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(Code::UNIMPLEMENTED, what))
}
