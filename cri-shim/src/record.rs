//! What is known of a pod on disk: one JSON file that names everything that may exist of it.
//!
//! It is written before the first thing is made and after each change, so that a daemon that starts anew can go on
//! with the pod or undo it. The directory is on a tmpfs in practice, and a rename is atomic there: a reader sees the
//! old record or the new one. No fsync: what it describes does not outlive a power cut either.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::image::Verity;
use crate::network::Attachment;
use crate::pod::{ContainerUser, Frame, Moment};
use crate::process::ProcessRecord;
use crate::spec::{ContainerSpec, PodSpec};

/// Version of [`Record`]; another one's pods are left alone.
pub(crate) const RECORD_VERSION: u32 = 1;

/// Longest record in bytes that is read back.
const RECORD_BYTES: u64 = 64 << 20;

/// Extents of the pod disk begin at multiples of this many sectors: 1 MiB.
const EXTENT_ALIGN: u64 = 2048;

/// First host port that a log is given; those below are the protocol's.
const FIRST_LOG_PORT: u32 = 0x1_0000;

/// Why a record could not be read or written.
#[derive(Debug, Error)]
pub(crate) enum RecordError {
    /// The file system failed.
    #[error("the pod's record: {0}")]
    Io(#[from] io::Error),
    /// The bytes are no record.
    #[error("the pod's record does not decode: {0}")]
    Decode(#[from] serde_json::Error),
    /// Another release wrote it.
    #[error(
        "the pod's record has version {0}, this release knows {RECORD_VERSION}: remove the pod with the release that made it"
    )]
    Version(u32),
}

/// One pod and its containers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// 64 hexadecimal digits; names the network namespace, the scratch file and the cgroup as well.
    pub id: String,
    /// What was asked for.
    pub spec: Arc<PodSpec>,
    /// `CLOCK_REALTIME` in nanoseconds.
    pub created_at_ns: i64,
    /// How far the pod is.
    pub phase: Phase,
    /// cgroup of the VMM, below the cgroup root; whatever runs there is the pod's.
    pub cgroup: String,
    /// Guest memory in MiB that it is to have.
    pub memory_mib: u32,
    /// Virtual CPUs that are to be up.
    pub vcpus: u8,
    /// How its VM was made; one of an older release stays as large as it is.
    #[serde(default)]
    pub frame: Option<Frame>,
    /// The VMM, once it is known.
    pub vmm: Option<ProcessRecord>,
    /// What serves its shared directories, once it has any.
    #[serde(default)]
    pub file_server: Option<FileServerRecord>,
    /// The next shared directory's number.
    #[serde(default)]
    pub next_share: u32,
    /// The network namespace that holds its tap.
    pub netns: Option<PathBuf>,
    /// What the guest was told of its network.
    pub attachment: Option<Attachment>,
    /// `uname -r` of the guest.
    pub guest_kernel: String,
    /// Extents of the pod disk, in order of address.
    pub disks: Vec<DiskRecord>,
    /// The containers by id.
    pub containers: BTreeMap<String, ContainerRecord>,
    /// The next log's port.
    pub next_log_port: u32,
    /// The moments of its start as the daemon saw them.
    pub moments: Vec<Moment>,
}

/// How far a pod is.
///
/// `Starting → Running → Ended → Stopped`; `Starting` and `Removing` never come back to life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "phase")]
pub(crate) enum Phase {
    /// Being made: a daemon that finds this undoes it.
    Starting,
    /// The VMM runs.
    Running,
    /// The VMM is gone; network and files are still there.
    Ended {
        /// Why, for people.
        message: String,
    },
    /// Nothing is left but this record.
    Stopped {
        /// Why, for people.
        message: String,
    },
    /// Being removed: a daemon that finds this goes on with it.
    Removing,
}

/// The process that serves a pod's shared directories.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileServerRecord {
    /// Itself.
    pub process: ProcessRecord,
    /// What the guest mounts it by.
    pub tag: String,
}

/// An extent of the pod disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskRecord {
    /// Where it begins.
    pub first_sector: u64,
    /// How long it is.
    pub sectors: u64,
    /// The file behind it.
    pub file: PathBuf,
    /// The image it belongs to; `None` is the scratch space or a volume.
    pub image: Option<String>,
    /// What containers may do with it, if it is a block device of the host that they have as such.
    #[serde(default)]
    pub volume: Option<Access>,
    /// By what the guest checks it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verity: Option<Verity>,
}

/// Of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Access {
    /// Its device is not opened for writing.
    ReadOnly,
    /// Everything.
    ReadWrite,
}

/// A container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    /// What was asked for.
    pub spec: Arc<ContainerSpec>,
    /// `CLOCK_REALTIME` in nanoseconds.
    pub created_at_ns: i64,
    /// Id of its image; empty if its files are a directory or disk of the host.
    pub image_id: String,
    /// Its log and the port that leads there.
    pub log: Option<LogRecord>,
    /// Numbers of the shared directories that it mounts, by their place in the container.
    #[serde(default)]
    pub shares: BTreeMap<String, u32>,
    /// First sectors of the volumes that it has as block devices, by their place in the container.
    #[serde(default)]
    pub volumes: BTreeMap<String, u64>,
    /// Who its first process runs as, once the agent has said so.
    #[serde(default)]
    pub user: Option<ContainerUser>,
    /// How far it is.
    pub life: Life,
}

/// A container's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LogRecord {
    /// Host port that the agent dials.
    pub port: u32,
    /// The file.
    pub path: PathBuf,
}

/// How far a container is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "life")]
pub(crate) enum Life {
    /// Asked for; the agent may not have it yet. A daemon that finds this forgets the container.
    Creating,
    /// The agent has it; nothing runs.
    Created,
    /// Its first process runs.
    Running {
        /// `CLOCK_REALTIME` in nanoseconds.
        started_at_ns: i64,
    },
    /// Its first process has ended.
    Exited {
        /// 0 if it never started.
        started_at_ns: i64,
        /// `CLOCK_REALTIME` in nanoseconds.
        finished_at_ns: i64,
        /// Exit status, or 128 + signal.
        code: i32,
        /// One word.
        reason: String,
        /// For people.
        message: String,
    },
}

impl Record {
    /// What lines of the log carry that are written for the pod.
    pub(crate) fn span(&self) -> tracing::Span {
        self.spec.identity.span()
    }

    /// Writes it in place of an older one.
    pub(crate) fn write(&self, path: &Path) -> Result<(), RecordError> {
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(self)?)?;
        Ok(fs::rename(&new, path)?)
    }

    /// Reads it back.
    pub(crate) fn read(path: &Path) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        if fs::metadata(path)?.len() > RECORD_BYTES {
            return Err(io::Error::other("is too long").into());
        }
        let bytes = fs::read(path)?;
        let Head { version } = serde_json::from_slice(&bytes)?;
        if version != RECORD_VERSION {
            return Err(RecordError::Version(version));
        }
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// A place for `bytes` more on the pod disk, as first sector and count.
    pub(crate) fn free_extent(&self, bytes: u64) -> Option<(u64, u64)> {
        let end = self.disks.iter().map(|disk| disk.first_sector.saturating_add(disk.sectors)).max().unwrap_or(0);
        let first = end.checked_next_multiple_of(EXTENT_ALIGN)?;
        let sectors = bytes.div_ceil(vmm_control::SECTOR_BYTES);
        let capacity = vmm_control::POD_DISK_BYTES / vmm_control::SECTOR_BYTES;
        (sectors > 0 && first.checked_add(sectors)? <= capacity).then_some((first, sectors))
    }

    /// How its VM was made.
    pub(crate) fn frame(&self) -> Frame {
        self.frame.unwrap_or(Frame { boot_mib: self.memory_mib, room_mib: 0, vcpus: self.vcpus, queues: 1 })
    }

    /// Sum of the memory limits of the containers that have not ended, in bytes.
    pub(crate) fn container_limits(&self) -> u64 {
        let live = self.containers.values().filter(|container| !matches!(container.life, Life::Exited { .. }));
        live.filter_map(|container| container.spec.resources.memory_limit).fold(0, u64::saturating_add)
    }

    /// A port for one more log, used only once in the life of a pod.
    pub(crate) fn take_log_port(&mut self) -> u32 {
        let port = self.next_log_port.max(FIRST_LOG_PORT);
        self.next_log_port = port.saturating_add(1);
        port
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn record() -> Record {
        Record {
            version: RECORD_VERSION,
            id: "ab".repeat(32),
            spec: Arc::new(PodSpec { hostname: "web".into(), ..PodSpec::default() }),
            created_at_ns: 1,
            phase: Phase::Ended { message: "why".into() },
            cgroup: "/pericarp/x".into(),
            memory_mib: 512,
            vcpus: 1,
            frame: None,
            vmm: Some(ProcessRecord { pid: 7, start_time: 9 }),
            file_server: None,
            next_share: 0,
            netns: None,
            attachment: None,
            guest_kernel: "6.12".into(),
            disks: Vec::new(),
            containers: BTreeMap::from([(
                "c".into(),
                ContainerRecord {
                    spec: Arc::default(),
                    created_at_ns: 2,
                    image_id: "sha256:0".into(),
                    log: Some(LogRecord { port: 2000, path: "/log".into() }),
                    shares: BTreeMap::from([("/data".into(), 4)]),
                    volumes: BTreeMap::from([("/dev/data".into(), 2048)]),
                    user: Some(ContainerUser { uid: 1, gid: 2, groups: vec![3] }),
                    life: Life::Running { started_at_ns: 3 },
                },
            )]),
            next_log_port: 0,
            moments: vec![Moment { name: "spawned".into(), at_ns: 5 }],
        }
    }

    #[test]
    fn is_read_back_as_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("record.json");
        record().write(&path).expect("writes");
        assert_eq!(Record::read(&path).expect("reads"), record());
        let names = fs::read_dir(dir.path()).expect("lists").count();
        assert_eq!(names, 1, "nothing is left beside it");
    }

    #[test]
    fn a_write_cut_short_leaves_the_old_record() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("record.json");
        record().write(&path).expect("writes");
        let torn = serde_json::to_vec(&record()).expect("encodes");
        fs::write(path.with_extension("new"), &torn[..torn.len() / 2]).expect("writes");
        assert_eq!(Record::read(&path).expect("reads"), record());
    }

    #[test]
    fn another_version_is_refused_by_number() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("record.json");
        fs::write(&path, br#"{"version": 99, "shape": "unknown"}"#).expect("writes");
        assert!(matches!(Record::read(&path), Err(RecordError::Version(99))));
        fs::write(&path, b"{").expect("writes");
        assert!(matches!(Record::read(&path), Err(RecordError::Decode(_))));
    }

    #[test]
    fn extents_are_aligned_disjoint_and_end_with_the_disk() {
        let mut record = record();
        let mut last_end = 0;
        for bytes in [10 << 30, 1, 4096, 5000, 3 << 20] {
            let (first_sector, sectors) = record.free_extent(bytes).expect("there is room");
            assert!(first_sector >= last_end && first_sector % EXTENT_ALIGN == 0);
            assert!(sectors * 512 >= bytes && sectors * 512 < bytes + 4096);
            last_end = first_sector + sectors;
            record.disks.push(DiskRecord {
                first_sector,
                sectors,
                file: "/x".into(),
                image: None,
                volume: None,
                verity: None,
            });
        }
        assert_eq!(record.free_extent(0), None);
        assert_eq!(record.free_extent(vmm_control::POD_DISK_BYTES), None);
        assert_eq!(record.free_extent(u64::MAX), None);
    }

    #[test]
    fn log_ports_are_never_given_twice() {
        let mut record = record();
        assert_eq!([record.take_log_port(), record.take_log_port()], [FIRST_LOG_PORT, FIRST_LOG_PORT + 1]);
    }
}
