//! Frames in the cache as plain bytes, for reads of a few blocks that must not decode half a megabyte each time.
//!
//! A frame that a guest reads is kept decoded beside its stored form. All runners of a host read the same file, so the
//! kernel keeps it in memory once for all of them. A process compares a file with its digest when it sees it for the
//! first time, and again when it is another file or was written to since; between that it only reads.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Mutex, PoisonError};

use collective_model::Digest;

use crate::cache::{Cache, note_use, write_whole};

/// Files kept open.
const OPEN: usize = 512;
/// Nothing is decoded in advance of need where the file system has less space left, in bytes: guests need it to write.
const SPACE_FOR_OTHERS: u64 = 1 << 30;

/// Which state of which file was verified: device, inode, last change of its content.
type Stamp = (u64, u64, i64, i64);

#[derive(Default)]
struct Files {
    open: HashMap<Digest, Arc<File>>,
    /// In the order in which they were opened.
    order: VecDeque<Digest>,
    verified: HashMap<Digest, Stamp>,
}

/// The decoded frames of a cache, as one process reads them.
pub(crate) struct Decoded {
    files: Mutex<Files>,
}

impl Decoded {
    pub fn new() -> Self {
        Self { files: Mutex::default() }
    }

    fn files(&self) -> std::sync::MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills `part` from `offset` of the frame's content; false if it is not here decoded.
    pub fn read(&self, cache: &Cache, digest: &Digest, offset: u64, part: &mut [u8]) -> io::Result<bool> {
        let open = self.files().open.get(digest).cloned();
        let file = match open {
            Some(file) => file,
            None => match self.open(cache, digest)? {
                Some(file) => file,
                None => return Ok(false),
            },
        };
        // An open file stays as it was verified, even if it is removed: files are replaced, never written to.
        file.read_exact_at(part, offset).map(|()| true)
    }

    fn open(&self, cache: &Cache, digest: &Digest) -> io::Result<Option<Arc<File>>> {
        let path = cache.decoded_path(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let meta = file.metadata()?;
        // Use is noted at the stored form, so that these times tell of changes only.
        let stamp = (meta.dev(), meta.ino(), meta.ctime(), meta.ctime_nsec());
        if self.files().verified.get(digest) != Some(&stamp) {
            let mut content = vec![0; meta.len() as usize];
            let whole = file.read_exact_at(&mut content, 0).is_ok();
            if !whole || cache.name_of(&content) != *digest {
                tracing::warn!(frame = %digest, "a decoded frame in the cache is damaged; it is removed");
                std::fs::remove_file(path)?;
                return Ok(None);
            }
        }
        let file = Arc::new(file);
        let mut files = self.files();
        files.verified.insert(*digest, stamp);
        if files.open.insert(*digest, file.clone()).is_none() {
            files.order.push_back(*digest);
        }
        if files.order.len() > OPEN {
            let oldest = files.order.pop_front();
            oldest.and_then(|oldest| files.open.remove(&oldest));
        }
        Ok(Some(file))
    }

    /// Keeps verified content, if there is space. Only saves time later, so a failure is no failure.
    pub fn keep(&self, cache: &Cache, digest: &Digest, content: &[u8]) {
        let path = cache.decoded_path(digest);
        let kept = || -> io::Result<()> {
            note_use(&cache.frame_path(digest));
            if cache.space()? > SPACE_FOR_OTHERS { write_whole(&path, &[content]) } else { Ok(()) }
        };
        if let Err(error) = kept() {
            tracing::debug!(frame = %digest, %error, "a decoded frame cannot be kept");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_damaged_is_a_miss_and_what_is_open_stays() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let content: Vec<u8> = (0..8192u32).map(|i| ((i * i) >> 5) as u8).collect();
        let digest = Digest::of(&content);
        let path = cache.decoded_path(&digest);
        let read = |decoded: &Decoded| {
            let mut part = [0; 100];
            decoded.read(&cache, &digest, 5000, &mut part).unwrap().then_some(part)
        };
        let decoded = Decoded::new();
        assert!(read(&decoded).is_none());
        decoded.keep(&cache, &digest, &content);
        assert_eq!(read(&decoded).unwrap(), content[5000..5100]);
        // Another process finds damage where this one has the sound file open.
        let mut damaged = content.clone();
        damaged[7000] ^= 1;
        for bytes in [&damaged[..], &content[..8191], &[]] {
            let part = path.with_extension("new");
            std::fs::write(&part, bytes).unwrap();
            std::fs::rename(&part, &path).unwrap();
            assert_eq!(read(&decoded).unwrap(), content[5000..5100]);
            assert!(read(&Decoded::new()).is_none());
            assert!(!path.exists());
        }
        // A file that was verified and then changed is verified again.
        decoded.keep(&cache, &digest, &content);
        let again = Decoded::new();
        assert!(read(&again).is_some());
        again.files().open.clear();
        std::fs::write(&path, &damaged).unwrap();
        assert!(read(&again).is_none());
    }
}
