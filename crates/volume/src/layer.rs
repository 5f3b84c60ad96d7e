//! One copy-on-write layer: a sparse data file, and a map of the 4 KiB blocks that it holds.
//!
//! The data file has the disk's own offsets. The map file, beside it with the suffix `.map`, is
//! `"CLLM" u16 version=1 u16 0 u64 disk size`, zeros up to 4096, then one bit per block, lowest bit first.
//!
//! What a flush promises: everything written before it survives a power cut. Therefore the map on disk never runs
//! ahead of the data: a flush takes a copy of the changed map pages, syncs the data, writes the copy, syncs the map.
//! A block written but not flushed may be old or new after a power cut, as on any disk, and never something else.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use collective_store::BLOCK;
use rustix::fs::FallocateFlags;

const MAGIC: &[u8; 8] = b"CLLM\x01\0\0\0";
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
    data: File,
    map: File,
    bits: Mutex<Bits>,
    /// One flush at a time, so that an older copy of a map page cannot overwrite a newer one.
    flushing: Mutex<()>,
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
    let mut name = data.as_os_str().to_owned();
    name.push(".map");
    name.into()
}

impl Layer {
    /// Creates an empty layer for a disk of `size` bytes; there must be no data file. Durable when it returns.
    pub fn create(path: &Path, size: u64) -> Result<(), LayerError> {
        let error = |source| LayerError::Io { attempt: "create", path: path.to_owned(), source };
        let make = |path: &Path| OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let bits = size.div_ceil(BLOCK).div_ceil(8);
        // The data file comes last: a map without one is what a crash right here left behind.
        if !path.exists() {
            let _ = std::fs::remove_file(map_path(path));
        }
        let map = make(&map_path(path)).map_err(error)?;
        map.write_all_at(MAGIC, 0).map_err(error)?;
        map.write_all_at(&size.to_le_bytes(), 8).map_err(error)?;
        map.set_len(MAP_START + bits.next_multiple_of(MAP_PAGE as u64)).map_err(error)?;
        map.sync_all().map_err(error)?;
        let data = make(path).map_err(error)?;
        data.set_len(size).map_err(error)?;
        data.sync_all().map_err(error)?;
        let folder = File::open(path.parent().unwrap_or(Path::new("."))).map_err(error)?;
        folder.sync_all().map_err(error)
    }

    /// Opens the layer of a disk of `size` bytes. A layer made when the disk was smaller is fine.
    pub fn open(path: &Path, size: u64, writable: bool) -> Result<Self, LayerError> {
        let error = |source| LayerError::Io { attempt: "open", path: path.to_owned(), source };
        let wrong = |why: String| LayerError::Content { path: path.to_owned(), why };
        let open = |path: &Path| OpenOptions::new().read(true).write(writable).open(path);
        let (data, map) = (open(path).map_err(error)?, open(&map_path(path)).map_err(error)?);
        let mut header = [0; 16];
        map.read_exact_at(&mut header, 0).map_err(|_| wrong("its map is cut short".into()))?;
        let made_for = u64::from_le_bytes([8, 9, 10, 11, 12, 13, 14, 15].map(|i: usize| header[i]));
        if &header[..8] != MAGIC {
            return Err(wrong("its map has another format".into()));
        }
        if made_for > size || made_for == 0 {
            return Err(wrong(format!("it was made for a disk of {made_for} bytes, and this one has {size}")));
        }
        let count = made_for.div_ceil(BLOCK).div_ceil(8) as usize;
        let mut bytes = vec![0; count];
        map.read_exact_at(&mut bytes, MAP_START).map_err(|_| wrong("its map is cut short".into()))?;
        if data.metadata().map_err(error)?.len() < made_for {
            return Err(wrong("its data file is cut short".into()));
        }
        bytes.resize(size.div_ceil(BLOCK).div_ceil(8) as usize, 0);
        if writable && made_for < size {
            data.set_len(size).map_err(error)?;
            map.set_len(MAP_START + (bytes.len() as u64).next_multiple_of(MAP_PAGE as u64)).map_err(error)?;
            data.sync_all().map_err(error)?;
            map.write_all_at(&size.to_le_bytes(), 8).map_err(error)?;
            map.sync_all().map_err(error)?;
        }
        let pages = bytes.len().div_ceil(MAP_PAGE);
        let bits = Mutex::new(Bits { bytes, changed_pages: vec![false; pages], dirty: false });
        Ok(Self { path: path.to_owned(), data, map, bits, flushing: Mutex::new(()) })
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
        let mut done = 0;
        while done < buffer.len() {
            match self.data.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => {
                    buffer[done..].fill(0);
                    break;
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes; every block touched must be held already or be written whole.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.data.write_all_at(data, offset)?;
        self.note(offset / BLOCK..(offset + data.len() as u64).div_ceil(BLOCK));
        Ok(())
    }

    /// Makes whole blocks zeros that take no space.
    pub fn discard(&self, first: u64, blocks: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.data, flags, first * BLOCK, blocks * BLOCK)?;
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
        let _one_at_a_time = lock(&self.flushing);
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
        let result = self.write_out(&changed);
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

    fn write_out(&self, changed: &[(usize, Vec<u8>)]) -> io::Result<()> {
        self.data.sync_data()?;
        if changed.is_empty() {
            return Ok(());
        }
        for (page, bytes) in changed {
            self.map.write_all_at(bytes, MAP_START + (page * MAP_PAGE) as u64)?;
        }
        self.map.sync_data()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
