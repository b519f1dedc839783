//! Disk, network and vsock: what each operation costs in instructions and exits, in our VMM, in QEMU's smallest machine on the
//! same kernel and initrd, and, as far as there is such a thing, on the host itself.
//!
//! The three take turns job by job, run by run, and are otherwise idle.

mod jobs;
mod machine;
mod memory;
mod peer;
mod tap;

use std::fmt::Write;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};

use self::jobs::{JOBS, Job};
use self::machine::{Machine, Shape};
pub(crate) use self::memory::measure as measure_memory;
use self::peer::Peer;
use crate::Place;
use crate::phases::now;
use crate::repeat::repeat;
use crate::report::{Report, Samples};
use crate::trace::Trace;

/// Bytes of the disk; the load uses as many.
const DISK_BYTES: u64 = 64 << 20;

/// Guests of all jobs but those of memory.
const SHAPE: Shape = Shape { memory_mib: 256, gives_back: false };

/// What is compared, and how its figures are called.
const CONTESTANTS: [(&str, Kind); 3] = [("", Kind::Pericarp), ("qemu_microvm.", Kind::Qemu), ("host.", Kind::Host)];

/// Jobs whose exits are printed by reason.
const EXPLAINED: [&str; 5] = ["blk.read_4k", "blk.read_4k_32", "blk.read_1m", "net.tcp_echo", "net.udp_receive"];

/// Exits that only the lab's guests have: one for each interrupt that is injected and, since that takes back KVM's paravirtual end of
/// interrupt, one for its end.
const LABS_OWN: [&str; 2] = ["interrupt", "msr write 80b"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pericarp,
    Qemu,
    Host,
}

/// Measures `blk.*`, `net.*` and `vsock.*`; returns the table.
pub(crate) async fn measure(place: &Place, report: &mut Report) -> Result<String> {
    let directory = place.work.join("io");
    let mut machines = start(place, SHAPE, &directory)?;
    let mut samples = Samples::default();
    for job in JOBS.iter().filter(|job| job.name.starts_with(&place.jobs)) {
        let rounds = repeat(job.name, place.runs, async || round(&mut machines, job)).await?;
        samples.extend(rounds.into_iter().flatten());
        for (prefix, machine) in machines.iter_mut().filter(|(_, machine)| machine.kind != Kind::Host) {
            let own = own_exits(prefix, machine, job)?;
            samples.add(format!("{prefix}{}.own_exits_per_op", job.name), own / f64::from(job.operations()));
        }
        println!("{} is measured", job.name);
    }
    end(machines, &directory)?;
    report.take(samples);
    table(report)
}

/// A contestant, and how its figures are called.
type Contestant = (&'static str, Machine);

/// Starts all of them with disks in a new directory.
fn start(place: &Place, shape: Shape, directory: &Path) -> Result<Vec<Contestant>> {
    fs::create_dir_all(directory)?;
    let mut machines = Vec::new();
    for (prefix, kind) in CONTESTANTS {
        let disk = directory.join(format!("{kind:?}.disk"));
        fill(&disk)?;
        machines.push((prefix, Machine::start(place, kind, shape, directory, &disk)?));
    }
    Ok(machines)
}

/// Ends them, and removes the directory.
fn end(machines: Vec<Contestant>, directory: &Path) -> Result<()> {
    for (_, machine) in machines {
        machine.end()?;
    }
    Ok(fs::remove_dir_all(directory)?)
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
fn round(machines: &mut [Contestant], job: &Job) -> Result<Vec<(String, f64)>> {
    let mut all = Vec::new();
    for (prefix, machine) in machines.iter_mut().filter(|(_, machine)| machine.kind != Kind::Host || job.on_host) {
        all.extend(figures(prefix, machine, job)?);
    }
    Ok(all)
}

/// Has one do a job once.
fn figures(prefix: &str, machine: &mut Machine, job: &Job) -> Result<Vec<(String, f64)>> {
    let Done { begun, ended, exits } = once(machine, job).with_context(|| format!("{prefix}{}", job.name))?;
    let count = f64::from(job.operations());
    let mut figures = vec![(format!("{prefix}{}.kinstr", job.name), (ended - begun) as f64 / 1e3 / count)];
    if machine.kind != Kind::Host {
        figures.push((format!("{prefix}{}.exits_per_op", job.name), exits / count));
    }
    Ok(figures)
}

/// A job that was done: when it began and ended, and exits in between.
struct Done {
    begun: u64,
    ended: u64,
    exits: f64,
}

/// Does one job, from the word to begin to the word that it is done.
fn once(machine: &mut Machine, job: &Job) -> Result<Done> {
    let peer = Peer::listen(job.side, job.count)?;
    machine.prepare(job, &peer)?;
    let peer = peer.serve(machine.way())?;
    machine.expect("ready")?;
    let (begun, exits) = (now()?, machine.exits()?);
    machine.say("")?;
    machine.expect("done")?;
    let (ended, more_exits) = (now()?, machine.exits()?);
    peer.join().ok().context("the peer panicked")??;
    Ok(Done { begun, ended, exits: more_exits - exits })
}

/// Exits that are not the lab's own, in one more run that is not counted; says what they were for.
fn own_exits(prefix: &str, machine: &mut Machine, job: &Job) -> Result<f64> {
    let trace = Trace::start(&machine.threads()?)?;
    let done = once(machine, job)?;
    let counts = trace.stop(&[], done.begun..=done.ended)?;
    if EXPLAINED.contains(&job.name) {
        println!("{prefix}{}: exits of {} by reason, and what they were for", job.name, job.operations());
        for (what, count) in counts.exits.iter().chain(&counts.details).filter(|(_, count)| **count > 50) {
            println!("  {count:>6}  {what}");
        }
    }
    let labs: u64 = LABS_OWN.iter().filter_map(|what| counts.exits.get(*what).or(counts.details.get(*what))).sum();
    let all: u64 = counts.exits.values().sum();
    Ok((all - labs) as f64)
}

/// The figures side by side, in Markdown.
fn table(report: &Report) -> Result<String> {
    let mut text = format!(
        "| operation | {} | QEMU | ratio | host | ratio | exits | QEMU | ratio | but the lab's own | QEMU | ratio |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|\n",
        report.clock.thousand()
    );
    for job in &JOBS {
        let get = |prefix: &str, unit: &str| report.get(&format!("{prefix}{}.{unit}", job.name));
        let Some(ours) = get("", "kinstr") else { continue };
        write!(text, "| `{}` ({}) | {ours:.2}", job.name, job.unit)?;
        for (prefix, unit, digits) in [
            ("qemu_microvm.", "kinstr", 2),
            ("host.", "kinstr", 2),
            ("qemu_microvm.", "exits_per_op", 3),
            ("qemu_microvm.", "own_exits_per_op", 3),
        ] {
            let Some(ours) = get("", unit) else { continue };
            if unit != "kinstr" {
                write!(text, " | {ours:.digits$}")?;
            }
            match get(prefix, unit) {
                Some(theirs) => write!(text, " | {theirs:.digits$} | {:.2}", theirs / ours)?,
                None => text.push_str(" | – | –"),
            }
        }
        text.push_str(" |\n");
    }
    Ok(text)
}
