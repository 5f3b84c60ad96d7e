//! The journal: whether it is empty, and where its contents are, which nobody needs then.
//! Layout: Linux, `Documentation/filesystems/ext4/journal.rst`; all numbers are big-endian.

use std::ops::Range;

use super::FileSystem;
use super::inode::{Blocks, Inode};
use crate::checksum::crc32c;
use crate::read::{Fields, Stop, doubt};

const INODE: u32 = 8;
const MAGIC: u32 = 0xc03b_3998;
const TYPES_SUPERBLOCK: [u32; 2] = [3, 4];
const INCOMPAT_CHECKSUM: u32 = 0x8 | 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;
/// Revoke, 64bit, async_commit, checksums v2 and v3, fast_commit.
const INCOMPAT_KNOWN: u32 = 0x3f;
/// What Linux takes where the superblock names no number (JBD2_DEFAULT_FAST_COMMIT_BLOCKS).
const FAST_COMMIT_BLOCKS: u64 = 256;
/// mke2fs makes no larger one (JBD2_MAX... in e2fsprogs: 10,240,000 blocks).
const BLOCK_LIMIT: u64 = 10_240_000;

/// Blocks of the file system that hold nothing but the empty log.
pub(super) fn contents(system: &FileSystem<'_>, note: &mut impl FnMut(String)) -> Result<Blocks, Stop> {
    let superblock = &system.superblock;
    if superblock.journal_inode == 0 {
        if superblock.journal_device != 0 {
            note("its journal is on another disk, which was not looked into".into());
        }
        return Ok(Vec::new());
    }
    if superblock.journal_inode != INODE {
        return doubt(format!("its journal is inode {}, and not {INODE}", superblock.journal_inode));
    }
    let inode = Inode::read(system, INODE)?;
    let count = inode.size() / superblock.block_size;
    if count == 0 || count > superblock.block_count.min(BLOCK_LIMIT) {
        return doubt("its journal has an impossible length");
    }
    let blocks = inode.blocks(system, count)?;
    let first = blocks.first().map_or(0, |run| run.start);
    let raw = system.read_blocks(first, 1, "reading the journal")?;
    let unused = unused_of_log(&raw, superblock.block_size, count)?;
    Ok(slice(&blocks, unused))
}

/// Which blocks of the journal nobody needs, by its superblock.
fn unused_of_log(raw: &[u8], block_size: u64, count: u64) -> Result<Range<u64>, Stop> {
    let length = u64::from(raw.be32_at(16));
    let (first, start, incompat) = (u64::from(raw.be32_at(20)), raw.be32_at(28), raw.be32_at(40));
    if raw.be32_at(0) != MAGIC || !TYPES_SUPERBLOCK.contains(&raw.be32_at(4)) {
        return doubt("its journal has no superblock");
    }
    if start != 0 {
        return doubt(
            "its journal is not empty: it was not cleanly unmounted; start the machine once and shut it down, or run fsck",
        );
    }
    if raw.be32_at(32) != 0 {
        return doubt("its journal records an error; run fsck on it");
    }
    if u64::from(raw.be32_at(12)) != block_size || length > count || first == 0 || first >= length {
        return doubt("the geometry of its journal is impossible");
    }
    // Version 1 (type 3) has no features; its other fields are not written.
    let incompat = if raw.be32_at(4) == TYPES_SUPERBLOCK[0] { 0 } else { incompat };
    if incompat & !INCOMPAT_KNOWN != 0 {
        return doubt(format!("its journal has features not known here ({incompat:#x})"));
    }
    if incompat & INCOMPAT_CHECKSUM != 0 {
        let mut zeroed = raw[..1024].to_vec();
        zeroed[0xfc..0x100].fill(0);
        if crc32c(!0, &zeroed) != raw.be32_at(0xfc) {
            return doubt("the checksum of its journal's superblock is wrong");
        }
    }
    let kept = match (incompat & INCOMPAT_FAST_COMMIT != 0, u64::from(raw.be32_at(0x54))) {
        (false, _) => 0,
        (true, 0) => FAST_COMMIT_BLOCKS,
        (true, blocks) => blocks,
    };
    Ok(first..length.saturating_sub(kept).max(first))
}

/// A part of a file's blocks, by numbers within the file.
fn slice(blocks: &Blocks, part: Range<u64>) -> Blocks {
    let mut at = 0;
    let mut result = Vec::new();
    for run in blocks {
        let length = run.end - run.start;
        let (from, to) = (part.start.clamp(at, at + length) - at, part.end.clamp(at, at + length) - at);
        if from < to {
            result.push(run.start + from..run.start + to);
        }
        at += length;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_of_scattered_blocks() {
        let blocks = vec![100..110, 50..55, 200..300];
        assert_eq!(slice(&blocks, 1..12), [101..110, 50..52]);
        assert_eq!(slice(&blocks, 15..16), [200..201]);
        assert!(slice(&blocks, 115..200).is_empty());
        assert!(slice(&blocks, 5..5).is_empty());
    }

    fn log_superblock(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut raw = vec![0; 1024];
        for (at, value) in [(0, MAGIC), (4, 4), (12, 1024), (16, 2000), (20, 1)] {
            raw[at..at + 4].copy_from_slice(&value.to_be_bytes());
        }
        change(&mut raw);
        raw
    }

    #[test]
    fn an_empty_log_is_unused_but_for_what_fast_commits_need() {
        let read = |raw: &[u8]| unused_of_log(raw, 1024, 2048).ok();
        assert_eq!(read(&log_superblock(|_| {})), Some(1..2000));
        assert_eq!(read(&log_superblock(|raw| raw[43] = 0x20)), Some(1..1744));
        assert_eq!(read(&log_superblock(|raw| (raw[43], raw[0x57]) = (0x20, 100))), Some(1..1900));
        assert_eq!(read(&log_superblock(|raw| (raw[43], raw[0x54]) = (0x20, 100))), Some(1..1));
        assert_eq!(read(&log_superblock(|raw| raw[31] = 1)), None);
        assert_eq!(read(&log_superblock(|raw| raw[35] = 1)), None);
        assert_eq!(read(&log_superblock(|raw| raw[43] = 0x40)), None);
        assert_eq!(read(&log_superblock(|raw| raw[43] = 0x10)), None);
        assert_eq!(read(&log_superblock(|raw| raw[17] = 0xff)), None);
    }
}
