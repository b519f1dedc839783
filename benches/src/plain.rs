//! The VMM alone on the plain kernel, from exec to the first line of user space: the figure that VMMs are compared by.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use vmm_control::EventKind;

use crate::phases::{events, find, minstr, now};
use crate::repeat::repeat;
use crate::report::{Report, Samples};
use crate::{Place, kvm};

/// What the plain initrd's `/init` prints.
const LINE: &str = "HELLO-FROM-GUEST";

/// Measures `boot.plain.*`, and of it what comes before the guest.
pub(crate) async fn measure(place: &Place, report: &mut Report) -> Result<()> {
    let mut samples = Samples::default();
    for boot in repeat("boot.plain", place.runs, async || boot(place)).await? {
        samples.add("boot.plain.minstr", minstr(boot.begun, boot.seen));
        samples.add("boot.plain.exits", boot.exits);
        samples.add("boot.before_guest.minstr", minstr(boot.begun, boot.loaded));
        samples.add("boot.plain.spawn.minstr", minstr(boot.begun, boot.started));
        samples.add("boot.plain.set_up.minstr", minstr(boot.started, boot.loaded));
        samples.add("boot.plain.guest.minstr", minstr(boot.loaded, boot.seen));
    }
    report.take(samples);
    Ok(())
}

/// A boot of the plain kernel: moments on the clock of [`now`], and exits up to the line.
pub(crate) struct Boot {
    begun: u64,
    /// The VMM's `main` was entered.
    started: u64,
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
    let moment = |kind| find(&events, &kind).map(|event| event.at_ns).context("the VMM left out an event");
    let (started, loaded) = (moment(EventKind::Started)?, moment(EventKind::Loaded)?);
    fs::remove_file(&log)?;
    Ok(Boot { begun, started, loaded, seen, exits })
}

/// The only child of a process.
fn child(parent: u32) -> Result<u32> {
    kvm::children(parent)?.first().copied().context("`pericarp boot` has no VMM")
}
