//! cgroup v2: the agent's own corner, the pod's, and one leaf for each container with its limits.
//!
//! ```text
//! /sys/fs/cgroup/agent        this process, its memory protected
//!                /pod         everything else
//!                    /<id>    a container: limits and processes in one place, so that what it reads is its limit
//!                         /N  an exec's processes, so that they can be killed together
//! ```

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use agent_protocol::v1;
use thiserror::Error;

/// Where the hierarchy is mounted.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";

/// Memory that containers cannot take from the agent, in bytes.
const AGENT_MEMORY: u64 = 16 << 20;

/// Controllers that containers are limited by; those that a kernel lacks are left out.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// Share of the kernel's process numbers that containers may use; the rest lets the agent still start an exec.
const PIDS_PERCENT: u64 = 90;

/// The file of a limit that not every kernel has.
const SWAP_LIMIT: &str = "memory.swap.max";

/// How the cgroups of execs are named.
const EXEC_PREFIX: &str = "exec-";

/// Longest `cgroup.events`.
const EVENTS_BYTES: usize = 256;

/// What the host is told of a cgroup.
const FIGURES: [&str; 15] = [
    "cgroup.procs",
    "cpu.pressure",
    "cpu.stat",
    "io.pressure",
    "io.stat",
    "memory.current",
    "memory.events",
    "memory.max",
    "memory.peak",
    "memory.pressure",
    "memory.stat",
    "memory.swap.current",
    "memory.swap.max",
    "pids.current",
    "pids.max",
];

/// Longest of them that the host is told, in bytes: the list of ten thousand processes.
const FIGURE_BYTES: usize = 64 << 10;

/// Why a cgroup could not be made or set.
#[derive(Debug, Error)]
pub(crate) enum CgroupError {
    /// Making or removing one.
    #[error("cannot set up the cgroup {}", .0.display())]
    Set(PathBuf, #[source] io::Error),
    /// The kernel refused a limit.
    #[error("the kernel refuses {value:?} for {file}: {source}")]
    Limit {
        /// File of the cgroup.
        file: String,
        /// What was written.
        value: String,
        /// Its answer.
        source: io::Error,
    },
    /// A name in `unified` that is a path.
    #[error("{0:?} is not the name of a cgroup file")]
    Name(String),
    /// The kernel would kill to make it so.
    #[error("the pod's containers use {used} bytes of memory, more than the new limit of {limit}")]
    InUse {
        /// Bytes.
        used: u64,
        /// Bytes.
        limit: u64,
    },
}

/// Puts the agent apart and makes room for containers.
pub(crate) fn prepare() -> Result<(), CgroupError> {
    let root = Path::new(ROOT);
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| CgroupError::Set(path, error)
    };
    let (agent, pod) = (root.join("agent"), root.join("pod"));
    for directory in [&agent, &pod] {
        fs::create_dir_all(directory).map_err(failed(directory))?;
    }
    fs::write(agent.join("cgroup.procs"), "0").map_err(failed(&agent))?;
    let offered = fs::read_to_string(root.join("cgroup.controllers")).map_err(failed(root))?;
    let wanted: Vec<String> =
        offered.split_whitespace().filter(|name| CONTROLLERS.contains(name)).map(|name| format!("+{name}")).collect();
    for directory in [root, &pod] {
        fs::write(directory.join("cgroup.subtree_control"), wanted.join(" ")).map_err(failed(directory))?;
    }
    if wanted.iter().any(|name| name == "+memory") {
        fs::write(agent.join("memory.min"), AGENT_MEMORY.to_string()).map_err(failed(&agent))?;
    }
    if wanted.iter().any(|name| name == "+pids") {
        let most = fs::read_to_string("/proc/sys/kernel/pid_max").map_err(failed(&pod))?;
        let most = most.trim().parse::<u64>().unwrap_or(32768).saturating_mul(PIDS_PERCENT) / 100;
        fs::write(pod.join("pids.max"), most.to_string()).map_err(failed(&pod))?;
    }
    Ok(())
}

/// Kills everything that is not the agent.
pub(crate) fn kill_pod() -> io::Result<()> {
    fs::write(Path::new(ROOT).join("pod/cgroup.kill"), "1")
}

/// What the kernel counts of all containers together.
pub(crate) fn pod_figures() -> v1::CgroupFiles {
    figures(&Path::new(ROOT).join("pod"))
}

fn figures(path: &Path) -> v1::CgroupFiles {
    let read = |name: &&str| Some(((*name).to_owned(), fs::read_to_string(path.join(name)).ok()?));
    let told = |(_, text): &(String, String)| text.len() <= FIGURE_BYTES;
    v1::CgroupFiles { files: FIGURES.iter().filter_map(read).filter(told).collect() }
}

/// Sets what `resources` names for all containers together and leaves the rest.
pub(crate) fn limit_pod(resources: &v1::Resources) -> Result<(), CgroupError> {
    let path = Path::new(ROOT).join("pod");
    let used = fs::read_to_string(path.join("memory.current")).ok().and_then(|text| text.trim().parse::<u64>().ok());
    if let Some(used) = used.filter(|&used| resources.memory_limit > 0 && used > resources.memory_limit) {
        return Err(CgroupError::InUse { used, limit: resources.memory_limit });
    }
    limit(&path, resources)
}

fn limit(path: &Path, resources: &v1::Resources) -> Result<(), CgroupError> {
    for (file, value) in settings(resources)? {
        let path = path.join(&file);
        // A kernel without swap keeps every limit on it.
        if file == SWAP_LIMIT && !path.exists() {
            continue;
        }
        fs::write(path, &value).map_err(|source| CgroupError::Limit { file, value, source })?;
    }
    Ok(())
}

/// A container's cgroup, or an exec's below it.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    directory: File,
    events: File,
}

impl Cgroup {
    /// A new one for a container.
    pub(crate) fn for_container(id: &str) -> Result<Self, CgroupError> {
        Self::make(Path::new(ROOT).join("pod").join(id))
    }

    /// A new one for an exec in this container.
    pub(crate) fn for_exec(&self, number: u32) -> Result<Self, CgroupError> {
        Self::make(self.path.join(format!("{EXEC_PREFIX}{number}")))
    }

    fn make(path: PathBuf) -> Result<Self, CgroupError> {
        let made =
            fs::create_dir(&path).and_then(|()| Ok((File::open(&path)?, File::open(path.join("cgroup.events"))?)));
        match made {
            Ok((directory, events)) => Ok(Self { path, directory, events }),
            Err(error) => Err(CgroupError::Set(path, error)),
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Sets what `resources` names and leaves the rest.
    pub(crate) fn limit(&self, resources: &v1::Resources) -> Result<(), CgroupError> {
        limit(&self.path, resources)
    }

    /// Sends `SIGKILL` to all in it and below.
    pub(crate) fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }

    /// Sends `signal` to all in it and below.
    pub(crate) fn signal(&self, signal: i32) {
        if signal == libc::SIGKILL {
            // It fails only if the cgroup is gone, and then so are they.
            drop(self.kill());
        } else {
            signal_tree(&self.path, signal);
        }
    }

    /// What the kernel counts of it.
    pub(crate) fn figures(&self) -> v1::CgroupFiles {
        figures(&self.path)
    }

    /// Whether the kernel killed something in it for want of memory.
    pub(crate) fn oom_killed(&self) -> bool {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        field(&events, "oom_kill").is_some_and(|count| count > 0)
    }

    /// Whether anything runs in it or below.
    pub(crate) fn is_populated(&self) -> bool {
        let mut text = [0; EVENTS_BYTES];
        let count = self.events.read_at(&mut text, 0).unwrap_or_default();
        let text = String::from_utf8_lossy(text.get(..count).unwrap_or_default());
        field(&text, "populated").is_some_and(|count| count > 0)
    }

    /// A descriptor that polls as exceptional when [`Self::is_populated`] has changed since it was last asked.
    pub(crate) fn events(&self) -> io::Result<OwnedFd> {
        Ok(self.events.try_clone()?.into())
    }

    /// Removes what execs have left empty. What they left running in the background stays.
    pub(crate) fn sweep_execs(&self) {
        let execs = below(&self.path).filter(|path| {
            path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(EXEC_PREFIX.as_bytes()))
        });
        for path in execs {
            drop(fs::remove_dir(path));
        }
    }

    /// Removes it and what a container has made below. It must be empty of processes.
    pub(crate) fn remove(&self) -> Result<(), CgroupError> {
        remove_tree(&self.path).map_err(|error| CgroupError::Set(self.path.clone(), error))
    }
}

/// A number of a file of `name number` lines.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

fn below(path: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

fn signal_tree(path: &Path, signal: i32) {
    let processes = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    for pid in processes.lines().filter_map(|line| line.parse().ok()).filter(|&pid: &i32| pid > 0) {
        // One that has just ended needs no signal.
        drop(crate::sys::kill(pid, signal));
    }
    below(path).for_each(|child| signal_tree(&child, signal));
}

fn remove_tree(path: &Path) -> io::Result<()> {
    below(path).try_for_each(|child| remove_tree(&child))?;
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// File names and values, in an order in which the kernel accepts them.
fn settings(resources: &v1::Resources) -> Result<Vec<(String, String)>, CgroupError> {
    let mut list = Vec::new();
    let mut set = |file: &str, value: String| list.push((file.to_owned(), value));
    if !resources.cpuset_cpus.is_empty() {
        set("cpuset.cpus", resources.cpuset_cpus.clone());
    }
    if !resources.cpuset_mems.is_empty() {
        set("cpuset.mems", resources.cpuset_mems.clone());
    }
    if resources.cpu_shares > 0 {
        set("cpu.weight", weight(resources.cpu_shares).to_string());
    }
    if resources.cpu_quota != 0 || resources.cpu_period > 0 {
        let quota = if resources.cpu_quota > 0 { resources.cpu_quota.to_string() } else { "max".to_owned() };
        let period = if resources.cpu_period > 0 { resources.cpu_period } else { DEFAULT_PERIOD };
        set("cpu.max", format!("{quota} {period}"));
    }
    if resources.memory_limit > 0 {
        set("memory.max", resources.memory_limit.to_string());
    }
    if resources.memory_swap_limit > 0 {
        // The OCI's limit counts memory and swap together, cgroup v2's only swap.
        set(SWAP_LIMIT, resources.memory_swap_limit.saturating_sub(resources.memory_limit).to_string());
    }
    if resources.pids_limit > 0 {
        set("pids.max", resources.pids_limit.to_string());
    }
    let mut unified: Vec<_> = resources.unified.iter().collect();
    unified.sort();
    for (file, value) in unified {
        if file.is_empty() || file.contains('/') || file.starts_with('.') {
            return Err(CgroupError::Name(file.clone()));
        }
        set(file, value.clone());
    }
    Ok(list)
}

/// µs; the kernel's own default.
const DEFAULT_PERIOD: u64 = 100_000;

/// cgroup v1 shares (2 to 262144) on the scale of v2 weights (1 to 10000), as the OCI runtime specification maps them.
fn weight(shares: u64) -> u64 {
    1 + shares.clamp(2, 262_144).saturating_sub(2) * 9999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(resources: &v1::Resources) -> Vec<String> {
        let list = settings(resources).expect("valid");
        list.into_iter().map(|(file, value)| format!("{file}={value}")).collect()
    }

    #[test]
    fn what_is_not_named_is_not_set() {
        assert!(listed(&v1::Resources::default()).is_empty());
    }

    #[test]
    fn limits_are_translated() {
        let resources = v1::Resources {
            memory_limit: 64 << 20,
            memory_swap_limit: 96 << 20,
            cpu_shares: 1024,
            cpu_quota: 50_000,
            cpuset_cpus: "0-1".into(),
            pids_limit: 7,
            unified: [("memory.high".to_owned(), "1".to_owned())].into(),
            ..v1::Resources::default()
        };
        let expected = [
            "cpuset.cpus=0-1",
            "cpu.weight=39",
            "cpu.max=50000 100000",
            "memory.max=67108864",
            "memory.swap.max=33554432",
            "pids.max=7",
            "memory.high=1",
        ];
        assert_eq!(listed(&resources), expected);
        let unlimited = v1::Resources { cpu_quota: -1, ..v1::Resources::default() };
        assert_eq!(listed(&unlimited), ["cpu.max=max 100000"]);
    }

    #[test]
    fn weights_span_their_scale() {
        assert_eq!([0, 2, 262_144, u64::MAX].map(weight), [1, 1, 10_000, 10_000]);
    }

    #[test]
    fn a_path_is_not_a_file_name() {
        for name in ["../agent/memory.min", "", ".", "a/b"] {
            let unified = [(name.to_owned(), "1".to_owned())].into();
            assert!(settings(&v1::Resources { unified, ..v1::Resources::default() }).is_err(), "{name}");
        }
    }

    #[test]
    fn fields_match_whole_names() {
        assert_eq!(field("oom 1\noom_kill 2\noom_group_kill 3\n", "oom_kill"), Some(2));
        assert_eq!(field("oom_kill_x 2\n", "oom_kill"), None);
    }
}
