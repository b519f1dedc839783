//! A container's log: output cut into the lines that the CRI defines, and the connection they leave by.
//!
//! A line is `TIME STREAM TAG TEXT\n`; `P` marks a part of a line that was too long, `F` its last or only part.
//! What could not be sent yet is kept here up to a limit; its owner stops reading the container's output above it.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects)]

use std::io;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;

use crate::poll::{Poll, Watched};
use crate::time::Timestamp;

/// Longest text of one log line in bytes; the rest follows as further parts.
pub(crate) const LINE_BYTES: usize = 16 << 10;

/// Unsent bytes above which no more output is read.
const BACKLOG_BYTES: usize = 256 << 10;

/// Which of a process's two outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Cuts one stream into lines.
#[derive(Debug)]
struct Lines {
    stream: Stream,
    partial: Vec<u8>,
}

impl Lines {
    fn new(stream: Stream) -> Self {
        Self { stream, partial: Vec::new() }
    }

    /// Appends to `out` every line that `bytes` completes, or that has reached the limit.
    fn push(&mut self, mut bytes: &[u8], now: &Timestamp, out: &mut Vec<u8>) {
        while !bytes.is_empty() {
            let room = LINE_BYTES.saturating_sub(self.partial.len());
            // A line end just behind a full line still belongs to it.
            let end = bytes.iter().take(room.saturating_add(1)).position(|&byte| byte == b'\n');
            let (text, rest) = bytes.split_at_checked(end.unwrap_or(room)).unwrap_or((bytes, &[]));
            self.partial.extend_from_slice(text);
            bytes = rest;
            if end.is_some() {
                self.line("F", now, out);
                bytes = bytes.split_first().map_or(&[], |(_, rest)| rest);
            } else if !bytes.is_empty() {
                self.line("P", now, out);
            }
        }
    }

    /// The stream has ended: what is left was never a whole line.
    fn end(&mut self, now: &Timestamp, out: &mut Vec<u8>) {
        if !self.partial.is_empty() {
            self.line("P", now, out);
        }
    }

    fn line(&mut self, tag: &str, now: &Timestamp, out: &mut Vec<u8>) {
        for word in [now.text(), self.stream.name(), tag] {
            out.extend_from_slice(word.as_bytes());
            out.push(b' ');
        }
        out.append(&mut self.partial);
        out.push(b'\n');
    }
}

/// The log of one container.
#[derive(Debug)]
pub(crate) struct Log {
    /// `None` throws everything away, at first or since the connection broke.
    connection: Option<Watched<OwnedFd>>,
    stdout: Lines,
    stderr: Lines,
    unsent: Vec<u8>,
}

impl Log {
    /// `connection` does not block.
    pub(crate) fn new(connection: Option<Watched<OwnedFd>>) -> Self {
        let (stdout, stderr) = (Lines::new(Stream::Stdout), Lines::new(Stream::Stderr));
        Self { connection, stdout, stderr, unsent: Vec::new() }
    }

    /// Whether more output may be read.
    pub(crate) fn has_room(&self) -> bool {
        self.unsent.len() < BACKLOG_BYTES
    }

    /// Whether every finished line has left.
    pub(crate) fn is_flushed(&self) -> bool {
        self.unsent.is_empty()
    }

    pub(crate) fn push(&mut self, stream: Stream, bytes: &[u8]) {
        if self.connection.is_none() {
            return;
        }
        let now = Timestamp::now();
        match stream {
            Stream::Stdout => self.stdout.push(bytes, &now, &mut self.unsent),
            Stream::Stderr => self.stderr.push(bytes, &now, &mut self.unsent),
        }
    }

    /// No more output will come.
    pub(crate) fn end(&mut self) {
        let now = Timestamp::now();
        self.stdout.end(&now, &mut self.unsent);
        self.stderr.end(&now, &mut self.unsent);
    }

    /// Sends what the connection takes, and waits for it to take more.
    pub(crate) fn flush(&mut self, poll: &Poll) {
        let Some(connection) = &mut self.connection else {
            self.unsent.clear();
            return;
        };
        match send(connection, poll, &mut self.unsent) {
            Ok(()) => {}
            Err(error) => {
                crate::kmsg::say(&format!("a container's log is lost from here on: {error}"));
                self.connection = None;
                self.unsent.clear();
            }
        }
    }
}

fn send(connection: &mut Watched<OwnedFd>, poll: &Poll, unsent: &mut Vec<u8>) -> io::Result<()> {
    while !unsent.is_empty() {
        match nix::unistd::write(connection.get(), unsent) {
            Ok(sent) => drop(unsent.drain(..sent.min(unsent.len()))),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return connection.want(poll, EpollFlags::EPOLLOUT),
            Err(error) => return Err(error.into()),
        }
    }
    connection.want(poll, EpollFlags::empty())
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects, reason = "a test may panic")]
mod tests {
    use super::*;

    fn lines(chunks: &[&[u8]]) -> Vec<String> {
        let now = Timestamp::from_unix(0, 0);
        let (mut lines, mut out) = (Lines::new(Stream::Stdout), Vec::new());
        for chunk in chunks {
            lines.push(chunk, &now, &mut out);
        }
        lines.end(&now, &mut out);
        let text = String::from_utf8(out).expect("text");
        assert!(text.is_empty() || text.ends_with('\n'));
        let prefix = "1970-01-01T00:00:00.000000000Z stdout ";
        text.lines().map(|line| line.strip_prefix(prefix).expect("time and stream").to_owned()).collect()
    }

    #[test]
    fn whole_lines_are_full_and_a_rest_is_a_part() {
        assert_eq!(lines(&[b"a\nb\n"]), ["F a", "F b"]);
        assert_eq!(lines(&[b"a", b"b\n\n", b"c"]), ["F ab", "F ", "P c"]);
        assert!(lines(&[b"", b""]).is_empty());
    }

    #[test]
    fn a_long_line_is_cut_at_the_limit() {
        let long = vec![b'x'; LINE_BYTES * 2 + 5];
        for chunk in [1, 7, 4096, LINE_BYTES, LINE_BYTES + 1, long.len()] {
            let mut chunks: Vec<&[u8]> = long.chunks(chunk).collect();
            chunks.push(b"\n");
            let found: Vec<_> = lines(&chunks).iter().map(|line| (line[..1].to_owned(), line.len() - 2)).collect();
            let expected = [("P", LINE_BYTES), ("P", LINE_BYTES), ("F", 5)].map(|(tag, size)| (tag.to_owned(), size));
            assert_eq!(found, expected, "in chunks of {chunk}");
        }
    }

    #[test]
    fn a_line_of_just_the_limit_is_one_full_line() {
        let mut line = vec![b'x'; LINE_BYTES];
        line.push(b'\n');
        let found = lines(&[&line]);
        assert_eq!(found.iter().map(|line| (&line[..1], line.len() - 2)).collect::<Vec<_>>(), [("F", LINE_BYTES)]);
    }
}
