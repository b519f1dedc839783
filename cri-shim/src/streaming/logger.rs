//! A program that takes a process's output, as containerd's own shims start it (`binary://PATH?KEY=VALUE`): it has KEY and
//! VALUE as arguments, reads both outputs at descriptors 3 and 4, and closes 5 when it is ready.

use std::process::Stdio;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use reqwest::Url;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};

use crate::error::{Error, IoContext, Result};

/// How long a program may take to be ready.
const READY_LIMIT: Duration = Duration::from_secs(10);

/// How long it may take to end when there is no more output; then it is killed.
const END_LIMIT: Duration = Duration::from_secs(12);

/// A program that runs. It is killed if this is dropped.
#[derive(Debug)]
pub(super) struct Logger(Child);

/// Starts it for a process; with it come the ways for standard output and standard error.
pub(super) async fn start(uri: &str, namespace: &str, id: &str) -> Result<(Logger, pipe::Sender, pipe::Sender)> {
    let invalid = || Error::InvalidArgument(format!("{uri:?} names no program: use binary:///PATH"));
    let url = Url::parse(uri).map_err(|_| invalid())?;
    let path = url.to_file_path().map_err(|()| invalid())?;
    let doing = || format!("starting {}", path.display());
    let (stdout, stdout_end) = pipe::pipe().doing(doing)?;
    let (stderr, stderr_end) = pipe::pipe().doing(doing)?;
    let (ready_end, mut ready) = pipe::pipe().doing(doing)?;
    let ends = [stdout_end.into_blocking_fd(), stderr_end.into_blocking_fd(), ready_end.into_blocking_fd()];
    let mut mappings = Vec::new();
    for (child_fd, end) in (3..).zip(ends) {
        mappings.push(FdMapping { parent_fd: end.doing(doing)?, child_fd });
    }
    let mut command = std::process::Command::new(&path);
    command
        .args(url.query_pairs().flat_map(|(key, value)| [key.into_owned(), value.into_owned()]))
        .env_clear()
        .envs([("CONTAINER_ID", id), ("CONTAINER_NAMESPACE", namespace)])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .fd_mappings(mappings)
        .map_err(|error| Error::Internal(format!("{}: {error}", doing())))?;
    let mut command = Command::from(command);
    let program = command.kill_on_drop(true).spawn().doing(doing)?;
    // With it go our copies of the ends that are the program's alone.
    drop(command);
    let late = || Error::DeadlineExceeded(format!("{} is not ready after {READY_LIMIT:?}", path.display()));
    // Whether it says a word or closes the pipe, also by its end.
    let _ = tokio::time::timeout(READY_LIMIT, ready.read(&mut [0])).await.map_err(|_| late())?.doing(doing)?;
    Ok((Logger(program), stdout, stderr))
}

impl Logger {
    /// Waits for its end, when there is no more output.
    pub(super) async fn end(mut self) {
        if tokio::time::timeout(END_LIMIT, self.0.wait()).await.is_err() {
            tracing::warn!("the program that takes a process's output does not end, and is killed");
        }
    }
}
