//! The files of a layer: where they are, how they appear, and how they grow.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::backing::{Backing, read_full};
use crate::log::{self, SLOT, SLOTS};
use crate::map::{self, Map};

/// Where the map of the layer at `data` is.
pub(crate) fn map_path(data: &Path) -> PathBuf {
    suffixed(data, ".map")
}

pub(crate) fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The data file appears last and whole, by rename: what a crash leaves behind before that is overwritten next time,
/// and a layer without its map or of the wrong length is damage, never a crash right here.
pub(crate) fn make(path: &Path, size: u64) -> io::Result<()> {
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
pub(crate) fn grow(data: &dyn Backing, map: &dyn Backing, found: &Map, size: u64) -> io::Result<()> {
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
