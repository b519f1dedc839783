//! The superblock: 128 bytes at offset 1024 of block 0 (erofs_fs.h, struct erofs_super_block).

use super::BLOCK_LEN;

const MAGIC: u32 = 0xe0f5_e1e2;
const OFFSET: usize = 1024;
const CHECKSUM_OFFSET: usize = OFFSET + 4;
const BLOCK_BITS: u8 = 12;
/// EROFS_FEATURE_COMPAT_SB_CHKSUM and _MTIME.
const COMPATIBLE: u32 = 1 | 2;

/// What the superblock says that is not always the same.
pub(super) struct Superblock {
    /// Node number of the root directory, which has 16 bits: the root comes first in the metadata.
    pub(super) root: u64,
    pub(super) inodes: u64,
    pub(super) blocks: u32,
    pub(super) meta_block: u32,
    pub(super) xattr_block: u32,
    pub(super) uuid: [u8; 16],
}

impl Superblock {
    /// The whole of block 0.
    pub(super) fn block(&self) -> Vec<u8> {
        let root = u16::try_from(self.root).unwrap_or_default();
        let mut block = vec![0; OFFSET];
        block.extend(MAGIC.to_le_bytes());
        block.extend([0; 4]); // checksum
        block.extend(COMPATIBLE.to_le_bytes());
        block.extend([BLOCK_BITS, 0]); // no extension slots
        block.extend(root.to_le_bytes());
        block.extend(self.inodes.to_le_bytes());
        block.extend([0; 12]); // build time: compact inodes' mtime, of which there are none
        block.extend(self.blocks.to_le_bytes());
        block.extend(self.meta_block.to_le_bytes());
        block.extend(self.xattr_block.to_le_bytes());
        block.extend(self.uuid);
        block.resize(BLOCK_LEN, 0); // no name, no incompatible feature, no compression, no other device
        let checksum = crc32c(block.get(OFFSET..).unwrap_or_default());
        if let Some(field) = block.get_mut(CHECKSUM_OFFSET..CHECKSUM_OFFSET + 4) {
            field.copy_from_slice(&checksum.to_le_bytes());
        }
        block
    }
}

/// CRC-32C as the kernel's `crc32c(~0, …)`: not inverted at the end.
pub(super) fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 })
    })
}
