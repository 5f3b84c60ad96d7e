//! Which block with this content is where: the maker's index, in some 10 bytes of memory for each block.
//!
//! A slot of the table has 32 bits of a block's hash and the block's number; the whole hashes, by number, are in a temporary
//! file, and every hit is compared there. By that count a disk of 100 GiB, 26 million
//! blocks, needs a table of some 300 MB and 840 MB of a file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::known::BlockHash;

/// Hashes that are kept in memory until they go into the file (1 MiB).
const TAIL: usize = 1 << 15;
const HASH: usize = 32;
const SMALLEST: usize = 1 << 12;

/// Blocks by their content.
#[derive(Default)]
pub(crate) struct BlockIndex {
    /// 0, or the first 32 bits of a hash above the block's number plus 1; in the order of the hashes, as far as there is room
    /// (linear probing).
    slots: Vec<u64>,
    used: usize,
    /// The number of each frame's first block, and the frame.
    starts: Vec<(u32, u32)>,
    hashes: Hashes,
}

/// All hashes, by the blocks' numbers.
#[derive(Default)]
struct Hashes {
    file: Option<File>,
    in_file: usize,
    tail: Vec<BlockHash>,
    /// What went wrong; whoever looks for a block is told.
    failed: Option<String>,
}

impl BlockIndex {
    /// The blocks that are added next are those of `frame`, from its first.
    pub fn begin_frame(&mut self, frame: u32) {
        self.starts.push((self.hashes.count(), frame));
    }

    /// Adds the next block of the frame. It is found by its hash, unless an equal block was there before.
    pub fn add(&mut self, hash: &BlockHash) {
        let number = self.hashes.count();
        if number == u32::MAX - 1 {
            self.hashes.failed.get_or_insert_with(|| "there are more than 16 TiB of blocks".into());
            return;
        }
        let known = self.number_of(hash);
        self.hashes.push(hash);
        match known {
            Ok(None) => self.insert(prefix(hash), number),
            Ok(Some(_)) => {}
            Err(error) => _ = self.hashes.failed.get_or_insert_with(|| error.to_string()),
        }
    }

    /// The frame of a block with this content, and its place in it.
    pub fn find(&self, hash: &BlockHash) -> io::Result<Option<(u32, u8)>> {
        if let Some(why) = &self.hashes.failed {
            return Err(io::Error::other(format!(
                "the index of known blocks cannot be kept in a temporary file: {why}"
            )));
        }
        let Some(number) = self.number_of(hash)? else { return Ok(None) };
        let after = self.starts.partition_point(|(first, _)| *first <= number);
        let (first, frame) = self.starts[after - 1];
        Ok(Some((frame, (number - first) as u8)))
    }

    fn number_of(&self, hash: &BlockHash) -> io::Result<Option<u32>> {
        if self.slots.is_empty() {
            return Ok(None);
        }
        let wanted = prefix(hash);
        let mut at = home(wanted, self.slots.len());
        while self.slots[at] != 0 {
            let number = self.slots[at] as u32 - 1;
            if (self.slots[at] >> 32) as u32 == wanted && self.hashes.get(number)? == *hash {
                return Ok(Some(number));
            }
            at = (at + 1) % self.slots.len();
        }
        Ok(None)
    }

    fn insert(&mut self, prefix: u32, number: u32) {
        if (self.used + 1) * 8 > self.slots.len() * 7 {
            let larger = vec![0; SMALLEST.max(self.slots.len() / 2 * 3)];
            let old = std::mem::replace(&mut self.slots, larger);
            old.into_iter().filter(|slot| *slot != 0).for_each(|slot| self.place(slot));
        }
        self.place(u64::from(prefix) << 32 | u64::from(number + 1));
        self.used += 1;
    }

    fn place(&mut self, slot: u64) {
        let mut at = home((slot >> 32) as u32, self.slots.len());
        while self.slots[at] != 0 {
            at = (at + 1) % self.slots.len();
        }
        self.slots[at] = slot;
    }
}

fn prefix(hash: &BlockHash) -> u32 {
    u32::from_le_bytes([hash[0], hash[1], hash[2], hash[3]])
}

fn home(prefix: u32, slots: usize) -> usize {
    ((u64::from(prefix) * slots as u64) >> 32) as usize
}

impl Hashes {
    fn count(&self) -> u32 {
        (self.in_file + self.tail.len()) as u32
    }

    fn push(&mut self, hash: &BlockHash) {
        self.tail.push(*hash);
        if self.tail.len() == TAIL
            && let Err(error) = self.spill()
        {
            self.failed.get_or_insert_with(|| error.to_string());
        }
    }

    fn spill(&mut self) -> io::Result<()> {
        let file = match self.file.take() {
            Some(file) => file,
            None => tempfile::tempfile()?,
        };
        let file = self.file.insert(file);
        file.write_all_at(self.tail.as_flattened(), (self.in_file * HASH) as u64)?;
        self.in_file += self.tail.len();
        self.tail.clear();
        Ok(())
    }

    fn get(&self, number: u32) -> io::Result<BlockHash> {
        let number = number as usize;
        if let Some(at) = number.checked_sub(self.in_file) {
            return Ok(self.tail[at]);
        }
        let mut hash = [0; HASH];
        let file = self.file.as_ref().ok_or(io::ErrorKind::NotFound)?;
        file.read_exact_at(&mut hash, (number * HASH) as u64)?;
        Ok(hash)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Few prefixes, so that different hashes often share one.
    fn hash(n: u32) -> BlockHash {
        let mut hash = *blake3::hash(&n.to_le_bytes()).as_bytes();
        hash[..3].copy_from_slice(&[0, 0, (n % 7) as u8]);
        hash
    }

    #[test]
    fn every_block_is_found_where_it_was_first() {
        let mut index = BlockIndex::default();
        let mut expected = HashMap::new();
        let mut state = 1_u32;
        for frame in 0..1500 {
            index.begin_frame(frame * 3);
            for offset in 0..(frame % 128 + 1) as u8 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let content = state >> 12 & 0xffff;
                index.add(&hash(content));
                expected.entry(content).or_insert((frame * 3, offset));
            }
        }
        assert!(index.hashes.in_file > 0, "the file is used");
        for content in 0..0x1_0000 {
            assert_eq!(index.find(&hash(content)).unwrap(), expected.get(&content).copied());
        }
        assert!(index.used == expected.len() && index.slots.len() < expected.len() * 2);
    }

    #[test]
    fn what_cannot_be_kept_is_said() {
        let mut index = BlockIndex::default();
        index.hashes.failed = Some("no space".into());
        assert!(index.find(&hash(1)).unwrap_err().to_string().contains("no space"));
    }
}
