//! What messages mean: pure functions between the CRI's words and [`crate::spec`].
//!
//! A message that asks for something no pod of ours can have is refused here, with what to do instead, rather than
//! run without it.

mod container;
mod filter;
mod metrics;
mod pod;
mod process;
mod resources;
mod security;
mod signal;
mod stats;
mod status;

pub(super) use container::container_spec;
pub(super) use filter::{container_matches, pod_matches};
pub(super) use metrics::{metric_descriptors, pod_metrics};
pub(super) use pod::{identity, pod_spec};
pub(super) use process::numeric_user;
pub(super) use resources::resources;
pub(super) use stats::{container_stats, container_stats_match, pod_stats, pod_stats_match};
pub(super) use status::{container, container_status, event, pod, pod_status};

use std::fmt::Display;

use crate::error::Error;

fn invalid(text: impl Display) -> Error {
    Error::InvalidArgument(text.to_string())
}

/// A message or field that a call cannot do without.
pub(super) fn required<T>(field: Option<T>, name: &str) -> Result<T, Error> {
    field.ok_or_else(|| invalid(format_args!("the request has no {name}")))
}
