//! What the commands print: tables for people, JSON for programs.

use std::io::{self, Write};

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;

/// `-o`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

/// Prints a document as JSON.
pub(super) fn json(document: &impl Serialize) -> Result<()> {
    line(&serde_json::to_string_pretty(document)?)
}

/// Prints a document on a line of its own, one of several.
pub(super) fn json_line(document: &impl Serialize) -> Result<()> {
    line(&serde_json::to_string(document)?)
}

/// Prints a line; somebody may have stopped reading.
pub(super) fn line(text: &str) -> Result<()> {
    Ok(writeln!(io::stdout(), "{text}")?)
}

/// Prints rows in columns as wide as their widest cell, two spaces apart.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> Result<()> {
    let header: Vec<String> = header.iter().map(|cell| (*cell).to_owned()).collect();
    let all = || std::iter::once(&header).chain(rows);
    let width = |column: usize| all().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..header.len()).map(|column| width(column).unwrap_or(0)).collect();
    for row in all() {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        line(cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

/// A span of time as people say it, such as `3 minutes ago`.
pub(super) fn ago(nanoseconds: i64) -> String {
    const UNITS: [(i64, &str); 4] = [(86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second")];
    let seconds = nanoseconds / 1_000_000_000;
    let unit = UNITS.iter().find(|(length, _)| seconds >= *length);
    unit.map_or("now".to_owned(), |(length, name)| {
        let count = seconds / length;
        format!("{count} {name}{} ago", if count == 1 { "" } else { "s" })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_told_in_its_largest_unit() {
        assert_eq!(ago(500_000_000), "now");
        assert_eq!(ago(1_000_000_000), "1 second ago");
        assert_eq!(ago(7_200_000_000_000), "2 hours ago");
    }
}
