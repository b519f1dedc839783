//! The command line `pericarp`: one door among three, with no pod logic of its own.

mod boot;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Every pod in its own kernel.
#[derive(Debug, Parser)]
#[command(name = "pericarp", version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a kernel under the VMM alone, for foreign kernels, debugging and comparison
    Boot(boot::Boot),
}

impl Cli {
    /// Carries out the command; the value is the process's exit code.
    pub fn run(&self) -> Result<i32> {
        match &self.command {
            Command::Boot(boot) => boot.run(),
        }
    }
}
