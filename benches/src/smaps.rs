//! Memory of a process as the kernel accounts for it: proportional set sizes, from `/proc/PID/smaps`.

use std::fs;

use anyhow::{Context, Result};

/// The part of guest memory at boot that a mapping must at least have to be the guest's.
const MOST_OF: f64 = 0.9;

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

pub(crate) fn vmm_kib(pid: u32, boot_mib: u32) -> Result<Vmm> {
    let mappings = mappings(&read(pid)?);
    let least = MOST_OF * f64::from(boot_mib) * 1024.0;
    let (guest, own): (Vec<_>, Vec<_>) = mappings.iter().partition(|mapping| mapping.size_kib >= least);
    anyhow::ensure!((1..=2).contains(&guest.len()), "{} mappings of process {pid} look like guest memory", guest.len());
    let sum = |of: &[&Mapping]| of.iter().map(|mapping| mapping.pss_kib).sum();
    Ok(Vmm { own: sum(&own), guest: sum(&guest) })
}

fn read(pid: u32) -> Result<String> {
    fs::read_to_string(format!("/proc/{pid}/smaps")).with_context(|| format!("reading the maps of process {pid}"))
}

struct Mapping {
    size_kib: f64,
    pss_kib: f64,
}

/// Each mapping's `Size:` comes before its `Pss:` (proc_pid_smaps(5)).
fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(Ok(value))) = (words.next(), words.next().map(str::parse::<f64>)) else { continue };
        match (key, found.last_mut()) {
            ("Size:", _) => found.push(Mapping { size_kib: value, pss_kib: 0.0 }),
            ("Pss:", Some(mapping)) => mapping.pss_kib = value,
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
                     7f02-7f03 rw-p 00000000 00:00 0\nSize: 524288 kB\nPss: 4096 kB\nVmFlags: rd wr\n";
        let found: Vec<_> = mappings(smaps).iter().map(|mapping| (mapping.size_kib, mapping.pss_kib)).collect();
        assert_eq!(found, [(132.0, 4.0), (524_288.0, 4096.0)]);
    }
}
