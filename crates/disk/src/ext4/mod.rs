//! Which bytes of an ext2, ext3 or ext4 file system nobody needs: the blocks that its bitmaps call free, and what an
//! empty journal holds. Layout: Linux, `Documentation/filesystems/ext4/`, and e2fsprogs' `lib/ext2fs`.
//!
//! The bitmaps are believed only if the file system was cleanly unmounted, its journal is empty, and every checksum
//! and count looked at agrees; one disagreement, and nothing of it is unused.

mod bitmap;
mod groups;
mod inode;
mod journal;
mod superblock;

use std::ops::Range;

use crate::ranges;
use crate::read::{Part, Stop, doubt};
use superblock::Superblock;
pub(crate) use superblock::has_magic;

/// More separate ranges than this are not collected: memory is bounded whatever the disk says.
const RANGE_LIMIT: usize = 4 << 20;
/// More groups than this (512 TiB of usual geometry) are not looked into: time is bounded.
const GROUP_LIMIT: u64 = 4 << 20;

/// A file system whose superblock is sound. Whether its bitmaps can be believed is decided by [`Self::unused`].
pub(crate) struct FileSystem<'a> {
    part: Part<'a>,
    superblock: Superblock,
}

pub(crate) fn open<'a>(part: &Part<'a>) -> Result<FileSystem<'a>, Stop> {
    let superblock = Superblock::read(part)?;
    Ok(FileSystem { part: part.clone(), superblock })
}

impl FileSystem<'_> {
    /// By its features, as `blkid` does.
    pub(crate) fn name(&self) -> &'static str {
        self.superblock.name()
    }

    pub(crate) fn label(&self) -> Option<String> {
        self.superblock.label()
    }

    /// Bytes of the part that nobody needs; not aligned. `note` gets clauses about what was left out.
    pub(crate) fn unused(&self, mut note: impl FnMut(String)) -> Result<Vec<Range<u64>>, Stop> {
        self.superblock.check_clean()?;
        if self.superblock.group_count() > GROUP_LIMIT {
            return doubt(format!("it has more than {GROUP_LIMIT} block groups"));
        }
        // The journal first: while it holds anything, the bitmaps are not the last word.
        let journal = journal::contents(self, &mut note)?;
        let mut free = self.free_blocks(&mut note)?;
        free.extend(journal);
        let size = self.superblock.block_size;
        Ok(ranges::normalise(free.into_iter().map(|blocks| blocks.start * size..blocks.end * size).collect()))
    }

    /// Ranges of blocks that the bitmaps call free.
    fn free_blocks(&self, note: &mut impl FnMut(String)) -> Result<Vec<Range<u64>>, Stop> {
        let mut free = Vec::new();
        let mut uninitialised = 0u64;
        let mut descriptors = groups::Descriptors::new(self);
        for group in 0..self.superblock.group_count() {
            let descriptor = descriptors.get(group)?;
            if descriptor.is_block_uninitialised {
                // Its bitmap was never written; what would have to be in it is not worked out here.
                uninitialised += 1;
                continue;
            }
            self.free_of_group(group, &descriptor, &mut free)?;
            if free.len() > RANGE_LIMIT {
                note(format!(
                    "its free space from block group {group} on is taken for used, because it is in too many pieces"
                ));
                break;
            }
        }
        if uninitialised > 0 {
            note(format!(
                "{uninitialised} of {} block groups never used by it are taken for used (they are zeros on a new disk anyway)",
                self.superblock.group_count()
            ));
        }
        Ok(free)
    }

    fn free_of_group(
        &self,
        group: u64,
        descriptor: &groups::Descriptor,
        free: &mut Vec<Range<u64>>,
    ) -> Result<(), Stop> {
        let blocks = self.superblock.blocks_of_group(group);
        let bitmap = self.read_blocks(descriptor.block_bitmap, 1, "reading a block bitmap")?;
        if !descriptor.agrees_with_bitmap(&self.superblock, &bitmap) {
            return doubt(format!("the checksum of the block bitmap of group {group} is wrong"));
        }
        let before = free.len();
        bitmap::clear_runs(&bitmap, (blocks.end - blocks.start) as usize, |run| {
            free.push(blocks.start + run.start as u64..blocks.start + run.end as u64);
        });
        let counted: u64 = free[before..].iter().map(|run| run.end - run.start).sum();
        if counted != descriptor.free_blocks {
            return doubt(format!(
                "group {group} has {counted} free blocks by its bitmap, but {} by its descriptor",
                descriptor.free_blocks
            ));
        }
        Ok(())
    }

    /// Reads whole blocks; `count` is bounded by the caller.
    fn read_blocks(&self, first: u64, count: usize, doing: &'static str) -> Result<Vec<u8>, Stop> {
        let size = self.superblock.block_size;
        let is_inside = first.checked_add(count as u64).is_some_and(|end| end <= self.superblock.block_count);
        if first == 0 || !is_inside {
            return doubt(format!("{doing} leads outside of its file system"));
        }
        self.part.read(first * size, count * size as usize, doing)
    }
}
