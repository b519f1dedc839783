//! PID 1 of a pod's guest.
//!
//! It listens, tells the host that it does, mounts what every pod needs while the host answers, and then serves.
//! Everything that makes the guest a certain pod comes later, in one message.
//!
//! `pericarp-init --unix DIR [--disk DEVICE]` runs the same agent as an ordinary process that is the first of its own
//! namespaces, on unix sockets in DIR: for tests on any machine.

mod agent;
mod capabilities;
mod census;
mod cgroup;
mod configure;
mod connection;
mod container;
mod cpus;
mod devices;
mod disk;
mod fault;
mod files;
mod forward;
mod kmsg;
mod log;
mod memory;
mod mounts;
mod netlink;
mod plan;
mod poll;
mod process;
mod rootfs;
mod server;
mod session;
mod stdio;
mod sys;
mod task;
mod time;
mod transport;
mod userns;
mod users;
mod verity;

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use nix::sys::resource::{Resource, setrlimit};

use crate::agent::Agent;
use crate::transport::Transport;

/// The disk that the VMM gives every pod.
const POD_DISK: &str = "/dev/vda";

/// The kernel ends this process last when memory runs out.
const OOM_SCORE_ADJ: &str = "-1000";

/// Most open files of the agent and of any container that does not ask for more.
const OPEN_FILES: u64 = 524_288;

struct Options {
    transport: Transport,
    disk: PathBuf,
}

impl Options {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self { transport: Transport::Vsock, disk: POD_DISK.into() };
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word} wants a value"));
            match word.as_str() {
                "--unix" => options.transport = Transport::Unix(value()?.into()),
                "--disk" => options.disk = value()?.into(),
                // The kernel hands on what it does not know of its command line.
                _ => {}
            }
        }
        Ok(options)
    }
}

fn live() -> Result<(), Box<dyn Error>> {
    let options = Options::parse(std::env::args().skip(1))?;
    let in_guest = options.transport.in_guest();
    kmsg::set_in_guest(in_guest);
    let mut agent = Agent::new(options.transport, options.disk)?;
    agent.transport.say_ready()?;
    mounts::prepare_system(in_guest)?;
    mounts::prepare()?;
    cgroup::prepare()?;
    if in_guest {
        fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ)?;
        setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)?;
    }
    agent.run()?;
    Ok(())
}

fn main() -> ExitCode {
    let Err(error) = live() else { return ExitCode::SUCCESS };
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    kmsg::say(&text);
    ExitCode::FAILURE
}
