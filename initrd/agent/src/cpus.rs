//! CPUs beyond the first: the kernel is told to leave them (`maxcpus=1`), so that the agent is ready before they are, and
//! the host says how many the pod is to have. The network's queues follow them.

use std::fs;
use std::path::Path;

use nix::errno::Errno;

use crate::{kmsg, sys};

const CPUS: &str = "/sys/devices/system/cpu";
const INTERFACES: &str = "/sys/class/net";

/// Brings up the first `wanted` CPUs and takes the others down; 0 wants every one. One that does not obey is told of and
/// left as it is.
pub(crate) fn set(wanted: u32) {
    let mut up = 1;
    for number in 1.. {
        // CPU 0 and what is not there have no such file.
        let switch = Path::new(CPUS).join(format!("cpu{number}/online"));
        let state = if wanted == 0 || number < wanted { "1" } else { "0" };
        match fs::write(switch, state) {
            Ok(()) => up += u32::from(state == "1"),
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => break,
            Err(error) => kmsg::say(&format!("CPU {number} cannot be set to {state}: {error}")),
        }
    }
    spread_network(up);
}

/// Has each NIC use as many of its pairs of queues as there are CPUs.
fn spread_network(cpus: u32) {
    for interface in fs::read_dir(INTERFACES).into_iter().flatten().flatten() {
        if interface.path().join("device").exists()
            && let Some(name) = interface.file_name().to_str()
            && let Err(error) = sys::set_channels(name, cpus)
        {
            kmsg::say(&format!("{name} cannot use {cpus} pairs of queues: {error}"));
        }
    }
}
