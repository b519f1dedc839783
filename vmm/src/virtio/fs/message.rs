//! The headers of FUSE messages, as far as a relay must know them (`struct fuse_in_header` and `struct
//! fuse_out_header` of linux/fuse.h): pure functions over copies of bytes.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::as_conversions,
        clippy::arithmetic_side_effects,
        clippy::panic
    )
)]

/// Bytes of a request's header.
pub(super) const REQUEST_HEADER: usize = 40;

/// Bytes of an answer's header.
pub(super) const ANSWER_HEADER: usize = 16;

/// Longest message in either direction: 128 KiB of data, which is what a driver sends and asks for at most unless the
/// server offers more, and its headers.
pub(super) const MESSAGE_BYTES: usize = (128 << 10) + 4096;

/// Where both headers have the number that joins them.
const NUMBER_AT: usize = 8;

/// Whether a message has a header, and its length is true.
pub(super) fn is_whole(message: &[u8], header: usize) -> bool {
    let told = message.first_chunk().map(|length| u32::from_le_bytes(*length));
    message.len() >= header && told.and_then(|told| usize::try_from(told).ok()) == Some(message.len())
}

/// A message's number; 0 if it ends before.
pub(super) fn number(message: &[u8]) -> u64 {
    message.get(NUMBER_AT..).and_then(<[u8]>::first_chunk).map_or(0, |number| u64::from_le_bytes(*number))
}

/// Puts another number in its place.
pub(super) fn set_number(message: &mut [u8], number: u64) {
    for (byte, new) in message.iter_mut().skip(NUMBER_AT).zip(number.to_le_bytes()) {
        *byte = new;
    }
}

/// An answer that says nothing but why there is no other.
pub(super) fn failure(number: u64, errno: i32) -> [u8; ANSWER_HEADER] {
    let [a, b, c, d] = u32::try_from(ANSWER_HEADER).unwrap_or_default().to_le_bytes();
    let [e, f, g, h] = errno.wrapping_neg().to_le_bytes();
    let [i, j, k, l, m, n, o, p] = number.to_le_bytes();
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_must_tell_the_truth() {
        let mut message = vec![0; 41];
        message[0] = 41;
        set_number(&mut message, 0x0102_0304_0506_0708);
        assert!(is_whole(&message, REQUEST_HEADER));
        assert_eq!(number(&message), 0x0102_0304_0506_0708);
        for length in [0, 3, 15, 40] {
            assert!(!is_whole(&message[..length], REQUEST_HEADER), "{length}");
        }
        assert_eq!(number(&message[..15]), 0);
        message[3] = 1;
        assert!(!is_whole(&message, REQUEST_HEADER));
    }

    #[test]
    fn a_failure_is_an_answer() {
        let failure = failure(7, 5);
        assert!(is_whole(&failure, ANSWER_HEADER));
        assert_eq!((number(&failure), &failure[4..8]), (7, &(-5_i32).to_le_bytes()[..]));
    }
}
