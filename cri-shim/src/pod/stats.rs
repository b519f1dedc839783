//! What a pod uses, from what its guest's kernel counts: files of cgroup v2 and proc_pid_net(5), read here.
//!
//! The text is a guest's: whatever it holds, the worst is a figure that is wrong or missing.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions, clippy::arithmetic_side_effects)]

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::Duration;

use agent_protocol::v1;

use super::owner::Owner;
use crate::agent::{Answer, Call};
use crate::clock;
use crate::error::{Error, Result};

/// Longest wait for the agent: what is older is of no use.
const STATS_LIMIT: Duration = Duration::from_secs(5);

/// Most containers and interfaces of one pod that are told of.
const MOST: usize = 1024;

/// What a pod uses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodUsage {
    /// `CLOCK_REALTIME` in nanoseconds, when it was read.
    pub at_ns: i64,
    /// All containers together.
    pub pod: Usage,
    /// Containers that run, by id.
    pub containers: BTreeMap<String, Usage>,
    /// Its network interfaces, without loopback.
    pub traffic: Vec<Traffic>,
    /// The directory of the host on whose file system writable layers are.
    pub layers_directory: PathBuf,
}

/// What a cgroup uses; `None` is what its kernel does not tell.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// CPU time in nanoseconds, since it was made.
    pub cpu_ns: Option<u64>,
    /// CPU time per second of wall-clock, in nanoseconds, since it was last asked.
    pub cpu_ns_per_second: Option<u64>,
    /// Bytes, page cache included.
    pub memory: Option<u64>,
    /// Bytes that could not be had back by dropping idle page cache.
    pub working_set: Option<u64>,
    /// Bytes; `None` is no limit.
    pub memory_limit: Option<u64>,
    /// Bytes of anonymous memory.
    pub rss: Option<u64>,
    /// Page faults.
    pub faults: Option<u64>,
    /// Page faults that had to read.
    pub major_faults: Option<u64>,
    /// Bytes.
    pub swap: Option<u64>,
    /// Bytes; `None` is no limit.
    pub swap_limit: Option<u64>,
    /// Processes and threads.
    pub processes: Option<u64>,
    /// Most of them that there may be; `None` is no limit.
    pub processes_limit: Option<u64>,
    /// Processes of the container itself, without those of execs.
    pub own_processes: Option<u64>,
    /// CPU time of programs in nanoseconds.
    pub cpu_user_ns: Option<u64>,
    /// CPU time of the kernel for them in nanoseconds.
    pub cpu_system_ns: Option<u64>,
    /// How its CPU limit was felt.
    pub throttling: Throttling,
    /// Bytes of page cache.
    pub cache: Option<u64>,
    /// Bytes of files in the memory of processes.
    pub mapped_files: Option<u64>,
    /// Bytes of the kernel's own memory for it.
    pub kernel: Option<u64>,
    /// The most bytes it ever had.
    pub peak: Option<u64>,
    /// How often it ran into its memory limit.
    pub limit_hits: Option<u64>,
    /// Processes killed for want of memory.
    pub oom_kills: Option<u64>,
    /// What it has written to its root file system.
    pub layer: Option<Layer>,
    /// What it read and wrote, by block device (`major:minor`).
    pub transfers: BTreeMap<String, Transfers>,
    /// Time lost in waiting for CPUs.
    pub cpu_pressure: Option<Pressure>,
    /// Time lost in waiting for memory.
    pub memory_pressure: Option<Pressure>,
    /// Time lost in waiting for disks.
    pub io_pressure: Option<Pressure>,
}

/// A writable layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    /// Bytes of allocated blocks; a file with several names once.
    pub bytes: u64,
    /// Files, directories and the rest.
    pub inodes: u64,
    /// `CLOCK_REALTIME` in nanoseconds, when it was counted.
    pub at_ns: i64,
}

/// How often a CPU limit held a cgroup up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Throttling {
    /// Periods in which something ran.
    pub periods: Option<u64>,
    /// Those in which the limit was reached.
    pub throttled_periods: Option<u64>,
    /// Nanoseconds held up.
    pub throttled_ns: Option<u64>,
}

/// What went to and came from a block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transfers {
    /// Bytes.
    pub read_bytes: u64,
    /// Bytes.
    pub written_bytes: u64,
    /// Operations.
    pub reads: u64,
    /// Operations.
    pub writes: u64,
}

/// Pressure stall information (the kernel's accounting/psi).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    /// Some task waited.
    pub some: Stall,
    /// Every task waited.
    pub full: Stall,
}

/// How long tasks waited.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stall {
    /// Nanoseconds in all.
    pub total_ns: u64,
    /// Percent of the last 10 s.
    pub avg10: f64,
    /// Percent of the last minute.
    pub avg60: f64,
    /// Percent of the last five minutes.
    pub avg300: f64,
}

/// What went through a network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Such as `eth0`.
    pub interface: String,
    /// Received.
    pub rx_bytes: u64,
    /// Received.
    pub rx_packets: u64,
    /// Received with errors.
    pub rx_errors: u64,
    /// Received and dropped.
    pub rx_dropped: u64,
    /// Sent.
    pub tx_bytes: u64,
    /// Sent.
    pub tx_packets: u64,
    /// Not sent for errors.
    pub tx_errors: u64,
    /// Not sent but dropped.
    pub tx_dropped: u64,
}

/// CPU time when it was last asked for, by container; the pod's own under the empty name.
pub(super) type CpuTimes = BTreeMap<String, (i64, u64)>;

impl Owner {
    /// Asks the guest.
    pub(super) async fn usage(&mut self) -> Result<PodUsage> {
        let stats = match self.agent()?.ask(Call::GetStats(v1::GetStats {}), STATS_LIMIT).await? {
            Answer::Stats(stats) => stats,
            _ => return Err(Error::Unavailable("the agent gave an answer that does not fit".into())),
        };
        let mut usage = read(&stats, clock::realtime_ns());
        usage.layers_directory.clone_from(&self.context.config.scratch_dir);
        usage.containers.retain(|id, _| self.record.containers.contains_key(id));
        rates(&mut usage, &mut self.cpu_times);
        Ok(usage)
    }
}

fn read(stats: &v1::PodStats, at_ns: i64) -> PodUsage {
    let containers = stats.containers.iter().take(MOST).map(|(id, files)| {
        let layer = stats.layers.get(id).map(|layer| Layer {
            bytes: layer.bytes,
            inodes: layer.inodes,
            // The guest's clock is the guest's.
            at_ns: layer.counted_at_ns.clamp(0, at_ns),
        });
        (id.clone(), Usage { layer, ..cgroup(files) })
    });
    PodUsage {
        at_ns,
        pod: stats.pod.as_ref().map(cgroup).unwrap_or_default(),
        containers: containers.collect(),
        traffic: stats.network.lines().filter_map(traffic).filter(|of| of.interface != "lo").take(MOST).collect(),
        layers_directory: PathBuf::new(),
    }
}

/// Fills in what each has used per second since the last time, and remembers this time.
fn rates(usage: &mut PodUsage, last: &mut CpuTimes) {
    let at_ns = usage.at_ns;
    let mut now = CpuTimes::new();
    let containers = usage.containers.iter_mut().map(|(id, usage)| (id.as_str(), usage));
    for (id, usage) in containers.chain([("", &mut usage.pod)]) {
        let Some(cpu_ns) = usage.cpu_ns else { continue };
        if let Some((then_ns, used_ns)) = last.get(id) {
            let elapsed = u64::try_from(at_ns.saturating_sub(*then_ns)).unwrap_or(0);
            let used = u128::from(cpu_ns.saturating_sub(*used_ns)).saturating_mul(1_000_000_000);
            usage.cpu_ns_per_second = used.checked_div(elapsed.into()).and_then(|rate| u64::try_from(rate).ok());
        }
        now.insert(id.to_owned(), (at_ns, cpu_ns));
    }
    *last = now;
}

fn cgroup(cgroup: &v1::CgroupFiles) -> Usage {
    let files = &cgroup.files;
    let number = |name: &str| files.get(name)?.trim().parse::<u64>().ok();
    let nanoseconds = |name: &str| field(files, "cpu.stat", name).map(|usec| usec.saturating_mul(1000));
    let memory = number("memory.current");
    let idle = field(files, "memory.stat", "inactive_file");
    Usage {
        cpu_ns: nanoseconds("usage_usec"),
        cpu_ns_per_second: None,
        memory,
        working_set: memory.map(|memory| memory.saturating_sub(idle.unwrap_or(0))),
        memory_limit: number("memory.max"),
        rss: field(files, "memory.stat", "anon"),
        faults: field(files, "memory.stat", "pgfault"),
        major_faults: field(files, "memory.stat", "pgmajfault"),
        swap: number("memory.swap.current"),
        swap_limit: number("memory.swap.max"),
        processes: number("pids.current"),
        processes_limit: number("pids.max"),
        own_processes: files.get("cgroup.procs").and_then(|list| u64::try_from(list.lines().count()).ok()),
        cpu_user_ns: nanoseconds("user_usec"),
        cpu_system_ns: nanoseconds("system_usec"),
        throttling: Throttling {
            periods: field(files, "cpu.stat", "nr_periods"),
            throttled_periods: field(files, "cpu.stat", "nr_throttled"),
            throttled_ns: nanoseconds("throttled_usec"),
        },
        cache: field(files, "memory.stat", "file"),
        mapped_files: field(files, "memory.stat", "file_mapped"),
        kernel: field(files, "memory.stat", "kernel"),
        peak: number("memory.peak"),
        layer: None,
        limit_hits: field(files, "memory.events", "max"),
        oom_kills: field(files, "memory.events", "oom_kill"),
        transfers: files
            .get("io.stat")
            .into_iter()
            .flat_map(|text| text.lines())
            .filter_map(transfers)
            .take(MOST)
            .collect(),
        cpu_pressure: pressure(files, "cpu.pressure"),
        memory_pressure: pressure(files, "memory.pressure"),
        io_pressure: pressure(files, "io.pressure"),
    }
}

/// A number of a file of `name number` lines.
fn field(files: &HashMap<String, String>, file: &str, name: &str) -> Option<u64> {
    files.get(file)?.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// Two lines such as `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`; old kernels have no `full` for CPUs.
fn pressure(files: &HashMap<String, String>, file: &str) -> Option<Pressure> {
    let mut found = Pressure::default();
    for line in files.get(file)?.lines() {
        match line.split_once(' ')? {
            ("some", rest) => found.some = stall(rest)?,
            ("full", rest) => found.full = stall(rest)?,
            _ => {}
        }
    }
    Some(found)
}

fn stall(line: &str) -> Option<Stall> {
    let mut found = Stall::default();
    for (name, value) in line.split_whitespace().filter_map(|word| word.split_once('=')) {
        match name {
            "total" => found.total_ns = value.parse::<u64>().ok()?.saturating_mul(1000),
            "avg10" => found.avg10 = percent(value)?,
            "avg60" => found.avg60 = percent(value)?,
            "avg300" => found.avg300 = percent(value)?,
            _ => {}
        }
    }
    Some(found)
}

fn percent(text: &str) -> Option<f64> {
    text.parse::<f64>().ok().filter(|value| value.is_finite())
}

/// A line of io.stat: the device's numbers, then `name=number` pairs.
fn transfers(line: &str) -> Option<(String, Transfers)> {
    let (device, pairs) = line.split_once(' ')?;
    let mut found = Transfers::default();
    for (name, value) in pairs.split_whitespace().filter_map(|pair| pair.split_once('=')) {
        let value = value.parse::<u64>().ok()?;
        match name {
            "rbytes" => found.read_bytes = value,
            "wbytes" => found.written_bytes = value,
            "rios" => found.reads = value,
            "wios" => found.writes = value,
            _ => {}
        }
    }
    Some((device.to_owned(), found))
}

/// A line of /proc/net/dev: name, eight figures of what was received, eight of what was sent.
fn traffic(line: &str) -> Option<Traffic> {
    let (interface, figures) = line.split_once(':')?;
    let figures: Vec<u64> = figures.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    let [rx_bytes, rx_packets, rx_errors, rx_dropped, _, _, _, _, tx_bytes, tx_packets, tx_errors, tx_dropped, ..] =
        *figures.as_slice()
    else {
        return None;
    };
    let interface = interface.trim().to_owned();
    Some(Traffic {
        interface,
        rx_bytes,
        rx_packets,
        rx_errors,
        rx_dropped,
        tx_bytes,
        tx_packets,
        tx_errors,
        tx_dropped,
    })
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, reason = "a test may panic")]
mod tests {
    use super::*;

    fn files(pairs: &[(&str, &str)]) -> v1::CgroupFiles {
        let pairs = pairs.iter().map(|&(name, text)| (name.to_owned(), text.to_owned()));
        v1::CgroupFiles { files: pairs.collect() }
    }

    #[test]
    fn the_kernels_words_are_understood() {
        let usage = cgroup(&files(&[
            ("cpu.stat", "usage_usec 5000\nuser_usec 1\n"),
            ("memory.current", "10000\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 700\nfile 1\ninactive_file 4000\npgfault 9\npgmajfault 2\n"),
            ("io.stat", "254:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n"),
            ("cgroup.procs", "7\n8\n"),
            ("cpu.pressure", "some avg10=1.50 avg60=0.25 avg300=0.00 total=12\n"),
        ]));
        assert_eq!((usage.cpu_ns, usage.memory, usage.working_set), (Some(5_000_000), Some(10_000), Some(6000)));
        assert_eq!((usage.memory_limit, usage.rss, usage.major_faults, usage.swap), (None, Some(700), Some(2), None));
        let transfers = Transfers { read_bytes: 4096, reads: 1, ..Transfers::default() };
        assert_eq!((usage.transfers.get("254:0"), usage.own_processes), (Some(&transfers), Some(2)));
        let some = Stall { total_ns: 12_000, avg10: 1.5, avg60: 0.25, avg300: 0.0 };
        assert_eq!(usage.cpu_pressure, Some(Pressure { some, full: Stall::default() }));
    }

    #[test]
    fn nonsense_is_no_figure() {
        let nonsense = [
            ("cpu.stat", "usage_usec -1\nusage_usecx 3"),
            ("memory.current", "18446744073709551616"),
            ("io.pressure", "some avg10=NaN total=1"),
        ];
        assert_eq!(cgroup(&files(&nonsense)), Usage::default());
        assert_eq!(traffic("eth0: 1 2 3"), None);
        assert_eq!(traffic(" face |bytes    packets"), None);
    }

    #[test]
    fn interfaces_are_told_without_loopback() {
        let network = "Inter-|   Receive  |  Transmit\n face |bytes\n    lo: 1 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0\n  \
                       eth0: 10 1 2 0 0 0 0 0 30 1 4 0 0 0 0 0\n";
        let usage = read(&v1::PodStats { network: network.into(), ..Default::default() }, 1);
        let expected = Traffic {
            interface: "eth0".into(),
            rx_bytes: 10,
            rx_packets: 1,
            rx_errors: 2,
            rx_dropped: 0,
            tx_bytes: 30,
            tx_packets: 1,
            tx_errors: 4,
            tx_dropped: 0,
        };
        assert_eq!(usage.traffic, [expected]);
    }

    #[test]
    fn a_rate_needs_two_looks() {
        let look = |at_ns, usec: &str| {
            let cpu = format!("usage_usec {usec}\n");
            let containers = [("c".to_owned(), files(&[("cpu.stat", &cpu)]))].into();
            read(&v1::PodStats { containers, ..Default::default() }, at_ns)
        };
        let mut last = CpuTimes::new();
        let mut first = look(0, "1000");
        rates(&mut first, &mut last);
        assert_eq!(first.containers["c"].cpu_ns_per_second, None);
        let mut second = look(2_000_000_000, "2000");
        rates(&mut second, &mut last);
        assert_eq!(second.containers["c"].cpu_ns_per_second, Some(500_000));
        let mut same_time = look(2_000_000_000, "3000");
        rates(&mut same_time, &mut last);
        assert_eq!(same_time.containers["c"].cpu_ns_per_second, None);
    }
}
