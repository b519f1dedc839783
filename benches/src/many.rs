//! What the next pod costs where there are many: pods started one after the other and left running.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use cri_shim::cri::proto::RunPodSandboxRequest;
use cri_shim::cri::proto::runtime_service_client::RuntimeServiceClient;
use plotters::coord::Shift;
use plotters::prelude::*;
use tonic::transport::Channel;

use crate::Place;
use crate::cri::{Daemon, pod_config, remove};
use crate::report::{Report, Samples};

/// How many there are in the end.
const PODS: usize = 200;

/// After how many of them a figure is taken.
const MARKS: [usize; 5] = [10, 50, 100, 150, 200];

/// Over so many pods before it.
const WINDOW: usize = 10;

/// Size of the picture in pixels; it has two charts, one above the other.
const SIZE: (u32, u32) = (960, 640);

/// A pod as it came: what its start took, and what the host's memory had less than before the first one.
struct Came {
    minstr: f64,
    taken_mib: f64,
}

/// Measures `pods.*`, and draws how they grow.
pub(crate) async fn measure(place: &Place, report: &mut Report, picture: &Path) -> Result<()> {
    let daemon = Daemon::start(place)?;
    let mut calls = RuntimeServiceClient::new(daemon.connect().await?);
    let mut started = Vec::new();
    let came = start(&mut calls, &daemon, &mut started).await;
    let daemon_kib = daemon.pss_kib();
    for pod in started {
        remove(&mut calls, pod).await?;
    }
    let came = came?;
    let mut samples = Samples::default();
    for mark in MARKS {
        for pod in &came[mark - WINDOW..mark] {
            samples.add(format!("pods.{mark}.run_pod"), pod.minstr);
        }
        samples.add(format!("pods.{mark}.mib_each"), came[mark - 1].taken_mib / mark as f64);
    }
    samples.add(format!("pods.{PODS}.daemon_pss_kib"), daemon_kib?);
    report.take(samples);
    draw(&came, report.clock.million(), picture).map_err(|error| anyhow::anyhow!("drawing the pods: {error}"))?;
    daemon.end()
}

async fn start(
    calls: &mut RuntimeServiceClient<Channel>,
    daemon: &Daemon,
    started: &mut Vec<String>,
) -> Result<Vec<Came>> {
    let before = available_mib()?;
    let mut came = Vec::with_capacity(PODS);
    for number in 0..PODS {
        let config = Some(pod_config(&daemon.directory, number));
        let since = Instant::now();
        let answer = calls.run_pod_sandbox(RunPodSandboxRequest { config, ..Default::default() }).await;
        let minstr = since.elapsed().as_secs_f64() * 1e3;
        started.push(answer.with_context(|| format!("pod {number}"))?.into_inner().pod_sandbox_id);
        came.push(Came { minstr, taken_mib: before - available_mib()? });
    }
    Ok(came)
}

/// `MemAvailable` of proc_meminfo(5).
fn available_mib() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).context("no MemAvailable")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}

fn draw(came: &[Came], unit: &str, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (above, below) = area.split_vertically(SIZE.1 / 2);
    chart(&above, &format!("RunPodSandbox, in {unit}, by the pods before it"), came.iter().map(|pod| pod.minstr))?;
    chart(&below, "Memory of the host in use, in MiB, by pods", came.iter().map(|pod| pod.taken_mib))?;
    Ok(area.present()?)
}

fn chart(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    caption: &str,
    values: impl Iterator<Item = f64> + Clone,
) -> Result<(), Box<dyn std::error::Error>> {
    let (count, highest) = (values.clone().count(), values.clone().fold(1.0, f64::max));
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .caption(caption, ("sans-serif", 16))
        .x_label_area_size(24)
        .y_label_area_size(48)
        .build_cartesian_2d(0..count, 0.0..highest * 1.1)?;
    chart.configure_mesh().draw()?;
    chart.draw_series(values.enumerate().map(|point| Circle::new(point, 2, RGBColor(0x3b, 0x7d, 0xb8).filled())))?;
    Ok(())
}
