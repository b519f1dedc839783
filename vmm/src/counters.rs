//! What the VM has cost: KVM's own statistics (Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD) and the exits
//! that reached this process.
#![expect(unsafe_code, reason = "KVM_GET_STATS_FD has no wrapper")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_sys_util::ioctl::{_IOC_NONE, ioctl, ioctl_expr};

use crate::complain;
use crate::vcpu::Exits;

const KVM_GET_STATS_FD: u32 = 0xce;

/// Longest statistics file that is read, in bytes; today's are about 10 KiB.
const MOST_BYTES: usize = 64 << 10;
/// `struct kvm_stats_header`: flags, name_size, num_desc, id_offset, desc_offset, data_offset.
const HEADER_BYTES: usize = 24;
/// `struct kvm_stats_desc` without its name.
const DESCRIPTION_BYTES: usize = 16;

/// KVM's statistics of a VM or a virtual CPU.
#[derive(Debug)]
pub struct Stats {
    file: File,
}

impl Stats {
    /// Opens them; later the virtual CPU is busy running.
    pub fn open(of: &impl AsRawFd) -> io::Result<Self> {
        // SAFETY: the call takes no argument and makes a new descriptor.
        let fd = unsafe { ioctl(of, ioctl_expr(_IOC_NONE, kvm_bindings::KVMIO, KVM_GET_STATS_FD, 0)) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was made just now and nobody else has it.
        Ok(Self { file: unsafe { File::from_raw_fd(fd) } })
    }

    /// Shows `each` plain counter by its name.
    fn read(&self, each: impl FnMut(&[u8], u64)) -> io::Result<()> {
        let mut bytes = vec![0; MOST_BYTES];
        let part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: `part` is all of `bytes`. It is the call by which devices read files, so the filter has no other.
        let length = unsafe { libc::preadv2(self.file.as_raw_fd(), &raw const part, 1, 0, 0) };
        bytes.truncate(usize::try_from(length).map_err(|_| io::Error::last_os_error())?);
        parse(&bytes, each).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "KVM's statistics make no sense"))
    }
}

fn parse(bytes: &[u8], mut each: impl FnMut(&[u8], u64)) -> Option<()> {
    let word = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let (name_bytes, count) = (word(4)? as usize, word(8)? as usize);
    let (descriptions, data) = (word(16)? as usize, word(20)? as usize);
    if descriptions < HEADER_BYTES {
        return None;
    }
    for index in 0..count {
        let at = descriptions.checked_add(index.checked_mul(DESCRIPTION_BYTES.checked_add(name_bytes)?)?)?;
        // flags, exponent (i16), size (u16), offset, bucket_size, name.
        let values = word(at.checked_add(4)?)? >> 16;
        let offset = word(at.checked_add(8)?)? as usize;
        let name = bytes.get(at.checked_add(DESCRIPTION_BYTES)?..)?.get(..name_bytes)?;
        let name = name.split(|byte| *byte == 0).next()?;
        let value = u64::from_le_bytes(*bytes.get(data.checked_add(offset)?..)?.first_chunk()?);
        if values == 1 {
            each(name, value);
        }
    }
    Some(())
}

/// Everything that is counted.
#[derive(Debug)]
pub struct Counters {
    stats: Vec<Stats>,
    exits: Vec<Arc<Exits>>,
}

impl Counters {
    /// KVM's statistics of VM and CPUs, and the exits of each CPU.
    pub fn new(stats: Vec<Stats>, exits: Vec<Arc<Exits>>) -> Self {
        Self { stats, exits }
    }

    /// Exits of the guest so far, as KVM counts them.
    pub fn exits(&self) -> Option<u64> {
        let mut exits = None;
        for stats in &self.stats {
            let add = |name: &[u8], value| {
                if name == b"exits" {
                    exits = Some(exits.unwrap_or(0_u64).saturating_add(value));
                }
            };
            stats.read(add).ok()?;
        }
        exits
    }

    /// Name → count, CPUs added up.
    pub fn snapshot(&self) -> BTreeMap<String, u64> {
        let mut sum = BTreeMap::new();
        for stats in &self.stats {
            if let Err(error) = stats.read(|name, value| add(&mut sum, name, value)) {
                complain(error);
            }
        }
        for exits in &self.exits {
            let counts = [
                ("exit.port_in", &exits.port_in),
                ("exit.port_out", &exits.port_out),
                ("exit.memory_read", &exits.memory_read),
                ("exit.memory_write", &exits.memory_write),
                ("exit.interrupted", &exits.interrupted),
            ];
            for (name, count) in counts {
                *sum.entry(name.to_owned()).or_default() += count.load(Ordering::Relaxed);
            }
        }
        sum
    }
}

/// Adds to a counter of KVM's.
fn add(sum: &mut BTreeMap<String, u64>, name: &[u8], value: u64) {
    let counter = sum.entry(format!("kvm.{}", String::from_utf8_lossy(name))).or_default();
    *counter = counter.saturating_add(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A statistics file with one counter per name.
    fn file(counters: &[(&str, u64)]) -> Vec<u8> {
        const NAME: usize = 16;
        let data = HEADER_BYTES + counters.len() * (DESCRIPTION_BYTES + NAME);
        let header = [0, NAME, counters.len(), HEADER_BYTES, HEADER_BYTES, data];
        let mut bytes: Vec<u8> = header.iter().flat_map(|word| (*word as u32).to_le_bytes()).collect();
        for (index, (name, _)) in counters.iter().enumerate() {
            for word in [0, 1 << 16, index as u32 * 8, 0] {
                bytes.extend(u32::to_le_bytes(word));
            }
            let mut padded = name.as_bytes().to_vec();
            padded.resize(NAME, 0);
            bytes.extend(padded);
        }
        bytes.extend(counters.iter().flat_map(|(_, value)| value.to_le_bytes()));
        bytes
    }

    #[test]
    fn counters_of_several_cpus_add_up() {
        let mut sum = BTreeMap::new();
        for value in [3, 4] {
            parse(&file(&[("exits", value), ("halt_exits", 1)]), |name, value| add(&mut sum, name, value)).unwrap();
        }
        assert_eq!(sum, BTreeMap::from([("kvm.exits".to_owned(), 7), ("kvm.halt_exits".to_owned(), 2)]));
    }

    #[test]
    fn a_file_cut_short_anywhere_is_refused() {
        let whole = file(&[("exits", 3)]);
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length], |_, _| {}), None, "{length} bytes");
        }
    }
}
