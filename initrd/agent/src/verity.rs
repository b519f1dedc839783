//! Disks whose every block is checked against a hash tree when it is read: a device of the kernel's own (dm-verity) before a
//! partition. A block that is not as it was made is an I/O error.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

use agent_protocol::v1::Verity;

use crate::sys::{self, DeviceMapper};

/// Where the kernel takes orders for such devices.
const CONTROL: &str = "/dev/mapper/control";

/// Bytes of a block, of data and of hashes, and bytes of a sector.
const BLOCK: u64 = 4096;
const SECTOR: u64 = 512;

/// Bytes of a root hash.
const ROOT_BYTES: usize = 32;

/// A device that checks.
#[derive(Debug)]
pub(crate) struct Checked {
    name: String,
    pub(crate) device: PathBuf,
}

impl Checked {
    /// Puts one before `partition`, whose tree follows its data.
    pub(crate) fn open(partition: &str, name: String, verity: &Verity) -> io::Result<Self> {
        let table = table(partition, verity)?;
        let sectors = verity.data_blocks.checked_mul(BLOCK / SECTOR).ok_or(io::ErrorKind::InvalidInput)?;
        let control = File::options().read(true).write(true).open(CONTROL)?;
        let order = |order: DeviceMapper<'_>| sys::device_mapper(control.as_fd(), &name, order);
        let number = order(DeviceMapper::Create)?;
        let begun = order(DeviceMapper::Load { sectors, target: "verity", table: &table });
        if let Err(error) = begun.and_then(|_| order(DeviceMapper::Resume)) {
            drop(order(DeviceMapper::Remove));
            return Err(error);
        }
        Ok(Self { device: PathBuf::from(format!("/dev/dm-{number}")), name })
    }

    /// Takes it away, now or when its last user has gone.
    pub(crate) fn close(&self) -> io::Result<()> {
        let control = File::options().read(true).write(true).open(CONTROL)?;
        sys::device_mapper(control.as_fd(), &self.name, DeviceMapper::Remove).map(drop)
    }
}

/// Documentation/admin-guide/device-mapper/verity.rst: version, both devices, both sizes of blocks, blocks of data, where the hashes
/// begin, algorithm, root, no salt.
fn table(partition: &str, verity: &Verity) -> io::Result<String> {
    if verity.root.len() != ROOT_BYTES || verity.data_blocks == 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a root hash of a disk"));
    }
    let root = verity.root.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
    let blocks = verity.data_blocks;
    Ok(format!("1 {partition} {partition} {BLOCK} {BLOCK} {blocks} {blocks} sha256 {root} -"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_as_the_kernel_reads_it() {
        let verity = Verity { root: vec![0xab; ROOT_BYTES], data_blocks: 3 };
        let expected = format!("1 /dev/vda2 /dev/vda2 4096 4096 3 3 sha256 {} -", "ab".repeat(ROOT_BYTES));
        assert_eq!(table("/dev/vda2", &verity).expect("a table"), expected);
        for wrong in [Verity { root: vec![1; 31], data_blocks: 3 }, Verity { root: vec![1; 32], data_blocks: 0 }] {
            assert!(table("/dev/vda2", &wrong).is_err());
        }
    }
}
