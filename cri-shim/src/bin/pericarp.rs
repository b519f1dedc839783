//! The command line.

use std::process::ExitCode;

use clap::Parser;
use cri_shim::cli::Cli;

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)),
        Err(error) => {
            eprintln!("pericarp: {error:#}");
            ExitCode::FAILURE
        }
    }
}
