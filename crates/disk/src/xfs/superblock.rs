//! The superblock: geometry, features, and where the log is.

use std::ops::Range;

use crate::checksum::crc32c;
use crate::read::{Fields, Part, Stop, doubt};

const VERSION: u16 = 5;
/// File types in directories, sparse inodes, an identity of its own for metadata, times beyond 2038, large counters of
/// extents, exchange of ranges, parent pointers. Not: needs repair, metadata directories, zones.
const INCOMPAT_KNOWN: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80;
const INCOMPAT_META_UUID: u32 = 0x4;
const INCOMPAT_NEEDS_REPAIR: u32 = 0x10;
/// B-trees of free inodes, of owners, and of shared blocks; counts of inode B-trees' blocks.
const RO_KNOWN: u32 = 0x1 | 0x2 | 0x4 | 0x8;
const CHECKSUM_AT: usize = 224;
/// XFS itself takes groups of at most 1 TiB, and this is a disk of as many: time is bounded.
const GROUP_LIMIT: u32 = 1 << 16;
/// XFS takes no larger log (XFS_MAX_LOG_BYTES).
const LOG_LIMIT: u64 = 2 << 30;

/// What the survey needs of it, checked against the part it lies in.
#[derive(Debug, Clone)]
pub(super) struct Superblock {
    pub block_size: u64,
    pub sector_size: u64,
    pub group_count: u32,
    pub label: Option<String>,
    /// The identity that people see, which is also the log's.
    pub uuid: [u8; 16],
    /// The one that metadata bears.
    pub meta_uuid: [u8; 16],
    block_count: u64,
    blocks_per_group: u64,
    log: Range<u64>,
}

impl Superblock {
    pub(super) fn read(part: &Part<'_>) -> Result<Superblock, Stop> {
        let head = part.read(0, 512, "reading a superblock")?;
        if head.be16_at(100) & 0xf != VERSION {
            return doubt("it is XFS without checksums (version 4), which is not looked into");
        }
        let sector_size = u64::from(head.be16_at(102));
        if !sector_size.is_power_of_two() || !(512..=32 << 10).contains(&sector_size) {
            return doubt("its superblock names an impossible sector size");
        }
        let raw = part.read(0, sector_size as usize, "reading a superblock")?;
        if !has_checksum(&raw, CHECKSUM_AT) {
            return doubt("the checksum of its superblock is wrong");
        }
        check_features(&raw)?;
        let uuid = raw.bytes(32);
        let superblock = Superblock {
            block_size: raw.be32_at(4).into(),
            sector_size,
            group_count: raw.be32_at(88),
            label: label_of(&raw[108..120]),
            uuid,
            meta_uuid: if raw.be32_at(216) & INCOMPAT_META_UUID == 0 { uuid } else { raw.bytes(248) },
            block_count: raw.be64_at(8),
            blocks_per_group: raw.be32_at(84).into(),
            log: 0..0,
        };
        superblock.check_geometry(part, raw[120])?;
        superblock.with_log(&raw)
    }

    fn check_geometry(&self, part: &Part<'_>, block_log: u8) -> Result<(), Stop> {
        let size = self.block_size;
        let is_sound = size.is_power_of_two()
            && (512..=64 << 10).contains(&size)
            && size.trailing_zeros() == u32::from(block_log)
            && self.sector_size <= size
            // XFS_MIN_AG_BYTES is far above what the headers of a group need.
            && self.blocks_per_group * size >= 1 << 20
            && self.block_count.checked_mul(size).is_some_and(|bytes| bytes <= part.len())
            && (1..=GROUP_LIMIT).contains(&self.group_count)
            && self.block_count.div_ceil(self.blocks_per_group) == u64::from(self.group_count);
        if is_sound {
            Ok(())
        } else {
            doubt("the geometry in its superblock is impossible on this disk (was the disk cut off?)")
        }
    }

    /// A block's number has the number of its group in front, and its place in the group in the last bits.
    fn with_log(self, raw: &[u8]) -> Result<Superblock, Stop> {
        let (start, bits, length) = (raw.be64_at(48), u32::from(raw[124]), u64::from(raw.be32_at(96)));
        if start == 0 {
            return doubt("its log is on another disk");
        }
        let Some((group, place)) = start.checked_shr(bits).map(|group| (group, start - (group << bits))) else {
            return doubt("its log has an impossible place");
        };
        let is_inside = group < u64::from(self.group_count)
            && length > 0
            && length * self.block_size <= LOG_LIMIT
            && place + length <= self.length_of(group as u32);
        if !is_inside {
            return doubt("its log has an impossible place");
        }
        let first = group * self.blocks_per_group + place;
        let log = first * self.block_size..(first + length) * self.block_size;
        Ok(Superblock { log, ..self })
    }

    /// The log's bytes of the part.
    pub(super) fn log_range(&self) -> Range<u64> {
        self.log.clone()
    }

    /// The first block of a group.
    pub(super) fn start_of(&self, group: u32) -> u64 {
        u64::from(group) * self.blocks_per_group
    }

    /// Blocks of a group; the last one may have fewer. `group` is less than the number of groups.
    pub(super) fn length_of(&self, group: u32) -> u64 {
        self.blocks_per_group.min(self.block_count - self.start_of(group))
    }
}

fn check_features(raw: &[u8]) -> Result<(), Stop> {
    let (ro_compat, incompat, log_incompat) = (raw.be32_at(212), raw.be32_at(216), raw.be32_at(220));
    if incompat & INCOMPAT_NEEDS_REPAIR != 0 || raw[126] != 0 {
        return doubt("it needs repair; run xfs_repair on it");
    }
    let unknown = (incompat & !INCOMPAT_KNOWN, ro_compat & !RO_KNOWN);
    if unknown != (0, 0) || log_incompat != 0 {
        return doubt(format!(
            "it has features not known here (incompat {:#x}, ro_compat {:#x}, log_incompat {log_incompat:#x})",
            unknown.0, unknown.1
        ));
    }
    if raw.be64_at(16) != 0 {
        return doubt("it has a realtime part, which is not looked into");
    }
    Ok(())
}

/// CRC-32C over a structure with zeros in place of the checksum itself, inverted, and little-endian unlike all else.
pub(super) fn has_checksum(raw: &[u8], at: usize) -> bool {
    let sum = [&raw[..at], &[0; 4], &raw[at + 4..]].into_iter().fold(!0, crc32c);
    !sum == raw.u32_at(at)
}

fn label_of(raw: &[u8]) -> Option<String> {
    let end = raw.iter().position(|byte| *byte == 0).unwrap_or(raw.len());
    Some(String::from_utf8_lossy(&raw[..end]).into_owned()).filter(|label| !label.is_empty())
}
