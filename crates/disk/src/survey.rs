//! The survey of a whole disk: which file systems there are, and what of the disk none of them needs.

use std::io;
use std::ops::Range;

use crate::mbr::{FirstSector, Partition, Table};
use crate::read::{Part, ReadAt, Stop, doubt};
use crate::{ext4, fat, gpt, mbr, ranges, signature, swap, xfs};

/// Unused ranges are whole blocks of this many bytes, counted from the start of the disk: the unit of images.
pub const BLOCK: u64 = 4096;

/// What was found on a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// Bytes whose content no file system needs, so that they may be read as zeros: sorted, disjoint, of whole
    /// [`BLOCK`]s.
    pub unused: Vec<Range<u64>>,
    /// Partition tables and what the partitions hold, in the order of the disk's table.
    pub found: Vec<Found>,
    /// Sentences for the maker: what could not be looked into, and why.
    pub notes: Vec<String>,
}

/// Something with a name on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// `mbr`, `gpt`, `ext2`, `ext3`, `ext4`, `vfat` (FAT of any width), `swap`, `xfs`, a format that is not looked into
    /// (`btrfs`, `lvm`, ...), or `unknown`.
    pub what: &'static str,
    /// Where, in bytes of the disk.
    pub range: Range<u64>,
    /// Number of the partition; `None` for the whole disk.
    pub partition: Option<u32>,
    /// The file system's label, else the partition's.
    pub label: Option<String>,
}

/// The disk could not be read.
#[derive(Debug, thiserror::Error)]
#[error(
    "{doing} failed: {length} bytes at offset {offset} could not be read: {source}; check the image file and the disk that it is on"
)]
pub struct DiskError {
    /// What was attempted.
    pub doing: &'static str,
    /// Where, in bytes of the disk.
    pub offset: u64,
    /// How many bytes.
    pub length: usize,
    /// The system's own words.
    pub source: io::Error,
}

/// Surveys a raw disk. Reads some 4 KiB for every 128 MiB of it, the tables and directories of a FAT and the log of XFS
/// (both bounded), and little more.
pub fn unused(disk: &dyn ReadAt) -> Result<Survey, DiskError> {
    let mut survey = Survey::default();
    let whole = Part::whole(disk);
    match table_of(&whole, &mut survey) {
        Ok(None) => survey.look_into(&whole, None)?,
        Ok(Some(table)) => {
            for partition in &table.partitions {
                survey.look_into(&Part::of(disk, partition.range.clone()), Some(partition))?;
            }
            survey.protect(&table);
        }
        Err(Stop::Disk(error)) => return Err(error),
        Err(Stop::Doubt(reason)) => {
            survey.notes.push(format!("Nothing of the disk is taken for unused, because {reason}."))
        }
    }
    survey.unused = ranges::aligned(ranges::normalise(survey.unused), BLOCK);
    Ok(survey)
}

/// The partition table, if there is one.
fn table_of(whole: &Part<'_>, survey: &mut Survey) -> Result<Option<Table>, Stop> {
    let (what, table) = match mbr::read(whole)? {
        FirstSector::Other => return Ok(None),
        FirstSector::Protective => ("gpt", gpt::read(whole)?),
        FirstSector::Mbr(table) => ("mbr", table),
    };
    // As on a hybrid of a CD and a disk, where a partition is a file of the CD as well.
    if let Some(name) = signature::marks(whole)?.first() {
        return doubt(format!("it has both a partition table and {name} over the whole disk"));
    }
    survey.found.push(Found { what, range: whole.range(), partition: None, label: None });
    Ok(Some(table))
}

impl Survey {
    /// Looks into one partition, or the whole disk.
    fn look_into(&mut self, part: &Part<'_>, partition: Option<&Partition>) -> Result<(), DiskError> {
        let place = partition.map_or("the disk".to_owned(), |partition| format!("partition {}", partition.number));
        let mut found = Found {
            what: "unknown",
            range: part.range(),
            partition: partition.map(|partition| partition.number),
            label: partition.and_then(|partition| partition.label.clone()),
        };
        let result = identify(part, &mut found, &place, &mut self.notes);
        self.found.push(found);
        match result {
            Ok(unused) => self.unused.extend(unused),
            Err(Stop::Disk(error)) => return Err(error),
            Err(Stop::Doubt(reason)) => {
                self.notes.push(format!("Nothing of {place} is taken for unused, because {reason}."))
            }
        }
        Ok(())
    }

    /// Takes back what lies in the table itself, or in more than one partition: a file system whose free space
    /// another one uses knows nothing of that.
    fn protect(&mut self, table: &Table) {
        let mut sorted: Vec<Range<u64>> = table.partitions.iter().map(|partition| partition.range.clone()).collect();
        sorted.sort_unstable_by_key(|range| range.start);
        let mut needed = table.own.clone();
        let mut reached = 0;
        for range in sorted {
            if range.start < reached {
                needed.push(range.start..reached.min(range.end));
            }
            reached = reached.max(range.end);
        }
        if needed.len() > table.own.len() {
            self.notes.push("Partitions overlap; what they share is not taken for unused.".into());
        }
        let free = ranges::normalise(std::mem::take(&mut self.unused));
        self.unused = ranges::subtract(free, &ranges::normalise(needed));
    }
}

/// Names what a part holds, and returns its unused bytes (of the disk).
fn identify(part: &Part<'_>, found: &mut Found, place: &str, notes: &mut Vec<String>) -> Result<Vec<Range<u64>>, Stop> {
    let marks = signature::marks(part)?;
    let name = match marks[..] {
        [] => return doubt("no known file system was found on it"),
        [name] => name,
        [name, other, ..] => {
            found.what = name;
            return doubt(format!("it bears the marks of both {name} and {other}"));
        }
    };
    found.what = name;
    let unused = match name {
        "ext4" => {
            let system = ext4::open(part)?;
            found.what = system.name();
            found.label = system.label().or(found.label.take());
            system.unused(|note| notes.push(format!("Of {place}: {note}.")))?
        }
        "vfat" => {
            let system = fat::open(part)?;
            found.label = system.label().or(found.label.take());
            system.unused()?
        }
        "swap" => {
            let Some(space) = swap::find(part)? else { return Ok(Vec::new()) };
            found.label = space.label().or(found.label.take());
            space.unused()?
        }
        "xfs" => {
            let system = xfs::open(part)?;
            found.label = system.label().or(found.label.take());
            system.unused()?
        }
        "btrfs" => {
            return doubt(format!(
                "it holds {name}, which is not looked into; run fstrim in it before it is shut down, on a disk that takes discards, so that free space becomes zeros"
            ));
        }
        _ => return doubt(format!("it holds {name}, which is not looked into")),
    };
    let start = part.range().start;
    Ok(unused.into_iter().map(|range| range.start + start..range.end + start).collect())
}
