//! Writes EROFS images: read-only, uncompressed, the same bytes for the same input.
//!
//! The format is Linux's (Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h of 6.12), of which this uses: 4 KiB
//! blocks, extended inodes, the layouts FLAT_PLAIN and FLAT_INLINE, inline and shared extended attributes, and the
//! superblock's checksum. File data is written once, while it arrives, at growing addresses from block 1; what describes it
//! follows when the tree is known, and the superblock is written last.
//!
//! Never reads what it wrote, and never depends on time, process or host.

mod directory;
mod inode;
mod superblock;
mod xattr;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};

use super::tree::{Content, FileData, NodeId, ROOT, Tree};
pub(crate) use xattr::{is_storable, max_len};

/// Bytes of a block.
const BLOCK64: u64 = 4096;
/// The same, for arithmetic in memory.
const BLOCK_LEN: usize = 4096;
/// The rest of a file behind its whole blocks lies beside the inode up to this size; larger ones would pack badly.
const MAX_INLINE_TAIL: usize = 2048;
/// Most bytes of such rests held in memory; files after that get blocks for theirs.
const MAX_INLINE_TOTAL: usize = 128 << 20;
/// Bytes handed to the kernel at once.
const WRITE_BUFFER: usize = 1 << 20;
/// Inodes lie at multiples of this; a node number counts them from the start of the metadata.
const SLOT: u64 = 32;

/// What can be wrong with a tree as an EROFS image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The output cannot be written.
    #[error("cannot write the file system image")]
    Write(#[source] io::Error),
    /// The input cannot be read.
    #[error(transparent)]
    Read(io::Error),
    /// Block addresses have 32 bits.
    #[error("the image is larger than 16 TiB")]
    TooLarge,
    /// A device number that Linux cannot hold.
    #[error("a device has the number {0}:{1}, but Linux ends at 4095:1048575")]
    Device(u32, u32),
    /// More extended attributes than fit an inode.
    #[error("a file has more than {} KiB of extended attributes", xattr::MAX_BODY >> 10)]
    Xattrs,
}

/// An image being written.
pub(crate) struct Writer {
    out: BufWriter<File>,
    /// The next block to be written.
    block: u32,
    /// Bytes of tails handed out so far.
    inline: usize,
}

/// What became of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Summary {
    /// Bytes, holes included.
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

/// Where the parts of one node lie.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    /// Node number: slots from the start of the metadata; 0 until laid out, since none lies there.
    nid: u64,
    parent: u64,
    links: u32,
    /// First block of data written after the layers: directories, long symbolic links.
    late_block: u32,
    /// Bytes beside the inode, behind the extended attributes.
    tail: usize,
}

impl Writer {
    /// Writes to an empty file.
    pub(crate) fn new(file: File) -> Result<Self, Error> {
        let mut out = BufWriter::with_capacity(WRITE_BUFFER, file);
        out.write_all(&[0; BLOCK_LEN]).map_err(Error::Write)?;
        Ok(Self { out, block: 1, inline: 0 })
    }

    /// Writes the contents of a file, `size` bytes of `from`, with extended attributes that need `xattrs` bytes beside the inode.
    pub(crate) fn add_file(&mut self, from: &mut dyn Read, size: u64, xattrs: usize) -> Result<FileData, Error> {
        let first = self.block;
        let tail_len = usize::try_from(size % BLOCK64).map_err(|_| Error::TooLarge)?;
        let inline = self.may_inline(tail_len, xattrs);
        let whole = if inline { size.saturating_sub(size % BLOCK64) } else { size };
        let copied = io::copy(&mut from.take(whole), &mut Tagged(&mut self.out)).map_err(untag)?;
        if copied < whole {
            return Err(Error::Read(io::ErrorKind::UnexpectedEof.into()));
        }
        self.pad(whole)?;
        let mut tail = vec![];
        if inline {
            tail.resize(tail_len, 0);
            from.read_exact(&mut tail).map_err(Error::Read)?;
            self.inline = self.inline.saturating_add(tail_len);
        }
        Ok(FileData { size, block: first, tail })
    }

    fn may_inline(&self, tail: usize, xattrs: usize) -> bool {
        tail > 0
            && tail <= MAX_INLINE_TAIL
            && inode::fits_block(xattrs, tail)
            && self.inline.saturating_add(tail) <= MAX_INLINE_TOTAL
    }

    /// Fills the last block after `written` bytes from a block's start, and moves on by them.
    fn pad(&mut self, written: u64) -> Result<(), Error> {
        let blocks = written.div_ceil(BLOCK64);
        let missing = blocks.saturating_mul(BLOCK64).saturating_sub(written);
        io::copy(&mut io::repeat(0).take(missing), &mut self.out).map_err(Error::Write)?;
        let blocks = u32::try_from(blocks).map_err(|_| Error::TooLarge)?;
        self.block = self.block.checked_add(blocks).ok_or(Error::TooLarge)?;
        Ok(())
    }

    /// Writes what describes the tree and ends the image. Data that no name leads to any more becomes holes, so that it takes no
    /// space and what a later layer deletes is really gone.
    pub(crate) fn finish(mut self, tree: &Tree, uuid: [u8; 16]) -> Result<Summary, Error> {
        self.out.flush().map_err(Error::Write)?;
        let order = reachable(tree);
        self.punch(tree, order.iter().map(|&(id, _)| id))?;
        let shared = xattr::Shared::of(tree, order.iter().map(|&(id, _)| id));
        let mut places = BTreeMap::<NodeId, Place>::new();
        self.lay_out(tree, &order, &shared, &mut places)?;
        self.write_late(tree, &order, &places)?;
        let xattr_block = self.block;
        self.out.write_all(shared.bytes()).map_err(Error::Write)?;
        self.pad(len64(shared.bytes())?)?;
        let meta_block = self.block;
        let metadata = self.write_inodes(tree, &order, &shared, &places)?;
        self.pad(metadata)?;
        let root = places.get(&ROOT).map_or(0, |place| place.nid);
        let summary = Summary { bytes: u64::from(self.block).saturating_mul(BLOCK64), inodes: len64(&order)? };
        let superblock =
            superblock::Superblock { root, inodes: summary.inodes, blocks: self.block, meta_block, xattr_block, uuid }
                .block();
        self.out.flush().map_err(Error::Write)?;
        self.out.get_ref().write_all_at(&superblock, 0).map_err(Error::Write)?;
        Ok(summary)
    }

    /// Makes holes of all data blocks but those of the files given.
    fn punch(&self, tree: &Tree, live: impl Iterator<Item = NodeId>) -> Result<(), Error> {
        let mut extents: Vec<(u32, u32)> = live
            .filter_map(|id| match &tree.node(id).content {
                Content::File(data) => data_blocks(data),
                _ => None,
            })
            .collect();
        extents.sort_unstable();
        let mut next = 1;
        for (start, end) in extents.into_iter().chain([(self.block, self.block)]) {
            if start > next {
                hole(self.out.get_ref(), next, start)?;
            }
            next = end;
        }
        Ok(())
    }

    /// Gives every node its number and its late blocks.
    fn lay_out(
        &self,
        tree: &Tree,
        order: &[(NodeId, NodeId)],
        shared: &xattr::Shared,
        places: &mut BTreeMap<NodeId, Place>,
    ) -> Result<(), Error> {
        let mut late = self.block;
        // Not at 0: a node number of 0 would make an inode number of 0, which readdir(3) takes for a deleted entry.
        let mut at = SLOT;
        for &(id, parent) in order {
            let parent = places.get(&parent).map_or(0, |parent| parent.nid);
            let node = tree.node(id);
            let xattrs = xattr::body_len(&node.attributes.xattrs, shared)?;
            let (blocks, tail) = late_parts(&node.content, xattrs);
            let start = inode::start(at, xattrs, tail);
            let place = places.entry(id).or_default();
            place.nid = start / SLOT;
            place.parent = if id == ROOT { place.nid } else { parent };
            place.late_block = late;
            place.tail = tail;
            at = start.saturating_add(len64_of(inode::LEN.saturating_add(xattrs).saturating_add(tail))?);
            at = at.next_multiple_of(SLOT);
            late = late.checked_add(blocks).ok_or(Error::TooLarge)?;
        }
        count_links(tree, order, places);
        Ok(())
    }

    /// The whole blocks of directories, and what else has no room beside its inode.
    fn write_late(
        &mut self,
        tree: &Tree,
        order: &[(NodeId, NodeId)],
        places: &BTreeMap<NodeId, Place>,
    ) -> Result<(), Error> {
        for &(id, _) in order {
            let bytes = match &tree.node(id).content {
                Content::Directory(names) => directory::serialize(tree, names, id, places),
                Content::Symlink(target) => target.clone(),
                _ => continue,
            };
            let tail = places.get(&id).map_or(0, |place| place.tail);
            let whole = bytes.get(..bytes.len().saturating_sub(tail)).unwrap_or_default();
            self.out.write_all(whole).map_err(Error::Write)?;
            self.pad(len64(whole)?)?;
        }
        Ok(())
    }

    /// Returns the bytes written.
    fn write_inodes(
        &mut self,
        tree: &Tree,
        order: &[(NodeId, NodeId)],
        shared: &xattr::Shared,
        places: &BTreeMap<NodeId, Place>,
    ) -> Result<u64, Error> {
        let mut at = 0_u64;
        for (&(id, _), number) in order.iter().zip(1_u32..) {
            let node = tree.node(id);
            let place = places.get(&id).copied().unwrap_or_default();
            let start = place.nid.saturating_mul(SLOT);
            io::copy(&mut io::repeat(0).take(start.saturating_sub(at)), &mut self.out).map_err(Error::Write)?;
            at = start;
            let data = match &node.content {
                Content::Directory(names) => directory::serialize(tree, names, id, places),
                Content::Symlink(target) => target.clone(),
                Content::File(data) => data.tail.clone(),
                _ => vec![],
            };
            let tail = data.get(data.len().saturating_sub(place.tail)..).unwrap_or_default();
            let body = xattr::body(&node.attributes.xattrs, shared)?;
            let header =
                inode::Inode { node, place: &place, number, data_len: data.len(), xattrs: body.len() }.bytes()?;
            for part in [header.as_slice(), body.as_slice(), tail] {
                self.out.write_all(part).map_err(Error::Write)?;
                at = at.saturating_add(len64(part)?);
            }
        }
        Ok(at)
    }
}

/// Blocks written behind the layers' data, and bytes beside the inode.
fn late_parts(content: &Content, xattrs: usize) -> (u32, usize) {
    let (len, late) = match content {
        Content::Directory(names) => (directory::len(names), true),
        Content::Symlink(target) => (target.len(), true),
        Content::File(data) => (data.tail.len(), false),
        _ => (0, false),
    };
    let tail = len % BLOCK_LEN;
    let tail = if late && !inode::fits_block(xattrs, tail) { 0 } else { tail };
    let blocks = if late { len.saturating_sub(tail).div_ceil(BLOCK_LEN) } else { 0 };
    (u32::try_from(blocks).unwrap_or(u32::MAX), tail)
}

/// Every node that a name leads to, once, with its parent: directory by directory, so that siblings lie together.
fn reachable(tree: &Tree) -> Vec<(NodeId, NodeId)> {
    let mut seen = vec![false; tree.len()];
    let mut order = vec![(ROOT, ROOT)];
    let mut next = 0;
    while let Some(&(id, _)) = order.get(next) {
        next = next.saturating_add(1);
        for &child in tree.children(id).into_iter().flat_map(BTreeMap::values) {
            if let Some(seen) = seen.get_mut(child.index())
                && !std::mem::replace(seen, true)
            {
                order.push((child, id));
            }
        }
    }
    order
}

/// A file has a link per name; a directory its own `.`, its name and one `..` per directory in it.
fn count_links(tree: &Tree, order: &[(NodeId, NodeId)], places: &mut BTreeMap<NodeId, Place>) {
    for &(id, _) in order {
        let Some(names) = tree.children(id) else { continue };
        let mut own = 2_u32;
        for child in names.values() {
            if tree.children(*child).is_some() {
                own = own.saturating_add(1);
            } else if let Some(place) = places.get_mut(child) {
                place.links = place.links.saturating_add(1);
            }
        }
        if let Some(place) = places.get_mut(&id) {
            place.links = own;
        }
    }
}

/// First block of a file's data and the one behind its last; `None` without any.
fn data_blocks(data: &FileData) -> Option<(u32, u32)> {
    let bytes = data.size.saturating_sub(u64::try_from(data.tail.len()).ok()?);
    let blocks = u32::try_from(bytes.div_ceil(BLOCK64)).ok()?;
    (blocks > 0).then_some((data.block, data.block.saturating_add(blocks)))
}

/// Blocks `start..end` read as zeros from here on, and take no space where the file system can do that.
fn hole(file: &File, start: u32, end: u32) -> Result<(), Error> {
    let bytes = |block: u32| u64::from(block).saturating_mul(BLOCK64);
    let (from, len) = (bytes(start), bytes(end).saturating_sub(bytes(start)));
    let offset = i64::try_from(from).map_err(|_| Error::TooLarge)?;
    let length = i64::try_from(len).map_err(|_| Error::TooLarge)?;
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file, flags, offset, length) {
        Err(nix::errno::Errno::EOPNOTSUPP) => {
            for block in start..end {
                file.write_all_at(&[0; BLOCK_LEN], bytes(block)).map_err(Error::Write)?;
            }
            Ok(())
        }
        other => other.map_err(|errno| Error::Write(errno.into())),
    }
}

fn len64<T>(items: &[T]) -> Result<u64, Error> {
    len64_of(items.len())
}

fn len64_of(len: usize) -> Result<u64, Error> {
    u64::try_from(len).map_err(|_| Error::TooLarge)
}

/// Marks errors of the output, so that they are told from the input's after `io::copy`.
struct Tagged<'a>(&'a mut BufWriter<File>);

#[derive(Debug, thiserror::Error)]
#[error(transparent)]
struct Tag(io::Error);

impl Write for Tagged<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf).map_err(|error| io::Error::new(error.kind(), Tag(error)))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn untag(error: io::Error) -> Error {
    match error.downcast::<Tag>() {
        Ok(Tag(error)) => Error::Write(error),
        Err(error) => Error::Read(error),
    }
}

#[cfg(test)]
pub(crate) mod reader;
#[cfg(test)]
mod tests;
