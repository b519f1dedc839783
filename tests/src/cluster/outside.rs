//! A host outside of the cluster, as far as a lab can have one: a network namespace at the other end of the node's one link.

use std::process::{Command, Stdio};

use super::{ADDRESS, ADDRESS_V6};
use crate::node::{Call, run};

const NETNS: &str = "outside";

/// The host outside.
#[derive(Debug)]
pub struct Outside;

impl Outside {
    /// Its addresses.
    pub const ADDRESS: &str = "10.9.0.254";
    /// Of IPv6.
    pub const ADDRESS_V6: &str = "fd00:10:9::254";

    /// Gives the node its link and its default routes.
    pub(super) fn connect() {
        let batch = format!(
            "netns add {NETNS}
             link add uplink type veth peer name eth0 netns {NETNS}
             addr add {ADDRESS}/24 dev uplink
             addr add {ADDRESS_V6}/64 dev uplink nodad
             link set uplink up
             -n {NETNS} link set lo up
             -n {NETNS} addr add {v4}/24 dev eth0
             -n {NETNS} addr add {v6}/64 dev eth0 nodad
             -n {NETNS} link set eth0 up
             route add default via {v4} dev uplink
             -6 route add default via {v6} dev uplink",
            v4 = Self::ADDRESS,
            v6 = Self::ADDRESS_V6,
        );
        for line in batch.lines() {
            run(Command::new("ip").args(line.split_whitespace())).ok();
        }
    }

    /// A program to run there.
    pub fn command(program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", NETNS, program]).stdin(Stdio::null());
        command
    }

    /// Runs a program there, in a shell.
    pub fn sh(script: &str) -> Call {
        run(Self::command("sh").args(["-c", script]))
    }
}
