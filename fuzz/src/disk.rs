//! A raw disk with partition tables and file systems.

use std::io;
use std::ops::Range;

use collective_disk::{BLOCK, ReadAt, unused};

use super::number;

const SECTOR: u64 = 512;
/// No disk here is larger.
const LARGEST: u64 = 64 << 20;

/// All runs together have no more sectors, so that reading stays short.
const MOST: u64 = 60_000;

/// A disk that is zeros but for some runs of equal sectors; later ones lie over earlier ones.
struct Sparse {
    size: u64,
    runs: Vec<(Range<u64>, [u8; SECTOR as usize])>,
}

impl ReadAt for Sparse {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.size);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.fill(0);
        for (run, bytes) in &self.runs {
            for sector in run.start.max(offset / SECTOR)..run.end.min(end.div_ceil(SECTOR)) {
                let start = sector * SECTOR;
                let (from, to) = (start.max(offset), (start + SECTOR).min(end));
                buf[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&bytes[(from - start) as usize..(to - start) as usize]);
            }
        }
        Ok(())
    }

    fn size(&self) -> u64 {
        self.size
    }
}

/// The disk's size, then runs of equal sectors: the first one, how many, how many bytes (the rest are zeros), the bytes.
pub fn disk(data: &[u8]) {
    let rest = &mut { data };
    let size = number(rest, 4) % (LARGEST + 1);
    let mut disk = Sparse { size, runs: Vec::new() };
    let mut left = MOST;
    while !rest.is_empty() {
        let (first, count, length) = (number(rest, 3), number(rest, 2), number(rest, 2) as usize);
        let (bytes, after) = rest.split_at(length.min(SECTOR as usize).min(rest.len()));
        *rest = after;
        let mut sector = [0; SECTOR as usize];
        sector[..bytes.len()].copy_from_slice(bytes);
        let count = count.min(left);
        left -= count;
        disk.runs.push((first..first + count, sector));
    }
    let survey = unused(&disk).expect("it can be read");
    assert!(survey.unused.iter().all(|range| range.start < range.end && range.end <= size));
    assert!(survey.unused.iter().all(|range| range.start % BLOCK == 0 && range.end % BLOCK == 0));
    assert!(survey.unused.windows(2).all(|pair| pair[0].end < pair[1].start));
}

/// A disk in that form.
pub fn shortened(disk: &[u8]) -> Vec<u8> {
    let mut out = (disk.len() as u32).to_le_bytes().to_vec();
    let mut sectors = disk.chunks(SECTOR as usize).enumerate().peekable();
    while let Some((first, sector)) = sectors.next() {
        let mut count = 1u16;
        while count < u16::MAX && sectors.next_if(|(_, next)| *next == sector).is_some() {
            count += 1;
        }
        let length = sector.len() - sector.iter().rev().take_while(|byte| **byte == 0).count();
        if length > 0 {
            out.extend(&(first as u32).to_le_bytes()[..3]);
            out.extend(count.to_le_bytes());
            out.extend((length as u16).to_le_bytes());
            out.extend(&sector[..length]);
        }
    }
    out
}
