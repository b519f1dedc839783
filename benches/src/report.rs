//! The figures, as a table for people and one flat JSON object for programs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

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
pub(crate) struct Report(BTreeMap<String, Figure>);

impl Report {
    /// Notes the medians.
    pub(crate) fn take(&mut self, samples: Samples) {
        for (name, mut values) in samples.0 {
            values.sort_by(f64::total_cmp);
            let (Some(least), Some(most)) = (values.first(), values.last()) else { continue };
            let Some(&median) = values.get(values.len() / 2) else { continue };
            let spread = if median == 0.0 { 0.0 } else { 100.0 * (most - least) / median };
            self.0.insert(name, Figure { median, spread });
        }
    }

    /// A figure's median.
    pub(crate) fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).map(|figure| figure.median)
    }

    /// The table.
    pub(crate) fn print(&self) {
        let width = self.0.keys().map(String::len).max().unwrap_or(0);
        println!("{:width$}  {:>12}  {:>8}", "figure", "median", "spread");
        for (name, Figure { median, spread }) in &self.0 {
            println!("{name:width$}  {median:>12.2}  {spread:>6.2} %");
        }
    }

    /// Writes the JSON: medians, to three decimals.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let rounded: BTreeMap<_, _> =
            self.0.iter().map(|(name, figure)| (name, (figure.median * 1e3).round() / 1e3)).collect();
        fs::write(path, serde_json::to_string_pretty(&rounded)?).with_context(|| format!("writing {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_odd_count_is_the_middle_one() {
        let mut samples = Samples::default();
        for value in [12.0, 8.0, 10.0] {
            samples.add("x", value);
        }
        let mut report = Report::default();
        report.take(samples);
        assert_eq!(report.0["x"], Figure { median: 10.0, spread: 40.0 });
    }
}
