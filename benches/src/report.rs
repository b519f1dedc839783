//! The figures, as a table for people and one flat JSON object for programs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Name → figure; a name's meaning never changes.
#[derive(Debug, Default)]
pub(crate) struct Report(BTreeMap<String, f64>);

impl Report {
    /// Notes the median of repeated measurements of `name`.
    pub(crate) fn median(&mut self, name: &str, mut samples: Vec<f64>) {
        samples.sort_by(f64::total_cmp);
        if let Some(median) = samples.get(samples.len() / 2) {
            self.0.insert(name.to_owned(), *median);
        }
    }

    /// The table.
    pub(crate) fn print(&self) {
        let width = self.0.keys().map(String::len).max().unwrap_or(0);
        for (name, figure) in &self.0 {
            println!("{name:width$}  {figure:>12.1}");
        }
    }

    /// Writes the JSON.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, serde_json::to_string_pretty(&self.0)?).with_context(|| format!("writing {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_odd_count_is_the_middle_one() {
        let mut report = Report::default();
        report.median("x", vec![9.0, 1.0, 5.0]);
        assert_eq!(report.0["x"], 5.0);
    }
}
