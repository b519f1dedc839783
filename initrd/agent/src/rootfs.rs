//! A container's file systems, put together by its own first process in its own mount namespace.
//!
//! Everything that comes from outside is picked up first; then the process pivots into the container's root, so that
//! every later path, with whatever symbolic links the image has, is resolved inside it.

use std::ffi::CString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, mkdirat, mknod, umask};
use nix::unistd::{chdir, pivot_root};
use thiserror::Error;

use crate::devices::Node;
use crate::mounts::{self, MountError, SHM, STAGE};
use crate::sys;
use crate::userns::UserSpace;

/// Why a container has no file systems.
#[derive(Debug, Error)]
pub(crate) enum RootError {
    /// The overlay or the pivot.
    #[error("cannot {0}: {1}")]
    Step(&'static str, #[source] io::Error),
    /// A place in the container.
    #[error("cannot {0} {path} in the container: {2}", path = .1.display())]
    Place(&'static str, PathBuf, #[source] io::Error),
    /// See [`MountError`].
    #[error("{0}: {source}", source = std::error::Error::source(.0).map(ToString::to_string).unwrap_or_default())]
    Mount(#[from] MountError),
}

/// What a mount shows.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// Something of the agent's.
    Path(PathBuf),
    /// A mounted image, or what is at a path in it.
    Image { root: PathBuf, sub_path: String },
    /// A volume of memory, or what is at a path in it.
    Memory { root: PathBuf, sub_path: String },
    /// Fresh guest memory.
    Tmpfs { size: u64, mode: u32 },
}

/// A mount beyond the standard ones.
#[derive(Clone, Debug)]
pub(crate) struct Mount {
    pub(crate) destination: String,
    pub(crate) source: Source,
    pub(crate) read_only: bool,
    /// Owners are shown as those of the pod's user namespace.
    pub(crate) mapped: bool,
}

/// The guest's numbers for whom things in a container belong to that the agent makes there.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Owners {
    /// The container's root.
    root: (u32, u32),
    /// Group of terminals; 0 is the usual one.
    terminals: u32,
}

/// Group of terminals, by custom.
const TTY_GROUP: u32 = 5;

impl Owners {
    /// Those of a user namespace.
    pub(crate) fn of(users: &UserSpace) -> Self {
        Self { root: users.outside(0, 0), terminals: users.outside(0, TTY_GROUP).1 }
    }

    /// Mount options of a file system that is the container's.
    fn options(self) -> String {
        let (uid, gid) = self.root;
        if self.root == (0, 0) { String::new() } else { format!(",uid={uid},gid={gid}") }
    }

    /// Gives away what the agent has just made.
    fn give(self, path: &Path) -> io::Result<()> {
        let (uid, gid) = self.root;
        if self.root == (0, 0) { Ok(()) } else { lchown(path, Some(uid), Some(gid)) }
    }

    /// With its parents.
    fn make_directory(self, path: &Path) -> io::Result<()> {
        let path = resolve(path)?;
        let missing: Vec<_> = path.ancestors().take_while(|path| fs::symlink_metadata(path).is_err()).collect();
        DirBuilder::new().recursive(true).mode(0o755).create(&path)?;
        missing.into_iter().try_for_each(|path| self.give(path))
    }

    fn make_file(self, path: &Path) -> io::Result<()> {
        let path = resolve(path)?;
        if fs::symlink_metadata(&path).is_ok() {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.make_directory(parent)?;
        }
        OpenOptions::new().write(true).create_new(true).mode(0o644).open(&path)?;
        self.give(&path)
    }
}

/// What is below all mounts.
#[derive(Debug)]
pub(crate) enum Base {
    /// Images, and a layer on them that takes what is written.
    Overlay {
        /// Top to bottom.
        lowers: Vec<PathBuf>,
        /// Holds `upper` and `work`.
        writable: PathBuf,
    },
    /// A directory that takes what is written.
    Directory {
        path: PathBuf,
        /// Owners are to be shown as those of the pod's user namespace; else they are those already.
        mapped: bool,
    },
}

/// Everything a container's mount namespace will hold.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) base: Base,
    pub(crate) read_only: bool,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) masked_paths: Vec<String>,
    pub(crate) readonly_paths: Vec<String>,
    /// Made if it is not there.
    pub(crate) cwd: String,
    /// /sys and /sys/fs/cgroup can be written.
    pub(crate) privileged: bool,
    pub(crate) owners: Owners,
}

const NONE: Option<&str> = None;
const HARDENED: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC).union(MsFlags::MS_NODEV);

fn step(what: &'static str) -> impl Fn(nix::Error) -> RootError {
    move |error| RootError::Step(what, error.into())
}

fn place(what: &'static str, path: &str) -> impl Fn(io::Error) -> RootError {
    let path = PathBuf::from(path);
    move |error| RootError::Place(what, path.clone(), error)
}

impl Root {
    /// Makes the calling process's mount namespace the container's. `users` is the user namespace it will join.
    pub(crate) fn enter(&self, users: Option<BorrowedFd<'_>>) -> Result<(), RootError> {
        umask(Mode::empty());
        self.base.mount(users)?;
        let picked = self.pick_up(users)?;
        let shm = clone_mount(Path::new(SHM)).map_err(place("take", SHM))?;
        pivot()?;
        // There the guest's root is nobody, to whom nothing can belong.
        let nobody = users.is_some() && matches!(self.base, Base::Directory { mapped: true, .. });
        if nobody {
            sys::create_as(self.owners.root).map_err(place("make files in", "/"))?;
        }
        self.mount_standard(&shm)?;
        for (mount, source) in self.mounts.iter().zip(picked) {
            mount.attach(source, self.owners)?;
        }
        self.make_nodes()?;
        let made = self.owners.make_directory(Path::new(&self.cwd));
        made.map_err(place("make the working directory", &self.cwd))?;
        self.readonly_paths.iter().try_for_each(|path| make_read_only(path))?;
        self.masked_paths.iter().try_for_each(|path| mask(path))?;
        if self.read_only {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
            mount(NONE, "/", NONE, flags, NONE).map_err(step("make the root read-only"))?;
        }
        if nobody {
            sys::create_as((0, 0)).map_err(place("make files in", "/"))?;
        }
        umask(Mode::from_bits_truncate(0o022));
        Ok(())
    }

    /// Mounts from the agent's tree, while that can still be seen.
    fn pick_up(&self, users: Option<BorrowedFd<'_>>) -> Result<Vec<Option<OwnedFd>>, RootError> {
        let pick = |mount: &Mount| {
            let taken = match &mount.source {
                Source::Path(path) => clone_mount(path),
                Source::Image { root, sub_path } => clone_image(root, sub_path),
                Source::Memory { root, sub_path } => {
                    find_below(root, sub_path).and_then(|found| sys::clone_open(found.as_fd()))
                }
                Source::Tmpfs { .. } => return Ok(None),
            };
            let taken = taken.map_err(place("mount", &mount.destination))?;
            if let Some(users) = users.filter(|_| mount.mapped) {
                sys::map_owners(taken.as_fd(), users).map_err(place("show owners mapped", &mount.destination))?;
            }
            if mount.read_only {
                sys::mount_read_only(taken.as_fd()).map_err(place("make read-only", &mount.destination))?;
            }
            Ok(Some(taken))
        };
        self.mounts.iter().map(pick).collect()
    }

    /// What every container has (OCI runtime specification, config-linux, default file systems).
    fn mount_standard(&self, shm: &OwnedFd) -> Result<(), RootError> {
        let flags = if self.privileged { HARDENED } else { HARDENED | MsFlags::MS_RDONLY };
        for directory in ["/proc", "/dev", "/sys"] {
            self.owners.make_directory(Path::new(directory)).map_err(place("make", directory))?;
        }
        mounts::mount_kind("proc", "/proc", HARDENED, "")?;
        let options = format!("mode=0755,size=65536k{}", self.owners.options());
        mounts::mount_kind("tmpfs", "/dev", MsFlags::MS_NOSUID | MsFlags::MS_STRICTATIME, &options)?;
        for directory in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
            self.owners.make_directory(Path::new(directory)).map_err(place("make", directory))?;
        }
        let group = if self.owners.terminals == 0 { TTY_GROUP } else { self.owners.terminals };
        let options = format!("newinstance,ptmxmode=0666,mode=0620,gid={group}");
        mounts::mount_kind("devpts", "/dev/pts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, &options)?;
        sys::attach_mount(shm.as_fd(), c"/dev/shm").map_err(place("mount", "/dev/shm"))?;
        mounts::mount_kind("mqueue", "/dev/mqueue", HARDENED, "")?;
        mounts::mount_kind("sysfs", "/sys", flags, "")?;
        mounts::mount_kind("cgroup2", crate::cgroup::ROOT, flags, "")?;
        let links = [
            ("/proc/self/fd", "/dev/fd"),
            ("/proc/self/fd/0", "/dev/stdin"),
            ("/proc/self/fd/1", "/dev/stdout"),
            ("/proc/self/fd/2", "/dev/stderr"),
            ("pts/ptmx", "/dev/ptmx"),
        ];
        let make = |link: &str, target| symlink(target, link).and_then(|()| self.owners.give(Path::new(link)));
        links.into_iter().try_for_each(|(target, link)| make(link, target).map_err(place("make", link)))
    }

    fn make_nodes(&self) -> Result<(), RootError> {
        for node in &self.nodes {
            let path = node.path.to_string_lossy();
            if let Some(parent) = node.path.parent() {
                self.owners.make_directory(parent).map_err(place("make the directory of", &path))?;
            }
            let kind = SFlag::from_bits_truncate(node.mode & libc::S_IFMT);
            match mknod(&node.path, kind, Mode::from_bits_truncate(node.mode), node.device) {
                Ok(()) => self.owners.give(&node.path).map_err(place("give away", &path))?,
                Err(nix::Error::EEXIST) => {}
                Err(error) => return Err(place("make the device", &path)(error.into())),
            }
        }
        Ok(())
    }
}

impl Base {
    /// Puts it on the stage.
    fn mount(&self, users: Option<BorrowedFd<'_>>) -> Result<(), RootError> {
        match self {
            Self::Overlay { lowers, writable } => mount_overlay(lowers, writable, users),
            Self::Directory { path, mapped } => bind(path, users.filter(|_| *mapped)).map_err(place("mount", "/")),
        }
    }
}

/// A directory as the container's root, its owners those of a user namespace if there is one.
fn bind(path: &Path, users: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let taken = clone_mount(path)?;
    if let Some(users) = users {
        sys::map_owners(taken.as_fd(), users)?;
    }
    sys::attach_mount(taken.as_fd(), &CString::new(STAGE)?)
}

fn mount_overlay(lowers: &[PathBuf], writable: &Path, users: Option<BorrowedFd<'_>>) -> Result<(), RootError> {
    let lowers = match users {
        Some(users) => map_lowers(lowers, writable, users).map_err(place("show owners mapped", "/"))?,
        None => lowers.to_vec(),
    };
    let lowers: Vec<_> = lowers.iter().map(|lower| lower.to_string_lossy()).collect();
    let writable = writable.display();
    let options = format!("lowerdir={},upperdir={writable}/upper,workdir={writable}/work", lowers.join(":"));
    mount(Some("overlay"), STAGE, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .map_err(step("mount the container's root"))
}

/// The image's layers once more, in this mount namespace, their owners those of a user namespace. What is copied up
/// from there has its owner in the guest's numbers; so has all that the container writes.
fn map_lowers(lowers: &[PathBuf], writable: &Path, users: BorrowedFd<'_>) -> io::Result<Vec<PathBuf>> {
    let map = |(number, lower): (usize, &PathBuf)| {
        let place = writable.join(format!("lower-{number}"));
        fs::create_dir(&place)?;
        let mount = clone_mount(lower)?;
        sys::map_owners(mount.as_fd(), users)?;
        sys::attach_mount(mount.as_fd(), &CString::new(place.as_os_str().as_bytes())?)?;
        Ok(place)
    };
    lowers.iter().enumerate().map(map).collect()
}

impl Mount {
    fn attach(&self, source: Option<OwnedFd>, owners: Owners) -> Result<(), RootError> {
        let destination = Path::new(&self.destination);
        let failed = place("mount", &self.destination);
        let directory = match &source {
            Some(source) => is_directory(source).map_err(&failed)?,
            None => true,
        };
        if directory {
            owners.make_directory(destination).map_err(&failed)?;
        } else {
            owners.make_file(destination).map_err(&failed)?;
        }
        match (&self.source, source) {
            (_, Some(source)) => {
                let path = CString::new(self.destination.as_str()).map_err(|error| failed(error.into()))?;
                sys::attach_mount(source.as_fd(), &path).map_err(failed)
            }
            (Source::Tmpfs { size, mode }, None) => self.mount_tmpfs(*size, *mode, owners),
            (Source::Path(_) | Source::Image { .. } | Source::Memory { .. }, None) => Ok(()),
        }
    }

    fn mount_tmpfs(&self, size: u64, mode: u32, owners: Owners) -> Result<(), RootError> {
        let mode = if mode == 0 { 0o1777 } else { mode & 0o7777 };
        let size = if size > 0 { format!(",size={size}") } else { String::new() };
        let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        flags.set(MsFlags::MS_RDONLY, self.read_only);
        Ok(mounts::mount_kind("tmpfs", &self.destination, flags, &format!("mode={mode:o}{size}{}", owners.options()))?)
    }
}

fn raw(fd: &OwnedFd) -> i32 {
    use std::os::fd::AsRawFd;
    fd.as_raw_fd()
}

fn is_directory(fd: &OwnedFd) -> io::Result<bool> {
    Ok(nix::sys::stat::fstat(fd)?.st_mode & libc::S_IFMT == libc::S_IFDIR)
}

fn clone_mount(path: &Path) -> io::Result<OwnedFd> {
    sys::clone_mount(&CString::new(path.as_os_str().as_bytes())?)
}

/// What is at a path below a root; symbolic links in it and `..` stay below the root whatever they say.
pub(crate) fn find_below(root: &Path, sub_path: &str) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS | ResolveFlag::RESOLVE_NO_XDEV);
    let sub_path = if sub_path.is_empty() { "." } else { sub_path };
    Ok(openat2(File::open(root)?, sub_path, how)?)
}

/// Makes the directories on the way to a path below a root, and the path, unless something is there.
pub(crate) fn make_below(root: &Path, sub_path: &str, mode: u32) -> io::Result<()> {
    let mut parent = find_below(root, "")?;
    let mut reached = PathBuf::new();
    for name in sub_path.split('/').filter(|name| !name.is_empty()) {
        reached.push(name);
        let path = reached.to_string_lossy();
        parent = match find_below(root, &path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                mkdirat(&parent, name, Mode::from_bits_truncate(mode & 0o7777))?;
                find_below(root, &path)?
            }
            found => found?,
        };
    }
    Ok(())
}

/// That as a mount, for reading alone.
fn clone_image(root: &Path, sub_path: &str) -> io::Result<OwnedFd> {
    let taken = sys::clone_open(find_below(root, sub_path)?.as_fd())?;
    sys::mount_for_reading(taken.as_fd())?;
    Ok(taken)
}

/// The old root is stacked on the new one and then taken off, so that it needs no place of its own.
fn pivot() -> Result<(), RootError> {
    let failed = step("enter the container's root");
    chdir(STAGE).map_err(&failed)?;
    pivot_root(".", ".").map_err(&failed)?;
    umount2(".", MntFlags::MNT_DETACH).map_err(&failed)?;
    chdir("/").map_err(&failed)
}

/// Most symbolic links followed on the way to one path, as in the kernel.
const MOST_LINKS: usize = 40;

/// Where `path` leads, symbolic links followed whether or not anything is there: images have links to places that a
/// mount is to make.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    let mut ahead: Vec<_> = path.components().rev().map(|part| part.as_os_str().to_owned()).collect();
    let (mut place, mut links) = (PathBuf::from("/"), 0);
    while let Some(part) = ahead.pop() {
        match Path::new(&part).components().next() {
            Some(Component::RootDir) => place = PathBuf::from("/"),
            Some(Component::ParentDir) => drop(place.pop()),
            Some(Component::Normal(name)) => match fs::read_link(place.join(name)) {
                Ok(_) if links == MOST_LINKS => return Err(io::Error::from_raw_os_error(libc::ELOOP)),
                Ok(target) => {
                    links += 1;
                    ahead.extend(target.components().rev().map(|part| part.as_os_str().to_owned()));
                }
                Err(_) => place.push(name),
            },
            _ => {}
        }
    }
    Ok(place)
}

fn missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR))
}

/// A path that is not there needs no protection.
fn make_read_only(path: &str) -> Result<(), RootError> {
    let failed = place("make read-only", path);
    let copy = match clone_mount(Path::new(path)) {
        Err(error) if missing(&error) => return Ok(()),
        other => other.map_err(&failed)?,
    };
    sys::mount_read_only(copy.as_fd()).map_err(&failed)?;
    let path = CString::new(path).map_err(|error| failed(error.into()))?;
    sys::attach_mount(copy.as_fd(), &path).map_err(failed)
}

/// Hides a directory behind an empty one, anything else behind /dev/null.
fn mask(path: &str) -> Result<(), RootError> {
    let failed = place("mask", path);
    match fs::metadata(path) {
        Err(error) if missing(&error) => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(metadata) if metadata.is_dir() => {
            Ok(mounts::mount_kind("tmpfs", path, HARDENED | MsFlags::MS_RDONLY, "size=0,nr_inodes=1")?)
        }
        Ok(_) => mount(Some("/dev/null"), path, NONE, MsFlags::MS_BIND, NONE).map_err(|error| failed(error.into())),
    }
}

/// Shows a terminal as /dev/console.
pub(crate) fn bind_console(terminal: &OwnedFd, owners: Owners) -> Result<(), RootError> {
    let failed = place("mount", "/dev/console");
    owners.make_file(Path::new("/dev/console")).map_err(&failed)?;
    let source = format!("/proc/self/fd/{}", raw(terminal));
    mount(Some(source.as_str()), "/dev/console", NONE, MsFlags::MS_BIND, NONE).map_err(|error| failed(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_in_an_image_never_leaves_it() {
        let directory = tempfile::tempdir().expect("directory");
        let root = directory.path().join("image");
        fs::create_dir_all(root.join("a/b")).expect("made");
        fs::write(root.join("a/file"), "inside").expect("written");
        fs::write(directory.path().join("outside"), "outside").expect("written");
        for (link, target) in [("up", "../outside"), ("abs", "/a/file"), ("far", "/outside"), ("deep", "a/b")] {
            symlink(target, root.join(link)).expect("link");
        }
        let inode = |path: &Path| nix::sys::stat::stat(path).expect("is there").st_ino;
        let found = |path: &str| find_below(&root, path).map(|fd| nix::sys::stat::fstat(&fd).expect("is open").st_ino);
        assert_eq!(found("").expect("the image"), inode(&root));
        assert_eq!(found("deep").expect("a directory"), inode(&root.join("a/b")));
        assert_eq!(found("abs").expect("a file"), inode(&root.join("a/file")));
        assert_eq!(found("../../a").expect("its root is the root"), inode(&root.join("a")));
        for path in ["up", "far", "none", "a/file/x", "../outside"] {
            assert!(found(path).is_err(), "{path}");
        }
        make_below(&root, "deep/new/newer", 0o750).expect("made through a link that stays");
        assert!(root.join("a/b/new/newer").is_dir());
        assert!(make_below(&root, "a/file", 0o750).is_ok() && make_below(&root, "far/x", 0o750).is_err());
        assert!(!directory.path().join("outside/x").exists());
    }

    #[test]
    fn paths_lead_where_their_links_say_even_if_nothing_is_there() {
        let directory = tempfile::tempdir().expect("directory");
        let root = directory.path();
        symlink("a/b", root.join("relative")).expect("link");
        symlink(root.join("x/../y"), root.join("absolute")).expect("link");
        symlink("loop", root.join("loop")).expect("link");
        for (path, place) in [("relative/c", "a/b/c"), ("absolute/c", "y/c"), ("new/../other", "other")] {
            assert_eq!(resolve(&root.join(path)).expect("resolves"), root.join(place));
        }
        assert!(resolve(&root.join("loop/x")).is_err());
        let owners = Owners::default();
        owners.make_directory(&root.join("relative/c")).expect("made");
        owners.make_directory(&root.join("relative/c")).expect("there already");
        owners.make_file(&root.join("absolute")).expect("made");
        assert!(root.join("a/b/c").is_dir() && root.join("y").is_file());
        assert!(owners.make_directory(&root.join("y/z")).is_err(), "a file is no directory");
    }
}
