//! The boot sector: where the tables, the root directory and the clusters are, and how wide a table's entry is.

use std::ops::Range;

use crate::read::{Fields, Part, Stop, doubt};

const SIZE: usize = 512;
/// The specification's bounds between the kinds, by count of clusters.
const FEWEST_FAT16: u64 = 4085;
const FEWEST_FAT32: u64 = 65525;
/// The specification itself warns that programs are off by up to this much about the bounds.
const UNSURE: u64 = 16;
/// Numbers of 28 bits, the last of which are marks.
const MOST_FAT32: u64 = 0x0fff_fff0;
/// A table of this size has 8 million clusters of FAT32: memory is bounded whatever the disk says.
const TABLE_LIMIT: u64 = 32 << 20;
/// Linux takes no larger clusters; the specification advises half of it.
const CLUSTER_LIMIT: u64 = 64 << 10;
/// What `mkfs.fat` and Windows write where no label was given.
const NO_LABEL: &str = "NO NAME";

/// Width of a table's entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Fat12,
    Fat16,
    Fat32,
}

/// Where the root directory is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Root {
    /// Bytes of the part, before the clusters.
    Fixed(Range<u64>),
    /// The first cluster of a chain.
    Chain(u32),
}

/// What the boot sector says, checked against the part it lies in; in bytes of the part.
#[derive(Debug, Clone)]
pub(super) struct Geometry {
    pub kind: Kind,
    /// Where the copies of the table begin, each with `table_size` bytes, of which the entries need `entry_bytes`.
    pub tables: Vec<u64>,
    pub entry_bytes: usize,
    pub root: Root,
    pub cluster_size: u64,
    pub cluster_count: u32,
    pub label: Option<String>,
    pub media: u8,
    first_cluster_at: u64,
    state: u8,
}

/// The fields as they are on the disk, in sectors.
struct Raw {
    sector: u64,
    per_cluster: u64,
    reserved: u64,
    copies: u64,
    root_entries: u64,
    total: u64,
    table: u64,
    is_fat32: bool,
}

impl Raw {
    fn of(boot: &[u8]) -> Result<Raw, Stop> {
        let (short, long) = (u64::from(boot.u16_at(19)), u64::from(boot.u32_at(32)));
        if short != 0 && long != 0 && short != long {
            return doubt("its boot sector has two different sizes for it");
        }
        // Linux, Windows and the firmware all take it for FAT32 if there is no short size of the table, and never
        // because of the count of clusters, which mkfs.fat -F 32 makes smaller than the specification allows. Those who go
        // by the count (mtools) refuse such a volume, so nobody reads it as another kind.
        let is_fat32 = boot.u16_at(22) == 0;
        Ok(Raw {
            sector: boot.u16_at(11).into(),
            per_cluster: boot[13].into(),
            reserved: boot.u16_at(14).into(),
            copies: boot[16].into(),
            root_entries: boot.u16_at(17).into(),
            total: if short != 0 { short } else { long },
            table: if is_fat32 { boot.u32_at(36).into() } else { boot.u16_at(22).into() },
            is_fat32,
        })
    }

    fn is_sound(&self, part: &Part<'_>) -> bool {
        self.sector.is_power_of_two()
            && (512..=4096).contains(&self.sector)
            && self.per_cluster.is_power_of_two()
            && self.sector * self.per_cluster <= CLUSTER_LIMIT
            && self.reserved > 0
            && (1..=2).contains(&self.copies)
            && self.table > 0
            && (self.root_entries * 32).is_multiple_of(self.sector)
            && (self.root_entries == 0) == self.is_fat32
            && self.total * self.sector <= part.len()
            && self.first_cluster() < self.total
    }

    fn root(&self) -> u64 {
        self.reserved + self.copies * self.table
    }

    fn first_cluster(&self) -> u64 {
        self.root() + self.root_entries * 32 / self.sector
    }
}

impl Geometry {
    pub(super) fn read(part: &Part<'_>) -> Result<Geometry, Stop> {
        let boot = part.read(0, SIZE, "reading a boot sector")?;
        let raw = Raw::of(&boot)?;
        let media = boot[21];
        if boot.u16_at(510) != 0xaa55 || !raw.is_sound(part) || !(media == 0xf0 || media >= 0xf8) {
            return doubt("the geometry in its boot sector is impossible on this disk (was the disk cut off?)");
        }
        let cluster_count = (raw.total - raw.first_cluster()) / raw.per_cluster;
        let kind = kind_of(&boot, &raw, cluster_count)?;
        let entry_bytes = kind.bytes_of(cluster_count + 2);
        if entry_bytes > raw.table * raw.sector {
            return doubt("its table is too short for its clusters");
        }
        if entry_bytes > TABLE_LIMIT {
            return doubt(format!("its table is larger than {} MiB", TABLE_LIMIT >> 20));
        }
        let in_bytes = |sectors: u64| sectors * raw.sector;
        let is_fat32 = kind == Kind::Fat32;
        let root = match is_fat32 {
            true => Root::Chain(boot.u32_at(44)),
            false => Root::Fixed(in_bytes(raw.root())..in_bytes(raw.first_cluster())),
        };
        let extended = if is_fat32 { 64 } else { 36 };
        Ok(Geometry {
            kind,
            tables: (0..raw.copies).map(|copy| in_bytes(raw.reserved + copy * raw.table)).collect(),
            entry_bytes: entry_bytes as usize,
            root,
            cluster_size: in_bytes(raw.per_cluster),
            cluster_count: cluster_count as u32,
            label: label_of(&boot[extended..]),
            media,
            first_cluster_at: in_bytes(raw.first_cluster()),
            state: boot[extended + 1],
        })
    }

    /// Whether the boot sector says that it was unmounted; the table has marks of its own.
    pub(super) fn check_clean(&self) -> Result<(), Stop> {
        if self.state == 0 {
            return Ok(());
        }
        doubt("it was not cleanly unmounted or has known errors; run fsck.fat on it")
    }

    /// Where a cluster, or the end of the one before it, is.
    pub(super) fn offset_of(&self, cluster: u32) -> u64 {
        self.first_cluster_at + u64::from(cluster - 2) * self.cluster_size
    }
}

fn kind_of(boot: &[u8], raw: &Raw, clusters: u64) -> Result<Kind, Stop> {
    let kind = match clusters {
        _ if raw.is_fat32 => Kind::Fat32,
        ..FEWEST_FAT16 => Kind::Fat12,
        _ => Kind::Fat16,
    };
    let is_unsure = match kind {
        Kind::Fat32 => clusters > MOST_FAT32,
        _ => clusters.abs_diff(FEWEST_FAT16) < UNSURE || clusters + UNSURE > FEWEST_FAT32,
    };
    let name = match kind {
        Kind::Fat12 => &boot[54..62] == b"FAT12   ",
        Kind::Fat16 => &boot[54..62] == b"FAT16   ",
        Kind::Fat32 => &boot[82..90] == b"FAT32   ",
    };
    if clusters == 0 || is_unsure || !name {
        return doubt(format!("its {clusters} clusters do not fit the kind of FAT that it names"));
    }
    // Flags: bit 7 says that one copy of the table is in use and the others are not kept. And no version but 0 exists.
    if kind == Kind::Fat32 && (boot.u16_at(40) & 0x80 != 0 || boot.u16_at(42) != 0) {
        return doubt("it does not keep all copies of its table, or is of a version not known here");
    }
    Ok(kind)
}

impl Kind {
    fn bytes_of(self, entries: u64) -> u64 {
        match self {
            Kind::Fat12 => (entries * 3).div_ceil(2),
            Kind::Fat16 => entries * 2,
            Kind::Fat32 => entries * 4,
        }
    }
}

/// Of the fields that begin with the drive's number; they count only behind their signature.
fn label_of(extended: &[u8]) -> Option<String> {
    let label = String::from_utf8_lossy(&extended[7..18]).trim_end_matches([' ', '\0']).to_owned();
    Some(label).filter(|label| extended[2] == 0x29 && !label.is_empty() && label != NO_LABEL)
}
