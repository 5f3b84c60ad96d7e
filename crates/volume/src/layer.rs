//! One copy-on-write layer: a sparse data file, and a map of the 4 KiB blocks that it holds.
//!
//! The data file has the disk's own offsets. The map file, beside it with the suffix `.map`, is
//! `"CLLM" u16 version=1 u16 0 u64 disk size`, zeros up to 4096, then one bit per block, lowest bit first.
//!
//! What a flush promises: everything written before it survives a power cut. Therefore the map on disk never runs
//! ahead of the data: a flush takes a copy of the changed map pages, syncs the data, writes the copy, syncs the map.
//! A block written but not flushed may be old or new after a power cut, as on any disk, and never something else.
//!
//! After a sync of the data failed, nobody knows which pages the kernel dropped, and asking again would only say that
//! nothing is left to write. So every later flush of that layer fails too, until it is opened anew.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use collective_store::BLOCK;

use crate::backing::Backing;

const MAGIC: &[u8; 8] = b"CLLM\x01\0\0\0";
const HEADER: usize = 16;
const MAP_START: u64 = 4096;
const MAP_PAGE: usize = 4096;

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
    bits: Mutex<Bits>,
    /// One flush at a time, so that an older copy of a map page cannot overwrite a newer one. Holds whether a sync of
    /// the data has failed.
    flushing: Mutex<bool>,
}

#[derive(Debug)]
struct Bits {
    bytes: Vec<u8>,
    changed_pages: Vec<bool>,
    /// Data was written since the last flush.
    dirty: bool,
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

fn map_length(size: u64) -> u64 {
    MAP_START + size.div_ceil(BLOCK).div_ceil(8).next_multiple_of(MAP_PAGE as u64)
}

/// What a map begins with.
fn header(size: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..].copy_from_slice(&size.to_le_bytes());
    header
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
    Backing::write_at(&map, &header(size), 0)?;
    map.set_len(map_length(size))?;
    map.sync_all()?;
    let part = suffixed(path, ".part");
    let data = create(&part)?;
    data.set_len(size)?;
    data.sync_all()?;
    folder.sync_all()?;
    std::fs::rename(&part, path)?;
    folder.sync_all()
}

/// Fills `buffer` as far as the file goes; says how far.
fn read_full(file: &dyn Backing, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Reads a map for a disk of `size` bytes: the size that it was made for, and its bits; or what is wrong with it.
fn read_map(map: &dyn Backing, size: u64) -> io::Result<Result<(u64, Vec<u8>), String>> {
    let mut header = [0; HEADER];
    if read_full(map, &mut header, 0)? < HEADER {
        return Ok(Err("its map is cut short".into()));
    }
    let made_for = u64::from_le_bytes([8, 9, 10, 11, 12, 13, 14, 15].map(|i: usize| header[i]));
    if &header[..8] != MAGIC {
        return Ok(Err("its map has another format".into()));
    }
    // Checked before anything is allocated by it.
    if made_for > size || made_for == 0 {
        return Ok(Err(format!("it was made for a disk of {made_for} bytes, and this one has {size}")));
    }
    let blocks = made_for.div_ceil(BLOCK);
    let mut bytes = vec![0; blocks.div_ceil(8) as usize];
    if read_full(map, &mut bytes, MAP_START)? < bytes.len() {
        return Ok(Err("its map is cut short".into()));
    }
    // They would become blocks of zeros when the disk grows.
    let beyond = (blocks % 8 != 0).then(|| bytes.last().map_or(0, |last| last >> (blocks % 8)));
    if beyond.is_some_and(|bits| bits != 0) {
        return Ok(Err("its map names blocks beyond the end of the disk".into()));
    }
    Ok(Ok((made_for, bytes)))
}

/// The header comes last, so that at any instant both files are at least as long as it says.
fn grow(data: &dyn Backing, map: &dyn Backing, size: u64) -> io::Result<()> {
    data.set_length(data.length()?.max(size))?;
    data.sync()?;
    map.set_length(map.length()?.max(map_length(size)))?;
    map.sync()?;
    map.write_at(&header(size), 0)?;
    map.sync()
}

impl Layer {
    /// Creates an empty layer for a disk of `size` bytes; there must be no data file. Durable when it returns.
    pub fn create(path: &Path, size: u64) -> Result<(), LayerError> {
        make(path, size).map_err(|source| LayerError::Io { attempt: "create", path: path.to_owned(), source })
    }

    /// Opens the layer of a disk of `size` bytes. A layer made when the disk was smaller is fine.
    pub fn open(path: &Path, size: u64, writable: bool) -> Result<Self, LayerError> {
        let open = |path: &Path| OpenOptions::new().read(true).write(writable).open(path);
        let error = |source| LayerError::Io { attempt: "open", path: path.to_owned(), source };
        let data = open(path).map_err(error)?;
        let map = open(&map_path(path)).map_err(error)?;
        Self::over(path, Box::new(data), Box::new(map), size, writable)
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
        let (made_for, mut bytes) = read_map(map.as_ref(), size).map_err(error)?.map_err(wrong)?;
        if data.length().map_err(error)? < made_for {
            return Err(wrong("its data file is cut short".into()));
        }
        bytes.resize(size.div_ceil(BLOCK).div_ceil(8) as usize, 0);
        if writable && made_for < size {
            grow(data.as_ref(), map.as_ref(), size).map_err(error)?;
        }
        let pages = bytes.len().div_ceil(MAP_PAGE);
        let bits = Mutex::new(Bits { bytes, changed_pages: vec![false; pages], dirty: false });
        Ok(Self { path: path.to_owned(), data, map, bits, flushing: Mutex::new(false) })
    }

    /// The blocks that the layer holds, ascending.
    pub fn held(&self) -> Vec<u64> {
        let bits = lock(&self.bits);
        let set = |(i, byte): (usize, &u8)| {
            let byte = *byte;
            (0..8).filter(move |bit| byte & (1 << bit) != 0).map(move |bit| i as u64 * 8 + bit)
        };
        bits.bytes.iter().enumerate().flat_map(set).collect()
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
        self.data.write_at(data, offset)?;
        self.note(offset / BLOCK..(offset + data.len() as u64).div_ceil(BLOCK));
        Ok(())
    }

    /// Makes whole blocks zeros that take no space.
    pub fn discard(&self, first: u64, blocks: u64) -> io::Result<()> {
        self.data.punch(first * BLOCK, blocks * BLOCK)?;
        self.note(first..first + blocks);
        Ok(())
    }

    fn note(&self, blocks: std::ops::Range<u64>) {
        let mut bits = lock(&self.bits);
        bits.dirty = true;
        for block in blocks {
            let (byte, bit) = ((block / 8) as usize, 1 << (block % 8));
            let Some(slot) = bits.bytes.get_mut(byte) else { continue };
            if *slot & bit == 0 {
                *slot |= bit;
                bits.changed_pages[byte / MAP_PAGE] = true;
            }
        }
    }

    /// Makes everything written so far durable.
    pub fn flush(&self) -> io::Result<()> {
        let mut data_lost = lock(&self.flushing);
        if *data_lost {
            return Err(io::Error::other("an earlier flush failed, and what it lost cannot be known"));
        }
        let changed = {
            let mut bits = lock(&self.bits);
            if !std::mem::take(&mut bits.dirty) {
                return Ok(());
            }
            let pages: Vec<usize> = (0..bits.changed_pages.len()).filter(|p| bits.changed_pages[*p]).collect();
            bits.changed_pages.fill(false);
            let copy = |page: usize| {
                let end = ((page + 1) * MAP_PAGE).min(bits.bytes.len());
                (page, bits.bytes[page * MAP_PAGE..end].to_vec())
            };
            pages.into_iter().map(copy).collect::<Vec<_>>()
        };
        let synced = self.data.sync();
        *data_lost = synced.is_err();
        let result = synced.and_then(|()| self.write_map(&changed));
        if result.is_err() {
            // Nothing was promised; the next flush has to do it all again.
            let mut bits = lock(&self.bits);
            bits.dirty = true;
            for (page, _) in &changed {
                bits.changed_pages[*page] = true;
            }
        }
        result
    }

    fn write_map(&self, changed: &[(usize, Vec<u8>)]) -> io::Result<()> {
        if changed.is_empty() {
            return Ok(());
        }
        for (page, bytes) in changed {
            self.map.write_at(bytes, MAP_START + (page * MAP_PAGE) as u64)?;
        }
        self.map.sync()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
