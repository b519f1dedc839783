//! Memory that is taken and given up.

use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

/// Bytes of a page.
const PAGE: usize = 4096;

/// What was taken and not given up yet.
pub(super) type Held = Rc<RefCell<Vec<Vec<u8>>>>;

/// Takes so many MiB, and touches each page.
pub(super) fn take(held: &Held, mib: usize) {
    // All zeros, and so not touched.
    let mut memory = vec![0_u8; mib << 20];
    memory.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
    held.borrow_mut().push(memory);
}

/// Gives up everything.
pub(super) fn give(held: &Held) {
    held.borrow_mut().clear();
}

/// Finds devices that were plugged in since the boot: what tells the host of memory that nobody uses is one.
pub(super) fn find_devices() -> Result<()> {
    const RESCAN: &str = "/sys/bus/pci/rescan";
    if !Path::new(RESCAN).exists() {
        fs::create_dir_all("/sys")?;
        mount(Some("sys"), "/sys", Some("sysfs"), MsFlags::empty(), None::<&str>).context("mounting /sys")?;
    }
    fs::write(RESCAN, "1").context("looking for devices")
}
