//! The report for people: the figures by what they are of, with the pictures beside them.

use std::fmt::Write as _;

use crate::report::Report;

/// A section: its title, how the names of its figures begin, and the picture that it may have.
const SECTIONS: [(&str, &[&str], Option<&str>); 5] = [
    ("Boot", &["boot.", "vmm.", "qemu_microvm.boot."], Some("timeline.svg")),
    ("Calls of the CRI", &["cri.", "daemon."], None),
    ("Many pods", &["runs.", "pods."], Some("pods.svg")),
    ("Memory", &["memory.", "qemu_microvm.memory.", "host.memory."], Some("memory.svg")),
    ("Disk, network, vsock", &[], None),
];

/// Everything that was measured; `tables` is what the last section shows.
pub(crate) fn text(report: &Report, tables: &str) -> String {
    let mut text = String::from("# Benchmarks\n\nMedians; docs/benchmarks.md says what each name stands for.\n");
    for (title, beginnings, picture) in SECTIONS {
        let figures: Vec<_> = report
            .figures()
            .filter(|(name, ..)| beginnings.iter().any(|beginning| name.starts_with(beginning)))
            .collect();
        let tables = if beginnings.is_empty() { tables } else { "" };
        if figures.is_empty() && tables.is_empty() {
            continue;
        }
        // Writing to a string does not fail.
        let _ = write!(text, "\n## {title}\n\n{tables}");
        if !figures.is_empty() {
            text.push_str("| figure | median | spread |\n|---|---|---|\n");
        }
        for (name, median, spread) in figures {
            let _ = writeln!(text, "| `{name}` | {median:.2} | {spread:.1} % |");
        }
        if let Some(picture) = picture {
            let _ = writeln!(text, "\n![{title}]({picture})");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Samples;

    #[test]
    fn sections_without_figures_are_left_out() {
        let mut samples = Samples::default();
        samples.add("boot.min.minstr", 35.0);
        samples.add("blk.read_4k.kinstr", 40.0);
        let mut report = Report::default();
        report.take(samples);
        let text = text(&report, "| operation |\n");
        let titles: Vec<_> = text.lines().filter(|line| line.starts_with("## ")).collect();
        assert_eq!(titles, ["## Boot", "## Disk, network, vsock"]);
        assert!(text.contains("| `boot.min.minstr` | 35.00 | 0.0 % |") && text.contains("(timeline.svg)"), "{text}");
        assert!(!text.contains("blk.read_4k"), "operations have a table of their own: {text}");
    }
}
