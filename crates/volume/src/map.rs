//! The map file of a layer: a header, and one bit for each block.

use std::io;
use std::ops::Range;

use collective_store::BLOCK;

use crate::backing::{Backing, read_full};
use crate::log::Blocks;

/// A version 1 has no log behind the data.
const MAGIC: [&[u8; 8]; 2] = [b"CLLM\x01\0\0\0", b"CLLM\x02\0\0\0"];
const HEADER: usize = 16;
const START: u64 = 4096;

/// Bytes of the map that are written together.
pub(crate) const PAGE: usize = 4096;

/// A map as it was found.
#[derive(Debug)]
pub(crate) struct Map {
    /// The size of the disk for which it was made.
    pub size: u64,
    /// There is a log.
    pub logged: bool,
    pub bits: Vec<u8>,
}

/// Bytes of bits for a disk of `size` bytes.
pub(crate) fn bits_length(size: u64) -> usize {
    size.div_ceil(BLOCK).div_ceil(8) as usize
}

/// Bytes of the whole file.
pub(crate) fn length(size: u64) -> u64 {
    START + (bits_length(size) as u64).next_multiple_of(PAGE as u64)
}

/// Where a page of the bits is.
pub(crate) fn place(page: usize) -> u64 {
    START + (page * PAGE) as u64
}

/// What a map begins with.
pub(crate) fn header(size: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC[1]);
    header[8..].copy_from_slice(&size.to_le_bytes());
    header
}

/// The size of the disk that a map says it was made for; [`read`] looks at the rest.
pub(crate) fn made_for(map: &dyn Backing) -> io::Result<u64> {
    let mut header = [0; HEADER];
    read_full(map, &mut header, 0)?;
    let size = size_in(&header);
    // Checked before anything is allocated by it.
    match bits_length(size) as u64 <= map.length()? {
        true => Ok(size),
        false => Err(io::Error::other("its map is cut short")),
    }
}

fn size_in(header: &[u8; HEADER]) -> u64 {
    u64::from_le_bytes([8, 9, 10, 11, 12, 13, 14, 15].map(|i: usize| header[i]))
}

/// Reads a map for a disk of `size` bytes; or what is wrong with it.
pub(crate) fn read(map: &dyn Backing, size: u64) -> io::Result<Result<Map, String>> {
    let mut header = [0; HEADER];
    if read_full(map, &mut header, 0)? < HEADER {
        return Ok(Err("its map is cut short".into()));
    }
    let made_for = size_in(&header);
    let Some(version) = MAGIC.iter().position(|magic| header.starts_with(*magic)) else {
        return Ok(Err("its map has another format".into()));
    };
    // Checked before anything is allocated by it.
    if made_for > size || made_for == 0 {
        return Ok(Err(format!("it was made for a disk of {made_for} bytes, and this one has {size}")));
    }
    let blocks = made_for.div_ceil(BLOCK);
    let mut bits = vec![0; bits_length(made_for)];
    if read_full(map, &mut bits, START)? < bits.len() {
        return Ok(Err("its map is cut short".into()));
    }
    // They would become blocks of zeros when the disk grows.
    let beyond = (!blocks.is_multiple_of(8)).then(|| bits.last().map_or(0, |last| last >> (blocks % 8)));
    if beyond.is_some_and(|bits| bits != 0) {
        return Ok(Err("its map names blocks beyond the end of the disk".into()));
    }
    Ok(Ok(Map { size: made_for, logged: version == 1, bits }))
}

/// Runs of blocks whose bits are set, ascending.
pub(crate) fn runs(bits: &[u8]) -> impl Iterator<Item = Range<u64>> {
    let end = bits.len() as u64 * 8;
    let is_set = |block: u64| bits[(block / 8) as usize] & (1 << (block % 8)) != 0;
    // Whole bytes are passed at once.
    let next = move |from: u64, wanted: bool| {
        let alike = if wanted { 0 } else { 0xff };
        let mut block = from;
        while block < end && is_set(block) != wanted {
            let passes = block.is_multiple_of(8) && bits[(block / 8) as usize] == alike;
            block += if passes { 8 } else { 1 };
        }
        block
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = next(at, true);
        at = next(first, false);
        (first < end).then_some(first..at)
    })
}

/// Makes copies of pages durable.
pub(crate) fn write(map: &dyn Backing, pages: &[(usize, Vec<u8>)]) -> io::Result<()> {
    for (page, bytes) in pages {
        map.write_at(bytes, place(*page))?;
    }
    map.sync()
}

/// What a layer holds.
#[derive(Debug)]
pub(crate) struct Bits {
    pub bytes: Vec<u8>,
    /// Pages that are not in the map file as they are here.
    pub changed_pages: Vec<bool>,
    /// Blocks that neither the map nor the log names.
    pub new: Blocks,
    /// Something was changed since the last flush.
    pub dirty: bool,
}

impl Bits {
    /// True if it was not held.
    pub fn set(&mut self, block: u64) -> bool {
        let (byte, bit) = ((block / 8) as usize, 1 << (block % 8));
        let Some(slot) = self.bytes.get_mut(byte).filter(|slot| **slot & bit == 0) else { return false };
        *slot |= bit;
        self.changed_pages[byte / PAGE] = true;
        true
    }

    /// The bytes that have the bits of `blocks`, with all of these set, and the place of the first; none if they are set.
    pub fn with(&self, blocks: &Range<u64>) -> Option<(usize, Vec<u8>)> {
        let first = (blocks.start / 8) as usize;
        let end = (blocks.end.div_ceil(8) as usize).min(self.bytes.len());
        let before = self.bytes.get(first..end)?;
        let mut bytes = before.to_vec();
        for block in blocks.clone() {
            if let Some(byte) = bytes.get_mut((block / 8) as usize - first) {
                *byte |= 1 << (block % 8);
            }
        }
        (bytes != before).then_some((first, bytes))
    }

    /// Copies of the changed pages, which count as unchanged from now on.
    pub fn take_changed(&mut self) -> Vec<(usize, Vec<u8>)> {
        let pages: Vec<usize> = (0..self.changed_pages.len()).filter(|page| self.changed_pages[*page]).collect();
        self.changed_pages.fill(false);
        let pages = pages.into_iter().map(|page| {
            let end = ((page + 1) * PAGE).min(self.bytes.len());
            (page, self.bytes[page * PAGE..end].to_vec())
        });
        pages.collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_are_what_is_set(bits in proptest::collection::vec(prop_oneof![Just(0u8), Just(0xff), any::<u8>()], 0..40)) {
            let set: Vec<u64> =
                (0..bits.len() as u64 * 8).filter(|block| bits[(block / 8) as usize] & (1 << (block % 8)) != 0).collect();
            let found: Vec<Range<u64>> = runs(&bits).collect();
            prop_assert!(found.windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert_eq!(found.into_iter().flatten().collect::<Vec<_>>(), set);
        }
    }
}
