//! Counted benchmarks: run inside the lab by `benches/run`, each figure in millions of instructions, exits or KiB.
//!
//! The lab's clock counts executed instructions, one a nanosecond, so a difference of `CLOCK_MONOTONIC` is a count of
//! instructions: lab kernel, VMM and guest together.

mod kvm;
mod plain;
mod report;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

use crate::report::Report;

/// Runs every benchmark and prints the report.
#[derive(Debug, Parser)]
struct Arguments {
    /// An installed tree.
    #[arg(long)]
    root: PathBuf,
    /// Directory of the plain kernel and initrd on which VMMs are compared.
    #[arg(long)]
    plain: PathBuf,
    /// Where to write the figures as one flat JSON object.
    #[arg(long)]
    json: PathBuf,
    /// Times each measurement is repeated; the median counts.
    #[arg(long, default_value_t = 5)]
    runs: usize,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut report = Report::default();
    plain::measure(&arguments.root, &arguments.plain, arguments.runs, &mut report)?;
    report.print();
    report.write(&arguments.json)
}
