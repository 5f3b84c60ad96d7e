//! The superblock: geometry, features, and whether the rest can be believed.

use std::ops::Range;

use crate::checksum::crc32c;
use crate::read::{Fields, Part, Stop, doubt};

const OFFSET: u64 = 1024;
const SIZE: usize = 1024;
const MAGIC: u16 = 0xef53;

const STATE_VALID: u16 = 1;

const COMPAT_HAS_JOURNAL: u32 = 0x4;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;

const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_EXTENTS: u32 = 0x40;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_FLEX_BG: u32 = 0x200;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;
/// Filetype, recover, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode, dirdata, csum_seed, largedir, inline_data,
/// encrypt, casefold: none of them changes what a bitmap means.
const INCOMPAT_KNOWN: u32 =
    0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x1000 | 0x2000 | 0x4000 | 0x8000 | 0x1_0000 | 0x2_0000;

const RO_SPARSE_SUPER: u32 = 0x1;
const RO_HUGE_FILE: u32 = 0x8;
const RO_GDT_CSUM: u32 = 0x10;
const RO_BIGALLOC: u32 = 0x200;
const RO_METADATA_CSUM: u32 = 0x400;
const RO_ORPHAN_PRESENT: u32 = 0x1_0000;
/// Sparse_super, large_file, huge_file, gdt_csum, dir_nlink, extra_isize, quota, metadata_csum, read-only, project,
/// verity. Not: snapshots, replicas, blocks shared between files.
const RO_KNOWN: u32 = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x400 | 0x1000 | 0x2000 | 0x8000;

/// What the survey needs of it, checked against the part it lies in.
#[derive(Debug, Clone)]
pub(super) struct Superblock {
    pub block_size: u64,
    pub block_count: u64,
    pub first_block: u64,
    pub blocks_per_group: u64,
    pub inodes_per_group: u32,
    pub inode_count: u32,
    pub inode_size: u16,
    pub descriptor_size: usize,
    pub first_meta_group: u64,
    pub journal_inode: u32,
    pub journal_device: u32,
    pub uuid: [u8; 16],
    backup_groups: [u32; 2],
    compat: u32,
    incompat: u32,
    ro_compat: u32,
    state: u16,
    last_orphan: u32,
    checksum_seed: u32,
    label: Vec<u8>,
}

/// How group descriptors prove themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Checksums {
    None,
    Crc16,
    Crc32c { seed: u32 },
}

pub(crate) fn has_magic(part: &Part<'_>) -> Result<bool, Stop> {
    if part.len() < OFFSET + SIZE as u64 {
        return Ok(false);
    }
    Ok(part.read(OFFSET + 0x38, 2, "looking for a superblock")?.u16_at(0) == MAGIC)
}

impl Superblock {
    pub(super) fn read(part: &Part<'_>) -> Result<Superblock, Stop> {
        let raw = part.read(OFFSET, SIZE, "reading a superblock")?;
        let is_old = raw.u32_at(0x4c) == 0;
        let uuid = raw.bytes(0x68);
        let (compat, incompat, ro_compat) = (raw.u32_at(0x5c), raw.u32_at(0x60), raw.u32_at(0x64));
        let has_64bit = incompat & INCOMPAT_64BIT != 0;
        let high_count = if has_64bit { u64::from(raw.u32_at(0x150)) } else { 0 };
        let log_block_size = raw.u32_at(0x18);
        if log_block_size > 6 {
            return doubt("its superblock names an impossible block size");
        }
        let superblock = Superblock {
            block_size: 1024 << log_block_size,
            block_count: high_count << 32 | u64::from(raw.u32_at(0x4)),
            first_block: raw.u32_at(0x14).into(),
            blocks_per_group: raw.u32_at(0x20).into(),
            inodes_per_group: raw.u32_at(0x28),
            inode_count: raw.u32_at(0),
            inode_size: if is_old { 128 } else { raw.u16_at(0x58) },
            descriptor_size: if has_64bit { raw.u16_at(0xfe).into() } else { 32 },
            first_meta_group: if incompat & INCOMPAT_META_BG == 0 { u64::MAX } else { raw.u32_at(0x104).into() },
            journal_inode: if compat & COMPAT_HAS_JOURNAL == 0 { 0 } else { raw.u32_at(0xe0) },
            journal_device: raw.u32_at(0xe4),
            uuid,
            backup_groups: [raw.u32_at(0x24c), raw.u32_at(0x250)],
            compat,
            incompat,
            ro_compat,
            state: raw.u16_at(0x3a),
            last_orphan: raw.u32_at(0xe8),
            checksum_seed: if incompat & INCOMPAT_CSUM_SEED == 0 { crc32c(!0, &uuid) } else { raw.u32_at(0x270) },
            label: raw[0x78..0x88].to_vec(),
        };
        superblock.check_checksum(&raw)?;
        superblock.check_geometry(part)?;
        Ok(superblock)
    }

    fn check_checksum(&self, raw: &[u8]) -> Result<(), Stop> {
        if self.ro_compat & RO_METADATA_CSUM == 0 {
            return Ok(());
        }
        // Type 1 is CRC-32C, the only one defined.
        if raw[0x175] != 1 || crc32c(!0, &raw[..0x3fc]) != raw.u32_at(0x3fc) {
            return doubt("the checksum of its superblock is wrong");
        }
        Ok(())
    }

    fn check_geometry(&self, part: &Part<'_>) -> Result<(), Stop> {
        let unknown = (self.incompat & !INCOMPAT_KNOWN, self.ro_compat & !(RO_KNOWN | RO_ORPHAN_PRESENT));
        if self.ro_compat & RO_BIGALLOC != 0 {
            return doubt("it allocates in clusters (bigalloc), which is not looked into");
        }
        if unknown != (0, 0) {
            return doubt(format!(
                "it has features not known here (incompat {:#x}, ro_compat {:#x})",
                unknown.0, unknown.1
            ));
        }
        let size = self.block_size;
        let fits = self.block_count.checked_mul(size).is_some_and(|bytes| bytes <= part.len());
        let bits = 8 * size;
        let is_sound = fits
            && self.first_block == u64::from(size == 1024)
            && self.block_count > self.first_block + 1
            // mke2fs makes no smaller groups; and a bitmap has one block.
            && (256..=bits).contains(&self.blocks_per_group)
            && self.blocks_per_group.is_multiple_of(8)
            && self.inodes_per_group > 0
            && u64::from(self.inodes_per_group) <= bits
            && (128..=size).contains(&self.inode_size.into())
            && self.inode_size.is_power_of_two()
            && (32..=1024).contains(&self.descriptor_size)
            && self.descriptor_size.is_power_of_two()
            && (self.incompat & INCOMPAT_64BIT == 0 || self.descriptor_size >= 64);
        if is_sound {
            Ok(())
        } else {
            doubt("the geometry in its superblock is impossible on this disk (was the disk cut off?)")
        }
    }

    /// Whether the file system says itself that all is written.
    pub(super) fn check_clean(&self) -> Result<(), Stop> {
        if self.incompat & INCOMPAT_RECOVER != 0 {
            return doubt(
                "it needs recovery: it was not cleanly unmounted; start the machine once and shut it down, or run fsck",
            );
        }
        if self.state != STATE_VALID {
            return doubt("it was not cleanly unmounted or has known errors; run fsck on it");
        }
        if self.last_orphan != 0 || self.ro_compat & RO_ORPHAN_PRESENT != 0 {
            return doubt(
                "it has deleted files that still hold blocks; start the machine once and shut it down, or run fsck",
            );
        }
        Ok(())
    }

    pub(super) fn name(&self) -> &'static str {
        let newer = INCOMPAT_EXTENTS | INCOMPAT_64BIT | INCOMPAT_FLEX_BG;
        let newer_ro = RO_HUGE_FILE | RO_GDT_CSUM | RO_METADATA_CSUM;
        match (self.incompat & newer != 0 || self.ro_compat & newer_ro != 0, self.compat & COMPAT_HAS_JOURNAL != 0) {
            (true, _) => "ext4",
            (false, true) => "ext3",
            (false, false) => "ext2",
        }
    }

    pub(super) fn label(&self) -> Option<String> {
        let end = self.label.iter().position(|byte| *byte == 0).unwrap_or(self.label.len());
        Some(String::from_utf8_lossy(&self.label[..end]).into_owned()).filter(|label| !label.is_empty())
    }

    pub(super) fn group_count(&self) -> u64 {
        (self.block_count - self.first_block).div_ceil(self.blocks_per_group)
    }

    pub(super) fn blocks_of_group(&self, group: u64) -> Range<u64> {
        let start = self.first_block + group * self.blocks_per_group;
        start..(start + self.blocks_per_group).min(self.block_count)
    }

    /// Whether a group begins with a copy of the superblock.
    pub(super) fn has_copy(&self, group: u64) -> bool {
        if self.compat & COMPAT_SPARSE_SUPER2 != 0 {
            return group == 0 || self.backup_groups.iter().any(|backup| u64::from(*backup) == group);
        }
        let is_power_of = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        self.ro_compat & RO_SPARSE_SUPER == 0 || group <= 1 || [3, 5, 7].into_iter().any(is_power_of)
    }

    pub(super) fn checksums(&self) -> Checksums {
        if self.ro_compat & RO_METADATA_CSUM != 0 {
            Checksums::Crc32c { seed: self.checksum_seed }
        } else if self.ro_compat & RO_GDT_CSUM != 0 {
            Checksums::Crc16
        } else {
            Checksums::None
        }
    }
}
