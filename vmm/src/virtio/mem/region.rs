//! Which blocks of the region the guest has: the rules of plug and unplug (virtio 1.3 §5.15.6), without a queue.

use std::io;
use std::ops::Range;

use crate::memory::{BLOCK, CHUNK};

/// Length of `struct virtio_mem_req`, and of `struct virtio_mem_resp` (§5.15.6).
pub(super) const REQUEST_BYTES: usize = 24;
/// See [`REQUEST_BYTES`].
pub(super) const RESPONSE_BYTES: usize = 10;

// Types of request.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

// States of a range of blocks.
const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// What a request is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Done.
    Ack,
    /// Not now: it would be more than the host asked for.
    Nack,
    /// The host cannot at the moment; to be tried again.
    Busy,
    /// The request makes no sense.
    Error,
    /// Done; the state of a range.
    State(u16),
}

impl Answer {
    /// `struct virtio_mem_resp`.
    pub(super) fn bytes(self) -> [u8; RESPONSE_BYTES] {
        let (kind, state) = match self {
            Self::Ack => (0_u16, 0),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
            Self::State(state) => (0, state),
        };
        let ([a, b], [c, d]) = (kind.to_le_bytes(), state.to_le_bytes());
        [a, b, 0, 0, 0, 0, 0, 0, c, d]
    }
}

/// The host's side of the region.
pub trait Backing: Send {
    /// Lets the guest reach the chunk that begins at an address; it did not before.
    fn open(&mut self, chunk: u64) -> io::Result<()>;
    /// Lets the guest reach a chunk no more.
    fn close(&mut self, chunk: u64) -> io::Result<()>;
    /// Gives what is in a range back to the host.
    fn discard(&mut self, range: Range<u64>) -> io::Result<()>;
}

/// The region and its blocks.
#[derive(Debug)]
pub(super) struct Region {
    start: u64,
    plugged: Vec<bool>,
    /// Count of plugged blocks.
    count: usize,
    /// Blocks from the first on that the guest may plug.
    usable: usize,
    /// Bytes that the guest is asked to have plugged.
    requested: u64,
}

impl Region {
    /// Nothing plugged, nothing asked for. `start` and `bytes` are multiples of [`CHUNK`].
    pub(super) fn new(start: u64, bytes: u64) -> Self {
        let blocks = usize::try_from(bytes / BLOCK).unwrap_or(0);
        Self { start, plugged: vec![false; blocks], count: 0, usable: 0, requested: 0 }
    }

    /// Asks the guest to have so many bytes plugged; false if the region is smaller.
    pub(super) fn request(&mut self, bytes: u64) -> bool {
        if bytes > self.bytes(self.plugged.len()) || !bytes.is_multiple_of(BLOCK) {
            return false;
        }
        self.requested = bytes;
        // It shrinks only once all is unplugged (§5.15.6).
        self.usable = self.usable.max(self.usable_for(bytes));
        true
    }

    /// Bytes that are plugged.
    pub(super) fn plugged_bytes(&self) -> u64 {
        self.bytes(self.count)
    }

    /// Whether the guest has what it is asked to have.
    pub(super) fn is_settled(&self) -> bool {
        self.plugged_bytes() == self.requested
    }

    /// `struct virtio_mem_config`.
    pub(super) fn config(&self) -> Vec<u8> {
        let fields = [
            BLOCK,
            0, // node_id and padding; there is one node
            self.start,
            self.bytes(self.plugged.len()),
            self.bytes(self.usable),
            self.plugged_bytes(),
            self.requested,
        ];
        fields.iter().flat_map(|field| field.to_le_bytes()).collect()
    }

    /// Carries out a `struct virtio_mem_req`. An error is the host's.
    pub(super) fn serve(&mut self, request: &[u8; REQUEST_BYTES], backing: &mut dyn Backing) -> io::Result<Answer> {
        let &[k0, k1, _, _, _, _, _, _, a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, ..] = request;
        let kind = u16::from_le_bytes([k0, k1]);
        if kind == UNPLUG_ALL {
            return self.unplug_all(backing);
        }
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let Some(blocks) = self.blocks(address, u16::from_le_bytes([n0, n1])) else { return Ok(Answer::Error) };
        let plugged = self.plugged_in(&blocks);
        match kind {
            PLUG if plugged > 0 => Ok(Answer::Error),
            PLUG => Ok(self.plug(blocks, backing)),
            UNPLUG if plugged < blocks.len() => Ok(Answer::Error),
            UNPLUG => self.unplug(blocks, backing).map(|()| Answer::Ack),
            STATE if plugged == 0 => Ok(Answer::State(UNPLUGGED)),
            STATE if plugged == blocks.len() => Ok(Answer::State(PLUGGED)),
            STATE => Ok(Answer::State(MIXED)),
            _ => Ok(Answer::Error),
        }
    }

    fn plug(&mut self, blocks: Range<usize>, backing: &mut dyn Backing) -> Answer {
        // Never more than the host asked for (§5.15.6.2).
        if self.bytes(self.count.saturating_add(blocks.len())) > self.requested {
            return Answer::Nack;
        }
        let mut opened = Vec::new();
        for chunk in chunks(&blocks).filter(|chunk| self.plugged_in(chunk) == 0) {
            let address = self.address(chunk.start);
            if backing.open(address).is_err() {
                // What cannot be closed again is reached without being plugged, and counted against the pod like the rest.
                opened.into_iter().for_each(|chunk| drop(backing.close(chunk)));
                return Answer::Busy;
            }
            opened.push(address);
        }
        self.mark(blocks, true);
        Answer::Ack
    }

    fn unplug(&mut self, blocks: Range<usize>, backing: &mut dyn Backing) -> io::Result<()> {
        self.mark(blocks.clone(), false);
        // First of all, so that the guest brings no page back.
        for chunk in chunks(&blocks).filter(|chunk| self.plugged_in(chunk) == 0) {
            backing.close(self.address(chunk.start))?;
        }
        backing.discard(self.address(blocks.start)..self.address(blocks.end))
    }

    fn unplug_all(&mut self, backing: &mut dyn Backing) -> io::Result<Answer> {
        for chunk in chunks(&(0..self.plugged.len())) {
            if self.plugged_in(&chunk) > 0 {
                self.unplug(chunk, backing)?;
            }
        }
        self.usable = self.usable_for(self.requested);
        Ok(Answer::Ack)
    }

    /// The blocks that a request names, if they are whole and usable.
    fn blocks(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.start).filter(|offset| offset.is_multiple_of(BLOCK))?;
        let first = usize::try_from(offset / BLOCK).ok()?;
        let end = first.checked_add(usize::from(count))?;
        (count > 0 && end <= self.usable).then_some(first..end)
    }

    fn plugged_in(&self, blocks: &Range<usize>) -> usize {
        self.plugged.get(blocks.clone()).unwrap_or_default().iter().filter(|plugged| **plugged).count()
    }

    /// All of them were the opposite.
    fn mark(&mut self, blocks: Range<usize>, plugged: bool) {
        let before = self.plugged_in(&blocks);
        self.plugged.get_mut(blocks.clone()).unwrap_or_default().fill(plugged);
        self.count = self.count.saturating_sub(before).saturating_add(self.plugged_in(&blocks));
    }

    /// One chunk more than is needed: a guest may have parts of chunks left that it cannot unplug.
    fn usable_for(&self, bytes: u64) -> usize {
        let wanted = bytes.next_multiple_of(CHUNK).saturating_add(CHUNK);
        usize::try_from(wanted / BLOCK).unwrap_or(usize::MAX).min(self.plugged.len())
    }

    fn address(&self, block: usize) -> u64 {
        self.start.saturating_add(self.bytes(block))
    }

    fn bytes(&self, blocks: usize) -> u64 {
        u64::try_from(blocks).unwrap_or(u64::MAX).saturating_mul(BLOCK)
    }
}

/// The whole chunks that blocks lie in, each as a range of blocks.
fn chunks(blocks: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let size = usize::try_from(CHUNK / BLOCK).unwrap_or(usize::MAX);
    let first = blocks.start.checked_div(size).unwrap_or(0).saturating_mul(size);
    (first..blocks.end).step_by(size).map(move |start| start..start.saturating_add(size))
}
