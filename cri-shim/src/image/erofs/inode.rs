//! Inodes: 64 bytes each, the extended form (erofs_fs.h, struct erofs_inode_extended).

use super::super::tree::{Content, Node};
use super::{BLOCK_LEN, BLOCK64, Error, Place};

/// Bytes of an inode, without what lies beside it.
pub(super) const LEN: usize = 64;
/// Extended form, the lowest bit of i_format.
const EXTENDED: u16 = 1;
/// Data layouts, from bit 1 of i_format.
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;
const LAYOUT_SHIFT: u16 = 1;
/// File types in i_mode (inode(7)).
const S_IFIFO: u16 = 0o010_000;
const S_IFCHR: u16 = 0o020_000;
const S_IFDIR: u16 = 0o040_000;
const S_IFBLK: u16 = 0o060_000;
const S_IFREG: u16 = 0o100_000;
const S_IFLNK: u16 = 0o120_000;
/// The largest device numbers that Linux's 32-bit form holds.
const MAX_MAJOR: u32 = 0xfff;
const MAX_MINOR: u32 = 0xf_ffff;

/// Whether `tail` bytes can lie beside an inode: data beside inodes must not cross a block's end.
pub(super) fn fits_block(xattrs: usize, tail: usize) -> bool {
    LEN.saturating_add(xattrs).saturating_add(tail) <= BLOCK_LEN
}

/// Where an inode goes that may not start before `at`: whole in one block if it can be.
pub(super) fn start(at: u64, xattrs: usize, tail: usize) -> u64 {
    let len = u64::try_from(LEN.saturating_add(xattrs).saturating_add(tail)).unwrap_or(u64::MAX);
    let room = BLOCK64.saturating_sub(at % BLOCK64);
    if len <= room { at } else { at.next_multiple_of(BLOCK64) }
}

/// An inode about to be written.
pub(super) struct Inode<'a> {
    pub(super) node: &'a Node,
    pub(super) place: &'a Place,
    /// Counts the inodes of the image from 1.
    pub(super) number: u32,
    /// Bytes of a directory or symbolic link.
    pub(super) data_len: usize,
    /// Bytes of extended attributes beside it.
    pub(super) xattrs: usize,
}

impl Inode<'_> {
    pub(super) fn bytes(&self) -> Result<Vec<u8>, Error> {
        let attributes = &self.node.attributes;
        let late_len = || u64::try_from(self.data_len).map_err(|_| Error::TooLarge);
        let (kind, size, data) = match &self.node.content {
            Content::Directory(_) => (S_IFDIR, late_len()?, self.place.late_block),
            Content::Symlink(_) => (S_IFLNK, late_len()?, self.place.late_block),
            Content::File(data) => (S_IFREG, data.size, data.block),
            Content::CharDevice(major, minor) => (S_IFCHR, 0, device(*major, *minor)?),
            Content::BlockDevice(major, minor) => (S_IFBLK, 0, device(*major, *minor)?),
            Content::Fifo => (S_IFIFO, 0, 0),
        };
        let layout = if self.place.tail > 0 { FLAT_INLINE } else { FLAT_PLAIN };
        let mut bytes = Vec::with_capacity(LEN);
        bytes.extend((EXTENDED | (layout << LAYOUT_SHIFT)).to_le_bytes());
        bytes.extend(super::xattr::count_field(self.xattrs)?.to_le_bytes());
        bytes.extend((kind | (attributes.mode & 0o7777)).to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(size.to_le_bytes());
        bytes.extend(data.to_le_bytes());
        bytes.extend(self.number.to_le_bytes());
        bytes.extend(attributes.uid.to_le_bytes());
        bytes.extend(attributes.gid.to_le_bytes());
        bytes.extend(attributes.mtime.0.to_le_bytes());
        bytes.extend(attributes.mtime.1.to_le_bytes());
        bytes.extend(self.place.links.to_le_bytes());
        bytes.resize(LEN, 0);
        Ok(bytes)
    }
}

/// Linux's 32-bit form of a device number (new_encode_dev() in kdev_t.h).
fn device(major: u32, minor: u32) -> Result<u32, Error> {
    if major > MAX_MAJOR || minor > MAX_MINOR {
        return Err(Error::Device(major, minor));
    }
    Ok((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}
