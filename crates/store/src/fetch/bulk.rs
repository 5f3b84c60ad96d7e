//! Many frames at once: in few requests, at a pace, for the cache or for whoever takes them.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use collective_model::Digest;
use futures_util::stream::{StreamExt, TryStreamExt};
use rayon::prelude::*;

use super::{FetchError, FrameStore, RECENT, accept, came_wrong, lock, once_more, pass_over};
use crate::SourceError;
use crate::locate::{Group, Piece, group};

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

impl FrameStore {
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
        let mut moved = 0;
        for (store, digests) in self.by_home(digests) {
            moved += store.fetch_missing(&digests, &Terms { pace, progress, take: None }).await?;
        }
        Ok(moved)
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
        self.bring_near(digests).await?;
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
        // A difference may be wrong by itself; but one that is gone tells, as a frame does, that the lists are old.
        let tells = |(piece, error): &(Piece, _)| {
            came_wrong(error) && (piece.bases.is_empty() || matches!(error, FetchError::Source { .. }))
        };
        let wrong = passed_over.iter().any(tells);
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
                if let Ok(accepted) = &mut accepted {
                    // Of all that comes together only what is being looked at is in memory, and always the same memory.
                    let content = std::mem::take(&mut accepted.content);
                    let given = take.as_ref().map_or(Ok(()), |take| take(&piece.entry.digest, &content));
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
