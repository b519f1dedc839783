//! Deadlines of calls, as clients set them (gRPC over HTTP/2, `Timeout`).
//!
//! tonic keeps them too, but answers `Cancelled` to a call that is late, where the protocol and every client have
//! `DeadlineExceeded`. This layer stands inside tonic's, so that its clock starts first, and it looks at the clock
//! whenever it is polled: by the time tonic's own timer is over, the call has been answered.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use http::{HeaderMap, Request, Response};
use tokio::time::{Instant, sleep_until};
use tonic::Status;
use tower::Service;

/// Header of the time that a client gives a call.
const TIMEOUT: &str = "grpc-timeout";

/// Most digits of that time (gRPC over HTTP/2, `TimeoutValue`).
const MOST_DIGITS: usize = 8;

/// A service whose calls end at their deadline.
#[derive(Clone, Debug)]
pub(super) struct Deadline<S>(pub(super) S);

impl<S, B, R> Service<Request<B>> for Deadline<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    S::Error: 'static,
    R: Default + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut std::task::Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let limit = limit(request.headers());
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let answer = self.0.call(request);
        match deadline {
            Some(deadline) => Box::pin(by(deadline, answer)),
            None => Box::pin(answer),
        }
    }
}

/// The answer, or at the deadline that there is none; the call is then dropped.
async fn by<R: Default, E>(
    deadline: Instant,
    answer: impl Future<Output = Result<Response<R>, E>>,
) -> Result<Response<R>, E> {
    let (mut answer, mut over) = (pin!(answer), pin!(sleep_until(deadline)));
    poll_fn(|context| {
        if let Poll::Ready(answer) = answer.as_mut().poll(context) {
            return Poll::Ready(answer);
        }
        if over.as_mut().poll(context).is_pending() && Instant::now() < deadline {
            return Poll::Pending;
        }
        let late = Status::deadline_exceeded("the call was not done within the time that its client gave it");
        Poll::Ready(Ok(late.into_http()))
    })
    .await
}

/// The time that a client gives; one that cannot be understood is none.
fn limit(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > MOST_DIGITS || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count.checked_mul(3600)?)),
        "M" => Some(Duration::from_secs(count.checked_mul(60)?)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tower::service_fn;

    use super::*;

    fn given(text: &str) -> Request<()> {
        Request::builder().header(TIMEOUT, text).body(()).expect("a request")
    }

    #[test]
    fn times_are_read_as_the_protocol_writes_them() {
        let read = |text: &str| limit(given(text).headers());
        assert_eq!(read("1m"), Some(Duration::from_millis(1)));
        assert_eq!(read("2S"), Some(Duration::from_secs(2)));
        assert_eq!(read("3H"), Some(Duration::from_secs(10_800)));
        assert_eq!(read("99999999M"), Some(Duration::from_secs(99_999_999 * 60)));
        for nonsense in ["", "m", "1", "1x", "-1m", "123456789n", "\u{e4}"] {
            assert_eq!(read(nonsense), None, "{nonsense}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_call_is_told_so_and_dropped() {
        let (held, dropped) = tokio::sync::oneshot::channel::<()>();
        let mut held = Some(held);
        let mut service = Deadline(service_fn(move |_: Request<()>| {
            let held = held.take();
            async move {
                std::future::pending::<()>().await;
                drop(held);
                Ok::<_, tonic::transport::Error>(Response::new(()))
            }
        }));
        let begun = Instant::now();
        let answer = service.call(given("1m")).await.expect("an answer");
        assert_eq!(Status::from_header_map(answer.headers()).expect("a status").code(), Code::DeadlineExceeded);
        assert!(begun.elapsed() >= Duration::from_millis(1));
        assert!(dropped.await.is_err(), "the call is dropped");
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_in_time_is_left_alone() {
        let mut service = Deadline(service_fn(|_: Request<()>| async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok::<_, tonic::transport::Error>(Response::new(7))
        }));
        assert_eq!(*service.call(given("2S")).await.expect("an answer").body(), 7);
        assert_eq!(*service.call(Request::new(())).await.expect("an answer").body(), 7);
    }
}
