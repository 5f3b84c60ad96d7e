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

    /// How many bytes the next answer would have if it were asked for now.
    pub fn unsent(&self) -> io::Result<u64> {
        let whole = self.start..self.start + self.size;
        let found = match self.untracked {
            None => kernel::own_pages(&self.pagemap, whole, false, !self.all)?,
            Some(_) => kernel::own_pages_plain(&self.pagemap, whole)?,
        };
        Ok(found.iter().map(|range| range.end - range.start).sum())
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

/// Whether this host can tell which pages a guest writes; the error says why not.
pub fn tracks_writes() -> Result<(), String> {
    let scan = File::open("/proc/self/pagemap").and_then(|map| kernel::own_pages(&map, 0..kernel::PAGE, false, false));
    scan.map_err(|error| format!("the kernel cannot say which pages were written ({error}); it takes Linux 6.7"))?;
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    match scope.trim() {
        "2" | "3" => Err("processes may not look into their children (kernel.yama.ptrace_scope is above 1)".into()),
        _ => Ok(()),
    }
}

/// Says whether `length` bytes of QEMU, our child, at `start` are read page by page, or with what is near them.
pub(crate) fn page_by_page(process: u32, start: u64, length: u64, singly: bool) -> io::Result<()> {
    inject::advise(process, start, length, if singly { libc::MADV_RANDOM } else { libc::MADV_NORMAL })
}

/// QEMU, our child, does not die with us any more.
pub(crate) fn untie(process: u32) -> io::Result<()> {
    inject::untie(process)
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

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 64;

    /// Memory that nobody has touched, for as long as the process lives.
    fn fresh() -> (u64, &'static mut [u8]) {
        let length = (PAGES * kernel::PAGE) as usize;
        let (rights, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping, which nobody else knows and nobody takes away; all zeros is a sound slice of bytes.
        unsafe {
            let start = libc::mmap(std::ptr::null_mut(), length, rights, kind, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            (start as u64, std::slice::from_raw_parts_mut(start.cast(), length))
        }
    }

    #[test]
    fn both_ways_find_the_pages_that_were_written() {
        let (start, memory) = fresh();
        for page in [3, 4, 9] {
            memory[page * kernel::PAGE as usize] = 1;
        }
        let at = |page: u64| start + page * kernel::PAGE;
        let map = File::open("/proc/self/pagemap").unwrap();
        let expected = [at(3)..at(5), at(9)..at(10)];
        assert_eq!(kernel::own_pages_plain(&map, at(0)..at(PAGES)).unwrap(), expected);
        assert_eq!(kernel::own_pages(&map, at(0)..at(PAGES), false, false).unwrap(), expected);
        let mut copy = vec![1; 2 * kernel::PAGE as usize];
        let process = std::process::id();
        kernel::read(process, &[(at(4), 4096), (at(9), 4096)], &mut copy).unwrap();
        assert_eq!((copy[0], copy[1], copy[4096]), (1, 0, 1));
        assert!(kernel::read(process, &[(8, 4096)], &mut copy[..4096]).is_err(), "nothing is there");
        assert!(kernel::read(process, &[(at(4), 4096)], &mut copy).is_err(), "the buffer is too long");
    }

    #[test]
    fn without_the_kernels_help_every_answer_has_all_pages() {
        let (start, memory) = fresh();
        memory[0] = 7;
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let (process, size) = (std::process::id(), PAGES * kernel::PAGE);
        let untracked = Some("as before Linux 6.7".to_owned());
        let mut guest = GuestMemory { process, pagemap, start, size, untracked, all: true };
        for _ in 0..2 {
            let found = guest.changed().unwrap();
            assert_eq!(found, std::slice::from_ref(&(0..kernel::PAGE)));
            let mut page = vec![0; 4096];
            guest.read(&found, &mut page).unwrap();
            assert_eq!(page[0], 7);
        }
        assert_eq!(guest.untracked(), Some("as before Linux 6.7"));
    }
}
