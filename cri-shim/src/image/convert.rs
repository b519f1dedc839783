//! From layers to a disk: decompresses, checks and unpacks them in their order, and writes the EROFS image.
//!
//! Blocks; runs beside the network, never on it.

use std::fs::File;
use std::io::{self, BufReader, Read};

use super::digest::{Check, Digest, Mismatch, Verified, mismatch};
use super::erofs::{self, Writer};
use super::layer::{self, Unpacker};
use super::spool;
use super::tree::Tree;
use super::verity::{self, Verity};

/// Bytes read from a compressed layer at once.
const READ_BUFFER: usize = 256 << 10;
/// The largest window of zstd that is accepted, in bits: 128 MiB, zstd's own default limit.
const ZSTD_WINDOW_BITS: u32 = 27;
/// Bytes that tell compressions apart.
const MAGIC_LEN: u64 = 4;
/// What a layer may have beside its files' bytes: headers, padding, and whatever follows the archive.
const MAX_HEADERS: u64 = 8 << 30;
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// zstd's skippable frames, less the lowest four bits of the first byte (RFC 8878 §3.1.2).
const ZSTD_SKIPPABLE: (u8, &[u8]) = (0x50, &[0x2a, 0x4d, 0x18]);

/// What can go wrong on the way.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The layer's archive.
    #[error("layer {0} cannot be unpacked")]
    Layer(Digest, #[source] layer::Error),
    /// The layer's bytes are not what the image's manifest says.
    #[error("layer {0} is not what the manifest says")]
    Blob(Digest, #[source] Mismatch),
    /// The unpacked layer is not what the image's configuration says.
    #[error("layer {0} is not what the image's configuration says once it is decompressed")]
    DiffId(Digest, #[source] Mismatch),
    /// The image cannot be written.
    #[error(transparent)]
    Image(#[from] erofs::Error),
    /// The download ended, which has a reason of its own.
    #[error("the download ended early")]
    Abandoned,
}

/// A layer to come.
pub(crate) struct Layer {
    /// Its name in messages: the digest in the manifest.
    pub(crate) digest: Digest,
    /// The digest of the decompressed archive.
    pub(crate) diff_id: Digest,
    /// Its bytes; the end comes only after they were found right.
    pub(crate) blob: Box<dyn Read + Send>,
}

/// Writes the disk of an image to an empty file, the hash tree behind it, and makes both durable.
pub(crate) fn convert(layers: Vec<Layer>, file: File, uuid: [u8; 16], limit: u64) -> Result<Verity, Error> {
    let durable = file.try_clone().map_err(erofs::Error::Write)?;
    let mut out = Writer::new(file)?;
    let mut tree = Tree::new();
    let mut unpacker = Unpacker { tree: &mut tree, out: &mut out, limit, unpacked: 0 };
    for layer in layers {
        unpack(&mut unpacker, layer)?;
    }
    let summary = out.finish(&tree, uuid)?;
    let verity = verity::append(&durable, summary.bytes).map_err(erofs::Error::Write)?;
    durable.sync_all().map_err(erofs::Error::Write)?;
    Ok(verity)
}

fn unpack(unpacker: &mut Unpacker<'_>, layer: Layer) -> Result<(), Error> {
    let Layer { digest, diff_id, mut blob } = layer;
    let result = unpack_blob(unpacker, diff_id, &mut blob);
    // Damage shows in the archive before it shows in the digest, which says more: so the rest is looked at first.
    let rest = io::copy(&mut blob, &mut io::sink());
    match (result, rest) {
        (Ok(()), Ok(_)) => Ok(()),
        (Err(error @ layer::Error::Image(_)), _) => Err(Error::Layer(digest, error)),
        (_, Err(error)) if spool::is_abandoned(&error) => Err(Error::Abandoned),
        (_, Err(error)) => match mismatch(&error) {
            Some(mismatch) => Err(Error::Blob(digest, mismatch.clone())),
            None => Err(Error::Layer(digest, layer::Error::Read(error))),
        },
        (Err(layer::Error::Read(error)), _) if mismatch(&error).is_some() => match mismatch(&error) {
            Some(mismatch) => Err(Error::DiffId(digest, mismatch.clone())),
            None => Err(Error::Layer(digest, layer::Error::Read(error))),
        },
        (Err(error), _) => Err(Error::Layer(digest, error)),
    }
}

/// Unpacks an archive and reads on to its stream's end, where the digest of the whole is compared.
fn unpack_blob(unpacker: &mut Unpacker<'_>, diff_id: Digest, blob: &mut dyn Read) -> Result<(), layer::Error> {
    let plain = Verified::new(decompress(blob).map_err(layer::Error::Read)?, Check::new(diff_id, None));
    let limit = unpacker.limit.saturating_add(MAX_HEADERS);
    let mut plain = plain.take(limit);
    unpacker.layer(&mut plain)?;
    io::copy(&mut plain, &mut io::sink()).map_err(layer::Error::Read)?;
    if plain.limit() == 0 { Err(layer::Error::Unpacked(unpacker.limit)) } else { Ok(()) }
}

/// A stream that may have been compressed.
pub(crate) enum Plain<'a> {
    Packed(Box<dyn Read + 'a>),
    AsIs(Box<dyn Read + 'a>),
}

impl<'a> Plain<'a> {
    /// The decompressed stream, if it was compressed.
    pub(crate) fn packed(self) -> Option<Box<dyn Read + 'a>> {
        match self {
            Self::Packed(stream) => Some(stream),
            Self::AsIs(_) => None,
        }
    }
}

impl Read for Plain<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Packed(stream) | Self::AsIs(stream) => stream.read(buf),
        }
    }
}

/// By the first bytes, because media types lie.
pub(crate) fn decompress<'a>(blob: &'a mut dyn Read) -> io::Result<Plain<'a>> {
    let mut start = vec![];
    blob.take(MAGIC_LEN).read_to_end(&mut start)?;
    let (skippable, rest) = ZSTD_SKIPPABLE;
    let skips = start.first().is_some_and(|byte| byte & 0xf0 == skippable) && start.get(1..) == Some(rest);
    let (gzip, zstd) = (start.starts_with(GZIP_MAGIC), start.starts_with(ZSTD_MAGIC) || skips);
    let blob = BufReader::with_capacity(READ_BUFFER, io::Cursor::new(start).chain(blob));
    if gzip {
        Ok(Plain::Packed(Box::new(flate2::bufread::MultiGzDecoder::new(blob))))
    } else if zstd {
        let mut decoder = zstd::Decoder::with_buffer(blob)?;
        decoder.window_log_max(ZSTD_WINDOW_BITS)?;
        Ok(Plain::Packed(Box::new(decoder)))
    } else {
        Ok(Plain::AsIs(Box::new(blob)))
    }
}

#[cfg(test)]
mod tests;
