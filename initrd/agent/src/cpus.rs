//! CPUs beyond the first: the kernel is told to leave them (`maxcpus=1`), so that the agent is ready before they are.

use std::fs;
use std::path::Path;

use nix::errno::Errno;

use crate::kmsg;

const CPUS: &str = "/sys/devices/system/cpu";

/// Brings up every CPU that is present. One that will not come is told of and done without.
pub(crate) fn bring_up() {
    for number in 1.. {
        // CPU 0 and what is not there have no such file.
        let switch = Path::new(CPUS).join(format!("cpu{number}/online"));
        match fs::write(switch, "1") {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => break,
            Err(error) => kmsg::say(&format!("CPU {number} stays down: {error}")),
        }
    }
}
