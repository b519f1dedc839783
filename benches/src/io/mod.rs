//! Disk, network and vsock: what each operation costs in instructions and exits, in our VMM, in QEMU's smallest machine on the
//! same kernel and initrd, and, as far as there is such a thing, on the host itself.
//!
//! The three take turns job by job, run by run, and are otherwise idle.

mod jobs;
mod machine;
mod peer;
mod tap;

use std::fmt::Write;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};

use self::jobs::{JOBS, Job};
use self::machine::Machine;
use self::peer::Peer;
use crate::Place;
use crate::phases::now;
use crate::repeat::repeat;
use crate::report::{Report, Samples};
use crate::trace::Trace;

/// Bytes of the disk; the load uses as many.
const DISK_BYTES: u64 = 64 << 20;

/// What is compared, and how its figures are called.
const CONTESTANTS: [(&str, Kind); 3] = [("", Kind::Pericarp), ("qemu_microvm.", Kind::Qemu), ("host.", Kind::Host)];

/// Jobs whose exits are told by reason, in one more run that is not counted.
const EXPLAINED: [&str; 4] = ["blk.read_4k", "blk.read_4k_32", "net.tcp_echo", "net.udp_receive"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pericarp,
    Qemu,
    Host,
}

/// Measures `blk.*`, `net.*` and `vsock.*`; returns the table.
pub(crate) async fn measure(place: &Place, report: &mut Report) -> Result<String> {
    let directory = place.work.join("io");
    fs::create_dir_all(&directory)?;
    let mut machines = Vec::new();
    for (prefix, kind) in CONTESTANTS {
        let disk = directory.join(format!("{kind:?}.disk"));
        fill(&disk)?;
        machines.push((prefix, Machine::start(place, kind, &directory, &disk)?));
    }
    let mut samples = Samples::default();
    for job in JOBS.iter().filter(|job| job.name.starts_with(&place.jobs)) {
        let rounds = repeat(job.name, place.runs, async || round(&mut machines, job)).await?;
        for (name, value) in rounds.into_iter().flatten() {
            samples.add(name, value);
        }
        for (prefix, machine) in machines.iter_mut().filter(|(_, machine)| machine.kind != Kind::Host) {
            if EXPLAINED.contains(&job.name) {
                explain(prefix, machine, job)?;
            }
        }
        println!("{} is measured", job.name);
    }
    for (_, machine) in machines {
        machine.end()?;
    }
    fs::remove_dir_all(&directory)?;
    report.take(samples);
    table(report)
}

/// A disk without holes, so that no run is the first to write somewhere.
fn fill(path: &Path) -> Result<()> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    let piece = vec![0x5a; 1 << 20];
    for offset in (0..DISK_BYTES).step_by(piece.len()) {
        std::os::unix::fs::FileExt::write_all_at(&file, &piece, offset)?;
    }
    Ok(())
}

/// Has each contestant do a job once.
fn round(machines: &mut [(&str, Machine)], job: &Job) -> Result<Vec<(String, f64)>> {
    let mut figures = Vec::new();
    for (prefix, machine) in machines {
        if machine.kind == Kind::Host && !job.on_host {
            continue;
        }
        let (instructions, exits) = once(machine, job).with_context(|| format!("{prefix}{}", job.name))?;
        let count = f64::from(job.operations());
        figures.push((format!("{prefix}{}.kinstr", job.name), instructions / 1e3 / count));
        if machine.kind != Kind::Host {
            figures.push((format!("{prefix}{}.exits_per_op", job.name), exits / count));
        }
    }
    Ok(figures)
}

/// Instructions and exits of one job, from the word to begin to the word that it is done.
fn once(machine: &mut Machine, job: &Job) -> Result<(f64, f64)> {
    let peer = Peer::listen(job.side, job.count)?;
    machine.prepare(job, &peer)?;
    let peer = peer.serve(machine.way())?;
    machine.expect("ready")?;
    let (begun, exits) = (now()?, machine.exits()?);
    machine.say("")?;
    machine.expect("done")?;
    let (ended, more_exits) = (now()?, machine.exits()?);
    peer.join().ok().context("the peer panicked")??;
    Ok(((ended - begun) as f64, more_exits - exits))
}

/// Prints why the guest was left.
fn explain(prefix: &str, machine: &mut Machine, job: &Job) -> Result<()> {
    let trace = Trace::start(&machine.threads()?)?;
    once(machine, job)?;
    let counts = trace.stop(&[], now()?)?;
    println!("{prefix}{}: exits of {} by reason, and what they were for", job.name, job.operations());
    for (what, count) in counts.exits.iter().chain(&counts.details).filter(|(_, count)| **count > 50) {
        println!("  {count:>6}  {what}");
    }
    Ok(())
}

/// The figures side by side, in Markdown.
fn table(report: &Report) -> Result<String> {
    let mut text = String::from(
        "| operation | k instructions | QEMU | ratio | host | ratio | exits | QEMU | ratio |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    for job in &JOBS {
        let get = |prefix: &str, unit: &str| report.get(&format!("{prefix}{}.{unit}", job.name));
        let Some((ours, exits)) = get("", "kinstr").zip(get("", "exits_per_op")) else { continue };
        write!(text, "| `{}` ({}) | {ours:.2}", job.name, job.unit)?;
        for prefix in ["qemu_microvm.", "host."] {
            match get(prefix, "kinstr") {
                Some(theirs) => write!(text, " | {theirs:.2} | {:.2}", theirs / ours)?,
                None => write!(text, " | – | –")?,
            }
        }
        write!(text, " | {exits:.3}")?;
        match get("qemu_microvm.", "exits_per_op") {
            Some(theirs) => writeln!(text, " | {theirs:.3} | {:.2} |", theirs / exits)?,
            None => writeln!(text, " | – | – |")?,
        }
    }
    Ok(text)
}
