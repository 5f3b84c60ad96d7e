//! A host's cache: one file per frame, in its stored form, so that the file system is the only shared state.
//!
//! The daemon and every runner use the same folder at once and need no lock: a file appears whole, by rename, and a
//! reader who does not find one fetches it. Nothing is synced here: a file that a power cut left damaged fails its
//! digest, when it is read or the cache is opened after the next boot, and is removed and fetched again. Whoever needs
//! frames to be durable calls [`Cache::sync`].

use std::collections::HashSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use collective_model::Digest;

use crate::pack::EntryKind;
use crate::seal::{Form, Opened, Seal};
use crate::{Encoding, settle};

/// `"CLF1"`, encoding, three zeros, u32 length of the content; then the stored bytes.
const HEADER: usize = 12;
const MAGIC: &[u8; 4] = b"CLF1";
/// Use is noted in the file's time at most this often: writing it on every read would cost more than it tells.
const NOTE_USE_EVERY: Duration = Duration::from_secs(3600);

/// The quickest level of zstd, for what was there in another form.
const FAST_LEVEL: i32 = 1;

/// What the name of a decoded frame ends in.
const DECODED: &str = "raw";

/// The folder. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
    form: Form,
}

/// A frame taken from the cache.
pub struct Cached {
    /// Its content, verified.
    pub content: Vec<u8>,
    /// Bytes of its stored form.
    pub stored: u64,
}

/// What an eviction did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Eviction {
    /// Bytes in use before.
    pub before: u64,
    /// Bytes removed.
    pub removed: u64,
    /// Bytes that pins keep.
    pub pinned: u64,
}

impl Cache {
    /// Opens or creates the cache in `root`. The first to do so after a boot compares what was not synced with its names,
    /// so that what is counted as present is.
    pub fn open(root: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(root.join("frames"))?;
        std::fs::create_dir_all(root.join("packs"))?;
        let cache = Self { root: root.to_owned(), form: Form::default() };
        if let Err(error) = settle::after_boot(&cache) {
            // A full disk must not keep machines from starting; what is damaged is found when it is read.
            tracing::warn!(%error, "what was not synced in the cache before this boot could not be looked at");
        }
        Ok(cache)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The same for private data: what comes is kept sealed, and nothing else is believed; only what a guest reads is kept
    /// decoded too, as its disks are. Never for a folder that other
    /// frames are in.
    pub fn sealed(self, seal: Arc<Seal>) -> Self {
        Self { form: Form(Some(seal)), ..self }
    }

    /// The name of a frame's content.
    pub(crate) fn name_of(&self, content: &[u8]) -> Digest {
        self.form.name(content)
    }

    /// Decodes what a pack says it holds, and verifies it.
    pub(crate) fn decode(
        &self,
        digest: &Digest,
        encoding: Encoding,
        stored: &[u8],
        length: usize,
    ) -> Result<Vec<u8>, crate::FrameError> {
        let opened = self.form.decode(digest, EntryKind::Data, encoding, stored, length);
        opened.map(|Opened { content, .. }| content)
    }

    pub(crate) fn frame_path(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.root.join("frames").join(&name[..2]).join(&name[2..])
    }

    /// Where a frame is kept as it is, beside its stored form.
    pub(crate) fn decoded_path(&self, digest: &Digest) -> PathBuf {
        self.frame_path(digest).with_extension(DECODED)
    }

    /// Bytes that anybody may still write to the cache's file system.
    pub fn space(&self) -> io::Result<u64> {
        let found = rustix::fs::statvfs(&self.root)?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }

    /// Where the directory of a pack is kept.
    pub(crate) fn directory_path(&self, pack: &Digest) -> PathBuf {
        self.root.join("packs").join(pack.to_string())
    }

    /// Whether a frame is here; it may still turn out to be damaged.
    pub fn has(&self, digest: &Digest) -> bool {
        self.frame_path(digest).exists()
    }

    /// Bytes of a frame's stored form; 0 if it is not here.
    pub(crate) fn stored_bytes(&self, digest: &Digest) -> u64 {
        std::fs::metadata(self.frame_path(digest)).map_or(0, |meta| meta.len().saturating_sub(HEADER as u64))
    }

    /// The frame, verified, or `None`. A damaged file is removed and reported as missing.
    pub fn get(&self, digest: &Digest) -> io::Result<Option<Cached>> {
        let found = self.look_at(digest)?;
        if found.is_some() {
            note_use(&self.frame_path(digest));
        }
        Ok(found)
    }

    /// As [`get`](Self::get), and does not count as use.
    pub(crate) fn look_at(&self, digest: &Digest) -> io::Result<Option<Cached>> {
        let path = self.frame_path(digest);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some(content) = self.parse(digest, &bytes) else {
            tracing::warn!(frame = %digest, "a cached frame is damaged; it is removed and will be fetched again");
            std::fs::remove_file(&path)?;
            return Ok(None);
        };
        Ok(Some(Cached { content, stored: (bytes.len() - HEADER) as u64 }))
    }

    /// Puts a frame; its content must have been verified.
    pub fn put(&self, digest: &Digest, encoding: Encoding, stored: &[u8], length: u32) -> io::Result<()> {
        let path = self.frame_path(digest);
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(MAGIC);
        header[4] = encoding as u8;
        header[8..].copy_from_slice(&length.to_le_bytes());
        write_whole(&path, &[&header, stored])
    }

    /// Puts the content of a data frame, which must have been verified, quickly.
    pub(crate) fn keep(&self, digest: &Digest, content: &[u8]) -> io::Result<()> {
        let stored = self.form.encode(digest, EntryKind::Data, content, FAST_LEVEL)?;
        self.put(digest, stored.encoding, &stored.bytes, stored.length)
    }

    /// Removes a frame, if it is here.
    pub fn remove(&self, digest: &Digest) -> io::Result<()> {
        for path in [self.decoded_path(digest), self.frame_path(digest)] {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Waits until everything in the cache's file system is durable.
    pub fn sync(&self) -> io::Result<()> {
        let begun = SystemTime::now();
        let folder = std::fs::File::open(&self.root)?;
        rustix::fs::syncfs(&folder)?;
        if let Err(error) = settle::note_synced(self, begun) {
            tracing::warn!(%error, "it could not be noted that the cache was synced; more is looked at after the next boot");
        }
        Ok(())
    }

    /// Frames in their stored form that were written or used at this time or later.
    pub(crate) fn young(&self, since: SystemTime) -> io::Result<Vec<Digest>> {
        let files = self.list()?.into_iter().filter(|file| !file.decoded && file.used >= since);
        Ok(files.filter_map(|file| file.digest).collect())
    }

    /// Bytes that the frames take.
    pub fn size(&self) -> io::Result<u64> {
        Ok(self.list()?.iter().map(|file| file.bytes).sum())
    }

    /// Removes the frames used longest ago until at most `budget` bytes are left, but none of `pinned`. Decoded forms go
    /// first, whatever is pinned: they are made again from the stored ones.
    pub fn evict(&self, budget: u64, pinned: &HashSet<Digest>) -> io::Result<Eviction> {
        let mut files = self.list()?;
        let mut eviction = Eviction { before: files.iter().map(|file| file.bytes).sum(), ..Default::default() };
        files.sort_by_key(|file| (!file.decoded, file.used));
        let mut size = eviction.before;
        for file in files {
            let pinned = !file.decoded && file.digest.is_some_and(|digest| pinned.contains(&digest));
            if pinned {
                eviction.pinned += file.bytes;
            } else if size > budget {
                std::fs::remove_file(&file.path)?;
                size -= file.bytes;
                eviction.removed += file.bytes;
            }
        }
        Ok(eviction)
    }

    fn parse(&self, digest: &Digest, bytes: &[u8]) -> Option<Vec<u8>> {
        let (header, stored) = bytes.split_at_checked(HEADER)?;
        let length = u32::from_le_bytes(header[8..].try_into().ok()?) as usize;
        let encoding = Encoding::try_from(header[4]).ok()?;
        if &header[..4] != MAGIC {
            return None;
        }
        self.decode(digest, encoding, stored, length).ok()
    }

    fn list(&self) -> io::Result<Vec<FrameFile>> {
        let mut files = Vec::new();
        for folder in std::fs::read_dir(self.root.join("frames"))? {
            let folder = folder?;
            let prefix = folder.file_name();
            for entry in std::fs::read_dir(folder.path())? {
                let entry = entry?;
                // Another process may remove or rename it right now.
                let Ok(meta) = entry.metadata() else { continue };
                let name = format!("{}{}", prefix.to_string_lossy(), entry.file_name().to_string_lossy());
                let stem = name.strip_suffix(DECODED).and_then(|name| name.strip_suffix('.'));
                files.push(FrameFile {
                    path: entry.path(),
                    digest: stem.unwrap_or(&name).parse().ok(),
                    decoded: stem.is_some(),
                    bytes: meta.len(),
                    used: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                });
            }
        }
        Ok(files)
    }
}

struct FrameFile {
    path: PathBuf,
    /// None: a part that a killed process left behind.
    digest: Option<Digest>,
    decoded: bool,
    bytes: u64,
    used: SystemTime,
}

pub(crate) fn note_use(path: &Path) {
    let Ok(file) = std::fs::File::open(path) else { return };
    let noted = file.metadata().and_then(|meta| meta.modified());
    if noted.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > NOTE_USE_EVERY)) {
        // Only a hint for eviction.
        let _ = file.set_modified(SystemTime::now());
    }
}

/// Writes a file so that it is either absent or whole in the eyes of every other process.
pub(crate) fn write_whole(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
    let part = folder.join(format!(".part-{}-{unique}", std::process::id()));
    let written = (|| {
        let mut file = std::fs::File::create(&part)?;
        parts.iter().try_for_each(|bytes| file.write_all(bytes))?;
        std::fs::rename(&part, path)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encode;

    fn put(cache: &Cache, content: &[u8]) -> Digest {
        let digest = Digest::of(content);
        let (encoding, stored) = encode(content);
        cache.put(&digest, encoding, &stored, content.len() as u32).unwrap();
        digest
    }

    #[test]
    fn damaged_files_are_misses() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let digest = put(&cache, b"content");
        assert_eq!(cache.get(&digest).unwrap().unwrap().content, b"content");
        for damage in [vec![], vec![0; 5], vec![0; 40], b"CLF1\x01\0\0\0\x07\0\0\0xxxx".to_vec()] {
            put(&cache, b"content");
            std::fs::write(cache.frame_path(&digest), damage).unwrap();
            assert!(cache.get(&digest).unwrap().is_none());
            assert!(!cache.has(&digest), "removed, so that it is fetched again");
        }
    }

    #[test]
    fn after_a_boot_what_was_not_synced_is_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let synced = put(&cache, b"synced");
        let old = SystemTime::now() - Duration::from_secs(10);
        let damage = |digest: &Digest| {
            let path = cache.frame_path(digest);
            std::fs::write(&path, b"").unwrap();
            path
        };
        cache.sync().unwrap();
        // Only its time says that it was synced: it is not read again.
        std::fs::File::open(damage(&synced)).unwrap().set_modified(old).unwrap();
        let (young, sound) = (put(&cache, b"young"), put(&cache, b"sound"));
        damage(&young);
        std::fs::write(cache.directory_path(&young), b"no directory").unwrap();
        let has = |cache: &Cache| [synced, young, sound].map(|digest| cache.has(&digest));
        assert_eq!(has(&Cache::open(folder.path()).unwrap()), [true, true, true], "it is the same boot");
        std::fs::write(folder.path().join("boot"), b"another").unwrap();
        assert_eq!(has(&Cache::open(folder.path()).unwrap()), [true, false, true]);
        assert!(!cache.directory_path(&young).exists());
        for mark in ["boot", "synced"] {
            std::fs::remove_file(folder.path().join(mark)).unwrap();
        }
        assert_eq!(has(&Cache::open(folder.path()).unwrap()), [false, false, true], "nothing says that it was synced");
    }

    #[test]
    fn eviction_keeps_pins_and_the_recently_used() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let digests: Vec<Digest> = (0..10u8).map(|i| put(&cache, &[i; 100])).collect();
        for (age, digest) in digests.iter().enumerate() {
            let file = std::fs::File::open(cache.frame_path(digest)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(100 - age as u64)).unwrap();
        }
        let one = cache.size().unwrap() / 10;
        let eviction = cache.evict(3 * one, &HashSet::from([digests[0]])).unwrap();
        assert_eq!(eviction.pinned, one);
        let left: Vec<usize> = (0..10).filter(|i| cache.has(&digests[*i])).collect();
        assert_eq!(left, [0, 8, 9]);
    }
}
