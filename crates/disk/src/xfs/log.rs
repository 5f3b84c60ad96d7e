//! The log: whether the last thing in it is the record of an unmount, as Linux' fs/xfs/xfs_log_recover.c decides.
//!
//! A log is a ring of blocks of 512 bytes. Each shows in its first bytes how often the ring had been round when it was
//! written, so that the newest block is where that number falls by one.

use super::superblock::Superblock;
use crate::read::{Fields, Part, Stop, doubt};

const BLOCK: u64 = 512;
const MAGIC: u32 = 0xfeed_babe;
const VERSION: u32 = 2;
/// Bytes of data for which one header block has room (XLOG_HEADER_CYCLE_SIZE).
const PER_HEADER: u64 = 32 << 10;
/// The largest record with its headers (XLOG_MAX_RECORD_BSIZE), in blocks, and some for headers.
const RECORD_LIMIT: u64 = 1024;
/// XLOG_UNMOUNT_TRANS
const OPERATION_UNMOUNT: u8 = 0x20;
/// Bytes read at once.
const STEP: u64 = 1 << 20;

/// Whether the file system was unmounted after the last change.
pub(super) fn check_clean(part: &Part<'_>, superblock: &Superblock) -> Result<(), Stop> {
    let range = superblock.log_range();
    let log = Log { part, start: range.start, blocks: (range.end - range.start) / BLOCK };
    let (head, cycle) = log.head()?;
    let Some((place, header)) = log.last_record(head)? else {
        return doubt("its log has no last record; mount it once, or run xfs_repair on it");
    };
    let length = u64::from(header.be32_at(12));
    let headers = u64::from(header.be32_at(320)).div_ceil(PER_HEADER).max(1);
    let end = place.saturating_add(headers).saturating_add(length.div_ceil(BLOCK));
    let data = log.read((place + headers) % log.blocks, 1)?;
    let is_unmount = header.be32_at(8) == VERSION
        && header.be32_at(4) == cycle
        && header.bytes(304) == superblock.uuid
        && header.be32_at(40) == 1
        && end % log.blocks == head % log.blocks
        && data[9] & OPERATION_UNMOUNT != 0;
    if is_unmount {
        return Ok(());
    }
    doubt(
        "it was not cleanly unmounted: its log is not empty; start the machine once and shut it down, or mount it once",
    )
}

struct Log<'a> {
    part: &'a Part<'a>,
    start: u64,
    blocks: u64,
}

impl Log<'_> {
    fn read(&self, block: u64, count: u64) -> Result<Vec<u8>, Stop> {
        self.part.read(self.start + block * BLOCK, (count * BLOCK) as usize, "reading a log")
    }

    /// The block behind the newest one (the log's length, if that is the last), and the newest one's round.
    fn head(&self) -> Result<(u64, u32), Stop> {
        let mut first = None;
        let mut head = None;
        let mut at = 0;
        while at < self.blocks {
            let count = (STEP / BLOCK).min(self.blocks - at);
            for (block, raw) in (at..).zip(self.read(at, count)?.chunks_exact(BLOCK as usize)) {
                let cycle = if raw.be32_at(0) == MAGIC { raw.be32_at(4) } else { raw.be32_at(0) };
                let newest = *first.get_or_insert(cycle);
                if head.is_none() && cycle != newest {
                    head = Some(block);
                }
                // Anything else is what a crash left behind, which recovery works out, but nobody here.
                let expected = if head.is_some() { newest.checked_sub(1) } else { Some(newest) };
                if newest == 0 || expected != Some(cycle) {
                    return doubt("its log was not written to its end; mount it once, or run xfs_repair on it");
                }
            }
            at += count;
        }
        Ok((head.unwrap_or(self.blocks), first.unwrap_or(0)))
    }

    /// The place and the header of the record that ends before `head`; a record may lie across the end of the ring, but
    /// its header does not lie far back.
    fn last_record(&self, head: u64) -> Result<Option<(u64, Vec<u8>)>, Stop> {
        for back in 1..=RECORD_LIMIT.min(self.blocks) {
            let place = (head + self.blocks - back) % self.blocks;
            let raw = self.read(place, 1)?;
            if raw.be32_at(0) == MAGIC {
                return Ok(Some((place, raw)));
            }
        }
        Ok(None)
    }
}
