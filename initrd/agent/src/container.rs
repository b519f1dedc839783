//! A container: what is held for it, what is known about it, and whom its next step is to be told.
//!
//! Its process is a [`crate::task`]; the life of both is driven by [`crate::agent`].

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use agent_protocol::v1::{self, DiskRange, mount};

use crate::cgroup::Cgroup;
use crate::disk::Disk;
use crate::fault::Fault;
use crate::files;
use crate::log::Log;
use crate::mounts::{self, FILES, MEMORY_ROOTS, SCRATCH};
use crate::plan::{ContainerPlan, PlanError, ProcessPlan};
use crate::poll::Watched;
use crate::rootfs::{self, Base, Owners, Root, Source};
use crate::userns::UserSpace;

/// Who waits for an answer: a control connection and its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asker {
    pub(crate) connection: u32,
    pub(crate) request: u64,
}

/// Something to give back when the container goes.
#[derive(Debug)]
enum Held {
    /// An image or a volume of the pod disk.
    Disk(DiskRange),
    Directory(PathBuf),
    /// The files of a mount, by where that is; they go with their directory.
    Files(String, PathBuf),
}

/// What a container holds beside its processes, in the order in which it was acquired.
#[derive(Debug, Default)]
pub(crate) struct Holdings(Vec<Held>);

impl Holdings {
    /// Gives everything back, last first.
    pub(crate) fn release(&mut self, disk: &mut Disk) {
        while let Some(held) = self.0.pop() {
            match held {
                Held::Disk(range) => disk.release(&range),
                Held::Files(..) => {}
                Held::Directory(path) => {
                    if let Err(error) = fs::remove_dir_all(&path) {
                        crate::kmsg::say(&format!("cannot remove {}: {error}", path.display()));
                    }
                }
            }
        }
    }

    /// Acquires what a container's file systems are made of.
    pub(crate) fn acquire(
        &mut self,
        plan: &mut ContainerPlan,
        rootfs: &v1::Rootfs,
        disk: &mut Disk,
        users: Option<&UserSpace>,
    ) -> Result<Root, Fault> {
        let owners = users.map_or(Owners::default(), Owners::of);
        let base = self.base(&plan.id, rootfs, disk, users)?;
        let mut image = |range: &DiskRange, held: &mut Vec<Held>| {
            disk.acquire_image(range).inspect(|_| held.push(Held::Disk(range.clone())))
        };
        let mut list = Vec::new();
        for (number, asked) in plan.mounts.iter().enumerate() {
            let source = match &asked.source {
                Some(mount::Source::Tmpfs(tmpfs)) => Source::Tmpfs { size: tmpfs.size_bytes, mode: tmpfs.mode },
                Some(mount::Source::Image(range)) => {
                    let (root, sub_path) = (image(range, &mut self.0)?, asked.image_sub_path.clone());
                    rootfs::find_below(&root, &sub_path).map_err(|error| {
                        let text = format!("mount at {}: {sub_path:?} of the image: {error}", asked.destination);
                        Fault::new(v1::error::Kind::NotFound, text)
                    })?;
                    Source::Image { root, sub_path }
                }
                Some(mount::Source::Memory(volume)) => {
                    let root = mounts::memory(volume)?;
                    rootfs::make_below(&root, &volume.sub_path, volume.mode)?;
                    Source::Memory { root, sub_path: volume.sub_path.clone() }
                }
                Some(mount::Source::Files(tree)) => {
                    let home = self.directory(FILES, &plan.id)?;
                    let place = home.join(number.to_string());
                    files::lay_out(tree, &place)?;
                    self.0.push(Held::Files(asked.destination.clone(), place.clone()));
                    Source::Path(place)
                }
                Some(mount::Source::Shared(shared)) => Source::Path(shared_path(shared)?),
                None => {
                    let text = format!("the mount at {} has no source", asked.destination);
                    return Err(Fault::new(v1::error::Kind::Invalid, text));
                }
            };
            let v1::Mount { destination, read_only, mapped, .. } = asked.clone();
            list.push(rootfs::Mount { destination, source, read_only, mapped });
        }
        for device in std::mem::take(&mut plan.volumes) {
            let Some(range) = &device.disk else { continue };
            let path = disk.acquire_volume(range)?;
            self.0.push(Held::Disk(range.clone()));
            plan.devices.give(&device, &path).map_err(PlanError::from)?;
        }
        Ok(Root {
            base,
            read_only: plan.read_only,
            mounts: list,
            nodes: std::mem::take(&mut plan.devices.nodes),
            masked_paths: std::mem::take(&mut plan.masked_paths),
            readonly_paths: std::mem::take(&mut plan.readonly_paths),
            cwd: plan.process.cwd.clone(),
            privileged: plan.privileged,
            owners,
        })
    }

    /// Acquires what is below all mounts.
    fn base(
        &mut self,
        id: &str,
        rootfs: &v1::Rootfs,
        disk: &mut Disk,
        users: Option<&UserSpace>,
    ) -> Result<Base, Fault> {
        if let Some(shared) = &rootfs.shared {
            return Ok(Base::Directory { path: shared_path(shared)?, mapped: rootfs.mapped });
        }
        if let Some(range) = &rootfs.disk {
            let path = disk.acquire_root(range)?;
            self.0.push(Held::Disk(range.clone()));
            return Ok(Base::Directory { path, mapped: false });
        }
        let mut lowers = Vec::new();
        for range in &rootfs.layers {
            lowers.push(disk.acquire_image(range)?);
            self.0.push(Held::Disk(range.clone()));
        }
        let writable = self.directory(if disk.has_scratch() { SCRATCH } else { MEMORY_ROOTS }, id)?;
        for name in ["upper", "work"] {
            fs::create_dir(writable.join(name))?;
        }
        if let Some(top) = lowers.first() {
            copy_attributes(top, &writable.join("upper"), users)?;
        }
        Ok(Base::Overlay { lowers, writable })
    }

    /// Where what the container writes to its root is.
    pub(crate) fn layer(&self) -> Option<PathBuf> {
        self.0.iter().find_map(|held| match held {
            Held::Directory(path) if !path.starts_with(FILES) => Some(path.join("upper")),
            _ => None,
        })
    }

    /// Where the files mounted at `destination` are.
    pub(crate) fn files(&self, destination: &str) -> Option<&Path> {
        self.0.iter().find_map(|held| match held {
            Held::Files(mounted, path) if mounted == destination => Some(path.as_path()),
            _ => None,
        })
    }

    /// The container's own directory below `home`.
    fn directory(&mut self, home: &str, id: &str) -> Result<PathBuf, Fault> {
        let path = mounts::below(home, id);
        match fs::create_dir(&path) {
            Ok(()) => self.0.push(Held::Directory(path.clone())),
            Err(_) if self.holds(&path) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(path)
    }

    fn holds(&self, wanted: &Path) -> bool {
        self.0.iter().any(|held| matches!(held, Held::Directory(path) if path == wanted))
    }
}

/// Where a directory of the host is.
fn shared_path(shared: &v1::Shared) -> Result<PathBuf, Fault> {
    Ok(mounts::below(&mounts::shared(&shared.tag)?.to_string_lossy(), &shared.path))
}

/// An overlay's root looks like its upper directory; it is to look like the image's.
fn copy_attributes(from: &Path, to: &Path, users: Option<&UserSpace>) -> std::io::Result<()> {
    let metadata = fs::metadata(from)?;
    let owner = (metadata.uid(), metadata.gid());
    let (uid, gid) = users.map_or(owner, |users| users.outside(owner.0, owner.1));
    std::os::unix::fs::chown(to, Some(uid), Some(gid))?;
    fs::set_permissions(to, metadata.permissions())
}

/// A container from its creation to its removal.
#[derive(Debug)]
pub(crate) struct Container {
    /// Its first process; it is gone once [`Self::exited`] is set.
    pub(crate) task: u32,
    /// What an exec inherits.
    pub(crate) process: ProcessPlan,
    pub(crate) cgroup: Cgroup,
    /// Wakes the agent when the last process has left.
    pub(crate) emptied: Watched<std::os::fd::OwnedFd>,
    pub(crate) holdings: Holdings,
    pub(crate) log: Log,
    pub(crate) stdin_once: bool,
    /// Sessions that see its output.
    pub(crate) attached: Vec<u32>,
    pub(crate) creating: Option<Asker>,
    pub(crate) starting: Option<Asker>,
    pub(crate) removing: Option<Asker>,
    pub(crate) reopening: Vec<Asker>,
    /// Why it is being removed although nobody asked: it could not be set up.
    pub(crate) refusal: Option<Fault>,
    /// 0 until then.
    pub(crate) started_at_ns: i64,
    pub(crate) exited: Option<v1::ContainerExited>,
}

impl Container {
    /// As [`v1::GetState`] tells it.
    pub(crate) fn state(&self, id: &str, pid: Option<nix::unistd::Pid>) -> v1::ContainerState {
        let phase = match (&self.exited, self.started_at_ns) {
            (Some(_), _) => v1::container_state::Phase::Exited,
            (None, 0) => v1::container_state::Phase::Created,
            (None, _) => v1::container_state::Phase::Running,
        };
        v1::ContainerState {
            id: id.to_owned(),
            phase: phase.into(),
            started_at_ns: self.started_at_ns,
            exited: self.exited.clone(),
            pid: pid.map_or(0, |pid| u32::try_from(pid.as_raw()).unwrap_or(0)),
        }
    }
}
