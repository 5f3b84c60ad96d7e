//! Where the blocks of one file are: through extents, or through the older map of indirect blocks.

use std::ops::Range;

use super::FileSystem;
use super::groups::Descriptors;
use super::superblock::Checksums;
use crate::checksum::crc32c;
use crate::read::{Fields, Stop, doubt};

const TYPE_REGULAR: u16 = 0x8;
const FLAG_EXTENTS: u32 = 0x8_0000;
const EXTENT_MAGIC: u16 = 0xf30a;
/// Linux' own limit (EXT4_MAX_EXTENT_DEPTH).
const DEPTH_LIMIT: u16 = 5;
/// Blocks of an extent tree that are read; a journal's tree has a handful.
const NODE_LIMIT: usize = 4096;
const DIRECT: usize = 12;

/// A regular file's inode.
pub(super) struct Inode {
    raw: Vec<u8>,
    /// Of what hangs on this inode, where there are checksums.
    seed: Option<u32>,
}

/// The blocks of a file, in the order of the file, without holes.
pub(super) type Blocks = Vec<Range<u64>>;

impl Inode {
    pub(super) fn read(system: &FileSystem<'_>, number: u32) -> Result<Inode, Stop> {
        let superblock = &system.superblock;
        if number == 0 || number > superblock.inode_count {
            return doubt(format!("it has no inode {number}"));
        }
        let index = number - 1;
        let group = u64::from(index / superblock.inodes_per_group);
        if group >= superblock.group_count() {
            return doubt(format!("inode {number} lies beyond its last group"));
        }
        let table = Descriptors::new(system).get(group)?.inode_table;
        let offset = u64::from(index % superblock.inodes_per_group) * u64::from(superblock.inode_size);
        let first = table.saturating_add(offset / superblock.block_size);
        let block = system.read_blocks(first, 1, "reading an inode")?;
        let place = (offset % superblock.block_size) as usize;
        let raw = block[place..place + usize::from(superblock.inode_size)].to_vec();
        let seed = match superblock.checksums() {
            Checksums::Crc32c { seed } => Some(check_checksum(number, &raw, seed)?),
            _ => None,
        };
        if raw.u16_at(0) >> 12 != TYPE_REGULAR || raw.u16_at(0x1a) == 0 {
            return doubt(format!("inode {number} is no regular file"));
        }
        Ok(Inode { raw, seed })
    }

    /// Length in bytes.
    pub(super) fn size(&self) -> u64 {
        u64::from(self.raw.u32_at(0x6c)) << 32 | u64::from(self.raw.u32_at(0x4))
    }

    /// All `count` blocks of the file; a hole is a doubt. `count` is bounded by the file system's size.
    pub(super) fn blocks(&self, system: &FileSystem<'_>, count: u64) -> Result<Blocks, Stop> {
        let root = &self.raw[0x28..0x64];
        let mut walk = Walk { system, inode: self, count, nodes: 0, next: 0, blocks: Vec::new() };
        if self.raw.u32_at(0x20) & FLAG_EXTENTS != 0 {
            walk.extents(root, None)?;
        } else {
            walk.map(root)?;
        }
        if walk.next < count { doubt("a file that must have all its blocks has holes") } else { Ok(walk.blocks) }
    }
}

/// Returns the seed for what hangs on the inode.
fn check_checksum(number: u32, raw: &[u8], seed: u32) -> Result<u32, Stop> {
    let seed = crc32c(crc32c(seed, &number.to_le_bytes()), &raw.bytes::<4>(0x64));
    let has_high_half = raw.len() > 128 && raw.u16_at(0x80) >= 4;
    let mut zeroed = raw.to_vec();
    zeroed[0x7c..0x7e].fill(0);
    let mut expected = u32::from(raw.u16_at(0x7c));
    if has_high_half {
        zeroed[0x82..0x84].fill(0);
        expected |= u32::from(raw.u16_at(0x82)) << 16;
    }
    let mask = if has_high_half { u32::MAX } else { 0xffff };
    if crc32c(seed, &zeroed) & mask != expected {
        return doubt(format!("the checksum of inode {number} is wrong"));
    }
    Ok(seed)
}

struct Walk<'a> {
    system: &'a FileSystem<'a>,
    inode: &'a Inode,
    count: u64,
    nodes: usize,
    /// The next block of the file that is expected.
    next: u64,
    blocks: Blocks,
}

impl Walk<'_> {
    fn push(&mut self, physical: Range<u64>) -> Result<(), Stop> {
        if physical.start <= self.system.superblock.first_block || physical.end > self.system.superblock.block_count {
            return doubt("a file has blocks outside of its file system");
        }
        self.next += physical.end - physical.start;
        match self.blocks.last_mut() {
            Some(last) if last.end == physical.start => last.end = physical.end,
            _ => self.blocks.push(physical),
        }
        Ok(())
    }

    /// One node of the tree; `depth` is what its parent says it must have.
    fn extents(&mut self, node: &[u8], depth: Option<u16>) -> Result<(), Stop> {
        let (entries, own_depth) = (usize::from(node.u16_at(2)), node.u16_at(6));
        let has_room = 12 * (entries + 1) <= node.len();
        if node.u16_at(0) != EXTENT_MAGIC
            || !has_room
            || own_depth > DEPTH_LIMIT
            || depth.is_some_and(|depth| depth != own_depth)
        {
            return doubt("an extent tree in it is broken");
        }
        for entry in node[12..].chunks_exact(12).take(entries) {
            if self.next >= self.count {
                return Ok(());
            }
            if own_depth == 0 {
                self.leaf(entry)?;
            } else {
                self.child(entry, own_depth - 1)?;
            }
        }
        Ok(())
    }

    fn leaf(&mut self, entry: &[u8]) -> Result<(), Stop> {
        let (logical, length) = (u64::from(entry.u32_at(0)), u64::from(entry.u16_at(4)));
        // Longer than 32768 marks blocks that were reserved but never written.
        if logical != self.next || length == 0 || length > 32768 {
            return doubt("an extent in it is out of order");
        }
        let start = u64::from(entry.u16_at(6)) << 32 | u64::from(entry.u32_at(8));
        let length = length.min(self.count - self.next);
        self.push(start..start + length)
    }

    fn child(&mut self, entry: &[u8], depth: u16) -> Result<(), Stop> {
        self.visit()?;
        let number = u64::from(entry.u16_at(8)) << 32 | u64::from(entry.u32_at(4));
        let block = self.system.read_blocks(number, 1, "reading an extent tree")?;
        if let Some(seed) = self.inode.seed {
            let tail = 12 * (usize::from(block.u16_at(4)) + 1);
            if tail + 4 > block.len() || crc32c(seed, &block[..tail]) != block.u32_at(tail) {
                return doubt("the checksum of an extent tree is wrong");
            }
        }
        self.extents(&block, Some(depth))
    }

    /// Twelve direct blocks, then one, two and three levels of indirect ones.
    fn map(&mut self, root: &[u8]) -> Result<(), Stop> {
        for index in 0..DIRECT + 3 {
            let levels = index.saturating_sub(DIRECT - 1);
            self.mapped(u64::from(root.u32_at(4 * index)), levels)?;
        }
        Ok(())
    }

    fn mapped(&mut self, number: u64, levels: usize) -> Result<(), Stop> {
        if self.next >= self.count {
            return Ok(());
        }
        if levels == 0 {
            // Block 0 is a hole, and outside of what `push` accepts.
            return self.push(number..number + 1);
        }
        self.visit()?;
        let block = self.system.read_blocks(number, 1, "reading an indirect block")?;
        block.chunks_exact(4).try_for_each(|entry| self.mapped(u64::from(entry.u32_at(0)), levels - 1))
    }

    fn visit(&mut self) -> Result<(), Stop> {
        self.nodes += 1;
        // Every indirect block but the outermost few leads to blocks of the file, so their number is bounded too.
        let limit = NODE_LIMIT + (self.count / (self.system.superblock.block_size / 4)) as usize;
        if self.nodes > limit { doubt("a file's map has too many blocks") } else { Ok(()) }
    }
}
