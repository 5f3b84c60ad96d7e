//! A host's way to frames: from memory, from the cache, or from the store, and never unverified.
//!
//! However many readers wait for a frame, it is fetched once. A [`FrameStore`] belongs to one process; several
//! processes share the [`Cache`].

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use collective_model::{ApplianceName, Digest};
use futures_util::stream::{StreamExt, TryStreamExt};

use crate::cache::Cache;
use crate::pack::{self, Entry, EntryKind, PackError, TRAILER};
use crate::page::PageError;
use crate::{FrameError, PackInfo, Source, SourceError, decode};

/// Frames kept decoded in memory (8 MiB).
const RECENT: usize = 64;
/// Bytes asked for in one request when fetching many frames.
const REQUEST_BYTES: u64 = 4 << 20;
/// Requests under way at once.
const REQUESTS: usize = 4;
/// The end of a pack that is read first, in the hope that its directory is in it.
const TAIL_BYTES: u64 = 64 << 10;

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

#[derive(Clone, Copy)]
struct Location {
    pack: u32,
    entry: Entry,
}

#[derive(Default)]
struct Locator {
    versions: Vec<(ApplianceName, Digest)>,
    loaded: usize,
    packs: Vec<(ApplianceName, Digest)>,
    known_packs: HashSet<Digest>,
    frames: HashMap<Digest, Location>,
}

/// Frames of some versions, wherever they are.
pub struct FrameStore {
    cache: Cache,
    source: Arc<dyn Source>,
    locator: tokio::sync::Mutex<Locator>,
    busy: Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
    recent: Mutex<VecDeque<(Digest, Arc<Vec<u8>>)>>,
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

    /// An index page.
    pub async fn page(&self, digest: &Digest) -> Result<Vec<u8>, FetchError> {
        match self.cache.get(digest)? {
            Some(cached) => Ok(cached.content),
            None => self.fetch_one(digest, None).await,
        }
    }

    async fn fetch_one(&self, digest: &Digest, length: Option<u32>) -> Result<Vec<u8>, FetchError> {
        let (appliance, pack, entry) = self.locate(digest).await?.ok_or(FetchError::Nowhere(*digest))?;
        if let Some(length) = length.filter(|length| *length != entry.length) {
            let source = FrameError::Length { expected: length as usize, got: entry.length as usize };
            return Err(FetchError::Damaged { frame: *digest, pack, source });
        }
        let stored = self.source.read(&appliance, &pack, entry.range()).await;
        let stored = stored.map_err(|source| FetchError::Source { frame: *digest, source })?;
        let (content, kept) = self.accept(&pack, &entry, &stored)?;
        if let Err(error) = kept {
            // A full disk must not stop the guest: the frame is right, it is only not kept.
            tracing::warn!(frame = %digest, %error, "a fetched frame cannot be kept in the cache");
        }
        Ok(content)
    }

    /// Verifies and keeps what came; the second part says whether it could be kept.
    fn accept(
        &self,
        pack: &Digest,
        entry: &Entry,
        stored: &[u8],
    ) -> Result<(Vec<u8>, std::io::Result<()>), FetchError> {
        let content = decode(&entry.digest, entry.encoding, stored, entry.length as usize)
            .map_err(|source| FetchError::Damaged { frame: entry.digest, pack: *pack, source })?;
        let counter = match entry.kind {
            EntryKind::Data => &self.counters.fetched,
            EntryKind::Page => &self.counters.index_fetched,
        };
        counter.fetch_add(stored.len() as u64, Ordering::Relaxed);
        lock(&self.counted).insert(entry.digest);
        let kept = self.cache.put(&entry.digest, entry.encoding, stored, entry.length);
        Ok((content, kept))
    }

    /// What the host lacks of `digests`.
    pub async fn lack(&self, digests: &[Digest]) -> Result<Lack, FetchError> {
        let mut lack = Lack::default();
        for (_, _, entry) in self.locate_missing(digests).await? {
            lack.frames += 1;
            lack.bytes += u64::from(entry.stored);
        }
        Ok(lack)
    }

    /// Checks that packs hold all of `digests`, in the cache or not.
    pub async fn locate_all(&self, digests: &[Digest]) -> Result<(), FetchError> {
        for digest in digests {
            self.locate(digest).await?.ok_or(FetchError::Nowhere(*digest))?;
        }
        Ok(())
    }

    async fn locate_missing(&self, digests: &[Digest]) -> Result<Vec<(ApplianceName, Digest, Entry)>, FetchError> {
        let mut missing = Vec::new();
        for digest in digests.iter().filter(|digest| !self.cache.has(digest)) {
            missing.push(self.locate(digest).await?.ok_or(FetchError::Nowhere(*digest))?);
        }
        Ok(missing)
    }

    /// Fetches those of `digests` that are not in the cache, in few requests, and keeps them there. Tells `progress`
    /// of stored bytes as they come. Returns how many came.
    pub async fn prefetch(&self, digests: &[Digest], progress: &(dyn Fn(u64) + Sync)) -> Result<u64, FetchError> {
        let mut missing = self.locate_missing(digests).await?;
        missing.sort_by_key(|(_, pack, entry)| (*pack, entry.offset));
        let requests = futures_util::stream::iter(group(missing));
        let fetched = requests.map(|request| self.fetch_group(request, progress)).buffer_unordered(REQUESTS);
        fetched.try_fold(0, |sum, bytes| async move { Ok(sum + bytes) }).await
    }

    async fn fetch_group(&self, group: Group, progress: &(dyn Fn(u64) + Sync)) -> Result<u64, FetchError> {
        let Group { appliance, pack, entries } = group;
        let start = entries[0].offset;
        let end = entries[entries.len() - 1].range().end;
        let bytes = self.source.read(&appliance, &pack, start..end).await;
        let bytes = bytes.map_err(|source| FetchError::Source { frame: entries[0].digest, source })?;
        for entry in &entries {
            let stored = &bytes[(entry.offset - start) as usize..(entry.range().end - start) as usize];
            let (_, kept) = self.accept(&pack, entry, stored)?;
            kept?;
            progress(stored.len() as u64);
        }
        Ok(end - start)
    }

    async fn locate(&self, digest: &Digest) -> Result<Option<(ApplianceName, Digest, Entry)>, FetchError> {
        let mut locator = self.locator.lock().await;
        loop {
            if let Some(location) = locator.frames.get(digest) {
                let (appliance, pack) = &locator.packs[location.pack as usize];
                return Ok(Some((appliance.clone(), *pack, location.entry)));
            }
            let Some((appliance, version)) = locator.versions.get(locator.loaded).cloned() else { return Ok(None) };
            for info in self.packs_of(&appliance, &version).await? {
                if !locator.known_packs.contains(&info.digest) {
                    let entries = self.directory(&appliance, &info).await?;
                    let pack = locator.packs.len() as u32;
                    locator.packs.push((appliance.clone(), info.digest));
                    locator.known_packs.insert(info.digest);
                    let located = entries.into_iter().map(|entry| (entry.digest, Location { pack, entry }));
                    locator.frames.extend(located);
                }
            }
            locator.loaded += 1;
        }
    }

    async fn packs_of(&self, appliance: &ApplianceName, version: &Digest) -> Result<Vec<PackInfo>, FetchError> {
        self.source.packs(appliance, version).await.map_err(|source| FetchError::Packs {
            appliance: appliance.clone(),
            version: *version,
            source,
        })
    }

    /// A pack's directory, from the cache or from the pack's end. The cached form is the directory and the trailer.
    async fn directory(&self, appliance: &ApplianceName, info: &PackInfo) -> Result<Vec<Entry>, FetchError> {
        let refused = |source| FetchError::Pack { pack: info.digest, source };
        let path = self.cache.directory_path(&info.digest);
        if let Ok(tail) = std::fs::read(&path) {
            match parse_tail(&tail, info.size) {
                Ok(Ok(entries)) => return Ok(entries),
                _ => std::fs::remove_file(&path)?,
            }
        }
        let mut wanted = TAIL_BYTES.min(info.size);
        loop {
            let bytes = self.source.read(appliance, &info.digest, info.size - wanted..info.size).await;
            let tail = bytes.map_err(|source| FetchError::Source { frame: info.digest, source })?;
            self.counters.index_fetched.fetch_add(tail.len() as u64, Ordering::Relaxed);
            match parse_tail(&tail, info.size).map_err(refused)? {
                Ok(entries) => {
                    let keep = entries.len() as u64 * 52 + TRAILER;
                    let kept = crate::cache::write_whole(&path, &[&tail[(tail.len() as u64 - keep) as usize..]]);
                    if let Err(error) = kept {
                        tracing::warn!(pack = %info.digest, %error, "a pack's directory cannot be kept in the cache");
                    }
                    return Ok(entries);
                }
                // A well-formed trailer that claims more than a pack can hold was refused before.
                Err(longer) => wanted = longer,
            }
        }
    }
}

/// Reads a directory from the last bytes of a pack; `Err(n)` inside: the last n bytes are needed.
fn parse_tail(tail: &[u8], size: u64) -> Result<Result<Vec<Entry>, u64>, PackError> {
    let cut = tail.len().checked_sub(TRAILER as usize).ok_or(PackError::Format("it is cut short"))?;
    let range = pack::directory_range(&tail[cut..], size)?;
    let needed = size - range.start;
    let Some(from) = (tail.len() as u64).checked_sub(needed) else { return Ok(Err(needed)) };
    pack::parse_directory(&tail[from as usize..cut], range.start).map(Ok)
}

struct Group {
    appliance: ApplianceName,
    pack: Digest,
    entries: Vec<Entry>,
}

/// Joins neighbours in a pack into requests; gaps are never fetched, so what is counted is what moves.
fn group(missing: Vec<(ApplianceName, Digest, Entry)>) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (appliance, pack, entry) in missing {
        if let Some(last) = groups.last_mut() {
            let (first, end) = (last.entries[0].offset, last.entries[last.entries.len() - 1].range().end);
            if last.pack == pack && end == entry.offset && entry.range().end - first <= REQUEST_BYTES {
                last.entries.push(entry);
                continue;
            }
            if last.pack == pack && last.entries.contains(&entry) {
                continue;
            }
        }
        groups.push(Group { appliance, pack, entries: vec![entry] });
    }
    groups
}
