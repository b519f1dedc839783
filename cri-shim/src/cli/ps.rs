//! `pericarp ps`, `logs`, `console`, `inspect` and `rm`: looking at pods, and ending them.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;
use vmm_control::{Client, Command, Event, Reply};

use super::find::{self, Found};
use super::output::{self, Format};
use crate::config::Config;
use crate::record::{Life, Phase, Record};
use crate::vmm;

/// Longest wait for a VMM's answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Between two looks at something that grows.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Digits of an id that tables show.
const SHORT_ID: usize = 13;

/// List pods and their containers
#[derive(Args, Debug)]
pub(super) struct Ps {
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Ps {
    pub(super) fn run(&self, config: &Config) -> Result<i32> {
        let pods = find::pods(config);
        match self.output {
            Format::Json => output::json(&pods.iter().map(|found| &found.record).collect::<Vec<_>>())?,
            Format::Table => table(&pods)?,
        }
        Ok(0)
    }
}

fn table(pods: &[Found]) -> Result<()> {
    let mut rows = Vec::new();
    for Found { record, .. } in pods {
        let state = match &record.phase {
            Phase::Starting => "starting",
            Phase::Running => "running",
            Phase::Ended { .. } => "ended",
            Phase::Stopped { .. } => "stopped",
            Phase::Removing => "removing",
        };
        let ips = record.attachment.iter().flat_map(|attachment| &attachment.ips).map(ToString::to_string);
        let age = output::ago(crate::clock::realtime_ns().saturating_sub(record.created_at_ns));
        let id = |id: &str| id.chars().take(SHORT_ID).collect::<String>();
        let name = record.spec.identity.name.clone();
        rows.push(vec![id(&record.id), "pod".into(), name, state.into(), age, ips.collect::<Vec<_>>().join(",")]);
        for (container_id, container) in &record.containers {
            let state = match &container.life {
                Life::Creating | Life::Created => "created".to_owned(),
                Life::Running { .. } => "running".to_owned(),
                Life::Exited { code, reason, .. } => format!("exited ({code}, {reason})"),
            };
            let age = output::ago(crate::clock::realtime_ns().saturating_sub(container.created_at_ns));
            rows.push(vec![
                id(container_id),
                "container".into(),
                container.spec.name.clone(),
                state,
                age,
                String::new(),
            ]);
        }
    }
    output::table(&["ID", "KIND", "NAME", "STATE", "CREATED", "ADDRESSES"], &rows)
}

/// Show a pod: what it is, what its VMM counts, and how it came up
#[derive(Args, Debug)]
pub(super) struct Inspect {
    /// Id, the beginning of one, or name.
    pod: String,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Inspect {
    pub(super) fn run(&self, config: &Config) -> Result<i32> {
        let found = find::pod(config, &self.pod)?;
        let record = &found.record;
        let timeline = timeline(record, &vmm::events(&found.dir));
        let counters = match ask(&found, &Command::Counters) {
            Ok(Reply::Counters(counters)) => counters,
            _ => Default::default(),
        };
        match self.output {
            Format::Json => output::json(&json!({
                "record": record,
                "vmm_pid": record.vmm.map(|vmm| vmm.pid),
                "counters": counters,
                "timeline": timeline,
            }))?,
            Format::Table => {
                print_pod(record)?;
                output::line("")?;
                output::table(
                    &["PHASE", "AT (ms)", "TOOK (ms)", "EXITS"],
                    &timeline.iter().map(PhaseTime::row).collect::<Vec<_>>(),
                )?;
                output::line("")?;
                output::table(
                    &["COUNTER", "VALUE"],
                    &counters.iter().map(|(name, count)| vec![name.clone(), count.to_string()]).collect::<Vec<_>>(),
                )?;
            }
        }
        Ok(0)
    }
}

fn print_pod(record: &Record) -> Result<()> {
    let ips = record.attachment.iter().flat_map(|attachment| &attachment.ips).map(ToString::to_string);
    let lines = [
        ("Pod", format!("{} ({})", record.spec.identity.name, record.id)),
        (
            "State",
            serde_json::to_value(&record.phase)
                .ok()
                .and_then(|phase| Some(phase["phase"].as_str()?.to_owned()))
                .unwrap_or_default(),
        ),
        ("Kernel", record.guest_kernel.clone()),
        ("Size", format!("{} MiB, {} CPU", record.memory_mib, record.vcpus)),
        ("Addresses", ips.collect::<Vec<_>>().join(", ")),
        ("VMM", record.vmm.map_or(String::new(), |vmm| format!("process {}", vmm.pid))),
        ("cgroup", record.cgroup.clone()),
    ];
    for (name, value) in lines {
        output::line(format!("{name:10} {value}").trim_end())?;
    }
    Ok(())
}

/// A phase of a pod's start.
#[derive(Debug, serde::Serialize)]
struct PhaseTime {
    name: String,
    since_first_ms: f64,
    took_ms: f64,
    /// Exits of the guest until then, where the VMM counted them.
    exits: Option<u64>,
}

impl PhaseTime {
    fn row(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            format!("{:.3}", self.since_first_ms),
            format!("{:.3}", self.took_ms),
            self.exits.map_or(String::new(), |exits| exits.to_string()),
        ]
    }
}

/// The moments that the core and the VMM noted, in order of time.
fn timeline(record: &Record, events: &[Event]) -> Vec<PhaseTime> {
    let noted = record.moments.iter().map(|moment| (moment.at_ns, moment.name.clone(), None));
    let reported = events.iter().map(|event| {
        let kind = serde_json::to_value(&event.kind).unwrap_or_default();
        (event.at_ns, format!("vmm: {}", kind["event"].as_str().unwrap_or("?")), event.exits)
    });
    let mut moments: Vec<(u64, String, Option<u64>)> = noted.chain(reported).collect();
    moments.sort_by_key(|(at, ..)| *at);
    let first = moments.first().map_or(0, |(at, ..)| *at);
    let mut before = first;
    let milliseconds = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e6;
    moments
        .into_iter()
        .map(|(at, name, exits)| {
            let phase =
                PhaseTime { name, since_first_ms: milliseconds(first, at), took_ms: milliseconds(before, at), exits };
            before = at;
            phase
        })
        .collect()
}

fn ask(found: &Found, command: &Command) -> Result<Reply> {
    let (_directory, path) = found.dir.reach(&found.dir.control())?;
    let client = Client::connect(&path, ANSWER_LIMIT).context("the pod's VMM does not run")?;
    Ok(client.ask(command, &[])?)
}

/// Show what a pod's kernel printed
#[derive(Args, Debug)]
pub(super) struct Console {
    /// Id, the beginning of one, or name.
    pod: String,
    /// Go on until the pod ends.
    #[arg(short, long)]
    follow: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Console {
    pub(super) fn run(&self, config: &Config) -> Result<i32> {
        let found = find::pod(config, &self.pod)?;
        let mut from = 0;
        loop {
            let Reply::Console { next, text } = ask(&found, &Command::Console { from })? else {
                bail!("the VMM gave no console");
            };
            match self.output {
                Format::Json => output::json_line(&json!({"next": next, "text": text}))?,
                Format::Table => io::stdout().write_all(text.as_bytes())?,
            }
            from = next;
            if !self.follow {
                return Ok(0);
            }
            io::stdout().flush()?;
            sleep(LOOK_AGAIN);
        }
    }
}

/// Show what a container printed
#[derive(Args, Debug)]
pub(super) struct Logs {
    /// Id, the beginning of one, or name.
    container: String,
    /// Go on until the container ends.
    #[arg(short, long)]
    follow: bool,
    /// Show the time of each line.
    #[arg(short, long)]
    timestamps: bool,
    /// As JSON: one document a line.
    #[arg(short, long, value_enum, default_value_t, hide_default_value = true)]
    output: Format,
}

impl Logs {
    pub(super) fn run(&self, config: &Config) -> Result<i32> {
        let (found, id) = find::container(config, &self.container)?;
        let log = found.record.containers.get(&id).and_then(|container| container.log.as_ref());
        let path = &log.context("the container has no log")?.path;
        let mut lines = BufReader::new(File::open(path).with_context(|| format!("opening {}", path.display()))?);
        let mut line = Vec::new();
        loop {
            lines.read_until(b'\n', &mut line)?;
            if line.ends_with(b"\n") {
                self.print(&line)?;
                line.clear();
            } else if self.follow && runs(&found, &id) {
                sleep(LOOK_AGAIN);
            } else {
                return Ok(0);
            }
        }
    }

    /// One line of the CRI's format: time, stream, tag and text.
    fn print(&self, line: &[u8]) -> Result<()> {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let (time, stream, tag) =
            (parts.next().unwrap_or_default(), parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let text = parts.next().unwrap_or(b"\n");
        if self.output == Format::Json {
            let said = |bytes| String::from_utf8_lossy(bytes).into_owned();
            let text = said(text.strip_suffix(b"\n").unwrap_or(text));
            let document = json!({
                "time": said(time), "stream": said(stream), "partial": tag.starts_with(b"P"), "text": text,
            });
            return output::json_line(&document);
        }
        // A partial line has no end of its own.
        let text = if tag.starts_with(b"P") { text.strip_suffix(b"\n").unwrap_or(text) } else { text };
        let mut to: Box<dyn Write> = if stream == b"stderr" { Box::new(io::stderr()) } else { Box::new(io::stdout()) };
        if self.timestamps {
            to.write_all(time)?;
            to.write_all(b" ")?;
        }
        Ok(to.write_all(text)?)
    }
}

/// Whether a container still runs, as its record says now.
fn runs(found: &Found, id: &str) -> bool {
    let record = Record::read(&found.dir.record()).ok();
    let life = record.as_ref().and_then(|record| record.containers.get(id)).map(|container| &container.life);
    matches!(life, Some(Life::Creating | Life::Created | Life::Running { .. }))
}

/// Stop and remove pods
#[derive(Args, Debug)]
pub(super) struct Rm {
    /// Ids, beginnings of them, or names.
    #[arg(required = true)]
    pods: Vec<String>,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Rm {
    pub(super) async fn run(&self, config: &Config) -> Result<i32> {
        let mut removed = Vec::new();
        for wanted in &self.pods {
            let found = find::pod(config, wanted)?;
            if found.state_dir != config.core.state_dir {
                bail!("{wanted} belongs to a `pericarp run`: end that, and its pod goes with it");
            }
            remove(&config.socket, &found.record.id).await?;
            match self.output {
                Format::Json => removed.push(found.record.id),
                Format::Table => output::line(&found.record.id)?,
            }
        }
        if self.output == Format::Json {
            output::json(&removed)?;
        }
        Ok(0)
    }
}

/// Asks the daemon, which owns the pod.
async fn remove(socket: &Path, id: &str) -> Result<()> {
    use crate::cri::proto::runtime_service_client::RuntimeServiceClient;
    use crate::cri::proto::{RemovePodSandboxRequest, StopPodSandboxRequest};
    let endpoint = tonic::transport::Endpoint::try_from(format!("unix://{}", socket.display()))?;
    let channel =
        endpoint.connect().await.with_context(|| format!("pericarpd does not answer on {}", socket.display()))?;
    let mut client = RuntimeServiceClient::new(channel);
    let said = |status: tonic::Status| anyhow::anyhow!("{}", status.message());
    client.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: id.to_owned() }).await.map_err(said)?;
    client.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() }).await.map_err(said)?;
    Ok(())
}
