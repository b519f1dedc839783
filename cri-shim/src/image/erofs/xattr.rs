//! Extended attributes: beside the inode, or once for all that have the same (erofs.rst, "Shared xattrs metadata space").

use std::collections::BTreeMap;

use super::super::tree::{NodeId, Tree};
use super::Error;

/// struct erofs_xattr_ibody_header.
const HEADER: usize = 12;
/// struct erofs_xattr_entry, without name and value.
const ENTRY: usize = 4;
const ALIGN: usize = 4;
/// h_shared_count has 8 bits.
const MAX_SHARED: usize = 255;
/// Most bytes beside one inode: a list of attribute names ends at 64 KiB in Linux (XATTR_LIST_MAX), and so do values.
pub(super) const MAX_BODY: usize = 128 << 10;

/// Name prefixes that the format knows, with their numbers. ACLs have numbers of their own and no rest.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// An attribute as it is stored; `None` if the format has no place for such a name.
fn entry(name: &[u8], value: &[u8]) -> Option<Vec<u8>> {
    let (rest, index) = PREFIXES.iter().find_map(|(prefix, index)| Some((name.strip_prefix(*prefix)?, *index)))?;
    if rest.is_empty() != matches!(index, 2 | 3) {
        return None;
    }
    let mut bytes = vec![u8::try_from(rest.len()).ok()?, index];
    bytes.extend(u16::try_from(value.len()).ok()?.to_le_bytes());
    bytes.extend(rest);
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
    Some(bytes)
}

/// Whether the format can hold an attribute.
pub(crate) fn is_storable(name: &[u8], value: &[u8]) -> bool {
    entry(name, value).is_some()
}

/// The attributes that several inodes have.
pub(super) struct Shared {
    /// Entries to their numbers.
    numbers: BTreeMap<Vec<u8>, u32>,
    bytes: Vec<u8>,
}

impl Shared {
    pub(super) fn of(tree: &Tree, nodes: impl Iterator<Item = NodeId>) -> Self {
        let mut counts = BTreeMap::<Vec<u8>, bool>::new();
        for id in nodes {
            for (name, value) in &tree.node(id).attributes.xattrs {
                if let Some(entry) = entry(name, value) {
                    counts.entry(entry).and_modify(|again| *again = true).or_insert(false);
                }
            }
        }
        let (mut numbers, mut bytes) = (BTreeMap::new(), vec![]);
        for (entry, _) in counts.into_iter().filter(|(_, again)| *again) {
            let Ok(number) = u32::try_from(bytes.len() / ALIGN) else { break };
            bytes.extend(&entry);
            numbers.insert(entry, number);
        }
        Self { numbers, bytes }
    }

    /// The area where they lie; a number counts its multiples of 4 bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// What lies beside an inode: header, numbers of shared attributes, other attributes. Empty if there is none.
pub(super) fn body(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>, shared: &Shared) -> Result<Vec<u8>, Error> {
    let (mut numbers, mut inline) = (vec![], vec![]);
    for (name, value) in xattrs {
        let Some(entry) = entry(name, value) else { continue };
        match shared.numbers.get(&entry) {
            Some(number) if numbers.len() < MAX_SHARED => numbers.push(*number),
            _ => inline.extend(entry),
        }
    }
    if numbers.is_empty() && inline.is_empty() {
        return Ok(vec![]);
    }
    let mut bytes = vec![0; 4]; // no name filter
    bytes.push(u8::try_from(numbers.len()).unwrap_or(u8::MAX));
    bytes.resize(HEADER, 0);
    for number in numbers {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(inline);
    if bytes.len() > MAX_BODY { Err(Error::Xattrs) } else { Ok(bytes) }
}

/// Bytes beside the inode.
pub(super) fn body_len(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>, shared: &Shared) -> Result<usize, Error> {
    Ok(body(xattrs, shared)?.len())
}

/// The most bytes that attributes can take beside their inode: nothing shared.
pub(crate) fn max_len(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> usize {
    let entry_len = |(name, value): (&Vec<u8>, &Vec<u8>)| {
        ENTRY.saturating_add(name.len()).saturating_add(value.len()).next_multiple_of(ALIGN)
    };
    if xattrs.is_empty() { 0 } else { xattrs.iter().map(entry_len).fold(HEADER, usize::saturating_add) }
}

/// i_xattr_icount: how many 4-byte units follow the header's first 8 bytes (erofs_xattr_ibody_size()).
pub(super) fn count_field(body: usize) -> Result<u16, Error> {
    if body == 0 {
        return Ok(0);
    }
    let units = (body.saturating_sub(HEADER) / ALIGN).saturating_add(1);
    u16::try_from(units).map_err(|_| Error::Xattrs)
}
