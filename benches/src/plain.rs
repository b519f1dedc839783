//! The VMM alone on the plain kernel, from exec to the first line of user space: the figure that VMMs are compared by.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use vmm_control::EventKind;

use crate::phases::{events, find, minstr, now};
use crate::report::{Report, Samples};
use crate::{Place, WARM_UPS, kvm};

/// What the plain initrd's `/init` prints.
const LINE: &str = "HELLO-FROM-GUEST";

/// Measures `boot.plain.*`, and of it what comes before the guest.
pub(crate) fn measure(place: &Place, report: &mut Report) -> Result<()> {
    let mut samples = Samples::default();
    for run in 0..WARM_UPS + place.runs {
        let boot = boot(place).context("booting the plain kernel")?;
        if run >= WARM_UPS {
            samples.add("boot.plain.minstr", minstr(boot.begun, boot.seen));
            samples.add("boot.plain.exits", boot.exits);
            samples.add("boot.before_guest.minstr", minstr(boot.begun, boot.loaded));
        }
    }
    report.take(samples);
    Ok(())
}

/// A boot of the plain kernel: moments on the clock of [`now`], and exits up to the line.
pub(crate) struct Boot {
    begun: u64,
    /// The VMM is about to start the guest.
    loaded: u64,
    /// The line was read.
    pub(crate) seen: u64,
    exits: f64,
}

/// Boots it once.
pub(crate) fn boot(place: &Place) -> Result<Boot> {
    let log = place.work.join("plain.events");
    let mut command = Command::new(place.program("pericarp"));
    command.arg("boot").arg("--console").arg("--vmm").arg(place.library("pericarp-vmm")).arg("--events").arg(&log);
    command.arg("--kernel").arg(place.plain.join("vmlinux")).arg("--initrd").arg(place.plain.join("initrd.cpio"));
    command.args(["--cpus", "1", "--memory", "128", "--cmdline", "reboot=t quiet"]);
    let begun = now()?;
    let mut pericarp = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let output = BufReader::new(pericarp.stdout.take().context("its output is a pipe")?);
    let mut seen = None;
    for line in output.lines() {
        if line?.contains(LINE) {
            seen = Some(now()?);
            break;
        }
    }
    let Some(seen) = seen else { bail!("the guest ended without its line: {}", pericarp.wait()?) };
    let exits = kvm::counter(child(pericarp.id())?, "exits")?;
    // Ctrl-A x, as a person would.
    pericarp.stdin.take().context("its input is a pipe")?.write_all(b"\x01x")?;
    pericarp.wait()?;
    let events = events(&log)?;
    let loaded = find(&events, &EventKind::Loaded).context("the VMM did not say that it starts the guest")?;
    fs::remove_file(&log)?;
    Ok(Boot { begun, loaded: loaded.at_ns, seen, exits })
}

/// The only child of a process.
fn child(parent: u32) -> Result<u32> {
    kvm::children(parent)?.first().copied().context("`pericarp boot` has no VMM")
}
