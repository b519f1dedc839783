//! Counted benchmarks: run inside the lab by `benches/run`, each figure in millions of instructions, exits or KiB; on a host that
//! has KVM itself in milliseconds instead.
//!
//! The lab's clock counts executed instructions, one a nanosecond, so a difference of `CLOCK_MONOTONIC` is a count of
//! instructions: lab kernel, VMM and guest together. It changes nothing outside the directory it is given, its cgroup
//! and a network namespace of its own.

mod boot;
mod cri;
mod exits;
mod io;
mod kvm;
mod many;
mod markdown;
mod minimal;
mod phases;
mod plain;
mod repeat;
mod report;
mod smaps;
mod timeline;
mod trace;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Parser, ValueEnum};
use cri_shim::spawner::Spawner;

use crate::minimal::Minimal;
use crate::report::{Clock, Report};

/// Measures, and prints the report.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    place: Place,
    /// Directory for the report: figures as one flat JSON object, and the timeline as text and as a picture.
    #[arg(long)]
    out: PathBuf,
    /// An earlier report.json to compare with: what is worse goes to worse.txt beside the report.
    #[arg(long)]
    baseline: Option<PathBuf>,
    /// The clock is one of time, and does not count instructions.
    #[arg(long)]
    wall_clock: bool,
    /// What to measure; everything if none is named.
    parts: Vec<Part>,
}

/// What is measured, and with what.
#[derive(clap::Args, Debug)]
struct Place {
    /// An installed tree.
    #[arg(long)]
    root: PathBuf,
    /// Directory of the plain kernel and initrd on which VMMs are compared, and of the load for their devices.
    #[arg(long)]
    plain: PathBuf,
    /// Directory of the CNI plugins.
    #[arg(long)]
    cni: PathBuf,
    /// Process of the registry that serves the image; it is ended once that is pulled, so that its work is not counted.
    #[arg(long)]
    registry: i32,
    /// An empty directory in memory to work in.
    #[arg(long)]
    work: PathBuf,
    /// Times each measurement is repeated; the median counts.
    #[arg(long, default_value_t = 7)]
    runs: usize,
    /// Of the part `io` only what begins so, such as `vsock.`.
    #[arg(long, default_value = "")]
    jobs: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The VMM alone on the plain kernel.
    Plain,
    /// Our kernel and agent, up to the agent's word that it is ready.
    Boot,
    /// The same for pods with much memory.
    Large,
    /// Exits by reason and system calls, in boots that are not counted otherwise.
    Exits,
    /// Calls of the CRI.
    Cri,
    /// Pods a second.
    Rate,
    /// Two hundred pods, one after the other.
    Many,
    /// Operations of disk, network and vsock.
    Io,
    /// Memory that a guest takes and gives back.
    Memory,
}

impl Place {
    /// A program, kernel or initrd of the VMM's.
    fn library(&self, name: &str) -> PathBuf {
        self.root.join("usr/lib/pericarp").join(name)
    }

    /// A program for people or for the system.
    fn program(&self, name: &str) -> PathBuf {
        self.root.join("usr/bin").join(name)
    }
}

fn main() -> Result<()> {
    let Arguments { place, out, baseline, wall_clock, parts } = Arguments::parse();
    // Before there is a second thread.
    let spawners = (Spawner::fork()?, Spawner::fork()?, [Spawner::fork()?, Spawner::fork()?]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut report = Report::new(if wall_clock { Clock::Wall } else { Clock::Counted });
    let all =
        [Part::Plain, Part::Boot, Part::Large, Part::Exits, Part::Cri, Part::Rate, Part::Many, Part::Io, Part::Memory];
    let parts = if parts.is_empty() { all.to_vec() } else { parts };
    fs::create_dir_all(&out)?;
    let tables = runtime.block_on(measure(&place, &parts, spawners, &out, &mut report))?;
    report.print();
    print!("{tables}");
    let timeline = timeline::text(&report);
    print!("{timeline}");
    fs::write(out.join("report.md"), markdown::text(&report, &tables))?;
    fs::write(out.join("timeline.txt"), timeline)?;
    timeline::draw(&report, &out.join("timeline.svg"))?;
    if let Some(baseline) = baseline {
        compare(&report, &Report::read(&baseline)?, &out)?;
    }
    report.write(&out.join("report.json"))
}

/// Shows what is worse than before, and the two timelines.
fn compare(now: &Report, before: &Report, out: &Path) -> Result<()> {
    let worse = now.worse_than(before);
    if !worse.is_empty() {
        let lines = format!("worse than benches/baseline.json:\n{}\n", worse.join("\n"));
        let timelines = format!("before:\n{}now:\n{}", timeline::text(before), timeline::text(now));
        fs::write(out.join("worse.txt"), lines + &timelines)?;
    }
    Ok(())
}

/// Measures the parts; returns what is shown in tables of its own.
async fn measure(
    place: &Place,
    parts: &[Part],
    spawners: (Spawner, Spawner, [Spawner; 2]),
    out: &Path,
    report: &mut Report,
) -> Result<String> {
    let mut tables = String::new();
    let (minimal, pods, large) = spawners;
    let minimal = Minimal::new(place, minimal)?;
    let mut large = Some(large);
    let pods = boot::open(place, pods, boot::POD_MIB).await?;
    for part in parts {
        match part {
            Part::Plain => plain::measure(place, report).await?,
            Part::Boot => {
                boot::measure_minimal(place, &minimal, report).await?;
                boot::measure_pod(place, &pods, report).await?;
            }
            Part::Large => {
                if let Some(spawners) = large.take() {
                    boot::measure_large(place, spawners, report).await?;
                }
            }
            Part::Exits => exits::measure(place, &minimal, &pods, report).await?,
            Part::Cri => cri::measure(place, report).await?,
            Part::Rate => cri::measure_rate(place, report).await?,
            Part::Many => many::measure(place, report, &out.join("pods.svg")).await?,
            Part::Io => tables += &io::measure(place, report).await?,
            Part::Memory => io::measure_memory(place, report, &out.join("memory.svg")).await?,
        }
    }
    Ok(tables)
}
