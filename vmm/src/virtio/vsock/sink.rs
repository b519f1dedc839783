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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::buffers::gather;
    use crate::virtio::testing::{Guest, Part};

    const DATA: u64 = 0x20_0000;

    fn file() -> (File, tempfile::NamedTempFile) {
        let path = tempfile::NamedTempFile::new().unwrap();
        (File::options().append(true).open(path.path()).unwrap(), path)
    }

    fn full() -> File {
        File::options().append(true).open("/dev/full").unwrap()
    }

    fn append(sink: &mut Sink, bytes: &[u8]) -> usize {
        let guest = Guest::new();
        guest.write(DATA, bytes);
        let (mut driver, mut active) = guest.queue(4);
        driver.post(&[Part::readable(DATA, u32::try_from(bytes.len()).unwrap())]);
        let (mut readable, mut writable) = (Buffers::new(&guest.memory), Buffers::new(&guest.memory));
        gather(active.pop(&guest.memory).unwrap().unwrap(), &mut readable, &mut writable).unwrap();
        sink.append(&mut readable, 0..bytes.len())
    }

    #[test]
    fn a_line_that_lost_its_end_is_ended_all_the_same() {
        let (log, path) = file();
        let mut sink = Sink::new(log.try_clone().unwrap());
        sink.opened();
        assert_eq!(append(&mut sink, b"one\ntwo is cut"), 0);
        // The disk fills up here, and is emptied later.
        sink.file = full();
        assert_eq!(append(&mut sink, b" off here"), 9);
        sink.file = log;
        assert_eq!(append(&mut sink, b" and here\nthree\n"), 10);
        assert_eq!(std::fs::read_to_string(path.path()).unwrap(), "one\ntwo is cut\nthree\n");
    }

    proptest! {
        /// However the stream is cut into packets and files, each file holds whole lines and nothing is lost.
        #[test]
        fn files_hold_whole_lines(lines in prop::collection::vec("[a-z]{0,12}", 1..40),
                                  cuts in prop::collection::vec((1_usize..30, any::<bool>()), 1..60)) {
            let stream = lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect::<String>();
            let (log, path) = file();
            let mut sink = Sink::new(log);
            sink.opened();
            let mut paths = vec![path];
            let mut rest = stream.as_bytes();
            for (len, rotate) in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (packet, later) = rest.split_at((*len).min(rest.len()));
                prop_assert_eq!(append(&mut sink, packet), 0);
                rest = later;
                if *rotate && sink.next.is_none() {
                    let (log, path) = file();
                    sink.replace(log);
                    paths.push(path);
                }
            }
            let files: Vec<_> = paths.iter().map(|path| std::fs::read_to_string(path.path()).unwrap()).collect();
            prop_assert!(files.iter().all(|text| text.is_empty() || text.ends_with('\n')));
            prop_assert_eq!(files.concat(), stream);
        }

        /// Whenever the disk is full, what is in the file are lines of the stream or beginnings of some, in order.
        #[test]
        fn a_full_disk_never_joins_lines(packets in prop::collection::vec(("[a-c\n]{1,10}", any::<bool>()), 1..40)) {
            let (log, path) = file();
            let mut sink = Sink::new(log.try_clone().unwrap());
            sink.opened();
            let (mut stream, mut dropped) = (String::new(), 0);
            for (packet, disk_is_full) in packets {
                sink.file = if disk_is_full { full() } else { log.try_clone().unwrap() };
                stream.push_str(&packet);
                dropped += append(&mut sink, packet.as_bytes());
            }
            let text = std::fs::read_to_string(path.path()).unwrap();
            let mut lines = stream.split('\n');
            for found in text.split('\n').filter(|line| !line.is_empty()) {
                prop_assert!(lines.any(|line| line.starts_with(found)), "{found:?} of {stream:?}");
            }
            prop_assert!(text.len() + dropped >= stream.len());
        }
    }
}
