//! The daemon ends at each named point of an image's, a pod's and a container's life: nothing leaks, nothing is lost,
//! nothing is made up.
//!
//! `PERICARP_KILL_ROUNDS` says how often at each point; twice unless told.

use std::fs;
use std::path::Path;

use cri_shim::cri::proto::image_service_client::ImageServiceClient;
use cri_shim::cri::proto::{
    ContainerConfig, ContainerMetadata, ContainerState, CreateContainerRequest, ExecSyncRequest, ImageSpec,
    ListContainersRequest, ListPodSandboxRequest, Mount, PodSandboxState, PullImageRequest, RemoveContainerRequest,
    StartContainerRequest,
};
use pericarp_tests::{Client, Inventory, Node, image, wait_until};
use tonic::Status;

const ROUNDS: usize = 2;

/// Every point there is in the daemon's sources.
const POINTS: [&str; 23] = [
    "image.converted",
    "image.stored",
    "pod.recorded",
    "pod.prepared",
    "pod.spawned",
    "pod.booting",
    "pod.attached",
    "pod.booted",
    "pod.configured",
    "pod.running",
    "container.recorded",
    "container.mapped",
    "container.file_server",
    "container.shared",
    "container.made",
    "container.created",
    "container.started",
    "container.running",
    "container.removed",
    "pod.off",
    "pod.released",
    "pod.removing",
    "pod.removed",
];

/// What a container that ends by itself ends with.
const EXIT_CODE: i32 = 5;

/// How far a life came before the daemon ended: what was asked, and what was answered.
#[derive(Debug, Default)]
struct Life {
    pod: Option<String>,
    /// Ends by itself, soon after its start.
    brief: Option<String>,
    container: Option<String>,
    started: bool,
    removal_asked: bool,
    stop_asked: bool,
    removed: bool,
}

fn container(name: &str, command: &str, shared: Option<&Path>) -> ContainerConfig {
    let mount = |directory: &Path| Mount {
        container_path: "/shared".into(),
        host_path: directory.to_str().expect("a plain path").into(),
        ..Default::default()
    };
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(ImageSpec { image: image::BUSYBOX.into(), ..Default::default() }),
        command: ["sh", "-c", command].map(str::to_owned).into(),
        mounts: shared.into_iter().map(mount).collect(),
        ..Default::default()
    }
}

fn create(client: &mut Client, pod: &str, config: ContainerConfig) -> Result<String, Status> {
    let request = CreateContainerRequest { pod_sandbox_id: pod.into(), config: Some(config), sandbox_config: None };
    client.ask(async |cri| cri.create_container(request).await).map(|made| made.into_inner().container_id)
}

fn start(client: &mut Client, id: &str) -> Result<(), Status> {
    let request = StartContainerRequest { container_id: id.into() };
    client.ask(async |cri| cri.start_container(request).await).map(drop)
}

fn pull(client: &mut Client) -> Result<(), Status> {
    let image = Some(ImageSpec { image: image::SMALL.into(), ..Default::default() });
    let request = PullImageRequest { image, ..Default::default() };
    client.ask_images(async |images: &mut ImageServiceClient<_>| images.pull_image(request).await).map(drop)
}

/// Lives until the daemon ends under it, which is the error.
fn live(client: &mut Client, shared: &Path, life: &mut Life) -> Result<(), Status> {
    pull(client)?;
    let pod = client.try_run_pod("doomed")?;
    life.pod = Some(pod.clone());
    let brief = create(client, &pod, container("brief", &format!("exit {EXIT_CODE}"), None))?;
    start(client, &brief)?;
    life.brief = Some(brief);
    let id = create(client, &pod, container("lasting", "sleep 1000", Some(shared)))?;
    life.container = Some(id.clone());
    start(client, &id)?;
    life.started = true;
    life.removal_asked = true;
    let remove = RemoveContainerRequest { container_id: id };
    client.ask(async |cri| cri.remove_container(remove).await)?;
    life.container = None;
    life.stop_asked = true;
    client.try_remove_pod(&pod)?;
    life.removed = true;
    Ok(())
}

fn exec(client: &mut Client, id: &str) -> Result<(), Status> {
    let cmd = ["test", "-d", "/shared"].map(str::to_owned).into();
    let request = ExecSyncRequest { container_id: id.into(), cmd, timeout: 30 };
    let answer = client.ask(async |cri| cri.exec_sync(request).await)?.into_inner();
    assert_eq!(answer.exit_code, 0, "{answer:?}");
    Ok(())
}

/// Holds what the new daemon tells against what the old one answered.
fn assert_true(client: &mut Client, life: &Life) {
    let pods = client.ask(async |cri| cri.list_pod_sandbox(ListPodSandboxRequest::default()).await);
    let pods = pods.expect("answers").into_inner().items;
    assert!(pods.len() <= 1, "{pods:?}");
    let Some(known) = life.pod.as_ref().filter(|_| !life.removed) else {
        assert!(!life.removed || pods.is_empty(), "a removed pod is back: {pods:?}");
        return;
    };
    if !life.stop_asked {
        assert_eq!(pods.iter().map(|pod| &pod.id).collect::<Vec<_>>(), [known], "the pod is lost");
        assert_eq!(pods[0].state(), PodSandboxState::SandboxReady);
    }
    let all = client.ask(async |cri| cri.list_containers(ListContainersRequest::default()).await);
    let all = all.expect("answers").into_inner().containers;
    let find = |name: &str| all.iter().find(|it| it.metadata.as_ref().is_some_and(|metadata| metadata.name == name));
    if life.brief.is_some() && !life.stop_asked {
        assert_eq!(find("brief").map(|found| &found.id), life.brief.as_ref(), "the container is lost");
    }
    let lasting = find("lasting");
    if !life.removal_asked {
        assert!(life.container.is_none() || lasting.map(|found| &found.id) == life.container.as_ref(), "{all:?}");
        assert!(!life.started || lasting.is_some_and(|found| found.state() == ContainerState::ContainerRunning));
    }
    // One that its caller has not heard of may be there, if it is what it says it is.
    match lasting.map(|found| (found.state(), found.id.clone())) {
        None => {}
        Some((ContainerState::ContainerRunning, id)) => exec(client, &id).expect("a running container runs"),
        Some((ContainerState::ContainerCreated, id)) => start(client, &id).expect("a created container starts"),
        Some((state, _)) => assert!(life.removal_asked && state == ContainerState::ContainerExited, "{state:?}"),
    }
}

fn die_at(node: &mut Node, point: &str, shared: &Path, before: &Inventory) {
    node.kill_daemon();
    node.start_doomed_daemon(point);
    let mut life = Life::default();
    let end = live(&mut Client::connect(&node.socket()), shared, &mut life);
    assert!(end.is_err(), "{point} was not reached: {life:?}");
    assert!(node.daemon_was_killed(), "{point}: {life:?}, {end:?}");
    node.start_daemon();
    let mut client = Client::connect(&node.socket());
    assert_true(&mut client, &life);
    if let Some(brief) = life.brief.as_ref().filter(|_| !life.stop_asked) {
        wait_until("the brief container's end", || {
            node.inspect_container(brief)["status"]["state"] == "CONTAINER_EXITED"
        });
        assert_eq!(node.inspect_container(brief)["status"]["exitCode"], EXIT_CODE);
    }
    let pods = client.ask(async |cri| cri.list_pod_sandbox(ListPodSandboxRequest::default()).await);
    for pod in pods.expect("answers").into_inner().items {
        client.remove_pod(&pod.id);
    }
    node.crictl(["rmi", image::SMALL]);
    let after = node.inventory_with_images();
    assert!(after == *before, "{point}: the node is not as it was:\n{}", after.difference(before));
}

#[test]
fn a_daemon_may_die_at_any_point() {
    let rounds = std::env::var("PERICARP_KILL_ROUNDS")
        .map_or(ROUNDS, |text| text.parse().expect("PERICARP_KILL_ROUNDS is a number"));
    let mut node = Node::start();
    let shared = node.directory().join("shared");
    // More than would be copied into the guest, and writable.
    fs::create_dir_all(&shared).expect("the test's directory is writable");
    node.crictl(["pull", image::BUSYBOX]).ok();
    let mut client = Client::connect(&node.socket());
    let first = client.run_pod("first");
    client.remove_pod(&first);
    let before = node.inventory_with_images();
    for round in 1..=rounds {
        for point in POINTS {
            die_at(&mut node, point, &shared, &before);
        }
        println!("round {round} of {rounds}: killed at {} points", POINTS.len());
    }
}

#[test]
fn no_point_is_left_out() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cri-shim/src");
    let mut found = Vec::new();
    for directory in ["pod", "image"] {
        for entry in fs::read_dir(sources.join(directory)).expect("the sources are here").flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let points = text.split("kill_point(\"").skip(1).filter_map(|rest| rest.split('"').next());
            found.extend(points.map(str::to_owned));
        }
    }
    let mut named: Vec<String> = POINTS.into_iter().map(str::to_owned).collect();
    found.sort();
    named.sort();
    assert_eq!(found, named);
}
