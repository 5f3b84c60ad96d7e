//! The kernel's interfaces to another process's memory: copying it, and asking which pages were written.
//! All `unsafe` of this room but that of `inject` is here.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// In bytes; also the unit of the kernel's answers on this architecture.
pub(super) const PAGE: u64 = 4096;
/// Ranges that one question brings.
const REGIONS: usize = 4096;
/// Pieces that one call copies (UIO_MAXIOV).
const PIECES: usize = 1024;

// Linux, include/uapi/linux/fs.h: PAGEMAP_SCAN, since 6.7.
const PAGEMAP_SCAN: u64 = 0xc060_6610;
const PM_SCAN_WP_MATCHING: u64 = 1;
const IS_WRITTEN: u64 = 1 << 1;
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const IS_PFNZERO: u64 = 1 << 5;

#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_len: u64,
    max_pages: u64,
    inverted: u64,
    all_of: u64,
    any_of: u64,
    returned: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// The addresses in `within` of pages that the process has of its own: neither of a file nor the kernel's page of zeros.
/// Where the range is tracked they are write-protected in the same step, so that the next write to each is seen; with
/// `written`, only those that were written since the last such step.
pub(super) fn own_pages(
    pagemap: &File,
    within: Range<u64>,
    tracked: bool,
    written: bool,
) -> io::Result<Vec<Range<u64>>> {
    let mut regions = vec![Region::default(); REGIONS];
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut at = within.start;
    while at < within.end {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags: if tracked { PM_SCAN_WP_MATCHING } else { 0 },
            start: at,
            end: within.end,
            walk_end: 0,
            regions: regions.as_mut_ptr() as u64,
            regions_len: REGIONS as u64,
            max_pages: 0,
            inverted: IS_FILE | IS_PFNZERO,
            all_of: IS_FILE | IS_PFNZERO | if written { IS_WRITTEN } else { 0 },
            any_of: IS_PRESENT | IS_SWAPPED,
            returned: IS_PRESENT,
        };
        // SAFETY: the structure is the kernel's, with its own size in it; the kernel writes `walk_end` and at most
        // `regions_len` regions to `regions`, which outlives the call.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for region in &regions[..count.min(REGIONS)] {
            match found.last_mut() {
                Some(last) if last.end == region.start => last.end = region.end,
                _ => found.push(region.start..region.end),
            }
        }
        if argument.walk_end <= at {
            break;
        }
        at = argument.walk_end;
    }
    Ok(found)
}

/// The same without PAGEMAP_SCAN, from the plain page map; nothing is protected.
pub(super) fn own_pages_plain(pagemap: &File, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    use std::os::unix::fs::FileExt;
    // Linux, Documentation/admin-guide/mm/pagemap.rst: bit 63 present, 62 swapped, 61 of a file or shared.
    let is_own = |entry: u64| entry >> 62 != 0 && entry >> 61 & 1 == 0;
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut entries = vec![0; 64 << 10];
    let mut at = within.start;
    while at < within.end {
        let bytes = entries.len().min(((within.end - at) / PAGE * 8) as usize);
        pagemap.read_exact_at(&mut entries[..bytes], at / PAGE * 8)?;
        for entry in entries[..bytes].chunks_exact(8) {
            let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
            if is_own(entry) {
                match found.last_mut() {
                    Some(last) if last.end == at => last.end += PAGE,
                    _ => found.push(at..at + PAGE),
                }
            }
            at += PAGE;
        }
    }
    Ok(found)
}

/// Copies what is at `pieces` (address and length) of a process's memory one after the other into `buffer`, which is
/// exactly as long.
pub(super) fn read(process: u32, pieces: &[(u64, usize)], buffer: &mut [u8]) -> io::Result<()> {
    copy(process, pieces, buffer.as_mut_ptr(), buffer.len(), false)
}

/// Writes `content` to an address of a process's memory.
pub(super) fn write(process: u32, address: u64, content: &[u8]) -> io::Result<()> {
    copy(process, &[(address, content.len())], content.as_ptr().cast_mut(), content.len(), true)
}

fn copy(process: u32, pieces: &[(u64, usize)], base: *mut u8, length: usize, out: bool) -> io::Result<()> {
    if pieces.iter().map(|piece| piece.1).sum::<usize>() != length {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut done = 0;
    for pieces in pieces.chunks(PIECES) {
        let mut remote: Vec<libc::iovec> = pieces
            .iter()
            .map(|&(address, length)| libc::iovec { iov_base: address as *mut libc::c_void, iov_len: length })
            .collect();
        // The kernel may copy less than it was asked to.
        while let Some(first) = remote.first() {
            if first.iov_len == 0 {
                remote.remove(0);
                continue;
            }
            let wanted = remote.iter().map(|piece| piece.iov_len).sum();
            // SAFETY: `done + wanted` is within the `length` bytes at `base`, as checked above; they are ours to
            // read, and to write where `out` is false. Remote addresses are checked by the kernel.
            let copied = unsafe {
                let local = libc::iovec { iov_base: base.add(done).cast(), iov_len: wanted };
                let (local, count) = (&raw const local, remote.len() as u64);
                match out {
                    false => libc::process_vm_readv(process as i32, local, 1, remote.as_ptr(), count, 0),
                    true => libc::process_vm_writev(process as i32, local, 1, remote.as_ptr(), count, 0),
                }
            };
            let mut copied = match usize::try_from(copied) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(copied) => copied,
                Err(_) => return Err(io::Error::last_os_error()),
            };
            done += copied;
            remote.retain_mut(|piece| {
                let now = copied.min(piece.iov_len);
                copied -= now;
                piece.iov_len -= now;
                piece.iov_base = (piece.iov_base as u64 + now as u64) as *mut libc::c_void;
                piece.iov_len > 0
            });
        }
    }
    Ok(())
}
