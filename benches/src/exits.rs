//! Why a guest was left, and what the VMM asked of the host's kernel, in one traced boot of each kind.

use anyhow::{Context, Result};
use cri_shim::pod::Pods;
use vmm_control::{Event, EventKind};

use crate::minimal::Minimal;
use crate::phases::find;
use crate::report::{Report, Samples};
use crate::trace::{Counts, Trace};
use crate::{Place, boot, kvm, plain};

/// Lines of details printed of each boot.
const MOST_DETAILS: usize = 200;

/// Counts `boot.*.exit.*` and `boot.*.syscalls`.
pub(crate) async fn measure(place: &Place, minimal: &Minimal, pods: &Pods, report: &mut Report) -> Result<()> {
    let mut samples = Samples::default();
    // The spawners and this process, which starts the VMM on the plain kernel.
    let own = std::process::id();
    let mut starters = kvm::children(own)?;
    starters.push(own);

    let trace = Trace::start(&starters)?;
    let (_, events) = minimal.boot(1).await?;
    note("boot.min", &trace.stop(&starters, 0..=ready(&events)?)?, &mut samples);

    let trace = Trace::start(&starters)?;
    let pod = boot::pod(pods).await?;
    note("boot.own", &trace.stop(&starters, 0..=ready(&pod.events)?)?, &mut samples);

    let trace = Trace::start(&starters)?;
    let boot = plain::boot(place)?;
    note("boot.plain", &trace.stop(&starters, 0..=boot.seen)?, &mut samples);
    report.take(samples);
    Ok(())
}

fn ready(events: &[Event]) -> Result<u64> {
    Ok(find(events, &EventKind::AgentConnected).context("the agent is not ready")?.at_ns)
}

fn note(name: &str, counts: &Counts, samples: &mut Samples) {
    println!("{name}: exits by reason");
    let mut exits: Vec<_> = counts.exits.iter().collect();
    exits.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    for (reason, count) in exits {
        println!("  {count:>6}  {reason}");
        samples.add(format!("{name}.exit.{reason}"), *count as f64);
    }
    println!("{name}: what they were for");
    let mut details: Vec<_> = counts.details.iter().collect();
    details.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    for (detail, count) in details.iter().take(MOST_DETAILS) {
        println!("  {count:>6}  {detail}");
    }
    println!("{name}: system calls of the VMM by number");
    let mut calls: Vec<_> = counts.syscalls.iter().collect();
    calls.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    for (number, count) in &calls {
        println!("  {count:>6}  {number}");
    }
    samples.add(format!("{name}.syscalls"), counts.syscalls.values().sum::<u64>() as f64);
}
