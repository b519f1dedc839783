//! Files stored without their holes: GNU's old format, and the three that GNU tar and libarchive write as PAX records
//! (GNU tar's manual, "Storing Sparse Files").

use std::collections::VecDeque;
use std::io::{self, Read, Take};

use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

use super::pax::{self, Records};
use super::{BLOCK, Error, damaged};

/// Most pieces of one file.
const MAX_PIECES: usize = 1 << 18;
/// Most digits of a number in a map.
const MAX_DIGITS: usize = 20;

/// Where the stored bytes belong.
pub(super) struct Map {
    /// Bytes of the file, holes included.
    pub(super) size: u64,
    /// Offset and length, ascending.
    pieces: VecDeque<(u64, u64)>,
}

impl Map {
    /// The map of an entry whose stored bytes come next; `None` for a file without holes. Takes from `stored` what is map.
    pub(super) fn of<R: Read>(
        header: &Header,
        records: &Records,
        stored: &mut Take<R>,
        size: u64,
    ) -> Result<Option<Self>, Error> {
        let map = if header.entry_type() == EntryType::GNUSparse {
            Self::old(header, stored, size)?
        } else if records.get("GNU.sparse.major") == Some(b"1") {
            let real = records.get("GNU.sparse.realsize").and_then(pax::decimal);
            let numbers = read_numbers(stored, header)?;
            Self::new(real, &numbers, header)?
        } else if let Some(map) = records.get("GNU.sparse.map") {
            let numbers: Vec<_> =
                map.split(|&byte| byte == b',').map(|text| pax::decimal(text).unwrap_or(-1)).collect();
            Self::new(records.get("GNU.sparse.size").and_then(pax::decimal), &numbers, header)?
        } else if let Some(size) = records.get("GNU.sparse.size") {
            let numbers =
                records.iter().filter(|(key, _)| matches!(*key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes"));
            let numbers: Vec<_> = numbers.map(|(_, text)| pax::decimal(text).unwrap_or(-1)).collect();
            Self::new(pax::decimal(size), &numbers, header)?
        } else {
            return Ok(None);
        };
        map.check(header).map(Some)
    }

    /// GNU's old format: four pieces in the header, more in blocks that follow it and are not counted in the entry's size.
    fn old<R: Read>(header: &Header, stored: &mut Take<R>, size: u64) -> Result<Self, Error> {
        let gnu = header.as_gnu().ok_or_else(|| damaged("a sparse file without a GNU header", header))?;
        let mut numbers = vec![];
        add_pieces(&gnu.sparse, &mut numbers);
        let mut more = gnu.is_extended();
        while more {
            let mut block = GnuExtSparseHeader::new();
            stored.get_mut().read_exact(block.as_mut_bytes()).map_err(Error::Read)?;
            add_pieces(block.sparse(), &mut numbers);
            more = block.is_extended();
            if numbers.len() > MAX_PIECES {
                return Err(damaged("a sparse file of too many pieces", header));
            }
        }
        stored.set_limit(super::padded(size));
        Self::new(pax::number(&gnu.realsize), &numbers, header)
    }

    fn new(size: Option<i64>, numbers: &[i64], header: &Header) -> Result<Self, Error> {
        let bad = || damaged("a bad map of a sparse file", header);
        let size = u64::try_from(size.ok_or_else(bad)?).map_err(|_| bad())?;
        let mut pieces = VecDeque::new();
        for pair in numbers.chunks(2) {
            let [offset, length] = pair else { return Err(bad()) };
            pieces.push_back((u64::try_from(*offset).map_err(|_| bad())?, u64::try_from(*length).map_err(|_| bad())?));
        }
        Ok(Self { size, pieces })
    }

    /// Pieces must ascend, not overlap, and end within the file.
    fn check(self, header: &Header) -> Result<Self, Error> {
        let mut end = 0_u64;
        for &(offset, length) in &self.pieces {
            let next = offset.checked_add(length).filter(|&next| offset >= end && next <= self.size);
            end = next.ok_or_else(|| damaged("a bad map of a sparse file", header))?;
        }
        Ok(self)
    }

    /// The whole file, zeros where its holes are.
    pub(super) fn expand<R: Read>(self, stored: R) -> Expanded<R> {
        Expanded { stored, at: 0, map: self }
    }
}

fn add_pieces(pieces: &[GnuSparseHeader], numbers: &mut Vec<i64>) {
    for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
        numbers.extend([pax::number(&piece.offset).unwrap_or(-1), pax::number(&piece.numbytes).unwrap_or(-1)]);
    }
}

/// PAX format 1.0: the data begins with decimal numbers, one a line, the first their count in pairs, filled up to a block.
fn read_numbers<R: Read>(stored: &mut Take<R>, header: &Header) -> Result<Vec<i64>, Error> {
    let bad = || damaged("a bad map of a sparse file", header);
    let (mut numbers, mut line, mut left, mut block) = (vec![], vec![], None::<usize>, [0; BLOCK]);
    while left != Some(0) {
        stored.read_exact(&mut block).map_err(Error::Read)?;
        for &byte in &block {
            if byte != b'\n' {
                line.push(byte);
                if line.len() > MAX_DIGITS && left != Some(0) {
                    return Err(bad());
                }
                continue;
            }
            let number = pax::decimal(&line).ok_or_else(bad)?;
            line.clear();
            left = match left {
                None => Some(
                    usize::try_from(number)
                        .ok()
                        .filter(|&n| n <= MAX_PIECES)
                        .and_then(|n| n.checked_mul(2))
                        .ok_or_else(bad)?,
                ),
                Some(left) => {
                    numbers.push(number);
                    left.checked_sub(1)
                }
            };
            if left == Some(0) {
                break;
            }
        }
    }
    Ok(numbers)
}

/// See [`Map::expand`].
pub(super) struct Expanded<R> {
    stored: R,
    at: u64,
    map: Map,
}

impl<R: Read> Read for Expanded<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            let (in_hole, end) = match self.map.pieces.front() {
                Some(&(offset, _)) if self.at < offset => (true, offset),
                Some(&(offset, length)) => (false, offset.saturating_add(length)),
                None => (true, self.map.size),
            };
            let room = usize::try_from(end.saturating_sub(self.at)).unwrap_or(usize::MAX).min(buf.len());
            if room == 0 {
                match self.map.pieces.pop_front() {
                    Some(_) => continue,
                    None => return Ok(0),
                }
            }
            let part = buf.get_mut(..room).unwrap_or_default();
            let read = if in_hole { part.len() } else { self.stored.read(part)? };
            if in_hole {
                part.fill(0);
            } else if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.at = self.at.saturating_add(u64::try_from(read).unwrap_or(u64::MAX));
            return Ok(read);
        }
    }
}
