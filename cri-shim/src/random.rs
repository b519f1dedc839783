//! Randomness of the host's kernel.

use std::fs::File;
use std::io::Read;

use crate::error::{IoContext, Result};

/// 256 bits, which nobody can guess.
const SEED_BYTES: usize = 32;

/// Bytes that nothing else has.
pub(crate) fn seed() -> Result<Vec<u8>> {
    let mut seed = vec![0; SEED_BYTES];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut seed));
    read.doing(|| "reading /dev/urandom")?;
    Ok(seed)
}

/// 64 hexadecimal digits that nothing else has.
pub(crate) fn id() -> Result<String> {
    Ok(seed()?.iter().map(|byte| format!("{byte:02x}")).collect())
}
