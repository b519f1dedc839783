//! What the host's kernel knows of a VMM: KVM's counters of its VM, from debugfs, and who its parent is.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// KVM's directory of counters for a VM of that process.
fn directory(vmm: u32) -> Result<PathBuf> {
    let prefix = format!("{vmm}-");
    let all = fs::read_dir("/sys/kernel/debug/kvm").context("reading KVM's counters (is debugfs mounted?)")?;
    let mine = all.flatten().find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    Ok(mine.with_context(|| format!("process {vmm} has no VM"))?.path())
}

/// One counter of a VM, such as `exits`.
pub(crate) fn counter(vmm: u32, name: &str) -> Result<f64> {
    let path = directory(vmm)?.join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(text.trim().parse()?)
}

/// The processes that the first thread of a process has started and that have not been waited for.
pub(crate) fn children(parent: u32) -> Result<Vec<u32>> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    text.split_whitespace().map(|pid| pid.parse().with_context(|| format!("process {pid}"))).collect()
}
