//! The VMM alone on the plain kernel, from exec to the first line of user space: the figure that VMMs are compared by.
//! Beside it, run by run, QEMU's smallest machine on the same kernel and initrd.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use vmm_control::EventKind;

use crate::phases::{events, find, minstr, now};
use crate::repeat::repeat;
use crate::report::{Report, Samples};
use crate::{Place, kvm};

/// What the plain initrd's `/init` prints.
const LINE: &str = "HELLO-FROM-GUEST";

const QEMU: &str = "qemu-system-x86_64";

/// What Debian's QEMU can leave out of its microvm machine.
const MICROVM: &str = "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on,auto-kernel-cmdline=off";

/// What our VMM tells any kernel that has a serial port, but for what is its own machine's.
const OPTIONS: &str = "panic=-1 noreplace-smp console=ttyS0 8250.nr_uarts=1 pty.legacy_count=0";

/// Measures `boot.plain.*`, of it what comes before the guest, and `qemu_microvm.boot.plain.*`.
pub(crate) async fn measure(place: &Place, report: &mut Report) -> Result<()> {
    let mut samples = Samples::default();
    for (boot, peer) in repeat("boot.plain", place.runs, async || Ok((boot(place)?, qemu_microvm(place)?))).await? {
        samples.add("boot.plain.minstr", minstr(boot.begun, boot.seen));
        samples.add("boot.plain.exits", boot.exits);
        samples.add("boot.before_guest.minstr", minstr(boot.begun, boot.loaded));
        samples.add("boot.plain.spawn.minstr", minstr(boot.begun, boot.started));
        samples.add("boot.plain.set_up.minstr", minstr(boot.started, boot.loaded));
        samples.add("boot.plain.guest.minstr", minstr(boot.loaded, boot.seen));
        samples.add("qemu_microvm.boot.plain.minstr", minstr(peer.0, peer.1));
        samples.add("qemu_microvm.boot.plain.exits", peer.2);
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
    command.arg("--kernel").arg(kernel(&place.plain)).arg("--initrd").arg(place.plain.join("initrd.cpio"));
    command.args(["--cpus", "1", "--memory", "128", "--cmdline", "quiet"]);
    let begun = now()?;
    let (mut pericarp, seen) = until_line(&mut command)?;
    let vmm = kvm::children(pericarp.id())?.first().copied().context("`pericarp boot` has no VMM")?;
    let exits = kvm::counter(vmm, "exits")?;
    // Ctrl-A x, as a person would.
    pericarp.stdin.take().context("its input is a pipe")?.write_all(b"\x01x")?;
    pericarp.wait()?;
    let events = events(&log)?;
    let moment = |kind| find(&events, &kind).map(|event| event.at_ns).context("the VMM left out an event");
    let (started, loaded) = (moment(EventKind::Started)?, moment(EventKind::Loaded)?);
    fs::remove_file(&log)?;
    Ok(Boot { begun, started, loaded, seen, exits })
}

/// Boots it in QEMU: when that began, when the line was read, and exits up to then.
fn qemu_microvm(place: &Place) -> Result<(u64, u64, f64)> {
    let mut command = Command::new(QEMU);
    command.args(["-M", MICROVM, "-bios", "qboot.rom", "-accel", "kvm", "-cpu", "host", "-m", "128", "-smp", "1"]);
    command.args(["-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio", "-no-reboot"]);
    command.arg("-kernel").arg(kernel(&place.plain)).arg("-initrd").arg(place.plain.join("initrd.cpio"));
    command.args(["-append", &format!("{OPTIONS} quiet")]);
    let begun = now()?;
    let (mut qemu, seen) = until_line(&mut command)?;
    let exits = kvm::counter(qemu.id(), "exits")?;
    qemu.kill()?;
    qemu.wait()?;
    Ok((begun, seen, exits))
}

fn kernel(plain: &Path) -> PathBuf {
    plain.join("vmlinux")
}

/// Starts a VMM whose guest speaks on its standard output; returns when it has said the line.
fn until_line(command: &mut Command) -> Result<(Child, u64)> {
    let program = command.get_program().to_owned();
    let started = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut vmm = started.with_context(|| format!("starting {}", program.display()))?;
    for line in BufReader::new(vmm.stdout.take().context("its output is a pipe")?).lines() {
        if line?.contains(LINE) {
            return Ok((vmm, now()?));
        }
    }
    bail!("{} ended without the guest's line: {}", program.display(), vmm.wait()?)
}
