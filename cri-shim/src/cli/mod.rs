//! The command line `pericarp`: one door among three, with no pod logic of its own.

mod boot;
mod check;
mod exec;
mod find;
mod output;
mod ps;
mod run;
mod terminal;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

use crate::config::{Config, DEFAULT_PATH};
use crate::spawner::Spawner;

/// Every pod in its own kernel
#[derive(Debug, Parser)]
#[command(name = "pericarp", version)]
pub struct Cli {
    /// The configuration, shared with pericarpd [default: /etc/pericarp/pericarp.toml if it is there].
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Check(check::Check),
    Run(Box<run::Run>),
    Ps(ps::Ps),
    Logs(ps::Logs),
    Exec(exec::Exec),
    Inspect(ps::Inspect),
    Console(ps::Console),
    Rm(ps::Rm),
    Boot(boot::Boot),
    Version(Version),
}

/// Show the versions of this program and of the guest kernel
#[derive(Args, Debug)]
struct Version;

impl Version {
    fn run(config: &Config) -> Result<i32> {
        println!("pericarp {}", env!("CARGO_PKG_VERSION"));
        let file = config.core.kernel.with_file_name("version");
        let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        for line in text.lines() {
            println!("guest kernel {line}");
        }
        Ok(0)
    }
}

impl Cli {
    /// Carries out the command; the value is the process's exit code.
    pub fn run(&self) -> Result<i32> {
        let config = match &self.config {
            Some(path) => Config::load(path)?,
            None if Path::new(DEFAULT_PATH).exists() => Config::load(Path::new(DEFAULT_PATH))?,
            None => Config::default(),
        };
        match &self.command {
            Command::Check(check) => check.run(&config),
            Command::Ps(ps) => ps.run(&config),
            Command::Logs(logs) => logs.run(&config),
            Command::Inspect(inspect) => inspect.run(&config),
            Command::Console(console) => console.run(&config),
            Command::Boot(boot) => boot.run(),
            Command::Version(Version) => Version::run(&config),
            Command::Run(run) => {
                // Before the first thread: see `spawner`.
                let spawner = Spawner::fork()?;
                runtime()?.block_on(run.run(&config, spawner))
            }
            Command::Exec(exec) => runtime()?.block_on(exec.run(&config)),
            Command::Rm(rm) => runtime()?.block_on(rm.run(&config)),
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}
