//! Commands run in containers beside their own process. They change nothing in the pod's record, so they wait in
//! their caller's task: dropping the session kills the process.

use std::time::Duration;

use agent_protocol::v1;

use super::message;
use super::{ContainerState, ContainerStatus, ExecOutput};
use crate::agent::{Session, SessionOutput};
use crate::error::{Error, Result};
use crate::pod_dir::PodDir;
use crate::spec::ProcessSpec;

/// Most bytes kept of each of a command's outputs; the rest is thrown away (CRI, ExecSync).
const OUTPUT_BYTES: usize = 16 << 20;

/// Starts a command in a container that runs.
pub(super) async fn open(
    dir: &PodDir,
    container: &ContainerStatus,
    args: Vec<String>,
    terminal: bool,
    stdin: bool,
) -> Result<Session> {
    must_run(container)?;
    if args.is_empty() {
        return Err(Error::InvalidArgument("no command to run".into()));
    }
    let process = Some(message::exec_process(&container.spec, args, terminal));
    let exec = v1::Exec { container_id: container.id.clone(), process, stdin };
    Session::open(dir, v1::open::Kind::Exec(exec)).await
}

/// Starts a process in a container that runs, for which nothing is taken from the container's own but its filter.
pub(super) async fn open_process(
    dir: &PodDir,
    container: &ContainerStatus,
    process: &ProcessSpec,
    stdin: bool,
) -> Result<Session> {
    must_run(container)?;
    let process = Some(message::process(process));
    let exec = v1::Exec { container_id: container.id.clone(), process, stdin };
    Session::open(dir, v1::open::Kind::Exec(exec)).await
}

/// Watches a container's own process; before its start too, so that no output is missed.
pub(super) async fn attach(dir: &PodDir, container: &ContainerStatus, stdin: bool) -> Result<Session> {
    if container.state != ContainerState::Created {
        must_run(container)?;
    }
    let attach = v1::Attach { container_id: container.id.clone(), stdin };
    Session::open(dir, v1::open::Kind::Attach(attach)).await
}

/// Connects to a port of the guest's loopback; the session carries what is sent and received there.
pub(super) async fn forward(dir: &PodDir, port: u16) -> Result<Session> {
    Session::open(dir, v1::open::Kind::PortForward(v1::PortForward { port: port.into() })).await
}

fn must_run(container: &ContainerStatus) -> Result<()> {
    if container.state == ContainerState::Running {
        return Ok(());
    }
    Err(Error::FailedPrecondition(format!("container {} does not run", container.id)))
}

/// Runs a command to its end, or for `timeout`.
pub(super) async fn sync(
    dir: &PodDir,
    container: &ContainerStatus,
    args: Vec<String>,
    timeout: Option<Duration>,
) -> Result<ExecOutput> {
    let run = async {
        let mut session = open(dir, container, args, false, false).await?;
        let mut output = ExecOutput::default();
        loop {
            match session.next().await? {
                SessionOutput::Stdout(bytes) => keep(&mut output.stdout, &bytes),
                SessionOutput::Stderr(bytes) => keep(&mut output.stderr, &bytes),
                SessionOutput::Exit(code) => return Ok(ExecOutput { exit_code: code, ..output }),
            }
        }
    };
    match timeout {
        None => run.await,
        // Past it the future is dropped, and with the session's connection the agent kills the process.
        Some(limit) => tokio::time::timeout(limit, run).await.unwrap_or_else(|_| {
            Err(Error::DeadlineExceeded(format!(
                "the command was killed: it ran longer than {} s",
                limit.as_secs_f32()
            )))
        }),
    }
}

fn keep(output: &mut Vec<u8>, bytes: &[u8]) {
    let room = OUTPUT_BYTES.saturating_sub(output.len());
    output.extend(bytes.iter().take(room));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_past_the_limit_is_thrown_away() {
        let mut output = vec![0; OUTPUT_BYTES - 1];
        keep(&mut output, b"abc");
        keep(&mut output, b"d");
        assert_eq!((output.len(), output.last()), (OUTPUT_BYTES, Some(&b'a')));
    }
}
