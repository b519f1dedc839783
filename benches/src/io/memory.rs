//! Memory that a guest takes and gives back: what a MiB costs, and how soon the host has it again.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use plotters::prelude::*;

use super::jobs::{Job, Side};
use super::machine::{Machine, Shape};
use super::{Contestant, Kind, end, figures, start};
use crate::Place;
use crate::repeat::repeat;
use crate::report::{Report, Samples};

/// Guests that can take what they are told to and have something left.
const SHAPE: Shape = Shape { memory_mib: 1280, gives_back: true };

/// MiB that are taken and given back.
const MIB: u32 = 1024;

/// How much of that the host is to have again.
const PART: f64 = 0.9;

const TAKE: Job =
    Job { name: "memory.take", words: "memory-take", count: MIB, unit: "MiB", side: Side::None, on_host: true };
const GIVE: Job =
    Job { name: "memory.give", words: "memory-give", count: MIB, unit: "MiB", side: Side::None, on_host: true };

/// Between two looks at a process's memory.
const LOOK: Duration = Duration::from_millis(20);

/// Longest wait for a guest's memory.
const PATIENCE: Duration = Duration::from_secs(30);

/// Size of the picture in pixels.
const SIZE: (u32, u32) = (960, 320);
const COLOURS: [RGBColor; 2] = [RGBColor(0x3b, 0x7d, 0xb8), RGBColor(0xf2, 0xa1, 0x3c)];

/// Seconds since a guest gave its memory up, and MiB that its VMM has.
type Course = Vec<(f64, f64)>;

/// Measures `memory.*`, and draws how the last run's memory comes back.
pub(crate) async fn measure(place: &Place, report: &mut Report, picture: &Path) -> Result<()> {
    let directory = place.work.join("memory");
    let mut machines = start(place, SHAPE, &directory)?;
    let mut samples = Samples::default();
    let mut courses = Vec::new();
    for (figures, run) in repeat("memory", place.runs, async || once(&mut machines)).await? {
        samples.extend(figures);
        courses = run;
    }
    end(machines, &directory)?;
    report.take(samples);
    draw(&courses, picture).map_err(|error| anyhow::anyhow!("drawing the memory: {error}"))
}

/// Figures of one run, and how memory came back in each guest.
type Run = (Vec<(String, f64)>, Vec<(&'static str, Course)>);

/// Has each contestant take memory and give it up, and waits until the host has it.
fn once(machines: &mut [Contestant]) -> Result<Run> {
    let (mut all, mut courses) = (Vec::new(), Vec::new());
    for (prefix, machine) in machines {
        let before = machine.resident_mib()?;
        all.extend(figures(prefix, machine, &TAKE)?);
        let taken = machine.resident_mib()? - before;
        all.extend(figures(prefix, machine, &GIVE)?);
        if machine.kind != Kind::Host {
            let course = watch(machine, before + taken * (1.0 - PART)).with_context(|| format!("{prefix}memory"))?;
            all.extend(course.last().map(|(seconds, _)| (format!("{prefix}memory.back.seconds"), *seconds)));
            courses.push((*prefix, course));
        }
    }
    Ok((all, courses))
}

/// Looks at a guest's memory until it is no more than `enough` MiB.
fn watch(machine: &Machine, enough: f64) -> Result<Course> {
    let since = Instant::now();
    let mut course = Vec::new();
    loop {
        let seen = machine.resident_mib()?;
        course.push((since.elapsed().as_secs_f64(), seen));
        if seen <= enough {
            return Ok(course);
        }
        if since.elapsed() > PATIENCE {
            bail!("{seen:.0} MiB are still there after {PATIENCE:?}, which should be {enough:.0}");
        }
        thread::sleep(LOOK);
    }
}

fn draw(courses: &[(&str, Course)], path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let points = || courses.iter().flat_map(|(_, course)| course);
    let (seconds, mib) = points().fold((0.1_f64, 1.0_f64), |(x, y), point| (x.max(point.0), y.max(point.1)));
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .caption("Memory of a VMM in MiB, by seconds since its guest freed 1 GiB", ("sans-serif", 16))
        .x_label_area_size(24)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..seconds * 1.02, 0.0..mib * 1.1)?;
    chart.configure_mesh().draw()?;
    for ((prefix, course), colour) in courses.iter().zip(COLOURS) {
        let name = if prefix.is_empty() { "pericarp" } else { prefix.trim_end_matches('.') };
        chart
            .draw_series([PathElement::new(course.clone(), colour.stroke_width(2))])?
            .label(name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 12, y + 4)], colour.filled()));
    }
    chart.configure_series_labels().border_style(BLACK).background_style(WHITE).draw()?;
    Ok(area.present()?)
}
