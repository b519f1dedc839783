//! Exec and attach: one client, one agent session, and bytes between them in both directions at once.
//!
//! How a client speaks is behind [`Hear`] and [`Tell`]; SPDY and websocket differ in nothing else.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::Instant;

use super::spdy::{self, Event};
use super::{FAREWELL, Gone, IDLE_LIMIT, Request, STREAMS_LIMIT, Wanted, websocket};
use crate::agent::{Session, SessionOutput, SessionReader, SessionWriter};
use crate::error::{Error, Result};
use crate::pod::Pods;

/// Longest message about a terminal's size, in bytes.
const RESIZE_BYTES: usize = 4 << 10;

/// What a client says.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Stdin(Bytes),
    StdinEnd,
    Resize { columns: u32, rows: u32 },
}

/// Which of a command's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    Stdout,
    Stderr,
}

/// How a command went.
#[derive(Debug, PartialEq, Eq)]
enum Ending {
    /// Attach: the watched process ended, one way or another. Exec: with 0.
    Success,
    /// An exec's exit code.
    Code(i32),
    /// There was no command, or it was lost.
    Failed(Error),
}

/// A client's voice.
trait Hear: Send {
    /// What it says next; `None` when it has gone.
    fn next(&mut self) -> impl Future<Output = Option<Said>> + Send;
}

/// A client's ear. Waits while the client does not listen.
trait Tell: Send {
    fn output(&mut self, from: Output, bytes: Vec<u8>) -> impl Future<Output = Result<(), Gone>> + Send;
    fn end(&mut self, ending: Ending) -> impl Future<Output = Result<(), Gone>> + Send;
}

/// Serves a client that speaks SPDY until it or the command is gone.
pub(super) async fn over_spdy<T>(pods: Pods, request: Request, protocol: &str, io: T) -> Result<(), spdy::Error>
where
    T: AsyncRead + AsyncWrite + Send + 'static,
{
    let Some(wanted) = wanted(&request) else { return Ok(()) };
    let (mut reader, writer) = spdy::serve(io)?;
    let resizable = wanted.terminal && protocol.starts_with(['v']) && protocol != "v2.channel.k8s.io";
    let opened = tokio::time::timeout(STREAMS_LIMIT, Streams::accept(&mut reader, &writer, wanted, resizable));
    let Ok(Some(streams)) = opened.await else { return Ok(()) };
    let hear = SpdyVoice { reader, writer: writer.clone(), streams, sizes: Sizes::default(), ended: false };
    let tell = SpdyEar { writer, streams, status: protocol == "v4.channel.k8s.io" };
    serve(open(&pods, &request), matches!(request, Request::Exec { .. }), hear, tell).await;
    Ok(())
}

/// Serves a client that speaks websocket until it or the command is gone.
pub(super) async fn over_websocket<T>(pods: Pods, request: Request, io: T)
where
    T: AsyncRead + AsyncWrite + Send + Unpin,
{
    let Some(wanted) = wanted(&request) else { return };
    let (reader, writer) = websocket::serve(io).await;
    let hear = WebsocketVoice { reader, wanted, sizes: Sizes::default() };
    let tell = WebsocketEar { writer, wanted };
    serve(open(&pods, &request), matches!(request, Request::Exec { .. }), hear, tell).await;
}

fn wanted(request: &Request) -> Option<Wanted> {
    match request {
        Request::Exec { wanted, .. } | Request::Attach { wanted, .. } => Some(*wanted),
        Request::PortForward { .. } => None,
    }
}

async fn open(pods: &Pods, request: &Request) -> Result<Session> {
    match request {
        Request::Exec { container, args, wanted } => {
            pods.exec(container, args.clone(), wanted.terminal, wanted.stdin).await
        }
        Request::Attach { container, wanted } => pods.attach(container, wanted.stdin).await,
        Request::PortForward { .. } => Err(Error::Internal("a port is not a command".into())),
    }
}

/// Opens the session and carries bytes until one side has ended; then lets the client hang up.
async fn serve(session: impl Future<Output = Result<Session>>, exec: bool, mut hear: impl Hear, mut tell: impl Tell) {
    let ending = match session.await {
        Ok(session) => carry(session, &mut hear, &mut tell).await,
        Err(error) => Some(Ending::Failed(error)),
    };
    let ending = match ending {
        // A process that is watched ends as it likes; only a command's own end is an answer.
        Some(Ending::Code(code)) if !exec || code == 0 => Ending::Success,
        Some(ending) => ending,
        None => return,
    };
    if tell.end(ending).await.is_ok() {
        // What it still says is not for anybody.
        let farewell = async { while hear.next().await.is_some() {} };
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
    }
}

/// Carries bytes both ways; `None` if the client has gone, or nothing happens for too long.
async fn carry(session: Session, hear: &mut impl Hear, tell: &mut impl Tell) -> Option<Ending> {
    let (mut from, mut to) = session.split();
    let clock = watch::Sender::new(Instant::now());
    tokio::select! {
        ending = outward(&mut from, tell, &clock) => ending,
        () = inward(hear, &mut to, &clock) => None,
        () = idle(clock.subscribe(), IDLE_LIMIT) => None,
    }
}

async fn outward(from: &mut SessionReader, tell: &mut impl Tell, clock: &watch::Sender<Instant>) -> Option<Ending> {
    loop {
        let told = match from.next().await {
            Ok(SessionOutput::Stdout(bytes)) => tell.output(Output::Stdout, bytes).await,
            Ok(SessionOutput::Stderr(bytes)) => tell.output(Output::Stderr, bytes).await,
            Ok(SessionOutput::Exit(code)) => return Some(Ending::Code(code)),
            Err(error) => return Some(Ending::Failed(error)),
        };
        told.ok()?;
        clock.send_replace(Instant::now());
    }
}

/// Until the client has gone. Input for a process that has ended is thrown away: its end is on the way.
async fn inward(hear: &mut impl Hear, to: &mut SessionWriter, clock: &watch::Sender<Instant>) {
    while let Some(said) = hear.next().await {
        let _ = match said {
            Said::Stdin(bytes) => to.write(&bytes).await,
            Said::StdinEnd => to.close_stdin().await,
            Said::Resize { columns, rows } => to.resize(columns, rows).await,
        };
        clock.send_replace(Instant::now());
    }
}

/// Until nothing has happened for as long as the limit.
async fn idle(clock: watch::Receiver<Instant>, limit: Duration) {
    loop {
        let until = *clock.borrow() + limit;
        if Instant::now() >= until {
            return;
        }
        tokio::time::sleep_until(until).await;
    }
}

impl Ending {
    /// As `metav1.Status`, from which clients take a command's exit code.
    fn status(&self) -> String {
        let status = match self {
            Self::Success => json!({"metadata": {}, "status": "Success"}),
            Self::Code(code) => json!({
                "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
                "message": self.text(),
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
            }),
            Self::Failed(_) => json!({
                "metadata": {}, "status": "Failure", "reason": "InternalError", "code": 500,
                "message": self.text(),
                "details": {"causes": [{"message": self.text()}]},
            }),
        };
        status.to_string()
    }

    /// As earlier versions of the protocol have it: nothing if all went well.
    fn text(&self) -> String {
        match self {
            Self::Success => String::new(),
            Self::Code(code) => format!("command terminated with exit code {code}"),
            Self::Failed(error) => error.to_string(),
        }
    }
}

/// Sizes of a terminal in a client's JSON, whole or in pieces.
#[derive(Debug, Default)]
struct Sizes(Vec<u8>);

impl Sizes {
    /// The last size that is complete.
    fn push(&mut self, bytes: &[u8]) -> Option<Said> {
        self.0.extend_from_slice(bytes);
        let mut values = serde_json::Deserializer::from_slice(&self.0).into_iter::<serde_json::Value>();
        let mut last = None;
        while let Some(Ok(value)) = values.next() {
            let length = |name: &str| value.get(name).and_then(serde_json::Value::as_u64);
            let length = |name| length(name).and_then(|length| u32::try_from(length).ok());
            if let (Some(columns), Some(rows)) = (length("Width"), length("Height")) {
                last = Some(Said::Resize { columns, rows });
            }
        }
        let read = values.byte_offset().min(self.0.len());
        self.0.drain(..read);
        if self.0.len() > RESIZE_BYTES {
            self.0.clear();
        }
        last
    }
}

/// The SPDY streams of a command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Streams {
    error: Option<u32>,
    stdin: Option<u32>,
    stdout: Option<u32>,
    stderr: Option<u32>,
    resize: Option<u32>,
}

impl Streams {
    /// Waits until the client has opened every stream that was asked for; `None` if it does otherwise.
    async fn accept<T: AsyncRead>(
        reader: &mut spdy::Reader<T>,
        writer: &spdy::Writer,
        wanted: Wanted,
        resizable: bool,
    ) -> Option<Self> {
        let mut streams = Self::default();
        while !streams.are_all(wanted, resizable) {
            let Ok(Some(Event::Opened { id, headers })) = reader.next().await else { return None };
            let place = match spdy::value(&headers, "streamtype")? {
                "error" => &mut streams.error,
                "stdin" => &mut streams.stdin,
                "stdout" => &mut streams.stdout,
                "stderr" => &mut streams.stderr,
                "resize" => &mut streams.resize,
                _ => return None,
            };
            if place.replace(id).is_some() {
                return None;
            }
            writer.reply(id).await.ok()?;
        }
        Some(streams)
    }

    fn are_all(&self, wanted: Wanted, resizable: bool) -> bool {
        self.error.is_some()
            && (self.stdin.is_some() || !wanted.stdin)
            && (self.stdout.is_some() || !wanted.stdout)
            && (self.stderr.is_some() || !wanted.stderr)
            && (self.resize.is_some() || !resizable)
    }
}

struct SpdyVoice<T> {
    reader: spdy::Reader<T>,
    writer: spdy::Writer,
    streams: Streams,
    sizes: Sizes,
    /// The last bytes of standard input have been passed on, its end not yet.
    ended: bool,
}

impl<T: AsyncRead + Send> Hear for SpdyVoice<T> {
    async fn next(&mut self) -> Option<Said> {
        loop {
            if std::mem::take(&mut self.ended) {
                return Some(Said::StdinEnd);
            }
            match self.reader.next().await.ok()?? {
                Event::Data { id, bytes, fin } if Some(id) == self.streams.stdin => {
                    self.ended = fin;
                    if !bytes.is_empty() {
                        return Some(Said::Stdin(bytes));
                    }
                }
                Event::Reset { id } if Some(id) == self.streams.stdin => self.ended = true,
                Event::Data { id, bytes, .. } if Some(id) == self.streams.resize => {
                    if let Some(said) = self.sizes.push(&bytes) {
                        return Some(said);
                    }
                }
                Event::Opened { id, .. } => self.writer.refuse(id).await.ok()?,
                Event::Data { .. } | Event::Reset { .. } => {}
            }
        }
    }
}

struct SpdyEar {
    writer: spdy::Writer,
    streams: Streams,
    /// The ending is told as a status, and not as text.
    status: bool,
}

impl Tell for SpdyEar {
    async fn output(&mut self, from: Output, bytes: Vec<u8>) -> Result<(), Gone> {
        let stream = match from {
            Output::Stdout => self.streams.stdout,
            Output::Stderr => self.streams.stderr,
        };
        match stream {
            Some(id) => self.writer.data(id, bytes).await,
            None => Ok(()),
        }
    }

    async fn end(&mut self, ending: Ending) -> Result<(), Gone> {
        let Streams { error, stdin, stdout, stderr, resize } = self.streams;
        let text = if self.status { ending.status() } else { ending.text() };
        if let Some(id) = error.filter(|_| !text.is_empty()) {
            self.writer.data(id, text).await?;
        }
        for id in [stdout, stderr, error, stdin, resize].into_iter().flatten() {
            self.writer.finish(id).await?;
        }
        let last = [error, stdin, stdout, stderr, resize].into_iter().flatten().max();
        self.writer.go_away(last.unwrap_or_default()).await
    }
}

/// Channels of a command over a websocket: the first byte of each message.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
/// Since version 5: the channel named by the second byte has ended.
const CLOSE: u8 = 255;

struct WebsocketVoice<T> {
    reader: websocket::Reader<T>,
    wanted: Wanted,
    sizes: Sizes,
}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Hear for WebsocketVoice<T> {
    async fn next(&mut self) -> Option<Said> {
        loop {
            let message = Bytes::from(self.reader.next().await?);
            match message.split_first() {
                Some((&STDIN, rest)) if self.wanted.stdin && !rest.is_empty() => {
                    return Some(Said::Stdin(message.slice_ref(rest)));
                }
                Some((&CLOSE, [STDIN])) if self.wanted.stdin => return Some(Said::StdinEnd),
                Some((&RESIZE, rest)) if self.wanted.terminal => {
                    if let Some(said) = self.sizes.push(rest) {
                        return Some(said);
                    }
                }
                _ => {}
            }
        }
    }
}

struct WebsocketEar<T> {
    writer: websocket::Writer<T>,
    wanted: Wanted,
}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Tell for WebsocketEar<T> {
    async fn output(&mut self, from: Output, bytes: Vec<u8>) -> Result<(), Gone> {
        let (channel, wanted) = match from {
            Output::Stdout => (STDOUT, self.wanted.stdout),
            Output::Stderr => (STDERR, self.wanted.stderr),
        };
        if wanted { self.writer.send(message(channel, &bytes)).await } else { Ok(()) }
    }

    async fn end(&mut self, ending: Ending) -> Result<(), Gone> {
        self.writer.send(message(STATUS, ending.status().as_bytes())).await?;
        self.writer.close().await
    }
}

fn message(channel: u8, bytes: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(bytes.len().saturating_add(1));
    message.push(channel);
    message.extend_from_slice(bytes);
    message
}

#[cfg(test)]
mod tests {
    use super::spdy::tests::Client;
    use super::*;

    const ALL: Wanted = Wanted { stdin: true, stdout: true, stderr: true, terminal: false };

    #[test]
    fn an_exit_code_is_a_cause() {
        let status: serde_json::Value = serde_json::from_str(&Ending::Code(7).status()).expect("JSON");
        assert_eq!((&status["status"], &status["reason"]), (&json!("Failure"), &json!("NonZeroExitCode")));
        assert_eq!(status["details"]["causes"], json!([{"reason": "ExitCode", "message": "7"}]));
        let success: serde_json::Value = serde_json::from_str(&Ending::Success.status()).expect("JSON");
        assert_eq!(success["status"], "Success");
        let failed = Ending::Failed(Error::NotFound("no container x".into()));
        assert!(failed.status().contains("no container x") && failed.text() == "no container x");
    }

    #[test]
    fn sizes_come_in_pieces_and_the_last_counts() {
        let mut sizes = Sizes::default();
        assert_eq!(sizes.push(br#"{"Width":80,"#), None);
        assert_eq!(sizes.push(b"\"Height\":24}\n"), Some(Said::Resize { columns: 80, rows: 24 }));
        let two = br#"{"Width":1,"Height":1}{"Width":2,"Height":3}"#;
        assert_eq!(sizes.push(two), Some(Said::Resize { columns: 2, rows: 3 }));
        assert_eq!(sizes.push(br#"{"Width":-1,"Height":99999999999}"#), None);
        let _ = sizes.push(&vec![b'"'; RESIZE_BYTES + 1]);
        assert!(sizes.0.len() <= RESIZE_BYTES);
    }

    #[tokio::test]
    async fn a_spdy_clients_streams_are_sorted_by_their_type() {
        let (mut client, server) = Client::new();
        let (mut reader, writer) = spdy::serve(server).expect("zlib");
        for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")] {
            client.open(id, &[("streamtype", kind)]).await;
        }
        let streams = Streams::accept(&mut reader, &writer, ALL, false).await.expect("all there");
        let expected = Streams { error: Some(1), stdin: Some(3), stdout: Some(5), stderr: Some(7), resize: None };
        assert_eq!(streams, expected);
        client.data(3, "in", true).await;
        let mut voice = SpdyVoice { reader, writer: writer.clone(), streams, sizes: Sizes::default(), ended: false };
        assert_eq!(voice.next().await, Some(Said::Stdin(Bytes::from_static(b"in"))));
        assert_eq!(voice.next().await, Some(Said::StdinEnd));
        let mut ear = SpdyEar { writer, streams, status: true };
        ear.output(Output::Stderr, b"oops".to_vec()).await.expect("is there");
        ear.end(Ending::Code(3)).await.expect("is there");
        let mut heard = client.all().await;
        heard.sort();
        assert!(heard.iter().all(|(_, _, ended)| *ended) && heard.len() == 4, "{heard:?}");
        assert_eq!(heard[3].1, b"oops");
        assert_eq!(heard[0].1, Ending::Code(3).status().into_bytes());
    }

    #[tokio::test]
    async fn a_client_that_opens_anything_else_is_not_served() {
        for kinds in [&["error", "error"][..], &["nonsense"], &["error", "stdin"]] {
            let (mut client, server) = Client::new();
            let (mut reader, writer) = spdy::serve(server).expect("zlib");
            for (kind, id) in kinds.iter().zip([1, 3]) {
                client.open(id, &[("streamtype", kind)]).await;
            }
            drop(client);
            assert_eq!(Streams::accept(&mut reader, &writer, ALL, false).await, None, "{kinds:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_on_which_nothing_happens_is_given_up() {
        let clock = watch::Sender::new(Instant::now());
        let begun = Instant::now();
        let ended = tokio::spawn(idle(clock.subscribe(), Duration::from_secs(100)));
        tokio::time::sleep(Duration::from_secs(60)).await;
        clock.send_replace(Instant::now());
        ended.await.expect("ends");
        assert_eq!(begun.elapsed().as_secs(), 160);
    }
}
