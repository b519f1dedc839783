//! The control socket of a VMM, without blocking a thread: one connection per command, since commands are rare.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use tokio::io::Interest;
use vmm_control::{Command, Reply, wire};

use crate::error::{Error, IoContext, Result};
use crate::pod_dir::PodDir;
use crate::watched::watch;

/// Longest wait for the answer to a command: the VMM's control thread does nothing that waits.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Carries out one command that has no answer but done or refused.
pub(crate) async fn run(dir: &PodDir, command: &Command, fds: &[RawFd]) -> Result<()> {
    match ask(dir, command, fds).await? {
        Reply::Done => Ok(()),
        other => Err(Error::Internal(format!("the VMM gave an answer that does not fit: {other:?}"))),
    }
}

/// Carries out one command and returns its answer, a refusal as an error.
pub(crate) async fn ask(dir: &PodDir, command: &Command, fds: &[RawFd]) -> Result<Reply> {
    ask_within(ANSWER_LIMIT, dir, command, fds).await
}

/// As [`ask`], for what takes the guest some time.
pub(crate) async fn ask_within(limit: Duration, dir: &PodDir, command: &Command, fds: &[RawFd]) -> Result<Reply> {
    let (_directory, path) = dir.reach(&dir.control())?;
    let conversation = async {
        let socket = watch(open(&path)?)?;
        socket.async_io(Interest::WRITABLE, |socket| wire::send(socket.as_fd(), wire::CONTROL, command, fds)).await?;
        socket.async_io(Interest::READABLE, |socket| wire::recv::<Reply>(socket.as_fd(), wire::CONTROL)).await
    };
    let answer = tokio::time::timeout(limit, conversation).await;
    match answer.map_err(|_| Error::DeadlineExceeded("the VMM does not answer on its control socket".into()))? {
        Ok(Some((Reply::Refused { reason }, _))) => Err(Error::Internal(format!("the VMM refused: {reason}"))),
        Ok(Some((reply, _))) => Ok(reply),
        Ok(None) => Err(Error::Unavailable("the VMM has ended".into())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Err(Error::Unavailable("the VMM has ended".into()))
        }
        result @ Err(_) => result.doing(|| "the VMM's control socket").map(|_| Reply::Done),
    }
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}
