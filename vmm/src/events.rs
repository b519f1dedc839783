//! What happened to the VM: one JSON line per event in a file that outlives this process.

use std::fs::File;
use std::io::{self, Write};

use vmm_control::{Event, EventKind};

use crate::complain;
use crate::notes::now;

/// Most events kept for subscribers that come late.
const KEPT: usize = 256;

/// The events so far.
#[derive(Debug)]
pub struct Events {
    file: Option<File>,
    past: Vec<Event>,
}

impl Events {
    /// Writes to `file` from now on.
    pub fn new(file: Option<File>) -> Self {
        Self { file, past: Vec::new() }
    }

    /// Writes down what happens now, before there is a guest.
    pub fn record(&mut self, kind: EventKind) -> &Event {
        self.record_at(now(), None, kind)
    }

    /// Writes down what happened then, `exits` of the guest later. An event file on a full disk loses events, but the VM lives on.
    pub fn record_at(&mut self, at_ns: u64, exits: Option<u64>, kind: EventKind) -> &Event {
        let event = Event { at_ns, exits, kind };
        if let Err(error) = self.append(&event) {
            complain(format_args!("cannot write an event: {error}"));
        }
        if self.past.len() == KEPT {
            self.past.remove(0);
        }
        self.past.push(event);
        &self.past[self.past.len() - 1]
    }

    /// The file.
    pub fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// The events so far.
    pub fn past(&self) -> &[Event] {
        &self.past
    }

    /// One write per line, so that a reader sees whole lines or a torn last one.
    fn append(&mut self, event: &Event) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        file.write_all(&line)
    }
}
