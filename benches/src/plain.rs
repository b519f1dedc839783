//! The VMM alone on the plain kernel, from exec to the first line of user space: the figure that VMMs are compared by.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::kvm;
use crate::report::Report;

/// What the plain initrd's `/init` prints.
const LINE: &str = "HELLO-FROM-GUEST";

/// The first run fills the page cache.
const WARM_UPS: usize = 1;

/// Measures `boot.plain.*`.
pub(crate) fn measure(root: &Path, plain: &Path, runs: usize, report: &mut Report) -> Result<()> {
    let (mut instructions, mut exits) = (Vec::new(), Vec::new());
    for run in 0..WARM_UPS + runs {
        let (minstr, count) = boot(root, plain).context("booting the plain kernel")?;
        if run >= WARM_UPS {
            instructions.push(minstr);
            exits.push(count);
        }
    }
    report.median("boot.plain.minstr", instructions);
    report.median("boot.plain.exits", exits);
    Ok(())
}

fn boot(root: &Path, plain: &Path) -> Result<(f64, f64)> {
    let mut command = Command::new(root.join("usr/bin/pericarp"));
    command.arg("boot").arg("--console").arg("--vmm").arg(root.join("usr/lib/pericarp/pericarp-vmm"));
    command.arg("--kernel").arg(plain.join("vmlinux")).arg("--initrd").arg(plain.join("initrd.cpio"));
    command.args(["--cpus", "1", "--memory", "128", "--cmdline", "console=ttyS0 reboot=t panic=-1 quiet"]);
    let started = Instant::now();
    let mut pericarp = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let output = BufReader::new(pericarp.stdout.take().context("its output is a pipe")?);
    let mut seen = None;
    for line in output.lines() {
        if line?.contains(LINE) {
            seen = Some(started.elapsed());
            break;
        }
    }
    let Some(elapsed) = seen else { bail!("the guest ended without its line: {}", pericarp.wait()?) };
    let vmm = child(pericarp.id())?;
    let exits = kvm::counter(vmm, "exits")?;
    // Ctrl-A x, as a person would.
    std::io::Write::write_all(&mut pericarp.stdin.take().context("its input is a pipe")?, b"\x01x")?;
    pericarp.wait()?;
    Ok((elapsed.as_secs_f64() * 1e3, exits))
}

/// The only child of a process.
fn child(parent: u32) -> Result<u32> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
    children.split_whitespace().next().context("`pericarp boot` has no VMM")?.parse().context("a process id")
}
