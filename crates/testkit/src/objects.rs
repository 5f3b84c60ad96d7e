//! An object store in memory that fails on purpose, and the death of the process that uses it.
//!
//! ```text
//! not done     the operation fails, and nothing was done
//! lost         it is done, and fails all the same: the answer is lost
//! half         a new object has its first bytes only, and the operation fails
//! short, flip  an answer has fewer bytes than asked for, or one bit is another
//! death        one operation is not done, done or done by half; it never ends, and no later one does anything
//! ```
//! After a death every object is as it was when it was last acknowledged. What was not acknowledged is there or not, or
//! by half, as was decided when it happened. A removal that was acknowledged may be undone: folders are not synced for it.

use std::collections::BTreeMap;
use std::fmt;
use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

use crate::Dice;

/// What happens to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ObjectFault {
    /// It is not done.
    NotDone,
    /// It is done, and the answer is lost.
    Lost,
    /// A part of it is done.
    Half,
    /// The answer has fewer bytes.
    Short,
    /// One bit of the answer is another.
    Flip,
}

use ObjectFault::{Flip, Half, Lost, NotDone, Short};

type AtDeath = Box<dyn FnOnce() + Send>;

struct State {
    dice: Dice,
    percent: u64,
    operations: u64,
    /// How many operations are left before the last one, whether only those count that change something, and what to do
    /// at that instant.
    last: Option<(u64, bool, AtDeath)>,
    dead: bool,
    removed: Vec<(Path, Bytes)>,
    happened: BTreeMap<ObjectFault, u64>,
}

/// The store. Cheap to clone.
#[derive(Clone)]
pub struct Objects {
    kept: Arc<InMemory>,
    /// Whose errors these are: some are taken for a store that is away, some for a folder that fails.
    kind: &'static str,
    state: Arc<Mutex<State>>,
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Objects").field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl fmt::Display for Objects {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a store that fails on purpose")
    }
}

/// What was decided about one operation.
struct Fate {
    fault: Option<ObjectFault>,
    last: bool,
}

impl Fate {
    fn is(&self, fault: ObjectFault) -> bool {
        self.fault == Some(fault)
    }
}

impl Objects {
    /// The seed decides everything. A store of the kind "S3" is away when it fails, others are broken.
    pub fn new(seed: u64, kind: &'static str) -> Self {
        let state = State {
            dice: Dice::new(seed),
            percent: 0,
            operations: 0,
            last: None,
            dead: false,
            removed: Vec::new(),
            happened: BTreeMap::new(),
        };
        Self { kept: Arc::default(), kind, state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on so many of a hundred operations fail.
    pub fn fail(&self, percent: u64) {
        self.state().percent = percent;
    }

    /// The process dies in the operation that comes after so many others; `at_death` is called at that instant.
    pub fn die_after(&self, operations: u64, at_death: impl FnOnce() + Send + 'static) {
        self.state().last = Some((operations, false, Box::new(at_death)));
    }

    /// The same, in one that changes something, after so many such.
    pub fn die_after_changes(&self, changes: u64, at_death: impl FnOnce() + Send + 'static) {
        self.state().last = Some((changes, true, Box::new(at_death)));
    }

    /// Dies now, if it has not.
    pub fn die(&self) {
        if let Some(at_death) = self.mark_dead() {
            at_death();
        }
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    /// How often each fault happened.
    pub fn happened(&self) -> BTreeMap<ObjectFault, u64> {
        self.state().happened.clone()
    }

    /// A new process finds what survived, and a store without faults.
    pub async fn restart(&self) {
        let undone: Vec<(Path, Bytes)> = {
            let state = &mut *self.state();
            (state.dead, state.last, state.percent) = (false, None, 0);
            let removed = std::mem::take(&mut state.removed);
            removed.into_iter().filter(|_| state.dice.percent(30)).collect()
        };
        for (key, bytes) in undone {
            let options = PutOptions { mode: PutMode::Create, ..Default::default() };
            // What was written since is there, and stays.
            let _ = self.kept.put_opts(&key, bytes.into(), options).await;
        }
    }

    /// The bytes of an object, without counting as an operation.
    pub async fn content(&self, key: &str) -> Option<Bytes> {
        self.kept.get(&Path::from(key)).await.ok()?.bytes().await.ok()
    }

    /// Makes an object something else (nothing: none), without counting as an operation.
    pub async fn replace(&self, key: &str, content: Option<Bytes>) {
        let key = Path::from(key);
        let done = match content {
            Some(bytes) => self.kept.put(&key, bytes.into()).await.map(drop),
            None => self.kept.delete(&key).await,
        };
        done.expect("memory does not fail");
    }

    /// An instant at which the process may die, outside of the store.
    pub async fn instant(&self) {
        let fate = self.fate(&[]).await;
        self.end(&fate, Ok(())).await.expect("there is nothing that could fail");
    }

    fn mark_dead(&self) -> Option<AtDeath> {
        let state = &mut *self.state();
        state.dead = true;
        state.last.take().map(|(_, _, at_death)| at_death)
    }

    /// Decides; never returns once the process is dead.
    async fn fate(&self, may: &[ObjectFault]) -> Fate {
        let decided = {
            let state = &mut *self.state();
            state.operations += 1;
            // Most operations read, and what is written decides what is there afterwards.
            let changes = may.contains(&Lost);
            let last = match &mut state.last {
                Some((left, only_changes, _)) if changes || !*only_changes => {
                    let last = *left == 0;
                    *left = left.saturating_sub(1);
                    last
                }
                _ => false,
            };
            let percent = if changes { 3 * state.percent } else { state.percent };
            let fails = state.dice.percent(percent) || (last && state.dice.percent(60));
            let fault = (fails && !may.is_empty()).then(|| *state.dice.pick(may));
            if let Some(fault) = fault {
                *state.happened.entry(fault).or_default() += 1;
            }
            (!state.dead).then_some(Fate { fault, last })
        };
        match decided {
            Some(fate) => fate,
            None => pending().await,
        }
    }

    /// What the caller is told.
    async fn end<T>(&self, fate: &Fate, done: Result<T>) -> Result<T> {
        if fate.last {
            self.die();
            return pending().await;
        }
        match fate.fault {
            Some(NotDone | Lost | Half) => Err(self.failure()),
            _ => done,
        }
    }

    fn failure(&self) -> Error {
        Error::Generic { store: self.kind, source: "it fails on purpose".into() }
    }

    async fn remove(&self, key: Path) -> Result<Path> {
        let fate = self.fate(&[NotDone, Lost]).await;
        if !fate.is(NotDone) {
            if let Some(bytes) = self.content(key.as_ref()).await {
                self.state().removed.push((key.clone(), bytes));
            }
            self.kept.delete(&key).await?;
        }
        self.end(&fate, Ok(key)).await
    }

    async fn spoil(&self, fate: &Fate, result: GetResult) -> Result<GetResult> {
        if !fate.is(Short) && !fate.is(Flip) {
            return Ok(result);
        }
        let (meta, range, attributes) = (result.meta.clone(), result.range.clone(), result.attributes.clone());
        let mut bytes = result.bytes().await?.to_vec();
        let at = self.state().dice.roll(bytes.len() as u64) as usize;
        match fate.is(Short) {
            true => bytes.truncate(at),
            false => bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= 1),
        }
        let payload = GetResultPayload::Stream(stream::once(async { Ok(bytes.into()) }).boxed());
        Ok(GetResult { payload, meta, range, attributes, extensions: Default::default() })
    }
}

#[async_trait]
impl ObjectStore for Objects {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let fate = self.fate(&[NotDone, Lost, Half]).await;
        let done = match fate.fault {
            Some(NotDone) => Err(self.failure()),
            Some(Half) => {
                let bytes = Bytes::from(payload);
                let half = self.state().dice.roll(bytes.len() as u64) as usize;
                // An object that is there is replaced as a whole by every store there is.
                let options = PutOptions { mode: PutMode::Create, ..Default::default() };
                self.kept.put_opts(location, bytes.slice(..half).into(), options).await
            }
            _ => self.kept.put_opts(location, payload, opts).await,
        };
        self.end(&fate, done).await
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let fate = self.fate(&[NotDone]).await;
        let inner = self.kept.put_multipart_opts(location, opts).await?;
        let upload: Box<dyn MultipartUpload> = Box::new(Upload { objects: self.clone(), inner });
        self.end(&fate, Ok(upload)).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let may: &[ObjectFault] = if options.head { &[NotDone] } else { &[NotDone, Short, Flip] };
        let fate = self.fate(may).await;
        let found = match self.kept.get_opts(location, options).await {
            Ok(found) => self.spoil(&fate, found).await,
            Err(error) => Err(error),
        };
        self.end(&fate, found).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let objects = self.clone();
        let remove = move |location: Result<Path>| {
            let objects = objects.clone();
            async move { objects.remove(location?).await }
        };
        locations.then(remove).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (objects, prefix) = (self.clone(), prefix.cloned());
        let listed = async move {
            let fate = objects.fate(&[NotDone]).await;
            let found = objects.end(&fate, Ok(objects.kept.list(prefix.as_ref()))).await;
            found.unwrap_or_else(|error| stream::once(async { Err(error) }).boxed())
        };
        stream::once(listed).flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let fate = self.fate(&[NotDone]).await;
        let found = self.kept.list_with_delimiter(prefix).await;
        self.end(&fate, found).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let fate = self.fate(&[NotDone]).await;
        let done = if fate.is(NotDone) { Ok(()) } else { self.kept.copy_opts(from, to, options).await };
        self.end(&fate, done).await
    }
}

/// An object that is sent in parts: it appears whole, when it is completed.
#[derive(Debug)]
struct Upload {
    objects: Objects,
    inner: Box<dyn MultipartUpload>,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (objects, part) = (self.objects.clone(), self.inner.put_part(data));
        Box::pin(async move {
            let fate = objects.fate(&[NotDone, Lost]).await;
            let done = part.await;
            objects.end(&fate, done).await
        })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let fate = self.objects.fate(&[NotDone, Lost]).await;
        let done = if fate.is(NotDone) { Err(self.objects.failure()) } else { self.inner.complete().await };
        self.objects.end(&fate, done).await
    }

    async fn abort(&mut self) -> Result<()> {
        let fate = self.objects.fate(&[NotDone]).await;
        let done = self.inner.abort().await;
        self.objects.end(&fate, done).await
    }
}
