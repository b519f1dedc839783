//! A server of a real directory, spoken to as a guest's kernel would, and as a hostile one might.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::thread;

use proptest::prelude::*;
use rustix::fs::{CWD, Mode, OFlags, openat};
use tempfile::TempDir;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::abi::{
    Attr, AttrOut, BatchForgetIn, CreateIn, Dirent, EntryOut, FallocateIn, FileLock, FlushIn, ForgetIn, ForgetOne,
    GetxattrIn, GetxattrOut, InHeader, InitIn, InitOut, LK_FLOCK, LinkIn, LkIn, LseekIn, LseekOut, MkdirIn, MknodIn,
    OpenIn, OpenOut, OutHeader, ROOT, ReadIn, ReleaseIn, Rename2In, SetattrIn, SetxattrIn, StatfsOut,
    WRITE_KILL_SUIDGID, WriteIn, WriteOut, change, feature, opcode,
};
use crate::lock::{Waiting, answer_waiting};
use crate::reply::Reply;
use crate::server::Server;

/// A directory in which another file system is mounted, as the volumes are in a server's.
const MOUNTED_IN: &str = "/dev";
const MOUNTED: &str = "shm";

struct Guest {
    server: Server,
    arrivals: Receiver<Waiting>,
    reply: Reply,
    directory: TempDir,
    /// The node of `directory`.
    share: u64,
    user: (u32, u32),
}

type Answer = Result<Vec<u8>, i32>;

fn name(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

fn take<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> T {
    T::read_from_prefix(bytes).expect("long enough").0
}

impl Guest {
    fn new() -> Self {
        let directory = tempfile::tempdir_in(Path::new(MOUNTED_IN).join(MOUNTED)).expect("a directory");
        let root = openat(CWD, MOUNTED_IN, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).expect("opens");
        let (server, arrivals) = Server::new(root).expect("serves");
        let mut guest = Self { server, arrivals, reply: Reply::default(), directory, share: 0, user: (0, 0) };
        let mounted = guest.find(ROOT, MOUNTED).expect("it is mounted").nodeid;
        let last = guest.directory.path().file_name().expect("a name").to_str().expect("text").to_owned();
        guest.share = guest.find(mounted, &last).expect("it is there").nodeid;
        guest
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn call(&mut self, opcode: u32, nodeid: u64, parts: &[&[u8]]) -> Answer {
        let body = parts.concat();
        let length = size_of::<InHeader>() + body.len();
        let (uid, gid) = self.user;
        let len = u32::try_from(length).expect("short");
        let header = InHeader { len, opcode, unique: 9, nodeid, uid, gid, pid: 1, total_extlen: 0, padding: 0 };
        let message = [header.as_bytes(), &body].concat();
        let Some(answer) = self.server.answer(&message, &mut self.reply) else { return Ok(Vec::new()) };
        let header: OutHeader = take(answer);
        assert_eq!((usize::try_from(header.len).expect("short"), header.unique), (answer.len(), 9));
        let body = answer[size_of::<OutHeader>()..].to_vec();
        if header.error == 0 { Ok(body) } else { Err(-header.error) }
    }

    fn find(&mut self, parent: u64, text: &str) -> Result<EntryOut, i32> {
        self.call(opcode::LOOKUP, parent, &[&name(text)]).map(|answer| take(&answer))
    }

    fn node(&mut self, text: &str) -> u64 {
        self.find(self.share, text).unwrap_or_else(|errno| panic!("{text}: {errno}")).nodeid
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let asked = OpenIn { flags: flags.cast_unsigned(), open_flags: 0 };
        self.call(opcode::OPEN, node, &[asked.as_bytes()]).map(|answer| take::<OpenOut>(&answer).fh)
    }

    fn create(&mut self, text: &str, flags: i32, mode: u32) -> Result<(Attr, u64), i32> {
        let asked = CreateIn { flags: flags.cast_unsigned(), mode, umask: 0, open_flags: 0 };
        let answer = self.call(opcode::CREATE, self.share, &[asked.as_bytes(), &name(text)])?;
        Ok((take::<EntryOut>(&answer).attr, take::<OpenOut>(&answer[size_of::<EntryOut>()..]).fh))
    }

    fn read(&mut self, fh: u64, offset: u64, size: u32) -> Answer {
        let asked = ReadIn { fh, offset, size, read_flags: 0, lock_owner: 0, flags: 0, padding: 0 };
        self.call(opcode::READ, 0, &[asked.as_bytes()])
    }

    fn write(&mut self, fh: u64, offset: u64, bytes: &[u8], write_flags: u32) -> Result<u32, i32> {
        let size = u32::try_from(bytes.len()).expect("short");
        let asked = WriteIn { fh, offset, size, write_flags, lock_owner: 0, flags: 0, padding: 0 };
        self.call(opcode::WRITE, 0, &[asked.as_bytes(), bytes]).map(|answer| take::<WriteOut>(&answer).size)
    }

    fn set(&mut self, node: u64, asked: SetattrIn) -> Result<Attr, i32> {
        self.call(opcode::SETATTR, node, &[asked.as_bytes()]).map(|answer| take::<AttrOut>(&answer).attr)
    }

    fn rename(&mut self, old: &str, new: &str, flags: u32) -> Answer {
        let asked = Rename2In { newdir: self.share, flags, padding: 0 };
        self.call(opcode::RENAME2, self.share, &[asked.as_bytes(), &name(old), &name(new)])
    }

    fn mkdir(&mut self, text: &str, mode: u32) -> Result<Attr, i32> {
        let asked = MkdirIn { mode, umask: 0 };
        let answer = self.call(opcode::MKDIR, self.share, &[asked.as_bytes(), &name(text)])?;
        Ok(take::<EntryOut>(&answer).attr)
    }
}

fn nothing() -> SetattrIn {
    SetattrIn::new_zeroed()
}

#[test]
fn a_kernel_is_offered_no_caches() {
    let mut guest = Guest::new();
    let asked =
        InitIn { major: 7, minor: 41, max_readahead: 1 << 17, flags: u32::MAX, flags2: 1 << 8, unused: [0; 11] };
    let agreed: InitOut = take(&guest.call(opcode::INIT, 0, &[asked.as_bytes()]).expect("agrees"));
    assert_eq!((agreed.major, agreed.max_write, agreed.flags2), (7, 128 << 10, feature::ALLOW_IDMAP));
    assert_eq!(agreed.flags & feature::AUTO_INVAL_DATA, feature::AUTO_INVAL_DATA);
    let writeback = 1 << 16;
    assert_eq!(agreed.flags & writeback, 0);
    assert_eq!(guest.find(guest.share, "x").err(), Some(libc::ESTALE), "another kernel knows nothing");
    let old = InitIn { major: 6, ..asked };
    assert_eq!(guest.call(opcode::INIT, 0, &[old.as_bytes()]).err(), Some(libc::EPROTO));
}

#[test]
fn no_name_leads_out() {
    let mut guest = Guest::new();
    fs::create_dir(guest.path("d")).expect("makes");
    for bad in ["..", ".", "", "/", "/etc", "d/..", "../x", "d/x"] {
        assert_eq!(guest.find(guest.share, bad).err(), Some(libc::EINVAL), "{bad:?}");
        assert_eq!(guest.mkdir(bad, 0o755).err(), Some(libc::EINVAL), "{bad:?}");
        assert_eq!(guest.rename("d", bad, 0).err(), Some(libc::EINVAL), "{bad:?}");
        assert_eq!(guest.call(opcode::UNLINK, guest.share, &[&name(bad)]).err(), Some(libc::EINVAL));
    }
    assert_eq!(guest.call(opcode::LOOKUP, guest.share, &[b"unterminated"]).err(), Some(libc::EINVAL));
}

#[test]
fn links_are_read_and_never_followed() {
    let mut guest = Guest::new();
    symlink("/etc", guest.path("link")).expect("links");
    symlink("/etc/passwd", guest.path("file")).expect("links");
    for (link, target) in [("link", "/etc"), ("file", "/etc/passwd")] {
        let node = guest.node(link);
        assert_eq!(guest.call(opcode::READLINK, node, &[]).expect("a link"), target.as_bytes());
        assert_eq!(guest.find(node, "passwd").err(), Some(libc::ENOTDIR));
        assert_eq!(guest.open(node, libc::O_RDONLY).err(), Some(libc::EOPNOTSUPP));
        assert_eq!(guest.create(link, libc::O_WRONLY, 0o644).err(), Some(libc::ESTALE));
        let cut = SetattrIn { valid: change::SIZE, ..nothing() };
        assert_eq!(guest.set(node, cut).err(), Some(libc::EOPNOTSUPP));
    }
    let made = guest.call(opcode::SYMLINK, guest.share, &[&name("new"), &name("../anything at all")]);
    assert!(made.is_ok());
    assert_eq!(fs::read_link(guest.path("new")).expect("a link"), Path::new("../anything at all"));
}

#[test]
fn a_name_that_changes_all_the_time_never_leads_out() {
    let mut guest = Guest::new();
    let secret = tempfile::NamedTempFile::new().expect("a file");
    fs::write(secret.path(), "secret").expect("writes");
    fs::write(guest.path("x"), "public").expect("writes");
    symlink(secret.path(), guest.path("y")).expect("links");
    let (x, y, z) = (guest.path("x"), guest.path("y"), guest.path("z"));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for (from, to) in [(&x, &z), (&y, &x), (&z, &y)] {
                    fs::rename(from, to).expect("renames");
                }
            }
        });
        let mut read = 0;
        while read < 300 {
            let Ok(found) = guest.find(guest.share, "x") else { continue };
            if let Ok(fh) = guest.open(found.nodeid, libc::O_RDONLY) {
                assert_eq!(guest.read(fh, 0, 100).expect("reads"), b"public");
                read += 1;
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn where_the_volumes_are_nothing_can_be_changed_or_seen_but_them() {
    let mut guest = Guest::new();
    assert_eq!(guest.find(ROOT, "null").err(), Some(libc::ENOENT), "it is on the root's own mount");
    let mkdir = MkdirIn { mode: 0o755, umask: 0 };
    let (new, old) = (name("new"), name(MOUNTED));
    let rename = Rename2In { newdir: ROOT, flags: 0, padding: 0 };
    for (opcode, parts) in [
        (opcode::MKDIR, vec![mkdir.as_bytes(), &new]),
        (opcode::SYMLINK, vec![&new[..], &new]),
        (opcode::UNLINK, vec![&old[..]]),
        (opcode::RMDIR, vec![&old[..]]),
        (opcode::RENAME2, vec![rename.as_bytes(), &old, &new]),
        (opcode::SETATTR, vec![nothing().as_bytes()]),
    ] {
        assert_eq!(guest.call(opcode, ROOT, &parts).err(), Some(libc::EROFS), "{opcode}");
    }
}

#[test]
fn what_is_made_is_its_makers() {
    let mut guest = Guest::new();
    guest.user = (1234, 4321);
    let (attr, fh) = guest.create("file", libc::O_RDWR | libc::O_EXCL, 0o4640).expect("creates");
    assert_eq!((attr.uid, attr.gid, attr.mode & 0o7777), (1234, 4321, 0o4640));
    assert_eq!(guest.create("file", libc::O_RDWR | libc::O_EXCL, 0o600).err(), Some(libc::EEXIST));
    assert_eq!(guest.create("file", libc::O_RDWR, 0o600).err(), Some(libc::ESTALE), "it looks again");
    assert_eq!(guest.mkdir("directory", 0o700).map(|attr| (attr.uid, attr.gid)), Ok((1234, 4321)));
    assert_eq!(guest.write(fh, 0, b"hello", 0), Ok(5));
    assert_eq!(guest.read(fh, 1, 100).expect("reads"), b"ello");
    assert_eq!(fs::metadata(guest.path("file")).expect("there").mode() & 0o7777, 0o4640);
    assert_eq!(guest.write(fh, 0, b"j", WRITE_KILL_SUIDGID), Ok(1));
    assert_eq!(fs::metadata(guest.path("file")).expect("there").mode() & 0o7777, 0o640);
    // A directory's group goes to what is made in it, by the host's own rule.
    fs::set_permissions(guest.directory.path(), fs::Permissions::from_mode(0o2777)).expect("it is ours");
    let group = fs::metadata(guest.directory.path()).expect("there").gid();
    assert_eq!(guest.create("inherits", libc::O_RDWR, 0o644).map(|(attr, _)| (attr.uid, attr.gid)), Ok((1234, group)));
    guest.user = (u32::MAX, 0);
    assert_eq!(guest.mkdir("nobodys", 0o700).err(), Some(libc::EINVAL));
    guest.user = (0, 0);
    assert_eq!(guest.mkdir("roots", 0o700).map(|attr| (attr.uid, attr.mode & 0o777)), Ok((0, 0o700)));
}

#[test]
fn attributes_are_changed_one_by_one() {
    let mut guest = Guest::new();
    fs::write(guest.path("file"), "0123456789").expect("writes");
    let node = guest.node("file");
    let mode = SetattrIn { valid: change::MODE, mode: libc::S_IFREG | 0o604, ..nothing() };
    assert_eq!(guest.set(node, mode).expect("changes").mode, libc::S_IFREG | 0o604);
    let owner = SetattrIn { valid: change::UID, uid: 5, ..nothing() };
    let group = fs::metadata(guest.path("file")).expect("there").gid();
    assert_eq!(guest.set(node, owner).map(|attr| (attr.uid, attr.gid)), Ok((5, group)));
    let size = SetattrIn { valid: change::SIZE, size: 4, ..nothing() };
    assert_eq!(guest.set(node, size).map(|attr| attr.size), Ok(4));
    let time = SetattrIn { valid: change::MTIME, mtime: 1_000_000, mtimensec: 7, ..nothing() };
    assert_eq!(guest.set(node, time).map(|attr| (attr.mtime, attr.mtimensec)), Ok((1_000_000, 7)));
    let now = SetattrIn { valid: change::MTIME | change::MTIME_NOW, ..nothing() };
    assert!(guest.set(node, now).expect("changes").mtime > 1_000_000_000);
    let found: StatfsOut = take(&guest.call(opcode::STATFS, node, &[]).expect("there"));
    assert!(found.blocks > 0 && found.namelen == 255);
}

#[test]
fn nodes_are_files_and_not_names() {
    let mut guest = Guest::new();
    fs::write(guest.path("a"), "a").expect("writes");
    fs::write(guest.path("b"), "b").expect("writes");
    let (a, b) = (guest.node("a"), guest.node("b"));
    guest.rename("a", "c", 0).expect("renames");
    let fh = guest.open(a, libc::O_RDONLY).expect("by its new name");
    assert_eq!(guest.read(fh, 0, 9).expect("reads"), b"a");
    guest.rename("b", "c", libc::RENAME_EXCHANGE).expect("exchanges");
    let fh = guest.open(b, libc::O_RDONLY).expect("by its new name");
    assert_eq!(guest.read(fh, 0, 9).expect("reads"), b"b");
    assert_eq!(guest.rename("b", "c", libc::RENAME_NOREPLACE).err(), Some(libc::EEXIST));
    assert_eq!(guest.rename("b", "d", libc::RENAME_WHITEOUT).err(), Some(libc::EINVAL));
    // The host puts another file in its place.
    fs::write(guest.path("new"), "new").expect("writes");
    fs::rename(guest.path("new"), guest.path("c")).expect("renames");
    assert_eq!(guest.open(b, libc::O_RDONLY).err(), Some(libc::ESTALE));
    assert_ne!(guest.node("c"), b);
    assert_eq!(guest.read(fh, 0, 9).expect("what is open stays"), b"b");
    assert_eq!(guest.call(opcode::GETATTR, b, &[]).map(|answer| take::<AttrOut>(&answer).attr.nlink), Ok(0));
}

#[test]
fn hard_links_are_one_node() {
    let mut guest = Guest::new();
    fs::write(guest.path("a"), "a").expect("writes");
    let a = guest.node("a");
    let asked = LinkIn { oldnodeid: a };
    let made = guest.call(opcode::LINK, guest.share, &[asked.as_bytes(), &name("b")]).expect("links");
    assert_eq!((take::<EntryOut>(&made).nodeid, take::<EntryOut>(&made).attr.nlink), (a, 2));
    guest.call(opcode::UNLINK, guest.share, &[&name("a")]).expect("removes");
    assert!(guest.open(a, libc::O_RDONLY).is_ok(), "by its other name");
    fs::remove_file(guest.path("b")).expect("removes");
    fs::write(guest.path("b"), "another").expect("writes");
    let again = guest.call(opcode::LINK, guest.share, &[asked.as_bytes(), &name("c")]);
    assert_eq!(again.err(), Some(libc::ESTALE));
    assert!(!guest.path("c").exists(), "what was linked by mistake is taken back");
}

#[test]
fn every_entry_of_a_directory_is_told_once() {
    let mut guest = Guest::new();
    for number in 0..500 {
        fs::write(guest.path(&format!("file-{number:03}")), "").expect("writes");
    }
    let fh = guest.open(guest.share, libc::O_RDONLY).expect("opens");
    let (mut names, mut offset) = (Vec::new(), 0);
    loop {
        let asked = ReadIn { fh, offset, size: 700, read_flags: 0, lock_owner: 0, flags: 0, padding: 0 };
        let answer = guest.call(opcode::READDIR, guest.share, &[asked.as_bytes()]).expect("reads");
        assert!(answer.len() <= 700);
        let mut rest = answer.as_slice();
        if rest.is_empty() {
            break;
        }
        while !rest.is_empty() {
            let entry: Dirent = take(rest);
            let length = usize::try_from(entry.namelen).expect("short");
            names.push(String::from_utf8(rest[24..24 + length].to_vec()).expect("text"));
            offset = entry.off;
            rest = &rest[(24 + length).next_multiple_of(8)..];
        }
    }
    names.sort();
    names.retain(|name| name.starts_with("file"));
    assert!(names.iter().cloned().eq((0..500).map(|number| format!("file-{number:03}"))), "{names:?}");
}

#[test]
fn extended_attributes_are_kept_by_the_host() {
    let mut guest = Guest::new();
    fs::write(guest.path("file"), "").expect("writes");
    let node = guest.node("file");
    let asked = SetxattrIn { size: 5, flags: 0 };
    guest.call(opcode::SETXATTR, node, &[asked.as_bytes(), &name("user.x"), b"value"]).expect("sets");
    let query = |size| GetxattrIn { size, padding: 0 };
    let count = guest.call(opcode::GETXATTR, node, &[query(0).as_bytes(), &name("user.x")]).expect("counts");
    assert_eq!(take::<GetxattrOut>(&count).size, 5);
    let value = guest.call(opcode::GETXATTR, node, &[query(64).as_bytes(), &name("user.x")]);
    assert_eq!(value.expect("reads"), b"value");
    let short = guest.call(opcode::GETXATTR, node, &[query(2).as_bytes(), &name("user.x")]);
    assert_eq!(short.err(), Some(libc::ERANGE));
    let list = guest.call(opcode::LISTXATTR, node, &[query(4096).as_bytes()]).expect("lists");
    assert!(list.split(|byte| *byte == 0).any(|name| name == b"user.x"), "{list:?}");
    guest.call(opcode::REMOVEXATTR, node, &[&name("user.x")]).expect("removes");
    let gone = guest.call(opcode::GETXATTR, node, &[query(64).as_bytes(), &name("user.x")]);
    assert_eq!(gone.err(), Some(libc::ENODATA));
}

#[test]
fn space_is_made_and_found() {
    let mut guest = Guest::new();
    let (_, fh) = guest.create("file", libc::O_RDWR, 0o600).expect("creates");
    let asked = FallocateIn { fh, offset: 0, length: 8192, mode: 0, padding: 0 };
    guest.call(opcode::FALLOCATE, 0, &[asked.as_bytes()]).expect("allocates");
    assert_eq!(fs::metadata(guest.path("file")).expect("there").size(), 8192);
    let seek = |whence: i32| LseekIn { fh, offset: 0, whence: whence.cast_unsigned(), padding: 0 };
    let hole = guest.call(opcode::LSEEK, 0, &[seek(libc::SEEK_HOLE).as_bytes()]).expect("seeks");
    assert!(take::<LseekOut>(&hole).offset <= 8192);
    assert_eq!(guest.call(opcode::LSEEK, 0, &[seek(libc::SEEK_END).as_bytes()]).err(), Some(libc::EINVAL));
}

/// A lock of bytes 0 to 9 by an owner, or of a file.
fn lock(fh: u64, owner: u64, kind: i32, lk_flags: u32) -> LkIn {
    let lk = FileLock { start: 0, end: 9, kind: kind.cast_unsigned(), pid: 1 };
    LkIn { fh, owner, lk, lk_flags, padding: 0 }
}

#[test]
fn owners_of_locks_are_told_apart_until_they_close() {
    let mut guest = Guest::new();
    let (_, fh) = guest.create("file", libc::O_RDWR, 0o600).expect("creates");
    let node = guest.node("file");
    let set = |guest: &mut Guest, asked: LkIn| guest.call(opcode::SETLK, node, &[asked.as_bytes()]).err();
    assert_eq!(set(&mut guest, lock(fh, 1, libc::F_WRLCK, 0)), None);
    assert_eq!(set(&mut guest, lock(fh, 1, libc::F_WRLCK, 0)), None, "its own");
    assert_eq!(set(&mut guest, lock(fh, 2, libc::F_RDLCK, 0)), Some(libc::EAGAIN));
    let asked = lock(fh, 2, libc::F_WRLCK, 0);
    let found: FileLock = take(&guest.call(opcode::GETLK, node, &[asked.as_bytes()]).expect("looks"));
    assert_eq!((found.start, found.end, found.kind), (0, 9, libc::F_WRLCK.cast_unsigned()));
    // A process of the host's sees it too.
    let file = fs::File::options().write(true).open(guest.path("file")).expect("opens");
    let held = rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    assert_eq!(held.err(), Some(rustix::io::Errno::AGAIN));
    let flush = FlushIn { fh, unused: 0, padding: 0, lock_owner: 1 };
    guest.call(opcode::FLUSH, node, &[flush.as_bytes()]).expect("closes");
    assert_eq!(set(&mut guest, lock(fh, 2, libc::F_WRLCK, 0)), None);
}

#[test]
fn a_lock_that_is_held_is_waited_for_and_holds_up_nobody() {
    let mut guest = Guest::new();
    let (_, first) = guest.create("file", libc::O_RDWR, 0o600).expect("creates");
    let node = guest.node("file");
    let second = guest.open(node, libc::O_RDWR).expect("opens");
    let ask = |guest: &mut Guest, opcode: u32, asked: LkIn| guest.call(opcode, node, &[asked.as_bytes()]);
    ask(&mut guest, opcode::SETLK, lock(first, 0, libc::F_WRLCK, LK_FLOCK)).expect("is free");
    assert_eq!(ask(&mut guest, opcode::SETLK, lock(second, 0, libc::F_RDLCK, LK_FLOCK)).err(), Some(libc::EAGAIN));
    // Two requests that wait: `call` hears no answer.
    for _ in 0..2 {
        ask(&mut guest, opcode::SETLKW, lock(second, 0, libc::F_WRLCK, LK_FLOCK)).expect("waits");
    }
    assert!(guest.find(guest.share, "file").is_ok());
    ask(&mut guest, opcode::SETLK, lock(first, 0, libc::F_UNLCK, LK_FLOCK)).expect("was held");
    let (ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .expect("a socket pair");
    let Guest { server, arrivals, .. } = guest;
    // Without a server nobody sends any more, and the thread ends when it has answered.
    drop(server);
    answer_waiting(&theirs, &arrivals);
    let mut answer = [0; 64];
    let (_, length) = rustix::net::recv(&ours, &mut answer[..], rustix::net::RecvFlags::DONTWAIT).expect("an answer");
    let header: OutHeader = take(&answer[..length]);
    assert_eq!((header.unique, header.error), (9, 0));
}

#[test]
fn devices_are_not_made_and_pipes_not_opened() {
    let mut guest = Guest::new();
    let mut make = |mode: u32, text: &str| {
        let asked = MknodIn { mode, rdev: 0x103, umask: 0, padding: 0 };
        guest.call(opcode::MKNOD, guest.share, &[asked.as_bytes(), &name(text)]).map(|answer| take::<EntryOut>(&answer))
    };
    assert_eq!(make(libc::S_IFCHR | 0o666, "null").err(), Some(libc::EPERM));
    assert_eq!(make(libc::S_IFBLK | 0o666, "disk").err(), Some(libc::EPERM));
    let pipe = make(libc::S_IFIFO | 0o600, "pipe").expect("makes").nodeid;
    assert!(make(libc::S_IFSOCK | 0o600, "socket").is_ok());
    assert_eq!(guest.open(pipe, libc::O_RDONLY).err(), Some(libc::EOPNOTSUPP));
}

#[test]
fn what_is_forgotten_or_closed_is_gone() {
    let mut guest = Guest::new();
    fs::write(guest.path("file"), "x").expect("writes");
    let node = guest.node("file");
    assert_eq!(guest.node("file"), node);
    let once = ForgetIn { nlookup: 1 };
    guest.call(opcode::FORGET, node, &[once.as_bytes()]).expect("nobody answers");
    let fh = guest.open(node, libc::O_RDONLY).expect("it was looked up twice");
    let (count, one) = (BatchForgetIn { count: 1, dummy: 0 }, ForgetOne { nodeid: node, nlookup: 1 });
    guest.call(opcode::BATCH_FORGET, 0, &[count.as_bytes(), one.as_bytes()]).expect("nobody answers");
    assert_eq!(guest.open(node, libc::O_RDONLY).err(), Some(libc::ESTALE));
    assert_eq!(guest.read(fh, 0, 1).expect("it is open still"), b"x");
    let release = ReleaseIn { fh, flags: 0, release_flags: 0, lock_owner: 0 };
    guest.call(opcode::RELEASE, node, &[release.as_bytes()]).expect("closes");
    assert_eq!(guest.read(fh, 0, 1).err(), Some(libc::EBADF));
    // A lie about how often it was looked up.
    let lie = ForgetIn { nlookup: u64::MAX };
    guest.call(opcode::FORGET, ROOT, &[lie.as_bytes()]).expect("nobody answers");
    assert!(guest.find(ROOT, MOUNTED).is_ok());
}

proptest! {
    #[test]
    fn no_message_is_too_strange(
        opcode in 0..60_u32, node in 0..4_u64, body in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let root = openat(CWD, "/proc/self/fdinfo", OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).expect("opens");
        let (server, _arrivals) = Server::new(root).expect("serves");
        let header = InHeader { len: 0, opcode, unique: 1, nodeid: node, uid: 0, gid: 0, pid: 0, total_extlen: 0, padding: 0 };
        let mut reply = Reply::default();
        for message in [&[header.as_bytes(), &body].concat()[..], &body] {
            if let Some(answer) = server.answer(message, &mut reply) {
                prop_assert!(answer.len() >= size_of::<OutHeader>());
            }
        }
    }
}
