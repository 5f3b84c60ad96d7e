//! Packs: many frames and pages in one immutable object, named by the BLAKE3 of all its bytes.
//!
//! ```text
//! header     "CLPK" u16 version=1 u16 0
//! bodies     stored forms, back to back
//! directory  count x { digest[32] u8 kind u8 encoding u16 0 u32 stored u32 length u64 offset }   (52 bytes each)
//! trailer    u64 directory offset, u32 count, "CLPE"
//! ```
//! Integers are little-endian. A reader that knows a pack's size needs the last bytes only.

use std::ops::Range;

use collective_model::Digest;

use crate::{BLOCK, Encoding, FRAME_BLOCKS, FrameError, MAX_PAGE_BYTES, decode};

const MAGIC: &[u8; 8] = b"CLPK\x01\0\0\0";
const END_MAGIC: &[u8; 4] = b"CLPE";
const HEADER: u64 = 8;
const ENTRY: u64 = 52;
/// The trailer's length in bytes.
pub const TRAILER: u64 = 16;
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
    /// The BLAKE3 of its content.
    pub digest: Digest,
    /// What it is.
    pub kind: EntryKind,
    /// How it is stored.
    pub encoding: Encoding,
    /// Bytes in the pack.
    pub stored: u32,
    /// Bytes of its content.
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

/// A pack being filled.
pub struct PackBuilder {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

/// A finished pack.
pub struct Pack {
    /// Its name.
    pub digest: Digest,
    /// All of it.
    pub bytes: Vec<u8>,
    /// Its directory.
    pub entries: Vec<Entry>,
}

impl Default for PackBuilder {
    fn default() -> Self {
        Self { bytes: MAGIC.to_vec(), entries: Vec::new() }
    }
}

impl PackBuilder {
    /// Appends one frame or page.
    pub fn add(&mut self, kind: EntryKind, digest: Digest, encoding: Encoding, stored: &[u8], length: u32) {
        let offset = self.bytes.len() as u64;
        self.bytes.extend_from_slice(stored);
        self.entries.push(Entry { digest, kind, encoding, stored: stored.len() as u32, length, offset });
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Writes directory and trailer.
    pub fn finish(mut self) -> Pack {
        let directory = self.bytes.len() as u64;
        for entry in &self.entries {
            self.bytes.extend_from_slice(&entry.digest.0);
            self.bytes.extend_from_slice(&[entry.kind as u8, entry.encoding as u8, 0, 0]);
            self.bytes.extend_from_slice(&entry.stored.to_le_bytes());
            self.bytes.extend_from_slice(&entry.length.to_le_bytes());
            self.bytes.extend_from_slice(&entry.offset.to_le_bytes());
        }
        self.bytes.extend_from_slice(&directory.to_le_bytes());
        self.bytes.extend_from_slice(&(self.entries.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(END_MAGIC);
        Pack { digest: Digest::of(&self.bytes), bytes: self.bytes, entries: self.entries }
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// Reads a trailer: where the directory of a pack of `size` bytes is.
pub fn directory_range(trailer: &[u8], size: u64) -> Result<Range<u64>, PackError> {
    if trailer.len() as u64 != TRAILER || &trailer[12..] != END_MAGIC {
        return Err(PackError::Format("its end is missing"));
    }
    let start = u64::from_le_bytes(array(trailer, 0));
    let length = u64::from(u32::from_le_bytes(array(trailer, 8))) * ENTRY;
    if size > MAX_PACK_BYTES || start < HEADER || start.checked_add(length + TRAILER) != Some(size) {
        return Err(PackError::Format("its directory is not where it should be"));
    }
    Ok(start..start + length)
}

/// Reads the bytes of the directory that begins at `start`.
pub fn parse_directory(directory: &[u8], start: u64) -> Result<Vec<Entry>, PackError> {
    if !(directory.len() as u64).is_multiple_of(ENTRY) {
        return Err(PackError::Format("its directory is cut short"));
    }
    let parse = |(index, raw): (usize, &[u8])| {
        let wrong = |why| PackError::Entry { index, why };
        let kind = match raw[32] {
            0 => EntryKind::Data,
            1 => EntryKind::Page,
            _ => return Err(wrong("unknown kind")),
        };
        let entry = Entry {
            digest: Digest(array(raw, 0)),
            kind,
            encoding: Encoding::try_from(raw[33]).map_err(|_| wrong("unknown encoding"))?,
            stored: u32::from_le_bytes(array(raw, 36)),
            length: u32::from_le_bytes(array(raw, 40)),
            offset: u64::from_le_bytes(array(raw, 44)),
        };
        let end = entry.offset.checked_add(u64::from(entry.stored));
        if entry.offset < HEADER || end.is_none_or(|end| end > start) {
            return Err(wrong("it lies outside the pack"));
        }
        let fits = match kind {
            EntryKind::Data => {
                entry.length > 0
                    && u64::from(entry.length) <= FRAME_BLOCKS as u64 * BLOCK
                    && u64::from(entry.length).is_multiple_of(BLOCK)
            }
            EntryKind::Page => entry.length > 0 && entry.length as usize <= MAX_PAGE_BYTES,
        };
        if !fits || entry.stored > entry.length {
            return Err(wrong("impossible length"));
        }
        Ok(entry)
    };
    directory.chunks_exact(ENTRY as usize).enumerate().map(parse).collect()
}

/// Reads a whole pack and checks every frame in it.
pub fn verify(bytes: &[u8]) -> Result<Vec<Entry>, PackError> {
    let entries = entries(bytes)?;
    for entry in &entries {
        contents(bytes, entry)?;
    }
    Ok(entries)
}

/// Reads the directory of a whole pack.
pub fn entries(bytes: &[u8]) -> Result<Vec<Entry>, PackError> {
    let size = bytes.len() as u64;
    if size < HEADER + TRAILER || &bytes[..8] != MAGIC {
        return Err(PackError::Format("its beginning is missing or of another version"));
    }
    let range = directory_range(&bytes[bytes.len() - TRAILER as usize..], size)?;
    parse_directory(&bytes[range.start as usize..range.end as usize], range.start)
}

/// The verified content of an entry of a whole pack.
pub fn contents(bytes: &[u8], entry: &Entry) -> Result<Vec<u8>, PackError> {
    let range = entry.range();
    let stored = bytes.get(range.start as usize..range.end as usize).ok_or(PackError::Format("it is cut short"))?;
    decode(&entry.digest, entry.encoding, stored, entry.length as usize)
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
        }
        builder.finish()
    }

    #[test]
    fn round_trip() {
        let pack = sample();
        assert_eq!(verify(&pack.bytes).unwrap(), pack.entries);
        assert_eq!(pack.digest, Digest::of(&pack.bytes));
    }

    proptest! {
        #[test]
        fn damage_never_panics_and_never_passes(at in 0usize..4000, value: u8, cut in 0usize..4000) {
            let mut bytes = sample().bytes;
            prop_assert!(verify(&bytes[..cut % bytes.len()]).is_err());
            let at = at % bytes.len();
            bytes[at] = value;
            if let Ok(entries) = verify(&bytes) {
                for entry in &entries {
                    prop_assert_eq!(Digest::of(&contents(&bytes, entry).unwrap()), entry.digest);
                }
            }
        }
    }
}
