//! Where the instructions of each boot go: its phases as text, and as a picture that opens in a browser.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;

use crate::report::{Clock, Report};

/// Boots in the order in which they are shown, and the phases of each in order of time.
const BOOTS: [&str; 5] = ["boot.plain", "boot.min", "boot.own", "boot.2vcpu", "boot.4vcpu"];
const PHASES: [(&str, RGBColor); 5] = [
    ("spawn", RGBColor(0x9e, 0x9e, 0x9e)),
    ("set_up", RGBColor(0xf2, 0xa1, 0x3c)),
    ("guest", RGBColor(0x3b, 0x7d, 0xb8)),
    ("kernel", RGBColor(0x3b, 0x7d, 0xb8)),
    ("user", RGBColor(0x5a, 0xa0, 0x5a)),
];

/// Width of the picture in pixels, and height of a boot in it.
const WIDTH: u32 = 960;
const ROW: u32 = 48;
/// Characters of the text's longest bar.
const BAR: f64 = 60.0;

/// A boot and its phases, in M instructions.
type Row = (&'static str, Vec<(&'static str, RGBColor, f64)>);

/// The boots that a report has.
fn rows(report: &Report) -> Vec<Row> {
    let row = |boot: &&'static str| -> Row {
        let phase = |(name, colour): &(&'static str, RGBColor)| {
            Some((*name, *colour, report.get(&format!("{boot}.{name}.minstr"))?))
        };
        (*boot, PHASES.iter().filter_map(phase).collect())
    };
    BOOTS.iter().map(row).filter(|(_, phases)| !phases.is_empty()).collect()
}

fn longest(rows: &[Row]) -> f64 {
    rows.iter().map(|(_, phases)| phases.iter().map(|phase| phase.2).sum()).fold(0.0, f64::max)
}

/// The phases as text.
pub(crate) fn text(report: &Report) -> String {
    let rows = rows(report);
    let scale = BAR / longest(&rows).max(f64::MIN_POSITIVE);
    let mut text = String::new();
    let unit = if report.clock == Clock::Counted { "M" } else { "ms" };
    for (boot, phases) in &rows {
        let mut before = 0.0;
        for (phase, _, minstr) in phases {
            let (gap, bar) = ((before * scale).round() as usize, (minstr * scale).round().max(1.0) as usize);
            // Writing to a string does not fail.
            let _ =
                writeln!(text, "{boot:<11} {phase:<7} {minstr:>7.2} {unit}  {}{}", " ".repeat(gap), "#".repeat(bar));
            before += minstr;
        }
    }
    text
}

/// The same as a picture; nothing if the report has no boot.
pub(crate) fn draw(report: &Report, path: &Path) -> Result<()> {
    let rows = rows(report);
    if rows.is_empty() {
        return Ok(());
    }
    let svg =
        render(&rows, report.clock.million()).map_err(|error| anyhow::anyhow!("drawing the timeline: {error}"))?;
    fs::write(path, svg).with_context(|| format!("writing {}", path.display()))
}

fn render(rows: &[Row], unit: &str) -> Result<String, Box<dyn std::error::Error>> {
    let count = u32::try_from(rows.len())?;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, ROW * count + 100)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .margin(12)
            .caption(format!("From the decision to spawn to ready, in {unit}"), ("sans-serif", 16))
            .x_label_area_size(24)
            .build_cartesian_2d(0.0..longest(rows) * 1.02, 0.0..f64::from(count))?;
        chart.configure_mesh().disable_y_mesh().disable_y_axis().draw()?;
        for (index, (boot, phases)) in (0..count).rev().zip(rows) {
            let bottom = f64::from(index);
            let mut left = 0.0;
            let mut label = (*boot).to_owned();
            for (phase, colour, minstr) in phases {
                let corners = [(left, bottom + 0.1), (left + minstr, bottom + 0.55)];
                chart.draw_series([Rectangle::new(corners, colour.filled())])?;
                let _ = write!(label, "   {phase} {minstr:.1}");
                left += minstr;
            }
            chart.draw_series([Text::new(label, (0.0, bottom + 0.85), ("sans-serif", 13))])?;
        }
        area.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Samples;

    fn report() -> Report {
        let mut samples = Samples::default();
        for (phase, minstr) in [("spawn", 10.0), ("set_up", 5.0), ("kernel", 30.0), ("user", 15.0)] {
            samples.add(format!("boot.min.{phase}.minstr"), minstr);
        }
        let mut report = Report::default();
        report.take(samples);
        report
    }

    #[test]
    fn bars_follow_one_another_in_time() {
        let text = text(&report());
        let bars: Vec<_> = text.lines().map(|line| line.split_once("M  ").unwrap().1).collect();
        let at = |line: &str| (line.find('#').unwrap(), line.len());
        assert_eq!(bars.iter().map(|bar| at(bar)).collect::<Vec<_>>(), [(0, 10), (10, 15), (15, 45), (45, 60)]);
    }

    #[test]
    fn the_picture_names_each_phase() {
        let svg = render(&rows(&report()), "M instructions").unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("kernel 30.0"), "{svg}");
    }
}
