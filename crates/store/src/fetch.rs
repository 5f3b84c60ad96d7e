//! A host's way to frames: from memory, from the cache, or from the store, and never unverified.
//!
//! However many readers wait for a frame, it is fetched once. A [`FrameStore`] belongs to one process; several
//! processes share the [`Cache`].

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use collective_model::{ApplianceName, Digest};
use futures_util::stream::{StreamExt, TryStreamExt};
use rayon::prelude::*;

use crate::cache::Cache;
use crate::decoded::Decoded;
use crate::locate::{Forms, Group, Piece, group};
use crate::pack::{self, Directory, EntryKind, PackError, TRAILER};
use crate::page::PageError;
use crate::{Encoding, FrameError, PackInfo, Source, SourceError, decode_delta, encode};

/// Frames kept in memory (8 MiB).
const RECENT: usize = 16;
/// Directories that do not agree with what is in the packs are read again, at most this often.
const REREAD: Duration = Duration::from_secs(60);

/// How many frames are fetched.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Bytes asked for in one request.
    request_bytes: u64,
    /// Requests under way at once.
    requests: usize,
    /// Whether the order is the caller's, in place of the packs'.
    ordered: bool,
    /// Whether what is in the cache is fetched too.
    anew: bool,
}

impl Pace {
    /// As fast as possible.
    pub const BULK: Self = Self { request_bytes: 4 << 20, requests: 4, ordered: false, anew: false };
    /// Beside a guest that reads: a reader waits for the request that its frame is in.
    pub const BESIDE: Self = Self { request_bytes: 512 << 10, requests: 4, ordered: false, anew: false };
    /// In the order in which a guest will read.
    pub const AHEAD: Self = Self { request_bytes: 256 << 10, requests: 2, ordered: true, anew: false };
    /// To look at everything.
    const ANEW: Self = Self { anew: true, ..Self::BULK };
}

/// Given each frame's name and verified content.
pub type Take = Arc<dyn Fn(&Digest, &[u8]) -> std::io::Result<()> + Send + Sync>;

/// What is done with frames as they come.
struct Terms<'a> {
    pace: Pace,
    /// Told of stored bytes.
    progress: &'a (dyn Fn(u64) + Sync),
    /// Who gets the content; then only what others differ from is kept in the cache.
    take: Option<Take>,
}

/// Why a frame is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The store is away or refuses.
    #[error("cannot fetch frame {frame}: {source}")]
    Source {
        /// Which.
        frame: Digest,
        /// Why.
        source: SourceError,
    },
    /// The list of packs is not to be had.
    #[error("cannot learn where version {version} of {appliance} is stored: {source}")]
    Packs {
        /// Whose.
        appliance: ApplianceName,
        /// Which.
        version: Digest,
        /// Why.
        source: SourceError,
    },
    /// No pack of the versions at hand has it.
    #[error("frame {0} is in none of the version's packs: the store lost it; `collective verify` tells more")]
    Nowhere(Digest),
    /// What came is not what was asked for.
    #[error("frame {frame} from pack {pack} is refused: {source}")]
    Damaged {
        /// Which.
        frame: Digest,
        /// From where.
        pack: Digest,
        /// Why.
        source: FrameError,
    },
    /// A pack's directory is not sound.
    #[error("pack {pack} is refused: {source}")]
    Pack {
        /// Which.
        pack: Digest,
        /// Why.
        source: PackError,
    },
    /// An index page is not sound.
    #[error("index page {page} is refused: {source}")]
    Page {
        /// Which.
        page: Digest,
        /// Why.
        source: PageError,
    },
    /// The host's own disk.
    #[error("the cache of this host cannot be used: {0}")]
    Cache(#[from] std::io::Error),
}

impl FetchError {
    /// Whether asking again later may help.
    pub fn is_away(&self) -> bool {
        let (Self::Source { source, .. } | Self::Packs { source, .. }) = self else { return false };
        matches!(source, SourceError::Away(_))
    }
}

/// What was moved since the store was opened, in bytes of stored form.
#[derive(Debug, Default)]
pub struct Counters {
    /// Data frames fetched.
    pub fetched: AtomicU64,
    /// Index pages and pack directories fetched.
    pub index_fetched: AtomicU64,
    /// Data frames found in the cache, each counted once.
    pub from_cache: AtomicU64,
}

/// What fetching a set of frames would take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lack {
    /// Frames that are not here.
    pub frames: u64,
    /// Their stored bytes.
    pub bytes: u64,
}

/// What [`FrameStore::check`] looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Stored bytes fetched.
    pub bytes: u64,
    /// Frames and pages in a form that stands for itself.
    pub frames: u64,
    /// Forms as differences.
    pub deltas: u64,
    /// Differences to frames that no pack of the version has; they could not be looked at.
    pub deltas_without_bases: u64,
}

#[derive(Default)]
struct Locator {
    versions: Vec<(ApplianceName, Digest)>,
    /// How many of them were looked into.
    loaded: usize,
    forms: Forms,
    /// When all directories were last read again.
    reread: Option<Instant>,
}

/// Frames of some versions, wherever they are.
pub struct FrameStore {
    cache: Cache,
    source: Arc<dyn Source>,
    locator: tokio::sync::Mutex<Locator>,
    busy: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
    recent: Mutex<VecDeque<(Digest, Arc<Vec<u8>>)>>,
    decoded: Decoded,
    counted: Mutex<HashSet<Digest>>,
    waiting: Mutex<Option<String>>,
    /// Bytes moved.
    pub counters: Counters,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves the data sound, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FrameStore {
    /// Over `cache`, fetching from `source`.
    pub fn new(cache: Cache, source: Arc<dyn Source>) -> Self {
        Self {
            cache,
            source,
            locator: Default::default(),
            busy: Default::default(),
            recent: Default::default(),
            decoded: Decoded::new(),
            counted: Default::default(),
            waiting: Default::default(),
            counters: Default::default(),
        }
    }

    /// Makes the packs of a version known. Nothing is fetched until a frame is missing.
    pub async fn add_version(&self, appliance: &ApplianceName, version: &Digest) {
        let mut locator = self.locator.lock().await;
        if !locator.versions.iter().any(|(_, known)| known == version) {
            locator.versions.push((appliance.clone(), *version));
        }
    }

    /// The host's cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Why readers are waiting, if they are.
    pub fn waiting(&self) -> Option<String> {
        lock(&self.waiting).clone()
    }

    /// The frame if it is at hand without the network.
    pub fn at_hand(&self, digest: &Digest, length: u32) -> Result<Option<Arc<Vec<u8>>>, FetchError> {
        if let Some(found) = lock(&self.recent).iter().find(|(known, _)| known == digest) {
            return Ok(Some(found.1.clone()));
        }
        let Some(cached) = self.cache.get(digest)? else { return Ok(None) };
        if cached.content.len() != length as usize {
            let source = FrameError::Length { expected: length as usize, got: cached.content.len() };
            return Err(FetchError::Damaged { frame: *digest, pack: *digest, source });
        }
        if lock(&self.counted).insert(*digest) {
            self.counters.from_cache.fetch_add(cached.stored, Ordering::Relaxed);
        }
        Ok(Some(self.remember(*digest, cached.content)))
    }

    /// Fills `part` from byte `from` of a frame if that is at hand without the network; false if it is not.
    pub fn read_at_hand(&self, digest: &Digest, length: u32, from: usize, part: &mut [u8]) -> Result<bool, FetchError> {
        if self.decoded.read(&self.cache, digest, from as u64, part)? {
            if lock(&self.counted).insert(*digest) {
                self.counters.from_cache.fetch_add(self.cache.stored_bytes(digest), Ordering::Relaxed);
            }
            return Ok(true);
        }
        let Some(content) = self.at_hand(digest, length)? else { return Ok(false) };
        let found = content.get(from..from + part.len());
        part.copy_from_slice(found.ok_or_else(|| std::io::Error::other("an extent reaches beyond its frame"))?);
        self.decoded.keep(&self.cache, digest, &content);
        Ok(true)
    }

    fn remember(&self, digest: Digest, content: Vec<u8>) -> Arc<Vec<u8>> {
        let content = Arc::new(content);
        let mut recent = lock(&self.recent);
        recent.push_front((digest, content.clone()));
        recent.truncate(RECENT);
        content
    }

    /// A data frame of `length` bytes.
    pub async fn frame(&self, digest: &Digest, length: u32) -> Result<Arc<Vec<u8>>, FetchError> {
        if let Some(content) = self.at_hand(digest, length)? {
            return Ok(content);
        }
        let turn = lock(&self.busy).entry(*digest).or_default().clone();
        let _turn = turn.lock().await;
        let fetched = match self.at_hand(digest, length) {
            Ok(Some(content)) => Ok(content),
            Ok(None) => self.fetch_one(digest, Some(length)).await.map(|content| self.remember(*digest, content)),
            Err(error) => Err(error),
        };
        lock(&self.busy).remove(digest);
        fetched
    }

    /// Like [`frame`](Self::frame), and waits for as long as the store is away.
    pub async fn frame_patiently(&self, digest: &Digest, length: u32) -> Result<Arc<Vec<u8>>, FetchError> {
        let mut pause = Duration::from_millis(100);
        loop {
            let error = match self.frame(digest, length).await {
                Ok(content) => {
                    *lock(&self.waiting) = None;
                    return Ok(content);
                }
                Err(error) if error.is_away() => error,
                Err(error) => return Err(error),
            };
            *lock(&self.waiting) = Some(error.to_string());
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(3));
        }
    }

    /// The content of frames or pages, in their order, after fetching what is not here in few requests.
    pub async fn read_all(&self, digests: &[Digest]) -> Result<Vec<Vec<u8>>, FetchError> {
        self.prefetch(digests, &|_| {}).await?;
        let (cache, wanted) = (self.cache.clone(), digests.to_vec());
        let read = move || wanted.par_iter().map(|digest| cache.get(digest)).collect::<std::io::Result<Vec<_>>>();
        let cached = tokio::task::spawn_blocking(read).await.map_err(std::io::Error::other)??;
        let mut contents = Vec::new();
        for (digest, cached) in digests.iter().zip(cached) {
            contents.push(match cached {
                Some(cached) => cached.content,
                // It was damaged, or another process removed it.
                None => self.fetch_one(digest, None).await?,
            });
        }
        Ok(contents)
    }

    /// An index page.
    pub async fn page(&self, digest: &Digest) -> Result<Vec<u8>, FetchError> {
        match self.cache.get(digest)? {
            Some(cached) => Ok(cached.content),
            None => self.fetch_one(digest, None).await,
        }
    }

    async fn fetch_one(&self, digest: &Digest, length: Option<u32>) -> Result<Vec<u8>, FetchError> {
        let [piece] =
            self.choose(std::slice::from_ref(digest)).await?.try_into().map_err(|_| FetchError::Nowhere(*digest))?;
        let fetched = match self.fetch_piece(&piece, length).await {
            Err(error) if !piece.bases.is_empty() && !error.is_away() => {
                pass_over(&piece, &error);
                self.fetch_piece(&self.plain(digest).await?, length).await
            }
            fetched => fetched,
        };
        let fetched = match fetched {
            Err(error) if came_wrong(&error) && self.distrust(&mut *self.locator.lock().await) => {
                once_more(&piece, &error);
                self.fetch_piece(&self.plain(digest).await?, length).await
            }
            fetched => fetched,
        };
        let Accepted { content, kept } = fetched?;
        if let Err(error) = kept {
            // A full disk must not stop the guest: the frame is right, it is only not kept.
            tracing::warn!(frame = %digest, %error, "a fetched frame cannot be kept in the cache");
        }
        Ok(content)
    }

    async fn fetch_piece(&self, piece: &Piece, length: Option<u32>) -> Result<Accepted, FetchError> {
        let Piece { appliance, pack, entry, .. } = piece;
        // The pack does not say how long sealed content is; its name says what it is.
        if let Some(length) = length.filter(|length| *length != entry.length && entry.encoding != Encoding::Sealed) {
            let source = FrameError::Length { expected: length as usize, got: entry.length as usize };
            return Err(FetchError::Damaged { frame: entry.digest, pack: *pack, source });
        }
        let stored = self.source.read(appliance, pack, entry.range()).await;
        let stored = stored.map_err(|source| FetchError::Source { frame: entry.digest, source })?;
        let accepted = accept(&self.cache, piece, &stored, true)?;
        self.count(piece);
        Ok(accepted)
    }

    fn count(&self, piece: &Piece) {
        let counter = match piece.entry.kind {
            EntryKind::Data => &self.counters.fetched,
            EntryKind::Page => &self.counters.index_fetched,
        };
        counter.fetch_add(piece.entry.stored.into(), Ordering::Relaxed);
        lock(&self.counted).insert(piece.entry.digest);
    }

    /// What the host lacks of `digests`, in the forms that [`prefetch`](Self::prefetch) would fetch.
    pub async fn lack(&self, digests: &[Digest]) -> Result<Lack, FetchError> {
        let pieces = self.choose(digests).await?;
        let bytes = pieces.iter().map(|piece| u64::from(piece.entry.stored)).sum();
        Ok(Lack { frames: pieces.len() as u64, bytes })
    }

    /// Fetches every form of `digests` and of what these differ from, whatever is in the cache, and verifies it all.
    pub async fn check(&self, digests: &[Digest], progress: &(dyn Fn(u64) + Sync)) -> Result<Checked, FetchError> {
        let (mut plain, mut deltas) = (Vec::new(), Vec::new());
        {
            let mut locator = self.locator.lock().await;
            self.locate_each(&mut locator, digests).await?;
            let mut seen = HashSet::new();
            for digest in digests.iter().filter(|digest| seen.insert(**digest)) {
                plain.extend(locator.forms.plain(digest));
                deltas.extend(locator.forms.deltas(digest));
            }
            let bases: Vec<Digest> =
                deltas.iter().flat_map(|piece| piece.bases.iter().map(|base| base.frame)).collect();
            plain.extend(bases.iter().filter(|base| seen.insert(**base)).filter_map(|base| locator.forms.plain(base)));
        }
        let (frames, found) = (plain.len() as u64, deltas.len() as u64);
        let terms = Terms { pace: Pace::ANEW, progress, take: None };
        let mut moved = self.fetch_sound(plain, &terms).await?;
        deltas.retain(|piece| piece.bases.iter().all(|base| self.cache.has(&base.frame)));
        let checked = deltas.len() as u64;
        moved += self.fetch_sound(deltas, &terms).await?;
        Ok(Checked { bytes: moved, frames, deltas: checked, deltas_without_bases: found - checked })
    }

    async fn fetch_sound(&self, pieces: Vec<Piece>, terms: &Terms<'_>) -> Result<u64, FetchError> {
        let (moved, failed) = self.fetch_all(pieces, terms, &Arc::default()).await?;
        match failed.into_iter().next() {
            None => Ok(moved),
            Some((_, error)) => {
                if came_wrong(&error) {
                    self.distrust(&mut *self.locator.lock().await);
                }
                Err(error)
            }
        }
    }

    /// Checks that packs hold all of `digests` in a form that stands for itself, in the cache or not.
    pub async fn locate_all(&self, digests: &[Digest]) -> Result<(), FetchError> {
        self.locate_each(&mut *self.locator.lock().await, digests).await
    }

    /// Afterwards the forms of all of `digests` are known, from the same reading of the directories.
    async fn locate_each(&self, locator: &mut Locator, digests: &[Digest]) -> Result<(), FetchError> {
        loop {
            let reading = locator.reread;
            for digest in digests {
                self.locate(locator, digest).await?;
            }
            // Otherwise those that were found before the directories were forgotten are not known any more.
            if locator.reread == reading {
                return Ok(());
            }
        }
    }

    /// The cheapest piece for each of `digests` that is not in the cache.
    async fn choose(&self, digests: &[Digest]) -> Result<Vec<Piece>, FetchError> {
        let missing: Vec<Digest> = digests.iter().filter(|digest| !self.cache.has(digest)).copied().collect();
        let mut locator = self.locator.lock().await;
        // All directories first: the choice must not depend on which were read before.
        self.locate_each(&mut locator, &missing).await?;
        locator.forms.cheapest(&missing, |base| self.cache.has(base)).map_err(FetchError::Nowhere)
    }

    async fn plain(&self, digest: &Digest) -> Result<Piece, FetchError> {
        self.locate(&mut *self.locator.lock().await, digest).await
    }

    /// Fetches those of `digests` that are not in the cache, in few requests, and keeps them there. Tells `progress`
    /// of stored bytes as they come. Returns how many came.
    pub async fn prefetch(&self, digests: &[Digest], progress: &(dyn Fn(u64) + Sync)) -> Result<u64, FetchError> {
        self.fetch_ahead(digests, Pace::BULK, progress).await
    }

    /// As [`prefetch`](Self::prefetch), at a pace. A reader of a frame that is on its way waits for it.
    pub async fn fetch_ahead(
        &self,
        digests: &[Digest],
        pace: Pace,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<u64, FetchError> {
        self.fetch_missing(digests, &Terms { pace, progress, take: None }).await
    }

    /// Gives the content of each of `digests` to `take`, once, in any order and from several threads. What is not in the
    /// cache is fetched as by [`prefetch`](Self::prefetch), but not kept. Returns how many stored bytes came.
    pub async fn deliver(
        &self,
        digests: &[Digest],
        take: Take,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<u64, FetchError> {
        let given = Arc::new(Mutex::new(HashSet::new()));
        let (noted, taker) = (given.clone(), take.clone());
        let note = move |digest: &Digest, content: &[u8]| {
            taker(digest, content)?;
            lock(&noted).insert(*digest);
            Ok(())
        };
        let moved =
            self.fetch_missing(digests, &Terms { pace: Pace::BULK, progress, take: Some(Arc::new(note)) }).await?;
        let mut rest: Vec<Digest> = digests.iter().filter(|digest| !lock(&given).contains(digest)).copied().collect();
        rest.sort_unstable();
        rest.dedup();
        for some in rest.chunks(RECENT) {
            for (digest, content) in some.iter().zip(self.read_all(some).await?) {
                take(digest, &content)?;
            }
        }
        Ok(moved)
    }

    async fn fetch_missing(&self, digests: &[Digest], terms: &Terms<'_>) -> Result<u64, FetchError> {
        let mut pieces = self.choose(digests).await?;
        let bases = pieces.iter().flat_map(|piece| piece.bases.iter().map(|base| base.frame));
        let bases: Arc<HashSet<Digest>> = Arc::new(bases.collect());
        let differences = pieces.split_off(pieces.partition_point(|piece| piece.bases.is_empty()));
        let mut moved = 0;
        let mut passed_over = Vec::new();
        for pieces in [pieces, differences] {
            let (bytes, failed) = self.fetch_all(pieces, terms, &bases).await?;
            moved += bytes;
            passed_over.extend(failed);
        }
        let mut again = Vec::new();
        let wrong = passed_over.iter().any(|(piece, error)| piece.bases.is_empty() && came_wrong(error));
        let fresh = wrong && self.distrust(&mut *self.locator.lock().await);
        for (piece, error) in passed_over {
            match (piece.bases.is_empty(), fresh && came_wrong(&error)) {
                (true, false) => return Err(error),
                (true, true) => once_more(&piece, &error),
                (false, _) => pass_over(&piece, &error),
            }
            again.push(self.plain(&piece.entry.digest).await?);
        }
        Ok(moved + self.fetch_sound(again, terms).await?)
    }

    /// Fetches pieces; also returns those that the store refused or that are not sound.
    async fn fetch_all(
        &self,
        mut pieces: Vec<Piece>,
        terms: &Terms<'_>,
        bases: &Arc<HashSet<Digest>>,
    ) -> Result<(u64, Vec<(Piece, FetchError)>), FetchError> {
        let pace = terms.pace;
        if !pace.ordered {
            pieces.sort_by_key(|piece| (piece.pack, piece.entry.offset));
        }
        let requests = futures_util::stream::iter(group(pieces, pace.request_bytes));
        let fetched = requests.map(|request| self.fetch_new(request, terms, bases)).buffer_unordered(pace.requests);
        let sum = |(sum, mut all): (u64, Vec<_>), (bytes, failed)| async move {
            all.extend(failed);
            Ok((sum + bytes, all))
        };
        fetched.try_fold((0, Vec::new()), sum).await
    }

    /// Leaves out what a reader fetched, or is fetching, since the group was made; unless all is wanted `anew`.
    async fn fetch_new(
        &self,
        group: Group,
        terms: &Terms<'_>,
        bases: &Arc<HashSet<Digest>>,
    ) -> Result<(u64, Vec<(Piece, FetchError)>), FetchError> {
        let mut turns = Turns { store: self, held: Vec::new() };
        let pieces = group.0.into_iter().filter(|piece| terms.pace.anew || turns.take(&piece.entry.digest)).collect();
        let (mut moved, mut failed) = (0, Vec::new());
        for group in crate::locate::group(pieces, u64::MAX) {
            let (bytes, wrong) = self.fetch_group(group, terms, bases).await?;
            moved += bytes;
            failed.extend(wrong);
        }
        Ok((moved, failed))
    }

    async fn fetch_group(
        &self,
        group: Group,
        terms: &Terms<'_>,
        bases: &Arc<HashSet<Digest>>,
    ) -> Result<(u64, Vec<(Piece, FetchError)>), FetchError> {
        let range = group.range();
        let Some(first) = group.0.first() else { return Ok((0, Vec::new())) };
        let bytes = match self.source.read(&first.appliance, &first.pack, range.clone()).await {
            Ok(bytes) => bytes,
            Err(source @ SourceError::Away(_)) => {
                return Err(FetchError::Source { frame: first.entry.digest, source });
            }
            Err(source) => {
                let error = |piece: &Piece| FetchError::Source { frame: piece.entry.digest, source: source.clone() };
                return Ok((0, group.0.into_iter().map(|piece| (piece.clone(), error(&piece))).collect()));
            }
        };
        let (cache, take, bases) = (self.cache.clone(), terms.take.clone(), bases.clone());
        let accepted = tokio::task::spawn_blocking(move || {
            let accept = |piece: Piece| {
                let at = (piece.entry.offset - range.start) as usize;
                let keep = take.is_none() || bases.contains(&piece.entry.digest);
                let mut accepted = accept(&cache, &piece, &bytes[at..at + piece.entry.stored as usize], keep);
                if let (Ok(accepted), Some(take)) = (&mut accepted, &take) {
                    let given = take(&piece.entry.digest, &accepted.content);
                    accepted.kept = std::mem::replace(&mut accepted.kept, Ok(())).and(given);
                }
                (piece, accepted)
            };
            group.0.into_par_iter().map(accept).collect::<Vec<_>>()
        });
        let mut moved = 0;
        let mut failed = Vec::new();
        for (piece, accepted) in accepted.await.map_err(std::io::Error::other)? {
            match accepted {
                Ok(accepted) => {
                    accepted.kept?;
                    self.count(&piece);
                    moved += u64::from(piece.entry.stored);
                    (terms.progress)(piece.entry.stored.into());
                }
                Err(error) => failed.push((piece, error)),
            }
        }
        Ok((moved, failed))
    }

    /// The form of a frame that stands for itself; reads directories until there is one.
    async fn locate(&self, locator: &mut Locator, digest: &Digest) -> Result<Piece, FetchError> {
        'lists: loop {
            if let Some(piece) = locator.forms.plain(digest) {
                return Ok(piece);
            }
            let Some((appliance, version)) = locator.versions.get(locator.loaded).cloned() else {
                if self.distrust(locator) {
                    continue;
                }
                return Err(FetchError::Nowhere(*digest));
            };
            let packs = match locator.reread {
                Some(_) => self.source.packs_anew(&appliance, &version).await,
                None => self.source.packs(&appliance, &version).await,
            };
            let packs = packs.map_err(|source| FetchError::Packs { appliance: appliance.clone(), version, source })?;
            for info in packs {
                if !locator.forms.knows(&info.digest) {
                    match self.directory(&appliance, &info, locator.reread.is_none()).await {
                        Ok(directory) => locator.forms.learn(&appliance, info.digest, directory),
                        Err(error) if came_wrong(&error) && self.distrust(locator) => continue 'lists,
                        Err(error) => return Err(error),
                    }
                }
            }
            locator.loaded += 1;
        }
    }

    /// Forgets all directories, also those in the cache; false if that was done a short while ago. No signature covers a
    /// directory, so one that came with a wrong bit is found out by what is not where it says, and would be believed
    /// for as long as it is in the cache. From then on this process takes none from there: one that it has not read yet
    /// may be as wrong, and would have to wait for the next time.
    fn distrust(&self, locator: &mut Locator) -> bool {
        if locator.reread.is_some_and(|at| at.elapsed() < REREAD) {
            return false;
        }
        locator.reread = Some(Instant::now());
        locator.loaded = 0;
        for pack in locator.forms.forget() {
            let _ = std::fs::remove_file(self.cache.directory_path(&pack));
        }
        true
    }

    /// A pack's directory, from the cache if that is trusted, or from the pack's end. The cached form is the directory and
    /// the trailer.
    async fn directory(
        &self,
        appliance: &ApplianceName,
        info: &PackInfo,
        trusts_cache: bool,
    ) -> Result<Directory, FetchError> {
        let refused = |source| FetchError::Pack { pack: info.digest, source };
        let path = self.cache.directory_path(&info.digest);
        if let (true, Ok(tail)) = (trusts_cache, std::fs::read(&path)) {
            match parse_tail(&tail, info.size) {
                Ok(directory) => return Ok(directory),
                Err(_) => std::fs::remove_file(&path)?,
            }
        }
        // The list's word for the length saves a request, and is worth no more than that.
        let hinted = match (TRAILER..=info.size).contains(&info.directory) {
            true => {
                let tail = self.read_tail(appliance, info, info.directory).await?;
                parse_tail(&tail, info.size).ok().map(|directory| (directory, tail))
            }
            false => None,
        };
        let (directory, tail) = match hinted {
            Some(found) => found,
            None => {
                let trailer = self.read_tail(appliance, info, TRAILER).await?;
                let wanted = info.size - pack::directory_range(&trailer, info.size).map_err(refused)?.start;
                let tail = self.read_tail(appliance, info, wanted).await?;
                (parse_tail(&tail, info.size).map_err(refused)?, tail)
            }
        };
        if let Err(error) = crate::cache::write_whole(&path, &[&tail]) {
            tracing::warn!(pack = %info.digest, %error, "a pack's directory cannot be kept in the cache");
        }
        Ok(directory)
    }

    async fn read_tail(
        &self,
        appliance: &ApplianceName,
        info: &PackInfo,
        bytes: u64,
    ) -> Result<bytes::Bytes, FetchError> {
        let start = info.size.saturating_sub(bytes);
        let tail = self.source.read(appliance, &info.digest, start..info.size).await;
        let tail = tail.map_err(|source| FetchError::Source { frame: info.digest, source })?;
        self.counters.index_fetched.fetch_add(tail.len() as u64, Ordering::Relaxed);
        Ok(tail)
    }
}

/// Frames that are on their way: readers wait for their turns in place of fetching them too.
struct Turns<'a> {
    store: &'a FrameStore,
    held: Vec<(Digest, tokio::sync::OwnedMutexGuard<()>)>,
}

impl Turns<'_> {
    /// False if the frame is here by now, or somebody else fetches it.
    fn take(&mut self, digest: &Digest) -> bool {
        let turn = lock(&self.store.busy).entry(*digest).or_default().clone();
        let Ok(turn) = turn.try_lock_owned() else { return false };
        self.held.push((*digest, turn));
        !self.store.cache.has(digest)
    }
}

impl Drop for Turns<'_> {
    fn drop(&mut self) {
        let mut busy = lock(&self.store.busy);
        self.held.iter().for_each(|(digest, _)| _ = busy.remove(digest));
    }
}

/// Reads a directory from the last bytes of a pack, which must be exactly directory and trailer.
fn parse_tail(tail: &[u8], size: u64) -> Result<Directory, PackError> {
    let cut = tail.len().checked_sub(TRAILER as usize).ok_or(PackError::Format("it is cut short"))?;
    let range = pack::directory_range(&tail[cut..], size)?;
    if size - range.start != tail.len() as u64 {
        return Err(PackError::Format("its directory has another length than the version's list of packs says"));
    }
    pack::parse_directory(tail, range.start)
}

/// A piece whose content is right.
struct Accepted {
    content: Vec<u8>,
    /// Whether it is in the cache now.
    kept: std::io::Result<()>,
}

/// Verifies what came, and keeps it in a form that stands for itself, if it is to be kept.
fn accept(cache: &Cache, piece: &Piece, stored: &[u8], keep: bool) -> Result<Accepted, FetchError> {
    let Piece { pack, entry, bases, .. } = piece;
    let damaged = |source| FetchError::Damaged { frame: entry.digest, pack: *pack, source };
    let put = |encoding, stored: &[u8]| {
        if keep { cache.put(&entry.digest, encoding, stored, entry.length) } else { Ok(()) }
    };
    if bases.is_empty() {
        let content = cache.decode(&entry.digest, entry.encoding, stored, entry.length as usize).map_err(damaged)?;
        return Ok(Accepted { content, kept: put(entry.encoding, stored) });
    }
    let mut together = Vec::new();
    for base in bases.iter() {
        let cached = cache.get(&base.frame)?.ok_or_else(|| damaged(FrameError::Bases))?;
        together.extend_from_slice(base.of(&cached.content));
    }
    let content = decode_delta(&entry.digest, stored, entry.length as usize, &together).map_err(damaged)?;
    let (encoding, stored): (Encoding, _) = if keep { encode(&content) } else { (Encoding::Plain, Vec::new()) };
    Ok(Accepted { content, kept: put(encoding, &stored) })
}

fn came_wrong(error: &FetchError) -> bool {
    // A pack that is gone is refused: its frames are in others now.
    matches!(error, FetchError::Damaged { .. } | FetchError::Source { source: SourceError::Refused(_), .. })
}

fn once_more(piece: &Piece, error: &FetchError) {
    let (frame, pack) = (piece.entry.digest, piece.pack);
    tracing::warn!(%frame, %pack, %error, "what came is not the frame; it is fetched once more");
}

fn pass_over(piece: &Piece, error: &FetchError) {
    let (frame, pack) = (piece.entry.digest, piece.pack);
    tracing::warn!(%frame, %pack, %error, "a difference cannot be used; the frame is fetched in its plain form");
}
