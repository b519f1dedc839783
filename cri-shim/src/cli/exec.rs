//! `pericarp exec`: a command in a container that runs.

use agent_protocol::v1;
use anyhow::{Context, Result};
use clap::Args;

use super::find;
use super::output::Format;
use super::terminal::{self, Given, Output, Signals};
use crate::agent::Session;
use crate::config::Config;
use crate::pod::exec_process;

/// Run a command in a container
#[derive(Args, Debug)]
pub(super) struct Exec {
    /// Give the command this program's standard input.
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal.
    #[arg(short, long, conflicts_with = "output")]
    tty: bool,
    /// As JSON: exit code and output in one document, at the end.
    #[arg(short, long, value_enum, default_value_t, hide_default_value = true)]
    output: Format,
    /// Id, the beginning of one, or name of the container.
    container: String,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl Exec {
    pub(super) async fn run(&self, config: &Config) -> Result<i32> {
        let (found, container_id) = find::container(config, &self.container)?;
        let container = found.record.containers.get(&container_id).context("the container has just been removed")?;
        let process = exec_process(&container.spec, self.command.clone(), self.tty);
        let kind = v1::open::Kind::Exec(v1::Exec { container_id, process: Some(process), stdin: self.interactive });
        let mut signals = Signals::listen()?;
        let session = Session::open(&found.dir, kind).await?;
        let (given, mut output) = (Given { stdin: self.interactive, terminal: self.tty }, Output::of(self.output));
        let code = terminal::pump(session, given, &mut signals, &mut output).await?;
        output.finish(code)?;
        Ok(code)
    }
}
