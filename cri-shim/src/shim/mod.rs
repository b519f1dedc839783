//! `containerd-shim-pericarp-v2`: containerd's way to the core, and the third door beside the CRI and the command line.
//!
//! containerd runs this program with `start` for each container: the first of a pod becomes a server that stays, with a
//! core of its own, and the others are told its address. It speaks containerd's task API (ttrpc) there. If it is killed,
//! containerd runs the program with `delete`, which removes what the pod has left. This module translates; what a pod is
//! and how it is made is the core's.

mod arguments;
mod bootstrap;
mod bundle;
mod convert;
mod delete;
mod error;
mod events;
mod info;
mod life;
mod metrics;
mod oci;
mod process;
mod serve;
mod service;
mod start;
mod task;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::config::{Config, DEFAULT_PATH};

use arguments::{Action, Arguments};

/// Names the configuration file, if it is not in its usual place.
const CONFIG_VARIABLE: &str = "PERICARP_CONFIG";

/// Does what containerd asks by the command line.
pub fn main() -> ExitCode {
    let done = Arguments::parse(std::env::args().skip(1)).and_then(|arguments| match arguments.action {
        Action::Start => start::start(&arguments),
        Action::Serve => serve::serve(&arguments),
        Action::Delete => delete::delete(&arguments),
        Action::Info => info::info(),
        Action::Version => info::version(),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("containerd-shim-pericarp-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The configuration that a runtime's options or the environment name, else the usual one if it is there.
fn config(asked: Option<&Path>) -> Result<Config> {
    let variable = std::env::var_os(CONFIG_VARIABLE);
    match asked.or(variable.as_deref().map(Path::new)) {
        Some(path) => Ok(Config::load(path)?),
        None if Path::new(DEFAULT_PATH).exists() => Config::load(Path::new(DEFAULT_PATH)).context("its usual place"),
        None => Ok(Config::default()),
    }
}
