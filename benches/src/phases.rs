//! A boot cut into phases by the events that the VMM writes down.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};
use vmm_control::{Event, EventKind, read_events};

/// A boot, from `begun` on: each phase's name, and the event that ends it.
const PHASES: [(&str, EventKind); 4] = [
    ("spawn", EventKind::Started),
    ("set_up", EventKind::Loaded),
    ("kernel", EventKind::Booted),
    ("user", EventKind::AgentConnected),
];

/// The clock of the VMM's events, in ns: in the counted lab, instructions.
pub(crate) fn now() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME)?;
    Ok(u64::try_from(now.tv_sec())? * 1_000_000_000 + u64::try_from(now.tv_nsec())?)
}

/// Millions of instructions between two moments.
pub(crate) fn minstr(from: u64, to: u64) -> f64 {
    to.saturating_sub(from) as f64 / 1e6
}

/// The events that a VMM has written so far.
pub(crate) fn events(path: &Path) -> Result<Vec<Event>> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    Ok(read_events(file)?)
}

/// Figures of a boot up to the agent's word, under names that begin with `name`: the whole of it, and its phases.
pub(crate) fn of_agent(name: &str, begun: u64, events: &[Event]) -> Result<Vec<(String, f64)>> {
    let ready = find(events, &EventKind::AgentConnected).context("the agent is not ready")?;
    let exits = ready.exits.context("the event says no count of exits")?;
    let mut figures =
        vec![(format!("{name}.minstr"), minstr(begun, ready.at_ns)), (format!("{name}.exits"), exits as f64)];
    let mut before = begun;
    for (phase, end) in PHASES {
        let event = find(events, &end).with_context(|| format!("no event {end:?}"))?;
        figures.push((format!("{name}.{phase}.minstr"), minstr(before, event.at_ns)));
        before = event.at_ns;
    }
    Ok(figures)
}

/// The first event of a kind that has no contents.
pub(crate) fn find<'e>(events: &'e [Event], kind: &EventKind) -> Option<&'e Event> {
    events.iter().find(|event| event.kind == *kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_add_up_to_the_whole() {
        let event = |at_ns, kind| Event { at_ns, exits: Some(at_ns / 1_000_000), kind };
        let events = [
            event(2_000_000, EventKind::Started),
            event(3_000_000, EventKind::Configured),
            event(7_000_000, EventKind::Loaded),
            event(20_000_000, EventKind::Booted),
            event(31_000_000, EventKind::AgentConnected),
        ];
        let figures = of_agent("b", 1_000_000, &events).unwrap();
        let expected = [
            ("b.minstr", 30.0),
            ("b.exits", 31.0),
            ("b.spawn.minstr", 1.0),
            ("b.set_up.minstr", 5.0),
            ("b.kernel.minstr", 13.0),
            ("b.user.minstr", 11.0),
        ];
        assert_eq!(figures, expected.map(|(name, value)| (name.to_owned(), value)));
        assert!(of_agent("b", 0, &events[..4]).is_err());
    }
}
