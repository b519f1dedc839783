//! A program of the node that runs in the background. It outlives the test binary that started it, so that another one in
//! the same lab finds it again by the pid it left.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::node::wait_until;

/// How a program is started, and where its pid and its log are.
#[derive(Clone, Debug)]
pub(super) struct Service {
    name: &'static str,
    directory: PathBuf,
    program: PathBuf,
    arguments: Vec<String>,
}

impl Service {
    pub(super) fn new(name: &'static str, directory: &Path, program: PathBuf, arguments: Vec<String>) -> Self {
        Self { name, directory: directory.to_owned(), program, arguments }
    }

    #[expect(clippy::zombie_processes, reason = "`end` and `runs` wait for it by its pid")]
    pub(super) fn start(&self) {
        let log =
            fs::File::options().append(true).create(true).open(self.log_file()).expect("the directory is writable");
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor is to be had"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", self.program.display()));
        fs::write(self.pid_file(), child.id().to_string()).expect("the directory is writable");
    }

    /// Ends it by a signal and waits until it is gone.
    pub(super) fn end(&self, signal: Signal) {
        let pid = self.pid();
        kill(pid, signal).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        wait_until(&format!("{} to end", self.name), || {
            // A child is to be waited for; one that another test binary left behind is not ours to.
            let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG));
            !Path::new(&format!("/proc/{pid}")).exists()
        });
    }

    /// Whether it has not ended by itself.
    pub(super) fn runs(&self) -> bool {
        let pid = self.pid();
        let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG));
        Path::new(&format!("/proc/{pid}")).exists()
    }

    pub(super) fn pid(&self) -> Pid {
        let text = fs::read_to_string(self.pid_file()).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        Pid::from_raw(text.parse().expect("a pid"))
    }

    /// The end of what it wrote.
    pub(super) fn log_tail(&self, lines: usize) -> String {
        let log = fs::read(self.log_file()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let mut tail: Vec<&str> = log.lines().rev().take(lines).collect();
        tail.reverse();
        tail.iter().map(|line| format!("{}: {line}\n", self.name)).collect()
    }

    fn pid_file(&self) -> PathBuf {
        self.directory.join(format!("{}.pid", self.name))
    }

    fn log_file(&self) -> PathBuf {
        self.directory.join(format!("{}.log", self.name))
    }
}
