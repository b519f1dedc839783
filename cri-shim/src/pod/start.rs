//! From what was asked for to a pod whose agent is configured.
//!
//! The order: record; namespace, tap, cgroup, scratch; VMM and network at once; configuration. Whoever calls undoes
//! all of it by the record if any step fails.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use vmm_control::{Command, Reply, SECTOR_BYTES};

use super::Moment;
use super::context::{Context, blocking};
use super::message;
use super::owner::{Machine, Owner, remove_directory};
use super::size::{frame, quota, size};
use crate::agent::{Agent, Call, Notice};
use crate::cgroup;
use crate::clock;
use crate::control;
use crate::error::{Error, IoContext, Result};
use crate::kill_point::kill_point;
use crate::network::{Attachment, Netns};
use crate::pod_dir::PodDir;
use crate::random;
use crate::record::{DiskRecord, Phase, RECORD_VERSION, Record};
use crate::scratch;
use crate::spec::{NetworkSource, PodSpec};
use crate::vmm::{Launch, Vmm};

/// Longest boot, from the VMM's start to the agent's Hello; room for a host that starts many at once.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// How soon after its connections a VMM's process ends.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Longest time for the agent to take the pod's identity on.
const CONFIGURE_LIMIT: Duration = Duration::from_secs(30);

/// Extents are whole pages.
const PAGE_BYTES: u64 = 4096;

/// How much of the guest's console is quoted when the agent does not come up, in bytes.
const CONSOLE_TAIL: usize = 2048;

/// Starts a pod. On failure nothing is left of it.
///
/// What a guest does before its agent speaks has nothing to do with the pod: if it dies there, it gets one more try, as a kubelet
/// would give it after a back-off.
pub(super) async fn start(context: Arc<Context>, id: String, spec: PodSpec) -> Result<Owner> {
    let asked_for = moment("asked_for");
    match attempt(&context, id.clone(), spec.clone(), asked_for.clone()).await {
        Err(Failure::GuestDied(cause)) => {
            tracing::warn!(%cause, "the guest died before its agent spoke: it is started once more");
            attempt(&context, id, spec, asked_for).await.map_err(Failure::into_error)
        }
        done => done.map_err(Failure::into_error),
    }
}

async fn attempt(context: &Arc<Context>, id: String, spec: PodSpec, asked_for: Moment) -> Result<Owner, Failure> {
    let mut record = plan(context, id, spec, asked_for)?;
    let turn = context.boots.acquire().await.map_err(|error| Error::Internal(error.to_string()))?;
    record.moments.push(moment("begun"));
    let (undo, dir) = (context.release(&record), context.config.pod_dir(&record.id));
    let made = make(context, record).await;
    drop(turn);
    match made {
        Ok(owner) => {
            undo.disarm();
            Ok(owner)
        }
        Err(failure) => {
            // What could not be undone has been logged, and its record stays for the next sweep.
            let undone = undo.run().await.is_ok();
            if undone && let Err(left) = remove_directory(&dir) {
                tracing::warn!(error = %left, "a pod that failed is not quite gone");
            }
            Err(match failure {
                // There is no room for another try.
                Failure::GuestDied(cause) if !undone => Failure::Other(not_started(&cause)),
                failure => failure,
            })
        }
    }
}

/// Decides all that can be decided before anything is made.
fn plan(context: &Context, id: String, spec: PodSpec, asked_for: Moment) -> Result<Record> {
    let config = &context.config;
    let size = size(&spec, 0, config, context.host)?;
    let cgroup = cgroup::leaf(&spec.cgroup_parent, &config.cgroup_parent, &id)?;
    let sectors = config.scratch_bytes / PAGE_BYTES * (PAGE_BYTES / SECTOR_BYTES);
    let scratch = DiskRecord {
        first_sector: 0,
        sectors,
        file: config.scratch_file(&id),
        image: None,
        volume: None,
        verity: None,
    };
    Ok(Record {
        version: RECORD_VERSION,
        id,
        spec: Arc::new(spec),
        created_at_ns: clock::realtime_ns(),
        phase: Phase::Starting,
        cgroup,
        memory_mib: size.memory_mib,
        vcpus: size.vcpus,
        frame: Some(frame(size, config, context.host)),
        vmm: None,
        file_server: None,
        next_share: 0,
        netns: None,
        attachment: None,
        guest_kernel: String::new(),
        disks: vec![scratch],
        containers: std::collections::BTreeMap::new(),
        next_log_port: 0,
        moments: vec![asked_for],
    })
}

fn moment(name: &str) -> Moment {
    Moment { name: name.into(), at_ns: clock::boottime_ns() }
}

async fn make(context: &Arc<Context>, mut record: Record) -> Result<Owner, Failure> {
    let dir = context.config.pod_dir(&record.id);
    fs::DirBuilder::new().mode(0o700).create(dir.path()).doing(|| format!("creating {}", dir.path().display()))?;
    write(&record, &dir)?;
    kill_point("pod.recorded");
    let (shared, planned) = (Arc::clone(context), record.clone());
    let ground = blocking(move || prepare(&shared, &planned)).await?;
    record.moments.push(moment("prepared"));
    kill_point("pod.prepared");
    let Ground { netns, taps, cgroup, scratch } = ground;
    record.netns = netns.as_ref().map(|netns| netns.path().to_owned());
    let scratch = (scratch, record.disks.first().map_or(0, |disk| disk.sectors));
    let launch = Launch { dir: &dir, frame: record.frame(), cgroup, taps, scratch };
    let vmm = Vmm::launch(&context.spawner, &context.config, launch).await?;
    record.vmm = Some(vmm.id());
    record.moments.push(moment("spawned"));
    kill_point("pod.spawned");
    write(&record, &dir)?;
    kill_point("pod.booting");
    let together = boot_and_attach(context, &record, &vmm, &dir, netns.as_ref()).await;
    let (booted, attachment) = match together {
        Err(Failure::VmEnded) => {
            let cause = vmm.cause().await;
            let died = cause.is_the_guests();
            let cause = context.ended(cause, &record.cgroup);
            return Err(if died { Failure::GuestDied(cause) } else { Failure::Other(not_started(&cause)) });
        }
        Err(failure) => return Err(failure),
        Ok(both) => both,
    };
    kill_point("pod.booted");
    let Booted { agent, kernel, notices, moments } = booted;
    record.guest_kernel = kernel;
    record.moments.extend(moments);
    let configure = message::configure(&record, &attachment, realtime(), random::seed()?);
    record.attachment = Some(attachment);
    agent.tell(Call::Configure(configure), CONFIGURE_LIMIT).await.map_err(|error| error.context("the guest"))?;
    record.moments.push(moment("configured"));
    kill_point("pod.configured");
    record.phase = Phase::Running;
    let owner = Owner::new(Arc::clone(context), record, Some(Machine { vmm, agent, notices }));
    owner.save()?;
    kill_point("pod.running");
    Ok(owner)
}

fn write(record: &Record, dir: &PodDir) -> Result<()> {
    record.write(&dir.record()).map_err(|error| Error::Internal(error.to_string()))
}

/// What a VMM stands on.
struct Ground {
    netns: Option<Netns>,
    taps: Vec<OwnedFd>,
    cgroup: OwnedFd,
    scratch: OwnedFd,
}

fn prepare(context: &Context, record: &Record) -> Result<Ground> {
    let netns = match &record.spec.network {
        NetworkSource::Cni => Some(context.network.create_netns(&record.id)?),
        NetworkSource::Netns(path) => Some(Netns::at(path.clone())),
        NetworkSource::None => None,
    };
    let pairs = record.frame().queues;
    let taps = netns.as_ref().map_or(Ok(Vec::new()), |netns| context.network.create_tap(netns, pairs))?;
    // A pod below a group of the kubelet's has its CPU limit there.
    let cpu = if record.spec.cgroup_parent.is_empty() { quota(&record.spec) } else { None };
    let limits = cgroup::Limits { guest_bytes: u64::from(record.memory_mib) << 20, cpu };
    let cgroup = cgroup::create(&context.config.cgroup_root, &record.cgroup, limits)?;
    let scratch = scratch::create(&context.template, &context.config.scratch_file(&record.id))?.into();
    Ok(Ground { netns, taps, cgroup, scratch })
}

/// An agent that has said Hello.
struct Booted {
    agent: Agent,
    kernel: String,
    notices: mpsc::Receiver<Notice>,
    moments: Vec<Moment>,
}

/// Why a pod did not come up.
enum Failure {
    /// Nobody has asked yet why.
    VmEnded,
    /// The guest's own doing, by this cause.
    GuestDied(String),
    Other(Error),
}

impl Failure {
    fn into_error(self) -> Error {
        match self {
            Self::VmEnded => not_started("its VMM has ended"),
            Self::GuestDied(cause) => not_started(&cause),
            Self::Other(error) => error,
        }
    }
}

fn not_started(cause: &str) -> Error {
    Error::Internal(format!("the VM did not start: {cause}"))
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// Two things at once. A network that fails ends the wait for the guest; a guest that fails lets the plugins finish,
/// so that they can be asked to take back what they made.
async fn boot_and_attach(
    context: &Context,
    record: &Record,
    vmm: &Vmm,
    dir: &PodDir,
    netns: Option<&Netns>,
) -> Result<(Booted, Attachment), Failure> {
    let mut attach = std::pin::pin!(attach(context, record, netns));
    let plugged_mib = record.frame().plugged_mib(record.memory_mib);
    let mut boot = std::pin::pin!(boot(vmm, dir, plugged_mib));
    tokio::select! {
        attached = &mut attach => {
            let (attachment, attached_at) = attached?;
            let mut booted = boot.await?;
            booted.moments.push(attached_at);
            Ok((booted, attachment))
        }
        booted = &mut boot => {
            let attached = attach.await;
            let mut booted = booted?;
            let (attachment, attached_at) = attached?;
            booted.moments.push(attached_at);
            Ok((booted, attachment))
        }
    }
}

async fn attach(context: &Context, record: &Record, netns: Option<&Netns>) -> Result<(Attachment, Moment)> {
    let attachment = match (netns, &record.spec.network) {
        (Some(netns), NetworkSource::Cni) => context.network.attach(&record.id, &record.spec, netns).await?,
        (Some(netns), _) => context.network.adopt(netns).await?,
        (None, _) => Attachment::default(),
    };
    kill_point("pod.attached");
    Ok((attachment, moment("network_attached")))
}

/// Waits for the agent, and plugs in what the guest finds when it is configured: its memory beyond what it boots with.
async fn boot(vmm: &Vmm, dir: &PodDir, plugged_mib: u32) -> Result<Booted, Failure> {
    let connected = tokio::select! {
        () = vmm.wait() => return Err(Failure::VmEnded),
        connected = Agent::connect(dir.clone(), BOOT_LIMIT) => connected,
    };
    let plugged = match connected {
        Ok(agent) => control::run(dir, &Command::SetMemory { mib: plugged_mib }, &[]).await.map(|()| agent),
        Err(error) => Err(error),
    };
    match plugged {
        Ok((agent, kernel, notices)) => Ok(Booted { agent, kernel, notices, moments: vec![moment("agent_ready")] }),
        // A connection that breaks is how a VMM's end is heard of first.
        Err(_) if tokio::time::timeout(END_LIMIT, vmm.wait()).await.is_ok() => Err(Failure::VmEnded),
        Err(error) => Err(error.context("the guest did not come up").context_end(&console_tail(dir).await).into()),
    }
}

/// The end of what the guest printed, for an error text.
async fn console_tail(dir: &PodDir) -> String {
    let Ok(Reply::Console { text, .. }) = control::ask(dir, &Command::Console { from: 0 }, &[]).await else {
        return String::new();
    };
    let mut start = text.len().saturating_sub(CONSOLE_TAIL);
    while !text.is_char_boundary(start) {
        start = start.saturating_add(1);
    }
    text.get(start..).unwrap_or_default().trim().to_owned()
}

fn realtime() -> u64 {
    u64::try_from(clock::realtime_ns()).unwrap_or(0)
}
