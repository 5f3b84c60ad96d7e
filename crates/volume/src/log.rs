//! The log of a layer: which blocks each flush made the layer hold, in the data file behind the disk's own bytes, so
//! that one sync makes content and record durable together.
//!
//! The records are numbered; record `n` is in slot `n % SLOTS`. Flushes come one after the other, so every record but
//! the newest is of a flush that was through. The newest one is in doubt, and counts if the blocks have the content
//! that it says. Hence the rule for all who write: a block of the newest record stays as it is until that record has a
//! successor or is in the map.

use std::ops::Range;

use collective_model::Digest;
use collective_store::BLOCK;

/// Bytes of one record.
pub(crate) const SLOT: usize = 4096;
/// Records that the log has room for.
pub(crate) const SLOTS: u64 = if cfg!(test) { 4 } else { 64 };
/// A flush of more blocks goes into the map at once: beside that much data a second sync costs little, and hashing
/// more would cost as much.
const MAX_BLOCKS: u64 = if cfg!(test) { 12 } else { 256 };

const MAGIC: &[u8; 4] = b"CLLR";
const HEAD: usize = 48;
const RUN: usize = 16;
const SUM: usize = 32;
const MAX_RUNS: usize = (SLOT - HEAD - SUM) / RUN;

/// Where the log of a disk of `size` bytes begins.
pub(crate) fn start(size: u64) -> u64 {
    size.next_multiple_of(BLOCK)
}

/// Where it ends.
pub(crate) fn end(size: u64) -> u64 {
    start(size) + SLOTS * SLOT as u64
}

/// Where record `number` is.
pub(crate) fn place(size: u64, number: u64) -> u64 {
    start(size) + number % SLOTS * SLOT as u64
}

/// Blocks, in the order in which they were added until they are sorted. No block is added twice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Blocks {
    runs: Vec<Range<u64>>,
    count: u64,
}

impl Blocks {
    /// Adds one. What no record could name is only counted.
    pub fn add(&mut self, block: u64) {
        self.count += 1;
        let fits = self.fits();
        match self.runs.last_mut() {
            Some(last) if last.end == block => last.end += 1,
            _ if fits => self.runs.push(block..block + 1),
            _ => {}
        }
    }

    /// Adds those that a failed flush leaves behind.
    pub fn put_back(&mut self, others: Self) {
        self.count += others.count;
        self.runs.extend(others.runs);
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// One record can name them all.
    pub fn fits(&self) -> bool {
        self.count <= MAX_BLOCKS && self.runs.len() <= MAX_RUNS
    }

    pub fn sort(&mut self) {
        self.runs.sort_unstable_by_key(|run| run.start);
    }

    /// Whether one of `blocks` is among them, which are sorted.
    pub fn touch(&self, blocks: &Range<u64>) -> bool {
        let next = self.runs.partition_point(|run| run.end <= blocks.start);
        self.runs.get(next).is_some_and(|run| run.start < blocks.end)
    }

    pub fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }
}

/// What one flush made the layer hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub number: u64,
    /// Sorted, and no more than fit.
    pub blocks: Blocks,
    /// Of the blocks' bytes, one block after the other.
    pub content: Digest,
}

fn number_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i: usize| bytes[at + i]))
}

impl Record {
    pub fn encode(&self) -> [u8; SLOT] {
        let mut slot = [0; SLOT];
        slot[..4].copy_from_slice(MAGIC);
        slot[4..8].copy_from_slice(&(self.blocks.runs.len() as u32).to_le_bytes());
        slot[8..16].copy_from_slice(&self.number.to_le_bytes());
        slot[16..HEAD].copy_from_slice(&self.content.0);
        for (bytes, run) in slot[HEAD..SLOT - SUM].chunks_exact_mut(RUN).zip(&self.blocks.runs) {
            bytes[..8].copy_from_slice(&run.start.to_le_bytes());
            bytes[8..].copy_from_slice(&(run.end - run.start).to_le_bytes());
        }
        let sum = Digest::of(&slot[..SLOT - SUM]);
        slot[SLOT - SUM..].copy_from_slice(&sum.0);
        slot
    }

    /// The record in `slot`, which is number `index` of the log of a disk of `blocks` blocks. Whatever else may be there
    /// is no record: what a power cut left of one, or zeros.
    fn decode(slot: &[u8], index: u64, blocks: u64) -> Option<Self> {
        let (body, sum) = slot.split_at_checked(SLOT - SUM)?;
        if &body[..4] != MAGIC || Digest::of(body).0[..] != *sum {
            return None;
        }
        let number = number_at(body, 8);
        let count = u32::from_le_bytes([4, 5, 6, 7].map(|i: usize| body[i])) as usize;
        // Half of all numbers are more than there can be flushes, and the next number has to exist.
        if number % SLOTS != index || number > u64::MAX / 2 || count > MAX_RUNS {
            return None;
        }
        let mut found = Blocks::default();
        let mut free = 0;
        for run in body[HEAD..].chunks_exact(RUN).take(count) {
            let (first, length) = (number_at(run, 0), number_at(run, 8));
            let end = first.checked_add(length)?;
            if first < free || length == 0 || end > blocks {
                return None;
            }
            free = end;
            found.count += length;
            found.runs.push(first..end);
        }
        let content = Digest(std::array::from_fn(|i| body[16 + i]));
        found.fits().then_some(Self { number, blocks: found, content })
    }
}

/// The records in the bytes of a log, oldest first.
pub(crate) fn records(log: &[u8], blocks: u64) -> Vec<Record> {
    let slots = (0..).zip(log.chunks_exact(SLOT));
    let mut records: Vec<_> = slots.filter_map(|(index, slot)| Record::decode(slot, index, blocks)).collect();
    records.sort_unstable_by_key(|record| record.number);
    records
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(number: u64, blocks: &[u64]) -> Record {
        let mut all = Blocks::default();
        blocks.iter().for_each(|block| all.add(*block));
        all.sort();
        Record { number, blocks: all, content: Digest::of(b"content") }
    }

    /// A log with these records in their slots.
    fn log(records: &[Record]) -> Vec<u8> {
        let mut log = vec![0; SLOTS as usize * SLOT];
        for record in records {
            log[place(0, record.number) as usize..][..SLOT].copy_from_slice(&record.encode());
        }
        log
    }

    #[test]
    fn records_come_back_in_order() {
        let all = [record(5, &[]), record(6, &[3, 4, 9, 0]), record(7, &[99])];
        assert_eq!(records(&log(&all), 100), all);
        assert_eq!(records(&log(&all), 99), all[..2], "a block beyond the disk");
        assert_eq!(records(&log(&[record(2, &[1]), record(2 + SLOTS, &[2])]), 100), [record(2 + SLOTS, &[2])]);
    }

    #[test]
    fn what_contradicts_itself_is_no_record() {
        let mut other_slot = log(&[record(5, &[1])]);
        other_slot.rotate_right(SLOT);
        assert_eq!(records(&other_slot, 100), []);
        assert_eq!(records(&log(&[record(u64::MAX, &[1])]), 100), []);
        assert_eq!(records(&log(&[record(1, &(0..=MAX_BLOCKS).collect::<Vec<_>>())]), 100), []);
        for runs in [vec![2..2, 3..3], vec![3..5, 4..6], vec![8..9, 3..4]] {
            let blocks = Blocks { runs, count: 0 };
            assert_eq!(records(&log(&[Record { number: 1, blocks, content: Digest([0; 32]) }]), 100), []);
        }
    }

    #[test]
    fn blocks_are_found_among_runs() {
        let blocks = record(0, &[7, 3, 4, 5]).blocks;
        let touched = |range: Range<u64>| blocks.touch(&range);
        assert!(!touched(0..3) && touched(0..4) && touched(5..6) && !touched(6..7) && touched(6..8) && !touched(8..99));
    }

    #[test]
    fn too_many_are_counted_and_not_kept() {
        let mut blocks = Blocks::default();
        (0..100_000).for_each(|i| blocks.add(i * 2));
        assert!(!blocks.fits() && blocks.runs.len() <= MAX_RUNS + 1);
    }

    proptest! {
        #[test]
        fn whatever_is_there_it_is_whole_or_nothing(
            at in 0..SLOTS as usize * SLOT, bytes in proptest::collection::vec(any::<u8>(), 1..600),
        ) {
            let all = [record(8, &[1, 2, 50]), record(9, &[]), record(10, &[7])];
            let mut damaged = log(&all);
            let end = damaged.len().min(at + bytes.len());
            damaged[at..end].copy_from_slice(&bytes[..end - at]);
            prop_assert!(records(&damaged, 100).iter().all(|record| all.contains(record)));
        }

        #[test]
        fn a_right_checksum_proves_nothing(
            head in proptest::collection::vec(any::<u8>(), 44), tail: [u8; 32], runs in 0u8..5,
        ) {
            let mut slot = record(0, &[]).encode();
            slot[4..48].copy_from_slice(&head);
            slot[4..8].copy_from_slice(&u32::from(runs).to_le_bytes());
            slot[48..80].copy_from_slice(&tail);
            let sum = Digest::of(&slot[..SLOT - SUM]);
            slot[SLOT - SUM..].copy_from_slice(&sum.0);
            for index in 0..SLOTS {
                if let Some(record) = Record::decode(&slot, index, 100) {
                    prop_assert!(record.blocks.runs().iter().all(|run| run.start < run.end && run.end <= 100));
                }
            }
        }
    }
}
