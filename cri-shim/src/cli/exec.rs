//! `pericarp exec`: a command in a container that runs.

use agent_protocol::v1;
use anyhow::Result;
use clap::Args;

use super::find;
use super::terminal;
use crate::agent::Session;
use crate::config::Config;

/// Run a command in a container
#[derive(Args, Debug)]
pub(super) struct Exec {
    /// Give the command this program's standard input.
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Id, the beginning of one, or name of the container.
    container: String,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl Exec {
    pub(super) async fn run(&self, config: &Config) -> Result<i32> {
        let (found, container_id) = find::container(config, &self.container)?;
        let process = v1::Process { args: self.command.clone(), terminal: self.tty, ..Default::default() };
        let kind = v1::open::Kind::Exec(v1::Exec { container_id, process: Some(process), stdin: self.interactive });
        let mut session = Session::open(&found.dir, kind).await?;
        terminal::pump(&mut session, self.interactive, self.tty).await
    }
}
