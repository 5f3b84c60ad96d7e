//! What a layer asks of the file system, as a trait, so that a test can cut the power between any two steps.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;

/// One file of a layer.
pub(crate) trait Backing: Debug + Send + Sync {
    /// Like `pread`: may be short, 0 at the end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `bytes`, or fails and leaves the range in any state between.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes a range zeros that take no space; the length of the file stays.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()>;
    /// The first part of a range that may be something else than zeros.
    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>>;
    /// In bytes.
    fn length(&self) -> io::Result<u64>;
    /// Grows the file with zeros.
    fn set_length(&self, length: u64) -> io::Result<()>;
    /// Makes everything so far durable, the length included.
    fn sync(&self) -> io::Result<()>;
}

/// Fills `buffer` as far as the file goes; says how far.
pub(crate) fn read_full(file: &dyn Backing, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
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

impl Backing for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(self, flags, offset, length)?)
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        use rustix::fs::{SeekFrom, seek};
        // Where the file is read and written is said each time, so it does not matter where it stands.
        let start = match seek(self, SeekFrom::Data(range.start)) {
            // Nothing but a hole up to the end.
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            found => found?,
        };
        if start >= range.end {
            return Ok(None);
        }
        let end = seek(self, SeekFrom::Hole(start))?;
        Ok(Some(start..end.min(range.end)))
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        // Also of what is needed to find the data again: new extents, holes, the length.
        self.sync_data()
    }
}
