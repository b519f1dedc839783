//! Messages between the host and a pod's agent, their framing, and the rule of versions.
//!
//! Both ends treat the other as hostile: a frame has a length limit, and a message that does not decode ends the
//! connection. This crate does no more I/O than reading and writing one frame.

use std::io::{self, Read, Write};

use prost::Message;
use thiserror::Error;

/// The generated messages; their meaning is written in `agent.proto`.
#[allow(missing_docs, reason = "generated; documented in agent.proto")]
#[allow(clippy::all, reason = "generated")]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/pericarp.agent.v1.rs"));
}

/// The version this build speaks.
pub const VERSION: u32 = 2;

/// The oldest version it still understands: the previous one, so that a new host finds pods started by the old.
pub const OLDEST_VERSION: u32 = VERSION - 1;

/// vsock port in the guest for requests and events.
pub const CONTROL_PORT: u32 = 1;

/// vsock port in the guest for exec and attach sessions.
pub const SESSION_PORT: u32 = 2;

/// Longest frame in bytes, its length word not counted.
pub const FRAME_BYTES: usize = 4 << 20;

/// Most bytes of stdin, stdout or stderr in one session message.
pub const CHUNK_BYTES: usize = 64 << 10;

/// Why a frame could not be read or written.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The connection failed.
    #[error("the agent connection failed")]
    Io(#[from] io::Error),
    /// The peer announced more than [`FRAME_BYTES`].
    #[error("a message of {0} bytes is over the limit of {FRAME_BYTES}")]
    TooLong(usize),
    /// The bytes are not the message expected.
    #[error("a message does not decode")]
    Decode(#[from] prost::DecodeError),
    /// The peer speaks a version that is too old.
    #[error(
        "the other side speaks version {theirs} of the agent protocol, this one {OLDEST_VERSION} to {VERSION}: \
         restart the pod, so that both come from one release"
    )]
    Version {
        /// What the peer offered.
        theirs: u32,
    },
}

/// Encodes a message with its little-endian length before it.
pub fn encode(message: &impl Message) -> Result<Vec<u8>, FrameError> {
    let length = message.encoded_len();
    let word = u32::try_from(length).ok().filter(|_| length <= FRAME_BYTES).ok_or(FrameError::TooLong(length))?;
    let mut frame = Vec::with_capacity(length.saturating_add(size_of::<u32>()));
    frame.extend_from_slice(&word.to_le_bytes());
    message.encode_raw(&mut frame);
    Ok(frame)
}

/// Checks a frame's length word and returns the length.
pub fn frame_length(word: [u8; 4]) -> Result<usize, FrameError> {
    let length = usize::try_from(u32::from_le_bytes(word)).unwrap_or(usize::MAX);
    if length > FRAME_BYTES {
        return Err(FrameError::TooLong(length));
    }
    Ok(length)
}

/// Writes one message.
pub fn write(mut to: impl Write, message: &impl Message) -> Result<(), FrameError> {
    Ok(to.write_all(&encode(message)?)?)
}

/// Reads one message; `None` if the peer closed between messages.
pub fn read<M: Message + Default>(mut from: impl Read) -> Result<Option<M>, FrameError> {
    let mut word = [0; 4];
    match from.read_exact(&mut word[..1]) {
        Ok(()) => from.read_exact(&mut word[1..])?,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let mut bytes = vec![0; frame_length(word)?];
    from.read_exact(&mut bytes)?;
    Ok(Some(M::decode(bytes.as_slice())?))
}

/// The version both sides will speak, given the peer's [`v1::Hello`].
pub fn agree(theirs: u32) -> Result<u32, FrameError> {
    if theirs < OLDEST_VERSION {
        return Err(FrameError::Version { theirs });
    }
    Ok(theirs.min(VERSION))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_survives_its_frame() {
        let hello = v1::Hello { version: VERSION, kernel: "6.12.1".into() };
        let frame = encode(&hello).expect("encodes");
        let mut stream = frame.as_slice();
        assert_eq!(read::<v1::Hello>(&mut stream).expect("reads"), Some(hello));
        assert_eq!(read::<v1::Hello>(&mut stream).expect("reads"), None);
    }

    #[test]
    fn a_cut_frame_is_an_error_and_not_an_end() {
        let frame = encode(&v1::Hello { version: 1, kernel: "x".into() }).expect("encodes");
        for cut in 1..frame.len() {
            assert!(read::<v1::Hello>(&frame[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn a_length_over_the_limit_allocates_nothing() {
        assert!(matches!(read::<v1::Hello>([0xff; 8].as_slice()), Err(FrameError::TooLong(_))));
    }

    #[test]
    fn the_previous_version_is_accepted_and_an_older_one_refused_by_name() {
        assert_eq!(agree(VERSION).expect("same"), VERSION);
        assert_eq!(agree(OLDEST_VERSION).expect("previous"), OLDEST_VERSION);
        assert_eq!(agree(VERSION + 1).expect("newer"), VERSION);
        let text = agree(OLDEST_VERSION - 1).expect_err("too old").to_string();
        assert!(text.contains(&OLDEST_VERSION.to_string()) && text.contains(&(OLDEST_VERSION - 1).to_string()));
    }
}
