//! Packs: many frames and pages in one immutable object, named by the BLAKE3 of all its bytes.
//!
//! ```text
//! header     "CLPK" u16 version=2 u16 0
//! bodies     stored forms, back to back
//! directory  count x { digest[32] u8 kind u8 encoding u8 bases u8 0 u32 stored u32 length u64 offset }   (52 bytes each)
//!            table x { digest[32] }            frames that deltas of this pack are made against
//!            for each delta, in order: bases x { u24 index into the table, u8 part of that frame }
//! trailer    u64 directory offset, u32 count, u32 table, "CLPE"
//! ```
//! Integers are little-endian. A reader that knows a pack's size needs the last bytes only.

mod write;

use std::ops::Range;

use collective_model::Digest;
use rayon::prelude::*;

use crate::seal::{Form, MAX_SEALED_BYTES, MIN_SEALED_BYTES, Opened};
use crate::similar::MAX_BASES;
use crate::{BLOCK, Encoding, FRAME_BLOCKS, FrameError, MAX_PAGE_BYTES, PART_BLOCKS};

pub use write::PackBuilder;

const MAGIC: &[u8; 8] = b"CLPK\x02\0\0\0";
const END_MAGIC: &[u8; 4] = b"CLPE";
pub(crate) const HEADER: u64 = 8;
const ENTRY: u64 = 52;
/// A part of a frame, in bytes.
pub(crate) const PART_BYTES: usize = PART_BLOCKS * BLOCK as usize;
/// No frame or page has more parts.
const MAX_PARTS: u8 = (MAX_PAGE_BYTES / PART_BYTES) as u8;
/// The trailer's length in bytes.
pub const TRAILER: u64 = 20;
/// No pack is longer than this, in bytes.
pub const MAX_PACK_BYTES: u64 = 64 << 20;
/// A pack is closed when its bodies reach this many bytes: small enough to resend, large enough for few requests.
pub const TARGET_PACK_BYTES: usize = 32 << 20;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EntryKind {
    /// Blocks of images.
    Data = 0,
    /// A page of an image's index.
    Page = 1,
}

/// One frame or page in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The BLAKE3 of its content, keyed where it is sealed.
    pub digest: Digest,
    /// What it is.
    pub kind: EntryKind,
    /// How it is stored.
    pub encoding: Encoding,
    /// Bytes in the pack.
    pub stored: u32,
    /// Bytes of its content; of what is stored, where it is sealed.
    pub length: u32,
    /// Where it begins in the pack.
    pub offset: u64,
}

impl Entry {
    /// Its bytes in the pack.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + u64::from(self.stored)
    }
}

/// What a pack holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// Frames and pages that stand for themselves.
    pub entries: Vec<Entry>,
    /// Frames and pages as differences to others.
    pub deltas: Vec<Delta>,
}

/// A frame or page stored as a difference to others, which may be in any pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    /// Its own entry.
    pub entry: Entry,
    /// What to give to [`decode_delta`](crate::decode_delta), back to back in this order.
    pub bases: Vec<Base>,
}

/// Part of a frame or page: [`PART_BLOCKS`] of it, fewer at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Which.
    pub frame: Digest,
    /// Counted from its first.
    pub part: u8,
}

impl Base {
    /// Its bytes, of those of the frame; none where the frame ends before.
    pub fn of<'a>(&self, content: &'a [u8]) -> &'a [u8] {
        content.chunks(PART_BYTES).nth(self.part.into()).unwrap_or_default()
    }
}

/// Why a pack is refused.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// Not a pack, cut short, or of a newer format.
    #[error("it is not a pack that this program can read: {0}")]
    Format(&'static str),
    /// An entry contradicts the pack.
    #[error("entry {index} of its directory is wrong: {why}")]
    Entry {
        /// Which.
        index: usize,
        /// Why.
        why: &'static str,
    },
    /// An entry's content is not what its name says.
    #[error("frame {digest} in it is damaged: {source}")]
    Frame {
        /// Which.
        digest: Digest,
        /// How.
        source: FrameError,
    },
}

/// A finished pack.
pub struct Pack {
    /// Its name.
    pub digest: Digest,
    /// All of it.
    pub bytes: Vec<u8>,
    /// Its directory.
    pub directory: Directory,
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// Reads a trailer: where the directory of a pack of `size` bytes is, without the trailer.
pub fn directory_range(trailer: &[u8], size: u64) -> Result<Range<u64>, PackError> {
    if trailer.len() as u64 != TRAILER || &trailer[16..] != END_MAGIC {
        return Err(PackError::Format("its end is missing"));
    }
    let start = u64::from_le_bytes(array(trailer, 0));
    let counts = [u32::from_le_bytes(array(trailer, 8)), u32::from_le_bytes(array(trailer, 12))];
    let least = u64::from(counts[0]) * ENTRY + u64::from(counts[1]) * 32;
    let end = size.checked_sub(TRAILER).ok_or(PackError::Format("it is cut short"))?;
    if size > MAX_PACK_BYTES || start < HEADER || start.checked_add(least).is_none_or(|least| least > end) {
        return Err(PackError::Format("its directory is not where it should be"));
    }
    Ok(start..end)
}

/// Reads directory and trailer, the last bytes of a pack; `start` is where the directory begins in it.
pub fn parse_directory(tail: &[u8], start: u64) -> Result<Directory, PackError> {
    const SHORT: PackError = PackError::Format("its directory is cut short");
    let (rest, trailer) = tail.len().checked_sub(TRAILER as usize).map(|at| tail.split_at(at)).ok_or(SHORT)?;
    let count = u32::from_le_bytes(array(trailer, 8)) as usize;
    let table = u32::from_le_bytes(array(trailer, 12)) as usize;
    let (entries, rest) = rest.split_at_checked(count.saturating_mul(ENTRY as usize)).ok_or(SHORT)?;
    let (table, references) = rest.split_at_checked(table.saturating_mul(32)).ok_or(SHORT)?;
    let mut references = references.chunks_exact(4).map(|raw| u32::from_le_bytes(array(raw, 0)));
    let mut base = || {
        let reference = references.next()?;
        let (from, part) = ((reference & 0xff_ffff) as usize * 32, (reference >> 24) as u8);
        let frame = table.get(from..from + 32).map(|raw| Digest(array(raw, 0)))?;
        (part < MAX_PARTS).then_some(Base { frame, part })
    };
    let mut directory = Directory::default();
    for (index, raw) in entries.chunks_exact(ENTRY as usize).enumerate() {
        let wrong = |why| PackError::Entry { index, why };
        let (entry, count) = parse_entry(raw, start).map_err(wrong)?;
        if entry.encoding == Encoding::Delta {
            let bases: Option<Vec<Base>> = (0..count).map(|_| base()).collect();
            let bases =
                bases.ok_or_else(|| wrong("it names a frame that is not in the table, or a part that cannot be"))?;
            directory.deltas.push(Delta { entry, bases });
        } else {
            directory.entries.push(entry);
        }
    }
    if references.next().is_some() || !rest.len().is_multiple_of(4) {
        return Err(PackError::Format("its directory is longer than it says"));
    }
    Ok(directory)
}

/// Whether these are directory and trailer of some pack, as far as that can be seen without its size.
pub(crate) fn is_tail(tail: &[u8]) -> bool {
    let Some(cut) = tail.len().checked_sub(TRAILER as usize) else { return false };
    let start = u64::from_le_bytes(array(tail, cut));
    tail.ends_with(END_MAGIC) && parse_directory(tail, start).is_ok()
}

fn parse_entry(raw: &[u8], start: u64) -> Result<(Entry, u8), &'static str> {
    let kind = match raw[32] {
        0 => EntryKind::Data,
        1 => EntryKind::Page,
        _ => return Err("unknown kind"),
    };
    let encoding = Encoding::try_from(raw[33]).map_err(|_| "unknown encoding")?;
    let entry = Entry {
        digest: Digest(array(raw, 0)),
        kind,
        encoding,
        stored: u32::from_le_bytes(array(raw, 36)),
        length: u32::from_le_bytes(array(raw, 40)),
        offset: u64::from_le_bytes(array(raw, 44)),
    };
    let end = entry.offset.checked_add(u64::from(entry.stored));
    if entry.offset < HEADER || end.is_none_or(|end| end > start) {
        return Err("it lies outside the pack");
    }
    let fits = match kind {
        _ if encoding == Encoding::Sealed => {
            // Only the owner is told what it is and how long.
            let stored = entry.stored as usize;
            kind == EntryKind::Data
                && entry.length == entry.stored
                && (MIN_SEALED_BYTES..=MAX_SEALED_BYTES).contains(&stored)
        }
        EntryKind::Data => {
            entry.length > 0
                && u64::from(entry.length) <= FRAME_BLOCKS as u64 * BLOCK
                && u64::from(entry.length).is_multiple_of(BLOCK)
        }
        EntryKind::Page => entry.length > 0 && entry.length as usize <= MAX_PAGE_BYTES,
    };
    if !fits || entry.stored > entry.length {
        return Err("impossible length");
    }
    let bases = raw[34];
    let is_delta = encoding == Encoding::Delta;
    if is_delta != (bases > 0) || usize::from(bases) > MAX_BASES {
        return Err("impossible number of bases");
    }
    Ok((entry, bases))
}

/// Reads a whole pack and checks every frame in it that stands for itself; sealed ones are refused. Deltas are checked by
/// whoever has their bases, each time they are used.
pub fn verify(bytes: &[u8]) -> Result<Directory, PackError> {
    let directory = directory(bytes)?;
    directory.entries.par_iter().try_for_each(|entry| contents(bytes, entry).map(drop))?;
    Ok(directory)
}

/// Reads the directory of a whole pack.
pub fn directory(bytes: &[u8]) -> Result<Directory, PackError> {
    let size = bytes.len() as u64;
    if size < HEADER + TRAILER || &bytes[..8] != MAGIC {
        return Err(PackError::Format("its beginning is missing or of another version"));
    }
    let range = directory_range(&bytes[bytes.len() - TRAILER as usize..], size)?;
    parse_directory(&bytes[range.start as usize..], range.start)
}

/// The verified content of an entry of a whole pack.
pub fn contents(bytes: &[u8], entry: &Entry) -> Result<Vec<u8>, PackError> {
    opened(bytes, entry, &Form::default()).map(|opened| opened.content)
}

pub(crate) fn opened(bytes: &[u8], entry: &Entry, form: &Form) -> Result<Opened, PackError> {
    let range = entry.range();
    let stored = bytes.get(range.start as usize..range.end as usize).ok_or(PackError::Format("it is cut short"))?;
    form.decode(&entry.digest, entry.kind, entry.encoding, stored, entry.length as usize)
        .map_err(|source| PackError::Frame { digest: entry.digest, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Pack {
        let mut builder = PackBuilder::default();
        for i in 0..5u8 {
            let content = vec![i; 4096 * (i as usize + 1)];
            let (encoding, stored) = crate::encode(&content);
            builder.add(EntryKind::Data, Digest::of(&content), encoding, &stored, content.len() as u32);
            let bases = (0..=i).map(|base| Base { frame: Digest([base % 3; 32]), part: base % 8 }).collect();
            builder.add_delta(EntryKind::Data, Digest::of(&content), &[i; 9], content.len() as u32, bases);
        }
        builder.finish()
    }

    /// `docs/formats/pack.md` shows these bytes.
    #[test]
    fn the_documented_example() {
        let frame = [[b'A'; 4096], [b'B'; 4096]].concat();
        let leaf = "434c494c 01000000 01000000 03000000 3b1bbe23bad151e0bd40922f6b80a132bd8fde15caea0aee54385d0001a960b5 \
                    0200 0000010000000000 0200010000000100 0300010000000000";
        let root =
            "434c4952 01000100 0040000000000000 50ccf830685e86f9517c653b1d871550ef409c069756ad39fe44ecda27026cb0";
        let bytes = |hex: &str| -> Vec<u8> {
            let digits: Vec<u8> = hex.bytes().filter(|digit| *digit != b' ').collect();
            let value = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
            digits.chunks(2).map(value).collect()
        };
        let mut builder = PackBuilder::default();
        let (encoding, stored) = crate::encode(&frame);
        builder.add(EntryKind::Data, Digest::of(&frame), encoding, &stored, 8192);
        for page in [bytes(leaf), bytes(root)] {
            builder.add(EntryKind::Page, Digest::of(&page), Encoding::Plain, &page, page.len() as u32);
        }
        let pack = builder.finish();
        assert_eq!(pack.bytes.len(), 329);
        assert_eq!(pack.digest.to_string(), "d0da60c9d7e2ec355324dd63130bd55aeb2295b185309a07bc91d6ba3daab3e3");
    }

    #[test]
    fn round_trip() {
        let pack = sample();
        assert_eq!(verify(&pack.bytes).unwrap(), pack.directory);
        assert_eq!(pack.directory.deltas.len(), 5);
        assert_eq!(pack.digest, Digest::of(&pack.bytes));
    }

    proptest! {
        #[test]
        fn damage_never_panics_and_never_passes(at in 0usize..4000, value: u8, cut in 0usize..4000) {
            let mut bytes = sample().bytes;
            prop_assert!(verify(&bytes[..cut % bytes.len()]).is_err());
            let at = at % bytes.len();
            bytes[at] = value;
            if let Ok(directory) = verify(&bytes) {
                for entry in &directory.entries {
                    prop_assert_eq!(Digest::of(&contents(&bytes, entry).unwrap()), entry.digest);
                }
            }
        }
    }
}
