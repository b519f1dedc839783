//! The `start` action: the first container of a pod gets a server, the others its address.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::CONFIG_VARIABLE;
use super::arguments::Arguments;
use super::bootstrap::{Bootstrap, TTRPC_ADDRESS};
use super::bundle::Bundle;

/// What a server says once it listens.
pub(super) const READY: &str = "ready";

pub(super) fn start(arguments: &Arguments) -> Result<()> {
    let bootstrap = Bootstrap::read(arguments)?;
    let bundle = Bundle::read(&std::env::current_dir().context("finding the bundle")?)?;
    if let Some(config) = &bootstrap.config {
        bundle.write_config(config)?;
    }
    let pod = bundle.pod(&arguments.id);
    let address = if pod == arguments.id {
        let socket = bootstrap.socket(arguments, pod);
        serve(arguments, &bootstrap, &socket)?;
        format!("unix://{socket}")
    } else {
        bundle.address_of(pod)?
    };
    bundle.write_address(&address)?;
    bootstrap.answer(&address)
}

/// Starts the server and waits until it says that it is one.
fn serve(arguments: &Arguments, bootstrap: &Bootstrap, socket: &str) -> Result<()> {
    let mut command = Command::new(std::env::current_exe().context("finding this program")?);
    command
        .args(["-namespace", &arguments.namespace, "-id", &arguments.id])
        .args(["-address", &arguments.address, "-socket", socket])
        .env(TTRPC_ADDRESS, &bootstrap.ttrpc_address)
        // Who calls may do so from now on.
        .stdin(Stdio::from(OwnedFd::from(listen(socket)?)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Signals for containerd's own group are not for pods.
        .process_group(0);
    if arguments.debug {
        command.arg("-debug");
    }
    if let Some(config) = &bootstrap.config {
        command.env(CONFIG_VARIABLE, config);
    }
    let mut child = command.spawn().context("starting the shim's server")?;
    let mut word = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut word).context("waiting for the shim's server")?;
    }
    if word.trim() == READY {
        return Ok(());
    }
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut said).context("waiting for the shim's server")?;
    }
    bail!("the shim's server did not start: {}", said.trim())
}

fn listen(socket: &str) -> Result<UnixListener> {
    if let Some(directory) = Path::new(socket).parent() {
        fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
    }
    // One of a shim that was killed; another pod's has another name.
    let _ = fs::remove_file(socket);
    UnixListener::bind(socket).with_context(|| format!("listening on {socket}"))
}
