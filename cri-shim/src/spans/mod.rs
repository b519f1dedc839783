//! Spans for a collector of OpenTelemetry's: one for each call that its client traces, and below RunPodSandbox one for each
//! phase of the pod's start.
//!
//! ```text
//! call with a sampled traceparent ──tell──▶ queue ──[export]──▶ collector, by OTLP over gRPC
//! ```
//! Who is traced waits for nothing here: spans for which the queue has no room, or which the collector does not take, are lost,
//! and the log says so. Calls that their clients do not trace cost a look at their headers.

mod export;

use http::HeaderMap;
use tokio::sync::mpsc;
use tonic::Code;
use tonic::transport::Endpoint;

use crate::pod::Pods;

/// Header in which a client names its span (W3C Trace Context, §3.2).
const TRACEPARENT: &str = "traceparent";

/// Calls that may wait for the collector.
const QUEUE: usize = 1024;

/// The span of a client, below which those of its call belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trace {
    trace_id: [u8; 16],
    parent_id: [u8; 8],
}

/// A call that is over.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) trace: Trace,
    /// Service and method, as in the call's path.
    pub(crate) name: String,
    /// `CLOCK_REALTIME` in nanoseconds.
    pub(crate) from_ns: i64,
    /// The same clock.
    pub(crate) to_ns: i64,
    pub(crate) code: Code,
    /// What it was about.
    pub(crate) attributes: Vec<(&'static str, String)>,
    /// The pod that it has made.
    pub(crate) made_pod: Option<String>,
}

/// Where calls are told. Cheap to clone; the default tells nobody.
#[derive(Clone, Debug, Default)]
pub struct Spans(Option<mpsc::Sender<Call>>);

impl Spans {
    /// Tells a collector, for as long as the runtime lives. It need not be there yet.
    #[must_use]
    pub fn start(collector: &Endpoint, pods: Pods) -> Self {
        let (calls, told) = mpsc::channel(QUEUE);
        tokio::spawn(export::run(told, collector.connect_lazy(), pods));
        Self(Some(calls))
    }

    /// The client's span, if it wants this call traced and somebody is told.
    pub(crate) fn trace(&self, headers: &HeaderMap) -> Option<Trace> {
        self.0.as_ref()?;
        Trace::parse(headers.get(TRACEPARENT)?.to_str().ok()?)
    }

    pub(crate) fn tell(&self, call: Call) {
        let Some(calls) = &self.0 else { return };
        if let Err(error) = calls.try_send(call) {
            tracing::warn!(%error, "a span is lost: the collector is too slow");
        }
    }
}

impl Trace {
    /// A sampled traceparent (W3C Trace Context, §3.2.2); later versions begin with the fields of this one.
    fn parse(text: &str) -> Option<Self> {
        let mut fields = text.split('-');
        let mut field = || fields.next();
        let (version, trace_id, parent_id, flags) = (field()?, field()?, field()?, field()?);
        let [version] = hex(version)?;
        let [flags] = hex(flags)?;
        let ends = version != 0 || fields.next().is_none();
        let trace = Self { trace_id: hex(trace_id)?, parent_id: hex(parent_id)? };
        let valid = version != 0xff && ends && trace.trace_id != [0; 16] && trace.parent_id != [0; 8];
        (valid && flags & 1 == 1).then_some(trace)
    }
}

/// So many bytes in small hexadecimal digits, and nothing else.
fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let small = |digit: u8| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit);
    if text.len() != N.checked_mul(2)? || !text.bytes().all(small) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_sampled_parent_is_read_as_the_recommendation_writes_it() {
        let trace = Trace::parse(SAMPLED).expect("valid");
        assert_eq!(trace.trace_id[..2], [0x4b, 0xf9]);
        assert_eq!(trace.parent_id[6..], [0x02, 0xb7]);
        // A later version may say more.
        assert_eq!(Trace::parse(&SAMPLED.replacen("00", "01", 1).replace("-01", "-01-more")), Some(trace));
    }

    #[test]
    fn what_is_not_one_traces_nothing() {
        let unsampled = SAMPLED.replace("-01", "-00");
        let zero_trace = SAMPLED.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32));
        let zero_parent = SAMPLED.replace("00f067aa0ba902b7", &"0".repeat(16));
        let last_version = SAMPLED.replacen("00", "ff", 1);
        let large = SAMPLED.to_uppercase();
        let longer = format!("{SAMPLED}-more");
        for text in [&unsampled, &zero_trace, &zero_parent, &last_version, &large, &longer, "", "00-1-2-01", "00-+f-"] {
            assert_eq!(Trace::parse(text), None, "{text}");
        }
    }

    #[test]
    fn without_a_collector_nothing_is_traced() {
        let headers = HeaderMap::from_iter([(TRACEPARENT.parse().expect("a name"), SAMPLED.parse().expect("a value"))]);
        assert_eq!(Spans::default().trace(&headers), None);
        let (calls, _told) = mpsc::channel(1);
        assert_eq!(Spans(Some(calls)).trace(&headers), Trace::parse(SAMPLED));
    }
}
