//! The command line.

use std::io;
use std::process::ExitCode;

use clap::Parser;
use cri_shim::cli::Cli;

/// As if SIGPIPE had ended this program, which it does to most: nobody reads its output any more.
const OUTPUT_UNREAD: u8 = 128 + 13;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.run() {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)),
        Err(error) if unread(&error) => ExitCode::from(OUTPUT_UNREAD),
        Err(error) => {
            eprintln!("pericarp: {error:#}");
            ExitCode::from(cli.failure())
        }
    }
}

fn unread(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
