//! Content addresses (`sha256:…`) and the readers that check them.

use std::fmt;
use std::io::{self, Read};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha512};

/// Hexadecimal digits of each algorithm.
const SHA256_DIGITS: usize = 64;
const SHA512_DIGITS: usize = 128;

/// A digest as OCI writes it, its form checked.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

/// A text that is no digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no digest: sha256: and 64 hexadecimal digits, or sha512: and 128, are expected")]
pub struct BadDigest(String);

impl Digest {
    /// The SHA-256 of bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::Sha256(Sha256::new());
        hasher.update(bytes);
        hasher.finish()
    }

    /// As written, algorithm first.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The hexadecimal digits alone.
    pub fn hex(&self) -> &str {
        self.0.split_once(':').map_or("", |(_, hex)| hex)
    }

    /// The digest itself.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let pairs = self.hex().as_bytes().chunks(2);
        pairs.filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
    }

    /// What computes digests of this kind.
    pub(crate) fn hasher(&self) -> Hasher {
        if self.0.starts_with("sha512:") { Hasher::Sha512(Sha512::new()) } else { Hasher::Sha256(Sha256::new()) }
    }
}

impl TryFrom<String> for Digest {
    type Error = BadDigest;

    fn try_from(text: String) -> Result<Self, BadDigest> {
        let digits = match text.split_once(':') {
            Some(("sha256", hex)) if hex.len() == SHA256_DIGITS => hex,
            Some(("sha512", hex)) if hex.len() == SHA512_DIGITS => hex,
            _ => return Err(BadDigest(text)),
        };
        if digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            Ok(Self(text))
        } else {
            Err(BadDigest(text))
        }
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Computes a digest.
#[derive(Clone)]
pub(crate) enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Digest {
        let (name, bytes) = match self {
            Self::Sha256(hasher) => ("sha256:", hasher.finalize().to_vec()),
            Self::Sha512(hasher) => ("sha512:", hasher.finalize().to_vec()),
        };
        Digest(bytes.iter().fold(name.to_owned(), |text, byte| format!("{text}{byte:02x}")))
    }
}

/// Content that is not what its digest or size says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Other bytes.
    #[error(
        "its digest is {got}, not {expected}: the copy is damaged or was tampered with; push the image anew, or pull it from elsewhere"
    )]
    Digest {
        /// As announced.
        expected: Digest,
        /// As found.
        got: Digest,
    },
    /// Fewer or more bytes.
    #[error(
        "it has {got} bytes, not {expected}: the copy is incomplete or damaged; pull again, and if it stays so push the image anew"
    )]
    Size {
        /// As announced.
        expected: u64,
        /// As found; one more than expected stands for any number more.
        got: u64,
    },
}

/// Passes bytes on while it checks them: the end is only reported once size and digest are right.
pub(crate) struct Verified<R> {
    from: R,
    check: Option<Check>,
    /// Once found wrong, for ever wrong.
    wrong: Option<Mismatch>,
}

/// Checks bytes as they pass.
pub(crate) struct Check {
    hasher: Hasher,
    expected: Digest,
    size: Option<u64>,
    got: u64,
}

impl Check {
    /// `size` is checked where it is known.
    pub(crate) fn new(expected: Digest, size: Option<u64>) -> Self {
        Self { hasher: expected.hasher(), expected, size, got: 0 }
    }

    /// Fails as soon as there are too many.
    pub(crate) fn update(&mut self, bytes: &[u8]) -> Result<(), Mismatch> {
        self.got = self.got.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        if let Some(expected) = self.size
            && self.got > expected
        {
            return Err(Mismatch::Size { expected, got: expected.saturating_add(1) });
        }
        self.hasher.update(bytes);
        Ok(())
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> u64 {
        self.got
    }

    pub(crate) fn finish(self) -> Result<(), Mismatch> {
        if let Some(expected) = self.size
            && self.got != expected
        {
            return Err(Mismatch::Size { expected, got: self.got });
        }
        let got = self.hasher.finish();
        if got == self.expected { Ok(()) } else { Err(Mismatch::Digest { expected: self.expected, got }) }
    }
}

impl<R: Read> Verified<R> {
    pub(crate) fn new(from: R, check: Check) -> Self {
        Self { from, check: Some(check), wrong: None }
    }
}

impl<R: Read> Read for Verified<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if let Some(wrong) = &self.wrong {
            return Err(io::Error::other(wrong.clone()));
        }
        let read = self.from.read(buf)?;
        let checked = match &mut self.check {
            Some(check) if read > 0 => check.update(buf.get(..read).unwrap_or_default()),
            Some(_) if !buf.is_empty() => self.check.take().map_or(Ok(()), Check::finish),
            _ => Ok(()),
        };
        match checked {
            Ok(()) => Ok(read),
            Err(wrong) => {
                self.wrong = Some(wrong.clone());
                Err(io::Error::other(wrong))
            }
        }
    }
}

/// The [`Mismatch`] that an error of [`Verified`] carries.
pub(crate) fn mismatch(error: &io::Error) -> Option<&Mismatch> {
    error.get_ref()?.downcast_ref()
}
