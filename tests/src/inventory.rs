//! Everything on a node that a pod could leave behind, taken before and compared after.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

/// What there is, each thing as a line of text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory(BTreeSet<String>);

impl Inventory {
    /// Takes stock; `directories` are those in which the runtime keeps files.
    pub fn take(directories: &[&Path]) -> Self {
        let mut things = BTreeSet::new();
        things.extend(processes());
        things.extend(links());
        things.extend(mounts());
        for directory in directories {
            files(directory, "file", &mut things);
        }
        files(Path::new("/var/lib/cni"), "cni", &mut things);
        cgroups(Path::new("/sys/fs/cgroup"), &mut things);
        Self(things)
    }

    /// What is here and was not there, and the other way round.
    pub fn difference(&self, before: &Self) -> String {
        let gone = before.0.difference(&self.0).map(|thing| format!("gone:  {thing}"));
        let new = self.0.difference(&before.0).map(|thing| format!("added: {thing}"));
        new.chain(gone).collect::<Vec<_>>().join("\n")
    }

    /// Panics with the difference unless everything is as it was.
    pub fn assert_same_as(&self, before: &Self) {
        assert!(self == before, "the node is not as it was:\n{}", self.difference(before));
    }
}

impl fmt::Display for Inventory {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|thing| writeln!(to, "{thing}"))
    }
}

/// Programs that a node of ours runs; kernel threads and the test's own helpers come and go by themselves.
fn processes() -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("proc is mounted").flatten() {
        let Ok(command) = fs::read_to_string(entry.path().join("cmdline")) else { continue };
        let program = command.split('\0').next().unwrap_or_default();
        let name = program.rsplit('/').next().unwrap_or_default();
        if name.starts_with("pericarp-")
            || name.starts_with("containerd-shim-pericarp")
            || program.starts_with("/usr/lib/cni")
        {
            found.push(format!("process {} {}", entry.file_name().to_string_lossy(), command.replace('\0', " ")));
        }
    }
    found
}

fn links() -> Vec<String> {
    let output = Command::new("ip").args(["-o", "link"]).output().expect("iproute2 is installed");
    // The first field is an index that grows; the second the name, with the peer's index after an @.
    let name = |line: &str| line.split(": ").nth(1).map(|name| name.split('@').next().unwrap_or(name).to_owned());
    // The bridge is made by the first pod and stays, as with every runtime.
    let links = String::from_utf8_lossy(&output.stdout).lines().filter_map(name).collect::<Vec<_>>();
    links.into_iter().filter(|name| name != "cni0").map(|name| format!("link {name}")).collect()
}

fn mounts() -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("proc is mounted");
    table.lines().filter_map(|line| line.split(' ').nth(4)).map(|point| format!("mount {point}")).collect()
}

fn files(directory: &Path, kind: &str, things: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        // host-local keeps these two between pods: the address given last, and its lock.
        let kept = path.file_name().is_some_and(|name| {
            let name = name.to_string_lossy();
            name.starts_with("last_reserved_ip") || name == "lock"
        });
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&path, kind, things);
        } else if !kept {
            things.insert(format!("{kind} {}", path.display()));
        }
    }
}

fn cgroups(directory: &Path, things: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            things.insert(format!("cgroup {}", entry.path().display()));
            cgroups(&entry.path(), things);
        }
    }
}
