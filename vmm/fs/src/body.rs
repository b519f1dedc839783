//! Taking a request apart: structures, then names, then bytes.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::ffi::CStr;

use rustix::io::{Errno, Result};
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// What is left of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Body<'a>(pub(crate) &'a [u8]);

impl<'a> Body<'a> {
    /// The next structure.
    pub(crate) fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = rest;
        Ok(value)
    }

    /// The next string.
    pub(crate) fn text(&mut self) -> Result<&'a CStr> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = self.0.get(text.to_bytes_with_nul().len()..).unwrap_or_default();
        Ok(text)
    }

    /// The next string, which must name an entry of a directory: nothing that leads elsewhere.
    pub(crate) fn name(&mut self) -> Result<&'a CStr> {
        let name = self.text()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_component() {
        for bytes in [&b"\0"[..], b".\0", b"..\0", b"a/b\0", b"/\0", b"a", b""] {
            assert!(Body(bytes).name().is_err(), "{bytes:?}");
        }
        let mut body = Body(b"...\0b\0rest");
        assert_eq!(body.name(), Ok(c"..."));
        assert_eq!(body.name(), Ok(c"b"));
        assert_eq!(body.0, b"rest");
        assert!(body.take::<u64>().is_err());
    }
}
