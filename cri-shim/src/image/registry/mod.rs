//! Registries: where an image may be had, and the OCI distribution protocol to get it.
//!
//! Owns mirrors, TLS, credentials and what can go wrong on the network. All that a registry sends is limited in size and checked by
//! digest. Knows nothing of disks.

mod auth;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::{ACCEPT, RANGE};
use reqwest::{RequestBuilder, Response, StatusCode};
use serde::{Deserialize, Serialize};

pub use auth::Auth;
use auth::{Authorization, Credentials};

use super::digest::{Check, Digest, Mismatch};
use super::manifest::{self, Descriptor, Document, MANIFESTS, MAX_MANIFEST, Manifest};
use super::reference::Reference;
use super::spool::SpoolWriter;

/// Waiting for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How often a blob whose connection broke is taken up again where it ended.
const MAX_RESUMES: u32 = 3;
/// The wait before that, the first time; twice as long each time. A registry that starts anew is there again by then.
const RESUME_WAIT: Duration = Duration::from_millis(500);
/// Bytes written to the disk at once.
const WRITE_CHUNK: usize = 256 << 10;
const USER_AGENT: &str = concat!("pericarp/", env!("CARGO_PKG_VERSION"));

/// What can go wrong. Texts say what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such repository, tag or digest.
    #[error("{name} does not exist at {at}: check the name and the tag")]
    NotFound {
        /// The image.
        name: String,
        /// The registry asked.
        at: String,
    },
    /// Wrong credentials, or none.
    #[error(
        "{at} refuses access to {name}: check that it exists, and the credentials (of a pod: its imagePullSecrets)"
    )]
    Denied {
        /// The image.
        name: String,
        /// The registry asked.
        at: String,
    },
    /// No connection.
    #[error(
        "{0} cannot be reached: check its name, the network, and whether it speaks TLS (if not, set plain_http for it)"
    )]
    Unreachable(String, #[source] reqwest::Error),
    /// A connection without bytes.
    #[error("{0} has sent nothing for {1} s: check the network and the registry, or raise registry_stall_seconds")]
    Stalled(String, u64),
    /// A connection that broke, also when taken up again.
    #[error("the connection to {0} broke: check the network and pull again")]
    Broken(String, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// HTTP status 429.
    #[error(
        "{0} lets no more pulls through for now: wait, or pull with the credentials of an account that may have more"
    )]
    RateLimited(String),
    /// An HTTP status that says that the registry has a problem.
    #[error("{0} answers with status {1}: the registry is busy or broken, pull again later")]
    Status(String, u16),
    /// Something that no registry says.
    #[error("{0} gives {1}: check that it is a container registry")]
    Reply(String, String),
    /// More bytes than allowed.
    #[error("the {0} is larger than {1} bytes")]
    TooLarge(String, u64),
    /// Other bytes than announced.
    #[error("{0} is not what was announced")]
    Mismatch(String, #[source] Mismatch),
    /// The manifest or what it leads to.
    #[error("{0} cannot be used")]
    Manifest(String, #[source] manifest::Error),
    /// The place where a blob goes.
    #[error("cannot write a layer")]
    Write(#[source] std::io::Error),
    /// Credentials that are none.
    #[error("the credentials are damaged: auth must be the base64 of USER:PASSWORD")]
    BadAuth,
    /// A certificate that cannot be used.
    #[error("cannot use the CA certificate {0}: check that it is a readable PEM file")]
    Ca(PathBuf, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// TLS cannot be set up.
    #[error("cannot set up TLS: check that the system's CA certificates are installed (package ca-certificates)")]
    Client(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A mirror's URL that is none.
    #[error("the mirror {0:?} is no URL: write http://HOST[:PORT][/PREFIX] or https://…")]
    Mirror(String),
}

/// How registries are reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// Without a byte for so long, a registry counts as stalled.
    pub stall_seconds: u64,
    /// By host, with its port if it has one, as images' names have it.
    pub hosts: BTreeMap<String, HostConfig>,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self { stall_seconds: 30, hosts: BTreeMap::new() }
    }
}

/// One registry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HostConfig {
    /// URLs tried in this order before the registry itself, such as `https://mirror.example/docker-hub`.
    pub mirrors: Vec<String>,
    /// Without TLS.
    pub plain_http: bool,
    /// PEM file of CA certificates trusted beside the system's.
    pub ca_file: Option<PathBuf>,
}

/// One place to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Endpoint {
    /// With the port if it has one.
    host: String,
    /// Before the repository, `/` at its end; mostly empty.
    prefix: String,
    plain_http: bool,
    /// The registry in the image's name, not a mirror.
    original: bool,
    /// The registry in the image's name.
    named: String,
    stall: Duration,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.plain_http { "http" } else { "https" };
        write!(f, "{scheme}://{}/{}", self.host, self.prefix)
    }
}

impl Endpoint {
    fn error(&self, error: reqwest::Error) -> Error {
        let at = self.to_string();
        if error.is_connect() {
            Error::Unreachable(at, error)
        } else if error.is_timeout() {
            Error::Stalled(at, self.stall.as_secs())
        } else {
            Error::Broken(at, error.into())
        }
    }
}

/// An image found at one endpoint.
pub(crate) struct Found {
    /// What its name stands for: of the index, if it is one.
    pub(crate) digest: Digest,
    pub(crate) manifest: Manifest,
    pub(crate) session: Session,
}

/// A conversation about one repository.
pub(crate) struct Session {
    endpoint: Endpoint,
    name: String,
    /// The repository, mirror's prefix included.
    repository: String,
    credentials: Credentials,
    http: reqwest::Client,
    /// What was last agreed on; several downloads show it.
    authorization: Mutex<Authorization>,
}

/// Where a blob goes.
pub(crate) enum Sink<'a> {
    Memory(&'a mut Vec<u8>),
    Spool(&'a mut SpoolWriter, &'a (dyn Fn(u64) + Send + Sync)),
}

impl RegistryConfig {
    /// Asks the mirrors and then the registry itself; the first that has the image.
    pub(crate) async fn find(&self, reference: &Reference, auth: Option<&Auth>) -> Result<Found, Error> {
        let mut worst: Option<Error> = None;
        for endpoint in self.endpoints(reference)? {
            let at = endpoint.to_string();
            let result = match self.open(endpoint, reference, auth) {
                Ok(session) => session.find(reference.version()).await,
                Err(error) => Err(error),
            };
            match result {
                Ok(found) => return Ok(found),
                Err(error) => {
                    let reason: &dyn std::error::Error = &error;
                    tracing::warn!(image = %reference, at, reason, "not pulled from here");
                    // An answer says more than none.
                    let keep = matches!(error, Error::Unreachable(..)) && worst.is_some();
                    if !keep {
                        worst = Some(error);
                    }
                }
            }
        }
        Err(worst
            .unwrap_or_else(|| Error::NotFound { name: reference.to_string(), at: reference.address().to_owned() }))
    }

    fn endpoints(&self, reference: &Reference) -> Result<Vec<Endpoint>, Error> {
        let named = reference.registry();
        let stall = Duration::from_secs(self.stall_seconds);
        let config = self.hosts.get(named);
        let mut endpoints = vec![];
        for mirror in config.into_iter().flat_map(|host| &host.mirrors) {
            let (scheme, rest) = mirror.split_once("://").ok_or_else(|| Error::Mirror(mirror.clone()))?;
            let (host, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            if host.is_empty() || !matches!(scheme, "http" | "https") {
                return Err(Error::Mirror(mirror.clone()));
            }
            let prefix = prefix.trim_matches('/');
            endpoints.push(Endpoint {
                host: host.to_owned(),
                prefix: if prefix.is_empty() { String::new() } else { format!("{prefix}/") },
                plain_http: scheme == "http",
                original: false,
                named: named.to_owned(),
                stall,
            });
        }
        endpoints.push(Endpoint {
            host: reference.address().to_owned(),
            prefix: String::new(),
            plain_http: config.is_some_and(|host| host.plain_http),
            original: true,
            named: named.to_owned(),
            stall,
        });
        Ok(endpoints)
    }

    fn open(&self, endpoint: Endpoint, reference: &Reference, auth: Option<&Auth>) -> Result<Session, Error> {
        // The HTTP client finds it there; a second call only says that it is there already.
        let _already = rustls::crypto::ring::default_provider().install_default();
        let key = if endpoint.original { &endpoint.named } else { &endpoint.host };
        let ca_file = self.hosts.get(key).and_then(|host| host.ca_file.as_ref());
        let certificates = ca_file.map(authorities).transpose()?.unwrap_or_default();
        let http = || {
            reqwest::Client::builder()
                .user_agent(USER_AGENT)
                .connect_timeout(CONNECT_TIMEOUT)
                .read_timeout(endpoint.stall)
        };
        let client = match http().tls_certs_merge(certificates).build() {
            // A host that trusts nobody can still speak without TLS.
            Err(_) if endpoint.plain_http => http().tls_certs_only([]).build(),
            other => other,
        };
        let credentials = auth.map_or(Ok(Credentials::None), |auth| auth.credentials(&endpoint))?;
        Ok(Session {
            name: reference.to_string(),
            repository: format!("{}{}", endpoint.prefix, reference.repository()),
            authorization: Mutex::new(auth::initial(&credentials)),
            credentials,
            http: client.map_err(|error| Error::Client(error.into()))?,
            endpoint,
        })
    }
}

/// The certificates of a PEM file.
fn authorities(path: &PathBuf) -> Result<Vec<reqwest::Certificate>, Error> {
    let pem = std::fs::read(path).map_err(|error| Error::Ca(path.clone(), error.into()))?;
    let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| error.to_string());
    match certificates {
        Ok(certificates) if certificates.is_empty() => Err(Error::Ca(path.clone(), "it holds none".into())),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(Error::Ca(path.clone(), error.into())),
    }
}

impl Session {
    async fn find(self, version: &str) -> Result<Found, Error> {
        let name = self.name.clone();
        let unusable = |error| Error::Manifest(name.clone(), error);
        let (bytes, digest) = self.manifest(version).await?;
        let bytes = match Document::parse(&bytes).map_err(unusable)? {
            Document::Manifest(manifest) => return Ok(Found { digest, manifest, session: self }),
            Document::Index(manifests) => {
                let chosen = manifest::for_guest(&manifests).map_err(unusable)?;
                self.manifest(chosen.digest.as_str()).await?.0
            }
        };
        match Document::parse(&bytes).map_err(unusable)? {
            Document::Manifest(manifest) => Ok(Found { digest, manifest, session: self }),
            Document::Index(_) => Err(Error::Reply(self.endpoint.to_string(), "an index within an index".to_owned())),
        }
    }

    /// A manifest by tag or digest, checked against the digest asked for or announced.
    pub(crate) async fn manifest(&self, version: &str) -> Result<(Vec<u8>, Digest), Error> {
        let response = self.ask(&format!("manifests/{version}"), MANIFESTS).await?;
        let announced = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        let announced = announced.and_then(|text| Digest::try_from(text.to_owned()).ok());
        let asked = Digest::try_from(version.to_owned()).ok();
        let bytes = body(&self.endpoint, response, "manifest", MAX_MANIFEST).await?;
        for expected in asked.iter().chain(&announced) {
            let mut check = Check::new(expected.clone(), None);
            let checked = check.update(&bytes).and_then(|()| check.finish());
            checked.map_err(|error| Error::Mismatch(format!("the manifest of {}", self.name), error))?;
        }
        let digest = asked.or(announced).unwrap_or_else(|| Digest::of(&bytes));
        Ok((bytes, digest))
    }

    /// What the registry says of the things that refer to a manifest (distribution-spec, "Listing Referrers"); an index.
    pub(crate) async fn referrers(&self, digest: &Digest) -> Result<Vec<u8>, Error> {
        let response = self.ask(&format!("referrers/{digest}"), MANIFESTS).await?;
        body(&self.endpoint, response, "list of referrers", MAX_MANIFEST).await
    }

    /// Asks for something of the repository, and shows credentials if the registry wants to see some.
    async fn ask(&self, what: &str, accept: &str) -> Result<Response, Error> {
        let url = format!("{}v2/{}/{what}", self.root(), self.repository);
        let mut answered = false;
        loop {
            let response = self.send(self.http.get(&url).header(ACCEPT, accept)).await?;
            let status = response.status();
            if status == StatusCode::UNAUTHORIZED && !answered && self.authorize(&response).await? {
                answered = true;
                continue;
            }
            return if status == StatusCode::OK { Ok(response) } else { Err(self.refusal(status.as_u16())) };
        }
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, Error> {
        let authorization = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
        auth::apply(request, &authorization).send().await.map_err(|error| self.endpoint.error(error))
    }

    /// Gets what a registry that has refused wants to see; whether there is anything to show.
    async fn authorize(&self, refusal: &Response) -> Result<bool, Error> {
        let answer = auth::answer(&self.http, &self.endpoint, &self.repository, &self.credentials, refusal).await?;
        let shown = answer.is_some();
        if let Some(authorization) = answer {
            *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = authorization;
        }
        Ok(shown)
    }

    fn root(&self) -> String {
        let scheme = if self.endpoint.plain_http { "http" } else { "https" };
        format!("{scheme}://{}/", self.endpoint.host)
    }

    fn refusal(&self, status: u16) -> Error {
        let (name, at) = (self.name.clone(), self.endpoint.to_string());
        match status {
            401 | 403 => Error::Denied { name, at },
            404 => Error::NotFound { name, at },
            429 => Error::RateLimited(at),
            _ => Error::Status(at, status),
        }
    }

    /// Brings a blob, checks it, and takes it up where it ended if the connection breaks.
    pub(crate) async fn blob(&self, what: &str, descriptor: &Descriptor, mut sink: Sink<'_>) -> Result<(), Error> {
        let mismatch = |error| Error::Mismatch(format!("{what} {}", descriptor.digest), error);
        let mut check = Check::new(descriptor.digest.clone(), Some(descriptor.size));
        let (mut resumes, mut wait) = (0_u32, RESUME_WAIT);
        while check.len() < descriptor.size {
            match self.part(descriptor, &mut check, &mut sink).await {
                Ok(()) => break,
                Err(PartError::Mismatch(error)) => return Err(mismatch(error)),
                Err(PartError::Broken(error)) if resumes >= MAX_RESUMES => return Err(error),
                Err(PartError::Broken(error)) => {
                    tracing::info!(image = self.name, digest = %descriptor.digest, %error, "taken up again");
                    resumes = resumes.saturating_add(1);
                    tokio::time::sleep(wait).await;
                    wait = wait.saturating_mul(2);
                }
                Err(PartError::Other(error)) => return Err(error),
            }
        }
        check.finish().map_err(mismatch)
    }

    /// An answer that holds a blob from byte `from` on.
    async fn open_blob(&self, descriptor: &Descriptor, from: u64) -> Result<Response, PartError> {
        let url = format!("{}v2/{}/blobs/{}", self.root(), self.repository, descriptor.digest);
        let mut renewed = false;
        loop {
            let mut request = self.http.get(&url);
            if from > 0 {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            let response = self.send(request).await.map_err(PartError::of_connection)?;
            match response.status() {
                StatusCode::OK if from == 0 => return Ok(response),
                StatusCode::PARTIAL_CONTENT if from > 0 => return Ok(response),
                // The registry knows no ranges and starts anew, which a blob already begun cannot.
                StatusCode::OK => {
                    let error = "the registry cannot continue a transfer".into();
                    return Err(PartError::Other(Error::Broken(self.endpoint.to_string(), error)));
                }
                // A token may have run out since the manifest.
                StatusCode::UNAUTHORIZED
                    if !renewed && self.authorize(&response).await.map_err(PartError::Other)? =>
                {
                    renewed = true;
                }
                status if status.is_server_error() => {
                    return Err(PartError::Broken(self.refusal(status.as_u16())));
                }
                status => return Err(PartError::Other(self.refusal(status.as_u16()))),
            }
        }
    }

    /// One connection's worth of a blob.
    async fn part(&self, descriptor: &Descriptor, check: &mut Check, sink: &mut Sink<'_>) -> Result<(), PartError> {
        let mut response = self.open_blob(descriptor, check.len()).await?;
        let mut pending = Vec::with_capacity(WRITE_CHUNK);
        let broken = loop {
            match response.chunk().await {
                Ok(Some(bytes)) => {
                    check.update(&bytes).map_err(PartError::Mismatch)?;
                    sink.progress(bytes.len());
                    pending.extend_from_slice(&bytes);
                }
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
            if pending.len() >= WRITE_CHUNK {
                sink.write(&pending).await?;
                pending.clear();
            }
        };
        sink.write(&pending).await?;
        match broken {
            // All is there: the digest decides.
            Some(_) if check.len() == descriptor.size => Ok(()),
            Some(error) => Err(PartError::of_connection(self.endpoint.error(error))),
            None => Ok(()),
        }
    }
}

/// Why a transfer ended early.
enum PartError {
    Mismatch(Mismatch),
    /// Worth another try.
    Broken(Error),
    Other(Error),
}

impl PartError {
    /// A registry that has been silent for long enough is given up.
    fn of_connection(error: Error) -> Self {
        if matches!(error, Error::Stalled(..)) { Self::Other(error) } else { Self::Broken(error) }
    }
}

impl Sink<'_> {
    fn progress(&self, bytes: usize) {
        if let Self::Spool(_, progress) = self {
            progress(u64::try_from(bytes).unwrap_or(u64::MAX));
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), PartError> {
        match self {
            Self::Memory(memory) => memory.extend_from_slice(bytes),
            Self::Spool(spool, _) => spool.write(bytes).await.map_err(|error| PartError::Other(Error::Write(error)))?,
        }
        Ok(())
    }
}

/// The body of an answer, up to a limit.
async fn body(endpoint: &Endpoint, mut response: Response, what: &str, limit: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![];
    while let Some(chunk) = response.chunk().await.map_err(|error| endpoint.error(error))? {
        bytes.extend_from_slice(&chunk);
        if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > limit {
            return Err(Error::TooLarge(what.to_owned(), limit));
        }
    }
    Ok(bytes)
}
