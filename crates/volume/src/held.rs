//! Which blocks a layer holds, noted where a process finds it that takes over from one that died.
//!
//! What was written since the last flush is in neither map nor log, and the guest goes on reading it. The kernel keeps what
//! a process wrote to a file when the process dies, so it is noted in a file that nobody syncs. After a power cut that file
//! means nothing, whatever is in it: it says during which boot of the host it was written.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::backing::{Backing, read_full};
use crate::make::suffixed;
use crate::map;
use crate::rules::{Rule, keeps};

const MAGIC: &[u8; 8] = b"CLLH\x01\0\0\0";
const BOOT: &str = "/proc/sys/kernel/random/boot_id";
const HEADER: usize = 64;
const START: u64 = 4096;

/// Names a boot of the host.
pub(crate) type Boot = [u8; 36];

/// The present one.
pub(crate) fn boot() -> io::Result<Boot> {
    let text = std::fs::read(BOOT)?;
    text.first_chunk().copied().ok_or_else(|| io::Error::other(format!("{BOOT} names no boot")))
}

/// Where it is for the layer at `data`.
pub(crate) fn path(data: &Path) -> PathBuf {
    suffixed(data, ".held")
}

fn header(size: u64, boot: &Boot) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..16].copy_from_slice(&size.to_le_bytes());
    header[16..16 + boot.len()].copy_from_slice(boot);
    header
}

/// Notes of a layer that takes writes.
#[derive(Debug)]
pub(crate) struct Held(Box<dyn Backing>);

impl Held {
    /// Begins in an empty file, for a layer of `size` bytes whose map names all that it holds.
    pub fn begin(file: Box<dyn Backing>, size: u64, boot: &Boot) -> io::Result<Self> {
        file.write_at(&header(size, boot), 0)?;
        Ok(Self(file))
    }

    /// The same for the layer at `data`; what was noted before is replaced at one instant.
    pub fn begin_for(data: &Path, size: u64) -> io::Result<Self> {
        let (place, part) = (path(data), suffixed(data, ".held.part"));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&part)?;
        let held = Self::begin(Box::new(file), size, &boot()?)?;
        std::fs::rename(part, place)?;
        Ok(held)
    }

    /// Notes some bytes of the bits, from byte `first` on.
    pub fn put(&self, first: usize, bytes: &[u8]) -> io::Result<()> {
        self.0.write_at(bytes, START + first as u64)
    }

    /// Nobody may go on with it.
    pub fn void(&self) {
        if let Err(error) = self.0.write_at(&[0; HEADER], 0) {
            tracing::error!(%error, "what a layer holds cannot be made void");
        }
    }
}

/// What a file says.
#[derive(Debug)]
pub(crate) enum Noted {
    /// Nothing that counts: it is of another boot, or for something else.
    Nothing,
    /// A flush had failed.
    Void,
    /// The bits.
    Bits(Vec<u8>),
}

/// What a file says of a layer of `size` bytes.
pub(crate) fn read(file: &dyn Backing, size: u64, now: &Boot) -> io::Result<Noted> {
    let mut found = [0; HEADER];
    let ours = if keeps(Rule::NotesAreOfThisBoot) { HEADER } else { 16 };
    let there = read_full(file, &mut found, 0)?;
    if there == HEADER && found == [0; HEADER] {
        return Ok(Noted::Void);
    }
    if there < HEADER || found[..ours] != header(size, now)[..ours] {
        return Ok(Noted::Nothing);
    }
    let mut bits = vec![0; map::bits_length(size)];
    read_full(file, &mut bits, START)?;
    Ok(Noted::Bits(bits))
}

/// The file for the layer at `data`, if there is one.
pub(crate) fn find(data: &Path) -> io::Result<Option<File>> {
    match File::open(path(data)) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Everything of the layer at `data` is durable.
pub(crate) fn forget(data: &Path) {
    let removed = std::fs::remove_file(path(data));
    if let Err(error) = removed
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, "what a layer held is noted still");
    }
}
