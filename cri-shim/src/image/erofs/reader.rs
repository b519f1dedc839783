//! Reads EROFS images back for tests: written from the kernel's documentation alone, sharing nothing with the writer, and
//! stricter than the kernel.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::arithmetic_side_effects,
    reason = "a test may panic"
)]

use std::collections::BTreeMap;

/// A file found, by what stat(2), readlink(2), read(2) and getxattr(2) would say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) links: u32,
    pub(crate) rdev: u32,
    pub(crate) nid: u64,
    pub(crate) data: Vec<u8>,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

struct Image<'a> {
    bytes: &'a [u8],
    meta: usize,
    xattrs: usize,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// All files by path, the root's being empty.
pub(crate) fn read(bytes: &[u8]) -> BTreeMap<Vec<u8>, Found> {
    let sb = &bytes[1024..1152];
    assert_eq!(u32_at(sb, 0), 0xe0f5_e1e2);
    let mut summed = bytes[1024..4096].to_vec();
    summed[4..8].fill(0);
    let mut crc = !0_u32;
    for byte in summed {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 * (crc & 1));
        }
    }
    assert_eq!(u32_at(sb, 4), crc, "checksum");
    assert_eq!(sb[12], 12, "block size");
    assert_eq!(u32_at(sb, 36) as usize * 4096, bytes.len(), "blocks");
    assert_eq!(u32_at(sb, 80), 0, "incompatible features");
    let image = Image { bytes, meta: u32_at(sb, 40) as usize * 4096, xattrs: u32_at(sb, 44) as usize * 4096 };
    let mut all = BTreeMap::new();
    let root = u64::from(u16_at(sb, 14));
    image.walk(&[], root, root, &mut all);
    let mut nids: Vec<_> = all.values().map(|found| found.nid).collect();
    nids.sort_unstable();
    nids.dedup();
    assert_eq!(u64_at(sb, 16), nids.len() as u64, "inode count");
    all
}

impl Image<'_> {
    fn walk(&self, path: &[u8], nid: u64, parent: u64, all: &mut BTreeMap<Vec<u8>, Found>) {
        let found = self.inode(nid);
        let is_dir = found.mode >> 12 == 4;
        let entries = if is_dir { entries(&found.data) } else { vec![] };
        assert!(all.insert(path.to_vec(), found).is_none(), "{path:?} twice");
        for (name, child, kind) in entries {
            match name.as_slice() {
                b"." => assert_eq!((child, kind), (nid, 2)),
                b".." => assert_eq!((child, kind), (parent, 2)),
                _ => {
                    let below = if path.is_empty() { name } else { [path, b"/", &name].concat() };
                    self.walk(&below, child, nid, all);
                    let expected = [(1, 5), (2, 3), (4, 2), (6, 4), (8, 1), (10, 7)]
                        .iter()
                        .find(|(mode, _)| *mode == all[&below].mode >> 12)
                        .unwrap()
                        .1;
                    assert_eq!(kind, expected, "type of {below:?}");
                }
            }
        }
    }

    fn inode(&self, nid: u64) -> Found {
        let at = self.meta + nid as usize * 32;
        let inode = &self.bytes[at..at + 64];
        let format = u16_at(inode, 0);
        assert_eq!(format & 1, 1, "extended");
        let count = usize::from(u16_at(inode, 2));
        let xattr_len = if count == 0 { 0 } else { 12 + (count - 1) * 4 };
        let size = u64_at(inode, 8) as usize;
        let mode = u16_at(inode, 4);
        let mut found = Found {
            mode,
            uid: u32_at(inode, 24),
            gid: u32_at(inode, 28),
            mtime: (u64_at(inode, 32) as i64, u32_at(inode, 40)),
            links: u32_at(inode, 44),
            rdev: 0,
            nid,
            data: vec![],
            xattrs: self.xattrs(&self.bytes[at + 64..at + 64 + xattr_len]),
        };
        if matches!(mode >> 12, 2 | 6) {
            found.rdev = u32_at(inode, 16);
        }
        if matches!(mode >> 12, 4 | 8 | 10) {
            let start = u32_at(inode, 16) as usize * 4096;
            let inline = match format >> 1 {
                0 => 0,
                2 => size % 4096,
                other => panic!("layout {other}"),
            };
            if size > inline {
                found.data.extend(&self.bytes[start..start + size - inline]);
            }
            let tail = at + 64 + xattr_len;
            assert!(inline == 0 || tail / 4096 == (tail + inline - 1) / 4096, "inline data crosses a block");
            found.data.extend(&self.bytes[tail..tail + inline]);
        }
        found
    }

    fn xattrs(&self, body: &[u8]) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut all = BTreeMap::new();
        if body.is_empty() {
            return all;
        }
        let shared = usize::from(body[4]);
        for number in 0..shared {
            let at = self.xattrs + u32_at(body, 12 + number * 4) as usize * 4;
            let (name, value, _) = xattr(&self.bytes[at..]);
            all.insert(name, value);
        }
        let mut rest = &body[12 + shared * 4..];
        while !rest.is_empty() {
            let (name, value, len) = xattr(rest);
            assert!(all.insert(name, value).is_none());
            rest = &rest[len..];
        }
        all
    }
}

fn xattr(bytes: &[u8]) -> (Vec<u8>, Vec<u8>, usize) {
    let (name_len, value_len) = (usize::from(bytes[0]), usize::from(u16_at(bytes, 2)));
    let prefix: &[u8] = match bytes[1] {
        1 => b"user.",
        2 => b"system.posix_acl_access",
        3 => b"system.posix_acl_default",
        4 => b"trusted.",
        6 => b"security.",
        other => panic!("index {other}"),
    };
    let name = [prefix, &bytes[4..4 + name_len]].concat();
    let value = bytes[4 + name_len..4 + name_len + value_len].to_vec();
    (name, value, (4 + name_len + value_len).next_multiple_of(4))
}

/// Names, node numbers and types; all names in ascending order, each block full of whole entries.
fn entries(data: &[u8]) -> Vec<(Vec<u8>, u64, u8)> {
    let mut all: Vec<(Vec<u8>, u64, u8)> = vec![];
    for block in data.chunks(4096) {
        let count = usize::from(u16_at(block, 8)) / 12;
        assert!(count > 0);
        for i in 0..count {
            let start = usize::from(u16_at(block, i * 12 + 8));
            let end = if i + 1 < count { usize::from(u16_at(block, i * 12 + 20)) } else { block.len() };
            let name = block[start..end].split(|&byte| byte == 0).next().unwrap().to_vec();
            assert!(!name.is_empty() && all.last().is_none_or(|(last, ..)| *last < name), "order");
            all.push((name, u64_at(block, i * 12), block[i * 12 + 10]));
        }
    }
    all
}
