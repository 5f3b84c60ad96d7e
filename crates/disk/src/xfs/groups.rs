//! Allocation groups: a header for each, and the B-tree of its free extents by place.

use std::ops::Range;

use super::superblock::{Superblock, has_checksum};
use crate::read::{Fields, Part, Stop, doubt};

/// More separate ranges than this are not collected: memory is bounded whatever the disk says.
const RANGE_LIMIT: usize = 4 << 20;

const HEADER_MAGIC: &[u8] = b"XAGF";
const HEADER_CHECKSUM_AT: usize = 216;
/// Superblock, free space, inodes, and the list of blocks set aside: a sector of each begins a group.
const HEADER_SECTORS: u64 = 4;

const TREE_MAGIC: &[u8] = b"AB3B";
const TREE_HEADER: usize = 56;
const TREE_CHECKSUM_AT: usize = 52;
/// XFS_BTREE_MAXLEVELS.
const LEVEL_LIMIT: u16 = 9;
/// In which addresses of B-tree blocks are counted, whatever the disk's sectors are.
const BASIC_BLOCK: u64 = 512;

/// Appends the free blocks of a group, by numbers within the file system, in order.
pub(super) fn collect_free(
    part: &Part<'_>,
    superblock: &Superblock,
    group: u32,
    free: &mut Vec<Range<u64>>,
) -> Result<(), Stop> {
    let length = superblock.length_of(group);
    let at = superblock.start_of(group) * superblock.block_size + superblock.sector_size;
    let raw = part.read(at, superblock.sector_size as usize, "reading the header of a group")?;
    if !raw.starts_with(HEADER_MAGIC) || !has_checksum(&raw, HEADER_CHECKSUM_AT) {
        return doubt(format!("the checksum of the header of group {group} is wrong"));
    }
    let (root, level) = (raw.be32_at(16), raw.be32_at(28));
    let is_sound = raw.be32_at(4) == 1
        && raw.be32_at(8) == group
        && u64::from(raw.be32_at(12)) == length
        && raw.bytes(64) == superblock.meta_uuid
        && (1..=u32::from(LEVEL_LIMIT)).contains(&level);
    if !is_sound {
        return doubt(format!("the header of group {group} does not fit; run xfs_repair on it"));
    }
    let next = (HEADER_SECTORS * superblock.sector_size).div_ceil(superblock.block_size);
    let mut walk = Walk { part, superblock, group, length, next, longest: 0, total: 0, free };
    walk.node(root, level as u16 - 1, true)?;
    if (walk.total, walk.longest) != (raw.be32_at(52).into(), raw.be32_at(56).into()) {
        return doubt(format!(
            "group {group} has {} free blocks by its B-tree, but {} by its header",
            walk.total,
            raw.be32_at(52)
        ));
    }
    Ok(())
}

struct Walk<'a> {
    part: &'a Part<'a>,
    superblock: &'a Superblock,
    group: u32,
    length: u64,
    /// The first block of the group that may be free, after what was seen.
    next: u64,
    longest: u64,
    total: u64,
    free: &'a mut Vec<Range<u64>>,
}

impl Walk<'_> {
    /// One block of the tree and what is below. Ends, because levels fall, and every leaf but an only one adds blocks
    /// that lie behind all before.
    fn node(&mut self, number: u32, level: u16, is_root: bool) -> Result<(), Stop> {
        let raw = self.read(number, level)?;
        let (count, width) = (usize::from(raw.be16_at(6)), if level == 0 { 8 } else { 12 });
        let room = (raw.len() - TREE_HEADER) / width;
        // A full group has an empty tree.
        if count > room || (count == 0 && !(is_root && level == 0)) {
            return self.broken();
        }
        let mut entries = raw[TREE_HEADER..].chunks_exact(8).take(count);
        if level == 0 {
            return entries.try_for_each(|entry| self.extent(entry.be32_at(0), entry.be32_at(4)));
        }
        // Keys come first, as many as there is room for; each is where its child's first extent begins.
        let children = raw[TREE_HEADER + 8 * room..].chunks_exact(4);
        for (key, child) in entries.zip(children) {
            if u64::from(key.be32_at(0)) < self.next {
                return self.broken();
            }
            self.node(child.be32_at(0), level - 1, false)?;
        }
        Ok(())
    }

    fn read(&self, number: u32, level: u16) -> Result<Vec<u8>, Stop> {
        let size = self.superblock.block_size;
        if u64::from(number) >= self.length {
            return self.broken();
        }
        let at = (self.superblock.start_of(self.group) + u64::from(number)) * size;
        let raw = self.part.read(at, size as usize, "reading a B-tree of free space")?;
        if !raw.starts_with(TREE_MAGIC) || !has_checksum(&raw, TREE_CHECKSUM_AT) {
            return doubt(format!("the checksum of a B-tree of free space in group {} is wrong", self.group));
        }
        let is_own = raw.be16_at(4) == level
            && raw.be64_at(16) == at / BASIC_BLOCK
            && raw.bytes(32) == self.superblock.meta_uuid
            && raw.be32_at(48) == self.group;
        if is_own { Ok(raw) } else { self.broken() }
    }

    fn extent(&mut self, start: u32, count: u32) -> Result<(), Stop> {
        let (start, count) = (u64::from(start), u64::from(count));
        if start < self.next || count == 0 || start + count > self.length {
            return self.broken();
        }
        if self.free.len() == RANGE_LIMIT {
            return doubt("its free space is in too many pieces");
        }
        self.next = start + count;
        self.total += count;
        self.longest = self.longest.max(count);
        let first = self.superblock.start_of(self.group) + start;
        self.free.push(first..first + count);
        Ok(())
    }

    fn broken<T>(&self) -> Result<T, Stop> {
        doubt(format!("the B-tree of free space of group {} is broken; run xfs_repair on it", self.group))
    }
}
