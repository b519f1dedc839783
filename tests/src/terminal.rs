//! A terminal with a program on it, as a person at a keyboard has.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use nix::pty::openpty;
use nix::unistd::ttyname;

use crate::node::{LOOK_AGAIN, PATIENCE};

/// A pseudoterminal and the program whose controlling terminal it is.
#[derive(Debug)]
pub struct Terminal {
    keyboard: File,
    /// Kept open, so that what the terminal is set to outlives the program.
    _slave: OwnedFd,
    path: PathBuf,
    screen: Arc<Mutex<String>>,
    program: Child,
}

impl Terminal {
    /// Runs a program on a terminal of that size.
    pub fn run(command: &Command, rows: u16, columns: u16) -> Self {
        let pty = openpty(None, None).expect("a pseudoterminal");
        let path = ttyname(&pty.slave).expect("a terminal has a name");
        stty(&path, &["rows", &rows.to_string(), "cols", &columns.to_string()]);
        let copy = || Stdio::from(pty.slave.try_clone().expect("a descriptor is to be had"));
        // A session of its own, led by the program, with the terminal as its controlling one.
        let mut setsid = Command::new("setsid");
        setsid.env("TERM", "xterm").arg("--ctty").arg("--wait").arg(command.get_program()).args(command.get_args());
        let program = setsid.stdin(copy()).stdout(copy()).stderr(copy()).spawn().expect("setsid runs");
        let keyboard = File::from(pty.master);
        let screen = Arc::<Mutex<String>>::default();
        let (mut from, to) = (keyboard.try_clone().expect("a descriptor is to be had"), Arc::clone(&screen));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                to.lock().expect("no panic").push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        Self { keyboard, _slave: pty.slave, path, screen, program }
    }

    /// Types.
    pub fn type_in(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).expect("the terminal takes what is typed");
    }

    /// Gives the window another size, of which its program hears.
    pub fn resize(&self, rows: u16, columns: u16) {
        stty(&self.path, &["rows", &rows.to_string(), "cols", &columns.to_string()]);
    }

    /// How the terminal is set.
    pub fn settings(&self) -> String {
        stty(&self.path, &["-g"])
    }

    /// All that was ever shown.
    pub fn screen(&self) -> String {
        self.screen.lock().expect("no panic").clone()
    }

    /// Waits until the screen has shown `text` so often.
    #[track_caller]
    pub fn wait_for(&self, text: &str, times: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.screen().matches(text).count() < times {
            assert!(Instant::now() < deadline, "{text:?} was not shown {times} times:\n{}", self.screen());
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Waits for the program's end.
    pub fn wait(&mut self) -> ExitStatus {
        self.program.wait().expect("it is our child")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        drop(self.program.kill());
        drop(self.program.wait());
    }
}

fn stty(path: &Path, arguments: &[&str]) -> String {
    let output = Command::new("stty").arg("-F").arg(path).args(arguments).output().expect("coreutils are installed");
    assert!(output.status.success(), "stty {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
