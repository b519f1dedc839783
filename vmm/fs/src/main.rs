//! `pericarp-fs`: serves a pod's shared host directories to its guest, by FUSE messages that the VMM carries over.
//!
//! It is the one process of a pod that opens files of the host, and only beneath [`SHARED`], the one directory in a mount
//! namespace of its own into which the pod's volumes are mounted. Whether a volume can be written is its mount's doing.
//! The guest is not trusted: every name is one component, every way to a file is taken beneath the directory it
//! starts from, and no symbolic link is ever followed here.
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

mod abi;
mod attributes;
mod body;
mod create;
mod credentials;
mod directory;
mod extended;
mod file;
mod handle;
mod inode;
mod jail;
mod lock;
mod names;
mod reply;
mod server;
mod signal;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::fs::{CWD, Mode, OFlags, openat};
use thiserror::Error;

use crate::jail::JailError;
use crate::server::Server;

/// Where the volumes are.
const SHARED: &str = "/shared";

/// The socket to the VMM, each of whose packets is one message.
const SOCKET: i32 = 3;

/// Messages that are served at a time: one that waits for a disk holds up few others.
const WORKERS: usize = 8;

#[derive(Debug, Error)]
enum StartError {
    #[error("descriptor {SOCKET} is not open: it must be a packet socket")]
    Socket(#[source] io::Error),
    #[error("cannot open {SHARED}")]
    Shared(#[source] io::Error),
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error("cannot look at {SHARED}")]
    Server(#[source] io::Error),
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    complain(&text);
    ExitCode::FAILURE
}

/// Writes a line to the log. On a full disk it is lost, where `eprintln!` would panic.
fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "pericarp-fs: {text}");
}

/// Serves until the VMM closes its end.
fn run() -> Result<(), StartError> {
    let socket = Arc::new(socket().map_err(StartError::Socket)?);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let shared = openat(CWD, SHARED, flags, Mode::empty()).map_err(|error| StartError::Shared(error.into()))?;
    // The guest's kernel has applied its processes' umask.
    rustix::process::umask(Mode::empty());
    signal::block();
    jail::enter(&shared)?;
    let (server, arrivals) = Server::new(shared).map_err(|error| StartError::Server(error.into()))?;
    let server = Arc::new(server);
    let (sweeper, answers) = (Arc::clone(&server), Arc::clone(&socket));
    // Both end with the process.
    start("sweeper", move || {
        signal::each(|| {
            if let Err(error) = sweeper.drop_unmounted() {
                complain(&format!("cannot let go of volumes: {error}"));
            }
        });
    })?;
    start("locks", move || lock::answer_waiting(&answers, &arrivals))?;
    let mut workers = Vec::new();
    for number in 0..WORKERS {
        let (server, socket) = (Arc::clone(&server), Arc::clone(&socket));
        workers.push(start(&format!("worker{number}"), move || server.serve(&socket))?);
    }
    for worker in workers {
        // A worker that panicked has said so; the others go on.
        let _ = worker.join();
    }
    Ok(())
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StartError> {
    thread::Builder::new().name(name.to_owned()).spawn(work).map_err(StartError::Thread)
}

#[expect(unsafe_code, reason = "an inherited descriptor has no owner yet")]
fn socket() -> io::Result<OwnedFd> {
    // SAFETY: nothing else in this process owns the number, which whoever started it has opened. If it is not open,
    // the call after this fails and the process ends.
    let socket = unsafe { File::from_raw_fd(SOCKET) };
    match socket.metadata() {
        Ok(_) => Ok(socket.into()),
        Err(error) => {
            // An owner of a number that is not open would close somebody else's descriptor later.
            let _ = std::os::fd::IntoRawFd::into_raw_fd(socket);
            Err(error)
        }
    }
}
