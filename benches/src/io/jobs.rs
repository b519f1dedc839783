//! What is measured: jobs for `pericarp-load`, whose main module explains the words.

/// One job.
pub(super) struct Job {
    /// Its figures' name.
    pub(super) name: &'static str,
    /// What is said to the load; `PORT` stands for the peer's.
    pub(super) words: &'static str,
    /// How much of it; said last.
    pub(super) count: u32,
    /// Of how much a figure speaks.
    pub(super) unit: &'static str,
    /// What the peer does meanwhile.
    pub(super) side: Side,
    /// Whether the host can do the same.
    pub(super) on_host: bool,
}

/// What the peer of a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// There is none.
    None,
    /// Takes a TCP stream, and says when it has all.
    Sink,
    /// Sends a TCP stream when it is asked to.
    Source,
    /// Gives back each byte.
    Echo,
    /// Answers each burst of packets.
    BurstSink,
    /// Sends a burst of packets for each that it gets.
    BurstSource,
    /// As [`Side::Sink`], by vsock.
    VsockSink,
    /// As [`Side::Source`], by vsock.
    VsockSource,
}

impl Job {
    /// How many operations the figures are divided by.
    pub(super) fn operations(&self) -> u32 {
        self.count
    }

    /// What the load is told.
    pub(super) fn line(&self, port: u16) -> String {
        if self.name == NOTHING {
            return self.words.to_owned();
        }
        format!("{} {}", self.words.replace("PORT", &port.to_string()), self.count)
    }
}

/// The job without work: what the others' figures hold besides theirs.
const NOTHING: &str = "io.nothing";

const fn disk(name: &'static str, words: &'static str, count: u32, unit: &'static str) -> Job {
    Job { name, words, count, unit, side: Side::None, on_host: true }
}

const fn net(name: &'static str, words: &'static str, count: u32, unit: &'static str, side: Side) -> Job {
    Job { name, words, count, unit, side, on_host: true }
}

const fn vsock(name: &'static str, words: &'static str, count: u32, side: Side) -> Job {
    Job { name, words, count, unit: "MiB", side, on_host: false }
}

/// All of them.
pub(super) const JOBS: [Job; 14] = [
    Job { name: NOTHING, words: "nothing", count: 1, unit: "job", side: Side::None, on_host: false },
    disk("blk.read_4k", "disk read random 4096 1", 2000, "4 KiB"),
    disk("blk.write_4k", "disk write random 4096 1", 2000, "4 KiB"),
    disk("blk.read_4k_32", "disk read random 4096 32", 6400, "4 KiB, 32 at once"),
    disk("blk.write_4k_32", "disk write random 4096 32", 6400, "4 KiB, 32 at once"),
    disk("blk.read_1m", "disk read sequential 1048576 1", 64, "MiB"),
    disk("blk.write_1m", "disk write sequential 1048576 1", 64, "MiB"),
    net("net.tcp_send", "send PORT", 64, "MiB", Side::Sink),
    net("net.tcp_receive", "receive PORT", 64, "MiB", Side::Source),
    net("net.tcp_echo", "echo PORT", 1000, "byte and back", Side::Echo),
    net("net.udp_send", "burst-send PORT", 6400, "64 B, in bursts of 64", Side::BurstSink),
    net("net.udp_receive", "burst-receive PORT", 6400, "64 B, in bursts of 64", Side::BurstSource),
    vsock("vsock.send", "vsock-send PORT", 32, Side::VsockSink),
    vsock("vsock.receive", "vsock-receive PORT", 32, Side::VsockSource),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_said_in_one_line() {
        assert_eq!(JOBS[0].line(7), "nothing");
        assert_eq!(JOBS[7].line(7), "send 7 64");
        assert_eq!(JOBS[1].line(7), "disk read random 4096 1 2000");
    }
}
