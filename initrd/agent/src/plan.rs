//! What is asked for, checked and put in the kernel's terms before anything is done.
//!
//! A plan has no side effects; once there is one, only the kernel can still refuse.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects)]

use std::path::{Component, Path};

use agent_protocol::v1;
use nix::sys::resource::Resource;
use thiserror::Error;

use crate::capabilities::Sets;
use crate::devices::{DeviceError, Devices};
use crate::sys;

/// Longest id of a container in bytes.
const ID_BYTES: usize = 128;

/// Why a request makes no sense.
#[derive(Debug, Error)]
pub(crate) enum PlanError {
    /// Not usable as a name of directories.
    #[error("{0:?} is no container id: use letters, digits, '-', '_' and '.'")]
    Id(String),
    /// A field that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// Must start with `/` and not climb.
    #[error("{0:?} is no absolute path")]
    Path(String),
    /// Names no such thing.
    #[error("{0}")]
    Name(String),
    /// Not whole instructions, or too many.
    #[error("the seccomp filter has {0} bytes, which is no program")]
    Seccomp(usize),
    /// See [`DeviceError`].
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A process to start.
#[derive(Clone, Debug)]
pub(crate) struct ProcessPlan {
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) cwd: String,
    pub(crate) user: v1::User,
    pub(crate) terminal: bool,
    pub(crate) capabilities: Sets,
    pub(crate) no_new_privileges: bool,
    pub(crate) rlimits: Vec<(Resource, u64, u64)>,
    pub(crate) oom_score_adj: i32,
    pub(crate) seccomp: Vec<u8>,
}

/// A container to create, less the resources that are acquired for it.
#[derive(Debug)]
pub(crate) struct ContainerPlan {
    pub(crate) id: String,
    pub(crate) read_only: bool,
    pub(crate) process: ProcessPlan,
    /// Outer ones first.
    pub(crate) mounts: Vec<v1::Mount>,
    pub(crate) masked_paths: Vec<String>,
    pub(crate) readonly_paths: Vec<String>,
    pub(crate) devices: Devices,
    /// Devices yet to be made of the pod disk.
    pub(crate) volumes: Vec<v1::Device>,
    pub(crate) privileged: bool,
}

impl ContainerPlan {
    /// Checks `request`.
    pub(crate) fn new(request: &v1::CreateContainer) -> Result<Self, PlanError> {
        if !is_id(&request.id) {
            return Err(PlanError::Id(request.id.clone()));
        }
        let rootfs = request.rootfs.as_ref().ok_or(PlanError::Missing("the root file system"))?;
        if rootfs.layers.is_empty() && rootfs.shared.is_none() && rootfs.disk.is_none() {
            return Err(PlanError::Missing("the root file system's image"));
        }
        let process = request.process.as_ref().ok_or(PlanError::Missing("the process"))?;
        let mut process = ProcessPlan::new(process)?;
        let mut mounts = request.mounts.clone();
        mounts.iter().try_for_each(|mount| absolute(&mount.destination))?;
        mounts.sort_by_key(|mount| Path::new(&mount.destination).components().count());
        let (mut masked_paths, mut readonly_paths) = (request.masked_paths.clone(), request.readonly_paths.clone());
        if request.privileged {
            process.capabilities = Sets::all();
            masked_paths.clear();
            readonly_paths.clear();
        }
        masked_paths.iter().chain(&readonly_paths).try_for_each(|path| absolute(path))?;
        request.devices.iter().try_for_each(|device| absolute(&device.path))?;
        Ok(Self {
            id: request.id.clone(),
            read_only: rootfs.read_only,
            process,
            mounts,
            masked_paths,
            readonly_paths,
            devices: Devices::plan(&request.devices, request.privileged)?,
            volumes: request.devices.iter().filter(|device| device.disk.is_some()).cloned().collect(),
            privileged: request.privileged,
        })
    }
}

impl ProcessPlan {
    fn new(process: &v1::Process) -> Result<Self, PlanError> {
        if process.args.is_empty() {
            return Err(PlanError::Missing("the command"));
        }
        let capabilities = process.capabilities.as_ref().map_or(Ok(Sets::default()), Sets::parse);
        let cwd = if process.cwd.is_empty() { "/" } else { &process.cwd };
        absolute(cwd)?;
        Ok(Self {
            args: process.args.clone(),
            env: process.env.clone(),
            cwd: cwd.to_owned(),
            user: process.user.clone().unwrap_or_default(),
            terminal: process.terminal,
            capabilities: capabilities.map_err(PlanError::Name)?,
            no_new_privileges: process.no_new_privileges,
            rlimits: process.rlimits.iter().map(rlimit).collect::<Result<_, _>>()?,
            oom_score_adj: process.oom_score_adj.clamp(-1000, 1000),
            seccomp: seccomp(&process.seccomp)?,
        })
    }

    /// An exec in a container whose own process is `self`: what `process` leaves unset is as there.
    pub(crate) fn for_exec(&self, process: &v1::Process) -> Result<Self, PlanError> {
        let mut plan = Self::new(process)?;
        if process.user.is_none() {
            plan.user = self.user.clone();
        }
        if process.capabilities.is_none() {
            plan.capabilities = self.capabilities.clone();
        }
        if plan.seccomp.is_empty() {
            plan.seccomp.clone_from(&self.seccomp);
        }
        if plan.rlimits.is_empty() {
            plan.rlimits.clone_from(&self.rlimits);
        }
        if plan.env.is_empty() {
            plan.env.clone_from(&self.env);
        }
        if process.cwd.is_empty() {
            plan.cwd.clone_from(&self.cwd);
        }
        plan.no_new_privileges |= self.no_new_privileges;
        if process.oom_score_adj == 0 {
            plan.oom_score_adj = self.oom_score_adj;
        }
        Ok(plan)
    }
}

fn is_id(id: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    !id.is_empty() && id.len() <= ID_BYTES && !id.starts_with('.') && id.bytes().all(plain)
}

fn absolute(path: &str) -> Result<(), PlanError> {
    let fits = path.starts_with('/')
        && !path.contains('\0')
        && Path::new(path).components().all(|part| !matches!(part, Component::ParentDir));
    if fits { Ok(()) } else { Err(PlanError::Path(path.to_owned())) }
}

fn seccomp(program: &[u8]) -> Result<Vec<u8>, PlanError> {
    let whole = program.len().is_multiple_of(sys::FILTER_INSTRUCTION_BYTES);
    // BPF_MAXINSNS of the kernel.
    if !whole || program.len() > sys::FILTER_INSTRUCTION_BYTES.saturating_mul(4096) {
        return Err(PlanError::Seccomp(program.len()));
    }
    Ok(program.to_vec())
}

fn rlimit(limit: &v1::Rlimit) -> Result<(Resource, u64, u64), PlanError> {
    let resource = match limit.name.trim_start_matches("RLIMIT_") {
        "AS" => Resource::RLIMIT_AS,
        "CORE" => Resource::RLIMIT_CORE,
        "CPU" => Resource::RLIMIT_CPU,
        "DATA" => Resource::RLIMIT_DATA,
        "FSIZE" => Resource::RLIMIT_FSIZE,
        "LOCKS" => Resource::RLIMIT_LOCKS,
        "MEMLOCK" => Resource::RLIMIT_MEMLOCK,
        "MSGQUEUE" => Resource::RLIMIT_MSGQUEUE,
        "NICE" => Resource::RLIMIT_NICE,
        "NOFILE" => Resource::RLIMIT_NOFILE,
        "NPROC" => Resource::RLIMIT_NPROC,
        "RSS" => Resource::RLIMIT_RSS,
        "RTPRIO" => Resource::RLIMIT_RTPRIO,
        "RTTIME" => Resource::RLIMIT_RTTIME,
        "SIGPENDING" => Resource::RLIMIT_SIGPENDING,
        "STACK" => Resource::RLIMIT_STACK,
        _ => return Err(PlanError::Name(format!("there is no resource limit {:?}", limit.name))),
    };
    Ok((resource, limit.soft, limit.hard))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> v1::CreateContainer {
        v1::CreateContainer {
            id: "c-1".into(),
            rootfs: Some(v1::Rootfs {
                layers: vec![v1::DiskRange::default()],
                read_only: true,
                ..v1::Rootfs::default()
            }),
            process: Some(v1::Process { args: vec!["/bin/true".into()], ..v1::Process::default() }),
            ..v1::CreateContainer::default()
        }
    }

    #[test]
    fn a_plain_request_is_planned() {
        let plan = ContainerPlan::new(&request()).expect("planned");
        assert!(plan.read_only && !plan.privileged && plan.devices.rules.is_some());
        assert_eq!((plan.process.cwd.as_str(), plan.process.capabilities.clone()), ("/", Sets::default()));
    }

    #[test]
    fn ids_that_could_climb_are_refused() {
        for id in ["", ".", "..", "a/b", ".hidden", "a\0", &"x".repeat(200), "ä"] {
            let request = v1::CreateContainer { id: id.into(), ..request() };
            assert!(matches!(ContainerPlan::new(&request), Err(PlanError::Id(_))), "{id:?}");
        }
    }

    #[test]
    fn paths_must_be_absolute_and_not_climb() {
        for path in ["", "relative", "/a/../b", "/nul\0"] {
            let mut request = request();
            request.mounts = vec![v1::Mount { destination: path.into(), ..v1::Mount::default() }];
            assert!(matches!(ContainerPlan::new(&request), Err(PlanError::Path(_))), "{path:?}");
        }
    }

    #[test]
    fn outer_mounts_come_first() {
        let mut request = request();
        let mount = |path: &str| v1::Mount { destination: path.into(), ..v1::Mount::default() };
        request.mounts = ["/a/b/c", "/z", "/a/b", "/a"].map(mount).into();
        let plan = ContainerPlan::new(&request).expect("planned");
        let order: Vec<_> = plan.mounts.iter().map(|mount| mount.destination.as_str()).collect();
        assert_eq!(order, ["/z", "/a", "/a/b", "/a/b/c"]);
    }

    #[test]
    fn privileged_has_everything_and_hides_nothing() {
        let mut request = request();
        request.masked_paths = vec!["/proc/kcore".into()];
        request.privileged = true;
        let plan = ContainerPlan::new(&request).expect("planned");
        assert!(plan.masked_paths.is_empty() && plan.devices.rules.is_none());
        assert_eq!(plan.process.capabilities, Sets::all());
    }

    #[test]
    fn an_exec_inherits_what_it_leaves_unset() {
        let mut own = request().process.expect("process");
        own.user = Some(v1::User { name: "web".into(), ..v1::User::default() });
        own.seccomp = vec![0; 16];
        own.no_new_privileges = true;
        own.cwd = "/srv".into();
        let own = ProcessPlan::new(&own).expect("planned");
        let bare = v1::Process { args: vec!["ls".into()], ..v1::Process::default() };
        let exec = own.for_exec(&bare).expect("planned");
        assert_eq!((exec.user.name.as_str(), exec.seccomp.len(), exec.cwd.as_str()), ("web", 16, "/srv"));
        assert!(exec.no_new_privileges);
        let other = v1::Process { user: Some(v1::User::default()), cwd: "/".into(), ..bare };
        let exec = own.for_exec(&other).expect("planned");
        assert_eq!((exec.user.name.as_str(), exec.cwd.as_str()), ("", "/"));
    }

    #[test]
    fn odd_filters_and_limits_are_refused() {
        assert!(seccomp(&[0; 7]).is_err() && seccomp(&[0; 8 * 4097]).is_err() && seccomp(&[]).is_ok());
        let limit = |name: &str| rlimit(&v1::Rlimit { name: name.into(), soft: 1, hard: 2 });
        assert!(limit("RLIMIT_NOFILE").is_ok() && limit("RLIMIT_FUN").is_err());
    }
}
