//! A guest's memory, seen from outside QEMU: which pages the guest wrote, and their content.
//!
//! Memory that came from a file is mapped privately, so what the guest wrote is exactly what the process has of its own;
//! what it only read is still the file's. Pages that the guest gave back (free page reporting) are gone from both.
//! The kernel notes writes itself (`inject`), so that the second question is answered with what changed since the first,
//! whatever the size of the memory. Where it cannot (before Linux 6.7), every question is answered with all own pages, and
//! [`GuestMemory::untracked`] says why.

mod inject;
mod kernel;

use std::fs::File;
use std::io;
use std::ops::Range;

/// The memory of a machine that runs or is paused.
#[derive(Debug)]
pub struct GuestMemory {
    process: u32,
    pagemap: File,
    /// Where it begins in QEMU.
    start: u64,
    size: u64,
    untracked: Option<String>,
    /// The next answer must have all own pages.
    all: bool,
}

impl GuestMemory {
    /// The memory of `size` bytes at address `start` of QEMU, which is our child.
    pub(crate) fn attach(process: u32, start: u64, size: u64) -> io::Result<Self> {
        let pagemap = File::open(format!("/proc/{process}/pagemap"))?;
        let untracked = inject::track(process, start, size)
            .and_then(|()| kernel::own_pages(&pagemap, start..start + kernel::PAGE, false, true))
            .err()
            .map(|error| format!("the kernel does not note which pages a guest writes ({error}); it takes Linux 6.7"));
        Ok(Self { process, pagemap, start, size, untracked, all: true })
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Why every answer has all own pages, if it does.
    pub fn untracked(&self) -> Option<&str> {
        self.untracked.as_deref()
    }

    /// Ranges of bytes, ascending, with all that the guest wrote since the last answer; the first answer has all that it
    /// ever wrote. A write that happens meanwhile is in this answer or in the next.
    pub fn changed(&mut self) -> io::Result<Vec<Range<u64>>> {
        let whole = self.start..self.start + self.size;
        let found = match self.untracked {
            None => kernel::own_pages(&self.pagemap, whole, true, !self.all)?,
            Some(_) => kernel::own_pages_plain(&self.pagemap, whole)?,
        };
        self.all = false;
        Ok(found.into_iter().map(|range| range.start - self.start..range.end - self.start).collect())
    }

    /// What was answered is of no use to anybody: the next answer has everything again.
    pub fn forget(&mut self) {
        self.all = true;
    }

    /// Copies `ranges` one after the other into `buffer`, which is exactly as long.
    pub fn read(&self, ranges: &[Range<u64>], buffer: &mut [u8]) -> io::Result<()> {
        let piece = |range: &Range<u64>| (self.start + range.start, (range.end - range.start) as usize);
        kernel::read(self.process, &ranges.iter().map(piece).collect::<Vec<_>>(), buffer)
    }
}

/// Copies from QEMU's own memory.
pub(crate) fn read_at(process: u32, address: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut content = vec![0; length];
    kernel::read(process, &[(address, length)], &mut content)?;
    Ok(content)
}

/// Writes to QEMU's own memory.
pub(crate) fn write_at(process: u32, address: u64, content: &[u8]) -> io::Result<()> {
    kernel::write(process, address, content)
}
