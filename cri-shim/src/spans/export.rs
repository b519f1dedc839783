//! Calls become spans and go to the collector, many at a time.

use std::time::Duration;

use tokio::sync::mpsc;
use tonic::Code;
use tonic::transport::Channel;

use super::Call;
use crate::clock;
use crate::pod::{Phase, Pods, phases};
use crate::random;
use proto::trace_service_client::TraceServiceClient;
use proto::{AnyValue, ExportTraceServiceRequest, KeyValue, Resource, ResourceSpans, Scope, ScopeSpans, Span, Status};
use proto::{any_value::Value, span::Kind, status::Code as Outcome};

/// The messages of `proto/otlp.proto`.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, reason = "generated")]
mod proto {
    tonic::include_proto!("opentelemetry.proto.collector.trace.v1");
}

/// Most calls told at a time.
const BATCH: usize = 256;

/// How long the first call of a batch waits for others.
const GATHERING: Duration = Duration::from_millis(500);

/// Longest wait for the collector.
const LIMIT: Duration = Duration::from_secs(10);

/// Tells the collector until nobody is left who could be traced.
pub(super) async fn run(mut told: mpsc::Receiver<Call>, collector: Channel, pods: Pods) {
    let mut client = TraceServiceClient::new(collector);
    // Said once for each time that the collector goes away, not for each batch.
    let mut lost = false;
    while let Some(first) = told.recv().await {
        tokio::time::sleep(GATHERING).await;
        let mut calls = vec![first];
        while calls.len() < BATCH
            && let Ok(call) = told.try_recv()
        {
            calls.push(call);
        }
        let mut spans = Vec::with_capacity(calls.len());
        for call in calls {
            spans.extend(of_call(call, &pods).await);
        }
        let mut request = tonic::Request::new(request(spans));
        request.set_timeout(LIMIT);
        match client.export(request).await {
            Ok(answer) => {
                lost = false;
                let rejected = answer.into_inner().partial_success.filter(|partial| partial.rejected_spans > 0);
                if let Some(partial) = rejected {
                    tracing::warn!(
                        spans = partial.rejected_spans,
                        why = partial.error_message,
                        "the collector refused spans"
                    );
                }
            }
            Err(error) if !lost => {
                lost = true;
                tracing::warn!(%error, "the collector takes no spans; they are lost until it does");
            }
            Err(_) => {}
        }
    }
}

/// A call's span, and those of what it was made of.
async fn of_call(call: Call, pods: &Pods) -> Vec<Span> {
    let (Some(id), made_pod) = (span_id(), call.made_pod.clone()) else { return Vec::new() };
    let mut spans = vec![span(call, id.clone())];
    if let Some(pod) = made_pod
        // A pod that is gone already has no timeline.
        && let Ok(moments) = pods.timeline(&pod).await
    {
        let parent = spans[0].clone();
        spans.extend(phases(&moments).into_iter().filter_map(|phase| below(&parent, phase)));
    }
    spans
}

fn span(call: Call, id: Vec<u8>) -> Span {
    let code = attribute("rpc.grpc.status_code", Value::IntValue(i32::from(call.code).into()));
    let (service, method) = call.name.split_once('/').unwrap_or(("", &call.name));
    let named = [("rpc.system", "grpc"), ("rpc.service", service), ("rpc.method", method)];
    let named = named.map(|(key, value)| attribute(key, Value::StringValue(value.to_owned())));
    let about = call.attributes.into_iter().map(|(key, value)| attribute(key, Value::StringValue(value)));
    Span {
        trace_id: call.trace.trace_id.to_vec(),
        span_id: id,
        parent_span_id: call.trace.parent_id.to_vec(),
        kind: Kind::Server.into(),
        start_time_unix_nano: u64::try_from(call.from_ns).unwrap_or(0),
        end_time_unix_nano: u64::try_from(call.to_ns).unwrap_or(0),
        attributes: named.into_iter().chain([code]).chain(about).collect(),
        status: Some(Status { code: outcome(call.code).into(), message: String::new() }),
        name: call.name,
    }
}

/// A phase of the start that `parent` asked for; none if it is not known by what name.
fn below(parent: &Span, phase: Phase) -> Option<Span> {
    let since_boot = i64::try_from(clock::boottime_ns()).ok()?;
    let booted = clock::realtime_ns().checked_sub(since_boot)?;
    let at = |ns: u64| u64::try_from(booted.checked_add(i64::try_from(ns).ok()?)?).ok();
    Some(Span {
        trace_id: parent.trace_id.clone(),
        span_id: span_id()?,
        parent_span_id: parent.span_id.clone(),
        name: phase.name.to_owned(),
        kind: Kind::Internal.into(),
        start_time_unix_nano: at(phase.from_ns)?,
        end_time_unix_nano: at(phase.to_ns)?,
        ..Span::default()
    })
}

/// Eight bytes that no other span has; none if the kernel gives none, and then there is no span.
fn span_id() -> Option<Vec<u8>> {
    let seed = random::seed().ok()?;
    seed.get(..8).map(<[u8]>::to_vec)
}

/// A server's error is the server's fault, as OpenTelemetry's conventions for gRPC have it.
fn outcome(code: Code) -> Outcome {
    match code {
        Code::Unknown
        | Code::DeadlineExceeded
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => Outcome::Error,
        _ => Outcome::Unset,
    }
}

fn request(spans: Vec<Span>) -> ExportTraceServiceRequest {
    let text = |key, value: &str| attribute(key, Value::StringValue(value.to_owned()));
    let version = env!("CARGO_PKG_VERSION");
    let attributes = vec![text("service.name", "pericarpd"), text("service.version", version)];
    let scope = Scope { name: "pericarp".to_owned(), version: version.to_owned() };
    let scope_spans = vec![ScopeSpans { scope: Some(scope), spans }];
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans { resource: Some(Resource { attributes }), scope_spans }],
    }
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }) }
}
