//! Where frames are: lists of packs, and packs' directories, read once and again when they are wrong.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use collective_model::{ApplianceName, Digest};

use super::{FetchError, FrameStore, came_wrong};
use crate::PackInfo;
use crate::locate::{Forms, Piece};
use crate::pack::{self, Directory, PackError, TRAILER};

/// Directories that do not agree with what is in the packs are read again, at most this often.
const REREAD: Duration = Duration::from_secs(60);

#[derive(Default)]
pub(super) struct Locator {
    pub(super) versions: Vec<(ApplianceName, Digest)>,
    /// How many of them were looked into.
    loaded: usize,
    pub(super) forms: Forms,
    /// When all directories were last read again.
    reread: Option<Instant>,
}

impl FrameStore {
    /// Checks that packs hold all of `digests` in a form that stands for itself, in the cache or not.
    pub async fn locate_all(&self, digests: &[Digest]) -> Result<(), FetchError> {
        self.locate_each(&mut *self.locator.lock().await, digests).await
    }

    /// Afterwards the forms of all of `digests` are known, from the same reading of the directories.
    pub(super) async fn locate_each(&self, locator: &mut Locator, digests: &[Digest]) -> Result<(), FetchError> {
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

    /// The packs that have `digests` in a form that stands for itself, as far as is known.
    pub async fn packs_of(&self, digests: &[Digest]) -> Vec<Option<Digest>> {
        let locator = self.locator.lock().await;
        digests.iter().map(|digest| locator.forms.plain(digest).map(|piece| piece.pack)).collect()
    }

    /// The cheapest piece for each of `digests` that is not in the cache.
    pub(super) async fn choose(&self, digests: &[Digest]) -> Result<Vec<Piece>, FetchError> {
        let missing: Vec<Digest> = digests.iter().filter(|digest| !self.cache.has(digest)).copied().collect();
        let mut locator = self.locator.lock().await;
        // All directories first: the choice must not depend on which were read before.
        self.locate_each(&mut locator, &missing).await?;
        locator.forms.cheapest(&missing, |base| self.cache.has(base)).map_err(FetchError::Nowhere)
    }

    pub(super) async fn plain(&self, digest: &Digest) -> Result<Piece, FetchError> {
        self.locate(&mut *self.locator.lock().await, digest).await
    }

    /// The form of a frame that stands for itself; reads directories until there is one.
    pub(super) async fn locate(&self, locator: &mut Locator, digest: &Digest) -> Result<Piece, FetchError> {
        loop {
            if let Some(piece) = locator.forms.plain(digest) {
                return Ok(piece);
            }
            if !self.read_on(locator).await? && !self.distrust(locator) {
                return Err(FetchError::Nowhere(*digest));
            }
        }
    }

    /// Reads the directories of one more version; false if all were read.
    pub(super) async fn read_on(&self, locator: &mut Locator) -> Result<bool, FetchError> {
        let Some((appliance, version)) = locator.versions.get(locator.loaded).cloned() else { return Ok(false) };
        let packs = match locator.reread {
            Some(_) => self.source.packs_anew(&appliance, &version).await,
            None => self.source.packs(&appliance, &version).await,
        };
        let packs = packs.map_err(|source| FetchError::Packs { appliance: appliance.clone(), version, source })?;
        for info in packs {
            if !locator.forms.knows(&info.digest) {
                match self.directory(&appliance, &info, locator.reread.is_none()).await {
                    Ok(directory) => locator.forms.learn(&appliance, info.digest, directory),
                    Err(error) if came_wrong(&error) && self.distrust(locator) => return Ok(true),
                    Err(error) => return Err(error),
                }
            }
        }
        locator.loaded += 1;
        Ok(true)
    }

    /// Forgets all directories, also those in the cache; false if that was done a short while ago. No signature covers a
    /// directory, so one that came with a wrong bit is found out by what is not where it says, and would be believed
    /// for as long as it is in the cache. From then on this process takes none from there: one that it has not read yet
    /// may be as wrong, and would have to wait for the next time.
    pub(super) fn distrust(&self, locator: &mut Locator) -> bool {
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
    pub(super) async fn directory(
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

    pub(super) async fn read_tail(
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

/// Reads a directory from the last bytes of a pack, which must be exactly directory and trailer.
fn parse_tail(tail: &[u8], size: u64) -> Result<Directory, PackError> {
    let cut = tail.len().checked_sub(TRAILER as usize).ok_or(PackError::Format("it is cut short"))?;
    let range = pack::directory_range(&tail[cut..], size)?;
    if size - range.start != tail.len() as u64 {
        return Err(PackError::Format("its directory has another length than the version's list of packs says"));
    }
    pack::parse_directory(tail, range.start)
}
