//! What the kernel asks and is answered, as bytes: the FUSE protocol as far as a folder of few files needs it, from
//! `linux/fuse.h` (version 7.40, Linux 6.9) and fuse(4). Numbers are in the order of this machine.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

/// The protocol's version; the kernel takes older and newer ones.
const MAJOR: u32 = 7;
const MINOR: u32 = 40;
/// Bytes before what a request says.
pub(crate) const HEADER: usize = 40;
/// Bytes before data that is written.
const WRITE_HEADER: usize = 40;
/// The largest request that is written or read at once.
pub(crate) const MAX_WRITE: usize = 1 << 20;
/// What a request may take.
pub(crate) const MAX_REQUEST: usize = HEADER + WRITE_HEADER + MAX_WRITE + PAGE;
const PAGE: usize = 4096;
/// Requests that the kernel sends ahead of those who wait for them, at most.
const MAX_BACKGROUND: u16 = 64;

const ASYNC_READ: u64 = 1;
const BIG_WRITES: u64 = 1 << 5;
const ASYNC_DIO: u64 = 1 << 15;
const MAX_PAGES: u64 = 1 << 22;
const INIT_EXT: u64 = 1 << 30;
const PASSTHROUGH: u64 = 1 << 37;
/// Open answers: the kernel keeps what it has cached of the file; it reads the backing file.
const KEEP_CACHE: u32 = 1 << 1;
const OPEN_PASSTHROUGH: u32 = 1 << 7;
/// Notices to the kernel: forget what is cached of a file; ask again for all that was not answered.
const INVAL_INODE: i32 = 2;
const RESEND: i32 = 7;

/// A request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request<'a> {
    /// Which answer belongs to it.
    pub unique: u64,
    /// The file; 1 is the folder.
    pub node: u64,
    pub ask: Ask<'a>,
}

/// What is wanted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ask<'a> {
    Init {
        max_readahead: u32,
        offered: u64,
    },
    Lookup(&'a OsStr),
    Attributes,
    Open,
    OpenFolder,
    Read {
        offset: u64,
        size: u32,
    },
    ReadFolder {
        offset: u64,
        size: u32,
    },
    Write {
        offset: u64,
        data: &'a [u8],
    },
    Sync,
    Allocate {
        offset: u64,
        length: u64,
        mode: i32,
    },
    Space,
    /// A descriptor is closed.
    Release,
    /// Nobody waits for an answer.
    Forget,
    /// Something that files of ours do not do.
    Other,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Reads a request; none where it is cut short.
pub(crate) fn parse(bytes: &[u8]) -> Option<Request<'_>> {
    let (header, body) = bytes.split_at_checked(HEADER)?;
    let ask = match u32_at(header, 4)? {
        1 => Ask::Lookup(OsStr::from_bytes(body.split(|byte| *byte == 0).next()?)),
        2 | 42 => Ask::Forget,
        3 => Ask::Attributes,
        14 => Ask::Open,
        15 => Ask::Read { offset: u64_at(body, 8)?, size: u32_at(body, 16)? },
        16 => {
            let size = u32_at(body, 16)? as usize;
            Ask::Write { offset: u64_at(body, 8)?, data: body.get(WRITE_HEADER..)?.get(..size)? }
        }
        17 => Ask::Space,
        18 | 29 => Ask::Release,
        20 => Ask::Sync,
        26 => {
            let low = u64::from(u32_at(body, 12)?);
            let high = if low & INIT_EXT == 0 { 0 } else { u64::from(u32_at(body, 16)?) };
            Ask::Init { max_readahead: u32_at(body, 8)?, offered: high << 32 | low }
        }
        27 => Ask::OpenFolder,
        28 => Ask::ReadFolder { offset: u64_at(body, 8)?, size: u32_at(body, 16)? },
        43 => {
            let mode = u32_at(body, 24)? as i32;
            Ask::Allocate { offset: u64_at(body, 8)?, length: u64_at(body, 16)?, mode }
        }
        _ => Ask::Other,
    };
    Some(Request { unique: u64_at(header, 8)?, node: u64_at(header, 16)?, ask })
}

/// What comes before every answer of `length` bytes, and before every notice.
fn header(unique: u64, error: i32, length: usize) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&(16 + length as u32).to_ne_bytes());
    bytes[4..8].copy_from_slice(&error.to_ne_bytes());
    bytes[8..].copy_from_slice(&unique.to_ne_bytes());
    bytes
}

/// The header of an answer with so many bytes.
pub(crate) fn answer(unique: u64, length: usize) -> [u8; 16] {
    header(unique, 0, length)
}

/// An answer that says no.
pub(crate) fn refusal(unique: u64, errno: i32) -> [u8; 16] {
    header(unique, -errno, 0)
}

/// The kernel shall ask again for all that was not answered.
pub(crate) fn resend() -> [u8; 16] {
    header(0, RESEND, 0)
}

/// The kernel shall forget what it has cached of a file.
pub(crate) fn forget(node: u64) -> Vec<u8> {
    let numbers = [node, 0, 0];
    let mut bytes = header(0, INVAL_INODE, 24).to_vec();
    numbers.iter().for_each(|number| bytes.extend(number.to_ne_bytes()));
    bytes
}

/// The answer to [`Ask::Init`].
pub(crate) fn init(max_readahead: u32, offered: u64, wants_backing: bool) -> Vec<u8> {
    let wanted = ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES | INIT_EXT;
    let backing = if wants_backing { PASSTHROUGH } else { 0 };
    let flags = (wanted | backing) & offered;
    let mut out = Vec::with_capacity(64);
    for number in [MAJOR, MINOR, max_readahead, flags as u32] {
        out.extend(number.to_ne_bytes());
    }
    out.extend(MAX_BACKGROUND.to_ne_bytes());
    out.extend((MAX_BACKGROUND / 4 * 3).to_ne_bytes());
    out.extend((MAX_WRITE as u32).to_ne_bytes());
    // Times in nanoseconds.
    out.extend(1u32.to_ne_bytes());
    out.extend(((MAX_WRITE / PAGE) as u16).to_ne_bytes());
    out.extend(0u16.to_ne_bytes());
    out.extend(((flags >> 32) as u32).to_ne_bytes());
    // The backing file may be on a file system that lies on another one itself, as those of containers do.
    out.extend(if flags & PASSTHROUGH == 0 { 0u32 } else { 2 }.to_ne_bytes());
    out.resize(64, 0);
    out
}

/// What a file is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attributes {
    pub node: u64,
    /// Bytes.
    pub size: u64,
    /// Kind and permissions, as of stat(2).
    pub mode: u32,
    pub owner: (u32, u32),
}

impl Attributes {
    fn encode(&self, out: &mut Vec<u8>) {
        let times = [0; 3];
        for number in [self.node, self.size, self.size / 512].into_iter().chain(times) {
            out.extend(number.to_ne_bytes());
        }
        let nanoseconds = [0; 3];
        let (links, device, block, flags) = (1, 0, PAGE as u32, 0);
        let rest = [self.mode, links, self.owner.0, self.owner.1, device, block, flags];
        for number in nanoseconds.into_iter().chain(rest) {
            out.extend(number.to_ne_bytes());
        }
    }
}

/// The answer to [`Ask::Attributes`], true for so long.
pub(crate) fn attributes(found: &Attributes, lifetime: Duration) -> Vec<u8> {
    let mut out = Vec::with_capacity(104);
    out.extend(lifetime.as_secs().to_ne_bytes());
    out.extend([0; 8]);
    found.encode(&mut out);
    out
}

/// The answer to [`Ask::Lookup`], true for so long.
pub(crate) fn entry(found: &Attributes, lifetime: Duration) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    let generation = 0;
    for number in [found.node, generation, lifetime.as_secs(), lifetime.as_secs(), 0] {
        out.extend(number.to_ne_bytes());
    }
    found.encode(&mut out);
    out
}

/// The answer to [`Ask::Open`] and [`Ask::OpenFolder`], with the number of a backing file.
pub(crate) fn opened(backing: Option<u32>) -> [u8; 16] {
    let mut out = [0; 16];
    let flags = if backing.is_some() { OPEN_PASSTHROUGH } else { KEEP_CACHE };
    out[8..12].copy_from_slice(&flags.to_ne_bytes());
    out[12..].copy_from_slice(&backing.unwrap_or_default().to_ne_bytes());
    out
}

/// The answer to [`Ask::Write`].
pub(crate) fn written(size: usize) -> [u8; 8] {
    let mut out = [0; 8];
    out[..4].copy_from_slice(&(size as u32).to_ne_bytes());
    out
}

/// The answer to [`Ask::Space`]: nobody looks here for it.
pub(crate) fn space() -> [u8; 80] {
    let mut out = [0; 80];
    // Sizes of a block, and lengths of names.
    for at in [40, 48] {
        out[at..at + 4].copy_from_slice(&(PAGE as u32).to_ne_bytes());
    }
    out[44..48].copy_from_slice(&255u32.to_ne_bytes());
    out
}

/// The answer to [`Ask::ReadFolder`]: as many as fit of the entries (node, kind as of stat(2), name) from number `first`.
pub(crate) fn folder(entries: &[(u64, u32, &str)], first: u64, size: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for (index, (node, mode, name)) in entries.iter().enumerate().skip(first as usize) {
        let length = (24 + name.len()).next_multiple_of(8);
        if out.len() + length > size {
            break;
        }
        let end = out.len() + length;
        for number in [*node, index as u64 + 1] {
            out.extend(number.to_ne_bytes());
        }
        for number in [name.len() as u32, mode >> 12] {
            out.extend(number.to_ne_bytes());
        }
        out.extend(name.as_bytes());
        out.resize(end, 0);
    }
    out
}
