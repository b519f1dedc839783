//! The agent's own voice: the kernel's log, which ends up in the guest's console; standard error outside a guest.

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::OnceLock;

static IN_GUEST: OnceLock<bool> = OnceLock::new();

/// Says once where the agent runs; until then it speaks to standard error.
pub(crate) fn set_in_guest(in_guest: bool) {
    IN_GUEST.get_or_init(|| in_guest);
}

/// One line. Losing it is not an error.
pub(crate) fn say(text: &str) {
    if IN_GUEST.get() != Some(&true) {
        return eprintln!("pericarp-init: {text}");
    }
    if let Ok(mut kmsg) = OpenOptions::new().write(true).open("/dev/kmsg") {
        drop(kmsg.write_all(format!("<4>pericarp-init: {text}\n").as_bytes()));
    }
}
