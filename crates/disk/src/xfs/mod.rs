//! Which bytes of an XFS file system nobody needs: the extents in its B-trees of free space, one for each allocation
//! group. Layout: Linux, fs/xfs/libxfs/xfs_format.h and xfs_log_format.h, and "XFS Algorithms & Data Structures".
//!
//! They are believed only if the log ends with the record of an unmount, and every checksum, identity, order and count
//! on the way agrees. File systems of version 4 and before have no checksums and are left alone.

mod groups;
mod log;
mod superblock;

use std::ops::Range;

use crate::ranges;
use crate::read::{Part, Stop, doubt};
use superblock::Superblock;

/// A file system whose superblock is sound.
pub(crate) struct FileSystem<'a> {
    part: Part<'a>,
    superblock: Superblock,
}

pub(crate) fn open<'a>(part: &Part<'a>) -> Result<FileSystem<'a>, Stop> {
    Ok(FileSystem { part: part.clone(), superblock: Superblock::read(part)? })
}

impl FileSystem<'_> {
    pub(crate) fn label(&self) -> Option<String> {
        self.superblock.label.clone()
    }

    /// Bytes of the part that nobody needs; not aligned.
    pub(crate) fn unused(&self) -> Result<Vec<Range<u64>>, Stop> {
        // The log first: while it holds anything, the B-trees are not the last word.
        log::check_clean(&self.part, &self.superblock)?;
        let mut free = Vec::new();
        for group in 0..self.superblock.group_count {
            groups::collect_free(&self.part, &self.superblock, group, &mut free)?;
        }
        let log = self.superblock.log_range();
        let size = self.superblock.block_size;
        let free: Vec<_> = free.into_iter().map(|blocks| blocks.start * size..blocks.end * size).collect();
        if free.iter().any(|range| range.start < log.end && log.start < range.end) {
            return doubt("its log lies in its free space; run xfs_repair on it");
        }
        Ok(ranges::normalise(free))
    }
}
