//! What is known of every call of the CRI: who made it, what it was about, how it ended and how long it took. All of them are counted; each
//! that changes something leaves one line in the log, under the target `audit`, and each that its client traces is a span.
//!
//! Who a call is about only its handler knows, and says so by [`pod`], [`container`] and [`image`]; the line is written here, also
//! for calls that are refused, late or given up by their clients. Neither commands nor environments are logged: they hold secrets.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::{Request, Response};
use tonic::transport::server::UdsConnectInfo;
use tonic::{Code, Status};
use tower::Service;

use crate::clock;
use crate::metrics::Metrics;
use crate::pod::{ContainerStatus, PodStatus, Pods};
use crate::spans::{self, Spans, Trace};
use crate::spec::PodIdentity;

/// Target of the audit's lines.
const AUDIT: &str = "audit";

/// The name under which calls are counted that the CRI does not have.
const UNKNOWN: &str = "unknown";

/// The CRI's calls, by its own words.
static CALLS: LazyLock<BTreeSet<&'static str>> = LazyLock::new(|| {
    let calls = include_str!("../proto/cri.proto").lines().filter_map(|line| line.trim().strip_prefix("rpc "));
    calls.filter_map(|line| line.split('(').next()).map(str::trim).collect()
});

/// Beginnings of the names of calls that change nothing.
const READING: [&str; 5] = ["List", "Stream", "Version", "Status", "Get"];

/// The same, by their ends.
const READING_END: [&str; 4] = ["Status", "Stats", "FsInfo", "RuntimeConfig"];

/// The one call that changes something and ends as those do that do not.
const UPDATE_CONFIG: &str = "UpdateRuntimeConfig";

/// The one that starts a VM.
const RUN_POD: &str = "/RunPodSandbox";

fn changes(call: &str) -> bool {
    let reads =
        READING.iter().any(|start| call.starts_with(start)) || READING_END.iter().any(|end| call.ends_with(end));
    call == UPDATE_CONFIG || !reads
}

/// What a call is about; what is not known is left out.
#[derive(Clone, Debug, Default)]
struct Subject {
    identity: Option<PodIdentity>,
    pod_id: Option<String>,
    container: Option<String>,
    container_id: Option<String>,
    image: Option<String>,
}

impl Subject {
    /// As OpenTelemetry's conventions name them.
    fn attributes(&self) -> Vec<(&'static str, String)> {
        let identity = self.identity.as_ref();
        let known = [
            ("k8s.namespace.name", identity.map(|identity| &identity.namespace)),
            ("k8s.pod.name", identity.map(|identity| &identity.name)),
            ("k8s.pod.uid", identity.map(|identity| &identity.uid)),
            ("k8s.container.name", self.container.as_ref()),
            ("container.id", self.container_id.as_ref()),
            ("container.image.name", self.image.as_ref()),
        ];
        known.into_iter().filter_map(|(name, value)| Some((name, value?.clone()))).collect()
    }
}

tokio::task_local! {
    static SUBJECT: RefCell<Subject>;
}

fn with(say: impl FnOnce(&mut Subject)) {
    // Outside of a call there is nobody to tell.
    let _ = SUBJECT.try_with(|subject| say(&mut subject.borrow_mut()));
}

/// The call is about a pod, which may not be there yet.
pub(crate) fn identity(identity: &PodIdentity) {
    with(|subject| subject.identity = Some(identity.clone()));
}

/// The call has made a pod.
pub(crate) fn pod_id(id: &str) {
    with(|subject| subject.pod_id = Some(id.to_owned()));
}

/// The call is about the pod that `id` names, which may not be there.
pub(crate) fn pod(pods: &Pods, id: &str) {
    match pods.pod(id) {
        Ok(pod) => found_pod(&pod),
        Err(_) => pod_id(id),
    }
}

fn found_pod(pod: &PodStatus) {
    identity(&pod.spec.identity);
    pod_id(&pod.id);
}

/// The call is about a container that is not there yet.
pub(crate) fn container_name(name: &str) {
    with(|subject| subject.container = Some(name.to_owned()));
}

/// The call has made a container.
pub(crate) fn container_id(id: &str) {
    with(|subject| subject.container_id = Some(id.to_owned()));
}

/// The call is about the container that `id` names, which may not be there.
pub(crate) fn container(pods: &Pods, id: &str) {
    container_id(id);
    let Ok(container) = pods.container(id) else { return };
    let ContainerStatus { id, pod_id, spec, .. } = container;
    container_id(&id);
    container_name(&spec.name);
    pod(pods, &pod_id);
}

/// The call is about an image.
pub(crate) fn image(name: &str) {
    with(|subject| subject.image = Some(name.to_owned()));
}

/// A service whose calls are counted and, if they change something, written down.
#[derive(Clone, Debug)]
pub(crate) struct Observed<S> {
    pub(crate) inner: S,
    pub(crate) metrics: Metrics,
    pub(crate) spans: Spans,
}

impl<S, B, R> Service<Request<B>> for Observed<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    S::Error: 'static,
    R: 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let named = request.uri().path().rsplit('/').next().unwrap_or_default();
        let call = CALLS.get(named).copied().unwrap_or(UNKNOWN);
        let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
        let (uid, pid) = (peer.map(|peer| peer.uid()), peer.and_then(|peer| peer.pid()));
        // Dropped without an answer, the call was given up.
        let mut end = End {
            call,
            uid,
            pid,
            code: Code::Cancelled,
            began: Instant::now(),
            metrics: self.metrics.clone(),
            traced: self.traced(call, &request),
        };
        let answer = self.inner.call(request);
        Box::pin(SUBJECT.scope(RefCell::default(), async move {
            let answer = answer.await;
            end.answered(match &answer {
                // A call that fails has its status in the head; one that does not may have it behind the message.
                Ok(response) => Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code()),
                Err(_) => Code::Internal,
            });
            answer
        }))
    }
}

impl<S> Observed<S> {
    fn traced<B>(&self, call: &str, request: &Request<B>) -> Option<Traced> {
        let trace = self.spans.trace(request.headers())?;
        let name = if call == UNKNOWN { UNKNOWN } else { request.uri().path().trim_start_matches('/') };
        Some(Traced { trace, name: name.to_owned(), spans: self.spans.clone() })
    }
}

/// A call that its client traces.
struct Traced {
    trace: Trace,
    name: String,
    spans: Spans,
}

impl Traced {
    fn tell(self, code: Code, took: Duration, subject: &Subject) {
        let to_ns = clock::realtime_ns();
        let took = i64::try_from(took.as_nanos()).unwrap_or(i64::MAX);
        let made_pod = subject.pod_id.clone().filter(|_| self.name.ends_with(RUN_POD) && code == Code::Ok);
        self.spans.tell(spans::Call {
            trace: self.trace,
            name: self.name,
            from_ns: to_ns.saturating_sub(took),
            to_ns,
            code,
            attributes: subject.attributes(),
            made_pod,
        });
    }
}

/// Tells of a call when it is over, in whatever way.
struct End {
    call: &'static str,
    uid: Option<u32>,
    pid: Option<i32>,
    code: Code,
    began: Instant,
    metrics: Metrics,
    traced: Option<Traced>,
}

impl End {
    fn answered(&mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let took = self.began.elapsed();
        let code = code_name(self.code);
        self.metrics.called(self.call, code, took);
        let changes = changes(self.call);
        if !changes && self.traced.is_none() {
            return;
        }
        let subject = SUBJECT.try_with(|subject| subject.borrow().clone()).unwrap_or_default();
        if let Some(traced) = self.traced.take() {
            traced.tell(self.code, took, &subject);
        }
        if !changes {
            return;
        }
        let identity = subject.identity.as_ref();
        tracing::info!(
            target: AUDIT,
            call = self.call,
            code,
            ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            uid = self.uid,
            pid = self.pid,
            namespace = identity.map(|identity| identity.namespace.as_str()),
            pod = identity.map(|identity| identity.name.as_str()),
            pod_uid = identity.map(|identity| identity.uid.as_str()),
            pod_id = subject.pod_id.as_deref(),
            container = subject.container.as_deref(),
            container_id = subject.container_id.as_deref(),
            image = subject.image.as_deref(),
        );
    }
}

/// As the gRPC specification spells it in its Go library, and so crictl and the kubelet.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Canceled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_either_reads_or_is_written_down() {
        assert_eq!(CALLS.len(), 41);
        let written: Vec<_> = CALLS.iter().copied().filter(|call| changes(call)).collect();
        let expected = [
            "Attach",
            "CheckpointContainer",
            "CreateContainer",
            "Exec",
            "ExecSync",
            "PortForward",
            "PullImage",
            "RemoveContainer",
            "RemoveImage",
            "RemovePodSandbox",
            "ReopenContainerLog",
            "RunPodSandbox",
            "StartContainer",
            "StopContainer",
            "StopPodSandbox",
            "UpdateContainerResources",
            "UpdatePodSandboxResources",
            "UpdateRuntimeConfig",
        ];
        assert_eq!(written, expected);
    }
}
