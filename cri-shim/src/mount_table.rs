//! The host's table of mounts (proc(5), `mountinfo`).

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{IoContext, Result};

/// A line of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Major and minor number of the file system.
    pub(crate) device: String,
    /// What of the file system is mounted.
    pub(crate) root: PathBuf,
    /// Where it is mounted.
    pub(crate) point: PathBuf,
    /// Type of the file system.
    pub(crate) kind: String,
}

/// All that is mounted, later mounts last.
pub(crate) fn read() -> Result<Vec<Mount>> {
    let table = fs::read("/proc/self/mountinfo").doing(|| "reading /proc/self/mountinfo")?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// The mount through which a path, without links in it, is seen.
pub(crate) fn at<'a>(table: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    // Of several at one point the last covers the others.
    table.iter().filter(|mount| path.starts_with(&mount.point)).max_by_key(|mount| mount.point.components().count())
}

fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = String::from_utf8(fields.nth(2)?.to_vec()).ok()?;
    let (root, point) = (path(fields.next()?), path(fields.next()?));
    // Any number of optional fields comes before the dash.
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Mount { device, root, point, kind: String::from_utf8(kind.to_vec()).ok()? })
}

/// White space and backslashes are three octal digits after a backslash.
fn path(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let escaped = match rest {
            [b'\\', digits @ ..] => digits.get(..3).and_then(|digits| std::str::from_utf8(digits).ok()),
            _ => None,
        };
        match escaped.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(plain) => {
                bytes.push(plain);
                rest = rest.get(4..).unwrap_or_default();
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_with_their_escapes() {
        let line = br"36 35 98:0 /a\040b /mnt/x\134y\ rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue";
        let mount = parse(line).expect("a mount");
        assert_eq!((mount.device.as_str(), mount.kind.as_str()), ("98:0", "ext3"));
        assert_eq!((mount.root.as_path(), mount.point.as_path()), (Path::new("/a b"), Path::new(r"/mnt/x\y\")));
        assert_eq!(parse(b"36 35 98:0 / /mnt rw - tmpfs none rw").map(|mount| mount.kind), Some("tmpfs".into()));
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"36 35 98:0 / /mnt rw"), None);
    }

    #[test]
    fn the_deepest_and_latest_mount_is_the_one_that_shows() {
        let mount = |point: &str, device: &str| Mount {
            device: device.into(),
            root: "/".into(),
            point: point.into(),
            kind: "tmpfs".into(),
        };
        let table = [mount("/", "1"), mount("/a", "2"), mount("/a", "3"), mount("/ab", "4")];
        let device = |path: &str| at(&table, Path::new(path)).map(|mount| mount.device.as_str());
        assert_eq!(
            [device("/a/b"), device("/a"), device("/ab"), device("/b")],
            [Some("3"), Some("3"), Some("4"), Some("1")]
        );
    }
}
