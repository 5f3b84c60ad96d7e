//! The GUID partition table. Layout: UEFI specification, section 5.3.

use std::ops::Range;

use crate::checksum::crc32;
use crate::mbr::{Partition, Table};
use crate::read::{Fields, Part, Stop, doubt};

/// Both sizes of logical sectors in use; a raw image does not say which it was made for.
const SECTOR_SIZES: [u64; 2] = [512, 4096];
/// The specification's table has 16 KiB; libfdisk makes at most this.
const TABLE_LIMIT: u64 = 1 << 20;

/// Reads the primary table; a damaged one is a doubt, although a copy at the end may be sound.
pub(crate) fn read(disk: &Part<'_>) -> Result<Table, Stop> {
    for sector in SECTOR_SIZES {
        if disk.len() >= 2 * sector {
            let header = disk.read(sector, sector as usize, "reading a GPT header")?;
            if header.starts_with(b"EFI PART") {
                return read_table(disk, &header, sector);
            }
        }
    }
    doubt("it says that it has a GPT, but there is none")
}

fn read_table(disk: &Part<'_>, header: &[u8], sector: u64) -> Result<Table, Stop> {
    let length = header.u32_at(12) as usize;
    if !(92..=header.len()).contains(&length) {
        return doubt("its GPT header has an impossible length");
    }
    let mut summed = header[..length].to_vec();
    summed[16..20].fill(0);
    if crc32(&summed) != header.u32_at(16) || header.u64_at(24) != 1 {
        return doubt("the checksum of its GPT header is wrong");
    }
    let (count, entry_size) = (u64::from(header.u32_at(80)), u64::from(header.u32_at(84)));
    let table_size = count.saturating_mul(entry_size);
    if entry_size < 128 || !entry_size.is_power_of_two() || table_size > TABLE_LIMIT {
        return doubt("its GPT has impossibly many or odd entries");
    }
    let offset = header.u64_at(72).saturating_mul(sector);
    let entries = disk.read(offset, table_size as usize, "reading the GPT's entries")?;
    if crc32(&entries) != header.u32_at(88) {
        return doubt("the checksum of its GPT's entries is wrong");
    }
    let usable = header.u64_at(40)..header.u64_at(48).saturating_add(1);
    let mut partitions = Vec::new();
    for (number, entry) in (1..).zip(entries.chunks_exact(entry_size as usize)) {
        if entry[..16] != [0; 16] {
            partitions.push(read_entry(disk, number, entry, &usable, sector)?);
        }
    }
    let backup = header.u64_at(32).saturating_mul(sector);
    let own = vec![0..2 * sector, offset..offset + table_size, backup..backup.saturating_add(sector)];
    Ok(Table { partitions, own })
}

fn read_entry(disk: &Part<'_>, number: u32, entry: &[u8], usable: &Range<u64>, sector: u64) -> Result<Partition, Stop> {
    let (first, end) = (entry.u64_at(32), entry.u64_at(40).saturating_add(1));
    let is_inside = usable.start <= first && first < end && end <= usable.end;
    let range = first.saturating_mul(sector)..end.saturating_mul(sector);
    if !is_inside || range.end > disk.len() {
        return doubt(format!("partition {number} of its GPT reaches outside of what is usable"));
    }
    let units: Vec<u16> =
        entry[56..128].chunks_exact(2).map(|unit| unit.u16_at(0)).take_while(|unit| *unit != 0).collect();
    let label = Some(String::from_utf16_lossy(&units)).filter(|label| !label.is_empty());
    Ok(Partition { number, range, label })
}
