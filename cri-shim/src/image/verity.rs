//! The hash tree behind a disk, by which a guest's kernel notices each byte that is not as it was when the disk was made.
//!
//! The format is Linux's (Documentation/admin-guide/device-mapper/verity.rst), version 1 without superblock and salt: blocks of
//! 4 KiB hashed with SHA-256, 128 hashes to a block, level upon level up to one block, whose hash is the root. The levels follow
//! the data, the highest first. The same disk has the same tree.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::digest::Digest;

/// Bytes of a block, of data and of hashes.
const BLOCK: usize = 4096;
const BLOCK64: u64 = 4096;
/// Hashes in a block.
const FAN: u64 = 128;
/// Data blocks read at once: those of one block of hashes.
const CHUNK: usize = BLOCK * 128;

/// By what a guest checks a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verity {
    /// SHA-256 of the tree's highest block.
    pub root: Digest,
    /// Blocks of 4 KiB before the tree.
    pub data_blocks: u64,
}

/// Writes the tree of the first `bytes` of a file, whole blocks, behind them.
pub(crate) fn append(file: &File, bytes: u64) -> io::Result<Verity> {
    let data_blocks = bytes.div_ceil(BLOCK64);
    // Blocks of each level, the lowest first.
    let mut levels = vec![];
    let mut blocks = data_blocks;
    while blocks > 1 {
        blocks = blocks.div_ceil(FAN);
        levels.push(blocks);
    }
    let mut at = data_blocks.saturating_add(levels.iter().sum());
    let (mut below, mut below_blocks) = (0, data_blocks);
    for blocks in levels {
        at = at.saturating_sub(blocks);
        hash_level(file, below, below_blocks, at)?;
        (below, below_blocks) = (at, blocks);
    }
    // What is left is one block.
    let mut top = vec![0; BLOCK];
    file.read_exact_at(&mut top, below.saturating_mul(BLOCK64))?;
    Ok(Verity { root: Digest::of(&top), data_blocks })
}

/// Hashes `count` blocks from block `from` on into blocks from `to` on.
fn hash_level(file: &File, from: u64, count: u64, to: u64) -> io::Result<()> {
    // Most blocks of nothing but zeros are holes.
    let (zeros, of_zeros) = ([0; BLOCK], Sha256::digest([0; BLOCK]));
    let mut data = vec![0; CHUNK];
    let (mut done, mut to) = (0_u64, to);
    while done < count {
        let blocks = count.saturating_sub(done).min(FAN);
        let length = usize::try_from(blocks.saturating_mul(BLOCK64)).unwrap_or(CHUNK);
        let part = data.get_mut(..length).unwrap_or_default();
        file.read_exact_at(part, from.saturating_add(done).saturating_mul(BLOCK64))?;
        let mut hashes = Vec::with_capacity(BLOCK);
        for block in part.chunks(BLOCK) {
            let hash = if block == zeros { of_zeros } else { Sha256::digest(block) };
            hashes.extend_from_slice(&hash);
        }
        hashes.resize(BLOCK, 0);
        file.write_all_at(&hashes, to.saturating_mul(BLOCK64))?;
        done = done.saturating_add(blocks);
        to = to.saturating_add(1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, clippy::arithmetic_side_effects, reason = "a test may panic")]

    use std::process::Command;

    use super::*;

    fn disk(blocks: u64) -> (tempfile::NamedTempFile, Verity) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(blocks * BLOCK64).unwrap();
        for block in (0..blocks).step_by(3) {
            file.as_file().write_all_at(&block.to_le_bytes(), block * BLOCK64 + 7).unwrap();
        }
        let verity = append(file.as_file(), blocks * BLOCK64).unwrap();
        (file, verity)
    }

    #[test]
    fn a_tree_has_as_many_levels_as_it_needs() {
        for (blocks, tree) in [(1, 0), (2, 1), (128, 1), (129, 3), (128 * 128, 129), (128 * 128 + 1, 132)] {
            let (file, verity) = disk(blocks);
            assert_eq!(verity.data_blocks, blocks);
            assert_eq!(file.as_file().metadata().unwrap().len(), (blocks + tree) * BLOCK64, "{blocks} blocks");
        }
    }

    #[test]
    fn any_byte_changes_the_root() {
        let (_, before) = disk(300);
        let (file, again) = disk(300);
        assert_eq!(before, again);
        file.as_file().write_all_at(&[1], 299 * BLOCK64 + 4095).unwrap();
        assert_ne!(append(file.as_file(), 300 * BLOCK64).unwrap(), before);
    }

    /// The reference implementation, where the machine has it (Debian's package cryptsetup-bin).
    #[test]
    fn veritysetup_finds_the_same_root() {
        let (file, verity) = disk(20_000);
        let run = |file: &std::path::Path, offset: u64| {
            let mut command = Command::new("veritysetup");
            command.args(["verify", "--no-superblock", "--salt=-", "--hash=sha256", "--data-block-size=4096"]);
            command.args(["--hash-block-size=4096", &format!("--data-blocks={}", verity.data_blocks)]);
            command.arg(format!("--hash-offset={offset}")).arg(file).arg(file).arg(verity.root.hex());
            command.output()
        };
        let offset = verity.data_blocks * BLOCK64;
        let Ok(output) = run(file.path(), offset) else { return };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        file.as_file().write_all_at(&[1], 12_345 * BLOCK64).unwrap();
        assert!(!run(file.path(), offset).unwrap().status.success());
    }
}
