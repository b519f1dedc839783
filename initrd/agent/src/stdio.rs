//! The agent's ends of a process's standard streams: pipes, or one terminal.
//!
//! They only move bytes; where those come from and go to is their owner's business. Nothing here blocks.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::EpollFlags;
use nix::unistd::pipe2;

use crate::log::Stream;
use crate::poll::{Part, Poll, Token, Watched};
use crate::sys;

/// Bytes moved at once; a full pipe is one move.
pub(crate) const CHUNK_BYTES: usize = agent_protocol::CHUNK_BYTES;

/// Input waiting for a process that does not read, above which its sender is made to wait.
const INPUT_BYTES: usize = 256 << 10;

/// More than a terminal holds. What it was given may not be readable yet; but a read that finds nothing has first
/// waited for that (the kernel's `n_tty_read` flushes the buffer), so after the process's end it is the end.
const TERMINAL_BYTES: usize = 128 << 10;

/// What the process gets, to be dropped once it has it.
#[derive(Debug)]
pub(crate) struct ChildEnds([OwnedFd; 3]);

impl ChildEnds {
    pub(crate) fn fds(&self) -> [BorrowedFd<'_>; 3] {
        let [stdin, stdout, stderr] = &self.0;
        [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]
    }
}

/// Bytes on their way into a process.
#[derive(Debug)]
struct Input {
    fd: Watched<OwnedFd>,
    pending: Vec<u8>,
    close: bool,
}

/// Bytes on their way out of a process.
#[derive(Debug)]
struct Output {
    stream: Stream,
    fd: Watched<OwnedFd>,
    /// Set when the process has ended: bytes still to be read. What others write there later is not waited for.
    left: Option<usize>,
}

/// The streams of one process.
#[derive(Debug)]
pub(crate) struct Stdio {
    task: u32,
    terminal: bool,
    input: Option<Input>,
    outputs: Vec<Output>,
}

/// Reads and writes return at once from here on.
pub(crate) fn set_nonblocking(fd: &OwnedFd) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

impl Stdio {
    /// Pipes. Without `stdin` the process reads nothing at all.
    pub(crate) fn pipes(task: u32, stdin: bool) -> io::Result<(Self, ChildEnds)> {
        let input = if stdin { Some(pipe2(OFlag::O_CLOEXEC)?) } else { None };
        let (stdout, child_stdout) = pipe2(OFlag::O_CLOEXEC)?;
        let (stderr, child_stderr) = pipe2(OFlag::O_CLOEXEC)?;
        let mut stdio = Self { task, terminal: false, input: None, outputs: Vec::new() };
        let child_stdin = match input {
            Some((theirs, ours)) => {
                stdio.set_input(ours)?;
                theirs
            }
            None => File::open("/dev/null")?.into(),
        };
        stdio.add_output(Stream::Stdout, stdout)?;
        stdio.add_output(Stream::Stderr, stderr)?;
        Ok((stdio, ChildEnds([child_stdin, child_stdout, child_stderr])))
    }

    /// A terminal, which the process opens itself; see [`Self::set_terminal`].
    pub(crate) fn terminal(task: u32) -> io::Result<(Self, ChildEnds)> {
        let null = || File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
        let stdio = Self { task, terminal: true, input: None, outputs: Vec::new() };
        Ok((stdio, ChildEnds([null()?, null()?, null()?])))
    }

    /// The terminal's master.
    pub(crate) fn set_terminal(&mut self, master: OwnedFd) -> io::Result<()> {
        self.set_input(master.try_clone()?)?;
        self.add_output(Stream::Stdout, master)
    }

    fn set_input(&mut self, fd: OwnedFd) -> io::Result<()> {
        set_nonblocking(&fd)?;
        let fd = Watched::new(fd, Token::Task(self.task, Part::Stdin));
        self.input = Some(Input { fd, pending: Vec::new(), close: false });
        Ok(())
    }

    fn add_output(&mut self, stream: Stream, fd: OwnedFd) -> io::Result<()> {
        set_nonblocking(&fd)?;
        let part = match stream {
            Stream::Stdout => Part::Stdout,
            Stream::Stderr => Part::Stderr,
        };
        self.outputs.push(Output { stream, fd: Watched::new(fd, Token::Task(self.task, part)), left: None });
        Ok(())
    }

    /// Some output, if there is any.
    pub(crate) fn read(&mut self) -> Option<(Stream, Vec<u8>)> {
        let mut found = None;
        self.outputs.retain_mut(|output| {
            if found.is_some() {
                return true;
            }
            match output.read() {
                Ok(bytes) if bytes.is_empty() => false,
                Ok(bytes) => {
                    found = Some((output.stream, bytes));
                    true
                }
                Err(Errno::EINTR) => true,
                Err(Errno::EAGAIN) => output.left.is_none(),
                // A terminal whose last user has gone says EIO.
                Err(_) => false,
            }
        });
        // The other stream goes first next time.
        if found.is_some() {
            let others = self.outputs.len().min(1);
            self.outputs.rotate_left(others);
        }
        found
    }

    /// The process has ended and so has all that belongs to it: only what it has written is still to come.
    pub(crate) fn process_ended(&mut self) {
        self.input = None;
        for output in self.outputs.iter_mut().filter(|output| output.left.is_none()) {
            let pending = if self.terminal { Ok(TERMINAL_BYTES) } else { sys::readable_bytes(output.fd.fd()) };
            output.left = Some(pending.unwrap_or(0));
        }
    }

    /// Whether all output has been read.
    pub(crate) fn is_drained(&self) -> bool {
        self.outputs.iter().all(|output| output.left == Some(0))
    }

    /// Takes input for the process; what it does not read at once is kept.
    pub(crate) fn push_input(&mut self, bytes: &[u8]) {
        if let Some(input) = self.input.as_mut().filter(|input| !input.close) {
            input.pending.extend_from_slice(bytes);
        }
    }

    /// No input follows. A terminal has no such end.
    pub(crate) fn close_input(&mut self) {
        if let Some(input) = self.input.as_mut().filter(|_| !self.terminal) {
            input.close = true;
        }
    }

    /// Whether more input may be pushed.
    pub(crate) fn has_input_room(&self) -> bool {
        self.input.as_ref().is_none_or(|input| input.pending.len() < INPUT_BYTES)
    }

    /// Hands input on.
    pub(crate) fn write_input(&mut self) {
        let Some(input) = &mut self.input else { return };
        let written = loop {
            if input.pending.is_empty() {
                break Ok(());
            }
            match nix::unistd::write(input.fd.get(), &input.pending) {
                Ok(count) => drop(input.pending.drain(..count.min(input.pending.len()))),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        // A process that has closed its input does not want the rest.
        if written.is_err() || (input.close && input.pending.is_empty()) {
            self.input = None;
        }
    }

    /// Waits for output if `outputs` may flow, and for input to be taken if there is any.
    pub(crate) fn watch(&mut self, poll: &Poll, outputs: bool) -> io::Result<()> {
        for output in &mut self.outputs {
            output.fd.want(poll, if outputs { EpollFlags::EPOLLIN } else { EpollFlags::empty() })?;
        }
        self.watch_input(poll)
    }

    /// Waits for input to be taken if there is any.
    pub(crate) fn watch_input(&mut self, poll: &Poll) -> io::Result<()> {
        if let Some(input) = &mut self.input {
            let waits = !input.pending.is_empty();
            input.fd.want(poll, if waits { EpollFlags::EPOLLOUT } else { EpollFlags::empty() })?;
        }
        Ok(())
    }

    /// The terminal, if this is one.
    pub(crate) fn master(&self) -> Option<BorrowedFd<'_>> {
        self.outputs.first().filter(|_| self.terminal).map(|output| output.fd.fd())
    }
}

impl Output {
    fn read(&mut self) -> nix::Result<Vec<u8>> {
        let most = self.left.map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
        let mut bytes = vec![0; most];
        let count = nix::unistd::read(self.fd.get(), &mut bytes)?;
        bytes.truncate(count);
        self.left = self.left.map(|left| left.saturating_sub(count));
        Ok(bytes)
    }
}
