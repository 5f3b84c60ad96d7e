//! A host's way to frames: from memory, from the cache, or from the store, and never unverified.
//!
//! However many readers wait for a frame, it is fetched once. A [`FrameStore`] belongs to one process; several
//! processes share the [`Cache`].

mod bulk;
mod find;
mod near;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use collective_model::{ApplianceName, Digest};
use rayon::prelude::*;

use crate::cache::Cache;
use crate::decoded::Decoded;
use crate::locate::Piece;
use crate::pack::{EntryKind, PackError};
use crate::page::PageError;
use crate::{Encoding, FrameError, Source, SourceError, decode_delta, encode};

use find::Locator;

pub use bulk::{Checked, Pace, Take};
pub use near::Near;

/// Frames kept in memory (8 MiB).
const RECENT: usize = 16;

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
    /// Stored bytes of others that are not here as frames, and are near by.
    pub near: u64,
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
    /// Where all comes from that this one has not.
    below: Option<Below>,
    near: Mutex<Option<Arc<dyn Near>>>,
    /// Bytes moved.
    pub counters: Counters,
}

/// Another store, for what this one has not.
struct Below {
    store: Arc<FrameStore>,
    /// Everything that this one has.
    own: HashSet<Digest>,
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
            below: None,
            near: Default::default(),
            counters: Default::default(),
        }
    }

    /// Puts this store above another: what none of its packs has comes from there. Reads all directories.
    pub async fn above(mut self, store: Arc<FrameStore>) -> Result<Self, FetchError> {
        let mut locator = self.locator.lock().await;
        while self.read_on(&mut locator).await? {}
        let own = locator.forms.digests().collect();
        drop(locator);
        self.below = Some(Below { store, own });
        Ok(self)
    }

    /// The store that has a frame or page.
    fn home(&self, digest: &Digest) -> &Self {
        match &self.below {
            Some(below) if !below.own.contains(digest) => &below.store,
            _ => self,
        }
    }

    /// Parts frames by the store that has them.
    fn by_home(&self, digests: &[Digest]) -> Vec<(&Self, Vec<Digest>)> {
        let Some(below) = &self.below else { return vec![(self, digests.to_vec())] };
        let (own, others) = digests.iter().partition(|digest| below.own.contains(digest));
        vec![(self, own), (&below.store, others)]
    }

    /// Whether a frame is at hand without the network.
    pub fn has(&self, digest: &Digest) -> bool {
        self.home(digest).cache.has(digest)
    }

    /// Stored bytes moved, of data frames and of indexes, and those of frames that the cache had.
    pub fn moved(&self) -> [u64; 3] {
        let Counters { fetched, index_fetched, from_cache } = &self.counters;
        let below = self.below.as_ref().map_or([0; 3], |below| below.store.moved());
        let own = [fetched, index_fetched, from_cache].map(|counter| counter.load(Ordering::Relaxed));
        std::array::from_fn(|i| own[i] + below[i])
    }

    /// Makes the packs of a version known. Nothing is fetched until a frame is missing. Above another store, which has all
    /// that it will have, they are that one's.
    pub async fn add_version(&self, appliance: &ApplianceName, version: &Digest) {
        let lowest = self.below.as_ref().map_or(self, |below| &below.store);
        let mut locator = lowest.locator.lock().await;
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
        lock(&self.waiting).clone().or_else(|| self.below.as_ref()?.store.waiting())
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
        self.home(digest).read_here(digest, length, from, part)
    }

    fn read_here(&self, digest: &Digest, length: u32, from: usize, part: &mut [u8]) -> Result<bool, FetchError> {
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
        self.home(digest).frame_here(digest, length).await
    }

    async fn frame_here(&self, digest: &Digest, length: u32) -> Result<Arc<Vec<u8>>, FetchError> {
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
        let home = self.home(digest);
        match home.cache.get(digest)? {
            Some(cached) => Ok(cached.content),
            None => home.fetch_one(digest, None).await,
        }
    }

    async fn fetch_one(&self, digest: &Digest, length: Option<u32>) -> Result<Vec<u8>, FetchError> {
        if self.is_near(digest) {
            self.bring_near(std::slice::from_ref(digest)).await?;
            if let Some(cached) = self.cache.get(digest)? {
                return Ok(cached.content);
            }
        }
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
        let mut lack = Lack::default();
        for (store, digests) in self.by_home(digests) {
            let pieces = store.choose(&digests).await?;
            for piece in pieces {
                let stored = u64::from(piece.entry.stored);
                if store.is_near(&piece.entry.digest) {
                    lack.near += stored;
                } else {
                    lack.frames += 1;
                    lack.bytes += stored;
                }
            }
        }
        Ok(lack)
    }
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
