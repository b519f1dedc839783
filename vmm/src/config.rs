//! Reads the configuration, checks it, and takes possession of every descriptor that it names.
//!
//! After this no module handles a raw descriptor number. It starts nothing.
#![expect(unsafe_code, reason = "inherited descriptors have no owner yet")]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag, fstat};
use thiserror::Error;
use vmm_control::{CONFIG_VERSION, Config, Console, Disk, Extent, Limits, exit};

use crate::memory;

/// Most virtual CPUs.
pub const MOST_VCPUS: u8 = 64;
/// Least guest memory in MiB.
pub const LEAST_MEMORY_MIB: u32 = 32;
/// Most room for memory that is plugged later, in MiB: 1 TiB, which is what the least CPUs address.
pub const MOST_ROOM_MIB: u32 = 1 << 20;
/// [`memory::CHUNK`] in MiB.
const CHUNK_MIB: u32 = (memory::CHUNK / memory::MIB) as u32;
/// Longest configuration in bytes.
const MOST_BYTES: u64 = 1 << 20;

/// Why a configuration is refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// Standard input.
    #[error("cannot read the configuration from standard input")]
    Read(#[source] io::Error),
    /// Not the document that is expected.
    #[error("the configuration on standard input is not valid")]
    Parse(#[from] serde_json::Error),
    /// Made for another version.
    #[error("the configuration has version {0}; this pericarp-vmm takes version {CONFIG_VERSION}")]
    Version(u32),
    /// Too few or many.
    #[error("vcpus is {0}; it may be 1 to {MOST_VCPUS}")]
    Vcpus(u8),
    /// Too little.
    #[error("memory_mib is {0}; it must be at least {LEAST_MEMORY_MIB}")]
    Memory(u32),
    /// Not whole chunks, or too much.
    #[error("room_mib is {0}; it must be a multiple of {CHUNK_MIB} and at most {MOST_ROOM_MIB}")]
    Room(u32),
    /// Not open.
    #[error("descriptor {fd} for {name} is not open: it must be inherited across exec")]
    Closed {
        /// Field.
        name: &'static str,
        /// Number.
        fd: RawFd,
    },
    /// Something else.
    #[error("descriptor {fd} for {name} is not {expected}")]
    Kind {
        /// Field.
        name: &'static str,
        /// Number.
        fd: RawFd,
        /// What it must be.
        expected: &'static str,
    },
    /// Named for two things.
    #[error("descriptor {fd} for {name} is named twice, or is a standard stream")]
    Shared {
        /// Field.
        name: &'static str,
        /// Number.
        fd: RawFd,
    },
}

impl ConfigError {
    /// The code to exit with.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Closed { .. } | Self::Kind { .. } | Self::Shared { .. } => exit::BAD_FD,
            _ => exit::BAD_CONFIG,
        }
    }
}

/// A disk with its files.
#[derive(Debug)]
pub struct DiskSetup {
    /// Size that the guest sees.
    pub capacity_bytes: u64,
    /// Queues for requests.
    pub queues: u8,
    /// Extents and their files.
    pub extents: Vec<(Extent, File)>,
    /// How much the guest may do with it.
    pub limits: Limits,
}

/// A network interface with its taps.
#[derive(Debug)]
pub struct NetSetup {
    /// One for each pair of queues.
    pub taps: Vec<File>,
    /// The address that it announces.
    pub mac: [u8; 6],
    /// How much the guest may receive, and how much it may send.
    pub limits: Limits,
}

/// A checked configuration that owns its descriptors; the fields are those of [`Config`].
#[derive(Debug)]
#[expect(missing_docs, reason = "each field is documented in Config")]
pub struct Setup {
    pub kvm: OwnedFd,
    pub kernel: File,
    pub initrd: Option<File>,
    pub cmdline: String,
    pub vcpus: u8,
    pub memory_mib: u32,
    pub room_mib: u32,
    pub console: Console,
    pub keyboard: Option<File>,
    pub disks: Vec<DiskSetup>,
    pub nets: Vec<NetSetup>,
    pub vsock: Option<OwnedFd>,
    pub control: Option<OwnedFd>,
    pub events: Option<File>,
}

/// Reads one configuration to the end of `input`.
pub fn read(input: impl Read) -> Result<Setup, ConfigError> {
    let mut text = Vec::with_capacity(4096);
    input.take(MOST_BYTES).read_to_end(&mut text).map_err(ConfigError::Read)?;
    check(serde_json::from_slice(&text)?)
}

fn check(config: Config) -> Result<Setup, ConfigError> {
    if config.version != CONFIG_VERSION {
        return Err(ConfigError::Version(config.version));
    }
    if !(1..=MOST_VCPUS).contains(&config.vcpus) {
        return Err(ConfigError::Vcpus(config.vcpus));
    }
    if config.memory_mib < LEAST_MEMORY_MIB {
        return Err(ConfigError::Memory(config.memory_mib));
    }
    if config.room_mib > MOST_ROOM_MIB || !config.room_mib.is_multiple_of(CHUNK_MIB) {
        return Err(ConfigError::Room(config.room_mib));
    }
    let mut fds = Inherited::default();
    let keyboard = match config.console {
        Console::Serial { input } => input.map(|fd| fds.take("console input", fd, Kind::Any)).transpose()?,
        Console::Ring => None,
    };
    Ok(Setup {
        kvm: fds.take("kvm", config.kvm, Kind::Character)?,
        kernel: fds.take("kernel", config.kernel, Kind::Regular)?.into(),
        initrd: config.initrd.map(|fd| fds.take("initrd", fd, Kind::Regular)).transpose()?.map(File::from),
        cmdline: config.cmdline,
        vcpus: config.vcpus,
        memory_mib: config.memory_mib,
        room_mib: config.room_mib,
        console: config.console,
        keyboard: keyboard.map(File::from),
        disks: config.disks.into_iter().map(|disk| fds.take_disk(disk)).collect::<Result<_, _>>()?,
        nets: config
            .nets
            .into_iter()
            .map(|net| Ok(NetSetup { taps: fds.take_taps(&net.taps)?, mac: net.mac, limits: net.limits }))
            .collect::<Result<_, ConfigError>>()?,
        vsock: config.vsock.map(|vsock| fds.take("the vsock listener", vsock.listener, Kind::Socket)).transpose()?,
        control: config.control.map(|fd| fds.take("control", fd, Kind::Socket)).transpose()?,
        events: config.events.map(|fd| fds.take("events", fd, Kind::Any)).transpose()?.map(File::from),
    })
}

/// What a descriptor must be.
#[derive(Clone, Copy)]
enum Kind {
    Any,
    Character,
    Regular,
    Socket,
    Storage,
}

impl Kind {
    fn fits(self, stat: &FileStat) -> bool {
        let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        match self {
            Self::Any => true,
            Self::Character => kind == SFlag::S_IFCHR,
            Self::Regular => kind == SFlag::S_IFREG,
            Self::Socket => kind == SFlag::S_IFSOCK,
            Self::Storage => kind == SFlag::S_IFREG || kind == SFlag::S_IFBLK,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Any => "open",
            Self::Character => "a character device",
            Self::Regular => "a regular file",
            Self::Socket => "a socket",
            Self::Storage => "a regular file or a block device",
        }
    }
}

/// The descriptors taken so far.
#[derive(Default)]
struct Inherited(BTreeSet<RawFd>);

impl Inherited {
    fn take(&mut self, name: &'static str, fd: RawFd, kind: Kind) -> Result<OwnedFd, ConfigError> {
        if fd < 0 {
            return Err(ConfigError::Closed { name, fd });
        }
        if fd <= libc::STDERR_FILENO || !self.0.insert(fd) {
            return Err(ConfigError::Shared { name, fd });
        }
        // SAFETY: the number is not negative. Whether it is open is checked next, before anything uses it; nothing
        // else in this process owns it, since it was inherited and is taken only once.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        match fstat(&owned) {
            Err(Errno::EBADF) => {
                // An owner of a number that is not open would close somebody else's descriptor later.
                let _ = std::os::fd::IntoRawFd::into_raw_fd(owned);
                Err(ConfigError::Closed { name, fd })
            }
            Ok(stat) if kind.fits(&stat) => Ok(owned),
            _ => Err(ConfigError::Kind { name, fd, expected: kind.name() }),
        }
    }

    fn take_taps(&mut self, taps: &[RawFd]) -> Result<Vec<File>, ConfigError> {
        taps.iter().map(|tap| Ok(self.take("a tap", *tap, Kind::Character)?.into())).collect()
    }

    fn take_disk(&mut self, disk: Disk) -> Result<DiskSetup, ConfigError> {
        let mut extents = Vec::with_capacity(disk.extents.len());
        for extent in disk.extents {
            extents.push((extent, self.take("a disk's extent", extent.file, Kind::Storage)?.into()));
        }
        Ok(DiskSetup { capacity_bytes: disk.capacity_bytes, queues: disk.queues, extents, limits: disk.limits })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    fn file() -> RawFd {
        tempfile::tempfile().unwrap().into_raw_fd()
    }

    fn null() -> RawFd {
        File::open("/dev/null").unwrap().into_raw_fd()
    }

    fn json(kvm: RawFd, kernel: RawFd, more: &str) -> String {
        format!(r#"{{"version":1,"kvm":{kvm},"kernel":{kernel},"vcpus":1,"memory_mib":64{more}}}"#)
    }

    fn refusal(text: &str) -> (i32, String) {
        let error = read(text.as_bytes()).unwrap_err();
        (error.exit_code(), error.to_string())
    }

    #[test]
    fn a_good_configuration_owns_its_descriptors() {
        let setup = read(json(null(), file(), "").as_bytes()).unwrap();
        assert_eq!((setup.vcpus, setup.memory_mib), (1, 64));
    }

    #[test]
    fn values_out_of_range_are_refused_with_their_name() {
        for (text, name) in [
            (json(3, 4, "").replace(":1,\"kvm", ":2,\"kvm"), "version"),
            (json(3, 4, "").replace("vcpus\":1", "vcpus\":65"), "vcpus"),
            (json(3, 4, "").replace("vcpus\":1", "vcpus\":0"), "vcpus"),
            (json(3, 4, "").replace("64}", "31}"), "memory_mib"),
            (json(3, 4, r#","room_mib":64"#), "room_mib"),
            (json(3, 4, r#","room_mib":1048704"#), "room_mib"),
            (json(3, 4, r#","surprise":1"#), "not valid"),
            ("{".to_owned(), "not valid"),
        ] {
            let (code, message) = refusal(&text);
            assert_eq!(code, exit::BAD_CONFIG, "{text}");
            assert!(message.contains(name), "{message}");
        }
    }

    #[test]
    fn descriptors_that_are_closed_shared_or_of_the_wrong_kind_are_refused() {
        for (text, words) in [
            (json(900, file(), ""), "not open"),
            (json(-1, file(), ""), "not open"),
            (json(0, file(), ""), "standard stream"),
            (json(null(), null(), ""), "not a regular file"),
            (json(file(), file(), ""), "not a character device"),
            (json(null(), file(), &format!(r#","control":{}"#, file())), "not a socket"),
        ] {
            let (code, message) = refusal(&text);
            assert_eq!(code, exit::BAD_FD, "{text}");
            assert!(message.contains(words), "{message}");
        }
        let twice = file();
        assert!(refusal(&json(null(), twice, &format!(r#","initrd":{twice}"#))).1.contains("twice"));
    }
}
