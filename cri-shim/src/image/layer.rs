//! Reads a layer's tar archive into the tree and the image being written.
//!
//! Owns the archive format: ustar with GNU and PAX extensions (pax(1); GNU tar's manual, "Tar Internals"). The `tar` crate
//! splits headers into fields; walking the archive is done here, because every length in it needs a limit and PAX values are
//! binary. Bytes go to the image or nowhere: no name of an archive is ever used on the host.

mod pax;
mod sparse;

use std::collections::BTreeMap;
use std::io::{self, Read};

use tar::{EntryType, Header};

use super::erofs::{self, Writer};
use super::tree::{self, Attributes, Content, FileData, Tree, text};
use pax::Records;

/// Unit of the archive.
const BLOCK: usize = 512;
/// The same, for arithmetic on files.
const BLOCK64: u64 = 512;
/// Longest PAX header or GNU long name: an entry's paths and extended attributes.
const MAX_EXTENSION: u64 = 1 << 20;
/// Most extended attributes of one file, names and values, as Linux lists them (XATTR_LIST_MAX).
const MAX_XATTRS: usize = 64 << 10;
/// Longest name and value of one (XATTR_NAME_MAX; XATTR_SIZE_MAX less one, as EROFS holds them).
const MAX_XATTR_NAME: usize = 255;
const MAX_XATTR_VALUE: usize = 65_535;

/// What can be wrong with an archive.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The stream failed, or ended inside an entry.
    #[error("the archive cannot be read")]
    Read(#[source] io::Error),
    /// A header that is none.
    #[error("the archive is damaged: {0} at {1}")]
    Header(&'static str, String),
    /// A kind of entry that no image has.
    #[error("{0} is of the kind {1:?}, which no file system has")]
    Kind(String, char),
    /// Extended attributes beyond Linux's limits.
    #[error("{0} has more extended attributes, or longer ones, than Linux allows")]
    Xattrs(String),
    /// Files larger than the configured limit, all together.
    #[error("the image is larger than {} MiB unpacked: make it smaller, or raise image_max_mib", .0 >> 20)]
    Unpacked(u64),
    /// Names.
    #[error(transparent)]
    Tree(#[from] tree::Error),
    /// The image being written.
    #[error(transparent)]
    Image(erofs::Error),
}

impl From<erofs::Error> for Error {
    fn from(error: erofs::Error) -> Self {
        match error {
            erofs::Error::Read(error) => Self::Read(error),
            other => Self::Image(other),
        }
    }
}

/// Lays layers over each other.
pub(crate) struct Unpacker<'a> {
    pub(crate) tree: &'a mut Tree,
    pub(crate) out: &'a mut Writer,
    /// Bytes of files, holes included, that all layers may have together.
    pub(crate) limit: u64,
    pub(crate) unpacked: u64,
}

/// What precedes an entry's own header.
#[derive(Default)]
struct Extensions {
    records: Records,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl Unpacker<'_> {
    /// Reads one layer to the end of its archive, which may come before the end of the stream.
    pub(crate) fn layer(&mut self, from: &mut dyn Read) -> Result<(), Error> {
        self.tree.begin_layer();
        let mut extensions = Extensions::default();
        while let Some(header) = next_header(from)? {
            let size = extensions.records.size().map_or_else(|| field(&header, "size", &header.as_old().size), Ok)?;
            let size = u64::try_from(size).map_err(|_| damaged("a negative size", &header))?;
            match header.entry_type() {
                EntryType::XHeader => extensions.records = Records::parse(&extension(from, size, &header)?)?,
                EntryType::XGlobalHeader => skip(from, padded(size))?,
                EntryType::GNULongName => extensions.long_name = Some(long_name(from, size, &header)?),
                EntryType::GNULongLink => extensions.long_link = Some(long_name(from, size, &header)?),
                _ => self.entry(from, &header, std::mem::take(&mut extensions), size)?,
            }
        }
        Ok(())
    }

    fn entry(&mut self, from: &mut dyn Read, header: &Header, extensions: Extensions, size: u64) -> Result<(), Error> {
        let records = &extensions.records;
        let path = records.path().or(extensions.long_name).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = records.get("linkpath").map(<[u8]>::to_vec).or(extensions.long_link);
        let link = || link.or_else(|| header.link_name_bytes().map(|name| name.into_owned())).unwrap_or_default();
        let attributes = attributes(header, records, &path)?;
        let content = match header.entry_type() {
            EntryType::Regular if header.as_gnu().is_none() && header.as_ustar().is_none() && path.ends_with(b"/") => {
                Content::Directory(BTreeMap::new()) // as archives older than ustar mark them
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                Content::File(self.file(from, header, records, &attributes, size)?)
            }
            EntryType::Link => return Ok(self.tree.link(&path, &link())?),
            EntryType::Symlink => Content::Symlink(symlink_target(link(), &path)?),
            EntryType::Directory => Content::Directory(BTreeMap::new()),
            EntryType::Char => device(header).map(|(major, minor)| Content::CharDevice(major, minor))?,
            EntryType::Block => device(header).map(|(major, minor)| Content::BlockDevice(major, minor))?,
            EntryType::Fifo => Content::Fifo,
            other => return Err(Error::Kind(text(&path), char::from(other.as_byte()))),
        };
        Ok(self.tree.place(&path, attributes, content)?)
    }

    /// Reads a file's data with its padding.
    fn file(
        &mut self,
        from: &mut dyn Read,
        header: &Header,
        records: &Records,
        attributes: &Attributes,
        size: u64,
    ) -> Result<FileData, Error> {
        let mut stored = from.take(padded(size));
        let map = sparse::Map::of(header, records, &mut stored, size)?;
        let real = map.as_ref().map_or(size, |map| map.size);
        self.unpacked = self.unpacked.saturating_add(real);
        if self.unpacked > self.limit {
            return Err(Error::Unpacked(self.limit));
        }
        let xattrs = erofs::max_len(&attributes.xattrs);
        let data = match map {
            Some(map) => self.out.add_file(&mut map.expand(&mut stored), real, xattrs)?,
            None => self.out.add_file(&mut stored, real, xattrs)?,
        };
        let rest = stored.limit();
        skip(&mut stored, rest)?;
        Ok(data)
    }
}

/// The next header, its checksum verified; `None` at the end of the archive.
fn next_header(from: &mut dyn Read) -> Result<Option<Header>, Error> {
    let mut header = Header::new_old();
    let bytes = header.as_mut_bytes();
    let mut filled = 0_usize;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(Error::Read(io::ErrorKind::UnexpectedEof.into())),
            Ok(read) => filled = filled.saturating_add(read),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::Read(error)),
        }
    }
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    // ustar: the sum of all bytes, those of the checksum itself taken as spaces.
    let sum = |bytes: &[u8]| bytes.iter().fold(0_i64, |sum, &byte| sum.saturating_add(i64::from(byte)));
    let own = &header.as_old().cksum;
    let expected = sum(header.as_bytes()).saturating_sub(sum(own)).saturating_add(sum(&[b' '; 8]));
    if pax::number(own) != Some(expected) {
        return Err(damaged("a wrong header checksum", &header));
    }
    Ok(Some(header))
}

fn attributes(header: &Header, records: &Records, path: &[u8]) -> Result<Attributes, Error> {
    let old = header.as_old();
    let id = |key: &str, own: &[u8]| -> Result<u32, Error> {
        let value = match records.get(key) {
            Some(text) => pax::decimal(text).ok_or_else(|| damaged("a bad owner", header))?,
            None => field(header, "owner", own)?,
        };
        u32::try_from(value).map_err(|_| damaged("an owner beyond 32 bits", header))
    };
    let mtime = match records.get("mtime") {
        Some(text) => pax::time(text).ok_or_else(|| damaged("a bad time", header))?,
        None => (field(header, "time", &old.mtime)?, 0),
    };
    let mode = u16::try_from(field(header, "mode", &old.mode)? & 0o7777).unwrap_or_default();
    Ok(Attributes { mode, uid: id("uid", &old.uid)?, gid: id("gid", &old.gid)?, mtime, xattrs: xattrs(records, path)? })
}

/// The attributes that the file system can hold; others have no meaning inside a pod and are left out, as other runtimes do.
fn xattrs(records: &Records, path: &[u8]) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Error> {
    let mut kept = BTreeMap::new();
    let mut total = 0_usize;
    for (name, value) in records.xattrs() {
        total = total.saturating_add(name.len()).saturating_add(value.len());
        if name.len() > MAX_XATTR_NAME || value.len() > MAX_XATTR_VALUE || total > MAX_XATTRS || name.contains(&0) {
            return Err(Error::Xattrs(text(path)));
        }
        if erofs::is_storable(name, value) {
            kept.insert(name.to_vec(), value.to_vec());
        } else {
            tracing::debug!(path = text(path), name = text(name), "extended attribute left out");
        }
    }
    Ok(kept)
}

fn symlink_target(target: Vec<u8>, path: &[u8]) -> Result<Vec<u8>, Error> {
    if target.is_empty() || target.contains(&0) {
        return Err(Error::Header("a symbolic link to nothing", text(path)));
    }
    if target.len() >= tree::MAX_PATH {
        return Err(tree::Error::TooLong(text(&target)).into());
    }
    Ok(target)
}

fn device(header: &Header) -> Result<(u32, u32), Error> {
    let (major, minor) = match (header.as_ustar(), header.as_gnu()) {
        (Some(ustar), _) => (&ustar.dev_major, &ustar.dev_minor),
        (_, Some(gnu)) => (&gnu.dev_major, &gnu.dev_minor),
        _ => return Err(damaged("a device without a number", header)),
    };
    let number = |bytes: &[u8]| {
        u32::try_from(field(header, "device number", bytes)?).map_err(|_| damaged("a bad device number", header))
    };
    Ok((number(major)?, number(minor)?))
}

fn field(header: &Header, what: &'static str, bytes: &[u8]) -> Result<i64, Error> {
    pax::number(bytes).ok_or_else(|| damaged(what, header))
}

fn damaged(what: &'static str, header: &Header) -> Error {
    Error::Header(what, text(&header.path_bytes()))
}

fn extension(from: &mut dyn Read, size: u64, header: &Header) -> Result<Vec<u8>, Error> {
    if size > MAX_EXTENSION {
        return Err(damaged("an extended header larger than 1 MiB", header));
    }
    let mut bytes = vec![];
    let read = from.take(size).read_to_end(&mut bytes).map_err(Error::Read)?;
    if u64::try_from(read) != Ok(size) {
        return Err(Error::Read(io::ErrorKind::UnexpectedEof.into()));
    }
    skip(from, padded(size).saturating_sub(size))?;
    Ok(bytes)
}

fn long_name(from: &mut dyn Read, size: u64, header: &Header) -> Result<Vec<u8>, Error> {
    let mut name = extension(from, size, header)?;
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    name.truncate(end);
    Ok(name)
}

fn padded(size: u64) -> u64 {
    size.checked_next_multiple_of(BLOCK64).unwrap_or(u64::MAX)
}

fn skip(from: &mut dyn Read, bytes: u64) -> Result<(), Error> {
    let skipped = io::copy(&mut from.take(bytes), &mut io::sink()).map_err(Error::Read)?;
    if skipped < bytes { Err(Error::Read(io::ErrorKind::UnexpectedEof.into())) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
