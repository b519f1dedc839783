//! Frames of SPDY/3.1: bytes in, frames out, and back. No I/O.
//!
//! ```text
//! control: 1 | version (15) | type (16) | flags (8) | length (24) | payload
//! data:    0 | stream (31)              | flags (8) | length (24) | payload
//! ```
//! Numbers are big-endian. A data frame may be 16 MiB long, so its payload is passed on in pieces as it comes; a
//! control frame is taken whole, up to a limit.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects)]

use bytes::{Buf, Bytes, BytesMut};

use super::Error;
use super::headers::{Deflater, Headers, Inflater};

const VERSION: u32 = 3;

const SYN_STREAM: u32 = 1;
const SYN_REPLY: u32 = 2;
const RST_STREAM: u32 = 3;
const PING: u32 = 6;
const GOAWAY: u32 = 7;
const HEADERS: u32 = 8;

const FLAG_FIN: u32 = 1;
const LENGTH_MASK: u32 = 0xff_ffff;
const STREAM_MASK: u32 = 0x7fff_ffff;

/// Bytes of a frame before its payload.
const HEAD_BYTES: usize = 8;

/// Longest control frame, in bytes of its payload. Those of our peers have a few headers.
const CONTROL_BYTES: usize = 16 << 10;

/// Most bytes of a data frame passed on at once.
pub(super) const PIECE_BYTES: usize = 64 << 10;

/// What a peer says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// SYN_STREAM.
    Opened { id: u32, headers: Headers, fin: bool },
    /// Some of a data frame; `fin` with the last of a stream.
    Data { id: u32, bytes: Bytes, fin: bool },
    /// RST_STREAM.
    Reset { id: u32 },
    /// PING, which whoever did not send it first sends back.
    Ping { id: u32 },
    /// GOAWAY: no new streams.
    GoAway,
    /// What needs no answer: SETTINGS, WINDOW_UPDATE (peers do no flow control), replies, types of later versions.
    Ignored,
}

/// What we say.
#[derive(Debug)]
pub(super) enum Frame {
    Reply { id: u32 },
    Data { id: u32, bytes: Bytes, fin: bool },
    Reset { id: u32, status: u32 },
    Ping { id: u32 },
    GoAway { last: u32 },
}

/// A data frame of which not all has come.
#[derive(Clone, Copy, Debug)]
struct Partial {
    id: u32,
    left: usize,
    fin: bool,
}

/// Cuts a peer's bytes into frames.
#[derive(Debug)]
pub(super) struct Decoder {
    inflater: Inflater,
    partial: Option<Partial>,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self { inflater: Inflater::new(), partial: None }
    }

    /// The next frame of `buffer`, or a piece of one; `None` if that needs more bytes.
    pub(super) fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Received>, Error> {
        if let Some(partial) = self.partial.take() {
            return Ok(self.piece(partial, buffer));
        }
        let (Some(first), Some(second)) = (word(buffer, 0), word(buffer, 4)) else { return Ok(None) };
        let length = usize::try_from(second & LENGTH_MASK).unwrap_or(usize::MAX);
        let fin = (second >> 24) & FLAG_FIN != 0;
        if first & !STREAM_MASK == 0 {
            if first == 0 {
                return Err(Error::Stream(0));
            }
            buffer.advance(HEAD_BYTES);
            return Ok(self.piece(Partial { id: first, left: length, fin }, buffer));
        }
        let version = (first & STREAM_MASK) >> 16;
        if version != VERSION {
            return Err(Error::Version(version));
        }
        if length > CONTROL_BYTES {
            return Err(Error::TooLong(length));
        }
        if buffer.len() < HEAD_BYTES.saturating_add(length) {
            return Ok(None);
        }
        buffer.advance(HEAD_BYTES);
        let payload = buffer.split_to(length);
        self.control(first & 0xffff, fin, &payload).map(Some)
    }

    /// What has come of a data frame; an empty frame is one empty piece.
    fn piece(&mut self, partial: Partial, buffer: &mut BytesMut) -> Option<Received> {
        let Partial { id, left, fin } = partial;
        let take = left.min(buffer.len()).min(PIECE_BYTES);
        let rest = left.saturating_sub(take);
        if rest > 0 {
            self.partial = Some(Partial { id, left: rest, fin });
            if take == 0 {
                return None;
            }
        }
        Some(Received::Data { id, bytes: buffer.split_to(take).freeze(), fin: fin && rest == 0 })
    }

    fn control(&mut self, kind: u32, fin: bool, payload: &[u8]) -> Result<Received, Error> {
        let number = |at| word(payload, at).ok_or(Error::Short);
        let block = |at| payload.get(at..).ok_or(Error::Short);
        Ok(match kind {
            SYN_STREAM => {
                let id = stream(number(0)?)?;
                // Behind it: the associated stream, priority and slot, which mean nothing here.
                Received::Opened { id, headers: self.inflater.read(block(10)?)?, fin }
            }
            // Read for the sake of the compression, whose state runs through all of them.
            SYN_REPLY | HEADERS => {
                self.inflater.read(block(4)?)?;
                Received::Ignored
            }
            RST_STREAM => Received::Reset { id: stream(number(0)?)? },
            PING => Received::Ping { id: number(0)? },
            GOAWAY => Received::GoAway,
            _ => Received::Ignored,
        })
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_be_bytes(*word))
}

fn stream(id: u32) -> Result<u32, Error> {
    match id & STREAM_MASK {
        0 => Err(Error::Stream(0)),
        id => Ok(id),
    }
}

/// Makes bytes of our frames.
#[derive(Debug)]
pub(super) struct Encoder(Deflater);

impl Encoder {
    pub(super) fn new() -> Result<Self, Error> {
        Ok(Self(Deflater::new()?))
    }

    /// Appends a frame to `out`.
    pub(super) fn encode(&mut self, frame: &Frame, out: &mut Vec<u8>) -> Result<(), Error> {
        match frame {
            Frame::Reply { id } => {
                let block = self.0.write(&Headers::new())?;
                control(SYN_REPLY, &[&id.to_be_bytes(), &block], out)
            }
            Frame::Data { id, bytes, fin } => {
                let length = u32::try_from(bytes.len()).ok().filter(|&length| length <= LENGTH_MASK);
                let length = length.ok_or(Error::TooLong(bytes.len()))?;
                let flags = if *fin { FLAG_FIN } else { 0 };
                out.extend_from_slice(&id.to_be_bytes());
                out.extend_from_slice(&(flags << 24 | length).to_be_bytes());
                out.extend_from_slice(bytes);
                Ok(())
            }
            Frame::Reset { id, status } => control(RST_STREAM, &[&id.to_be_bytes(), &status.to_be_bytes()], out),
            Frame::Ping { id } => control(PING, &[&id.to_be_bytes()], out),
            // Status 0: OK.
            Frame::GoAway { last } => control(GOAWAY, &[&last.to_be_bytes(), &0_u32.to_be_bytes()], out),
        }
    }
}

fn control(kind: u32, parts: &[&[u8]], out: &mut Vec<u8>) -> Result<(), Error> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let word = u32::try_from(length).ok().filter(|&length| length <= LENGTH_MASK).ok_or(Error::TooLong(length))?;
    out.extend_from_slice(&(!STREAM_MASK | VERSION << 16 | kind).to_be_bytes());
    out.extend_from_slice(&word.to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects, reason = "a test may panic")]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A client's SYN_STREAM.
    pub(in crate::streaming) fn syn_stream(deflater: &mut Deflater, id: u32, headers: &[(&str, &str)]) -> Vec<u8> {
        let headers = headers.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        let block = deflater.write(&headers).expect("writes");
        let mut out = Vec::new();
        control(SYN_STREAM, &[&id.to_be_bytes(), &[0; 6], &block], &mut out).expect("fits");
        out
    }

    fn all(bytes: &[u8], chunk: usize) -> Result<Vec<Received>, Error> {
        let (mut decoder, mut buffer, mut frames) = (Decoder::new(), BytesMut::new(), Vec::new());
        for part in bytes.chunks(chunk.max(1)) {
            buffer.extend_from_slice(part);
            while let Some(frame) = decoder.next(&mut buffer)? {
                frames.push(frame);
            }
        }
        Ok(frames)
    }

    #[test]
    fn frames_come_whole_however_they_arrive() {
        let mut deflater = Deflater::new().expect("zlib");
        let mut bytes = syn_stream(&mut deflater, 1, &[("streamType", "stdin")]);
        bytes.extend(syn_stream(&mut deflater, 3, &[("streamtype", "error")]));
        let mut encoder = Encoder::new().expect("zlib");
        encoder.encode(&Frame::Ping { id: 7 }, &mut bytes).expect("fits");
        encoder.encode(&Frame::Reset { id: 3, status: 5 }, &mut bytes).expect("fits");
        encoder.encode(&Frame::GoAway { last: 3 }, &mut bytes).expect("fits");
        let opened = |id, kind: &str| Received::Opened {
            id,
            headers: vec![("streamtype".to_owned(), kind.to_owned())],
            fin: false,
        };
        for chunk in [1, 3, 8, 1000] {
            let expected = vec![
                opened(1, "stdin"),
                opened(3, "error"),
                Received::Ping { id: 7 },
                Received::Reset { id: 3 },
                Received::GoAway,
            ];
            assert_eq!(all(&bytes, chunk).expect("valid"), expected, "in chunks of {chunk}");
        }
    }

    #[test]
    fn a_long_data_frame_is_passed_on_in_pieces_and_ends_once() {
        let payload = vec![7; 3 * PIECE_BYTES + 1];
        let mut bytes = Vec::new();
        let frame = Frame::Data { id: 5, bytes: payload.clone().into(), fin: true };
        Encoder::new().expect("zlib").encode(&frame, &mut bytes).expect("fits");
        for chunk in [1000, PIECE_BYTES, bytes.len()] {
            let (mut found, mut ends) = (Vec::new(), 0);
            for frame in all(&bytes, chunk).expect("valid") {
                let Received::Data { id: 5, bytes, fin } = frame else { panic!("{frame:?}") };
                assert!(bytes.len() <= PIECE_BYTES && ends == 0);
                found.extend_from_slice(&bytes);
                ends += usize::from(fin);
            }
            assert!(found == payload && ends == 1, "in chunks of {chunk}");
        }
        let empty = [0, 0, 0, 5, 1, 0, 0, 0];
        assert_eq!(all(&empty, 8).expect("valid"), [Received::Data { id: 5, bytes: Bytes::new(), fin: true }]);
    }

    #[test]
    fn broken_frames_are_errors() {
        for (bytes, why) in [
            (&[0, 0, 0, 0, 0, 0, 0, 0][..], "stream 0"),
            (&[0x80, 2, 0, 1, 0, 0, 0, 0], "an old version"),
            (&[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff], "a long control frame"),
            (&[0x80, 3, 0, 1, 0, 0, 0, 0], "no payload"),
            (&[0x80, 3, 0, 3, 0, 0, 0, 4, 0, 0, 0, 0], "a reset of stream 0"),
            (&[0x80, 3, 0, 2, 0, 0, 0, 6, 0, 0, 0, 1, 9, 9], "headers that are not zlib"),
        ] {
            assert!(all(bytes, 64).is_err(), "{why}");
        }
        assert_eq!(all(&[0x80, 3, 0, 99, 0, 0, 0, 1, 0], 64).expect("later versions"), [Received::Ignored]);
    }

    proptest! {
        /// Whatever a peer sends, the worst is an error, and nothing is kept but what is still awaited.
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096), chunk in 1_usize..512) {
            let _ = all(&bytes, chunk);
        }

        /// The same for what begins well: mutated streams of real frames.
        #[test]
        fn mutations_never_panic(at in 0_usize..200, byte in any::<u8>(), cut in 0_usize..200) {
            let mut deflater = Deflater::new().expect("zlib");
            let mut bytes = syn_stream(&mut deflater, 1, &[("streamtype", "data"), ("port", "80"), ("requestid", "0")]);
            bytes.extend(syn_stream(&mut deflater, 3, &[("streamtype", "error"), ("port", "80"), ("requestid", "0")]));
            bytes.extend([0, 0, 0, 1, 0, 0, 0, 3, 1, 2, 3]);
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(bytes.len().saturating_sub(cut));
            let _ = all(&bytes, 64);
        }
    }
}
