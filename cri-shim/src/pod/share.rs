//! Directories and files of the host that containers share with it, by the pod's file server (`pericarp-fs`).
//!
//! The server is started with the first of them, and a virtio-fs device plugged in for it. Each is a mount of its own in
//! the server's mount namespace, known by a number. Volumes whose files only a kubelet changes, and all at once, need none of this:
//! they are copied into the guest ([`super::files`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use vmm_control::Command;

use super::context::blocking;
use super::files;
use super::owner::Owner;
use crate::cgroup;
use crate::control;
use crate::error::{Error, IoContext, Result};
use crate::kill_point::kill_point;
use crate::pod_dir::PodDir;
use crate::process::{self, ProcessRecord};
use crate::record::{ContainerRecord, FileServerRecord};
use crate::spawner::{Kind, Program};
use crate::spec::{ContainerSpec, MountSource, MountSpec, Rootfs};
use crate::volume::{self, Volume};

/// Files that a kubelet makes for each pod and mounts where containers could write to them. They are copied all the
/// same, as nobody on the host reads them afterwards.
const ALWAYS_COPIED: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];

/// The link by which a kubelet exchanges the files of a volume, which tells those that it does so with (Kubernetes, `AtomicWriter`).
const EXCHANGED: &str = "..data";

/// The descriptor by which a file server knows its socket.
const SERVER_SOCKET: i32 = 3;

/// Where a container's root file system is in it.
pub(super) const ROOT: &str = "/";

/// Whether a mount of the host goes through the file server.
fn is_shared(mount: &MountSpec, source: &Path) -> Result<bool> {
    let found = files::look(source)?;
    let kind = found.file_type();
    if kind.is_socket() || kind.is_fifo() || kind.is_block_device() || kind.is_char_device() {
        return Err(volume::refusal(source));
    }
    let is_copied = if found.is_dir() {
        let plain = mount.read_only && !mount.host_to_container && source.join(EXCHANGED).is_symlink();
        plain && files::is_small(source)? && !volume::has_mounts_below(source)?
    } else {
        ALWAYS_COPIED.contains(&mount.destination.as_str()) && files::is_small(source)?
    };
    Ok(!is_copied)
}

/// The mounts of a container that are shared.
fn shared_mounts(spec: &ContainerSpec) -> Result<Vec<MountSpec>> {
    let mut shared = Vec::from_iter(root_mount(spec));
    for mount in &spec.mounts {
        if let MountSource::Host(source) = &mount.source
            && is_shared(mount, source).map_err(|error| error.context(format_args!("mount {}", mount.destination)))?
        {
            shared.push(mount.clone());
        }
    }
    Ok(shared)
}

/// A root file system that is a directory of the host, as the mount that it is.
fn root_mount(spec: &ContainerSpec) -> Option<MountSpec> {
    let Rootfs::Directory { path: directory, .. } = &spec.rootfs else { return None };
    Some(MountSpec {
        destination: ROOT.into(),
        source: MountSource::Host(directory.clone()),
        image_sub_path: String::new(),
        // The guest makes the places of other mounts in it first.
        read_only: false,
        recursive_read_only: false,
        mapped: true,
        host_to_container: false,
    })
}

impl Owner {
    /// Gives each shared mount of a container to be its number; nothing is made yet.
    pub(super) async fn plan_shares(&mut self, spec: &ContainerSpec) -> Result<BTreeMap<String, u32>> {
        let spec = spec.clone();
        let mounts = blocking(move || shared_mounts(&spec)).await?;
        let mut shares = BTreeMap::new();
        for mount in mounts {
            shares.insert(mount.destination, self.record.next_share);
            self.record.next_share = self.record.next_share.saturating_add(1);
        }
        Ok(shares)
    }

    /// Makes a container's shared mounts, which its record names.
    pub(super) async fn make_shares(&mut self, container: &ContainerRecord) -> Result<()> {
        if container.shares.is_empty() {
            return Ok(());
        }
        self.need_file_server().await?;
        let root = root_mount(&container.spec);
        for mount in root.iter().chain(&container.spec.mounts) {
            let (MountSource::Host(source), Some(share)) = (&mount.source, container.shares.get(&mount.destination))
            else {
                continue;
            };
            let (source, asked) = (source.clone(), mount.clone());
            let cloned = blocking(move || volume::clone(&source, &asked)).await;
            let Volume { mount: tree, directory } =
                cloned.map_err(|error| error.context(format_args!("mount {}", mount.destination)))?;
            let server = self.file_server()?.ok_or_else(ended)?;
            self.context.spawner.attach(server, *share, tree, directory).await?;
        }
        Ok(())
    }

    /// Undoes [`Owner::make_shares`], however far it came.
    pub(super) async fn unmake_shares(&self, id: &str) -> Result<()> {
        let Some(container) = self.record.containers.get(id) else { return Ok(()) };
        for share in container.shares.values() {
            // Its mounts have ended with a server that has ended.
            let Some(server) = self.file_server()? else { return Ok(()) };
            self.context.spawner.detach(server, *share).await?;
        }
        if let Some(server) = self.file_server()?.filter(|_| !container.shares.is_empty()) {
            // It lets go of what the guest has not forgotten, so that the host can take the file system away.
            process::signal(&server, libc::SIGUSR1).doing(|| "telling the pod's file server")?;
        }
        Ok(())
    }

    /// The file server that runs, if one does.
    fn file_server(&self) -> Result<Option<OwnedFd>> {
        let Some(server) = &self.record.file_server else { return Ok(None) };
        process::find(server.process).doing(|| "finding the pod's file server")
    }

    /// Starts the file server if none runs. One that has ended leaves the containers that used it with I/O errors; the
    /// next is another device.
    async fn need_file_server(&mut self) -> Result<()> {
        if self.file_server()?.is_some() {
            return Ok(());
        }
        let tag = format!("shared{}", self.record.next_share);
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .doing(|| "a socket for the file server")?;
        let program = program(self, theirs)?;
        // It lives in the pod's cgroup, and ends by itself once the socket's other end is closed.
        let child = self.context.spawner.spawn(program).await.map_err(|error| error.context("pericarp-fs"))?;
        kill_point("container.file_server");
        let start_time = process::start_time(child.pid).unwrap_or(0);
        let process = ProcessRecord { pid: child.pid, start_time };
        self.record.file_server = Some(FileServerRecord { process, tag: tag.clone() });
        self.save()?;
        let plugged = control::run(&self.dir, &Command::AddFs { tag }, &[ours.as_raw_fd()]).await;
        if plugged.is_err() {
            self.record.file_server = None;
        }
        plugged
    }
}

fn ended() -> Error {
    Error::Unavailable("the pod's file server has ended: create the container again".into())
}

fn program(owner: &Owner, socket: OwnedFd) -> Result<Program> {
    let config = &owner.context.config;
    let binary = config.file_server();
    let binary = File::open(&binary).doing(|| format!("opening {}", binary.display()))?;
    let null = || File::options().read(true).write(true).open("/dev/null").doing(|| "opening /dev/null");
    let fds = vec![
        (libc::STDIN_FILENO, null()?.into()),
        (libc::STDOUT_FILENO, null()?.into()),
        (libc::STDERR_FILENO, log(&owner.dir)?.into()),
        (SERVER_SOCKET, socket),
    ];
    let cgroup = cgroup::open(&config.cgroup_root, &owner.record.cgroup)?;
    Ok(Program { kind: Kind::FileServer, binary: binary.into(), cgroup, fds })
}

fn log(dir: &PodDir) -> Result<File> {
    let path = dir.file_server_log();
    let file = File::options().create(true).append(true).mode(0o600).open(&path);
    file.doing(|| format!("creating {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn mount(destination: &str, source: &Path) -> MountSpec {
        MountSpec {
            image_sub_path: String::new(),
            destination: destination.into(),
            source: MountSource::Host(source.into()),
            read_only: true,
            recursive_read_only: false,
            host_to_container: false,
            mapped: false,
        }
    }

    #[test]
    fn what_a_kubelet_exchanges_is_copied_if_it_is_small_and_read_only() {
        let dir = tempfile::tempdir().expect("a directory");
        let shared = |mount: &MountSpec| is_shared(mount, dir.path()).expect("looks");
        let plain = mount("/data", dir.path());
        assert!(shared(&plain), "anybody may write there meanwhile");
        fs::create_dir(dir.path().join("..1")).expect("makes");
        std::os::unix::fs::symlink("..1", dir.path().join(EXCHANGED)).expect("links");
        assert!(!shared(&plain));
        assert!(shared(&MountSpec { read_only: false, ..plain.clone() }));
        assert!(shared(&MountSpec { host_to_container: true, ..plain.clone() }));
        fs::write(dir.path().join("..1/large"), vec![0; 2 << 20]).expect("writes");
        assert!(shared(&plain));
    }

    #[test]
    fn a_file_is_shared_but_those_of_every_pod() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let writable = |place: &str| MountSpec { read_only: false, ..mount(place, file.path()) };
        assert!(is_shared(&writable("/dev/termination-log"), file.path()).expect("looks"));
        assert!(!is_shared(&writable("/etc/hosts"), file.path()).expect("looks"));
        assert!(is_shared(&mount("/config", file.path()), file.path()).expect("looks"));
    }

    #[test]
    fn what_no_guest_can_use_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("socket");
        let _listener = UnixListener::bind(&socket).expect("binds");
        for source in [socket.as_path(), Path::new("/dev/null")] {
            let refused = is_shared(&mount("/run/x.sock", source), source);
            assert!(matches!(refused, Err(Error::InvalidArgument(_))), "{refused:?}");
        }
        let missing = dir.path().join("none");
        assert!(matches!(is_shared(&mount("/x", &missing), &missing), Err(Error::NotFound(_))));
    }
}
