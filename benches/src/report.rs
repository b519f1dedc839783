//! The figures, as a table for people and one flat JSON object for programs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// How much worse a figure may be than the one that is kept: counts of instructions as a factor, exits by so many.
const MORE_INSTRUCTIONS: f64 = 1.03;
const MORE_EXITS: f64 = 5.0;

/// The largest figure that is not worse than `before`; `None` for what is only ever shown: a part of a figure, or a peer's.
fn most(name: &str, before: f64) -> Option<f64> {
    let [_, _, unit] = name.split('.').collect::<Vec<_>>()[..] else { return None };
    match unit {
        "minstr" => Some(before * MORE_INSTRUCTIONS),
        "exits" => Some(before + MORE_EXITS),
        _ => None,
    }
}

/// What the machine's clock counts, by which everything is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Clock {
    /// An instruction each nanosecond: the counted lab.
    #[default]
    Counted,
    /// Time, on a host that has KVM itself.
    Wall,
}

impl Clock {
    /// The name under which a figure is shown: what is a million instructions there is a millisecond here.
    fn name(self, name: &str) -> String {
        match (self, name.rsplit_once('.')) {
            (Self::Wall, Some((figure, "minstr"))) => format!("{figure}.ms"),
            (Self::Wall, Some((figure, "kinstr"))) => format!("{figure}.us"),
            _ => name.to_owned(),
        }
    }

    /// Unit of what is measured in millions of instructions.
    pub(crate) fn million(self) -> &'static str {
        match self {
            Self::Counted => "M instructions",
            Self::Wall => "ms",
        }
    }

    /// Unit of what is measured in thousands of instructions.
    pub(crate) fn thousand(self) -> &'static str {
        match self {
            Self::Counted => "k instructions",
            Self::Wall => "µs",
        }
    }
}

/// Repeated measurements under their names.
#[derive(Debug, Default)]
pub(crate) struct Samples(BTreeMap<String, Vec<f64>>);

impl Samples {
    /// One more measurement of `name`.
    pub(crate) fn add(&mut self, name: impl Into<String>, value: f64) {
        self.0.entry(name.into()).or_default().push(value);
    }

    /// All measurements of one run.
    pub(crate) fn extend(&mut self, run: impl IntoIterator<Item = (String, f64)>) {
        for (name, value) in run {
            self.add(name, value);
        }
    }
}

/// A figure: the median of its samples, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Figure {
    median: f64,
    /// Largest less smallest, in percent of the median.
    spread: f64,
}

/// Name → figure; a name's meaning never changes.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// What is counted.
    pub(crate) clock: Clock,
    figures: BTreeMap<String, Figure>,
}

impl Report {
    /// No figure yet.
    pub(crate) fn new(clock: Clock) -> Self {
        Self { clock, ..Self::default() }
    }

    /// Notes the medians.
    pub(crate) fn take(&mut self, samples: Samples) {
        for (name, mut values) in samples.0 {
            values.sort_by(f64::total_cmp);
            let (Some(least), Some(most)) = (values.first(), values.last()) else { continue };
            let Some(&median) = values.get(values.len() / 2) else { continue };
            let spread = if median == 0.0 { 0.0 } else { 100.0 * (most - least) / median };
            self.figures.insert(name, Figure { median, spread });
        }
    }

    /// A figure's median.
    pub(crate) fn get(&self, name: &str) -> Option<f64> {
        self.figures.get(name).map(|figure| figure.median)
    }

    /// Each figure's name as it is shown, median, and spread in percent.
    pub(crate) fn figures(&self) -> impl Iterator<Item = (String, f64, f64)> {
        self.figures.iter().map(|(name, figure)| (self.clock.name(name), figure.median, figure.spread))
    }

    /// Reads what [`Report::write`] wrote.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let medians: BTreeMap<String, f64> = serde_json::from_str(&text)?;
        let figure = |median| Figure { median, spread: 0.0 };
        Ok(Self {
            figures: medians.into_iter().map(|(name, median)| (name, figure(median))).collect(),
            ..Self::default()
        })
    }

    /// One line for each figure that is worse than `baseline` allows; figures that only one of them has do not count.
    pub(crate) fn worse_than(&self, baseline: &Self) -> Vec<String> {
        let worse = |(name, now): (&String, &Figure)| {
            let before = baseline.get(name)?;
            let most = most(name, before)?;
            (now.median > most).then(|| format!("{name}: {:.2}, was {before:.2}, allowed {most:.2}", now.median))
        };
        self.figures.iter().filter_map(worse).collect()
    }

    /// The table.
    pub(crate) fn print(&self) {
        let width = self.figures.keys().map(String::len).max().unwrap_or(0);
        println!("{:width$}  {:>12}  {:>8}", "figure", "median", "spread");
        for (name, median, spread) in self.figures() {
            println!("{name:width$}  {median:>12.2}  {spread:>6.2} %");
        }
    }

    /// Writes the JSON: medians, to three decimals.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let rounded: BTreeMap<_, _> =
            self.figures().map(|(name, median, _)| (name, (median * 1e3).round() / 1e3)).collect();
        fs::write(path, serde_json::to_string_pretty(&rounded)?).with_context(|| format!("writing {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(figures: &[(&str, f64)]) -> Report {
        let mut samples = Samples::default();
        for (name, value) in figures {
            samples.add(*name, *value);
        }
        let mut report = Report::default();
        report.take(samples);
        report
    }

    #[test]
    fn what_is_worse_is_told_and_nothing_else() {
        let before = report(&[
            ("boot.a.minstr", 100.0),
            ("boot.b.minstr", 100.0),
            ("boot.b.spawn.minstr", 1.0),
            ("boot.a.exits", 10.0),
            ("boot.b.exits", 10.0),
            ("qemu.boot.a.minstr", 1.0),
            ("vmm.pss_kib", 1.0),
        ]);
        let after = report(&[
            ("boot.a.minstr", 103.0),
            ("boot.b.minstr", 103.1),
            ("boot.b.spawn.minstr", 2.0),
            ("boot.a.exits", 15.0),
            ("boot.b.exits", 16.0),
            ("boot.c.minstr", 1.0),
            ("qemu.boot.a.minstr", 2.0),
            ("vmm.pss_kib", 9.0),
        ]);
        assert_eq!(
            after.worse_than(&before),
            ["boot.b.exits: 16.00, was 10.00, allowed 15.00", "boot.b.minstr: 103.10, was 100.00, allowed 103.00"]
        );
        assert!(before.worse_than(&after).is_empty());
    }

    #[test]
    fn time_is_not_called_instructions() {
        let mut report = report(&[("boot.a.minstr", 1.0), ("blk.a.kinstr", 2.0), ("boot.a.exits", 3.0)]);
        report.clock = Clock::Wall;
        let shown: Vec<_> = report.figures().map(|(name, median, _)| (name, median)).collect();
        assert_eq!(shown, [("blk.a.us".into(), 2.0), ("boot.a.exits".into(), 3.0), ("boot.a.ms".to_owned(), 1.0)]);
        assert_eq!(report.get("boot.a.minstr"), Some(1.0));
    }

    #[test]
    fn the_median_of_an_odd_count_is_the_middle_one() {
        let mut samples = Samples::default();
        for value in [12.0, 8.0, 10.0] {
            samples.add("x", value);
        }
        let mut report = Report::default();
        report.take(samples);
        assert_eq!(report.figures["x"], Figure { median: 10.0, spread: 40.0 });
    }
}
