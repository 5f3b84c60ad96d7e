//! Block group descriptors: where each group's bitmap is, and what should be in it.

use super::FileSystem;
use super::superblock::{Checksums, Superblock};
use crate::checksum::{crc16, crc32c};
use crate::read::{Fields, Stop, doubt};

const FLAG_BLOCK_UNINITIALISED: u16 = 2;
/// Where a descriptor's own checksum lies in it.
const CHECKSUM_AT: usize = 0x1e;

/// One group.
#[derive(Debug, Clone)]
pub(super) struct Descriptor {
    pub block_bitmap: u64,
    pub inode_table: u64,
    pub free_blocks: u64,
    pub is_block_uninitialised: bool,
    /// Checksum of the block bitmap, and how many of its bits are kept.
    bitmap_checksum: (u32, u32),
}

/// Reads descriptors, a block of them at a time.
pub(super) struct Descriptors<'a> {
    system: &'a FileSystem<'a>,
    cached: Option<(u64, Vec<u8>)>,
}

impl<'a> Descriptors<'a> {
    pub(super) fn new(system: &'a FileSystem<'a>) -> Descriptors<'a> {
        Descriptors { system, cached: None }
    }

    /// `group` is less than the number of groups.
    pub(super) fn get(&mut self, group: u64) -> Result<Descriptor, Stop> {
        let superblock = &self.system.superblock;
        let per_block = superblock.block_size / superblock.descriptor_size as u64;
        let (index, place) = (group / per_block, (group % per_block) as usize * superblock.descriptor_size);
        let block = match self.cached.take() {
            Some((cached, block)) if cached == index => block,
            _ => self.system.read_blocks(location(superblock, index, per_block), 1, "reading group descriptors")?,
        };
        let descriptor = parse(superblock, group, &block[place..place + superblock.descriptor_size]);
        self.cached = Some((index, block));
        descriptor
    }
}

/// The block that holds the `index`th block of descriptors (Linux, `descriptor_loc` in fs/ext4/super.c).
fn location(superblock: &Superblock, index: u64, per_block: u64) -> u64 {
    if index < superblock.first_meta_group {
        return superblock.first_block + 1 + index;
    }
    let group = index * per_block;
    superblock.blocks_of_group(group).start + u64::from(superblock.has_copy(group))
}

fn parse(superblock: &Superblock, group: u64, raw: &[u8]) -> Result<Descriptor, Stop> {
    let is_right = match superblock.checksums() {
        Checksums::None => true,
        Checksums::Crc16 => sum_crc16(superblock, group, raw) == raw.u16_at(CHECKSUM_AT),
        Checksums::Crc32c { seed } => {
            let mut zeroed = raw.to_vec();
            zeroed[CHECKSUM_AT..CHECKSUM_AT + 2].fill(0);
            let sum = crc32c(crc32c(seed, &(group as u32).to_le_bytes()), &zeroed);
            sum as u16 == raw.u16_at(CHECKSUM_AT)
        }
    };
    if !is_right {
        return doubt(format!("the checksum of the descriptor of group {group} is wrong"));
    }
    let is_wide = raw.len() >= 64;
    let wide = |low: usize, high: usize| {
        u64::from(raw.u32_at(low)) | if is_wide { u64::from(raw.u32_at(high)) << 32 } else { 0 }
    };
    let halves = |low: usize, high: usize| {
        u32::from(raw.u16_at(low)) | if is_wide { u32::from(raw.u16_at(high)) << 16 } else { 0 }
    };
    Ok(Descriptor {
        block_bitmap: wide(0, 0x20),
        inode_table: wide(0x8, 0x28),
        free_blocks: halves(0xc, 0x2c).into(),
        is_block_uninitialised: raw.u16_at(0x12) & FLAG_BLOCK_UNINITIALISED != 0,
        bitmap_checksum: (halves(0x18, 0x38), if is_wide { u32::MAX } else { 0xffff }),
    })
}

/// Over the file system's identity, the group's number, and the descriptor without the checksum itself.
fn sum_crc16(superblock: &Superblock, group: u64, raw: &[u8]) -> u16 {
    let sum = crc16(crc16(!0, &superblock.uuid), &(group as u32).to_le_bytes());
    let sum = crc16(sum, &raw[..CHECKSUM_AT]);
    if raw.len() > 32 { crc16(sum, &raw[CHECKSUM_AT + 2..]) } else { sum }
}

impl Descriptor {
    /// Older file systems keep no checksum of bitmaps; for them everything agrees.
    pub(super) fn agrees_with_bitmap(&self, superblock: &Superblock, bitmap: &[u8]) -> bool {
        match superblock.checksums() {
            Checksums::None | Checksums::Crc16 => true,
            Checksums::Crc32c { seed } => {
                let summed = &bitmap[..(superblock.blocks_per_group / 8) as usize];
                crc32c(seed, summed) & self.bitmap_checksum.1 == self.bitmap_checksum.0
            }
        }
    }
}
