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
use output::Format;
use serde_json::json;

use crate::config::{Config, DEFAULT_PATH};
use crate::spawner::Spawner;

/// Exit codes of failures, where a command's own is passed on and where not.
const FAILED_AROUND_COMMAND: u8 = 125;
const FAILED: u8 = 1;

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
struct Version {
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Version {
    fn run(&self, config: &Config) -> Result<i32> {
        let file = config.core.kernel.with_file_name("version");
        let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        // As guest-kernel/build writes it: the version of Debian's source package, then what `uname -r` says.
        let (source, release) = text.trim().split_once('\n').unwrap_or(("", text.trim()));
        let (pericarp, kernel) = (env!("CARGO_PKG_VERSION"), json!({"release": release, "source": source}));
        match self.output {
            Format::Json => output::json(&json!({"pericarp": pericarp, "guest_kernel": kernel}))?,
            Format::Table => {
                output::line(&format!("pericarp      {pericarp}"))?;
                output::line(&format!("guest kernel  {release} (from linux-source {source})"))?;
            }
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
            Command::Version(version) => version.run(&config),
            Command::Run(run) => {
                // Before the first thread: see `spawner`.
                let spawner = Spawner::fork()?;
                wait(run.run(&config, spawner))
            }
            Command::Exec(exec) => wait(exec.run(&config)),
            Command::Rm(rm) => wait(rm.run(&config)),
        }
    }

    /// Exit code for a failure of this program's own: one that the commands of others seldom have, where theirs count.
    pub fn failure(&self) -> u8 {
        match self.command {
            Command::Run(_) | Command::Exec(_) => FAILED_AROUND_COMMAND,
            _ => FAILED,
        }
    }
}

fn wait(work: impl Future<Output = Result<i32>>) -> Result<i32> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(work);
    // A read of the terminal may be under way, which nothing ends but another key.
    runtime.shutdown_background();
    result
}
