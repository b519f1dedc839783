#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::arithmetic_side_effects,
    reason = "a test may panic"
)]

use std::os::unix::fs::FileExt;
use std::process::Command;

use super::super::erofs::reader::{Found, read};
use super::*;

/// The image of layers, read back.
fn unpack(layers: &[&[u8]]) -> Result<BTreeMap<Vec<u8>, Found>, Error> {
    unpack_within(layers, 1 << 30)
}

fn unpack_within(layers: &[&[u8]], limit: u64) -> Result<BTreeMap<Vec<u8>, Found>, Error> {
    let file = tempfile::tempfile().unwrap();
    let mut out = Writer::new(file.try_clone().unwrap())?;
    let mut tree = Tree::new();
    let mut unpacker = Unpacker { tree: &mut tree, out: &mut out, limit, unpacked: 0 };
    for layer in layers {
        unpacker.layer(&mut &layer[..])?;
    }
    let summary = out.finish(&tree, [0; 16])?;
    let mut bytes = vec![0; summary.bytes as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    Ok(read(&bytes))
}

fn header(kind: EntryType, path: &str, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o4751);
    header.set_uid(10);
    header.set_gid(20);
    header.set_mtime(1_600_000_000);
    header.set_size(size);
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_cksum();
    header
}

/// An archive of entries, each with its data padded; no end marker.
fn archive(entries: &[(Header, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![];
    for (header, data) in entries {
        bytes.extend(header.as_bytes());
        bytes.extend(*data);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes
}

fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![];
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let mut len = rest + 1;
        while rest + len.to_string().len() != len {
            len += 1;
        }
        bytes.extend(format!("{len} {key}=").bytes());
        bytes.extend(*value);
        bytes.push(b'\n');
    }
    bytes
}

#[test]
fn entries_become_files_with_all_their_attributes() {
    let mut device = header(EntryType::Block, "disk", 0);
    device.set_device_major(8).unwrap();
    device.set_device_minor(300).unwrap();
    device.set_cksum();
    let mut link = header(EntryType::Symlink, "link", 0);
    link.set_link_name("to/nowhere").unwrap();
    link.set_cksum();
    let found = unpack(&[&archive(&[
        (header(EntryType::Regular, "file", 5), b"hello"),
        (device, b""),
        (link, b""),
        (header(EntryType::Fifo, "fifo", 0), b""),
        (header(EntryType::Directory, "dir/", 0), b""),
    ])])
    .unwrap();
    let file = &found[b"file".as_slice()];
    assert_eq!((file.mode, file.uid, file.gid, file.mtime), (0o104_751, 10, 20, (1_600_000_000, 0)));
    assert_eq!(file.data, b"hello");
    assert_eq!((found[b"disk".as_slice()].mode >> 12, found[b"disk".as_slice()].rdev), (6, 0x0010_082c));
    assert_eq!(found[b"link".as_slice()].data, b"to/nowhere");
    assert_eq!(found[b"fifo".as_slice()].mode >> 12, 1);
    assert_eq!(found[b"dir".as_slice()].mode, 0o044_751);
}

#[test]
fn pax_records_override_the_header() {
    let name = format!("{}/{}", "d".repeat(200), "\u{fc}".repeat(100));
    let capability = b"\x01\0\0\x02\0\x20\n=\0\0\0\0\0\0\0\0\0\0\0\0";
    let records = pax(&[
        ("path", b"overridden"),
        ("path", name.as_bytes()),
        ("mtime", b"-1.25"),
        ("uid", b"4000000000"),
        ("SCHILY.xattr.security.capability", capability),
        ("SCHILY.xattr.user.empty", b""),
        ("SCHILY.xattr.com.apple.meaningless", b"x"),
    ]);
    let found = unpack(&[&archive(&[
        (header(EntryType::XGlobalHeader, "g", 11), b"11 path=xx\n"),
        (header(EntryType::XHeader, "x", records.len() as u64), &records),
        (header(EntryType::Regular, "file", 1), b"1"),
        (header(EntryType::Regular, "next", 1), b"2"),
    ])])
    .unwrap();
    let file = &found[name.as_bytes()];
    assert_eq!((file.uid, file.mtime), (4_000_000_000, (-2, 750_000_000)));
    assert_eq!(file.xattrs[b"security.capability".as_slice()], capability);
    assert_eq!(file.xattrs.len(), 2);
    assert!(found[b"next".as_slice()].xattrs.is_empty());
}

#[test]
fn gnu_long_names_and_links_come_whole() {
    let (name, target) = ("n/".repeat(150) + "name", "t".repeat(300));
    let mut builder = tar::Builder::new(vec![]);
    let mut entry = header(EntryType::Symlink, "", 0);
    builder.append_link(&mut entry, &name, &target).unwrap();
    let found = unpack(&[&builder.into_inner().unwrap()]).unwrap();
    assert_eq!(found[name.as_bytes()].data, target.as_bytes());
}

#[test]
fn numbers_of_every_form_are_read() {
    assert_eq!(pax::number(b"0000644\0"), Some(0o644));
    assert_eq!(pax::number(b"   644 \0"), Some(0o644));
    assert_eq!(pax::number(b"\0\0\0\0\0\0\0\0"), Some(0));
    assert_eq!(pax::number(b"\x80\0\0\0\xff\xff\xff\xff"), Some(0xffff_ffff));
    assert_eq!(pax::number(b"\xff\xff\xff\xff\xff\xff\xff\xfe"), Some(-2));
    assert_eq!(pax::number(b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), None);
    assert_eq!(pax::number(b"0008"), None);
    assert_eq!(pax::time(b"1.5"), Some((1, 500_000_000)));
    assert_eq!(pax::time(b"1.0000000019"), Some((1, 1)));
    assert_eq!(pax::time(b"-3"), Some((-3, 0)));
    assert_eq!(pax::time(b"1.x"), None);
}

/// GNU tar's own archives of a file with holes, in every format that it has.
#[test]
fn sparse_files_of_gnu_tar_come_whole() {
    let dir = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(dir.path().join("sparse")).unwrap();
    file.set_len(3_000_000).unwrap();
    for i in 0..40 {
        file.write_all_at(format!("piece {i}").as_bytes(), 70_000 * i).unwrap();
    }
    let whole = std::fs::read(dir.path().join("sparse")).unwrap();
    let formats = [
        "--format=gnu",
        "--format=pax --sparse-version=0.0",
        "--format=pax --sparse-version=0.1",
        "--format=pax --sparse-version=1.0",
    ];
    for format in formats {
        let tar = Command::new("tar")
            .args(format.split(' '))
            .args(["--sparse", "-cf", "-", "-C"])
            .arg(dir.path())
            .arg("sparse")
            .output()
            .unwrap();
        assert!(tar.status.success() && tar.stdout.len() < whole.len(), "{format}");
        let found = unpack(&[&tar.stdout]).unwrap_or_else(|error| panic!("{format}: {error:?}"));
        assert!(found[b"sparse".as_slice()].data == whole, "{format}");
        assert_eq!(found.len(), 2);
    }
}

#[test]
fn damaged_archives_are_refused() {
    let good = archive(&[(header(EntryType::Regular, "file", 2000), &[1; 2000])]);
    let eof = |result| matches!(result, Err(Error::Read(error)) if error.kind() == io::ErrorKind::UnexpectedEof);
    assert!(unpack(&[&good]).is_ok(), "an end marker is not asked for");
    assert!(eof(unpack(&[&good[..100]])) && eof(unpack(&[&good[..1000]])));
    let mut bad = good.clone();
    bad[0] ^= 1;
    assert!(matches!(unpack(&[&bad]), Err(Error::Header(..))));
    let mut kind = header(EntryType::Regular, "file", 0);
    kind.set_entry_type(EntryType::new(b'V'));
    kind.set_cksum();
    assert!(matches!(unpack(&[&archive(&[(kind, b"")])]), Err(Error::Kind(_, 'V'))));
    for records in [&b"5 a=b\n"[..], b"999 a=b\n", b"x", b"6 a=bc", b"-1 a=b\n", b"99999999999999999999 a=b\n"] {
        let entries = [(header(EntryType::XHeader, "x", records.len() as u64), records)];
        assert!(matches!(unpack(&[&archive(&entries)]), Err(Error::Header(..))), "{records:?}");
    }
}

#[test]
fn what_claims_to_be_huge_is_refused_before_it_costs() {
    let huge = header(EntryType::Regular, "file", 1 << 40);
    assert!(matches!(unpack(&[huge.as_bytes()]), Err(Error::Unpacked(_))));
    for kind in [EntryType::XHeader, EntryType::GNULongName] {
        assert!(matches!(unpack(&[header(kind, "x", 1 << 40).as_bytes()]), Err(Error::Header(..))));
    }
    let files = archive(&[
        (header(EntryType::Regular, "a", 600), &[0; 600]),
        (header(EntryType::Regular, "a", 600), &[0; 600]),
    ]);
    assert!(matches!(unpack_within(&[&files], 1000), Err(Error::Unpacked(1000))));
    let value = vec![b'v'; 66_000];
    let records = pax(&[("SCHILY.xattr.user.x", &value)]);
    let entries = [
        (header(EntryType::XHeader, "x", records.len() as u64), records.as_slice()),
        (header(EntryType::Fifo, "f", 0), b""),
    ];
    assert!(matches!(unpack(&[&archive(&entries)]), Err(Error::Xattrs(_))));
    // A map of holes that claims more than the file has, and one that runs backwards.
    for map in ["0,5,2,5", "0,600", "7"] {
        let records = pax(&[("GNU.sparse.size", b"20"), ("GNU.sparse.map", map.as_bytes())]);
        let entries = [
            (header(EntryType::XHeader, "x", records.len() as u64), records.as_slice()),
            (header(EntryType::Regular, "f", 10), &[1; 10]),
        ];
        assert!(matches!(unpack(&[&archive(&entries)]), Err(Error::Header(..))), "{map}");
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 500, failure_persistence: None, ..Default::default() })]

    /// Whatever the bytes, there is an image or an error.
    #[test]
    fn no_archive_breaks_the_reader(
        flips in proptest::collection::vec((0_usize..4096, proptest::prelude::any::<u8>()), 0..8), fix in proptest::prelude::any::<bool>()
    ) {
        let records = pax(&[("path", b"other"), ("SCHILY.xattr.user.x", b"y"), ("mtime", b"1.5")]);
        let mut bytes = archive(&[
            (header(EntryType::XHeader, "x", records.len() as u64), &records),
            (header(EntryType::Regular, "file", 700), &[1; 700]),
            (header(EntryType::GNUSparse, "sparse", 512), &[2; 512]),
            (header(EntryType::Link, "link", 0), b""),
        ]);
        for (at, value) in flips {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if fix {
            for start in [0, 1024, 2560, 3584] {
                let mut header = Header::new_old();
                header.as_mut_bytes().copy_from_slice(&bytes[start..start + 512]);
                header.set_cksum();
                bytes[start..start + 512].copy_from_slice(header.as_bytes());
            }
        }
        let _image_or_error = unpack(&[&bytes]);
    }
}
