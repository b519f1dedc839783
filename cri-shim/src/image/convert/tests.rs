#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic")]

use std::io::Write;

use super::super::erofs::reader;
use super::*;

fn archive(name: &str, data: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(vec![]);
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(u64::try_from(data.len()).unwrap());
    builder.append_data(&mut header, name, data).unwrap();
    builder.into_inner().unwrap()
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// A layer as it comes from the network: checked against the digest of `announced`.
fn layer(plain: &[u8], packed: Vec<u8>, announced: &[u8]) -> Layer {
    let digest = Digest::of(announced);
    let check = Check::new(digest.clone(), Some(u64::try_from(announced.len()).unwrap()));
    Layer { digest, diff_id: Digest::of(plain), blob: Box::new(Verified::new(io::Cursor::new(packed), check)) }
}

/// The file that comes of it, and by what it is checked.
fn disk(layers: Vec<Layer>) -> Result<(Vec<u8>, Verity), Error> {
    use std::io::Seek;
    let mut file = tempfile::tempfile().unwrap();
    let verity = convert(layers, file.try_clone().unwrap(), [0; 16], 1 << 20)?;
    let mut bytes = vec![];
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    Ok((bytes, verity))
}

#[test]
fn every_packing_gives_the_same_disk() {
    let plain = archive("file", &[9; 30_000]);
    let (start, end) = plain.split_at(10_000);
    let skippable =
        [&[0x53, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 1, 2], zstd::encode_all(plain.as_slice(), 1).unwrap().as_slice()]
            .concat();
    let packings = [
        plain.clone(),
        gzip(&plain),
        [gzip(start), gzip(end)].concat(),
        zstd::encode_all(plain.as_slice(), 1).unwrap(),
        skippable,
    ];
    let disks: Vec<_> =
        packings.iter().map(|packed| disk(vec![layer(&plain, packed.clone(), packed)]).unwrap()).collect();
    assert!(disks.windows(2).all(|pair| pair[0] == pair[1]));
    let (bytes, verity) = &disks[0];
    let data = usize::try_from(verity.data_blocks * 4096).unwrap();
    assert_eq!(bytes.len(), data + 4096, "the image, and its few hashes");
    assert_eq!(reader::read(&bytes[..data])[b"file".as_slice()].data, [9; 30_000]);
}

#[test]
fn what_was_tampered_with_is_named_by_its_digest() {
    let plain = archive("file", &[9; 30_000]);
    let packed = gzip(&plain);
    let mut damaged = packed.clone();
    damaged[20] ^= 0xff; // gzip notices too, but the digest says more
    assert!(matches!(disk(vec![layer(&plain, damaged, &packed)]), Err(Error::Blob(_, Mismatch::Digest { .. }))));
    let short = packed[..packed.len() / 2].to_vec();
    assert!(matches!(disk(vec![layer(&plain, short, &packed)]), Err(Error::Blob(_, Mismatch::Size { .. }))));
    assert!(matches!(
        disk(vec![layer(b"another", packed.clone(), &packed)]),
        Err(Error::DiffId(_, Mismatch::Digest { .. }))
    ));
    let nonsense = b"neither gzip nor tar".repeat(100);
    assert!(matches!(disk(vec![layer(&nonsense, nonsense.clone(), &nonsense)]), Err(Error::Layer(..))));
    let cut = packed[..packed.len() - 20].to_vec();
    assert!(matches!(disk(vec![layer(&plain, cut.clone(), &cut)]), Err(Error::Layer(_, layer::Error::Read(_)))));
    let bomb = archive("file", &vec![0; 2 << 20]);
    let packed = gzip(&bomb);
    assert!(matches!(
        disk(vec![layer(&bomb, packed.clone(), &packed)]),
        Err(Error::Layer(_, layer::Error::Unpacked(_)))
    ));
}
