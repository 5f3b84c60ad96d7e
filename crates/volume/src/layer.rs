//! One copy-on-write layer: a sparse data file, and a map of the 4 KiB blocks that it holds.
//!
//! The data file has the disk's own offsets, and behind them a log of the blocks that the map does not name yet
//! ([`log`]). The map is beside it with the suffix `.map` ([`map`]).
//!
//! What a flush promises: everything written before it survives a power cut. One sync of the data file is enough for
//! content and log. When the log is full, or a flush has more blocks than a record names, the flush folds: it takes a
//! copy of the changed map pages, syncs the data, writes the copy, syncs the map, which so never runs ahead of the data.
//! A block written but not flushed may be old or new after a power cut, as on any disk, and never something else.
//!
//! Only the content of its blocks tells whether the newest record counts. So who wants to change one of them has to
//! confirm the record first, with a flush: it writes the next one, or folds.
//!
//! After a sync of the data failed, nobody knows which pages the kernel dropped, and asking again would only say that
//! nothing is left to write. So every later flush of that layer fails too, until it is opened anew.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use collective_store::BLOCK;

use crate::backing::{Backing, read_full};
use crate::log::{self, Blocks, Record, SLOT, SLOTS};
use crate::map::{self, Bits, Map};
use crate::replay::{Replay, content, replay, settle};
use crate::rules::{Rule, keeps};

/// Why a layer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The file system says no.
    #[error("cannot {attempt} the layer {}: {source}", path.display())]
    Io {
        /// What was attempted.
        attempt: &'static str,
        /// The data file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The files are something else.
    #[error("{} is not a layer of this disk: {why}; restore it from a checkpoint or a backup", path.display())]
    Content {
        /// The data file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// A layer, open.
#[derive(Debug)]
pub struct Layer {
    path: PathBuf,
    data: Box<dyn Backing>,
    map: Box<dyn Backing>,
    /// Where the log is follows from it.
    size: u64,
    made_for: u64,
    /// Shared by all who change blocks, while they do.
    fixed: RwLock<Fixed>,
    bits: Mutex<Bits>,
    /// One flush at a time. Taken before `fixed`, and that before `bits`.
    flushing: Mutex<Flushing>,
}

/// Blocks that must not change.
#[derive(Debug, Default)]
struct Fixed {
    /// Those of the newest record, as long as it is in doubt.
    newest: Blocks,
    /// Those of the record that is being written.
    next: Blocks,
}

impl Fixed {
    fn touch(&self, blocks: &Range<u64>) -> bool {
        keeps(Rule::FixedBlocksStay) && (self.newest.touch(blocks) || self.next.touch(blocks))
    }
}

#[derive(Debug)]
struct Flushing {
    /// A sync of the data has failed.
    lost: bool,
    /// The number of the next record.
    number: u64,
    /// So many records fit before one is overwritten that is not in the map.
    room: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the map of the layer at `data` is.
pub(crate) fn map_path(data: &Path) -> PathBuf {
    suffixed(data, ".map")
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The data file appears last and whole, by rename: what a crash leaves behind before that is overwritten next time,
/// and a layer without its map or of the wrong length is damage, never a crash right here.
fn make(path: &Path, size: u64) -> io::Result<()> {
    if path.try_exists()? {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let create = |path: &Path| OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = File::open(folder)?;
    let map = create(&map_path(path))?;
    Backing::write_at(&map, &map::header(size), 0)?;
    map.set_len(map::length(size))?;
    reserve(&map, 0, map::length(size))?;
    map.sync_all()?;
    let part = suffixed(path, ".part");
    let data = create(&part)?;
    data.set_len(log::end(size))?;
    reserve(&data, log::start(size), log::end(size) - log::start(size))?;
    data.sync_all()?;
    folder.sync_all()?;
    std::fs::rename(&part, path)?;
    folder.sync_all()
}

/// Takes the space that flushes need. A write that finds the host's disk full is repeated when there is space again; of a
/// flush that failed QEMU believes that the disk is lost, and never asks again.
fn reserve(file: &File, offset: u64, length: u64) -> io::Result<()> {
    use rustix::io::Errno;
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), offset, length) {
        // Not every file system can.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(()),
        done => Ok(done?),
    }
}

/// Makes room for a log, and for more blocks. Every record is in the map by now. The header comes last, so that at any
/// instant both files are at least as long as it says.
fn grow(data: &dyn Backing, map: &dyn Backing, found: &Map, size: u64) -> io::Result<()> {
    data.set_length(data.length()?.max(log::end(size)))?;
    // Where the old log was there are blocks of the disk now, and the last one's end has to be zeros.
    for start in [found.size, size].map(log::start) {
        let mut bytes = vec![0; SLOTS as usize * SLOT];
        read_full(data, &mut bytes, start)?;
        if bytes.iter().any(|byte| *byte != 0) {
            data.write_at(&vec![0; bytes.len()], start)?;
        }
    }
    data.sync()?;
    map.set_length(map.length()?.max(map::length(size)))?;
    map.sync()?;
    map.write_at(&map::header(size), 0)?;
    map.sync()
}

impl Layer {
    /// Creates an empty layer for a disk of `size` bytes; there must be no data file. Durable when it returns.
    pub fn create(path: &Path, size: u64) -> Result<(), LayerError> {
        make(path, size).map_err(|source| LayerError::Io { attempt: "create", path: path.to_owned(), source })
    }

    /// Removes a layer that nobody has open; none is fine too.
    pub fn remove(path: &Path) -> Result<(), LayerError> {
        for file in [path.to_owned(), map_path(path)] {
            match std::fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(LayerError::Io { attempt: "remove", path: file, source: error });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Opens the layer of a disk of `size` bytes. A layer made when the disk was smaller is fine.
    pub fn open(path: &Path, size: u64, writable: bool) -> Result<Self, LayerError> {
        let open = |path: &Path| OpenOptions::new().read(true).write(writable).open(path);
        let error = |source| LayerError::Io { attempt: "open", path: path.to_owned(), source };
        let data = open(path).map_err(error)?;
        let map = open(&map_path(path)).map_err(error)?;
        Self::over(path, Box::new(data), Box::new(map), size, writable)
    }

    /// Opens a layer that is only read, for the disk that it was made for.
    pub fn open_frozen(path: &Path) -> Result<Self, LayerError> {
        let error = |source| LayerError::Io { attempt: "open", path: path.to_owned(), source };
        let size = File::open(map_path(path)).and_then(|map| map::made_for(&map)).map_err(error)?;
        Self::open(path, size, false)
    }

    /// Opens the layer whose files are `data` and `map`.
    pub(crate) fn over(
        path: &Path,
        data: Box<dyn Backing>,
        map: Box<dyn Backing>,
        size: u64,
        writable: bool,
    ) -> Result<Self, LayerError> {
        let error = |source| LayerError::Io { attempt: "open", path: path.to_owned(), source };
        let wrong = |why: String| LayerError::Content { path: path.to_owned(), why };
        let mut found = map::read(map.as_ref(), size).map_err(error)?.map_err(wrong)?;
        let needed = if found.logged { log::end(found.size) } else { found.size };
        if data.length().map_err(error)? < needed {
            return Err(wrong("its data file is cut short".into()));
        }
        let bytes = std::mem::take(&mut found.bits);
        let changed_pages = vec![false; map::bits_length(size).div_ceil(map::PAGE)];
        let mut bits = Bits { bytes, changed_pages, new: Blocks::default(), dirty: false };
        let replayed = match found.logged {
            true => replay(data.as_ref(), found.size, &mut bits).map_err(error)?,
            false => Replay::default(),
        };
        if writable {
            settle(data.as_ref(), map.as_ref(), &replayed, &mut bits).map_err(error)?;
        }
        bits.bytes.resize(map::bits_length(size), 0);
        if writable && (found.size < size || !found.logged) {
            grow(data.as_ref(), map.as_ref(), &found, size).map_err(error)?;
        }
        let made_for = if writable { size } else { found.size };
        let flushing = Mutex::new(Flushing { lost: false, number: replayed.next, room: SLOTS });
        let (path, fixed, bits) = (path.to_owned(), RwLock::default(), Mutex::new(bits));
        Ok(Self { path, data, map, size, made_for, fixed, bits, flushing })
    }

    /// The blocks that the layer holds, ascending.
    pub fn held(&self) -> Vec<u64> {
        map::runs(&lock(&self.bits).bytes).flatten().collect()
    }

    /// One bit for each block, set for those that it holds.
    pub(crate) fn bits(&self) -> Vec<u8> {
        lock(&self.bits).bytes.clone()
    }

    /// The size of the disk that it was made for, in bytes; beyond that it holds nothing.
    pub(crate) fn made_for(&self) -> u64 {
        self.made_for
    }

    /// The first part of a range of blocks that it holds in which there may be something else than zeros.
    pub(crate) fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        self.data.next_data(range)
    }

    /// Reads from blocks that the layer holds.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        // The last block may reach beyond the file.
        let done = read_full(self.data.as_ref(), buffer, offset)?;
        buffer[done..].fill(0);
        Ok(())
    }

    /// Writes; every block touched must be held already or be written whole.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let blocks = offset / BLOCK..(offset + data.len() as u64).div_ceil(BLOCK);
        let _changing = self.free(&blocks)?;
        self.data.write_at(data, offset)?;
        self.note(blocks);
        Ok(())
    }

    /// Makes whole blocks zeros that take no space.
    pub fn discard(&self, first: u64, blocks: u64) -> io::Result<()> {
        let _changing = self.free(&(first..first + blocks))?;
        self.data.punch(first * BLOCK, blocks * BLOCK)?;
        self.note(first..first + blocks);
        Ok(())
    }

    /// Waits until `blocks` may change, which they may for as long as the guard lives.
    fn free(&self, blocks: &Range<u64>) -> io::Result<RwLockReadGuard<'_, Fixed>> {
        loop {
            let fixed = self.fixed.read().unwrap_or_else(PoisonError::into_inner);
            if !fixed.touch(blocks) {
                return Ok(fixed);
            }
            drop(fixed);
            let mut flushing = lock(&self.flushing);
            // Unless the flush that went on meanwhile has confirmed the record.
            if self.fixed().touch(blocks) {
                lock(&self.bits).dirty = true;
                self.flush_alone(&mut flushing)?;
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn would_wait(&self, block: u64) -> bool {
        self.fixed().touch(&(block..block + 1))
    }

    fn fixed(&self) -> RwLockWriteGuard<'_, Fixed> {
        self.fixed.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, blocks: Range<u64>) {
        let mut bits = lock(&self.bits);
        bits.dirty = true;
        for block in blocks {
            if bits.set(block) {
                bits.new.add(block);
            }
        }
    }

    /// Makes everything written so far durable.
    pub fn flush(&self) -> io::Result<()> {
        self.flush_alone(&mut lock(&self.flushing))
    }

    fn flush_alone(&self, flushing: &mut Flushing) -> io::Result<()> {
        if flushing.lost {
            return Err(io::Error::other("an earlier flush failed, and what it lost cannot be known"));
        }
        let mut fixed = self.fixed();
        let mut bits = lock(&self.bits);
        if !std::mem::take(&mut bits.dirty) {
            return Ok(());
        }
        let mut new = std::mem::take(&mut bits.new);
        let result = if new.fits() && flushing.room > 0 {
            new.sort();
            fixed.next = new.clone();
            let needed = !new.is_empty() || !fixed.newest.is_empty();
            drop((bits, fixed));
            match self.log(flushing, &new, needed) {
                // A log that grew with its disk may find no space. The map may have it.
                Err(_) if !flushing.lost => {
                    self.fixed().next = Blocks::default();
                    let pages = lock(&self.bits).take_changed();
                    self.fold(flushing, pages)
                }
                logged => logged,
            }
        } else {
            let pages = bits.take_changed();
            drop((bits, fixed));
            self.fold(flushing, pages)
        };
        let mut fixed = self.fixed();
        let next = std::mem::take(&mut fixed.next);
        if result.is_ok() {
            fixed.newest = next;
        } else {
            // Nothing was promised; the next flush has to do it all again.
            let mut bits = lock(&self.bits);
            bits.dirty = true;
            bits.new.put_back(new);
        }
        result
    }

    /// Syncs the data, with a record of the blocks that are new where one is needed. It is the newest then.
    fn log(&self, flushing: &mut Flushing, new: &Blocks, needed: bool) -> io::Result<()> {
        if !needed {
            return self.data.sync().inspect_err(|_| flushing.lost = true);
        }
        let content = content(self.data.as_ref(), new)?;
        let record = Record { number: flushing.number, blocks: new.clone(), content };
        let place = log::place(self.size, record.number);
        self.data.write_at(&record.encode(), place)?;
        self.data.sync().inspect_err(|_| {
            flushing.lost = true;
            // From now on the kernel may show what the disk does not have, and who opens the layer next would believe it.
            let _ = self.data.write_at(&[0; SLOT], place);
        })?;
        flushing.number += 1;
        if keeps(Rule::FullLogIsFolded) {
            flushing.room -= 1;
        }
        Ok(())
    }

    /// Syncs the data, then the map.
    fn fold(&self, flushing: &mut Flushing, pages: Vec<(usize, Vec<u8>)>) -> io::Result<()> {
        let synced = self.data.sync().inspect_err(|_| flushing.lost = true);
        let result =
            synced.and_then(|()| if pages.is_empty() { Ok(()) } else { map::write(self.map.as_ref(), &pages) });
        match result {
            Ok(()) => flushing.room = SLOTS,
            Err(_) => pages.iter().for_each(|(page, _)| lock(&self.bits).changed_pages[*page] = true),
        }
        result
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
