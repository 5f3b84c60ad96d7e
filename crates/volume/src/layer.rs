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
//! A top layer also notes what it holds for a process that takes over from this one ([`held`]).
//!
//! Only the content of its blocks tells whether the newest record counts. So who wants to change one of them has to
//! confirm the record first, with a flush: it writes the next one, or folds.
//!
//! After a sync of the data failed, nobody knows which pages the kernel dropped, and asking again would only say that
//! nothing is left to write. So every later flush of that layer fails too, until it is opened anew.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use collective_store::BLOCK;

use crate::backing::{Backing, read_full};
use crate::held::{self, Boot, Held, Noted};
use crate::log::{self, Blocks, Record, SLOT, SLOTS};
use crate::make::{grow, make, map_path};
use crate::map::{self, Bits};
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
    held: Option<Held>,
    noted: Noted,
    /// There are no notes of it any more.
    forgotten: AtomicBool,
}

/// The files of a layer.
pub(crate) struct Files {
    pub data: Box<dyn Backing>,
    pub map: Box<dyn Backing>,
    /// What was noted, and the present boot of the host.
    pub held: Option<(Box<dyn Backing>, Boot)>,
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

impl Layer {
    /// Creates an empty layer for a disk of `size` bytes; there must be no data file. Durable when it returns.
    pub fn create(path: &Path, size: u64) -> Result<(), LayerError> {
        make(path, size).map_err(|source| LayerError::Io { attempt: "create", path: path.to_owned(), source })
    }

    /// Removes a layer that nobody has open; none is fine too.
    pub fn remove(path: &Path) -> Result<(), LayerError> {
        for file in [path.to_owned(), map_path(path), held::path(path)] {
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
        let error = |source| LayerError::Io { attempt: "open", path: path.to_owned(), source };
        let held = held::find(path).map_err(error)?;
        // What was noted is made durable, also in a layer that takes no writes any more.
        let settles = writable || held.is_some();
        let open = |path: &Path| OpenOptions::new().read(true).write(settles).open(path);
        let data = open(path).map_err(error)?;
        let map = open(&map_path(path)).map_err(error)?;
        let boot = held.as_ref().map_or(Ok([0; 36]), |_| held::boot()).map_err(error)?;
        let held = held.map(|held| (Box::new(held) as Box<dyn Backing>, boot));
        Self::over(path, Files { data: Box::new(data), map: Box::new(map), held }, size, writable)
    }

    /// Opens a layer that is only read, for the disk that it was made for.
    pub fn open_frozen(path: &Path) -> Result<Self, LayerError> {
        let error = |source| LayerError::Io { attempt: "open", path: path.to_owned(), source };
        let size = File::open(map_path(path)).and_then(|map| map::made_for(&map)).map_err(error)?;
        Self::open(path, size, false)
    }

    /// Opens the layer that these files are.
    pub(crate) fn over(path: &Path, files: Files, size: u64, writable: bool) -> Result<Self, LayerError> {
        let Files { data, map, held } = files;
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
        let noted = held.map(|(file, boot)| held::read(file.as_ref(), found.size, &boot)).transpose().map_err(error)?;
        let noted = noted.unwrap_or(Noted::Nothing);
        let blocks = found.size.div_ceil(BLOCK);
        let known: &[u8] = if let Noted::Bits(known) = &noted { known } else { &[] };
        let held = map::runs(known).flatten().take_while(|block| *block < blocks);
        let more = held.filter(|block| bits.set(*block)).count();
        if writable || more > 0 {
            settle(data.as_ref(), map.as_ref(), &replayed, &mut bits).map_err(error)?;
        }
        bits.bytes.resize(map::bits_length(size), 0);
        if writable && (found.size < size || !found.logged) {
            grow(data.as_ref(), map.as_ref(), &found, size).map_err(error)?;
        }
        let made_for = if writable { size } else { found.size };
        let flushing = Mutex::new(Flushing { lost: false, number: replayed.next, room: SLOTS });
        let (path, fixed, bits) = (path.to_owned(), RwLock::default(), Mutex::new(bits));
        Ok(Self {
            path,
            data,
            map,
            size,
            made_for,
            fixed,
            bits,
            flushing,
            held: None,
            noted,
            forgotten: AtomicBool::new(false),
        })
    }

    /// Notes from here on what it holds, for whoever takes over from this process. All of it is in the map now.
    pub(crate) fn note_held(mut self) -> Result<Self, LayerError> {
        let held = Held::begin_for(&self.path, self.made_for);
        let error = |source| LayerError::Io { attempt: "note what is in", path: self.path.clone(), source };
        self.held = Some(held.map_err(error)?);
        Ok(self)
    }

    /// The same in this file.
    #[cfg(test)]
    pub(crate) fn note_held_in(mut self, file: Box<dyn Backing>, boot: &Boot) -> io::Result<Self> {
        self.held = Some(Held::begin(file, self.made_for, boot)?);
        Ok(self)
    }

    /// Whether it was noted, since the host was booted, what the layer held when it was opened.
    pub(crate) fn was_noted(&self) -> bool {
        matches!(self.noted, Noted::Bits(_))
    }

    /// Whether what it held is not known any more, because a flush had failed.
    pub(crate) fn is_void(&self) -> bool {
        matches!(self.noted, Noted::Void)
    }

    /// It takes no writes any more, and everything was flushed.
    pub(crate) fn forget_held(&self) {
        if self.held.is_some() && !self.forgotten.swap(true, Ordering::Relaxed) {
            held::forget(&self.path);
        }
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
        self.note(blocks)
    }

    /// Makes whole blocks zeros that take no space.
    pub fn discard(&self, first: u64, blocks: u64) -> io::Result<()> {
        let _changing = self.free(&(first..first + blocks))?;
        self.data.punch(first * BLOCK, blocks * BLOCK)?;
        self.note(first..first + blocks)
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

    /// The blocks are written, and nobody was told yet.
    fn note(&self, blocks: Range<u64>) -> io::Result<()> {
        let mut bits = lock(&self.bits);
        bits.dirty = true;
        if let Some(held) = &self.held
            && let Some((first, bytes)) = bits.with(&blocks)
            && keeps(Rule::HeldIsNoted)
        {
            held.put(first, &bytes)?;
        }
        for block in blocks {
            if bits.set(block) {
                bits.new.add(block);
            }
        }
        Ok(())
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
            return self.data.sync().inspect_err(|_| self.lose(flushing));
        }
        let content = content(self.data.as_ref(), new)?;
        let record = Record { number: flushing.number, blocks: new.clone(), content };
        let place = log::place(self.size, record.number);
        self.data.write_at(&record.encode(), place)?;
        self.data.sync().inspect_err(|_| {
            self.lose(flushing);
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
        let synced = self.data.sync().inspect_err(|_| self.lose(flushing));
        let result =
            synced.and_then(|()| if pages.is_empty() { Ok(()) } else { map::write(self.map.as_ref(), &pages) });
        match result {
            Ok(()) => flushing.room = SLOTS,
            Err(_) => pages.iter().for_each(|(page, _)| lock(&self.bits).changed_pages[*page] = true),
        }
        result
    }

    /// Nobody knows what was lost, so nobody may go on as if it were there.
    fn lose(&self, flushing: &mut Flushing) {
        flushing.lost = true;
        if let Some(held) = &self.held {
            held.void();
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
