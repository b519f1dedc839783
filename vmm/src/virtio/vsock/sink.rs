//! Files that take what the guest sends to a port: container logs.
//!
//! A sink never fails its sender: what a full disk does not take is counted and dropped, whole lines at a time, so
//! that what is in the file stays lines.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};
use thiserror::Error;
use vmm_control::READY_PORT;

use super::FIRST_CLIENT_PORT;
use crate::virtio::buffers::Buffers;

/// Most sinks of one pod; each is one or two open files.
const SINKS: usize = 512;

/// Bytes looked at in one go when a line's end is searched.
const CHUNK: usize = 4096;

/// Why a sink was not set or removed.
#[derive(Debug, Error)]
pub enum SinkError {
    /// The port has another use.
    #[error("port {0} cannot be a sink; choose one above {READY_PORT} and below {FIRST_CLIENT_PORT}")]
    Port(u32),
    /// There are too many.
    #[error("the pod has {SINKS} sinks already; remove one first")]
    Full,
    /// Removal of what is not there.
    #[error("no sink on port {0}")]
    NotFound(u32),
    /// A pipe or socket, which can make its writer wait.
    #[error("a sink is a file, not a pipe or a socket")]
    NotAFile,
    /// The descriptor does not append.
    #[error("a sink's descriptor must be open for appending")]
    NotAppending,
    /// The descriptor cannot be examined.
    #[error("cannot examine the sink's descriptor")]
    Io(#[from] io::Error),
}

/// Every sink, by port.
#[derive(Debug, Default)]
pub(super) struct Sinks {
    sinks: BTreeMap<u32, Sink>,
}

impl Sinks {
    /// Sets the file of a port; one that has a file already changes at its next line end.
    pub(super) fn set(&mut self, port: u32, file: File) -> Result<(), SinkError> {
        if port <= READY_PORT || port >= FIRST_CLIENT_PORT {
            return Err(SinkError::Port(port));
        }
        check(&file)?;
        if let Some(sink) = self.sinks.get_mut(&port) {
            sink.replace(file);
        } else if self.sinks.len() < SINKS {
            self.sinks.insert(port, Sink::new(file));
        } else {
            return Err(SinkError::Full);
        }
        Ok(())
    }

    /// Closes a sink.
    pub(super) fn remove(&mut self, port: u32) -> Result<(), SinkError> {
        self.sinks.remove(&port).map(drop).ok_or(SinkError::NotFound(port))
    }

    /// Every connection is gone, with the driver.
    pub(super) fn disconnect(&mut self) {
        for sink in self.sinks.values_mut() {
            sink.writers = 0;
            sink.closed();
        }
    }

    /// The sink on a port.
    pub(super) fn get_mut(&mut self, port: u32) -> Option<&mut Sink> {
        self.sinks.get_mut(&port)
    }
}

fn check(file: &File) -> Result<(), SinkError> {
    let kind = SFlag::from_bits_truncate(fstat(file).map_err(io::Error::from)?.st_mode) & SFlag::S_IFMT;
    if kind == SFlag::S_IFIFO || kind == SFlag::S_IFSOCK {
        return Err(SinkError::NotAFile);
    }
    let flags = OFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GETFL).map_err(io::Error::from)?);
    let writable = flags & OFlag::O_ACCMODE != OFlag::O_RDONLY;
    if writable && (flags.contains(OFlag::O_APPEND) || kind != SFlag::S_IFREG) {
        Ok(())
    } else {
        Err(SinkError::NotAppending)
    }
}

/// One file, and the one that follows it.
#[derive(Debug)]
pub(super) struct Sink {
    file: File,
    next: Option<File>,
    /// Connections that write to it.
    writers: usize,
    /// What comes next begins a line.
    stream_at_start: bool,
    /// The file ends with a whole line.
    file_at_start: bool,
    /// The rest of this line is dropped, since a part of it was.
    skipping: bool,
}

impl Sink {
    fn new(file: File) -> Self {
        Self { file, next: None, writers: 0, stream_at_start: true, file_at_start: true, skipping: false }
    }

    fn replace(&mut self, file: File) {
        self.next = Some(file);
        if self.stream_at_start || self.skipping || self.writers == 0 {
            self.switch();
        }
    }

    fn switch(&mut self) {
        if let Some(file) = self.next.take() {
            self.file = file;
            self.file_at_start = true;
        }
    }

    /// A connection begins.
    pub(super) fn opened(&mut self) {
        self.writers = self.writers.saturating_add(1);
    }

    /// A connection ended. With the last one, the line it was in will not be finished.
    pub(super) fn closed(&mut self) {
        self.writers = self.writers.saturating_sub(1);
        if self.writers == 0 {
            self.stream_at_start = true;
            self.skipping = false;
            self.switch();
        }
    }

    /// Appends what the guest sent; returns how many bytes were dropped.
    pub(super) fn append(&mut self, data: &mut Buffers<'_>, mut range: Range<usize>) -> usize {
        let mut dropped = 0_usize;
        while !range.is_empty() {
            let part = self.next_part(data, &range);
            let at_end = ends_line(data, &part);
            if self.skipping {
                dropped = dropped.saturating_add(part.len());
                self.skipping = !at_end;
            } else {
                let lost = self.write(data, part.clone());
                dropped = dropped.saturating_add(lost);
                self.skipping = lost > 0 && !at_end;
            }
            self.stream_at_start = at_end;
            if at_end || self.skipping {
                self.switch();
            }
            range.start = part.end;
        }
        dropped
    }

    /// As much of `range` as is treated alike: up to a line's end where one matters, all of it where not.
    fn next_part(&self, data: &Buffers<'_>, range: &Range<usize>) -> Range<usize> {
        let to_line_end = self.skipping || (self.next.is_some() && !self.stream_at_start);
        if to_line_end { range.start..line_end(data, range) } else { range.clone() }
    }

    /// Writes to the file; returns how many bytes it did not take.
    fn write(&mut self, data: &mut Buffers<'_>, range: Range<usize>) -> usize {
        // A line of which the end was lost is ended before the next one begins.
        if self.stream_at_start && !self.file_at_start && self.file.write_all(b"\n").is_err() {
            return range.len();
        }
        let mut rest = range.clone();
        while !rest.is_empty() {
            match data.send(rest.clone(), &self.file) {
                Ok(0) | Err(_) => break,
                Ok(count) => rest.start = rest.start.saturating_add(count),
            }
        }
        let written = range.start..rest.start;
        self.file_at_start = if written.is_empty() { self.stream_at_start } else { ends_line(data, &written) };
        rest.len()
    }
}

/// The end of the first line in `range`, its newline included; all of `range` if it has none.
fn line_end(data: &Buffers<'_>, range: &Range<usize>) -> usize {
    let mut offset = range.start;
    let mut bytes = [0; CHUNK];
    while offset < range.end {
        let len = range.end.saturating_sub(offset).min(CHUNK);
        let chunk = bytes.get_mut(..len).unwrap_or_default();
        data.read_at(offset, chunk);
        if let Some(position) = chunk.iter().position(|byte| *byte == b'\n') {
            return offset.saturating_add(position).saturating_add(1);
        }
        offset = offset.saturating_add(len);
    }
    range.end
}

fn ends_line(data: &Buffers<'_>, range: &Range<usize>) -> bool {
    data.read_object::<u8>(range.end.saturating_sub(1)) == Some(b'\n')
}
