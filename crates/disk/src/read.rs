//! Reading from a disk, a part of it, and little numbers out of bytes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::survey::DiskError;

/// A disk: bytes that can be read anywhere.
pub trait ReadAt {
    /// Fills `buf` with the bytes at `offset`; an error if there are not as many.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Length in bytes.
    fn size(&self) -> u64;
}

impl ReadAt for File {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        FileExt::read_exact_at(self, buf, offset)
    }

    /// Of a regular file; a block device's length is not in its metadata, and it looks empty here.
    fn size(&self) -> u64 {
        self.metadata().map_or(0, |metadata| metadata.len())
    }
}

impl ReadAt for [u8] {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let end = start.checked_add(buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(self.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn size(&self) -> u64 {
        self.len() as u64
    }
}

impl ReadAt for &[u8] {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        (**self).read_exact_at(offset, buf)
    }

    fn size(&self) -> u64 {
        (**self).size()
    }
}

impl ReadAt for Vec<u8> {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.as_slice().read_exact_at(offset, buf)
    }

    fn size(&self) -> u64 {
        self.len() as u64
    }
}

/// Why something on the disk is not looked into further.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The disk could not be read: the whole survey fails.
    Disk(DiskError),
    /// What was read does not hold together: it is left alone, with this reason (a clause).
    Doubt(String),
}

pub(crate) fn doubt<T>(reason: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Doubt(reason.into()))
}

/// A part of a disk; offsets count from its start, and what leaves it is a doubt.
#[derive(Clone)]
pub(crate) struct Part<'a> {
    disk: &'a dyn ReadAt,
    range: Range<u64>,
}

impl<'a> Part<'a> {
    pub(crate) fn whole(disk: &'a dyn ReadAt) -> Part<'a> {
        Part { disk, range: 0..disk.size() }
    }

    /// A part by offsets of the disk; cut at the disk's end.
    pub(crate) fn of(disk: &'a dyn ReadAt, range: Range<u64>) -> Part<'a> {
        let end = range.end.min(disk.size());
        Part { disk, range: range.start.min(end)..end }
    }

    pub(crate) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    pub(crate) fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Reads `length` bytes, which the caller has bounded.
    pub(crate) fn read(&self, offset: u64, length: usize, doing: &'static str) -> Result<Vec<u8>, Stop> {
        let end = offset.checked_add(length as u64);
        if end.is_none_or(|end| end > self.len()) {
            return doubt(format!("{doing} leads outside of it"));
        }
        let mut buffer = vec![0; length];
        let offset = self.range.start + offset;
        self.disk
            .read_exact_at(offset, &mut buffer)
            .map_err(|source| Stop::Disk(DiskError { doing, offset, length, source }))?;
        Ok(buffer)
    }
}

/// Numbers in a structure, little-endian unless named `be`. Beyond its end they are zero: callers read structures whose length they
/// have checked.
pub(crate) trait Fields {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N];

    fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }

    fn be16_at(&self, at: usize) -> u16 {
        u16::from_be_bytes(self.bytes(at))
    }

    fn be64_at(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.bytes(at))
    }

    fn be32_at(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.bytes(at))
    }
}

impl Fields for [u8] {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        self.get(at..at + N).and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; N])
    }
}
