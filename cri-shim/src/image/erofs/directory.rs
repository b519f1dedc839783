//! Directories: blocks of entries, each with its names behind them, all names in ascending order (erofs.rst, "Directories").

use std::collections::BTreeMap;

use super::super::tree::{Content, NodeId, Tree};
use super::{BLOCK_LEN, Place};

/// Bytes of an entry without its name: node number, offset of the name, type, a reserved byte (struct erofs_dirent).
const ENTRY: usize = 12;

/// How many entries go into each block, `.` and `..` included, and the bytes of the last one.
struct Packing {
    blocks: Vec<usize>,
    last: usize,
}

impl Packing {
    fn of<'a>(names: impl Iterator<Item = &'a [u8]>) -> Self {
        let (mut blocks, mut entries, mut bytes) = (vec![], 0_usize, 0_usize);
        for name in names {
            let more = ENTRY.saturating_add(name.len());
            if bytes.saturating_add(more) > BLOCK_LEN {
                blocks.push(entries);
                (entries, bytes) = (0, 0);
            }
            entries = entries.saturating_add(1);
            bytes = bytes.saturating_add(more);
        }
        blocks.push(entries);
        Self { blocks, last: bytes }
    }
}

/// The names of a directory with `.` and `..` among them, in the order of their bytes, as lookups expect.
fn all_names(names: &BTreeMap<Vec<u8>, NodeId>) -> Vec<(&[u8], Option<NodeId>)> {
    const DOT: &[u8] = b".";
    const DOT_DOT: &[u8] = b"..";
    let mut all: Vec<_> = names.iter().map(|(name, id)| (name.as_slice(), Some(*id))).collect();
    let at = all.partition_point(|(name, _)| *name < DOT);
    all.splice(at..at, [(DOT, None)]);
    let at = all.partition_point(|(name, _)| *name < DOT_DOT);
    all.splice(at..at, [(DOT_DOT, None)]);
    all
}

/// Bytes of a directory.
pub(super) fn len(names: &BTreeMap<Vec<u8>, NodeId>) -> usize {
    let packing = Packing::of(all_names(names).iter().map(|(name, _)| *name));
    packing.blocks.len().saturating_sub(1).saturating_mul(BLOCK_LEN).saturating_add(packing.last)
}

/// A directory's bytes, all blocks but the last one full.
pub(super) fn serialize(
    tree: &Tree,
    names: &BTreeMap<Vec<u8>, NodeId>,
    own: NodeId,
    places: &BTreeMap<NodeId, Place>,
) -> Vec<u8> {
    let place = places.get(&own).copied().unwrap_or_default();
    let all = all_names(names);
    let packing = Packing::of(all.iter().map(|(name, _)| *name));
    let mut bytes = vec![];
    let mut rest = all.as_slice();
    for entries in packing.blocks {
        let Some((block, after)) = rest.split_at_checked(entries) else { break };
        rest = after;
        bytes.resize(bytes.len().next_multiple_of(BLOCK_LEN), 0);
        let mut name_at = entries.saturating_mul(ENTRY);
        for (name, id) in block {
            let (nid, kind) = match id {
                None if *name == b"." => (place.nid, FT_DIR),
                None => (place.parent, FT_DIR),
                Some(id) => (places.get(id).map_or(0, |place| place.nid), file_type(&tree.node(*id).content)),
            };
            bytes.extend(nid.to_le_bytes());
            bytes.extend(u16::try_from(name_at).unwrap_or_default().to_le_bytes());
            bytes.extend([kind, 0]);
            name_at = name_at.saturating_add(name.len());
        }
        for (name, _) in block {
            bytes.extend(*name);
        }
    }
    bytes
}

/// Linux's FT_* values (fs_types.h).
const FT_DIR: u8 = 2;

fn file_type(content: &Content) -> u8 {
    match content {
        Content::File(_) => 1,
        Content::Directory(_) => FT_DIR,
        Content::CharDevice(..) => 3,
        Content::BlockDevice(..) => 4,
        Content::Fifo => 5,
        Content::Symlink(_) => 7,
    }
}
