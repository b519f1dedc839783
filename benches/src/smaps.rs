//! Memory of a process as the kernel accounts for it: proportional set sizes, from `/proc/PID/smaps`.

use std::fs;

use anyhow::{Context, Result};

/// The shortest mapping of guest memory, in KiB: a huge page. The VMM keeps something else out of core dumps too, which is shorter.
const LEAST_OF_A_GUEST: f64 = 2048.0;

/// PSS of a process in KiB.
pub(crate) fn pss_kib(pid: u32) -> Result<f64> {
    Ok(mappings(&read(pid)?).iter().map(|mapping| mapping.pss_kib).sum())
}

/// What a VMM takes, in KiB.
#[derive(Clone, Copy)]
pub(crate) struct Vmm {
    /// Its own part: PSS without its guest's memory.
    pub(crate) own: f64,
    /// Its guest's memory that has been touched: of what it booted with, and of the room for more.
    pub(crate) guest: f64,
}

pub(crate) fn vmm_kib(pid: u32) -> Result<Vmm> {
    let mappings = mappings(&read(pid)?);
    let of_guest = |mapping: &&Mapping| mapping.left_out_of_dumps && mapping.size_kib >= LEAST_OF_A_GUEST;
    let (guest, own): (Vec<_>, Vec<_>) = mappings.iter().partition(of_guest);
    anyhow::ensure!(!guest.is_empty(), "no mapping of process {pid} looks like guest memory");
    let sum = |of: &[&Mapping]| of.iter().map(|mapping| mapping.pss_kib).sum();
    Ok(Vmm { own: sum(&own), guest: sum(&guest) })
}

fn read(pid: u32) -> Result<String> {
    fs::read_to_string(format!("/proc/{pid}/smaps")).with_context(|| format!("reading the maps of process {pid}"))
}

struct Mapping {
    size_kib: f64,
    pss_kib: f64,
    left_out_of_dumps: bool,
}

/// Each mapping's `Size:` comes first, its `VmFlags:` last; `dd` is MADV_DONTDUMP (proc_pid_smaps(5)).
fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let key = words.next();
        let number = || words.clone().next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
        match (key, found.last_mut()) {
            (Some("Size:"), _) => found.push(Mapping { size_kib: number(), pss_kib: 0.0, left_out_of_dumps: false }),
            (Some("Pss:"), Some(mapping)) => mapping.pss_kib = number(),
            (Some("VmFlags:"), Some(mapping)) => mapping.left_out_of_dumps = words.any(|flag| flag == "dd"),
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mapping_has_its_size_and_share() {
        let smaps = "7f00-7f01 rw-p 00000000 00:00 0 [heap]\nSize: 132 kB\nRss: 8 kB\nPss: 4 kB\nPss_Dirty: 2 kB\n\
                     7f02-7f03 rw-p 00000000 00:00 0\nSize: 524288 kB\nPss: 4096 kB\nVmFlags: rd wr dd\n";
        let found = mappings(smaps);
        let found: Vec<_> = found.iter().map(|m| (m.size_kib, m.pss_kib, m.left_out_of_dumps)).collect();
        assert_eq!(found, [(132.0, 4.0, false), (524_288.0, 4096.0, true)]);
    }
}
