//! What is published: files, and disks in memory.

use std::io;
use std::ops::Range;

/// A disk to publish.
pub trait DiskReader: Sync {
    /// Fills `buffer` from `offset`; the last block is padded with zeros by the caller.
    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    /// In bytes.
    fn size(&self) -> u64;
    /// The first range at or after `offset` that may hold something else than zeros, as a hint.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;
}

impl DiskReader for std::fs::File {
    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buffer, offset)
    }
    fn size(&self) -> u64 {
        self.metadata().map_or(0, |meta| meta.len())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        use rustix::fs::SeekFrom;
        match rustix::fs::seek(self, SeekFrom::Data(offset)) {
            Ok(start) => Ok(Some(start..rustix::fs::seek(self, SeekFrom::Hole(start))?)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            // A file system without holes: everything may be data.
            Err(rustix::io::Errno::INVAL) => Ok((offset < self.size()).then(|| offset..self.size())),
            Err(error) => Err(error.into()),
        }
    }
}

/// A disk in memory.
impl DiskReader for Vec<u8> {
    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut rest = self.get(offset as usize..).unwrap_or_default();
        io::Read::read_exact(&mut rest, buffer)
    }
    fn size(&self) -> u64 {
        self.len() as u64
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok((offset < self.size()).then(|| offset..self.size()))
    }
}
