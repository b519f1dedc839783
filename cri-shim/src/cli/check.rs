//! `pericarp check`: what this host lacks, and how to get it.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::output::{self, Format};
use crate::config::Config;

/// Says what this host lacks to run pods, and how to fix it; fails if anything is missing.
#[derive(Args, Debug)]
pub(super) struct Check {
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// One requirement.
#[derive(Debug, Serialize)]
struct Finding {
    /// What is looked at.
    what: &'static str,
    ok: bool,
    /// What is there.
    found: String,
    /// What to do; empty if nothing.
    fix: String,
}

impl Finding {
    fn new(what: &'static str, result: Result<String, String>, fix: impl Into<String>) -> Self {
        match result {
            Ok(found) => Self { what, ok: true, found, fix: String::new() },
            Err(found) => Self { what, ok: false, found, fix: fix.into() },
        }
    }
}

impl Check {
    pub(super) fn run(&self, config: &Config) -> Result<i32> {
        let findings = look(config);
        let lacking = findings.iter().any(|finding| !finding.ok);
        match self.output {
            Format::Json => output::json(&findings)?,
            Format::Table => print(&findings)?,
        }
        Ok(lacking.into())
    }
}

fn print(findings: &[Finding]) -> Result<()> {
    let row = |finding: &Finding| {
        let verdict = if finding.ok { "ok" } else { "LACKING" };
        vec![finding.what.to_owned(), verdict.to_owned(), finding.found.clone(), finding.fix.clone()]
    };
    output::table(&["CHECK", "RESULT", "FOUND", "FIX"], &findings.iter().map(row).collect::<Vec<_>>())
}

fn look(config: &Config) -> Vec<Finding> {
    let core = &config.core;
    let install = "make install, or name another path in the configuration";
    let mut findings = vec![
        Finding::new("root", root(), "run as root"),
        Finding::new(
            "KVM",
            device("/dev/kvm"),
            "enable virtualisation in the firmware and `modprobe kvm_amd` or `kvm_intel`",
        ),
        Finding::new("tun", device("/dev/net/tun"), "modprobe tun"),
        Finding::new("cgroup v2", cgroup2(&core.cgroup_root), "boot with systemd.unified_cgroup_hierarchy=1"),
        Finding::new("VMM", readable(&core.vmm), install),
        Finding::new("guest kernel", readable(&core.kernel), install),
        Finding::new("initrd", readable(&core.initrd), install),
        Finding::new("mkfs.ext4", program("mkfs.ext4"), "apt-get install e2fsprogs"),
        Finding::new(
            "CNI configuration",
            conflist(&config.cni.conf_dir),
            "install a CNI, or copy deploy/10-pericarp.conflist there",
        ),
    ];
    for module in ["sch_ingress", "cls_u32", "act_mirred"] {
        findings.push(Finding::new(module, kernel_module(module), format!("modprobe {module}")));
    }
    let plugins = config.cni.bin_dirs.iter().find(|directory| directory.join("bridge").exists());
    let plugins = plugins.map(|directory| directory.display().to_string()).ok_or_else(|| "no bridge plugin".to_owned());
    findings.push(Finding::new("CNI plugins", plugins, "apt-get install containernetworking-plugins"));
    findings
}

fn root() -> Result<String, String> {
    let uid = nix::unistd::geteuid();
    if uid.is_root() { Ok("uid 0".into()) } else { Err(format!("uid {uid}")) }
}

fn device(path: &str) -> Result<String, String> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map(|_| path.to_owned()).map_err(|error| format!("{path}: {error}"))
}

fn readable(path: &Path) -> Result<String, String> {
    let shown = path.display();
    fs::File::open(path).map(|_| shown.to_string()).map_err(|error| format!("{shown}: {error}"))
}

fn cgroup2(root: &Path) -> Result<String, String> {
    let path = root.join("cgroup.controllers");
    let listed = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let missing = |name: &&str| !listed.split_whitespace().any(|listed| listed == *name);
    let missing: Vec<_> = ["cpu", "memory", "pids"].into_iter().filter(missing).collect();
    if missing.is_empty() { Ok(listed.trim().to_owned()) } else { Err(format!("no controller {}", missing.join(", "))) }
}

fn program(name: &str) -> Result<String, String> {
    let found = Command::new(name).arg("-V").output();
    found.map(|_| name.to_owned()).map_err(|error| format!("{name}: {error}"))
}

fn conflist(directory: &Path) -> Result<String, String> {
    let entries = fs::read_dir(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let mut names: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "conflist" || ending == "conf"))
        .collect();
    names.sort();
    names
        .first()
        .map(|path| path.display().to_string())
        .ok_or_else(|| format!("{} holds no .conflist", directory.display()))
}

/// Whether a module is there or can be loaded; built-in ones have no entry under /sys/module, so modprobe decides.
fn kernel_module(name: &str) -> Result<String, String> {
    if Path::new("/sys/module").join(name).exists() {
        return Ok("loaded".into());
    }
    let tried = Command::new("modprobe").arg(name).output().map_err(|error| format!("modprobe: {error}"))?;
    if tried.status.success() {
        Ok("loaded".into())
    } else {
        Err(String::from_utf8_lossy(&tried.stderr).trim().to_owned())
    }
}
