//! Pulling an image: manifest, configuration, then all layers at once through spools into the converter, then the index.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::{BoxFuture, FutureExt, Shared, WeakShared};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use super::convert::{self, Layer, convert};
use super::digest::Digest;
use super::manifest::{Configuration, MAX_CONFIG, Manifest, chain_id};
use super::reference::Reference;
use super::registry::{self, Auth, Found, Session, Sink};
use super::signature::{self, Policy, Rule};
use super::spool::{SpoolWriter, spool};
use super::store::{Entry, Error, Image, MAX_TRIES, Store, is_full};
use super::work::Work;
use crate::kill_point::kill_point;

/// Layers downloaded at once.
const PARALLEL_LAYERS: usize = 3;
/// Bytes of a UUID.
const UUID_LEN: usize = 16;

/// How far a pull is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PullProgress {
    /// Base first; empty until the manifest is there, and if nothing has to be downloaded.
    pub layers: Vec<LayerProgress>,
}

/// How far one layer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerProgress {
    /// In the manifest.
    pub digest: Digest,
    /// Bytes downloaded.
    pub done: u64,
    /// Bytes to download.
    pub total: u64,
}

/// The pulls under way in this process.
#[derive(Default)]
pub(crate) struct Pulls(Mutex<HashMap<Key, Pull>>);

/// What makes two pulls the same.
type Key = (Reference, Option<Auth>);
type Outcome = BoxFuture<'static, Result<Image, Arc<Error>>>;

struct Pull {
    /// Lives as long as somebody waits for it.
    future: WeakShared<Outcome>,
    progress: watch::Receiver<PullProgress>,
}

impl Pulls {
    /// Joins a pull under way, or begins one.
    pub(crate) async fn pull(
        &self,
        store: Store,
        reference: Reference,
        auth: Option<Auth>,
        progress: Option<watch::Sender<PullProgress>>,
    ) -> Result<Image, Error> {
        let (mut future, mut seen) = self.join(store, reference, auth);
        let forward = async {
            let Some(progress) = progress else { return };
            while seen.changed().await.is_ok() {
                progress.send_replace(seen.borrow_and_update().clone());
            }
        };
        let result = tokio::select! {
            biased;
            () = forward => future.await,
            result = &mut future => result,
        };
        give_back();
        result.map_err(|error| Arc::try_unwrap(error).unwrap_or_else(Error::Shared))
    }

    fn join(
        &self,
        store: Store,
        reference: Reference,
        auth: Option<Auth>,
    ) -> (Shared<Outcome>, watch::Receiver<PullProgress>) {
        let mut pulls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let under_way = |pull: &Pull| pull.future.upgrade().filter(|future| future.peek().is_none());
        pulls.retain(|_, pull| under_way(pull).is_some());
        let key = (reference, auth);
        if let Some((future, pull)) = pulls.get(&key).and_then(|pull| Some((under_way(pull)?, pull))) {
            return (future, pull.progress.clone());
        }
        let (sender, progress) = watch::channel(PullProgress::default());
        let (reference, auth) = key.clone();
        let future =
            async move { run(&store, &reference, auth.as_ref(), &sender).await.map_err(Arc::new) }.boxed().shared();
        if let Some(weak) = future.downgrade() {
            pulls.insert(key, Pull { future: weak, progress: progress.clone() });
        }
        (future, progress)
    }
}

/// Returns to the system what a pull used: an allocator keeps it in each thread's arena, many times what the idle daemon needs.
#[expect(unsafe_code, reason = "malloc_trim has no safe wrapper among our crates")]
fn give_back() {
    // SAFETY: it takes no pointer, and may be called by any thread at any time.
    unsafe { libc::malloc_trim(0) };
}

async fn run(
    store: &Store,
    reference: &Reference,
    auth: Option<&Auth>,
    progress: &watch::Sender<PullProgress>,
) -> Result<Image, Error> {
    let failed = |error| Error::Pull(reference.to_string(), error);
    let refused = |error| match error {
        signature::Error::Registry(error) => failed(error),
        error => Error::Signature(reference.to_string(), error),
    };
    let rule = rule(store, reference).map_err(refused)?;
    let Found { digest, manifest, session } = store.config().registries.find(reference, auth).await.map_err(failed)?;
    if let Rule::Signed(keys) = rule {
        signature::verify(&session, &digest, &keys).await.map_err(refused)?;
    }
    let configuration = configuration(&session, reference, &manifest).await.map_err(failed)?;
    let job = Job { store, reference, session: &session, manifest: &manifest, progress };
    let entry = Entry {
        id: manifest.config.digest.clone(),
        chain: chain_id(&configuration.diff_ids),
        config: configuration.config,
        tags: reference.repo_tag().into_iter().collect(),
        digests: vec![reference.repo_digest(&digest)],
    };
    for _ in 0..MAX_TRIES {
        let made = match store.begin(&entry.chain).await? {
            Some(work) => Some(job.make(work, &configuration.diff_ids, &entry.chain).await?),
            None => None,
        };
        kill_point("image.converted");
        if let Some(image) = store.commit(&entry, made).await? {
            kill_point("image.stored");
            return Ok(image);
        }
    }
    Err(store.contended())
}

/// What the policy asks of an image of this name, if it may be let in at all.
fn rule(store: &Store, reference: &Reference) -> Result<Rule, signature::Error> {
    let Some(path) = &store.config().policy else { return Ok(Rule::Accept) };
    match Policy::load(path)?.rule(reference) {
        Rule::Reject => Err(signature::Error::Rejected),
        other => Ok(other.clone()),
    }
}

async fn configuration(
    session: &Session,
    reference: &Reference,
    manifest: &Manifest,
) -> Result<Configuration, registry::Error> {
    if manifest.config.size > MAX_CONFIG {
        return Err(registry::Error::TooLarge("configuration".to_owned(), MAX_CONFIG));
    }
    let mut bytes = vec![];
    session.blob("the configuration", &manifest.config, Sink::Memory(&mut bytes)).await?;
    let parsed = Configuration::parse(&bytes, manifest.layers.len());
    parsed.map_err(|error| registry::Error::Manifest(reference.to_string(), error))
}

/// All that the layers' way needs.
struct Job<'a> {
    store: &'a Store,
    reference: &'a Reference,
    session: &'a Session,
    manifest: &'a Manifest,
    progress: &'a watch::Sender<PullProgress>,
}

impl Job<'_> {
    /// Makes the disk. Dropped half-way, it leaves nothing: the spools have no names, and the disk's goes with `work`.
    async fn make(&self, mut work: Work, diff_ids: &[Digest], chain: &Digest) -> Result<Work, Error> {
        let io = |error| self.store.io(error);
        let (mut writers, mut layers, mut shown) = (vec![], vec![], vec![]);
        for (number, (descriptor, diff_id)) in self.manifest.layers.iter().zip(diff_ids).enumerate() {
            let (writer, reader) = work.nameless(number).and_then(spool).map_err(io)?;
            writers.push(writer);
            let (digest, diff_id) = (descriptor.digest.clone(), diff_id.clone());
            shown.push(LayerProgress { digest: digest.clone(), done: 0, total: descriptor.size });
            layers.push(Layer { digest, diff_id, blob: Box::new(reader) });
        }
        self.progress.send_replace(PullProgress { layers: shown });
        let (file, uuid) = (work.create_disk().map_err(io)?, uuid(chain));
        let limit = self.store.unpacked_limit();
        let mut conversion = spawn_blocking(move || convert(layers, file, uuid, limit));
        let mut downloads = std::pin::pin!(self.download(writers));
        let converted = tokio::select! {
            biased;
            done = &mut downloads => {
                done?;
                conversion.await
            }
            converted = &mut conversion => {
                if let Ok(Err(convert::Error::Abandoned)) = converted {
                    downloads.await?;
                }
                converted
            }
        };
        match converted.map_err(|_| Error::Ending)? {
            Ok(verity) => {
                work.verity = Some(verity);
                Ok(work)
            }
            Err(error) if is_full(&error) => Err(self.store.full(error)),
            Err(error) => Err(Error::Unpack(self.reference.to_string(), error)),
        }
    }

    async fn download(&self, writers: Vec<SpoolWriter>) -> Result<(), Error> {
        let layers = writers.into_iter().enumerate().map(|(number, writer)| self.layer(number, writer).boxed());
        stream::iter(layers).buffer_unordered(PARALLEL_LAYERS).try_collect().await
    }

    async fn layer(&self, number: usize, mut writer: SpoolWriter) -> Result<(), Error> {
        let Some(descriptor) = self.manifest.layers.get(number) else { return Ok(()) };
        let show = |bytes: u64| {
            self.progress.send_modify(|progress| {
                if let Some(layer) = progress.layers.get_mut(number) {
                    layer.done = layer.done.saturating_add(bytes);
                }
            });
        };
        match self.session.blob("layer", descriptor, Sink::Spool(&mut writer, &show)).await {
            Ok(()) => {
                writer.finish();
                Ok(())
            }
            Err(registry::Error::Write(error)) => Err(self.store.io(error)),
            Err(error) => Err(Error::Pull(self.reference.to_string(), error)),
        }
    }
}

/// The disk's identity, from what is in it (RFC 9562, version 8).
pub(crate) fn uuid(chain: &Digest) -> [u8; UUID_LEN] {
    let digest = Digest::of(format!("pericarp disk of {chain}").as_bytes());
    let mut uuid = [0; UUID_LEN];
    for (byte, pair) in uuid.iter_mut().zip(digest.hex().as_bytes().chunks(2)) {
        *byte = std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok()).unwrap_or_default();
    }
    let [_, _, _, _, _, _, version, _, variant, ..] = &mut uuid;
    *version = (*version & 0x0f) | 0x80;
    *variant = (*variant & 0x3f) | 0x80;
    uuid
}
