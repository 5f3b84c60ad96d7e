//! The partition table of PCs: four entries in the first sector, more in a chain of extended ones.
//! Layout: UEFI specification, section 5.2, and util-linux' libfdisk for the chain.

use std::ops::Range;

use crate::read::{Fields, Part, Stop, doubt};

pub(crate) const SECTOR: u64 = 512;
const TYPE_PROTECTIVE: u8 = 0xee;
const TYPES_EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// Linux itself stops at 256 partitions of one disk.
const LOGICAL_LIMIT: usize = 256;

/// One partition, in bytes of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Partition {
    pub number: u32,
    pub range: Range<u64>,
    pub label: Option<String>,
}

/// What a partition table says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Table {
    pub partitions: Vec<Partition>,
    /// Bytes of the disk that hold the table itself.
    pub own: Vec<Range<u64>>,
}

/// What the first sector is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FirstSector {
    /// Not a partition table.
    Other,
    /// It only protects a GPT.
    Protective,
    Mbr(Table),
}

struct Entry {
    kind: u8,
    start: u64,
    sectors: u64,
}

pub(crate) fn read(disk: &Part<'_>) -> Result<FirstSector, Stop> {
    if disk.len() < SECTOR {
        return Ok(FirstSector::Other);
    }
    let Some(entries) = read_entries(disk, 0)? else { return Ok(FirstSector::Other) };
    if entries.iter().any(|entry| entry.kind == TYPE_PROTECTIVE) {
        return Ok(FirstSector::Protective);
    }
    let mut table = Table { partitions: Vec::new(), own: vec![0..SECTOR] };
    for (number, entry) in (1..).zip(&entries) {
        if entry.kind == 0 {
            continue;
        }
        let range = byte_range(entry.start, entry.sectors)?;
        if entry.start == 0 || range.end > disk.len() {
            return doubt(format!("partition {number} of its table reaches outside of it"));
        }
        if TYPES_EXTENDED.contains(&entry.kind) {
            read_logical(disk, entry, &mut table)?;
        } else {
            table.partitions.push(Partition { number, range, label: None });
        }
    }
    // A boot sector of a file system ends with the same two bytes, but has nothing that looks like an entry.
    Ok(if table.partitions.is_empty() { FirstSector::Other } else { FirstSector::Mbr(table) })
}

/// The chain of extended boot records: each has one partition, relative to itself, and the place of the next record,
/// relative to the first.
fn read_logical(disk: &Part<'_>, extended: &Entry, table: &mut Table) -> Result<(), Stop> {
    let mut record = extended.start;
    for number in (5..).take(LOGICAL_LIMIT) {
        let own = byte_range(record, 1)?;
        if own.end > disk.len() {
            return doubt("its chain of logical partitions leads outside of it");
        }
        let Some(entries) = read_entries(disk, own.start)? else {
            return doubt("its chain of logical partitions is broken");
        };
        table.own.push(own);
        let [logical, next, ..] = &entries;
        if logical.kind != 0 {
            let range = byte_range(record.saturating_add(logical.start), logical.sectors)?;
            if range.end > disk.len() {
                return doubt(format!("logical partition {number} reaches outside of it"));
            }
            table.partitions.push(Partition { number, range, label: None });
        }
        if next.kind == 0 || next.sectors == 0 {
            return Ok(());
        }
        record = extended.start.saturating_add(next.start);
    }
    doubt(format!("its chain of logical partitions has more than {LOGICAL_LIMIT} links"))
}

/// `None` if the sector is no table.
fn read_entries(disk: &Part<'_>, offset: u64) -> Result<Option<[Entry; 4]>, Stop> {
    let sector = disk.read(offset, SECTOR as usize, "reading a partition table")?;
    let entry = |index: usize| &sector[446 + 16 * index..462 + 16 * index];
    let is_table = sector.u16_at(510) == 0xaa55 && (0..4).all(|index| entry(index)[0] & 0x7f == 0);
    Ok(is_table.then(|| {
        std::array::from_fn(|index| Entry {
            kind: if entry(index).u32_at(12) == 0 { 0 } else { entry(index)[4] },
            start: entry(index).u32_at(8).into(),
            sectors: entry(index).u32_at(12).into(),
        })
    }))
}

fn byte_range(start: u64, sectors: u64) -> Result<Range<u64>, Stop> {
    let end = start.checked_add(sectors).and_then(|end| end.checked_mul(SECTOR));
    match end {
        Some(end) => Ok(start * SECTOR..end),
        None => doubt("a partition has impossible bounds"),
    }
}
